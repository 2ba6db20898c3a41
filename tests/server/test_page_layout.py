"""The web page's layout in a real browser: nothing lies over anything else, at any width."""

from __future__ import annotations

import json
from typing import Any

import pytest

from page_kit import Page, Reply, Script, answer

_BLOCKS = (
    "header > *, #chat > *, #chat .bar > *, #facts > div, .card, #steps h3, #steps button, "
    "#steps select, .file, #tree, #passage, #legend li, #outline summary, #outline-body, #chart, "
    ".columns, #list"
)
_OVERLAPS = """
    const seen = [...document.querySelectorAll(arguments[0])].filter(e => e.checkVisibility());
    const name = e => e.id || e.textContent.trim().slice(0, 40) || e.className;
    const found = [];
    seen.forEach((a, i) => seen.slice(i + 1).forEach(b => {
        if (a.contains(b) || b.contains(a)) return;
        const p = a.getBoundingClientRect(), q = b.getBoundingClientRect();
        const wide = Math.min(p.right, q.right) - Math.max(p.left, q.left);
        const high = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
        if (wide > 1 && high > 1) found.push(name(a) + " / " + name(b));
    }));
    return found;
"""
_SIZES = [(1920, 1080), (1440, 900), (1366, 768), (1280, 800), (1210, 700), (1100, 800)]
_SIZES += [(1024, 768), (910, 700), (800, 600), (500, 900), (400, 800)]
_LONG = "an-organisation/a-model-with-a-name-that-is-longer-than-any-field-of-this-page-instruct"


def _several(browser: Any, address: str, script: Script) -> Page:
    listed = {"data": [{"id": "tiny"}, {"id": _LONG}]}
    script.models = lambda: Reply([json.dumps(listed)])
    page = Page(browser, address)
    page.set("#model", _LONG)
    return page


def _overlaps(page: Page) -> list[str]:
    found: list[str] = page.browser.execute_script(_OVERLAPS, _BLOCKS)
    return found


@pytest.mark.parametrize(("width", "height"), _SIZES)
def test_no_two_blocks_overlap(page: Page, script: Script, width: int, height: int) -> None:
    page.browser.set_window_size(width, height)
    assert _overlaps(page) == []
    script.answer = lambda body: answer(["a long answer of one step " * 4] * 3)
    page.ask("Count to a hundred")
    assert _overlaps(page) == []
    page.click("#outline summary")
    page.until(lambda: page.all("#outline-body li"))
    assert _overlaps(page) == []
    page.click("#settings-button")
    assert _overlaps(page) == []


@pytest.mark.parametrize(("width", "height"), [(360, 640), (320, 568), (640, 360)])
def test_no_two_blocks_overlap_on_a_phone(
    page: Page, script: Script, width: int, height: int
) -> None:
    page.phone(width, height)
    script.answer = lambda body: answer(["# Title\n\n```\n" + "a long line " * 9 + "\n```"] * 3)
    try:
        page.ask("Count to a hundred")
        assert _overlaps(page) == []
        page.click("#settings-button")
        page.run("document.getElementById('tools-part').open = true")
        assert _overlaps(page) == []
        assert page.run("return document.documentElement.scrollWidth") == width
    finally:
        page.no_phone()


@pytest.mark.parametrize("size", [(1440, 900), (910, 700), (500, 900)])
def test_the_choice_of_a_model_lies_over_nothing(
    browser: Any, address: str, script: Script, size: tuple[int, int]
) -> None:
    browser.set_window_size(*size)
    page = _several(browser, address, script)
    assert page.one("#model").is_displayed() and _overlaps(page) == []
    page.click("#settings-button")
    assert _overlaps(page) == [] and page.complaints() == []
    browser.set_window_size(1440, 900)
    browser.get("about:blank")


@pytest.mark.parametrize("width", [360, 320])
def test_the_choice_of_a_model_fits_a_phone(
    browser: Any, address: str, script: Script, width: int
) -> None:
    page = _several(browser, address, script)
    page.phone(width)
    try:
        assert page.one("#model").is_displayed() and _overlaps(page) == []
        assert page.run("return document.documentElement.scrollWidth") == width
    finally:
        page.no_phone()
        browser.get("about:blank")


def test_the_check_sees_what_lies_over_something(page: Page) -> None:
    page.run("document.getElementById('legend').style.transform = 'translateY(-2rem)'")
    assert _overlaps(page) != []
