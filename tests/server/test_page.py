"""The web page's chat in a real browser, before a server that plays a script."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from page_kit import Page, Reply, Script, answer, chunk, ending, step

_HTML = "<img src=x onerror='window.hacked=1'><b>&amp;</b>"


def test_an_answer_is_written_and_its_steps_are_drawn(page: Page, script: Script) -> None:
    script.answer = lambda body: answer([" one two", " three four", "\nfive"])
    page.ask("Count")
    assert page.text(".user .text") == "Count"
    assert page.text(".answer .text") == "one two three four\nfive"
    assert "6 tokens · 3 steps · 2.00 tokens per step · 100.0 tokens/s" in page.text(".foot")
    assert page.text("#step-title").startswith("Answer 1, step 3")
    assert len(page.all("#list [role=option]")) == 3
    assert [page.text(f"#tree .{kind} text") for kind in ("root", "accepted", "bonus")] == [
        "root",
        "↵f",
        "ive",
    ]
    assert len(page.all("#tree g.refused")) == 2
    assert page.text("#passage") == " one two three four\nfive"
    assert page.text("#per-step") == "2.00"
    assert page.text("#kept") == "33 %"
    assert page.text("#rate-now") == "100.0"
    assert "3 steps" in page.one("#chart svg").get_attribute("aria-label")
    assert page.text("#said").startswith("Answer complete")


def test_an_answer_says_how_much_of_its_prompt_was_read_and_kept(
    page: Page, script: Script
) -> None:
    for cached, words in ((0, "40 read, 0 kept"), (30, "10 read, 30 kept")):
        details = {"cached_tokens": cached}
        end = ending(2, prompt_tokens=40, prompt_tokens_details=details)
        script.answer = lambda body, end=end: Reply([chunk("Hello"), end, "data: [DONE]\n\n"])
        page.ask("Count")
        assert page.all(".foot span")[-1].text == f"2 tokens · prompt 40 tokens: {words}"


def test_a_request_carries_the_settings_and_the_conversation(page: Page, script: Script) -> None:
    page.click("#settings-button")
    for field, value in (
        ("#temperature", "0.7"),
        ("#top-p", "0.9"),
        ("#seed", "11"),
        ("#max-tokens", "33"),
        ("#system", "Be brief."),
        ("#key", "secret-key"),
    ):
        page.set(field, value)
    page.click("#speculate")
    page.ask("First")
    page.ask("Second")
    headers, body = script.requests[-1]
    assert headers["authorization"] == "Bearer secret-key"
    assert body == {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "First"},
            {"role": "assistant", "content": "Hello world"},
            {"role": "user", "content": "Second"},
        ],
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 33,
        "seed": 11,
        "stream": True,
        "stream_options": {"include_usage": True},
        "redwood": {"trace": True, "speculate": False},
    }
    stored = "return [localStorage.length, sessionStorage.length, document.cookie, location.search]"
    assert page.run(stored) == [0, 0, "", ""]
    page.click("#clear")
    page.ask("Third")
    assert [m["content"] for m in script.requests[-1][1]["messages"]] == ["Be brief.", "Third"]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("#temperature", "3", "Temperature must be a number from 0 to 2."),
        ("#top-p", "0", "Top-p must be a number above 0 and at most 1."),
        ("#max-tokens", "1.5", "Max tokens must be a whole number from 1 to 1000000."),
        ("#max-tokens", "", "Max tokens is empty."),
        ("#seed", "-1", "Seed must be a whole number of at least 0."),
    ],
)
def test_a_setting_out_of_range_is_named_and_nothing_is_sent(
    page: Page, script: Script, field: str, value: str, words: str
) -> None:
    page.set(field, value)
    page.one("#prompt").send_keys("Hi", "\ue007")
    assert page.text("#settings-error") == words
    assert page.run("return '#' + document.activeElement.id") == field
    assert page.one(field).get_attribute("aria-invalid") == "true"
    assert script.requests == [] and page.one("#prompt").get_property("value") == "Hi"


def test_markup_in_tokens_texts_names_and_errors_stays_text(page: Page, script: Script) -> None:
    parts = [
        chunk(_HTML, step(1, [_HTML, "</svg>"], "<script>window.hacked=1</script>")),
        f'data: {{"error": {{"message": "{_HTML}", "type": "x"}}}}\n\n',
    ]
    script.answer = lambda body: Reply(parts)
    page.ask(_HTML)
    page.click("#outline summary")
    page.until(lambda: "window.hacked" in page.text("#outline-body"))
    assert page.text(".answer .text") == _HTML.replace("&amp;", "&")  # as Markdown reads it
    page.button("Plain text")
    assert page.text(".answer .text") == _HTML and page.text(".user .text") == _HTML
    assert _HTML in page.text(".answer .error")
    assert page.run("return window.hacked === undefined")
    assert page.all("main img, main b, main script") == []


def test_an_error_in_the_middle_keeps_the_text_and_offers_another_try(
    page: Page, script: Script
) -> None:
    event = 'data: {"error": {"message": "the engine stopped", "type": "server_error"}}\n\n'
    script.answer = lambda body: Reply([chunk("Half", step(1, ["Ha"], "lf")), event])
    page.ask()
    assert page.text(".answer .text") == "Half"
    assert "in the middle of the answer. the engine stopped" in page.text(".answer .error")
    script.answer = lambda body: answer(["Whole"])
    page.button("Try again")
    page.until(lambda: page.text(".answer .text") == "Whole")
    page.ended()
    assert page.all(".answer .error") == []
    assert [m["content"] for m in script.requests[-1][1]["messages"]] == ["Hi"]


def test_a_lost_connection_is_said_and_the_text_stays(page: Page, script: Script) -> None:
    script.answer = lambda body: Reply([chunk("Some", step(1, ["So"], "me")), None])
    page.ask()
    assert page.text(".answer .text") == "Some"
    assert "connection was lost in the middle" in page.text(".answer .error")


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply.error(429, "full", Retry_After="4"), "The server is full: it answers others just"),
        (Reply.error(503, "loading"), "The server is not ready. Try again in a moment."),
        (Reply.error(500, "oh"), "The server failed (500). The server says: oh"),
        (Reply.error(400, "too many tokens"), "refused the request (400). The server says: too"),
        (Reply(["<html>"], 502), "The server failed (502)."),
    ],
)
def test_a_refusal_is_put_into_words(page: Page, script: Script, reply: Reply, words: str) -> None:
    script.answer = lambda body: reply
    page.ask()
    assert words in page.text(".answer .error")
    again = [b for b in page.all("button") if b.get_property("textContent") == "Try again"]
    assert bool(again) == (reply.status != 400)
    if reply.status == 429:
        assert "in 4 s" in page.text(".answer .error")
    script.answer = lambda body: answer(["Good"])
    page.ask("Next")  # an unanswered question is not sent along
    assert [m["content"] for m in script.requests[-1][1]["messages"]] == ["Next"]


def test_a_wrong_key_leads_to_the_field_for_it(page: Page, script: Script) -> None:
    def by_key(body: dict[str, Any]) -> Reply:
        good = script.requests[-1][0].get("authorization") == "Bearer right"
        return answer(["In"]) if good else Reply.error(401, "bad key")

    script.answer = by_key
    page.ask()
    assert "API key is missing or wrong" in page.text(".answer .error")
    assert page.run("return document.activeElement.id") == "key"
    page.one("#key").send_keys("right")
    page.button("Try again")
    page.until(lambda: page.text(".answer .text") == "In")


def test_the_state_of_the_server_is_shown_and_asked_for_again(
    browser: Any, address: str, script: Script
) -> None:
    ready = script.models
    script.models = lambda: Reply.error(503, "loading the model")
    page = Page(browser, address)
    assert "not ready" in page.text("#server") and "loading the model" in page.text("#server")
    script.models = ready
    page.until(lambda: page.text("#server").strip() == "tiny")
    script.models = lambda: Reply.error(401, "no key")
    page = Page(browser, address)
    assert "API key" in page.text("#server") and page.one("#key").is_displayed()
    browser.get("about:blank")


def test_the_model_is_chosen_where_there_are_several(
    browser: Any, address: str, script: Script
) -> None:
    options = {"template_options": ["reasoning_effort"]}
    listed = [{"id": "small"}, {"id": "org/<b>large</b>", "redwood": options}]
    script.models = lambda: Reply([json.dumps({"data": listed})])
    page = Page(browser, address)
    chooser = page.one("#model")
    assert chooser.is_displayed() and chooser.accessible_name == "Model"
    assert [e.text for e in page.all("#model option")] == ["small", "org/<b>large</b>"]
    page.ask("One")
    chooser.send_keys("org")  # by the keyboard, as any choice
    page.ask("Two")
    assert [body["model"] for _, body in script.requests] == ["small", "org/<b>large</b>"]
    assert [e.text for e in page.all(".answer > h3")] == ["small", "org/<b>large</b>"]
    said = [message["content"] for message in script.requests[1][1]["messages"]]
    assert said == ["One", "Hello world", "Two"]
    page.click("#settings-button")
    assert page.one("#reasoning-label").is_displayed()
    page.button("Compare with plain decoding")
    page.until(lambda: len(script.requests) == 3)
    page.ended()
    assert script.requests[2][1]["model"] == "org/<b>large</b>"
    page.set("#key", "another")  # the list is asked for again, and the choice stays
    page.until(lambda: page.all("#server.ready"))
    assert chooser.get_property("value") == "org/<b>large</b>"
    assert page.complaints() == []
    browser.get("about:blank")


def test_one_model_is_no_choice(page: Page) -> None:
    assert not page.one("#model").is_displayed() and "Model" not in page.text("#settings")
    page.ask()
    assert page.text(".answer > h3") == "Model"


def test_stop_ends_a_slow_answer_and_keeps_what_came(page: Page, script: Script) -> None:
    script.answer = lambda body: answer([" word"] * 200, pause=0.05)
    page.one("#prompt").send_keys("Go", "\ue007")
    page.until(lambda: page.text("#passage").count("word") >= 2)
    assert page.one("#stop").is_displayed() and not page.one("#send").is_displayed()
    assert page.run("return document.activeElement.id") == "prompt"
    page.one("#prompt").send_keys("\ue00c")  # Escape
    page.ended()
    assert page.text(".answer .text").count("word") >= 2
    assert "Stopped." in page.text(".answer")
    assert page.one("#send").is_displayed()
    assert page.run("return document.activeElement.id") == "prompt"


def test_a_step_that_cannot_be_read_does_not_cost_the_answer(page: Page, script: Script) -> None:
    good = step(1, ["a"], "b")
    parts = [chunk("ab", good), chunk("cd", {"step": 2, "nodes": []}), ending(4, "length")]
    script.answer = lambda body: Reply([*parts, "data: [DONE]\n\n"])
    page.ask()
    assert page.text(".answer .text") == "abcd"
    assert "1 step could not be read" in page.text(".foot")
    assert "cut at the token limit" in page.text(".foot")


def _compared(page: Page, script: Script, plain: list[str]) -> str:
    def by_way(body: dict[str, Any]) -> Reply:
        if body["redwood"]["speculate"]:
            return answer([" same", " text"], speed=50.0)
        return answer(plain, speed=20.0)

    script.answer = by_way
    page.ask()
    page.button("Compare with plain decoding")
    page.until(lambda: "Running" not in page.text(".verdict"))
    page.ended()
    asked = [body for _, body in script.requests]
    assert [body.pop("redwood")["speculate"] for body in asked] == [True, True, False]
    assert asked[0] == asked[1] == asked[2]
    return page.text(".verdict")


def test_equal_texts_are_called_equal_and_the_speeds_stand_side_by_side(
    page: Page, script: Script
) -> None:
    words = _compared(page, script, [" same", " text"])
    assert words == "The two texts are equal. Speculation was 2.50 times as fast."
    assert [e.text for e in page.all(".sides h4")] == ["With speculation", "Plain decoding"]
    assert [e.text for e in page.all(".sides strong")] == ["100.0 tokens/s", "40.0 tokens/s"]
    texts = [e.get_property("textContent") for e in page.all(".sides .text")]
    assert texts == [" same text", " same text"]
    page.until(lambda: page.text("#rate-plain") == "40.0 tokens/s · speculation 2.50×")
    assert len(page.all("#list [role=option]")) == 2  # the picture stays at the answer's steps


def test_texts_that_should_be_equal_and_are_not_are_shown(page: Page, script: Script) -> None:
    words = _compared(page, script, [" same", " tent"])
    assert "differ from character 9 on" in words
    assert [e.get_property("textContent") for e in page.all(".sides mark")] == ["xt", "nt"]


def test_free_sampling_is_not_expected_to_repeat_itself(page: Page, script: Script) -> None:
    page.set("#temperature", "1")
    words = _compared(page, script, [" other", " words"])
    assert "need not be equal" in words


def test_an_error_while_comparing_is_said_there(page: Page, script: Script) -> None:
    page.ask()
    script.answer = lambda body: Reply.error(429, "full", Retry_After="2")
    page.button("Compare with plain decoding")
    page.until(lambda: "nothing to compare" in page.text(".verdict"))
    assert "full" in page.text(".compare .error")
    page.ask("The chat goes on")


@pytest.mark.parametrize("run", [0, 1])
def test_a_comparison_can_be_stopped(page: Page, script: Script, run: int) -> None:
    page.ask()
    replies = [answer([" word"] * 100)] * run + [answer([" word"] * 100, pause=0.05)]
    script.answer = lambda body: replies.pop(0)
    page.button("Compare with plain decoding")
    page.until(lambda: "word" in page.all(".sides .text")[run].text)
    page.click("#stop")
    words = "equal as far as both came" if run else "nothing to compare"
    page.until(lambda: words in page.text(".verdict"))
    assert replies == []


def test_sending_while_an_answer_runs_does_nothing(page: Page, script: Script) -> None:
    script.answer = lambda body: answer([" slow"] * 10, pause=0.05)
    page.one("#prompt").send_keys("One", "\ue007")
    page.until(lambda: page.all("body.running"))
    page.one("#prompt").send_keys("Two", "\ue007")
    time.sleep(0.1)
    page.ended()
    assert len(script.requests) == 1
    assert page.one("#prompt").get_property("value") == "Two"


def test_a_server_that_shows_no_trees_still_answers(page: Page, script: Script) -> None:
    refusal = {"error": {"message": "no traces", "type": "x", "param": "redwood", "code": "y"}}

    def without(body: dict[str, Any]) -> Reply:
        if body["redwood"]["trace"]:
            return Reply([json.dumps(refusal)], 400)
        return Reply([chunk("Hello"), 0.2, chunk(" there"), ending(5), "data: [DONE]\n\n"])

    script.answer = without
    page.ask()
    assert page.text(".answer .text") == "Hello there" and page.all(".answer .error") == []
    assert page.text(".foot").startswith("5 tokens · ")
    assert "does not show its trees" in page.text("#tree")
    page.button("Compare with plain decoding")
    page.until(lambda: "texts are equal" in page.text(".verdict"))
    assert [body["redwood"]["trace"] for _, body in script.requests] == [True, False, False, False]
