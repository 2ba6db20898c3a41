"""Whether trees change anything: logits of small trees, and whole answers, token for token."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from subjects import Subject
from torch import Tensor

from redwood.backends.base import AcceptedPath, Backend, Nodes
from redwood.bench.interleave import PLAIN, Candidate, alternate
from redwood.bench.report import NEAR_TIE, reports
from redwood.sampling import SamplingParams

_PARENTS = [-1, 0, 0, 1, 2, 2, 3, 6]
_KEPT = [0, 1, 3]
_SETTINGS: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 0.8, "seed": 1234}]


def probes(subject: Subject) -> list[dict[str, Any]]:
    """Returns the largest differences of logits, in units of their spread, that must be small.

    A tree against its paths, a row among others against the row alone, a commit against the text
    read anew, and a graph against the eager backend.
    """
    found = []
    eager = _tree(subject.eager.target, subject.prompts[0])
    for engine in (subject.eager, subject.graphs):
        backend, prompt = engine.target, subject.prompts[0]
        tokens = _tokens(backend)
        tree = _tree(backend, prompt)
        worst = {
            "tree against paths": _worst(tree, _paths(backend, prompt)),
            "row among others": _worst(_among_others(backend, subject.prompts), tree),
            "commit against recomputation": _worst(
                _after_commit(backend, prompt),
                _last(backend, [*prompt, *(tokens[node] for node in _KEPT), tokens[0]]),
            ),
            "against the eager backend": _worst(tree, eager),
        }
        limit = NEAR_TIE[eager.dtype]
        found += [
            {"backend": backend.name, "probe": name, "worst": value, "passed": value <= limit}
            for name, value in worst.items()
        ]
    return found


def answers(
    subject: Subject, budgets: list[int], num_prompts: int, max_tokens: int
) -> list[dict[str, Any]]:
    """Compares trees with plain decoding on the same backend; differences carry their margins."""
    found = []
    for engine in (subject.eager, subject.graphs):
        candidates = [PLAIN] + [
            Candidate(kind, subject.drafter(kind), budget)
            for kind in ("ngram", "model")
            for budget in budgets
        ]
        for setting in _SETTINGS:
            params = SamplingParams(max_tokens=max_tokens, **setting)
            prompts = subject.prompts[:num_prompts]
            runs = alternate(engine, candidates, prompts, params)
            made = reports(engine, candidates, prompts, params, runs)
            for report, own in list(zip(made, runs, strict=True))[1:]:
                found.append(
                    {
                        "backend": engine.target.name,
                        **setting,
                        "drafter": report.drafter,
                        "budget": report.budget,
                        "prompts": report.num_prompts,
                        "tokens": sum(len(run.token_ids) for runs in own for run in runs),
                        "tokens_per_pass": report.mean_acceptance_length,
                        "differing_prompts": report.num_differences,
                        "near_ties": report.num_near_ties,
                        "differences": [asdict(difference) for difference in report.differences],
                    }
                )
    return found


def _tokens(backend: Backend) -> list[int]:
    return [(7 * i + 3) % backend.vocab_size for i in range(len(_PARENTS))]


def _filled(backend: Backend, text: list[int]) -> int:
    row = backend.open()
    backend.extend([Nodes(row, text, num_logits=1)])
    backend.commit([AcceptedPath(row, range(len(text)))])
    return row


def _last(backend: Backend, text: list[int]) -> Tensor:
    """Logits [1, V] after a text that is read anew."""
    row = _filled(backend, text[:-1])
    (logits,) = backend.extend([Nodes(row, text[-1:])])
    backend.release(row)
    return logits


def _tree(backend: Backend, prompt: list[int]) -> Tensor:
    row = _filled(backend, prompt)
    (logits,) = backend.extend([Nodes(row, _tokens(backend), _PARENTS)])
    backend.release(row)
    return logits


def _paths(backend: Backend, prompt: list[int]) -> Tensor:
    tokens, rows = _tokens(backend), []
    for node in range(len(_PARENTS)):
        path: list[int] = []
        while node >= 0:
            path.insert(0, tokens[node])
            node = _PARENTS[node]
        rows.append(_last(backend, [*prompt, *path]))
    return torch.cat(rows)


def _among_others(backend: Backend, prompts: list[list[int]]) -> Tensor:
    rows = [_filled(backend, prompt) for prompt in [*prompts[1:3], prompts[0]]]
    entries = [Nodes(row, [i + 1] * (i + 1)) for i, row in enumerate(rows[:-1])]
    logits = backend.extend([*entries, Nodes(rows[-1], _tokens(backend), _PARENTS)])
    for row in rows:
        backend.release(row)
    return logits[-1]


def _after_commit(backend: Backend, prompt: list[int]) -> Tensor:
    row, tokens = _filled(backend, prompt), _tokens(backend)
    backend.extend([Nodes(row, tokens, _PARENTS)])
    backend.commit([AcceptedPath(row, _KEPT)])
    (logits,) = backend.extend([Nodes(row, tokens[:1])])
    backend.release(row)
    return logits


def _worst(got: Tensor, want: Tensor) -> float:
    got, want = got.float(), want.float()
    return float((got - want).abs().max() / want.std())
