"""`load`: an engine from names of models and drafters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from redwood._defaults import Loading as defaults
from redwood.algorithms.successors import MAX_BYTES, successor_table
from redwood.backends.base import Backend, Nodes, SharingBackend
from redwood.drafters.base import (
    Drafter,
    ModelDrafter,
    NgramDrafter,
    join_drafters,
    open_datastore_drafter,
)
from redwood.drafters.names import AUTO, INDEX, NGRAM, NONE, TABLE, split_names
from redwood.engine.draft_vocab import AUTO as AUTO_VOCAB
from redwood.engine.draft_vocab import DRAFT_VOCAB, Vocab, outputs_of
from redwood.engine.free_memory import free_bytes
from redwood.engine.tables import keep_prefixes, keep_table, tables_of
from redwood.engine.text import Engine
from redwood.errors import ArgumentError
from redwood.models import gguf_path
from redwood.models.gguf_tokenizer import check_same_spelling
from redwood.models.mapping import explain_bus_errors
from redwood.models.tokenizer import check_same_tokens, eos_ids, is_refused, load_tokenizer
from redwood.planner.from_profile import open_planner

DEFAULT_BUDGETS = {"eager": {"ngram": 12, "model": 6}, "native": {"ngram": 4, "model": 4}}
"""Nodes per step by backend and drafter, up to which a pass costs little more (docs/status.md)."""
PREFILL_CHUNKS = {"native": 128}
"""Prompt tokens of a pass, by backend: who comes while a long prompt is read waits for one."""

PREFILL_BESIDE = {"native": 8}
"""The same in a pass that decodes other rows: they wait for it, with every token."""

KV_CACHE_SHARE = 0.2
"""Share of free memory for keys and values that stay, where nothing else is said."""

DRAFT_PART = 8
"""A model that drafts keeps keys and values in this part of that memory."""

DRAFT_WINDOW = 128
"""Prompt tokens that a model drafter prefills on a CPU by default: the last ones."""

DRAFT_WEIGHTS = "draft"
"""Weights of a model drafter: 4 bits; they affect acceptance rates, never the text."""


def load(
    target: str | Path,
    drafter: str | Path | Drafter | Sequence[str | Path | Drafter] | None = AUTO,
    *,
    backend: str = defaults.backend,
    dtype: str | torch.dtype = defaults.dtype,
    device: str | torch.device = defaults.device,
    capacity: int | None = None,
    budget: int | None = None,
    tree: Sequence[int] | None = None,
    law: str = defaults.law,
    max_rows: int = defaults.max_rows,
    kv_tokens: int | None = None,
    kv_cache: str | int | float | None = None,
    kv_cache_file: str | Path | None = None,
    kv_cache_share: float | None = None,
    prefill_beside: int | None = None,
    progress: bool = False,
    weights: str | None = None,
    kv: str | None = None,
    threads: int | None = None,
    cpus: Sequence[int] | None = None,
    checkpoint_tokens: int | None = None,
    draft_vocab: Vocab = AUTO_VOCAB,
    draft_weights: str = DRAFT_WEIGHTS,
    draft_window: int | str | None = "auto",
    parallel: str | None = None,
    offload: str | None = None,
    memory: str | int | None = None,
    tokenizer: str | Path | None = None,
    table: str | Path | None = None,
    table_bytes: int | None = None,
) -> Engine:
    """Returns an engine for a model, with what drafts for it.

    Args:
        target: a packaged name (`redwood models list`), a folder, a .gguf file or a hub id.
        drafter: "auto", all that costs nothing, "ngram+table"; None or "none"; "ngram", the text
            itself; "table", what the target said before; "index:PATH", a datastore; a model, given
            as `target`; several joined with "+", or a list: one tree from all of them. Objects with
            the `Drafter` protocol are taken as they are.
        backend, dtype, device: see `redwood.backends.load.open_model`.
        capacity: slots per row, at most the context length, the default.
        budget: nodes scored per step, the root included; None: chosen step by step from measured
            times and what was accepted, and so is which of the drafters works; see `Planner`.
        tree: parents of a static tree for model drafters; see `ModelDrafter`.
        law: how a model drafter draws; see `ModelDrafter`.
        max_rows: requests decoded at once.
        kv_tokens: tokens, prompts and answers, that they may come to hold together; see
            `RowEngine`.
        kv_cache: memory for keys and values that stay after requests have ended, such as "2GiB", so
            that what begins alike is not read again; 0: none. A number between 0 and 1: that part
            of what is free then. None: a fifth of it. Backends that are not `batch_invariant` keep
            a size alone: for None nothing, and a part is refused, see docs/prefix_cache.md.
        kv_cache_file: where that stays over a restart, too: read now, written by `Engine.close`.
        kv_cache_share: in place of that fifth, for one of several engines on a machine; not beside
            `kv_cache`.
        prefill_beside: tokens of prompts in a pass that decodes other rows, see `RowEngine`;
            None: 8 on the native backend, else its default.
        progress: show progress of fetching and converting on stderr.
        weights: of the target on the native backend.
        kv, threads, cpus: of the native backend, for target and drafters; these four as for
            `redwood.backends.native.load.load_native`.
        checkpoint_tokens: of a target with recurrent layers, from one kept state to the next.
        draft_vocab: tokens that a model drafter proposes on the native backend: a number, the first
            ones of the vocabulary; "table" or the path of a table file, the tokens that the target
            says most by it, 49,152 or as many as follow a colon ("said.table:8192"), and all
            special ones; None or "all": all. "auto": by `table` where it ranks enough, else the
            first 49,152. The target's are not touched. See docs/planner.md.
        draft_weights: as `weights`, of model drafters on the native backend: "draft" is 4 bits
            whatever the file holds.
            Other values of these two than the defaults are refused where nothing takes them.
        draft_window: tokens that a model drafter reads of a prompt, the last ones; None: all.
            "auto": 128 on a CPU, all on a GPU, where reading is cheap. Refused without a model.
        parallel: "tensor" or "pipeline": the target over the processes that torchrun started. The
            drafters stay in the first, where this returns; in the others it does not, see
            `redwood.backends.parallel.load.load_parallel`.
        offload: "disk", or "ram" for a GPU: where the target's weights stay; each forward reads
            them. `weights` and `threads` are then its own; drafters stay in memory.
        memory: with offload, such as "2GiB": what this process may take, all in all; weights that
            fit stay. None: none stay.
        tokenizer: a folder with the target's tokenizer, in place of its own: for a GGUF file whose
            own is refused. It must mean the same by its ids as the file.
        table: a file in which the drafter "table" (or "auto") keeps what the target said, made if
            need be; saved now and then, and by `Engine.close`. See docs/table.md.
        table_bytes: bound of that table's memory; None: 128 MiB.

    Raises:
        KvCacheError: a `kv_cache_file` of another model.
        TableError: a table that is damaged, or of another model; a ranking of other tokens.
        ModelError: a model that is missing or damaged.
        TokenizerMismatchError: a drafter that speaks other tokens.
        ArgumentError, CapacityError, ParallelError, UnsupportedError: see `open_model`.
    """
    from redwood.backends.load import open_model

    if not isinstance(target, str | Path):
        raise ArgumentError(f"target {target!r} must be the name or the folder of a model")
    explain_bus_errors()
    options: dict[str, Any] = dict(
        backend=backend,
        dtype=dtype,
        device=device,
        progress=progress,
        weights=weights,
        kv=kv,
        threads=threads,
        cpus=cpus,
    )
    large: dict[str, Any] = dict(parallel=parallel, offload=offload, memory=memory)
    own = None if tokenizer is None else own_tokenizer(Path(tokenizer), str(target))
    large["checkpoint_tokens"] = checkpoint_tokens
    folder, model = open_model(str(target), capacity=capacity, **large, **options)
    speaks = load_tokenizer(folder) if own is None else own

    how: dict[str, Any] = dict(
        draft_vocab=draft_vocab, draft_weights=draft_weights, draft_window=draft_window
    )
    ends = eos_ids(folder, speaks, None if tokenizer is None else Path(tokenizer))
    how |= dict(tree=tree, law=law, table_bytes=table_bytes, table=table, ends=ends)
    parts = _parts(drafter)
    if offload is not None:
        options["weights"] = None
    drafters = [
        open_drafter(part, speaks, **how, **options) if isinstance(part, str) else part
        for part in parts
    ]
    if tree is not None and not any(isinstance(d, ModelDrafter) for d in drafters):
        raise ArgumentError("tree gives the shape for a model drafter, and there is none")
    if (table is not None or table_bytes is not None) and not tables_of(drafters):
        raise ArgumentError("table and table_bytes are for the drafter table: name table or auto")
    settle(model, drafters)
    joined, planner = join_drafters(drafters), None
    if drafters and budget is None and tree is None:
        named = {p: d for p, d in zip(parts, drafters, strict=True) if isinstance(p, str)}
        planner = open_planner(model, str(target), joined, named, weights=weights, kv=kv, cpus=cpus)
    opened = [d for p, d in zip(parts, drafters, strict=True) if isinstance(p, str)]
    if not any(isinstance(d, ModelDrafter) for d in opened):
        _refuse_draft_options(draft_vocab, draft_weights, "no model is opened to draft")
        if draft_window != "auto":
            raise ArgumentError("draft_window is for models that draft, and none is opened for it")
    stays = cache_bytes(model, kv_cache, kv_cache_share)
    for_drafts = stays // DRAFT_PART
    stays -= sum(d.keep(for_drafts) * for_drafts for d in opened if isinstance(d, ModelDrafter))
    if budget is None:
        budget = len(tree) if tree is not None else default_budget(drafters, model.name)
        budget = budget if tree is not None else min(budget, model.capacity)
    engine = Engine(
        model,
        joined,
        tokenizer=speaks,
        eos_ids=ends,
        budget=budget,
        planner=planner,
        max_rows=max_rows,
        kv_tokens=kv_tokens,
        kv_cache=stays,
        prefill_beside=PREFILL_BESIDE.get(model.name) if prefill_beside is None else prefill_beside,
        prefill_chunk=PREFILL_CHUNKS.get(model.name, 512),
    )
    if kv_cache not in (None, 0, "0") and not engine.prefixes.on:
        raise ArgumentError(f"kv_cache {kv_cache!r} has no room for a page: give more, or 0")
    if kv_cache_file is not None:
        keep_prefixes(engine, kv_cache_file, str(target))
    if table is not None:
        keep_table(engine, table, str(target), joined)
    return engine


def cache_bytes(model: Backend, given: str | int | float | None, share: float | None = None) -> int:
    """Returns the bytes of keys and values that stay, for `kv_cache` as of `load`.

    Args:
        share: of free memory, where nothing is given; no bytes where that cannot be had.

    Raises:
        ArgumentError: no size; one above 0 for a backend that cannot share rows; a part of free
            memory for one that keeps a size alone, or where free memory is not known.
    """
    shares = isinstance(model, SharingBackend)
    exact = shares and getattr(model, "batch_invariant", False)
    if given is None:
        part = KV_CACHE_SHARE if share is None else share
        if not 0.0 <= part <= 1.0:
            raise ArgumentError(f"kv_cache_share {part} must be between 0 and 1")
        return (_part_of_free(model, part) or 0) if exact else 0
    if share is not None:
        raise ArgumentError(f"kv_cache_share {share} is for engines without kv_cache: {given!r}")
    is_part = isinstance(given, float) and 0.0 < given < 1.0
    if given not in (0, "0") and not is_part:
        from redwood.backends.offload.backend import parse_bytes

        given = parse_bytes(str(given), "kv_cache")
    if not shares and given not in (0, "0"):
        raise ArgumentError(f"kv_cache: the {model.name} backend keeps no keys and values; use 0")
    if not is_part:
        return int(given)
    if not exact:
        raise ArgumentError(
            f"kv_cache {given}: the {model.name} backend rounds by the cut of a prompt into passes "
            "and keeps texts for a size alone: give one, such as 2GiB"
        )
    size = _part_of_free(model, float(given))
    if size is None:
        raise ArgumentError(f"kv_cache {given}: what is free is not known here: give a size")
    return size


def _part_of_free(model: Backend, part: float) -> int | None:
    """Bytes of free memory, without what is mapped and counts as free; None: not known."""
    free, mapped = free_bytes(), sum(getattr(model, "weight_bytes", {}).values())
    return None if free is None else int(part * max(0, free - mapped))


def own_tokenizer(folder: Path, target: str) -> Any:
    """Returns the tokenizer in a user's folder, held against the target's GGUF file.

    Raises:
        ArgumentError: no folder.
        ModelError: no tokenizer in it, or one that means other tokens.
    """
    if not folder.expanduser().is_dir():
        raise ArgumentError(f"tokenizer {str(folder)!r} must be a folder with a tokenizer")
    tokenizer = load_tokenizer(folder.expanduser())
    if (source := gguf_path(target)) is not None:
        check_same_spelling(tokenizer, source)
    return tokenizer


def settle(model: Backend, drafters: Sequence[Drafter]) -> None:
    """Gives an offloaded target the memory that remains after the drafters."""
    from redwood.backends.offload.backend import OffloadBackend

    if not isinstance(model, OffloadBackend):
        return
    for drafter in drafters:
        if isinstance(drafter, ModelDrafter):  # what is mapped is in memory once it was used
            row = drafter.backend.open()
            drafter.backend.extend([Nodes(row, [0])])
            drafter.backend.release(row)
    model.settle()


def _parts(
    drafter: str | Path | Drafter | Sequence[str | Path | Drafter] | None,
) -> list[str | Drafter]:
    if drafter is None:
        return []
    if isinstance(drafter, str):
        drafter = split_names(drafter)
    given = list(drafter) if isinstance(drafter, Sequence) else [drafter]
    parts = [str(part) if isinstance(part, Path) else part for part in given]
    odd = [part for part in parts if not isinstance(part, str) and not hasattr(part, "propose")]
    if odd:
        raise ArgumentError(f"drafter {odd[0]!r} is neither a name nor an object with propose()")
    if "" in parts:
        raise ArgumentError("an empty drafter name: use none, ngram or a model, joined with +")
    return [part for part in parts if part != NONE]


def open_drafter(
    name: str,
    tokenizer: Any,
    *,
    draft_vocab: Vocab = AUTO_VOCAB,
    draft_weights: str = DRAFT_WEIGHTS,
    draft_window: int | str | None = "auto",
    tree: Sequence[int] | None = None,
    law: str = "without_replacement",
    table_bytes: int | None = None,
    table: str | Path | None = None,
    ends: Sequence[int] = (),
    **options: Any,
) -> NgramDrafter | ModelDrafter:
    """Returns a drafter by its name; arguments as of `load`, `options` those of `open_model`.

    Args:
        tokenizer: of the target.
        table: that will be kept; it is read for the draft vocabulary alone.
        ends: tokens that end a text.

    Raises: as `load`.
    """
    from redwood.backends.load import open_model

    if name == NGRAM:
        return NgramDrafter()
    if name == TABLE:
        most = MAX_BYTES if table_bytes is None else table_bytes
        return NgramDrafter(own_text=False, table=successor_table(most))
    if name.startswith(INDEX):
        return open_datastore_drafter(name.removeprefix(INDEX), tokenizer)
    outputs = outputs_of(draft_vocab, table, tokenizer, ends)
    folder, backend = open_model(name, outputs=outputs, draft_weights=draft_weights, **options)
    if backend.name != "native":
        _refuse_draft_options(draft_vocab, draft_weights, f"the {backend.name} backend runs {name}")
    source = gguf_path(name)
    if source is not None and is_refused(folder):  # it drafts ids: of its tokenizer none is needed
        check_same_spelling(tokenizer, source)
    else:
        check_same_tokens(tokenizer, load_tokenizer(folder))
    if draft_window == "auto":
        draft_window = DRAFT_WINDOW if backend.device.type == "cpu" else None
    return ModelDrafter(backend, tree, law=law, window=cast("int | None", draft_window))


def _refuse_draft_options(draft_vocab: Vocab, draft_weights: str, why: str) -> None:
    if draft_vocab not in (None, AUTO_VOCAB, DRAFT_VOCAB) or draft_weights != DRAFT_WEIGHTS:
        raise ArgumentError(
            f"draft_vocab and draft_weights are for models that draft on the native backend: {why}"
        )


def default_budget(drafters: Sequence[Drafter], backend: str = "eager") -> int:
    """Returns the nodes per step, the root included, that suit these drafters together."""
    budgets = DEFAULT_BUDGETS.get(backend, DEFAULT_BUDGETS["eager"])
    return 1 + sum(budgets.get(d.name, budgets["ngram"]) - 1 for d in drafters)
