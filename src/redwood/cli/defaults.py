"""Defaults as they are written in the library, for `--help`: read from its source, not repeated.

`SamplingParams` and `load` live in modules that import torch, which takes seconds. An option that
is not given is never passed on, so what is read here is shown and nothing else.
"""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any


@cache
def defaults_of(module: str, name: str) -> dict[str, Any]:
    """Returns the literal defaults of a dataclass or function, without importing its module.

    Empty where the source is not at hand.
    """
    spec = find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return {}
    for node in ast.parse(Path(spec.origin).read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _literals(
                (item.target.id, item.value)
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            )
        if isinstance(node, ast.FunctionDef) and node.name == name:
            given = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            return _literals((argument.arg, value) for argument, value in given)
    return {}


def _literals(pairs: Any) -> dict[str, Any]:
    return {
        name: ast.literal_eval(value) for name, value in pairs if isinstance(value, ast.Constant)
    }


def shown(name: str) -> str | bool:
    """Returns the default of an option for its help: of `SamplingParams`, else of `load`."""
    known = {
        **defaults_of("redwood.engine.load", "load"),
        **defaults_of("redwood.sampling.logits", "SamplingParams"),
    }
    value = known.get(name)
    return False if value is None else str(value)
