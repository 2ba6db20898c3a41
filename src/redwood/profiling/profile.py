"""The calibration profile: measurements of a target and its drafters, as values and as JSON.

Measuring is `redwood.bench.calibrate`. A profile belongs to its `ProfileKey`, from which the name
of its file in the user's cache is made.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from redwood import _storage
from redwood.errors import ArgumentError, ProfileError
from redwood.profiling.latency import LatencyModel, LatencyPoint

__all__ = [
    "FORMAT",
    "MeasuredAcceptance",
    "DrafterProfile",
    "Profile",
    "ProfileKey",
    "LatencyModel",
    "LatencyPoint",
    "profile_path",
    "temperature_name",
]

FORMAT = 1
"""Raised when a profile of an older Redwood can no longer be read."""


@dataclass(frozen=True)
class MeasuredAcceptance:
    """Acceptance rates by rank: of a drafted child, given that its parent was accepted.

    Args:
        rates: [K] by rank, each in [0, 1], their sum at most 1.
        stderr: [K] standard errors; prompts, not positions, count as independent.
        trials: positions that were measured.
        how: "teacher-forced" (chances along a plain text) or "decoded" (counts while decoding).
    """

    rates: list[float]
    stderr: list[float]
    trials: int
    how: str

    def __post_init__(self) -> None:
        if len(self.rates) != len(self.stderr) or self.trials < 0:
            raise ArgumentError("acceptance needs a standard error per rate, and a count of trials")
        if not all(0.0 <= rate <= 1.0 for rate in self.rates) or sum(self.rates) > 1.0 + 1e-6:
            raise ArgumentError(f"acceptance rates {self.rates} must be chances that sum to <= 1")


@dataclass(frozen=True)
class DrafterProfile:
    """Measurements of one drafter. Temperatures are text: "0", "0.6".

    Args:
        name: as in `--drafter`.
        curve: forwards of the drafter's own model; None without a model.
        draft_ms: median milliseconds per proposed node, the drafter's own forwards apart.
        acceptance: per temperature, one entry per measurement method.
        reliability: by temperature, what the drafter learned about itself; read by the drafter.
        tokens_by_size: by temperature, measured tokens per target pass by nodes of the tree, the
            root included.
    """

    name: str
    curve: LatencyModel | None
    draft_ms: float
    acceptance: dict[str, list[MeasuredAcceptance]] = field(default_factory=dict)
    reliability: dict[str, Any] = field(default_factory=dict)
    tokens_by_size: dict[str, dict[int, float]] = field(default_factory=dict)

    def rates(self, temperature: float, how: str | None = None) -> list[float] | None:
        """Returns the acceptance rates at a temperature, the nearest one that was measured.

        Temperature 0 and sampling do not stand in for one another.

        Args:
            how: which measurement; None: the first, teacher-forced where there is one.
        """
        known = [text for text in self.acceptance if (float(text) == 0.0) == (temperature == 0.0)]
        for text in sorted(known, key=lambda each: abs(float(each) - temperature)):
            for made in self.acceptance[text]:
                if how in (None, made.how):
                    return made.rates
        return None


@dataclass(frozen=True)
class ProfileKey:
    """Everything a profile depends on.

    Args:
        target: identity of the model: its name, and a stamp of its files.
        drafters: the same by drafter; "" for one without a model.
        backend: of the target, with its instruction set `isa`, `weights` (or dtype), `kv`,
            `threads`, `cpus` (to which they are pinned); empty or 0 where it has no such thing.
        processor: model of the CPU.
        device: where the target runs, with the name of a GPU.
        format, redwood: of the file, of the package.
    """

    target: str
    drafters: dict[str, str]
    backend: str
    isa: str
    weights: str
    kv: str
    threads: int
    cpus: str
    processor: str
    device: str
    redwood: str
    format: int = FORMAT

    def difference(self, wanted: ProfileKey) -> str | None:
        """Returns where a profile of this key does not serve `wanted`, in a clause, or None.

        It may hold more drafters than are wanted.
        """
        for entry in fields(self):
            ours, theirs = getattr(self, entry.name), getattr(wanted, entry.name)
            if entry.name != "drafters" and ours != theirs:
                return f"{entry.name} was {ours!r} and is {theirs!r}"
        for name, identity in wanted.drafters.items():
            if name not in self.drafters:
                return f"drafters: {name!r} was not measured"
            if self.drafters[name] != identity:
                return f"drafters: {name!r} was {self.drafters[name]!r} and is {identity!r}"
        return None


@dataclass(frozen=True)
class Profile:
    """All that was measured for one key.

    Args:
        made: time of the measurement, ISO 8601 in UTC.
        target: forwards of the target.
        step_ms: median milliseconds of a step outside of target and drafting.
        drafters: by name.
    """

    key: ProfileKey
    made: str
    target: LatencyModel
    step_ms: float
    drafters: dict[str, DrafterProfile]

    def with_drafters_of(self, older: Profile) -> Profile:
        """Returns this profile with the drafters that only an older one of the same key has."""
        names = [name for name in older.key.drafters if name not in self.key.drafters]
        known = {name: older.key.drafters[name] for name in names} | self.key.drafters
        drafters = {name: older.drafters[name] for name in names} | self.drafters
        return replace(self, key=replace(self.key, drafters=known), drafters=drafters)

    def save(self, path: Path) -> None:
        """Writes the profile as JSON, replacing an older one in a single step.

        Guarantee: whenever the process ends, `path` holds the old profile or the new one, whole.

        Raises:
            ArgumentError: a number that is NaN or infinite.
            ProfileError: a folder that cannot be written.
        """
        try:
            _storage.write(path, asdict(self))
        except ValueError as error:
            raise ArgumentError(f"a profile cannot hold this: {error}") from error
        except OSError as error:
            raise ProfileError(f"cannot write {path}: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: Path, key: ProfileKey | None = None) -> Self:
        """Returns the profile in a file.

        Args:
            key: what it must have been made for; None: anything.

        Raises:
            ProfileError: no such file, one that is damaged or of another version, or a profile
                made for something else; the message names the field that differs.
        """
        try:
            made: Self = cls._of(_storage.read(path), path)
        except OSError as error:
            raise ProfileError(f"cannot read {path}: {error.strerror or error}") from error
        except ValueError as error:
            raise ProfileError(f"{path} is damaged: {error}") from error
        difference = None if key is None else made.key.difference(key)
        if difference:
            raise ProfileError(f"{path} was made for something else: {difference}")
        return made

    @classmethod
    def _of(cls, value: Any, path: Path) -> Self:
        key = value.get("key") if isinstance(value, dict) else None
        version = key.get("format") if isinstance(key, dict) else None
        if version != FORMAT:
            raise ProfileError(f"{path} has format {version}, not {FORMAT}: calibrate again")
        made: Self = _storage.typed(cls, value, "profile")
        if made.drafters.keys() != made.key.drafters.keys():
            raise ArgumentError("the drafters are not those of its key")
        return made


def profile_path(key: ProfileKey) -> Path:
    """Returns where the profile of a key lies in the user's cache.

    The drafters are not part of the name: one file holds all that were measured with a target.
    """
    from redwood.models import cache_dir

    named = json.dumps(asdict(replace(key, drafters={})), sort_keys=True)
    return cache_dir() / "profiles" / f"{_storage.digest(named)[:24]}.json"


def temperature_name(temperature: float) -> str:
    """Returns a temperature as it stands in a profile: 0.60 is "0.6"."""
    return f"{temperature:g}"
