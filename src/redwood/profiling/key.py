"""The key of a profile: the target, drafters, machine and options that it is valid for."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from redwood import __version__
from redwood._storage import digest
from redwood.backends.base import Backend
from redwood.drafters.base import Drafter, ModelDrafter
from redwood.models import PACKAGED, gguf_parts, resolve
from redwood.profiling.profile import ProfileKey

_PROCESSORS = Path("/proc/cpuinfo")


def profile_key(
    target: Backend,
    name: str,
    drafters: Mapping[str, Drafter],
    *,
    weights: str | None = None,
    kv: str | None = None,
    cpus: Sequence[int] | None = None,
) -> ProfileKey:
    """Returns the key of a profile.

    Args:
        target: the loaded target.
        name: of the target, as `redwood.load` took it.
        drafters: by name; that of a draft model as `redwood.load` took it.
        weights, kv, cpus: as given to `redwood.load`.

    Raises:
        ModelError: there is no such model.
    """
    native = target.name == "native"
    on_gpu = target.device.type == "cuda"
    threads = getattr(target, "threads", None) or (0 if on_gpu else torch.get_num_threads())
    return ProfileKey(
        target=_identity(name),
        drafters={each: _draft_identity(each, drafters[each]) for each in sorted(drafters)},
        backend=target.name,
        isa=str(getattr(target, "isa", "")),
        weights=(weights or "auto") if native else _dtype(target),
        kv=(kv or "auto").replace("auto", "f16") if native else "",
        threads=int(threads),
        cpus=",".join(map(str, cpus or ())),
        processor=_processor(),
        device=torch.cuda.get_device_name(target.device) if on_gpu else str(target.device),
        redwood=__version__,
    )


def _dtype(target: Backend) -> str:
    """The `weights` of a backend that runs a module: its dtype, and how they are offloaded."""
    dtype = str(getattr(getattr(target, "model", None), "dtype", ""))
    return f"{dtype} {getattr(target, 'setting', '')}".strip()


def _identity(name: str) -> str:
    """A model's name, and its sha256 or a stamp of the sizes and times of its files."""
    if name in PACKAGED:
        return f"{name} {PACKAGED[name].sha256[:16]}"
    path = Path(os.path.expanduser(name))
    if not path.is_file():
        path = resolve(name, progress=False)
    files = gguf_parts(path) if path.is_file() else _model_files(path)
    listed = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    shown = str(path.resolve()) if os.path.exists(os.path.expanduser(name)) else name
    return f"{shown} {digest(repr(listed))[:16]}"


def _draft_identity(name: str, drafter: Drafter) -> str:
    """As `_identity`, with the tokens it scores: its head may be cut; "" without a model."""
    if not isinstance(drafter, ModelDrafter):
        return ""
    return f"{_identity(name)} vocabulary {drafter.backend.vocab_size}"


def _model_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")])


def _processor() -> str:
    """The model of the CPU, or what the platform calls it."""
    try:
        lines = _PROCESSORS.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine()).strip()
