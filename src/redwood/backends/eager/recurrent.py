"""Recurrent layers in a tree: Transformers' own modules, with their states held outside.

A recurrent module reads tokens one behind the other, and a tree is no such text. But its paths are:
while the rest of a model sees the nodes of all rows in one line, each recurrent module is handed
the paths of the tree as a batch, from the state after the committed text, and the answer of a node
is taken from the first path that it is on. So a pass over a tree stays one forward of the model,
and only its recurrent modules compute nodes twice that lie on several paths.

No state is kept for a node. A row keeps the state after its committed text, and of the nodes behind
it what the module was given (a hidden state each). What is committed is read by the module once
more in the next forward, unless the nodes were a chain: the state after a chain is at hand.

Some modules read several tokens from nothing only, and go on one at a time; others compute one
token otherwise than several (they leave out a limit, say). Which do is found out when a model is
loaded (`Form`), and only what agrees with reading a text at once is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from redwood.backends.eager.memory import Ahead, LayerMemory
from redwood.errors import UnsupportedError
from redwood.models._transformers import CacheHandle
from redwood.models._transformers_states import (
    HIDDEN,
    States,
    mapped_state,
    recurrent_modules,
    small_blocks,
    state_tensors,
)

Form = Literal["any", "several", "single"]
"""How modules are called from a state that is not empty: with how many tokens of each path."""


class _Span(Protocol):
    """The new nodes of one row within one forward."""

    line: int
    columns: slice
    num_new: int
    start: int
    row: Any


class _Job(NamedTuple):
    state: Any
    inputs: Tensor  # [paths, length, width]


class _Done(NamedTuple):
    outputs: Tensor  # [paths, length, width]
    state: Any  # after all inputs of the one path; None: not known


class Recurrent:
    """The recurrent modules of a model; of most models, none.

    Attributes:
        modules: by name.
        form: of calls that go on from a state; set at load by what the modules do.
    """

    def __init__(self, model: Any) -> None:
        self.modules: dict[str, Any] = recurrent_modules(model)
        self.form: Form = "any"
        self._states = {name: States(model.config, module) for name, module in self.modules.items()}

    @contextmanager
    def held_outside(self) -> Iterator[None]:
        """For the time of a forward, the modules find their states in the rows."""
        own = {name: vars(module).get("forward") for name, module in self.modules.items()}
        try:
            for name, module in self.modules.items():
                module.forward = partial(self._forward, name, module.forward)
            yield
        finally:
            for name, module in self.modules.items():
                if own[name] is not None:
                    module.forward = own[name]
                else:
                    vars(module).pop("forward", None)

    def _forward(self, name: str, module: Callable[..., Any], *args: Any, **given: Any) -> Any:
        """The module's forward, over the nodes of all rows: [lines, width of a line, width]."""
        names = [key for key, value in given.items() if isinstance(value, CacheHandle)]
        named = HIDDEN in given
        hidden: Any = given.pop(HIDDEN) if named else args[0] if args else None
        if len(names) != 1 or len(args) != (not named) or not isinstance(hidden, Tensor):
            raise UnsupportedError(
                f"{name} keeps a state, but is called otherwise than with hidden states and a cache"
            )
        forward: Any = given[names[0]]
        if given.get("attention_mask") is not None:
            raise UnsupportedError(f"{name} asks for a mask, which a tree does not have")
        forward.served += 1

        def call(inputs: Tensor, state: Any) -> Tensor:
            cache = self._states[name].cache_with(state)
            whole = given | {names[0]: cache} | ({HIDDEN: inputs} if named else {})
            with small_blocks(self.modules[name], inputs.shape[1]):
                made = module(**whole) if named else module(inputs, **whole)
            if not isinstance(made, Tensor) or made.shape[:2] != inputs.shape[:2]:
                raise UnsupportedError(f"{name} answers something else than hidden states")
            return made

        return self._over_paths(name, forward, hidden, partial(_advance, call, self.form))

    def _over_paths(
        self,
        name: str,
        forward: Any,
        hidden: Tensor,
        advance: Callable[[list[_Job]], list[_Done]],
    ) -> Tensor:
        spans: list[_Span] = forward.spans
        memories = []
        for span in spans:
            memory = span.row.recurrent.layers.get(name)
            if memory is None:
                memory = span.row.recurrent.layers[name] = LayerMemory(self._states[name].empty)
            memory.write(hidden[span.line, span.columns], span.start)
            memories.append(memory)
        late = [
            (memory, span.row.length, inputs)
            for memory, span in zip(memories, spans, strict=True)
            if (inputs := memory.behind(span.row.length)) is not None
            and not (self.form == "several" and len(inputs) == 1 and state_tensors(memory.state))
        ]
        for (memory, length, _), done in zip(
            late, advance([_Job(m.state, inputs[None]) for m, _, inputs in late]), strict=True
        ):
            memory.caught_up(done.state, length)
        routes, jobs = list[_Routes](), list[_Job]()
        for i, (memory, span) in enumerate(zip(memories, spans, strict=True)):
            assert memory.inputs is not None
            ahead = memory.ahead.tokens if memory.ahead else 0
            # A token that is committed, but not in the state yet, is read before each path.
            before = span.row.length - memory.at
            key = (i, ahead, before, hidden.device)
            route = forward.routes.get(key)  # most layers ask for the same
            if route is None:
                made = _routes(span.row.parents, span.num_new, ahead, before, hidden.device)
                route = forward.routes[key] = made
            start = memory.ahead.state if route.skipped and memory.ahead else memory.state
            routes.append(route)
            jobs.append(_Job(start, memory.inputs[route.inputs]))
        out: Tensor | None = None
        for memory, span, route, done in zip(memories, spans, routes, advance(jobs), strict=True):
            if out is None:
                out = done.outputs.new_zeros(*hidden.shape[:2], done.outputs.shape[-1])
            out[span.line, span.columns] = done.outputs[route.path, route.place]
            if route.chain and done.state is not None:
                memory.ahead = Ahead(route.chain, done.state)
        assert out is not None
        return out


class _Routes(NamedTuple):
    inputs: Tensor
    """Inputs of each path to a leaf, filled up behind its end: int64 [paths, longest]."""
    path: Tensor
    """Where the answer of each new node is: number of a path, int64 [new]."""
    place: Tensor
    """And its place in it, int64 [new]."""
    skipped: int
    """Nodes, a chain, that all paths have begun with, and that are left out."""
    chain: int
    """Inputs of the one path, where it is all there are in order; else 0."""


def _routes(
    parents: Sequence[int], num_new: int, ahead: int, before: int, device: torch.device
) -> _Routes:
    """The paths to the last nodes' leaves.

    Args:
        ahead: nodes that are left out if all paths begin with them.
        before: inputs before the first node, which all paths begin with.
    """
    first = len(parents) - num_new
    inner = set(parents[first:])
    paths = []
    for leaf in range(first, len(parents)):
        if leaf not in inner:
            path = [leaf]
            while parents[path[-1]] >= 0:
                path.append(parents[path[-1]])
            paths.append(path[::-1])
    chain = before + len(parents) if paths == [list(range(len(parents)))] else 0
    skipped = ahead if all(path[:ahead] == list(range(ahead)) for path in paths) else 0
    paths = [[*range(before), *(before + node for node in path[skipped:])] for path in paths]
    places: dict[int, tuple[int, int]] = {}
    for number, path in enumerate(paths):
        for place, at in enumerate(path):
            places.setdefault(at - before, (number, place))
    longest = max(map(len, paths))
    index = torch.tensor([path + [0] * (longest - len(path)) for path in paths], device=device)
    found = torch.tensor([places[node] for node in range(first, len(parents))], device=device)
    return _Routes(index, found[:, 0], found[:, 1], skipped, chain)


def _advance(
    call: Callable[[Tensor, Any], Tensor], form: Form, jobs: Sequence[_Job]
) -> list[_Done]:
    """Runs a module over jobs; those of one length share a call, and trees are filled up to one."""
    longest = max((job.inputs.shape[1] for job in jobs if len(job.inputs) > 1), default=0)
    jobs = [
        _Job(job.state, pad(job.inputs, (0, 0, 0, longest - job.inputs.shape[1])))
        if len(job.inputs) > 1
        else job
        for job in jobs
    ]
    kinds: dict[tuple[int, bool], list[int]] = {}
    for i, job in enumerate(jobs):
        kinds.setdefault((job.inputs.shape[1], bool(state_tensors(job.state))), []).append(i)
    done: list[_Done | None] = [None] * len(jobs)
    for (length, filled), numbers in kinds.items():
        chosen = [jobs[i] for i in numbers]
        counts = [len(job.inputs) for job in chosen]
        state = mapped_state([job.state for job in chosen], partial(_repeated, counts))
        inputs = torch.cat([job.inputs for job in chosen])
        doubled = filled and length == 1 and form == "several"
        if filled and length > 1 and form == "single":
            outputs = torch.cat([call(inputs[:, i : i + 1], state) for i in range(length)], 1)
        else:
            outputs = call(torch.cat((inputs, inputs), 1) if doubled else inputs, state)
        at = 0
        for i, count in zip(numbers, counts, strict=True):
            after = None
            if count == 1 and not doubled:
                after = mapped_state([state], partial(_cut, at, len(inputs) > 1))
            done[i] = _Done(outputs[at : at + count], after)
            at += count
    return [each for each in done if each is not None]


def _repeated(counts: Sequence[int], parts: list[Tensor]) -> Tensor:
    """Joins tensors [1, ...], each repeated so often."""
    return torch.cat(
        [part.expand(n, *part.shape[1:]) for part, n in zip(parts, counts, strict=True)]
    )


def _cut(at: int, shared: bool, parts: list[Tensor]) -> Tensor:
    """One entry [1, ...] of a batch, which may be let go then."""
    cut = parts[0][at : at + 1]
    return cut.clone() if shared else cut
