"""JSON schemas as masks: exact in any order of paths, an end where the grammar ends."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import redwood
from conftest import tiny_tokenizer
from redwood.errors import ArgumentError
from redwood.server.grammar import Grammars
from redwood.server.schema import ResponseFormat
from server_kit import Live, events

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"enum": [1, 12, 123]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
EOS = [1]
VOCAB = 300


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(tiny_tokenizer(), VOCAB, EOS)


def wanted(schema: Any) -> ResponseFormat:
    given = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return ResponseFormat.model_validate(given)


def allowed(processor: Any, path: list[int]) -> list[int]:
    """Tokens that may follow a path, after a prompt of two tokens."""
    scores = processor(torch.tensor([[7, 8, *path]]), torch.zeros(1, VOCAB))
    return torch.nonzero(scores[0] > -torch.inf)[:, 0].tolist()


def test_any_order_of_paths_gives_what_a_fresh_matcher_gives(grammars: Grammars) -> None:
    grammar = grammars.compile(wanted(PERSON))
    chance = random.Random(4)
    paths: list[list[int]] = [[]]
    while len(paths) < 120:  # grow a tree of valid paths
        path = chance.choice(paths)
        after = allowed(grammars.processor(grammar, 2), path)
        if after != EOS:
            paths.append([*path, chance.choice([t for t in after if t not in EOS])])
    used = grammars.processor(grammar, 2)
    for path in chance.choices(paths, k=400):
        assert allowed(used, path) == allowed(grammars.processor(grammar, 2), path)


def test_a_path_outside_the_grammar_changes_nothing_that_comes_later(grammars: Grammars) -> None:
    grammar = grammars.compile(wanted(PERSON))
    used = grammars.processor(grammar, 2)
    start = tiny_tokenizer()("{", add_special_tokens=False)["input_ids"]
    before = allowed(used, start)
    outside = next(t for t in range(VOCAB) if t not in before)
    assert len(allowed(used, [*start, outside, 5])) == VOCAB  # nobody can get there
    assert len(allowed(used, [*start, *EOS])) == VOCAB
    assert allowed(used, start) == before


def test_at_the_end_only_end_of_sequence_is_left(grammars: Grammars) -> None:
    grammar = grammars.compile(wanted(PERSON))
    text = '{"name":"Tom","age":12}'
    path = tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert allowed(grammars.processor(grammar, 2), path) == EOS


@pytest.mark.parametrize("width", [VOCAB - 9, VOCAB, VOCAB + 40])
def test_tokenizer_and_model_may_differ_in_width(width: int) -> None:
    grammars = Grammars(tiny_tokenizer(), width, EOS)
    processor = grammars.processor(grammars.compile(wanted(PERSON)), 2)
    for columns in (width - 5, width, width + 7):  # a drafter's rows may have yet another width
        scores = processor(torch.tensor([[7, 8]]), torch.zeros(1, columns))
        left = torch.nonzero(scores[0] > -torch.inf)[:, 0].tolist()
        assert scores.shape[1] == columns
        assert left == allowed(processor, [])
    path = tiny_tokenizer()('{"name":"Tom","age":12}', add_special_tokens=False)["input_ids"]
    ended = processor(torch.tensor([[7, 8, *path]]), torch.zeros(1, width))
    assert torch.nonzero(ended[0] > -torch.inf)[:, 0].tolist() == EOS


def test_ids_with_gaps_count_to_the_highest() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image>"])
    assert len(tokenizer) > 290
    Grammars(tokenizer, 290, EOS).compile(wanted(PERSON))


def test_an_end_that_the_model_cannot_say_is_no_end() -> None:
    with pytest.raises(ArgumentError, match="no token that ends a text"):
        Grammars(tiny_tokenizer(), VOCAB, [VOCAB])


def test_scores_that_are_allowed_stay_as_they_are(grammars: Grammars) -> None:
    processor = grammars.processor(grammars.compile(wanted(PERSON)), 0)
    scores = torch.randn(1, VOCAB)
    given = scores.clone()
    masked = processor(torch.zeros(1, 0, dtype=torch.int64), scores)
    kept = masked > -torch.inf
    assert torch.equal(scores, given) and torch.equal(masked[kept], scores[kept])
    assert 0 < int(kept.sum()) < VOCAB


def test_a_drafter_without_the_tokens_that_may_follow_gets_its_row_back(grammars: Grammars) -> None:
    processor = grammars.processor(grammars.compile(wanted({"const": 1})), 0)
    scores = torch.randn(1, 3)
    assert torch.equal(processor(torch.zeros(1, 0, dtype=torch.int64), scores), scores)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"$ref": "#/nowhere"},
        {"$ref": "https://example.com/x.json"},
        {"type": "string", "pattern": "("},
        {"type": "string", "pattern": "(?<=a)b"},
        {"enum": []},
        {"not": {"type": "string"}},
        {"format": "weird", "type": "string"},
        {"allOf": [{"type": "string"}, {"type": "integer"}]},
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused(grammars: Grammars, schema: Any) -> None:
    with pytest.raises(ArgumentError, match="response_format"):
        grammars.compile(wanted(schema))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "(a+)+b"},
        {"type": "string", "pattern": "(a{1,1000}){1,1000}"},
        {"type": "array", "minItems": 10**9, "items": {"type": "string"}},
        {"$ref": "#"},
        {"enum": list(range(5000))},
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(500)}},
    ],
)
def test_a_hostile_schema_costs_little(grammars: Grammars, schema: Any) -> None:
    start = time.process_time()
    try:
        allowed(grammars.processor(grammars.compile(wanted(schema)), 2), [])
    except redwood.RedwoodError:
        pass
    assert time.process_time() - start < 5.0


@pytest.fixture(scope="module", params=["none", "ngram", "model"])
def server(
    request: pytest.FixtureRequest, tiny_model_folder: Path, tiny_draft_folder: Path
) -> Iterator[Live]:
    drafter = str(tiny_draft_folder) if request.param == "model" else request.param
    live = Live(redwood.load(str(tiny_model_folder), drafter, backend="eager", budget=6))
    yield live
    live.stop()


def form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


def test_answers_are_json_of_the_schema_and_the_same_with_every_drafter(server: Live) -> None:
    texts = []
    for sampling in ({"temperature": 0}, {"temperature": 1.0, "seed": 2}):
        made = server.chat(max_tokens=120, response_format=form(PERSON), **sampling).json()
        value = json.loads(made["choices"][0]["message"]["content"])
        assert set(value) == {"name", "age"} and value["age"] in (1, 12, 123)
        assert made["choices"][0]["finish_reason"] == "stop"
        texts.append(made["choices"][0]["message"]["content"])
        plain = {"redwood": {"speculate": False}}
        again = server.text(max_tokens=120, response_format=form(PERSON), **sampling, **plain)
        assert again == texts[-1]


def test_streams_and_several_answers_keep_the_form_too(server: Live) -> None:
    shape = {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3}
    body = {"response_format": form(shape), "temperature": 1.0, "seed": 1, "n": 3}
    body["max_tokens"] = 150
    joined = ["", "", ""]
    for chunk in events(server.chat(**body, stream=True).text)[:-1]:
        choice = chunk["choices"][0]
        joined[choice["index"]] += choice["delta"].get("content", "")
    assert all(2 <= len(json.loads(text)) <= 3 for text in joined)
    server.alive_and_right()


def test_any_json_object_can_be_asked_for(server: Live) -> None:
    made = server.chat(
        response_format={"type": "json_object"}, logit_bias={"95": 6}, max_tokens=60
    ).json()["choices"][0]
    assert made["message"]["content"].startswith("{")
    if made["finish_reason"] == "stop":
        assert isinstance(json.loads(made["message"]["content"]), dict)


def test_a_wrong_schema_is_400_and_stops_nobody(live: Callable[..., Live]) -> None:
    server = live()
    for schema in ({"type": "nonsense"}, {"$ref": "http://127.0.0.1:9/x"}, {"enum": []}):
        error = server.error(server.chat(response_format=form(schema)), 400)
        assert error["param"] == "response_format"
    nested = b'{"messages":[],"response_format":' + b'{"a":' * 30_000 + b"1" + b"}" * 30_001
    headers = {"content-type": "application/json"}
    server.error(server.http.post("/v1/chat/completions", content=nested, headers=headers), 400)
    server.alive_and_right()
