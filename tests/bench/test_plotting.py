"""The figure of a profile: written for any profile, refused before any work."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from redwood.bench.plot import FORMATS, check_plot, plot
from redwood.errors import ArgumentError, UnsupportedError
from redwood.profiling.profile import (
    DrafterProfile,
    LatencyModel,
    LatencyPoint,
    MeasuredAcceptance,
    Profile,
    ProfileKey,
)

WITH_MATPLOTLIB = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="Matplotlib is not installed"
)


def curve(most: int) -> LatencyModel:
    counts = (1, 2, 4, 8, 16)
    return LatencyModel(
        tuple(LatencyPoint(1, n, 128, 9.0 + n, 8.0, 12.0 + n) for n in counts if n <= most)
    )


def profile(*drafters: DrafterProfile) -> Profile:
    names = {drafter.name: "" for drafter in drafters}
    key = ProfileKey("model", names, "native", "", "", "", 1, "", "", "cpu", "0")
    return Profile(key, "2026", curve(16), 0.2, {drafter.name: drafter for drafter in drafters})


NGRAM = DrafterProfile("ngram", None, 0.01, tokens_by_size={"0": {1: 1.0, 4: 1.5, 8: 1.6}})
USELESS = DrafterProfile(
    "useless", curve(4), 0.01, {"0": [MeasuredAcceptance([0.0], [0.0], 9, "decoded")]}
)
SMALL = DrafterProfile(
    "small",
    curve(8),
    0.01,
    {at: [MeasuredAcceptance([0.7, 0.1, 0.15], [0.1] * 3, 9, "decoded")] for at in ("0", "0.6")},
    tokens_by_size={"0": {4: 2.0}},
)


@WITH_MATPLOTLIB
@pytest.mark.parametrize(
    ("drafters", "suffix"),
    [
        *(((), suffix) for suffix in FORMATS),
        ((NGRAM,), ".png"),
        ((SMALL, NGRAM, USELESS), ".png"),
    ],
    ids=lambda value: str(value if isinstance(value, str) else len(value)),
)
def test_every_profile_has_a_figure(
    tmp_path: Path, drafters: tuple[DrafterProfile, ...], suffix: str
) -> None:
    path = tmp_path / f"figure{suffix}"
    plot(profile(*drafters), path, "a title")
    begins = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(begins) and path.stat().st_size > 5000


@WITH_MATPLOTLIB
def test_a_figure_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="cannot write .*no/figure.png"):
        plot(profile(), tmp_path / "no" / "figure.png")


def test_other_kinds_of_file_are_refused(tmp_path: Path) -> None:
    for name in ("figure.txt", "figure", "figure.png.gz"):
        with pytest.raises(ArgumentError, match=".png, .svg, .pdf"):
            check_plot(tmp_path / name)


def test_without_matplotlib_the_command_to_install_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> Any:
        return None

    monkeypatch.setattr("redwood.bench.plot.find_spec", absent)
    with pytest.raises(UnsupportedError, match=r"pip install 'redwood\[plot\]'"):
        plot(profile(), tmp_path / "figure.png")
