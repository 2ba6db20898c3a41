"""The web page's layout in a real browser: nothing lies over anything else, at any width."""

from __future__ import annotations

import pytest

from page_kit import Page, Script, answer

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


def test_the_check_sees_what_lies_over_something(page: Page) -> None:
    page.run("document.getElementById('legend').style.transform = 'translateY(-2rem)'")
    assert _overlaps(page) != []
