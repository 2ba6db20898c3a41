"""`redwood tree --prompt`: the trees that an answer was drafted in, and what drafted each node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from redwood.cli import options as o
from redwood.cli.loading import open_engine
from redwood.cli.terminal import print_json, write

_STEPS = 8
LETTERS = {"text": "T", "datastore": "D", "table": "S", "prediction": "P", "model": "M"}
"""As on the server's page."""
_WORDS = {
    "text": "the text itself",
    "datastore": "stored texts",
    "table": "what the target said before",
    "prediction": "the predicted answer",
    "model": "a draft model",
}


def _option(help_text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel="Trees of an answer", **more)


@dataclass(frozen=True, kw_only=True)
class Drafted:
    """A prompt whose answer's trees are drawn, in place of a tree by rates."""

    prompt: Annotated[
        str | None,
        _option("Draw the trees that the answer to this is drafted in, with their sources."),
    ] = None
    steps: Annotated[int | None, _option(f"Steps that are drawn. Left out: {_STEPS}.", min=1)] = (
        None
    )
    target: Annotated[
        str | None, _option("The model that answers.", "--target", "-t", metavar="MODEL")
    ] = None
    drafter: Annotated[
        str | None, _option("What drafts: as for generate.", "--drafter", "-d", metavar="NAME")
    ] = None
    budget: Annotated[int | None, _option("Nodes scored per step, the root included.")] = None
    table: Annotated[Path | None, _option("Of what the target said.", metavar="FILE")] = None

    def needless(self) -> str | None:
        """Returns an option that was given and needs a prompt; None where there is one."""
        given = [] if self.prompt is not None else list(o.given(**asdict(self)))
        return f"--{given[0]}" if given else None


def draw_steps(drafted: Drafted, as_json: bool) -> None:
    """Answers the prompt at temperature 0 and writes the trees of its first steps."""
    from redwood.server.tokens import TokenTexts
    from redwood.server.trace import describe

    assert drafted.prompt is not None
    most = drafted.steps or _STEPS
    target, drafter = drafted.target or o.DEFAULT_TARGET, drafted.drafter or o.DEFAULT_DRAFTER
    with open_engine(target, drafter, budget=drafted.budget, table=drafted.table) as engine:
        question: Any = drafted.prompt
        if engine.tokenizer.chat_template:
            question = [{"role": "user", "content": drafted.prompt}]
        texts, made = TokenTexts(engine.tokenizer), list[dict[str, Any]]()
        for piece in engine.stream(question):
            step: Any = piece  # it has what a step has
            made.append(describe(step, piece.stats, texts))
            if not as_json:
                write("".join(f"{line}\n" for line in step_lines(made[-1])))
            if len(made) == most:
                break
    if as_json:
        print_json({"steps": made})
        return
    write("".join(f"{line}\n" for line in _legend(made)))


def step_lines(step: Mapping[str, Any]) -> Iterator[str]:
    """Yields a step that `redwood.server.trace.describe` made as lines of text, a node per line."""
    nodes, accepted = step["nodes"], set(step["accepted"])
    children: list[list[int]] = [[] for _ in nodes]
    for node, known in enumerate(nodes[1:], start=1):
        children[known["parent"]].append(node)
    yield f"step {step['step']}: {len(nodes) - 1} drafted, {len(accepted) - 1} accepted"
    stack = [(0, "", "")]  # node, what stands before it, what stands before its children
    while stack:
        node, lead, below = stack.pop()
        letters = "".join(LETTERS.get(name, name[0].upper()) for name in nodes[node]["sources"])
        notes = [letters, "accepted" if node and node in accepted else "" if node else "root"]
        yield "  ".join([f"{lead}{nodes[node]['text']!r}", *filter(None, notes)])
        for i, child in enumerate(reversed(children[node])):
            last = i == 0
            lines = ("└─ ", "   ") if last else ("├─ ", "│  ")
            stack.append((child, below + lines[0], below + lines[1]))
    if step["bonus"] is not None:
        yield f"then {step['bonus']['text']!r}, the target's own token"
    yield ""


def _legend(steps: list[dict[str, Any]]) -> Iterator[str]:
    """The sources that were seen."""
    seen = {name for step in steps for node in step["nodes"] for name in node["sources"]}
    named = [name for name in LETTERS if name in seen] + sorted(seen - set(LETTERS))
    if named:
        yield "Drafted by: " + ", ".join(
            f"{LETTERS.get(name, name[0].upper())} {_WORDS.get(name, name)}" for name in named
        )
