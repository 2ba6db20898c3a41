"""What is said about versions is one thing: bounds, pins, and the range that was tested."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from redwood.models import _transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import versions  # noqa: E402

PINS = {
    canonicalize_name(name): Version(pin)
    for name, _, pin in (
        line.partition("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    )
}


def test_every_requirement_is_pinned_within_its_bounds() -> None:
    for line in versions.requirements():
        wanted = Requirement(line)
        assert wanted.specifier.contains(PINS[canonicalize_name(wanted.name)]), line


def test_lower_bounds_are_what_test_oldest_installs() -> None:
    bounds = dict(line.split("==") for line in versions.oldest())
    for line in versions.requirements():
        wanted = Requirement(line)
        lowest = bounds.pop(wanted.name)
        assert wanted.specifier.contains(lowest), line
        assert wanted.name == "torch" or f">={lowest}" in line
    assert bounds == {}


def test_the_tested_range_of_transformers_is_said_alike_everywhere() -> None:
    oldest, newest = _transformers.OLDEST_TESTED, _transformers.NEWEST_TESTED
    stated = (ROOT / "pyproject.toml").read_text()
    assert re.search(rf'"transformers>={oldest},<6",\s+# tested: {oldest} to {newest}', stated)
    assert PINS["transformers"] == Version(newest)


def test_a_local_build_is_locked_by_its_public_version() -> None:
    locked = dict(line.split("==") for line in versions.locked())
    assert locked["torch"] == version("torch").partition("+")[0]
    assert not {"pip", "redwood", "setuptools"} & locked.keys()
