"""State of a training on disk, one file replaced in one step; and finished models as folders."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from redwood import _storage
from redwood._storage import sync_folder
from redwood.errors import ArgumentError

ABOUT = "redwood-tuning.json"
"""In the folder of a finished model: how it was made."""

_ABOUT = "redwood"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class TrainingHistory:
    """What became of a model, epoch by epoch.

    Args:
        scores: agreement on the validation samples, weighted; the first is before any training.
        losses: mean loss of each epoch.
        best: index into `scores` of the weights that were kept; 0: training brought nothing.
    """

    scores: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    best: int = 0


@dataclass
class State:
    """What a training knows beside its model and optimizer: its history, the best weights."""

    history: TrainingHistory
    best: dict[str, Tensor]


def snapshot(model: Any) -> dict[str, Tensor]:
    """Returns a copy of a model's parameters; tied ones once."""
    return {name: each.detach().clone() for name, each in model.named_parameters()}


def put_back(model: Any, parameters: Mapping[str, Tensor]) -> None:
    """Gives a model the parameters of a `snapshot`."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameters[name])


def save_state(
    path: Path, key: str, model: Any, optimizer: torch.optim.Optimizer, state: State
) -> None:
    """Writes everything that `restore_state` needs, replacing an older file in one step.

    Raises:
        OSError: a disk that is full, a folder that cannot be written.
    """
    tensors = {f"best.{name}": each for name, each in state.best.items()}
    steps: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        known = optimizer.state.get(parameter)
        if known:
            steps[name] = int(known["step"])
            for moment in _MOMENTS:
                tensors[f"{moment}.{name}"] = known[moment]
    about = {"key": key, "history": asdict(state.history), "steps": steps}
    held = {name: each.contiguous().cpu() for name, each in tensors.items()}
    _storage.write_whole(path, to_bytes(held, {_ABOUT: json.dumps(about)}))


def restore_state(
    path: Path, key: str, model: Any, optimizer: torch.optim.Optimizer
) -> State | None:
    """Returns the state in a file and fills model and optimizer; None if there is no such file.

    Raises:
        ArgumentError: a file that is damaged or of another run; the message names it.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[_ABOUT])
            if about["key"] != key:
                raise ArgumentError(f"{path} is of another run: choose another folder")
            named = dict(model.named_parameters())
            history, steps = TrainingHistory(**about["history"]), about["steps"]
            best = {name: file.get_tensor(f"best.{name}") for name in named}
            put_back(model, {name: file.get_tensor(f"model.{name}") for name in named})
            for name, count in steps.items():
                parameter = named[name]
                held = {
                    moment: file.get_tensor(f"{moment}.{name}").to(parameter.device)
                    for moment in _MOMENTS
                }
                optimizer.state[parameter] = {"step": torch.tensor(float(count)), **held}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError(
            f"{path} is damaged ({error}): remove it to train this model from its beginning"
        ) from error
    return State(history, best)


def publish(
    model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype, about: Mapping[str, Any]
) -> None:
    """Writes a model folder that `redwood.load` reads, under its name only once it is whole.

    Args:
        model: left in `dtype`.
        about: how it was made, for `read_about`.

    Raises:
        OSError: a disk that is full, a folder that cannot be written.
    """
    draft = folder.with_name(f".{folder.name}.making")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        model.to(dtype).save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        _storage.write(draft / ABOUT, about)
        for path in draft.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        draft.rename(folder)
    except SafetensorError as error:  # it wraps what the disk said
        raise OSError(f"cannot write {draft}: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    sync_folder(folder.parent)


def read_about(folder: Path, key: str) -> dict[str, Any]:
    """Returns how a finished model was made.

    Raises:
        ArgumentError: nothing that `publish` wrote with this `key`, or a damaged file.
    """
    try:
        about: dict[str, Any] = _storage.read(folder / ABOUT)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{folder / ABOUT} is missing or damaged ({error})") from error
    if about.get("key") != key:
        raise ArgumentError(f"{folder} is of another run: choose another folder")
    return about
