"""A folder in which drafters are tuned: what is there is kept, what is missing is made.

plan.json    what was asked for; another plan is refused
corpus/      the target's answers
start/       the target's first layers, where the models begin with these
1/ 2/ ..     tuned models, each there only once it is whole; each loads as a drafter
N.state      the training that is going on, as of its last epoch
tune.json    the report; with it the work is done
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from rich.filesize import decimal
from transformers import AutoConfig

from redwood import _storage
from redwood._defaults import Tuning as defaults
from redwood.backends.eager.stock import DTYPES, load_stock
from redwood.bench.acceptance import Text
from redwood.drafters.base import ModelDrafter
from redwood.engine.text import Engine
from redwood.errors import ArgumentError, ModelError, check_count
from redwood.models import gguf_parts, locate
from redwood.models.tokenizer import load_tokenizer
from redwood.tuning.boost import Round, boost
from redwood.tuning.checkpoint import TrainingHistory, publish, read_about
from redwood.tuning.collect import Progress, answer_params, collect
from redwood.tuning.corpus import Sample
from redwood.tuning.measure import as_values, decode, measure, union_rates
from redwood.tuning.packing import Weights
from redwood.tuning.shallow import shallow_copy
from redwood.tuning.training import Settings, tune

FORMAT = 1
"""Raised when a folder of an older Redwood can no longer be gone on with."""

_LEAST_PROMPTS = 4
_NODES = 4  # that each model may fill of the tree in which all are compared


@dataclass(frozen=True)
class TuningPlan:
    """Everything that the tuned models depend on.

    Args:
        target: identity of the model, see `identity`.
        starts: identities of the models to begin with, one for all or one each; none: `layers`.
        layers: of the target, to begin with; None: `starts`.
        models: how many to tune.
        prompts: digest of their texts, and of how they became tokens.
        options: of the target's backend, as far as answers depend on them.
        max_tokens, temperature, seed: of the answers; the seed also of all else.
        distill: tokens of the target's law to keep at each position and to learn; 0: the answer's
            token alone is learned.
        held_out: share of the prompts that is measured on, and again that epochs are chosen by.
        marked_weight: see `boost`.
        settings: of the training.

    Raises:
        ArgumentError: a value out of range; the message names it.
    """

    target: str
    starts: tuple[str, ...]
    layers: int | None
    models: int
    prompts: str
    options: dict[str, str] = field(default_factory=dict)
    max_tokens: int = defaults.max_tokens
    temperature: float = defaults.temperature
    seed: int = defaults.seed
    distill: int = defaults.distill
    held_out: float = defaults.held_out
    marked_weight: float = defaults.marked_weight
    settings: Settings = field(default_factory=Settings)
    format: int = FORMAT

    def __post_init__(self) -> None:
        check_count("models", self.models)
        check_count("distill", self.distill, least=0)
        if (self.layers is None) == (not self.starts):
            raise ArgumentError("models begin either with given ones or with layers of the target")
        if len(self.starts) not in (0, 1, self.models):
            raise ArgumentError(f"{len(self.starts)} models to begin with, for {self.models}")
        if not 0.0 < self.held_out < 0.5:
            raise ArgumentError(f"held_out {self.held_out} must be above 0 and below 0.5")
        if not 0.0 <= self.marked_weight < 1.0:
            raise ArgumentError(f"marked_weight {self.marked_weight} must be in [0, 1)")
        if self.marked_weight and self.models == 1:
            raise ArgumentError("marked_weight is for the second model on, and there is one")
        if self.distill > 20:
            raise ArgumentError(f"distill {self.distill} must be at most 20")
        answer_params([0], self.max_tokens, self.temperature, self.seed)  # checks them

    @property
    def key(self) -> str:
        """Digest of all of it."""
        return _storage.digest(json.dumps(asdict(self), sort_keys=True))

    @property
    def corpus_key(self) -> str:
        """Digest of what the answers depend on."""
        names = ("target", "prompts", "options", "max_tokens", "temperature", "seed", "distill")
        parts = {name: getattr(self, name) for name in (*names, "format")}
        return _storage.digest(json.dumps(parts, sort_keys=True))


class Split(NamedTuple):
    """Numbers of the prompts to learn from, to choose epochs by, and to measure on."""

    training: list[int]
    validation: list[int]
    held_out: list[int]


def split(count: int, share: float, seed: int) -> Split:
    """Returns which prompts serve for what, by a seed; every prompt serves for one thing.

    Raises:
        ArgumentError: fewer than 4 prompts.
    """
    if count < _LEAST_PROMPTS:
        raise ArgumentError(f"{count} prompts are too few to tune on: at least {_LEAST_PROMPTS}")
    order = np.random.default_rng([seed, 1]).permutation(count).tolist()
    part = max(1, round(share * count))
    parts = order[2 * part :], order[part : 2 * part], order[:part]
    return Split(*(sorted(each) for each in parts))


def identity(name: str) -> str:
    """Returns a model's name with a digest of its files' names, sizes and times.

    Raises:
        ModelError: there is no such model.
    """
    folder, gguf = locate(name, progress=True)
    files = gguf_parts(gguf) if gguf is not None else sorted(folder.glob("*.safetensors"))
    listed = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{name} {_storage.digest(repr(listed))[:16]}"


class Project:
    """Tunes drafters in a folder; see the top of this file.

    Args:
        folder: new, empty, or that of an earlier run with the same plan.
        plan: what to make.

    Raises:
        ArgumentError: a folder with something else in it, or made with another plan.
        OSError: a folder that cannot be written.
    """

    def __init__(self, folder: Path, plan: TuningPlan) -> None:
        self.folder, self.plan = folder, plan
        values = json.loads(json.dumps(asdict(plan)))
        path = folder / "plan.json"
        if not path.exists():
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise ArgumentError(f"{folder} holds other things: give a new folder")
            folder.mkdir(parents=True, exist_ok=True)
            _storage.write(path, values)
            return
        known = _read(path)
        if odd := _difference(known, values):
            raise ArgumentError(
                f"{folder} was made with {odd}: give the same again to go on, or another folder"
            )

    def report(self) -> dict[str, Any] | None:
        """Returns the report of work that is done, or None.

        Raises:
            ArgumentError: a damaged report, or models that are gone.
        """
        path = self.folder / "tune.json"
        if not path.exists():
            return None
        made: dict[str, Any] = _read(path)
        for model in made["models"]:
            read_about(self.folder / model["folder"], self.plan.key)
        return made

    def run(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        folders: Sequence[Path],
        open_draft: Callable[[str], ModelDrafter],
        *,
        device: str = "cpu",
        on_progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Does what is missing; returns the report, which then is in the folder, too.

        Args:
            engine: of the target, idle.
            prompts: token ids of the prompts of the plan.
            folders: of the models to begin with; with layers, that of the target.
            open_draft: opens a folder as a drafter, as it will be used.
            device: that trains.

        Raises:
            ArgumentError: too few prompts, damaged files, or another process at work here.
            ModelError: a model that does not load, or not enough disk space.
            NumericalError: a training that diverges.
            OSError: a folder that cannot be written.
        """
        tell = on_progress or (lambda what, done, of: None)
        plan = self.plan
        parts = split(len(prompts), plan.held_out, plan.seed)
        with self._alone():
            starts = self._starts(engine, folders)
            samples = collect(
                engine,
                prompts,
                self.folder / "corpus",
                key=plan.corpus_key,
                max_tokens=plan.max_tokens,
                temperature=plan.temperature,
                seed=plan.seed,
                top=plan.distill,
                on_progress=tell,
            )
            rounds = self._rounds(samples, parts, starts, device, tell)
            report = self._measured(engine, samples, parts, starts, rounds, open_draft, tell)
            _storage.write(self.folder / "tune.json", report)
        return report

    @contextmanager
    def _alone(self) -> Iterator[None]:
        guard = FileLock(self.folder / ".lock")
        try:
            guard.acquire(timeout=0)
        except Timeout as error:
            raise ArgumentError(f"another process is at work in {self.folder}") from error
        try:
            yield
        finally:
            guard.release()

    def _starts(self, engine: Engine, folders: Sequence[Path]) -> list[Path]:
        """Folders to begin with, one for every model; checks the free disk space."""
        start = self.folder / "start"
        shallow = self.plan.layers is not None
        if shallow and not start.exists():
            assert self.plan.layers is not None
            model = shallow_copy(folders[0], self.plan.layers)
            self._check_room([4 * model.num_parameters()] * self.plan.models)
            about = {"key": self.plan.key, "layers": self.plan.layers}
            publish(model, engine.tokenizer, start, _stored_dtype(folders[0]), about)
        if shallow:
            read_about(start, self.plan.key)
        starts = [start] if shallow else list(folders)
        starts = starts * (self.plan.models // len(starts))
        left = [
            _float_bytes(each)
            for number, each in enumerate(starts)
            if not (self.folder / str(number + 1)).exists()
        ]
        self._check_room(left)
        return starts

    def _check_room(self, sizes: Sequence[int]) -> None:
        """Sizes of models in float32; a training keeps its weights twice, and two moments."""
        needed = sum(sizes) + 5 * max(sizes, default=0)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise ModelError(
                f"the disk of {self.folder} has {decimal(free)} free, tuning may take "
                f"{decimal(needed)}: free some space, or give a folder on another disk"
            )

    def _rounds(
        self,
        samples: Sequence[Sample],
        parts: Split,
        starts: Sequence[Path],
        device: str,
        tell: Progress,
    ) -> list[Round]:
        plan = self.plan
        training = [samples[number] for number in parts.training]
        validation = [samples[number] for number in parts.validation]

        def train(number: int, weights: Weights, check: Weights) -> tuple[Any, TrainingHistory]:
            name = str(number + 1)
            made, state = self.folder / name, self.folder / f"{name}.state"
            if not made.exists():
                model: Any = load_stock(starts[number], torch.float32).to(torch.device(device))
                history = tune(
                    model,
                    training,
                    weights,
                    validation,
                    check,
                    plan.settings,
                    checkpoint=state,
                    key=plan.key,
                    on_progress=lambda what, done, of: tell(f"Model {name}: {what}", done, of),
                )
                about = {"key": plan.key, "number": number + 1, "history": asdict(history)}
                own = load_tokenizer(starts[number])
                publish(model, own, made, _stored_dtype(starts[number]), about)
                del model
            state.unlink(missing_ok=True)
            history = TrainingHistory(**read_about(made, plan.key)["history"])
            # Asked as it lies there, rounded to its dtype: the same after an interruption.
            return load_stock(made, torch.float32).to(torch.device(device)), history

        return boost(plan.models, training, validation, train, marked_weight=plan.marked_weight)

    def _measured(
        self,
        engine: Engine,
        samples: Sequence[Sample],
        parts: Split,
        starts: Sequence[Path],
        rounds: Sequence[Round],
        open_draft: Callable[[str], ModelDrafter],
        tell: Progress,
    ) -> dict[str, Any]:
        plan, target = self.plan, engine.target
        texts = [Text(samples[i].prompt, samples[i].answer) for i in parts.held_out]
        params = answer_params(parts.held_out, plan.max_tokens, plan.temperature, plan.seed)
        budget = min(1 + _NODES * len(rounds), target.capacity)
        folders = [str(self.folder / str(number + 1)) for number in range(len(rounds))]
        before = list(dict.fromkeys(map(str, starts)))
        total, done = len(before) + len(folders), 0
        held: list[tuple[dict[str, Any], Any, ModelDrafter]] = []
        for folder in [*before, *folders]:
            tell("Measuring", done, total)
            drafter = open_draft(folder)
            rates = measure(target, drafter.backend, texts)
            decoding = decode(engine, [drafter], texts, params, budget)
            values = {"folder": folder, **as_values(rates.acceptance, decoding)}
            held.append((values, rates, drafter))
            done += 1
        tell("Measuring", total, total)
        tuned = held[len(before) :]
        models = [
            {**values, "folder": str(number + 1), **each._asdict(), "history": asdict(each.history)}
            for number, ((values, _, _), each) in enumerate(zip(tuned, rounds, strict=True))
        ]
        union = decode(engine, [drafter for _, _, drafter in tuned], texts, params, budget)
        return {
            "plan": asdict(plan),
            "prompts": {name: len(part) for name, part in parts._asdict().items()},
            "answer_tokens": sum(len(sample.answer) for sample in samples),
            "before": [values for values, _, _ in held[: len(before)]],
            "models": models,
            "union": dict(as_values(union_rates([rates for _, rates, _ in tuned]), union)),
        }


def _stored_dtype(folder: Path) -> torch.dtype:
    """In what a model's weights are kept; what is made of them is kept in the same."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    named = str(getattr(config, "dtype", None)).removeprefix("torch.")
    return DTYPES.get(named, torch.float32)


def _float_bytes(folder: Path) -> int:
    """What a model's weights take in float32."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return size * 4 // _stored_dtype(folder).itemsize


def _read(path: Path) -> Any:
    try:
        return _storage.read(path)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{path} is damaged ({error}): remove its folder") from error


def _difference(known: Any, wanted: Any, name: str = "") -> str | None:
    """The first value that differs, in words, or None."""
    if isinstance(known, dict) and isinstance(wanted, dict):
        for each in {**known, **wanted}:
            if odd := _difference(known.get(each), wanted.get(each), each):
                return odd
        return None
    return None if known == wanted else f"{name} {known!r}, not {wanted!r}"
