"""Recorded answers, and drafters replayed over them without a model.

    python benchmarks/replay.py --name smollm2 --prompts FILE.jsonl --num 240 --max-tokens 128
    python benchmarks/replay.py --name smollm2_0.8 --temperature 0.8 --prompts FILE.jsonl

Records plain answers, several rows at once. A replay then takes the answer for
what the target says: the drafter proposes a tree, the tree is followed as far as the answer goes,
and one more token comes from the target. At temperature 0 this gives the tokens per step of real
decoding, but for near-ties. Records lie in the user's cache, are named and not committed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np

from redwood.backends.base import AcceptedPath, Backend, Nodes
from redwood.backends.load import open_model
from redwood.drafters.base import Drafter
from redwood.drafters.context import Context
from redwood.models._cache import cache_dir
from redwood.models.tokenizer import eos_ids, load_tokenizer
from redwood.sampling import History, SamplingParams, probs_from_scores
from redwood.sampling.noise import draw
from redwood.tree import TokenTree

_CHUNK = 512


@dataclass(frozen=True)
class Answer:
    """A prompt and what the target said: token ids; `kind` is the category of the prompt."""

    kind: str
    prompt: list[int]
    answer: list[int]


def record_path(name: str) -> Path:
    """Where the answers of this name lie."""
    return cache_dir() / "records" / f"answers_{name}.json"


def load_answers(name: str) -> list[Answer]:
    """Returns recorded answers."""
    path = record_path(name)
    if not path.exists():
        raise SystemExit(f"there are no answers {name}: make them with benchmarks/replay.py")
    return [Answer(**each) for each in json.loads(path.read_text())["answers"]]


@dataclass
class Replay:
    """One request while it is replayed: its text so far, and what is still to come."""

    context: Context
    rest: list[int]
    steps: int = 0
    tokens: int = 0
    nodes: int = 0

    def follow(self, tree: TokenTree) -> int:
        """Takes a step; returns the new tokens."""
        at = count = 0
        tokens, children = tree.token_list, tree.children
        for token in self.rest:
            count += 1
            at = next((child for child in children[at] if tokens[child] == token), -1)
            if at < 0:
                break
        self.context.token_ids += self.rest[:count]
        self.rest = self.rest[count:]
        self.steps += 1
        self.tokens += count
        self.nodes += len(tree)
        return count


GREEDY = SamplingParams(temperature=0.0)


def start(answer: Answer, key: int, vocab_size: int, params: SamplingParams = GREEDY) -> Replay:
    """Returns a replay whose first token, which the prefill gives, is there already."""
    text = [*answer.prompt, *answer.answer[:1]]
    context = Context(key, text, params, History(answer.prompt), vocab_size)
    return Replay(context, answer.answer[1:])


def replay_all(
    drafter: Drafter,
    answers: Sequence[Answer],
    budget: int,
    *,
    vocab_size: int = 1 << 20,
    params: SamplingParams = GREEDY,
) -> list[Replay]:
    """Replays answers one after another, each with trees of at most `budget` nodes.

    Args:
        params: of the requests; what a drafter draws by, the answers are what they are.
    """
    done = []
    for key, answer in enumerate(answers):
        replay = start(answer, key, vocab_size, params)
        while replay.rest:
            (tree,) = drafter.propose([replay.context], [budget])
            replay.follow(tree)
        drafter.release(key)
        done.append(replay)
    return done


def read_prompts(paths: Sequence[Path], num: int) -> list[tuple[str, str]]:
    """Returns (kind, first turn) of prompts, from all parts of all files alike."""
    found = []
    for path in paths:
        for line in path.read_text("utf-8").splitlines():
            data = json.loads(line)
            text = data["prompt"] if "prompt" in data else data["turns"][0]
            found.append((str(data.get("category", path.stem)), text))
    step = max(1, len(found) // num)
    return found[::step][:num]


def decode(
    backend: Backend,
    prompts: Sequence[list[int]],
    ends: Sequence[int],
    params: SamplingParams,
    rows: int,
) -> Iterator[tuple[int, list[int]]]:
    """Yields (index, answer) of plain decoding, `rows` at once."""
    rng = np.random.default_rng(params.seed)
    waiting, running = list(enumerate(prompts))[::-1], dict[int, tuple[int, list[int]]]()
    while waiting or running:
        while waiting and len(running) < rows:
            index, prompt = waiting.pop()
            row = backend.open()
            for begin in range(0, len(prompt) - 1, _CHUNK):
                chunk = prompt[begin : min(begin + _CHUNK, len(prompt) - 1)]
                backend.extend([Nodes(row, chunk, num_logits=1)])
                backend.commit([AcceptedPath(row, range(len(chunk)))])
            running[row] = index, prompt[-1:]
        logits = backend.extend([Nodes(row, text[-1:]) for row, (_, text) in running.items()])
        backend.commit([AcceptedPath(row, [0]) for row in running])
        for (row, (index, text)), scores in list(zip(running.items(), logits, strict=True)):
            if params.temperature == 0.0:
                text.append(int(scores[0].argmax()))
            else:
                law = probs_from_scores(scores[0], params).numpy()
                text.append(draw(law, float(rng.random())))
            if len(text) > params.max_tokens or text[-1] in ends:
                backend.release(row)
                del running[row]
                yield index, text[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True, help="of the record")
    parser.add_argument("--target", default="smollm2-135m-instruct")
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, help="JSONL files")
    parser.add_argument("--num", type=int, default=240)
    parser.add_argument("--high", type=int, default=700, help="longer prompts are left out")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=8, help="decoded at once")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    folder, backend = open_model(options.target, backend="native", threads=options.threads)
    tokenizer = load_tokenizer(folder)
    prompts: list[tuple[str, list[int]]] = []
    for kind, text in read_prompts(options.prompts, options.num):
        chat: Any = [{"role": "user", "content": text}]
        shown = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(shown, add_special_tokens=False)["input_ids"]
        if len(ids) <= options.high:
            prompts.append((kind, ids))
    started, made = time.time(), dict[int, Answer]()
    ends = eos_ids(folder, tokenizer)
    texts = [ids for _, ids in prompts]
    params = SamplingParams(
        max_tokens=options.max_tokens, temperature=options.temperature, seed=options.seed
    )
    for index, answer in decode(backend, texts, ends, params, options.rows):
        made[index] = Answer(*prompts[index], answer)
        print(f"{len(made)} of {len(prompts)}, {time.time() - started:.0f} s", flush=True)
    asked = {"temperature": options.temperature, "seed": options.seed}
    facts = common.setting(target=options.target, max_tokens=options.max_tokens, **asked)
    path = record_path(options.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    answers = [asdict(made[index]) for index in sorted(made)]
    path.write_text(json.dumps({"setting": facts, "answers": answers}))
    print(path, sum(len(answer["answer"]) for answer in answers), "tokens")


if __name__ == "__main__":
    main()
