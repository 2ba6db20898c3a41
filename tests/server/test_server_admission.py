"""The queue: bounds, turns between keys, rows given back."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from redwood.server.admission import Admission
from redwood.server.errors import ApiError


@dataclass(eq=False)
class Waiting:
    owner: str
    prompt: list[int] = field(default_factory=lambda: [1, 2, 3])


def queue(
    rows: int = 1, queue: int = 4, tokens: int = 100, per_owner: int = 4
) -> Admission[Waiting]:
    return Admission(rows, queue, tokens, per_owner)


def test_turns_go_round_between_keys() -> None:
    admission = queue(rows=10)
    admission.push([Waiting("a") for _ in range(4)])
    admission.push([Waiting("b")])
    admission.push([Waiting("c"), Waiting("c")])
    order = []
    while (choice := admission.pop()) is not None:
        order.append(choice.owner)
    assert order == ["a", "b", "c", "a", "c", "a", "a"]


def test_no_more_choices_run_than_there_are_rows() -> None:
    admission = queue(rows=2)
    admission.push([Waiting("a") for _ in range(4)])
    assert admission.pop() and admission.pop() and admission.pop() is None
    assert (admission.num_running, admission.num_waiting) == (2, 2)
    admission.done()
    assert admission.pop() is not None


def test_one_too_many_gets_429_with_retry_after_and_nothing_of_it_is_queued() -> None:
    admission = queue(rows=1, queue=2)
    admission.push([Waiting("a")])
    assert admission.pop() is not None
    admission.push([Waiting("a"), Waiting("a")])
    with pytest.raises(ApiError) as error:
        admission.push([Waiting("b")])
    assert error.value.status == 429 and int(error.value.headers["retry-after"]) >= 1
    assert error.value.code == "queue_full" and admission.num_waiting == 2
    with pytest.raises(ApiError):
        admission.enter("a")


def test_rows_that_are_free_are_no_queue() -> None:
    admission = queue(rows=3, queue=0)
    admission.push([Waiting("a") for _ in range(3)])
    with pytest.raises(ApiError):
        admission.push([Waiting("a")])


def test_a_request_of_several_choices_enters_whole_or_not_at_all() -> None:
    admission = queue(rows=1, queue=2)
    with pytest.raises(ApiError):
        admission.push([Waiting("a") for _ in range(4)])
    assert admission.num_waiting == 0
    admission.push([Waiting("a") for _ in range(3)])


def test_waiting_prompt_tokens_are_bounded() -> None:
    admission = queue(rows=1, tokens=5)
    admission.push([Waiting("a")])
    assert admission.pop() is not None
    admission.push([Waiting("a")])
    with pytest.raises(ApiError, match="3 prompt tokens") as error:
        admission.push([Waiting("a")])
    assert error.value.code == "queue_tokens_full"


def test_one_key_cannot_take_the_whole_queue() -> None:
    admission = queue(rows=1, queue=4, per_owner=2)
    admission.push([Waiting("b")])
    assert admission.pop() is not None
    admission.push([Waiting("a"), Waiting("a")])
    with pytest.raises(ApiError) as error:
        admission.push([Waiting("a")])
    assert error.value.code == "key_queue_full"
    admission.push([Waiting("b")])


def test_what_is_removed_is_not_popped_and_frees_its_place() -> None:
    admission = queue(rows=1, queue=1)
    gone, stays = Waiting("a"), Waiting("b")
    admission.push([gone, stays])
    admission.remove([gone])
    admission.remove([gone])  # again: no harm
    assert admission.num_waiting == 1
    assert admission.pop() is stays and admission.pop() is None


def test_requests_that_are_still_arriving_count_at_the_door() -> None:
    admission = queue(rows=1, queue=1)
    admission.enter("a")
    admission.enter("a")
    with pytest.raises(ApiError):
        admission.enter("a")
    admission.leave("a")
    admission.enter("a")


def test_a_key_that_floods_the_door_leaves_room_for_others() -> None:
    admission = queue(rows=1, queue=10, per_owner=2)
    for _ in range(3):  # one may find the row
        admission.enter("a")
    with pytest.raises(ApiError) as error:
        admission.enter("a")
    assert error.value.code == "key_queue_full"
    admission.enter("b")
    admission.leave("a")
    admission.enter("a")
