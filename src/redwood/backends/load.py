"""From a model folder to a backend, with a check that its tree logits are right."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from redwood._transformers import attention_of, check_version
from redwood.backends.base import Backend
from redwood.backends.cuda_graph.backend import with_graphs
from redwood.backends.eager.backend import ATTENTION, EagerBackend
from redwood.backends.eager.packing import pack_linears
from redwood.backends.eager.probe import (
    PROBE_SLOTS,
    check_structure,
    natural_tokens,
    probe,
    stock_logits,
)
from redwood.backends.eager.together import together_of
from redwood.backends.native.backend import extension
from redwood.backends.native.load import check_options, default_threads, load_native
from redwood.backends.offload.backend import OffloadBackend
from redwood.backends.offload.load import open_offloaded
from redwood.backends.parallel.load import open_parallel
from redwood.errors import (
    ArgumentError,
    CapacityError,
    ModelError,
    NumericalError,
    UnsupportedError,
)
from redwood.models import PACKAGED, locate, resolve
from redwood.sampling import check_finite

_log = logging.getLogger(__name__)

BACKENDS = ("auto", "native", "eager", "cuda_graph")
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
_LAYER_TYPES = {"full_attention", "sliding_attention"}


def open_model(
    name: str,
    *,
    backend: str = "auto",
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    capacity: int | None = None,
    progress: bool = False,
    weights: str | None = None,
    kv: str | None = None,
    threads: int | None = None,
    cpus: Sequence[int] | None = None,
    outputs: int | None = None,
    draft_weights: str | None = None,
    offload: str | None = None,
    memory: str | int | None = None,
    parallel: str | None = None,
) -> tuple[Path, Backend]:
    """Returns the folder with a model's tokenizer, and a backend with its weights.

    Args:
        name: a packaged name, a folder, a .gguf file or a hub id.
        backend: "native", "eager", "cuda_graph" (CUDA only), or "auto": native on a CPU where it
            can compute the model and no dtype is asked for, else eager.
        dtype: of the eager backend; see `load_eager`.
        device: "cpu", "cuda", "cuda:N"; "auto" takes CUDA where there is one.
        capacity: slots per row, at most the model's context length, which is the default.
        progress: show progress of fetching and converting on stderr.
        weights, kv, threads, cpus: of the native backend alone; see `load_native`.
        outputs, draft_weights: of a drafter that the native backend runs: tokens that it scores,
            and its weights in the place of `weights`. Elsewhere they are not needed.
        offload, memory: where weights stay, and bytes that the process may take; see
            `load_offload`, whose `weights` and `threads` they then are.
        parallel: "tensor" or "pipeline", under torchrun; see `open_parallel`.

    Raises:
        ArgumentError: unknown backend, dtype or device, an option that the backend does not have.
        CapacityError, ModelError, UnsupportedError: see `load_native` and `load_eager`.
    """
    given = {"weights": weights, "kv": kv, "threads": threads, "cpus": cpus}
    native: dict[str, Any] = {option: value for option, value in given.items() if value is not None}
    if parallel is not None:
        others = {**native, "offload": offload, "memory": memory}
        how: dict[str, Any] = dict(dtype=dtype, device=device, capacity=capacity)
        return open_parallel(name, parallel, backend, others, progress=progress, **how)
    place = _device(device)
    if offload is not None:
        odd = [option for option in ("kv", "cpus") if option in native]
        if backend != "auto" or odd:
            wrong = ", ".join(odd) or f"backend {backend}"
            raise ArgumentError(f"{wrong} cannot go with offload: it is a backend of its own")
        folder = resolve(name, progress=progress)
        made_for = name if name in PACKAGED else str(folder.resolve())
        how = {"weights": weights or "auto", "threads": threads, "memory": memory}
        return folder, load_offload(
            folder, made_for, offload, dtype=dtype, device=place, capacity=capacity, **how
        )
    if memory is not None:
        raise ArgumentError("memory is a limit for offload, which was not asked for")
    refused: UnsupportedError | None = None
    if _wants_native(backend, dtype, place, native):
        try:
            extension()
            folder, gguf = locate(name, progress=progress)
            if draft_weights is not None:
                native["weights"] = draft_weights
            known = name if name in PACKAGED else folder.name if gguf else None
            made = load_native(
                folder, gguf, capacity=capacity, name=known, outputs=outputs, **native
            )
            return folder, made
        except UnsupportedError as error:
            if backend == "native" or any(value is not None for value in given.values()):
                raise
            refused = error
    try:
        folder = resolve(name, progress=progress)
        eager = load_eager(folder, dtype=dtype, device=place, capacity=capacity)
    except (ModelError, UnsupportedError) as error:
        if refused is None:
            raise
        raise type(error)(f"{error}; and the native backend: {refused}") from error
    if refused is not None:
        _log.warning("%s; the eager backend runs it", refused)
    return folder, with_graphs(eager) if backend == "cuda_graph" else eager


def fetch_for(
    name: str,
    *,
    backend: str = "auto",
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    **native: Any,
) -> None:
    """Fetches and converts what `open_model` will read, with progress on stderr.

    Args and Raises: as `open_model`; `native` are weights, kv, threads and cpus.
    """
    wanted = _wants_native(backend, dtype, _device(device), native)
    if wanted:
        try:
            extension()
        except UnsupportedError:
            if backend == "native" or native:
                raise
            wanted = False
    (locate if wanted else resolve)(name, progress=True)


def _wants_native(
    backend: str, dtype: str | torch.dtype, place: torch.device, native: dict[str, Any]
) -> bool:
    if backend not in BACKENDS:
        raise ArgumentError(f"backend {backend!r} must be one of {', '.join(BACKENDS)}")
    if backend == "cuda_graph" and place.type != "cuda":
        raise ArgumentError(f"the cuda_graph backend needs a CUDA device, not {place}")
    check_options(**native)
    fits = place.type == "cpu" and dtype == "auto"
    if backend == "native" and not fits:
        wrong = f"dtype {dtype} (it takes weights=)" if place.type == "cpu" else f"device {place}"
        raise ArgumentError(f"the native backend does not take {wrong}")
    wanted = backend in ("auto", "native") and fits
    if native and not wanted:
        raise ArgumentError(f"{', '.join(native)}: only the native backend has these options")
    return wanted


def load_eager(
    folder: Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    capacity: int | None = None,
) -> EagerBackend:
    """Returns the eager backend for the model in `folder`.

    Only safetensors are read, and no remote code runs.

    Args:
        dtype: "float32", "bfloat16", "float16" or torch's own; "auto" is float32
            on a CPU and the model's on CUDA.
        device: "cpu", "cuda", "cuda:N"; "auto" takes CUDA where there is one.
        capacity: slots per row, at most the model's context length, which is the default.

    Raises:
        ArgumentError: unknown dtype or device.
        CapacityError: a capacity that is below 2 or beyond the model's context.
        ModelError: a folder that does not load.
        UnsupportedError: a model that cannot be served exactly, with the reason.
    """
    place = _device(device)
    config = _config(folder)
    slots = _capacity(capacity, config)
    model = load_stock(folder, _dtype(dtype, place, config)).to(place)
    if place.type == "cpu":
        pack_linears(model)
    return wrap_model(model, slots)


def load_stock(folder: Path, dtype: torch.dtype, **how: Any) -> PreTrainedModel:
    """Returns the model of a folder as Transformers loads it, on the CPU, in eval mode.

    Args:
        how: goes to Transformers.

    Raises:
        ModelError: a folder that does not load, or lacks weights.
    """
    transformers_logging.disable_progress_bar()
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            config=_config(folder),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **how,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"{folder} does not load: {_line(error)}") from error
    missing = sorted(loading["missing_keys"])
    if missing:  # Transformers would go on with random numbers in their place
        raise ModelError(f"{folder} lacks {len(missing)} of its weights, the first is {missing[0]}")
    loaded: PreTrainedModel = model.eval()
    return loaded


def load_offload(
    folder: Path,
    name: str,
    offload: str = "disk",
    *,
    memory: str | int | None = None,
    weights: str = "auto",
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    capacity: int | None = None,
    threads: int | None = None,
) -> OffloadBackend:
    """Returns the offload backend for the model in `folder`; see `backends.offload`.

    Args:
        name: under which the file that it streams from is kept in the cache.
        offload, memory, weights: see `open_offloaded`.
        dtype, device, capacity: as of `load_eager`.
        threads: that multiply; None: one for each processor that this process may use.

    Raises: as `load_eager` and `open_offloaded`.
    """
    place, config = _device(device), _config(folder)
    slots = _capacity(capacity, config)
    model, make = open_offloaded(
        folder,
        config,
        name=name,
        place=offload,
        memory=memory,
        weights=weights,
        dtype=_dtype(dtype, place, config),
        device=place,
        threads=threads or default_threads(),
    )
    made = wrap_model(model, slots, make)
    assert isinstance(made, OffloadBackend)
    return made


def wrap_model(
    model: PreTrainedModel,
    capacity: int | None = None,
    make: Callable[[PreTrainedModel, int], EagerBackend] = EagerBackend,
) -> EagerBackend:
    """Returns a backend around a loaded Transformers model, switched to our attention and checked.

    Args:
        model: to serve.
        capacity: slots of a row; None: the model's context.
        make: the backend's class, or what stands for it.

    Raises:
        UnsupportedError: the model cannot be served exactly, with the reason.
        NumericalError: its logits are NaN or infinite.
    """
    check_version()
    _refuse_unsupported(model.config)
    slots = _capacity(capacity, model.config)
    before = attention_of(model.config)
    try:
        model.set_attn_implementation(check_structure(model))
        stock = stock_logits(model, natural_tokens(model))
        check_finite(stock.logits)
        model.set_attn_implementation(ATTENTION)
        probe(make(model, max(slots, PROBE_SLOTS)), stock)
        together = together_of(make(model, slots))
    except Exception as error:
        model.set_attn_implementation(before)
        if isinstance(error, UnsupportedError | NumericalError):
            raise
        raise UnsupportedError(
            f"{type(model).__name__} does not run with tree attention: {_line(error)}"
        ) from error
    made = make(model, slots)
    made.together = together
    return made


def _device(name: str | torch.device) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"device {name!r} is unknown: use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise ArgumentError(f"device {name!r} is not supported: use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ArgumentError(f"device {name!r}: this machine has {torch.cuda.device_count()} GPUs")
    return device


def _dtype(name: str | torch.dtype, device: torch.device, config: Any) -> torch.dtype:
    name = str(name).removeprefix("torch.")
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        stored = getattr(config, "dtype", None)
        return next((known for known in DTYPES.values() if known == stored), torch.bfloat16)
    if name not in DTYPES:
        raise ArgumentError(f"dtype {name!r} must be auto or one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # Transformers checks the fields with errors of its own
        raise ModelError(f"{folder} has no usable config.json: {_line(error)}") from error


def _capacity(capacity: int | None, config: Any) -> int:
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or 4096
    if capacity is None:
        return int(context)
    if type(capacity) is not int or not 2 <= capacity <= context:
        raise CapacityError(f"capacity {capacity} must be between 2 and the context of {context}")
    return capacity


def _refuse_unsupported(config: Any) -> None:
    if config.is_encoder_decoder:
        raise UnsupportedError("encoder-decoder models are not supported, only causal ones")
    text = config.get_text_config()
    odd = set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES
    if odd:
        raise UnsupportedError(
            f"{config.model_type} has layers of type {', '.join(sorted(odd))}: a token tree needs "
            "attention whose past can be masked per node"
        )


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]
