"""The web page's answers in a real browser: Markdown, reasoning, tool calls, a phone's width."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from page_kit import Page, Part, Reply, Script, answer, call, chunk, delta, ending

_DONE = "data: [DONE]\n\n"
_TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
_MARKDOWN = """# Title

Some *text* with `code`.

- one
- two

| a | b |
|---|--:|
| c | d |

```py
print("<b>")
```

[link](https://example.org/x) and **end**"""


def _plays(script: Script, *parts: Part) -> None:
    script.answer = lambda body: Reply([*parts, _DONE])


def _pieces(text: str, size: int) -> list[str]:
    return [chunk(text[at : at + size]) for at in range(0, len(text), size)]


def test_markdown_is_shown_as_what_it_means_and_as_it_came(page: Page, script: Script) -> None:
    _plays(script, *_pieces(_MARKDOWN, 7), ending(9))
    page.ask()
    seen = {"h4": "Title", "em": "text", "p code": "code", "li + li": "two", "td.right": "d"}
    seen |= {"pre": 'print("<b>")', "strong": "end", "a": "link"}
    for selector, text in seen.items():
        assert page.text(f".answer .text {selector}") == text
    link = page.one(".answer .text a")
    assert link.get_attribute("href") == "https://example.org/x"
    assert (link.get_attribute("target"), link.get_attribute("rel").split()[0]) == (
        "_blank",
        "noopener",
    )
    page.button("Plain text")
    assert page.text(".answer .text") == _MARKDOWN
    page.button("Plain text")
    assert page.text(".answer .text h4") == "Title"
    page.ask("More")  # the conversation has the text as it came
    assert script.requests[-1][1]["messages"][1]["content"] == _MARKDOWN


def test_an_answer_that_grows_leaves_what_stands_in_place(page: Page, script: Script) -> None:
    rest = "\n\nSecond " + "word " * 30 + "\n\n```\n" + "line\n" * 30 + "```\n\nLast"
    parts: list[Part] = [chunk("First *one*"), 0.3]
    for piece in _pieces(rest, 6):
        parts += [piece, 0.02]
    _plays(script, *parts, ending(9))
    page.run(
        "window.gone = [];"
        "new MutationObserver((all) => all.forEach((m) => m.removedNodes.forEach((node) =>"
        " window.gone.push(`${node.nodeName} of ${m.target.nodeName}`))))"
        ".observe(document.getElementById('log'), {childList: true, subtree: true})"
    )
    page.one("#prompt").send_keys("Go", "\ue007")
    page.until(lambda: page.all(".answer .text em"))
    page.run("window.first = document.querySelector('.answer .text p')")
    page.until(lambda: page.all(".answer .text pre"))
    page.run("window.block = document.querySelector('.answer .text pre code').firstChild")
    page.ended()
    assert page.text(".answer .text > p:last-child") == "Last"
    assert page.run("return window.first.isConnected && window.block.isConnected")
    # Marks that were text before they were whole ("*one", "``") may change; nothing else goes.
    assert len(page.run("return window.gone")) <= 4


_HOSTILE = [
    "<script>window.hacked=1</script>",
    "<img src=x onerror='window.hacked=1'><svg onload='window.hacked=1'></svg>",
    "<iframe srcdoc='<script>parent.hacked=1</script>'></iframe><style>body{display:none}</style>",
    "[a](javascript:window.hacked=1) [b](JAVASCRIPT&colon;window.hacked=1) <javascript:hacked=1>",
    "[c](data:text/html,x) [d](/v1/models) [e](//other.example/x) ![f](//other.example/y.png)",
    "![g](https://other.example/z.png 'onerror=window.hacked=1') ![h](static/icon.svg)",
    "```html onclick=window.hacked=1\n<script>window.hacked=1</script>\n```",
    "<a href='javascript:window.hacked=1' autofocus onfocus='window.hacked=1'>i</a>",
    "<form action=/v1/models><input name=x><button>j</button></form><base href=//other.example/>",
]


def test_hostile_markdown_does_nothing(page: Page, script: Script) -> None:
    text = "\n\n".join(_HOSTILE)
    _plays(
        script,
        delta(reasoning_content=text),
        *_pieces(text, 11),
        call(0, json.dumps({"x": text}), name="<img src=x onerror='window.hacked=1'>"),
        delta(redwood={"malformed_calls": [{"reason": text, "text": ""}]}),
        ending(9, "tool_calls"),
    )
    page.ask(text)
    for link in page.all("#log a"):
        assert link.get_attribute("href").startswith("https://other.example/z.png")
    page.run("document.querySelectorAll('#log details').forEach((each) => { each.open = true; })")
    forbidden = "script, img, svg, iframe, style, form:not(.results), input, base, [onerror]"
    assert [e.get_property("outerHTML") for e in page.all(f"#log :is({forbidden})")] == []
    loaded = page.run("return performance.getEntriesByType('resource').map((each) => each.name)")
    assert all(name.startswith(page.browser.current_url) for name in loaded)
    assert page.run("return window.hacked === undefined")
    assert "<script>window.hacked=1</script>" in page.text(".answer .text")


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"{'  ' * i}* a\n" for i in range(310)),
        "- a\n" * 25_000,
        "|x" * 1000 + "\n" + "|-" * 1000 + "\n" + "|\n" * 40_000,
        "*a _b " * 800 + " c_ d*" * 800,
        "> " * 50_000,
        "[" * 99_999,
        "word " * 60_000,
    ],
    ids=["stairs", "items", "table", "emphasis", "quotes", "brackets", "long"],
)
def test_an_answer_made_to_take_long_does_not_hang_the_page(
    page: Page, script: Script, text: str
) -> None:
    _plays(script, *_pieces(text, 5000), ending(9))
    page.ask()
    page.button("Plain text")
    assert page.text(".answer .text") == text
    _plays(script, chunk("and on"), ending(2))
    page.ask()
    assert page.all(".answer .text")[-1].text == "and on"


def test_reasoning_is_a_part_that_folds(page: Page, script: Script) -> None:
    thoughts = "First *this*,\nthen that."
    seen = threading.Event()
    reasoning = [delta(reasoning_content=each) for each in (thoughts[:9], thoughts[9:])]
    _plays(script, *reasoning, seen, chunk("So."), ending(8))
    page.one("#prompt").send_keys("Why", "\ue007")
    page.until(lambda: page.text(".reasoning summary") == "Reasoning 4 words …")
    seen.set()
    page.ended()
    assert page.text(".reasoning summary") == "Reasoning 4 words"
    assert page.text(".answer .text") == "So."
    assert not page.one(".reasoning .plain").is_displayed()
    page.one(".reasoning summary").click()
    assert page.one(".reasoning .plain").is_displayed()
    assert page.text(".reasoning .plain") == thoughts  # as it came: no Markdown
    page.ask("And")
    said = script.requests[-1][1]["messages"][1]
    assert said == {"role": "assistant", "content": "So.", "reasoning_content": thoughts}


def test_an_answer_of_reasoning_alone_is_shown_and_not_built_upon(
    page: Page, script: Script
) -> None:
    _plays(script, delta(reasoning_content="Hm"), ending(1, "length"))
    page.ask("One")
    assert page.text(".reasoning summary") == "Reasoning 1 word"
    assert "cut at the token limit" in page.text(".foot")
    assert not page.one(".answer .text").is_displayed()
    page.ask("Two")
    assert [m["content"] for m in script.requests[-1][1]["messages"]] == ["Two"]


def _enter_tools(page: Page, choice: str = "auto") -> None:
    page.set("#tools", json.dumps(_TOOLS))
    page.set("#tool-choice", choice)


def test_a_tool_call_is_shown_and_its_result_goes_on(page: Page, script: Script) -> None:
    _enter_tools(page, "required")
    _plays(
        script,
        chunk("Let me see."),
        call(0, "", name="add"),
        call(0, '{"a":12345678901234567890,'),
        call(0, '"b":[1]}'),
        call(1, "{}", name="add"),
        ending(8, "tool_calls"),
    )
    page.ask("Add")
    assert (script.requests[-1][1]["tools"], script.requests[-1][1]["tool_choice"]) == (
        _TOOLS,
        "required",
    )
    assert [e.text for e in page.all(".call summary")] == ["Tool call add"] * 2
    assert page.text(".call pre") == (
        '{\n  "a": 12345678901234567890,\n  "b": [\n    1\n  ]\n}'  # no digit is lost
    )
    assert page.one(".call pre").is_displayed()
    page.one(".call summary").click()
    assert not page.one(".call pre").is_displayed()
    page.all(".results textarea")[0].send_keys("3")
    _plays(script, chunk("It is 3."), ending(4))
    page.button("Send results")
    page.until(lambda: "It is 3." in page.all(".answer")[-1].text)
    page.ended()
    body = script.requests[-1][1]
    arguments = '{"a":12345678901234567890,"b":[1]}'
    made = [{"name": "add", "arguments": each} for each in (arguments, "{}")]
    assert body["messages"][1:] == [
        {"role": "assistant", "content": "Let me see.", "tool_calls": [
            {"id": f"call-{i}", "type": "function", "function": each} for i, each in enumerate(made)
        ]},
        {"role": "tool", "tool_call_id": "call-0", "content": "3"},
        {"role": "tool", "tool_call_id": "call-1", "content": ""},
    ]  # fmt: skip
    assert body["tool_choice"] == "auto"  # a forced call would follow for ever
    assert page.all(".results") == []
    page.ask("Thanks")
    assert [m["role"] for m in script.requests[-1][1]["messages"]] == (
        ["user", "assistant", "tool", "tool", "assistant", "user"]
    )


def test_a_call_left_alone_gets_an_empty_result(page: Page, script: Script) -> None:
    _plays(script, call(0, "{}", name="add"), ending(8, "tool_calls"))
    page.ask("Add")
    page.ask("Never mind")
    assert script.requests[-1][1]["messages"][2:] == [
        {"role": "tool", "tool_call_id": "call-0", "content": "(no result)"},
        {"role": "user", "content": "Never mind"},
    ]
    assert len(page.all(".results")) == 1  # the last call's
    page.button("Send result")
    page.until(lambda: len(script.requests) == 3)
    page.ended()


def test_a_call_that_was_cut_or_could_not_be_read_is_said(page: Page, script: Script) -> None:
    malformed = [{"text": "<x>", "reason": "the tool 'sub' is not known"}]
    _plays(
        script,
        delta(content="<x>", redwood={"malformed_calls": malformed}),
        call(0, '{"a": 1', name="add"),
        ending(8, "length"),
    )
    page.ask("Add")
    assert page.text(".call summary") == "Tool call add cut off: not to be run"
    assert page.text(".call pre") == '{"a": 1' and page.all(".results") == []
    assert "could not be read: the tool 'sub' is not known" in page.text(".answer > .hint")
    page.ask("Go on")
    assert script.requests[-1][1]["messages"][1] == {"role": "assistant", "content": "<x>"}


@pytest.mark.parametrize("text", ["{", "{}", '[{"type": "web_search"}]'])
def test_tools_that_are_none_are_named_and_nothing_is_sent(
    page: Page, script: Script, text: str
) -> None:
    page.set("#tools", text)
    page.one("#prompt").send_keys("Hi", "\ue007")
    assert page.text("#settings-error").startswith("Tool")
    assert page.one("#tools").is_displayed()
    assert page.run("return document.activeElement.id") == "tools"
    assert script.requests == []


@pytest.mark.parametrize(
    ("options", "choices", "sent"),
    [
        ([], [], {}),
        (["preserve_thinking", "enable_thinking", "reasoning_effort"], ["on", "off"],
         {"chat_template_kwargs": {"enable_thinking": False}}),
        (["reasoning_effort"], ["low", "medium", "high"], {"reasoning_effort": "high"}),
    ],
)  # fmt: skip
def test_reasoning_is_offered_as_the_model_knows_it(
    browser: Any,
    address: str,
    script: Script,
    options: list[str],
    choices: list[str],
    sent: dict[str, Any],
) -> None:
    listed = {"data": [{"id": "tiny", "redwood": {"template_options": options}}]}
    script.models = lambda: Reply([json.dumps(listed)])
    page = Page(browser, address)
    page.click("#settings-button")
    assert page.one("#reasoning-label").is_displayed() == bool(options)
    found = [e.get_property("value") for e in page.all("#reasoning option")]
    assert found == ["", *choices]
    page.ask("One")
    if choices:
        page.set("#reasoning", choices[-1])
    page.ask("Two")
    first, second = (body for _, body in script.requests)
    for body in (first, second):
        body.pop("messages")
    assert second == {**first, **sent}
    browser.get("about:blank")


@pytest.fixture
def phone(page: Page) -> Iterator[Page]:
    page.phone()
    yield page
    page.no_phone()


_SIDEWAYS = "return [document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth]"
_REACHED = """
const box = document.getElementById("prompt").getBoundingClientRect();
const hit = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
return [hit?.id, box.bottom <= innerHeight, document.getElementById("send")
    .getBoundingClientRect().bottom <= innerHeight];
"""


def test_the_page_fits_a_phone(phone: Page, script: Script) -> None:
    def fits() -> None:
        wide = "return [...document.querySelectorAll('main *, header *')].filter((each) =>"
        wide += " each.getBoundingClientRect().right > 361 && !each.closest('#log, #tree, #list'))"
        found = phone.run(f"{wide}.map((each) => each.id || each.className || each.textContent)")
        assert found == []
        assert phone.run(_SIDEWAYS) == [360, 360, 360]

    fits()
    assert phone.run(_REACHED) == ["prompt", True, True]
    phone.click("#settings-button")
    phone.run("document.getElementById('tools-part').open = true")
    fits()
    _enter_tools(phone)
    phone.click("#settings-button")
    wide = "|" + "a long heading|" * 9 + "\n|" + "-|" * 9 + "\n|" + "cell|" * 9
    code = "```\n" + "a_long_line " * 30 + "\n```"
    _plays(
        script,
        delta(reasoning_content="w" * 300),
        chunk(f"{'x' * 300}\n\n{wide}\n\n{code}\n\n[{'y' * 90}](https://a.b/{'z' * 200})"),
        call(0, json.dumps({"a": "v" * 300}), name="n" * 120),
        ending(9, "tool_calls", prompt_tokens=90, prompt_tokens_details={"cached_tokens": 60}),
    )
    phone.ask("q" * 200)
    phone.run("document.querySelectorAll('#log details').forEach((each) => { each.open = true; })")
    fits()
    phone.run("scrollTo(0, 0)")
    assert phone.run(_REACHED) == ["prompt", True, True]
    assert phone.run("return document.querySelector('.wide-box').scrollWidth > 360")
    log = "const log = document.getElementById('log'); return log.scrollWidth <= log.clientWidth"
    assert phone.run(log)
    script.answer = lambda body: answer([" same"] * 3, speed=1000.0)
    phone.button("Compare with plain decoding")
    phone.until(lambda: "tokens/s · speculation" in phone.text("#rate-plain"))
    phone.ended()
    fits()
