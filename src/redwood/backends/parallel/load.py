"""From a model folder to one process's part of the model, and to the backend over all of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor

from redwood import __version__
from redwood.backends.eager.backend import EagerBackend
from redwood.backends.eager.load import wrap_model
from redwood.backends.eager.packing import pack_linears
from redwood.backends.eager.stock import (
    config_of,
    dtype_of,
    has_recurrent_layers,
    load_stock,
    slots_of,
)
from redwood.backends.parallel.backend import Member, ParallelBackend, follow
from redwood.backends.parallel.ranks import JOIN_S, About, Place, Ranks, find_place, join
from redwood.errors import ArgumentError, ModelError, ParallelError, UnsupportedError
from redwood.models import resolve
from redwood.models._transformers import pipeline_plan, plain_logits, split_options, tensor_plan

_STUCK = timedelta(hours=2)  # for a collective: the lines find dead ranks long before
_BLOCKS, _BLOCK_BYTES = 256, 4096  # of a file of weights, for its digest
_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
_SPLIT_BY_HEADS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value")
_STAGES = {"embed_tokens", "layers", "norm"}  # the names that Transformers cuts a model at
_ACROSS_STAGES = {  # settings of what a stage would have to be told beside hidden states
    "num_kv_shared_layers": "layers that read the keys and values of earlier ones",
    "hidden_size_per_layer_input": "embeddings of tokens in every layer",
}


def open_parallel(
    name: str,
    parallel: str,
    backend: str,
    others: Mapping[str, Any],
    *,
    progress: bool = False,
    **how: Any,
) -> tuple[Path, ParallelBackend]:
    """Returns the folder with a model's tokenizer, and what `load_parallel` makes of it.

    Args:
        name, backend, progress: as `redwood.backends.load.open_model`.
        others: options that do not go with this; None where not given.
        how: dtype, device and capacity.

    Raises: see `load_parallel`.
    """
    find_place(parallel)
    if backend not in ("auto", "eager"):
        raise ArgumentError(f"parallel {parallel} runs on the eager backend, not on {backend}")
    odd = [option for option, value in others.items() if value is not None]
    if odd:
        raise ArgumentError(f"{', '.join(odd)} cannot go with parallel {parallel}")
    folder = resolve(name, progress=progress)
    return folder, load_parallel(folder, parallel, **how)


def load_parallel(
    folder: Path,
    parallel: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    capacity: int | None = None,
) -> ParallelBackend:
    """Returns, on rank 0, the backend of a model that is spread over the processes of a launch.

    On all other ranks it does not return: they follow until rank 0 closes the backend, or ends,
    and then raise SystemExit(0). What stands after it in a program runs on rank 0 alone.

    Runs on CPUs through gloo. On CUDA, through NCCL, it has not been run yet.

    Args:
        folder: of the model; every rank reads its own part.
        parallel: "tensor" or "pipeline".
        dtype, capacity: as `load_eager`.
        device: "auto", "cpu" or "cuda"; every rank takes the GPU of its number.

    With REDWOOD_DEBUG set at rank 0, all ranks compare their trees and logits at every forward.

    Raises:
        ArgumentError: no launch of 2 processes or more, ranks started with different options, a
            device that this launch cannot have.
        ModelError: a folder that does not load, ranks with different models.
        UnsupportedError: a model that cannot be split so, with the reason.
        ParallelError: ranks that do not find each other.
    """
    place = find_place(parallel)
    here = _device(device, place)
    config = config_of(folder)
    number, slots = dtype_of(dtype, here, config), slots_of(capacity, config)
    _refuse(config, parallel, place.size)
    options = {"parallel": parallel, "dtype": str(number), "capacity": slots, "device": here.type}
    versions = {
        "Redwood": __version__,
        "Transformers": transformers.__version__,
        "PyTorch": torch.__version__,
    }
    about = About(str(folder), _digests(folder), {**versions, **options})
    store = _store(place)
    ranks, shared = join(place, store, about, {"checked": bool(os.environ.get("REDWOOD_DEBUG"))})
    try:
        leave = _open_group(place, store, here)
        part = _load_part(folder, parallel, place, number, slots)
    except Exception as error:
        ranks.settle()
        ranks.fail(f"rank {place.rank}: {error}")
        raise
    member = Member(part, checked=shared["checked"])
    if place.rank > 0:
        _follow(member, ranks, leave, checked=shared["checked"])
    name = f"{parallel}_parallel"
    return ParallelBackend(member, ranks, name, checked=shared["checked"], then=leave)


def _follow(member: Member, ranks: Ranks, leave: Callable[[], None], *, checked: bool) -> NoReturn:
    follow(member, ranks, checked=checked)
    leave()
    raise SystemExit(0)


def _device(name: str | torch.device, place: Place) -> torch.device:
    """The device of this rank. Transformers takes GPUs wherever it sees some."""
    has_gpu = torch.cuda.is_available()
    if str(name) not in ("auto", "cpu", "cuda"):
        raise ArgumentError(f"device {name}: in parallel, cuda gives every rank a GPU of its own")
    if str(name) == "cpu" and has_gpu:
        raise ArgumentError("device cpu: hide the GPUs from the ranks, CUDA_VISIBLE_DEVICES=''")
    if not has_gpu:
        if str(name) == "cuda":
            raise ArgumentError("device cuda: this machine has 0 GPUs")
        return torch.device("cpu")
    if place.local_rank >= torch.cuda.device_count():
        raise ArgumentError(
            f"rank {place.rank} needs a GPU of its own: this machine has "
            f"{torch.cuda.device_count()}, so start as many processes"
        )
    return torch.device("cuda", place.local_rank)


def _refuse(config: Any, parallel: str, size: int) -> None:
    """Raises UnsupportedError where Transformers has no plan for this, or it would not come out."""
    text, kind = config.get_text_config(), config.model_type
    split_options(parallel, size)
    if has_recurrent_layers(config):
        raise UnsupportedError(
            f"recurrent layers are not split over processes: run {kind} models in one, without "
            "parallel, and on a CPU with weights int4 if memory is short"
        )
    if parallel == "pipeline":
        if set(pipeline_plan(config)) != _STAGES:
            raise UnsupportedError(f"Transformers cannot cut {kind} models into a pipeline")
        if text.num_hidden_layers < size:
            raise UnsupportedError(
                f"{text.num_hidden_layers} layers do not make {size} stages: start fewer processes"
            )
        for setting, what in _ACROSS_STAGES.items():
            if getattr(text, setting, None):
                raise UnsupportedError(
                    f"{what} ({setting}): {kind} models cannot be cut into a pipeline"
                )
        return
    shares = getattr(text, "activation_sparsity_pattern", None)
    if any(shares if isinstance(shares, list | tuple) else [shares]):
        raise UnsupportedError(
            "gates that are compared with all of an MLP's (activation_sparsity_pattern): "
            f"{kind} models cannot be split over processes"
        )
    plan = tensor_plan(config)
    if not plan:
        raise UnsupportedError(f"Transformers has no tensor parallel plan for {kind} models")
    heads = text.num_attention_heads
    layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text]
    kv_heads = min(getattr(layer, "num_key_value_heads", None) or heads for layer in layers)
    by_heads = any(
        name.rpartition(".")[2] in _SPLIT_BY_HEADS and style == "colwise"
        for name, style in plan.items()
    )
    if by_heads and (heads % size or kv_heads % size):
        raise UnsupportedError(
            f"{heads} heads with {kv_heads} heads of keys cannot be split over {size} processes "
            "evenly: start another number, or use parallel pipeline"
        )


def _store(place: Place) -> Any:
    """The store of this launch, with keys of our own: a program may open several models."""
    distributed: Any = import_module("torch.distributed")
    try:
        store, _, _ = next(distributed.rendezvous("env://", timeout=timedelta(seconds=JOIN_S)))
        opened = store.add(f"redwood/{place.rank}", 1)
    except (RuntimeError, ValueError) as error:
        raise ParallelError(f"rank {place.rank} does not reach the store: {error}") from error
    return distributed.PrefixStore(f"redwood/{opened}", store)


def _open_group(place: Place, store: Any, device: torch.device) -> Callable[[], None]:
    """Opens the process group, unless the program has; returns what closes it again."""
    distributed: Any = import_module("torch.distributed")
    if distributed.is_initialized():
        return lambda: None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=distributed.PrefixStore("group", store),
        rank=place.rank,
        world_size=place.size,
        timeout=_STUCK,
        device_id=device if device.type == "cuda" else None,
    )
    close: Callable[[], None] = distributed.destroy_process_group
    return close


def _load_part(
    folder: Path, parallel: str, place: Place, dtype: torch.dtype, slots: int
) -> EagerBackend:
    """Loads what this rank computes, and checks it together with the others."""
    model = load_stock(folder, dtype, **split_options(parallel, place.size))
    if parallel == "pipeline":
        _check_stage(model, place)
        if model.device.type == "cpu":
            pack_linears(model)  # a layer of a tensor parallel model is more than its weights
    return wrap_model(model, slots)


@torch.inference_mode()
def _check_stage(model: Any, place: Place) -> None:
    """Looks whether a stage does its layers and nothing else.

    Transformers hands what a stage got to the whole model as embeddings. A model that does more to
    those than its layers do (a scale before the first, a norm with another name after the last)
    would do it again at every stage, and answer something else.

    Raises:
        UnsupportedError: it does more.
    """
    base = model.base_model
    seen: dict[str, Tensor] = {}

    def note(name: str, value: Any) -> None:
        seen[name] = value[0] if isinstance(value, tuple) else value

    own = [layer for layer in base.layers if any(True for _ in layer.parameters())]
    hooks = [
        base.register_forward_pre_hook(
            lambda _, args, given: note("got", given.get("inputs_embeds")), with_kwargs=True
        ),
        own[0].register_forward_pre_hook(
            lambda _, args, given: note("first", args[0] if args else given["hidden_states"]),
            with_kwargs=True,
        ),
        own[-1].register_forward_hook(lambda _, args, made: note("last", made)),
        base.register_forward_hook(lambda _, args, made: note("gave", made[0])),
    ]
    try:
        plain_logits(model, torch.arange(4, device=model.device)[None])
    finally:
        for hook in hooks:
            hook.remove()
    wrong = place.rank > 0 and not torch.equal(seen["got"], seen["first"])
    wrong |= place.rank < place.size - 1 and not torch.equal(seen["last"], seen["gave"])
    if wrong:
        raise UnsupportedError(
            f"{type(model).__name__} does more than its layers at stage {place.rank} of a "
            "pipeline: use parallel tensor"
        )


def _digests(folder: Path) -> dict[str, str]:
    """Digests of a model's parts: whole small files; of the weights sizes, headers and samples."""
    try:
        weights = hashlib.sha256()
        for file in sorted(folder.glob("*.safetensors")):
            size = file.stat().st_size
            weights.update(f"{file.name} {size} ".encode())
            with file.open("rb") as opened:
                start = opened.read(8)
                header = int.from_bytes(start, "little")
                weights.update(start + opened.read(min(header, size)))
                first = 8 + header
                stride = max(_BLOCK_BYTES, (size - first) // _BLOCKS)
                for place in range(first, size, stride):
                    opened.seek(place)
                    weights.update(opened.read(_BLOCK_BYTES))
        names = sorted({file for pattern in _TOKENIZER for file in folder.glob(pattern)})
        return {
            "config.json": _whole(folder / "config.json"),
            "the tokenizer": "".join(_whole(file) for file in names if file.is_file()),
            "the weights": weights.hexdigest(),
        }
    except OSError as error:
        raise ModelError(f"{folder} cannot be read: {error.strerror or error}") from error


def _whole(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
