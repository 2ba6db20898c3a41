"""What the free drafter learns from before it is measured: prompts, answers, its state in files.

The state is what the drafter learned and nothing of a request: acceptance rates over all texts and,
where it has a table of the target's own rows, that table. Prompts that are measured feed nothing.
"""

from __future__ import annotations

import ast
import json
import os
import random
import sysconfig
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import numpy as np
from peers.prompts import PACKAGED, prompt_file

import redwood
from redwood.bench.interleave import Candidate, Stepper, run_interleaved
from redwood.cli.bench import read_tasks
from redwood.drafters.base import Drafter, NgramDrafter
from redwood.sampling import SamplingParams

_HERE = Path(__file__).parent
_LIBRARY = Path(sysconfig.get_path("stdlib"))
ROWS, NODES = 24, 2
"""How answers that only feed are decoded: rows together, nodes of each."""
_ASKED = (
    "Explain this text in simple words:\n\n{}",
    "Summarise in two sentences:\n\n{}",
    "Write three questions that this text answers:\n\n{}",
    "Give a short example of what this text describes:\n\n{}",
    "Continue this text:\n\n{}",
)
_SHORT, _LONG = 120, 900  # characters of a text that is asked about
_TABLES = ("reliability", "store_reliability")


class State(NamedTuple):
    """What a free drafter learned.

    Args:
        rates: acceptance rates by the attribute's name, as objects of the drafter.
        entries: of the table, bytes [N, entry]; None without one.
        rows: that the table learned.
    """

    rates: dict[str, Any]
    entries: np.ndarray[Any, Any] | None = None
    rows: int = 0


def free_part(drafter: Drafter) -> Any:
    """The one part of a drafter that drafts from what costs nothing."""
    parts: Sequence[Drafter] = getattr(drafter, "parts", [drafter])
    found = [part for part in parts if isinstance(part, NgramDrafter)]
    if len(found) != 1:
        raise SystemExit(f"the drafter {drafter.name} has {len(found)} free parts, not one")
    return found[0]


def state_of(part: Any) -> State:
    """A copy of what was learned."""
    rates = {name: deepcopy(getattr(part, name)) for name in _TABLES if hasattr(part, name)}
    table = getattr(part, "table", None)
    return State(rates) if table is None else State(rates, table.entries(), table.rows)


def restore(part: Any, state: State) -> None:
    """Makes the drafter know this and nothing else."""
    for name, rates in state.rates.items():
        setattr(part, name, deepcopy(rates))
    table = getattr(part, "table", None)
    if table is not None:
        table.clear()
        if state.entries is not None and len(state.entries):
            table.load(state.entries, state.rows)


def save_state(path: Path, state: State, **more: Any) -> None:
    """Writes a state, and numbers with it, whole or not at all."""
    about = {
        "rates": {name: rates.to_dict() for name, rates in state.rates.items()},
        "rows": state.rows,
        **more,
    }
    arrays: dict[str, Any] = {} if state.entries is None else {"entries": state.entries}
    whole = path.with_name(path.name + ".new")
    with whole.open("wb") as file:
        np.savez(file, about=np.array(json.dumps(about)), **arrays)
    os.replace(whole, path)


def read_state(path: Path, part: Any) -> tuple[State, dict[str, Any]]:
    """A state from `save_state` for this drafter, and what was written with it."""
    with np.load(path, allow_pickle=False) as saved:
        about = json.loads(str(saved["about"]))
        entries = saved["entries"] if "entries" in saved else None
    if (entries is None) != (getattr(part, "table", None) is None):
        raise SystemExit(f"{path} is of another drafter")
    rates = {}
    for name, counts in about.pop("rates").items():
        rates[name] = deepcopy(getattr(part, name))
        rates[name].load(counts)
    return State(rates, entries, about.pop("rows")), about


def set_prompts(given: Path | None, files: Sequence[Path]) -> list[str]:
    """The texts of all prompt sets that there are, those of files first; each once."""
    listed = [path for path in (given, *files) if path is not None]
    listed += [prompt_file(name, None) for name in (*PACKAGED, "editing")]
    listed.append(_HERE / "prompts" / "editing_dev.jsonl")
    listed.append(Path(redwood.__file__).parent / "data" / "calibration.jsonl")
    found = [task.prompt for path in listed for task in read_tasks(path)]
    return list(dict.fromkeys(found))


def made_prompts(library: Path = _LIBRARY) -> Iterator[str]:
    """Questions about texts that come with Python: its reference, and its modules' docstrings.

    In an order that is always the same; each text is asked about once before any is again.
    """
    texts = {" ".join(part.split()) for text in topics.values() for part in text.split("\n\n")}
    for path in library.rglob("*.py"):
        if not {"test", "tests", "idle_test", "site-packages"} & set(path.parts):
            texts.update(_docstrings(path))
    kept = sorted(text for text in texts if _SHORT <= len(text) <= _LONG)
    random.Random(0).shuffle(kept)
    for turn in range(len(_ASKED)):
        for i, text in enumerate(kept):
            yield _ASKED[(i + turn) % len(_ASKED)].format(text)


def _docstrings(path: Path) -> set[str]:
    try:
        nodes = ast.walk(ast.parse(path.read_bytes()))
    except (SyntaxError, ValueError):
        return set()
    kinds = (ast.FunctionDef, ast.ClassDef, ast.Module)
    found = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]
    return {" ".join(text.split()) for text in found}


def ids_of(engine: redwood.Engine, prompt: str, room: int) -> list[int] | None:
    """Token ids of a prompt as the one message of a chat; None without `room` tokens behind it."""
    ids = engine.encode([{"role": "user", "content": prompt}])
    return ids if len(ids) + room + NODES <= engine.target.capacity else None


def feed(
    engine: redwood.Engine, drafter: Drafter, prompts: Sequence[list[int]], params: SamplingParams
) -> int:
    """Answers prompts, several at once, so that the drafter learns; returns the tokens answered."""
    stepper = Stepper(engine, Candidate("feeding", drafter, NODES), ROWS)
    run_interleaved([stepper], prompts, params)
    return sum(stats.num_generated_tokens for stats in stepper.stats)
