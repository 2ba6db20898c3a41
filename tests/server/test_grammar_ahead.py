"""What a grammar expects next: never outside of it, certain where it says so, by the layout."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import redwood
from conftest import tiny_tokenizer
from redwood.sampling.constraint import Constraint
from redwood.server.grammar import Grammars
from redwood.server.json_layout import Layout
from redwood.server.schema import ResponseFormat

VOCAB, EOS = 300, [1]
PROMPT = [7, 8]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "first_name": {"type": "string"},
        "age": {"type": "integer"},
        "colour": {"enum": ["red", "green"]},
        "tags": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
        "größe": {"type": "boolean"},
    },
    "required": ["first_name", "age", "colour", "tags", "größe"],
    "additionalProperties": False,
}
VALUE = {"first_name": "Bo", "age": 31, "colour": "red", "tags": [1.5, 2], "größe": True}
TEXTS = [
    json.dumps(VALUE, ensure_ascii=False, indent=2),
    json.dumps(VALUE, ensure_ascii=False),
    json.dumps(VALUE, ensure_ascii=False, separators=(",", ":")),
    json.dumps(VALUE, ensure_ascii=False, indent="\t"),
]


def wanted(schema: Any) -> ResponseFormat:
    given = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return ResponseFormat.model_validate(given)


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(tiny_tokenizer(), VOCAB, EOS)


def ids_of(text: str) -> list[int]:
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


def left(processor: Any, path: list[int]) -> list[int]:
    scores = processor(torch.tensor([[*PROMPT, *path]]), torch.zeros(1, VOCAB))
    return torch.nonzero(scores[0] > -torch.inf)[:, 0].tolist()


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_expected_is_allowed_and_what_is_certain_is_alone(
    grammars: Grammars, text: str
) -> None:
    grammar, path = grammars.compile(wanted(SCHEMA)), ids_of(text)
    used = grammars.processor(grammar, 2)
    assert isinstance(used, Constraint)
    sure = 0
    for end in range(len(path) + 1):
        for chain in used.ahead(PROMPT, path[:end], 12):
            assert len(chain.token_ids) == len(chain.chances) <= 12
            assert used.accepts([*PROMPT, *path[:end]], chain.token_ids) == len(chain.token_ids)
            at = list(path[:end])
            for token, chance in zip(*chain, strict=True):
                assert 0.0 <= chance <= 1.0
                if chance == 1.0:
                    sure += 1
                    assert left(grammars.processor(grammar, 2), at) == [token]
                at.append(token)
        assert left(used, path[:end]) == left(grammars.processor(grammar, 2), path[:end])
    assert sure > 10


def test_any_order_of_questions_gets_the_same_answers(grammars: Grammars) -> None:
    grammar, path = grammars.compile(wanted(SCHEMA)), ids_of(TEXTS[0])
    used, chance = grammars.processor(grammar, 2), random.Random(1)
    for _ in range(60):
        cut, end = sorted(chance.choices(range(len(path)), k=2))
        fresh = grammars.processor(grammar, 2)
        text, after = [*PROMPT, *path[:cut]], path[cut:end]
        assert used.ahead(text, after, 9) == fresh.ahead(text, after, 9)
        wrong = [*after, chance.randrange(VOCAB), chance.randrange(VOCAB)]
        assert used.accepts(text, wrong) == fresh.accepts(text, wrong)


@pytest.mark.parametrize("text", TEXTS)
def test_a_layout_once_seen_is_expected_again(grammars: Grammars, text: str) -> None:
    """Of an array of equal objects, all of the second but its values is drafted."""
    item = {"type": "object", "properties": {"name": {"const": "x"}, "size": {"const": 5}}}
    item |= {"required": ["name", "size"], "additionalProperties": False}
    schema = {"type": "array", "items": item, "minItems": 3, "maxItems": 3}
    style: dict[str, Any] = {
        TEXTS[0]: {"indent": 2},
        TEXTS[1]: {},
        TEXTS[2]: {"separators": (",", ":")},
        TEXTS[3]: {"indent": "\t"},
    }[text]
    whole = json.dumps([{"name": "x", "size": 5}] * 3, **style)
    path = ids_of(whole)
    processor, at, passes = grammars.processor(grammars.compile(wanted(schema)), 2), 0, 0
    start = len(ids_of(whole[: whole.index("}", whole.index("}") + 1) + 1]))  # of two objects
    at = start
    while at < len(path):
        chains = processor.ahead([*PROMPT, *path[:at]], [], 64)
        tokens = chains[0].token_ids if chains else []
        right = next(
            (i for i, t in enumerate(tokens) if path[at + i : at + i + 1] != [t]), len(tokens)
        )
        at, passes = at + right + 1, passes + 1
    assert passes <= 5 < len(path) - start


def test_the_end_of_a_text_is_expected(grammars: Grammars) -> None:
    processor = grammars.processor(grammars.compile(wanted(SCHEMA)), 2)
    for text in TEXTS:
        (chain,) = processor.ahead([*PROMPT, *ids_of(text)], [], 8)
        assert chain.token_ids == EOS and chain.chances == [1.0]
        assert processor.accepts(PROMPT, [*ids_of(text), *EOS]) == len(ids_of(text)) + 1
        assert processor.accepts(PROMPT, [*ids_of(text), *EOS, 5]) == len(ids_of(text)) + 1
        assert processor.ahead([*PROMPT, *ids_of(text), *EOS], [], 8) == []
    outside = ids_of("[")
    assert processor.accepts(PROMPT, outside) == 0
    assert processor.ahead(PROMPT, outside, 8) == []
    assert processor.accepts([*PROMPT, *outside, 5], [6, 7]) == 0


def test_a_regular_expression_and_a_lark_grammar_force_as_well(grammars: Grammars) -> None:
    from llguidance import LLMatcher

    for grammar in (
        LLMatcher.grammar_from_regex("(yes|no), thank you"),
        LLMatcher.grammar_from_lark('start: ("yes" | "no") ", thank you"'),
    ):
        processor = grammars.processor(grammar, 2)
        (chain,) = processor.ahead(PROMPT, ids_of("yes"), 30)
        said = tiny_tokenizer().decode(chain.token_ids)
        assert ", thank you".startswith(said) and len(said) > 5


@pytest.mark.parametrize("text", TEXTS)
def test_layouts(text: str) -> None:
    layout, cut = Layout(), text.index('"tags"')
    layout.read(text[:cut].encode())
    layout.read(b'"tags"')
    gap = text[text.index('"age"') + 5 : text.index("31")]
    space, known = layout.space_before(ord(":"))
    assert space.decode() + ":" == gap[: len(space) + 1] and known
    layout.read(space + b":")
    space, known = layout.space_before(ord("["))
    assert space.decode() == gap[gap.index(":") + 1 :]


@pytest.fixture(scope="module")
def engines() -> Iterator[list[redwood.Engine]]:
    yield [redwood.load("smollm2-135m-instruct", name) for name in ("none", "ngram", "auto")] + [
        redwood.load("smollm2-135m-instruct", name, budget=8) for name in ("none", "auto")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.7, "seed": 3}])
@pytest.mark.parametrize("schema", [SCHEMA, {"type": "object"}], ids=["schema", "object"])
def test_a_real_model_says_the_same_with_and_without(
    engines: list[redwood.Engine], sampling: dict[str, Any], schema: dict[str, Any]
) -> None:
    prompt = engines[0].encode([{"role": "user", "content": "Describe a person as JSON."}])
    made = []
    for engine in engines:
        grammars = Grammars(engine.tokenizer, engine.target.vocab_size, engine.eos_ids)
        grammar = grammars.compile(wanted(schema))
        for speculate in (False, True):
            output = engine.generate(
                prompt,
                max_tokens=80,
                logits_processor=grammars.processor(grammar, len(prompt)),
                speculate=speculate,
                **sampling,
            )
            made.append(output.token_ids)
            if speculate and schema is SCHEMA:
                assert output.stats.target_passes < len(output.token_ids)
    assert all(tokens == made[0] for tokens in made)
