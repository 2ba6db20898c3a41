"""Transformers integration: `model.generate` of your own loaded model decodes through token trees.

    model.generate(**inputs, custom_generate=redwood.hf.generate(drafter="ngram"), do_sample=True)

Transformers prepares prompt, processors and stopping criteria as always and hands the decoding
over; no remote code is trusted. On this route it keeps `streamer`, `tokenizer`, `assistant_model`
and `synced_gpus` to itself, so what is passed there is lost: bind it in `redwood.hf.generate`, or
call `tree_generate`, which takes them all. Not inside: beam search and the other modes, and scores
or hidden states as output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from redwood.algorithms.successors import successor_table
from redwood.backends.base import Backend
from redwood.drafters.base import Drafter, ModelDrafter, NgramDrafter, NoDrafter, UnionDrafter
from redwood.drafters.names import AUTO
from redwood.engine.engine import RowEngine
from redwood.engine.load import default_budget
from redwood.engine.stats import Stats
from redwood.errors import ArgumentError, TokenizerMismatchError, UnsupportedError
from redwood.hf.decode import decode_batch
from redwood.hf.inputs import left_padding, refuse_options, refuse_state
from redwood.hf.model import borrowed
from redwood.hf.processors import check_processors, path_processor
from redwood.models._transformers import pad_id
from redwood.models.tokenizer import check_same_tokens
from redwood.sampling import SamplingParams

_DRAFTERS: dict[str, Callable[[], Drafter]] = {"ngram": NgramDrafter, "none": NoDrafter}
_FREE: WeakKeyDictionary[PreTrainedModel, NgramDrafter] = WeakKeyDictionary()
"""By model: its text and the table of its own rows, which grows from call to call."""


@dataclass(frozen=True, eq=False, repr=False)
class TreeGenerate:
    """Decodes a batch through token trees: what `redwood.hf.generate(...)` returns.

    Greedy decoding gives the tokens of plain `generate` (near-ties of rounding apart). Sampling has
    the law of plain `generate`, the softmax of its processed scores, with other random numbers.
    With `seed` the text is that of Redwood's own plain decoding with this seed, whatever drafts
    (coupled verification). Without it a seed is drawn from torch's global generator, so
    `torch.manual_seed` repeats a run, given the same drafter and budget (traversal verification,
    which keeps more of a tree). Row 0 of a batch decodes with the seed itself, the other rows with
    seeds derived from it.

    Args:
        drafter: "auto" (the text itself, and what this model said before), "ngram", "none", a
            loaded Transformers model, an object with the `Drafter` protocol (used by one thread at
            a time), or a list of these: one tree from all of them.
        budget: nodes scored per step for a row, the root included; None: what suits the drafters.
        tree: parents of a static tree for draft models; see `ModelDrafter`.
        law: how draft models draw; see `ModelDrafter`.
        seed: a 64-bit integer.
        verifier: see `SamplingParams`.
        streamer: gets the prompt, then the tokens of each position, then the end.
        tokenizer: of the model, for stop_strings and to be compared with assistant_tokenizer.
        assistant_tokenizer: of the draft models.
        stop_strings: end a text, as in plain `generate`; here, since on this route Transformers
            drops the tokenizer that its own stop_strings need.
        trust_processors: also call logits processors that are not known to be pure functions of
            (input_ids int64 [1, L], scores float32 [1, V]). If they are not, the text is wrong.
        stats: a list that each call refills with the `Stats` of its rows.

    Raises:
        ArgumentError: a value that cannot be right.
    """

    drafter: Any = AUTO
    _: KW_ONLY
    budget: int | None = None
    tree: Sequence[int] | None = None
    law: str = "without_replacement"
    seed: int | None = None
    verifier: str = "auto"
    streamer: Any = None
    tokenizer: Any = None
    assistant_tokenizer: Any = None
    stop_strings: str | Sequence[str] | None = None
    trust_processors: bool = False
    stats: list[Stats] | None = None

    def __post_init__(self) -> None:
        SamplingParams(seed=self.seed, verifier=self.verifier)  # checks both
        for part in self._parts:
            if isinstance(part, str) and part not in (*_DRAFTERS, AUTO):
                raise ArgumentError(
                    f"drafter {part!r} must be auto, ngram, none, or a loaded model"
                )
            if not isinstance(part, str | PreTrainedModel) and not hasattr(part, "propose"):
                raise ArgumentError(f"drafter {type(part).__name__} is no model and no Drafter")
        if self.tree is not None and not self._draft_models:
            raise ArgumentError("tree gives the shape for a draft model, and there is none")
        if self.stop_strings and self.tokenizer is None:
            raise ArgumentError("stop_strings need tokenizer=, the model's own")
        if self.assistant_tokenizer is not None and self.tokenizer is None:
            raise ArgumentError("assistant_tokenizer needs tokenizer= to be compared with")

    @property
    def _parts(self) -> list[Any]:
        return list(self.drafter) if isinstance(self.drafter, list | tuple) else [self.drafter]

    @property
    def _draft_models(self) -> list[Any]:
        return [part for part in self._parts if isinstance(part, PreTrainedModel)]

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Sequence[Any],
        stopping_criteria: Sequence[Any],
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """Returns int64 [batch, length] or a `GenerateDecoderOnlyOutput`; for `model.generate`.

        The model is left as it was found, also after an error. Until then its attention is ours:
        calls of this kind from other threads wait, plain calls of the same model fail.

        Raises:
            UnsupportedError: a model, option, input or processor that cannot be served exactly.
            TokenizerMismatchError: a draft model with other tokens.
            CapacityError: a prompt, a tree or an answer that the model's context does not hold.
        """
        refuse_options(model, input_ids, generation_config, model_kwargs)
        check_processors(logits_processor, trusted=self.trust_processors)
        padding = left_padding(input_ids, model_kwargs)
        criteria = StoppingCriteriaList(stopping_criteria)
        if self.stop_strings:
            criteria.append(StopStringCriteria(self.tokenizer, self.stop_strings))
        models = {id(m): m for m in (model, *self._draft_models)}
        for each in models.values():
            refuse_state(each)
        self._check_tokens(model)
        with ExitStack() as stack:
            # The same order in every thread, so that no two wait for each other.
            backends = {i: stack.enter_context(borrowed(models[i])) for i in sorted(models)}
            target = backends[id(model)]
            engine = self._engine(model, target, backends, criteria, len(padding))
            params = self._params(generation_config, criteria, input_ids, target)
            seeds = _row_seeds(params.seed, len(padding))
            rows = []
            for i, padded in enumerate(padding):
                apply = path_processor(logits_processor, input_ids, i, padded, target.vocab_size)
                own = replace(params, seed=seeds[i], logits_processor=apply)
                rows.append((input_ids[i, padded:].tolist(), own))
            pad = pad_id(generation_config)
            text = decode_batch(
                engine, rows, input_ids, criteria, pad, streamer=self.streamer, stats=self.stats
            )
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=text)
        return text

    def _check_tokens(self, model: Any) -> None:
        for draft in self._draft_models:
            if self.assistant_tokenizer is not None:
                check_same_tokens(self.tokenizer, self.assistant_tokenizer)
                continue
            ours, theirs = (m.config.get_text_config().vocab_size for m in (model, draft))
            if ours != theirs:
                raise TokenizerMismatchError(
                    f"the draft model has {theirs} tokens, the model {ours}: if all but padding "
                    "agree, show it with tokenizer= and assistant_tokenizer="
                )

    def _engine(
        self,
        model: PreTrainedModel,
        target: Backend,
        backends: Mapping[int, Backend],
        criteria: Any,
        rows: int,
    ) -> RowEngine:
        drafters: list[Drafter] = []
        for part in self._parts:
            if isinstance(part, PreTrainedModel):
                drafters.append(ModelDrafter(backends[id(part)], self.tree, law=self.law))
            elif part == AUTO:
                drafters.append(_FREE.setdefault(model, NgramDrafter(table=successor_table())))
            else:
                drafters.append(_DRAFTERS[part]() if isinstance(part, str) else part)
        budget = self.budget
        if budget is None and self.tree is not None:
            budget = len(self.tree)
        if budget is None:
            budget = default_budget(drafters)
        ends = [c.eos_token_id.tolist() for c in criteria if type(c) is EosTokenCriteria]
        return RowEngine(
            target,
            drafters[0] if len(drafters) == 1 else UnionDrafter(drafters),
            eos_ids=[token for tokens in ends for token in tokens],
            budget=budget,
            max_rows=rows,
        )

    def _params(
        self, config: Any, criteria: Any, input_ids: Tensor, target: Backend
    ) -> SamplingParams:
        """What all rows have in common. Processors hold temperature, top-k and the like."""
        ends = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
        limit = min(ends) - input_ids.shape[1] if ends else target.capacity
        seed, verifier = self.seed, self.verifier
        if config.do_sample and seed is None:
            seed = int(torch.empty((), dtype=torch.int64).random_(-(2**63), None))
            verifier = "traversal" if verifier == "auto" else verifier
        return SamplingParams(
            max_tokens=max(1, limit),
            temperature=1.0 if config.do_sample else 0.0,
            seed=seed,
            verifier=verifier,
        )


generate = TreeGenerate  # the name for `custom_generate=redwood.hf.generate(...)`


def tree_generate(
    model: Any,
    inputs: Tensor | None = None,
    *,
    drafter: Any = None,
    assistant_model: Any = None,
    **options: Any,
) -> Any:
    """Returns what `model.generate(inputs, **options)` would, decoded through token trees.

    Args:
        inputs: token ids, or None with `input_ids=`.
        drafter: see `TreeGenerate`; None: `assistant_model`, else "auto".
        assistant_model: a draft model, by the name that Transformers gives it.
        options: fields of `TreeGenerate`, `streamer`, `tokenizer` and `stop_strings` among them;
            the others go to `model.generate`, which refuses what it does not know.

    Raises:
        UnsupportedError: see `TreeGenerate`; also synced_gpus and stop strings inside a generation
            config, which Transformers would not hand over.
    """
    if drafter is not None and assistant_model is not None:
        raise ArgumentError("give drafter or assistant_model; drafter=[...] takes several")
    if drafter is None:
        drafter = AUTO if assistant_model is None else assistant_model
    if options.get("synced_gpus"):
        raise UnsupportedError("synced_gpus is not supported: ranks would do unequal forwards")
    for config in (options.get("generation_config"), model.generation_config):
        if config is not None and config.stop_strings:
            raise UnsupportedError(
                "stop_strings in a generation config: give stop_strings= instead"
            )
    own = {f.name: options.pop(f.name) for f in fields(TreeGenerate) if f.name in options}
    return model.generate(inputs, custom_generate=TreeGenerate(drafter, **own), **options)


def _row_seeds(seed: int | None, rows: int) -> list[int | None]:
    """Returns the seed itself for the first row and independent ones for the others."""
    if seed is None:
        return [None] * rows
    others = [np.random.SeedSequence([seed % 2**64, row]) for row in range(1, rows)]
    return [seed, *(int(other.generate_state(1, np.uint64)[0]) for other in others)]
