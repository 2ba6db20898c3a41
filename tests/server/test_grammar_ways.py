"""Where few signs may come, each way is drafted with what it forces."""

from __future__ import annotations

import json
from typing import Any

import pytest

from conftest import tiny_tokenizer
from redwood.server.grammar import Grammars
from redwood.server.json_layout import Layout
from redwood.server.schema import ResponseFormat

PROMPT = [7, 8]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "good": {"type": "boolean"},
        "words": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1},
        "count": {"type": "integer"},
        "many": {"enum": [*"abcdefghijk"]},
    },
    "required": ["colour", "good", "words", "count", "many"],
    "additionalProperties": False,
}
VALUE = {"colour": "green", "good": False, "words": ["a", "b"], "count": 5, "many": "f"}
TEXTS = [json.dumps(VALUE), json.dumps(VALUE, indent=2), json.dumps(VALUE, separators=(",", ":"))]


class Ahead:
    """A grammar, and what it expects behind texts."""

    def __init__(self) -> None:
        self.tokenizer = tiny_tokenizer()
        grammars = Grammars(self.tokenizer, 300, [1])
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
        grammar = grammars.compile(ResponseFormat.model_validate(wanted))
        self.processor = grammars.processor(grammar, len(PROMPT))

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def texts(self, before: str, most: int = 40) -> list[str]:
        chains = self.processor.ahead([*PROMPT, *self.ids(before)], [], most)
        return [self.tokenizer.decode(chain.token_ids) for chain in chains]


@pytest.fixture(scope="module")
def ahead() -> Ahead:
    return Ahead()


def test_each_choice_is_followed_by_what_it_forces(ahead: Ahead) -> None:
    made = ahead.texts('{"colour": "')
    assert len(made) == 3
    for name in ("red", "green", "blue"):
        assert any(text.startswith(f'{name}", "good":') for text in made), made


def test_true_and_false_end_alike(ahead: Ahead) -> None:
    made = ahead.texts('{"colour": "red", "good": ')
    assert sorted(text.split(",")[0] for text in made) == ["false", "true"]
    assert all(', "words": ["' in text for text in made)


def test_a_list_goes_on_or_ends(ahead: Ahead) -> None:
    made = ahead.texts('{"colour": "red", "good": true, "words": ["a"')
    assert any(text.startswith(', "') for text in made), made
    assert any(text.startswith('], "count":') for text in made), made


def test_a_number_begins_with_any_digit(ahead: Ahead) -> None:
    made = ahead.texts('{"colour": "red", "good": true, "words": ["a"], "count": ')
    assert sorted(made) == [*"0123456789"]


def test_a_choice_of_many_is_left_to_others(ahead: Ahead) -> None:
    before = '{"colour": "red", "good": true, "words": ["a"], "count": 1, "many": "'
    assert len(ahead.texts(before)) <= 1


@pytest.mark.parametrize("text", TEXTS)
def test_every_way_is_allowed_and_none_changes_the_next(ahead: Ahead, text: str) -> None:
    ids = ahead.ids(text)
    for end in range(len(ids)):
        answer = [*PROMPT, *ids[:end]]
        first = ahead.processor.ahead(answer, [], 12)
        assert ahead.processor.ahead(answer, [], 12) == first
        for chain in first:
            assert 0 < len(chain.token_ids) == len(chain.chances) <= 12
            assert ahead.processor.accepts(answer, chain.token_ids) == len(chain.token_ids)
            assert all(0.0 <= chance <= 1.0 for chance in chain.chances)
        assert ahead.processor.accepts(answer, ids[end:]) == len(ids) - end


@pytest.mark.parametrize("text", ['{ "a": [ { "b": 1 } ] }', '{"a": [{"b": 1}]}'])
def test_what_closes_stands_as_what_it_closes(text: str) -> None:
    layout = Layout()
    for place, sign in enumerate(text):
        if sign in "[{}]" and place > 4:
            gap = text[:place].rstrip()
            fresh = Layout()
            fresh.read(gap.encode())
            space, _ = fresh.space_before(ord(sign))
            assert space.decode() == text[len(gap) : place], text[:place]
        layout.read(sign.encode())


def test_a_line_that_was_broken_has_the_indentation_of_its_depth() -> None:
    layout = Layout()
    layout.read(b'{\n  "a": 1,\n  "b": ["x"\n')
    space, known = layout.space_before(ord("]"))
    assert space == b"  " and not known
