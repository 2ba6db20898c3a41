"""The profile: whole on disk or refused, and only for what it was made for."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from redwood import _storage
from redwood.errors import ArgumentError, ProfileError
from redwood.profiling.profile import (
    DrafterProfile,
    LatencyModel,
    LatencyPoint,
    MeasuredAcceptance,
    Profile,
    ProfileKey,
    profile_path,
    temperature_name,
)

KEY = ProfileKey(
    target="model 12",
    drafters={"ngram": "", "small": "small 34"},
    backend="native",
    isa="avx2",
    weights="auto",
    kv="f16",
    threads=2,
    cpus="",
    processor="a processor",
    device="cpu",
    redwood="0.1.0",
)
CURVE = LatencyModel(
    (LatencyPoint(1, 1, 128, 5.0, 4.5, 5.5), LatencyPoint(1, 4, 128, 6.0, 5.5, 7.0))
)


def drafter(name: str, **more: Any) -> DrafterProfile:
    return DrafterProfile(name, None, 0.01, **more)


@pytest.fixture
def profile() -> Profile:
    forced = MeasuredAcceptance([0.7, 0.1], [0.02, 0.01], 400, "teacher-forced")
    counted = MeasuredAcceptance([0.6, 0.2], [0.05, 0.03], 90, "decoded")
    small = DrafterProfile(
        "small",
        CURVE,
        0.02,
        {"0": [forced, counted], "0.6": [counted]},
        {"0": {"POINT": {"hits": [1.0], "trials": [2.0]}}},
        {"0": {4: 2.1}},
    )
    ngram = drafter("ngram", tokens_by_size={"0": {1: 1.0, 8: 1.6}})
    return Profile(KEY, "2026-11-22T05:00:00+00:00", CURVE, 0.3, {"ngram": ngram, "small": small})


def test_what_was_saved_is_loaded(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "profiles" / "a.json"
    profile.save(path)
    assert Profile.load(path) == profile
    assert Profile.load(path, KEY) == profile
    assert os.listdir(path.parent) == ["a.json"]


def test_a_profile_serves_fewer_drafters_than_it_holds(profile: Profile, tmp_path: Path) -> None:
    profile.save(tmp_path / "a.json")
    assert Profile.load(tmp_path / "a.json", replace(KEY, drafters={"ngram": ""})) == profile


CHANGES: dict[str, Any] = {
    "target": "model 13",
    "drafters": {"ngram": "", "other": "other 1"},
    "backend": "eager",
    "isa": "avx512",
    "weights": "int4",
    "kv": "f32",
    "threads": 3,
    "cpus": "0,1",
    "processor": "another",
    "device": "cuda",
    "redwood": "0.2.0",
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_key_is_refused_by_the_name_of_its_field(
    profile: Profile, tmp_path: Path, name: str
) -> None:
    profile.save(tmp_path / "a.json")
    key = replace(KEY, **{name: CHANGES[name]})
    with pytest.raises(ProfileError, match=f"something else: {name}"):
        Profile.load(tmp_path / "a.json", key)


def test_a_drafter_with_other_weights_is_refused(profile: Profile, tmp_path: Path) -> None:
    profile.save(tmp_path / "a.json")
    with pytest.raises(ProfileError, match="'small' was 'small 34' and is 'small 35'"):
        Profile.load(tmp_path / "a.json", replace(KEY, drafters={"small": "small 35"}))


def test_another_format_is_refused(profile: Profile, tmp_path: Path) -> None:
    replace(profile, key=replace(KEY, format=2)).save(tmp_path / "a.json")
    with pytest.raises(ProfileError, match="format 2, not 1"):
        Profile.load(tmp_path / "a.json")


def test_every_cut_of_a_file_is_refused(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    profile.save(path)
    whole = path.read_bytes()
    for end in range(0, len(whole) - 1, 37):
        path.write_bytes(whole[:end])
        with pytest.raises(ProfileError, match="damaged"):
            Profile.load(path)


def test_a_flipped_bit_is_refused(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    profile.save(path)
    whole = path.read_bytes()
    for at in range(3, len(whole) - 2, 41):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ProfileError):
            Profile.load(path)


@pytest.mark.parametrize(
    "text",
    [b"", b"{}", b"[]", b"3", b"null", b'"a"', b"\xff\xfe", b"[" * 100_000, b'{"sha256": 1}'],
    ids=lambda text: repr(text[:12]),
)
def test_other_files_are_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(ProfileError, match="damaged"):
        Profile.load(tmp_path / "a.json")


def _changed(profile: Profile, place: str, value: Any) -> Any:
    """The profile as plain values, with one of them replaced, or removed by `...`."""
    whole = json.loads(json.dumps(asdict(profile)))
    *path, last = place.split(".")
    inner = whole
    for name in path:
        inner = inner[int(name) if isinstance(inner, list) else name]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return whole


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("step_ms", "fast", "profile.step_ms must not be 'fast'"),
        ("step_ms", True, "profile.step_ms"),
        ("step_ms", None, "profile.step_ms"),
        ("step_ms", 10**400, "profile.step_ms"),
        ("step_ms", ..., "profile.step_ms is missing"),
        ("made", 3, "profile.made"),
        ("extra", 1, "no field 'extra'"),
        ("key.threads", 2.5, "profile.key.threads"),
        ("key", {}, "format None"),
        ("target", None, "profile.target"),
        ("target.points", [], "one row with one node"),
        ("target.points.0.ms", -1.0, "positive"),
        ("target.points.0.nodes", 1.5, r"points\[0\].nodes"),
        ("drafters.small.curve", 4, "drafters.small.curve"),
        ("drafters.small.acceptance.0.0.rates", [0.9, 0.9], "sum to <= 1"),
        ("drafters.small.acceptance.0.0.rates", [0.9], "standard error per rate"),
        ("drafters.small.tokens_by_size.0", {"four": 2.0}, "the name 'four'"),
        ("drafters.third", {"name": "third", "curve": None, "draft_ms": 0}, "those of its key"),
    ],
)
def test_wrong_contents_are_refused_by_their_place(
    profile: Profile, tmp_path: Path, place: str, value: Any, said: str
) -> None:
    _storage.write(tmp_path / "a.json", _changed(profile, place, value))
    with pytest.raises(ProfileError, match=said):
        Profile.load(tmp_path / "a.json")


def test_not_a_number_is_neither_written_nor_read(profile: Profile, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="cannot hold"):
        replace(profile, step_ms=float("nan")).save(tmp_path / "a.json")
    assert os.listdir(tmp_path) == []
    profile.save(tmp_path / "a.json")
    body = json.dumps(asdict(replace(profile, step_ms=float("nan"))))
    digest = _storage.digest(body)
    (tmp_path / "a.json").write_text(f'{{"sha256": "{digest}",\n"value":\n{body}}}\n')
    with pytest.raises(ProfileError, match="damaged"):
        Profile.load(tmp_path / "a.json")


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_save_that_breaks_off_leaves_the_old_profile(
    profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = tmp_path / "a.json"
    profile.save(path)

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(*((os, "fsync") if broken == "fsync" else (Path, "replace")), fail)
        with pytest.raises(KeyboardInterrupt):
            replace(profile, step_ms=9.0).save(path)
    assert Profile.load(path) == profile
    assert os.listdir(tmp_path) == ["a.json"]


def test_files_that_cannot_be_read_or_written_are_named(profile: Profile, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="cannot read .*a.json"):
        Profile.load(tmp_path / "a.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(ProfileError, match="cannot write"):
        profile.save(tmp_path / "file" / "a.json")


def test_the_path_depends_on_all_but_the_drafters(tmp_path: Path) -> None:
    path = profile_path(KEY)
    assert path.parent == tmp_path / "cache" / "profiles" and path.suffix == ".json"
    for name, value in CHANGES.items():
        changed = profile_path(replace(KEY, **{name: value}))
        assert (changed == path) == (name == "drafters")


def test_drafters_of_an_older_profile_are_kept(profile: Profile) -> None:
    newer = replace(
        profile,
        key=replace(KEY, drafters={"small": "small 35"}),
        drafters={"small": drafter("small")},
    )
    merged = newer.with_drafters_of(profile)
    assert merged.key.drafters == {"ngram": "", "small": "small 35"}
    assert merged.drafters["ngram"] == profile.drafters["ngram"]
    assert merged.drafters["small"] == drafter("small")


def test_rates_are_those_of_the_nearest_temperature_of_the_same_kind(profile: Profile) -> None:
    small = profile.drafters["small"]
    assert small.rates(0.0) == [0.7, 0.1]
    assert small.rates(0.0, "decoded") == [0.6, 0.2]
    assert small.rates(1.0) == [0.6, 0.2]
    assert small.rates(1.0, "teacher-forced") is None
    assert replace(small, acceptance={"0": small.acceptance["0"]}).rates(0.3) is None


def test_acceptance_that_cannot_be_is_refused() -> None:
    for rates, stderr, trials in (
        ([0.5], [], 1),
        ([1.5], [0.0], 1),
        ([-0.1], [0.0], 1),
        ([float("nan")], [0.0], 1),
        ([0.5], [0.0], -1),
    ):
        with pytest.raises(ArgumentError):
            MeasuredAcceptance(rates, stderr, trials, "decoded")


def test_temperatures_have_one_name() -> None:
    assert [temperature_name(t) for t in (0.0, 0.60, 1.0)] == ["0", "0.6", "1"]
