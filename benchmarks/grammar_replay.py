"""Drafts from grammars, replayed over recorded answers: tokens per pass, without a model's time.

    python benchmarks/grammar_replay.py --target qwen2.5-coder-1.5b-instruct --record
    python benchmarks/grammar_replay.py --target qwen2.5-coder-1.5b-instruct --budget 6 16

The record has plain answers to the prompts of `grammar_prompts.py` under their schemas, at
temperature 0. A replay takes them for what the target says, as `replay.py` does, with n-grams alone
and with n-grams and the grammar. Halves: prompts 0, 2, .. and 1, 3, ..: tune on one, report both.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grammar_prompts import SCHEMAS, TOOL_TASKS, Task
from replay import Replay, record_path

from redwood.bench.interleave import PLAIN, run
from redwood.cli.loading import open_candidates
from redwood.drafters.base import NgramDrafter
from redwood.drafters.context import Context
from redwood.drafters.proposing import proposals, with_forced
from redwood.models.tokenizer import eos_ids, load_tokenizer
from redwood.sampling import History, SamplingParams
from redwood.server.grammar import Grammars
from redwood.server.schema import ResponseFormat

KINDS = {"schema": SCHEMAS, "tools": TOOL_TASKS}


def processor(grammars: Grammars, task: Task, prompt_length: int) -> Any:
    wanted = {"type": "json_schema", "json_schema": {"name": task.name, "schema": task.schema}}
    grammar = grammars.compile(ResponseFormat.model_validate(wanted))
    return grammars.processor(grammar, prompt_length)


def record(target: str, path: Path, max_tokens: int, threads: int) -> None:
    engine, _ = open_candidates(target, [], [], threads=threads)
    grammars = Grammars(engine.tokenizer, engine.target.vocab_size, engine.eos_ids)
    made: dict[str, Any] = {"vocab_size": engine.target.vocab_size}
    for kind, tasks in KINDS.items():
        made[kind] = []
        for task in tasks:
            prompt = engine.encode([{"role": "user", "content": task.prompt}])
            params = SamplingParams(
                max_tokens=max_tokens,
                temperature=0.0,
                logits_processor=processor(grammars, task, len(prompt)),
                speculate=False,
            )
            answer = run(engine, PLAIN, prompt, params).token_ids
            made[kind].append({"prompt": list(prompt), "answer": answer})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made))


def replayed(
    grammars: Grammars, said: Sequence[tuple[Task, Any]], size: int, budget: int, *, grammar: bool
) -> float:
    """Returns tokens per pass."""
    drafter, tokens, passes = NgramDrafter(), 0, 0
    for key, (task, each) in enumerate(said):
        prompt, answer = each["prompt"], each["answer"]
        constraint = processor(grammars, task, len(prompt)) if grammar else None
        params = SamplingParams(temperature=0.0, logits_processor=constraint)
        context = Context(key, [*prompt, *answer[:1]], params, History(prompt), size)
        replay = Replay(context, answer[1:])
        while replay.rest:
            (tree,) = proposals(drafter, [context], [budget])
            replay.follow(with_forced(context, tree, budget))
        drafter.release(key)
        tokens, passes = tokens + replay.tokens, passes + replay.steps
    return tokens / passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="smollm2-135m-instruct")
    parser.add_argument("--record", action="store_true", help="answer the prompts first")
    parser.add_argument("--budget", type=int, nargs="+", default=[6, 16], help="nodes of a step")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    path = record_path(f"grammar_{options.target}")
    if options.record:
        record(options.target, path, options.max_tokens, options.threads)
    if not path.exists():
        raise SystemExit("there are no answers: make them with --record")
    known = json.loads(path.read_text())
    folder = described(options.target)
    tokenizer = load_tokenizer(folder)
    size = int(known["vocab_size"])
    grammars = Grammars(tokenizer, size, eos_ids(folder, tokenizer))
    for kind, tasks in KINDS.items():
        said = list(zip(tasks, known[kind], strict=True))
        for budget in options.budget:
            for name, part in (("all", said), ("0, 2, ..", said[::2]), ("1, 3, ..", said[1::2])):
                bare = replayed(grammars, part, size, budget, grammar=False)
                with_it = replayed(grammars, part, size, budget, grammar=True)
                print(
                    f"{kind}, {budget} nodes, prompts {name}: n-grams {bare:.3f}, "
                    f"and grammar {with_it:.3f}: {with_it / bare:.3f}",
                    flush=True,
                )


def described(target: str) -> Path:
    """The folder of a target's tokenizer."""
    from redwood.backends.load import open_model

    return open_model(target, backend="native", threads=1)[0]


if __name__ == "__main__":
    main()
