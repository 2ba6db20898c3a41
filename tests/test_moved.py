"""Imports of the first layout still work, and say where things are now."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec

import pytest

from redwood import _moved


@pytest.mark.parametrize("old", _moved.MODULES)
def test_an_old_module_leads_to_the_new_one_with_a_warning(old: str) -> None:
    new = f"redwood.{_moved.MODULES[old]}"
    sys.modules.pop(f"redwood.{old}", None)
    with pytest.warns(FutureWarning, match=f"redwood.{old} is {new} now"):
        module = import_module(f"redwood.{old}")
    home = import_module(new)
    public = [name for name in vars(home) if not name.startswith("_")]
    assert public and all(getattr(module, name) is getattr(home, name) for name in public)
    with pytest.raises(AttributeError):
        _ = module.nothing_of_this_name


def test_renamed_classes_are_found_under_their_old_names() -> None:
    code = (
        "from redwood.time_curve import TimeCurve, TimePoint\n"
        "from redwood.pacing import Levels, StepTimes\n"
        "from redwood.drafting import ModelDrafter, NoDrafter, UnionDrafter\n"
        "from redwood.backends.base import Kept, Nodes\n"
        "from redwood.planner import Planner\n"
        "from redwood.engine import RowEngine\n"
        "from redwood.backends.eager import EagerBackend\n"
        "from redwood.backends.native import NativeBackend\n"
        "from redwood.loading import load\n"
        "from redwood.pacing import *\n"
        "assert StepTimes.__name__ == 'StepBudget' and np\n"
        "import redwood\n"
        "assert load is redwood.load and NoDrafter is redwood.NoDrafter\n"
        "assert TimeCurve.__name__ == 'LatencyModel' and Kept.__name__ == 'AcceptedPath'\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


def test_what_never_was_is_not_found() -> None:
    assert find_spec("redwood.drafting_of_others") is None
    with pytest.raises(ModuleNotFoundError):
        import_module("redwood.nothing")
