"""Groups of options: declared once, shared by the commands that have them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from functools import wraps
from typing import Any, TypeVar, get_type_hints

from redwood.cli import kept_prompts
from redwood.cli import options as o

_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class KeptTable:
    """Where the drafting table of the target's own output is kept."""

    table: o.TablePath = None
    table_size: o.TableSize = None


@dataclass(frozen=True, kw_only=True)
class Drafting(KeptTable):
    """The target, the drafter, and the trees it drafts."""

    target: o.Target = o.DEFAULT_TARGET
    drafter: o.DrafterName = o.DEFAULT_DRAFTER
    budget: o.Budget = None
    tree: o.Tree = None
    law: o.LawName = None
    draft_vocab: o.DraftVocab = None
    tokenizer: o.Tokenizer = None


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Backend, number formats and processors."""

    backend: o.BackendName = None
    dtype: o.Dtype = None
    device: o.Device = None
    capacity: o.Capacity = None
    weights: o.Weights = None
    kv: o.Kv = None
    threads: o.Threads = None
    cpus: o.Cpus = None


@dataclass(frozen=True, kw_only=True)
class Offloading:
    """Where the weights of a model larger than memory stay."""

    offload: o.Offload = None
    memory: o.Memory = None


@dataclass(frozen=True, kw_only=True)
class Placement(Offloading):
    """Over which processes the model is spread, and where its weights stay."""

    parallel: o.Parallel = None


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """How prompts are read, and what of them stays."""

    kv_cache: kept_prompts.KvCache = None
    kv_cache_file: kept_prompts.KvCacheFile = None
    prefill_beside: kept_prompts.PrefillBeside = None
    checkpoint_tokens: kept_prompts.CheckpointTokens = None


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is sampled; named as the fields of `SamplingParams`."""

    max_tokens: o.MaxTokens = None
    temperature: o.Temperature = None
    top_p: o.TopP = None
    top_k: o.TopK = None
    min_p: o.MinP = None
    repetition_penalty: o.RepetitionPenalty = None
    presence_penalty: o.PresencePenalty = None
    frequency_penalty: o.FrequencyPenalty = None
    logit_bias: o.LogitBias = None
    seed: o.Seed = None
    stop: o.Stop = None
    ignore_eos: o.IgnoreEos = False
    verifier: o.Verifier = None

    def given(self) -> dict[str, Any]:
        """Returns the parameters that were given."""
        return o.given(**{**asdict(self), "logit_bias": o.logit_bias(self.logit_bias)})


def values(*groups: Any) -> dict[str, Any]:
    """Returns the options of some groups by name, None where not given."""
    return {name: value for group in groups for name, value in asdict(group).items()}


def grouped(command: Callable[..., _Result]) -> Callable[..., _Result]:
    """Replaces each parameter of a command that is a group by the options of the group."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, type] = {}
    flat: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue  # options that another decorator adds
        kind = hints[parameter.name]
        if is_dataclass(kind) and isinstance(kind, type):
            groups[parameter.name] = kind
            flat += _parameters(kind)
        else:
            flat.append(parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY))

    @wraps(command)
    def run(**options: Any) -> _Result:
        made = {
            name: kind(**{each.name: options.pop(each.name) for each in fields(kind)})
            for name, kind in groups.items()
        }
        return command(**options, **made)

    run.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in flat}
    del run.__wrapped__  # its parameters are not those of the command
    return run


def _parameters(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if each.default is MISSING else each.default,
            annotation=hints[each.name],
        )
        for each in fields(group)
    ]
