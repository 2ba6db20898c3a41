"""The native backend: Llama-shaped decoders in C++, quantised, on CPUs.

`load` goes from a folder or a GGUF file to a `backend.NativeBackend`: `spec` says what is computed,
`spec_gguf` and `spec_hf` read it from files, `weights` finds the tensors, `packed` keeps what was
packed. The C++ lies in `src/native`.
"""

from redwood.backends.native.backend import NativeBackend

__all__ = ["NativeBackend"]
