"""The web page's trees, history, replay and looks in a real browser."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest

from page_kit import Page, Part, Reply, Script, answer, chunk, ending, random_step, step

_DOWN, _UP, _HOME, _END = "\ue015", "\ue013", "\ue011", "\ue010"
_COUNT_REDRAWS = """
    window.drawn = [];
    new MutationObserver(() => window.drawn.push(performance.now()))
        .observe(document.getElementById("tree"), {childList: true});
"""


def _title(page: Page) -> str:
    return page.text("#step-title")


def test_a_tree_of_64_nodes_is_drawn_whole_and_without_overlaps(page: Page, script: Script) -> None:
    trees = [random_step(i + 1, 64, chance=random.Random(i)) for i in range(5)]
    parts = [chunk(" w", tree) for tree in trees]
    script.answer = lambda body: Reply([*parts, ending(5), "data: [DONE]\n\n"])
    page.ask()
    for _ in trees:
        page.click("#back")
    for tree in trees:
        path = tree["accepted"]
        page.until(lambda tree=tree: f"step {tree['step']} " in _title(page))
        boxes = page.run(
            "return [...document.querySelectorAll('#tree g rect')].map(e => e.getBBox())"
            ".map(b => [b.x, b.y, b.width, b.height])"
        )
        assert len(boxes) == 65  # and the bonus token
        for i, (x, y, width, height) in enumerate(boxes):
            for x2, y2, width2, height2 in boxes[:i]:
                apart = x2 >= x + width or x >= x2 + width2 or y2 >= y + height or y >= y2 + height2
                assert apart
        assert len(page.all("#tree g.accepted")) == len(path) - 1
        tops = {boxes[node][1] for node in path} | {boxes[64][1]}
        assert len(tops) == 1  # the accepted path is one straight line
        page.click("#forward")


def test_a_thousand_steps_keep_500_and_at_most_20_pictures_a_second(
    page: Page, script: Script
) -> None:
    chance = random.Random(1)
    parts: list[Part] = []
    for number in range(1, 1001):
        parts.append(chunk(" w", random_step(number, 24, chance=chance)))
        if number % 25 == 0:
            parts.append(0.05)
    script.answer = lambda body: Reply([*parts, ending(1000), "data: [DONE]\n\n"])
    page.run(_COUNT_REDRAWS)
    page.ask()
    page.until(lambda: "step 1000 " in _title(page))
    rows = page.all("#list [role=option]")
    assert len(rows) == 500
    assert rows[0].get_property("textContent").startswith("step 501")
    drawn = page.run("return window.drawn")
    assert len(drawn) > 10
    assert min(b - a for a, b in zip(drawn, drawn[1:], strict=False)) > 45  # never above 20/s
    assert page.run("return document.querySelectorAll('*').length") < 15000


def test_history_goes_back_and_forward_by_button_key_and_pointer(
    page: Page, script: Script
) -> None:
    script.answer = lambda body: answer([f" w{i}" for i in range(1, 7)])
    page.ask()
    assert "step 6 " in _title(page)
    assert page.one("#forward").get_attribute("aria-disabled") == "true"
    page.click("#back")
    page.until(lambda: "step 5 " in _title(page))
    assert page.one("#live").get_attribute("aria-pressed") == "false"
    listed = page.one("#list")
    for keys, number in ((_UP, 4), (_HOME, 1), (_UP, 1), (_DOWN, 2), (_END, 6)):
        listed.send_keys(keys)
        page.until(lambda number=number: f"step {number} " in _title(page))
        active = listed.get_attribute("aria-activedescendant")
        assert page.one(f"#{active}").get_attribute("aria-selected") == "true"
        assert len(page.all("#list [aria-selected=true]")) == 1
    page.click("#list [role=option]:nth-child(3)")
    page.until(lambda: "step 3 " in _title(page))
    assert page.text("#passage") == " w1 w2 w3"
    page.ask("again")  # a new answer shows itself
    page.until(lambda: "Answer 2, step 6 " in _title(page))
    page.click("#first")
    page.until(lambda: "Answer 1, step 1 " in _title(page))
    page.click("#live")
    page.until(lambda: "Answer 2, step 6 " in _title(page))


def test_an_older_step_stays_in_view_while_the_answer_goes_on(page: Page, script: Script) -> None:
    script.answer = lambda body: answer([" word"] * 40, pause=0.03)
    page.one("#prompt").send_keys("Go", "\ue007")
    page.until(lambda: len(page.all("#list [role=option]")) > 4)
    page.click("#first")
    page.until(lambda: len(page.all("#list [role=option]")) > 15)
    assert "step 1 " in _title(page)
    page.ended()
    assert "step 1 " in _title(page)


def _record(path: Path, steps: list[dict[str, Any]], *more: str) -> str:
    path.write_text("\n".join([*(json.dumps(each) for each in steps), *more]), "utf-8")
    return str(path)


def test_a_recording_is_replayed_without_a_model(
    page: Page, script: Script, tmp_path: Path
) -> None:
    steps = [step(i, [f" w{i}"], ".", generated=2 * i) for i in range(1, 6)]
    page.one("#file").send_keys(_record(tmp_path / "run.jsonl", steps, "{damage"))
    page.until(lambda: "step 1 " in _title(page))
    assert page.text("#file-note") == (
        "run.jsonl: 5 steps. 1 line left out; line 6: it is not JSON."
    )
    page.set("#pace", "20")
    page.click("#play")
    page.until(lambda: "step 5 " in _title(page))
    page.until(lambda: page.text("#play") == "Play")
    assert page.text("#passage") == " w1. w2. w3. w4. w5."
    assert page.text("#rate-now") == "100.0"
    page.click("#play")  # from the beginning again
    page.click("#play")
    assert page.text("#play") == "Play" or page.until(lambda: page.text("#play") == "Play")
    assert script.requests == []


def test_a_file_without_steps_is_refused_and_the_steps_stay(
    page: Page, script: Script, tmp_path: Path
) -> None:
    page.ask()
    page.one("#file").send_keys(_record(tmp_path / "odd.jsonl", [], "[1, 2]"))
    page.until(lambda: "odd.jsonl has no steps." in page.text("#file-note"))
    assert "step 2 " in _title(page)


def test_the_tree_is_also_a_list(page: Page, script: Script) -> None:
    page.ask()
    page.click("#outline summary")
    page.until(lambda: page.all("#outline-body li"))
    words = [e.get_property("textContent") for e in page.all("#outline-body li")]
    assert words[0].startswith("root – root") and "bonus token" in words[0]
    assert sum(" – not accepted" in word for word in words[1:]) >= 2
    assert page.one("#tree svg").get_attribute("role") == "img"
    assert "1 accepted" in page.one("#tree svg").get_attribute("aria-label")


def test_every_control_has_a_name_and_can_be_reached_by_keyboard(
    page: Page, script: Script
) -> None:
    page.click("#settings-button")
    page.ask()
    nameless = page.run(
        "return [...document.querySelectorAll('button, input, select, textarea, a, [tabindex]')]"
        ".filter(e => !(e.getAttribute('aria-label') || e.getAttribute('aria-labelledby')"
        " || e.labels?.length || e.textContent.trim())).map(e => e.outerHTML)"
    )
    assert nameless == []
    ids = page.run("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    reached = set()
    for _ in range(60):
        page.press("\ue004")  # Tab
        reached.add(page.run("return document.activeElement.id"))
    shown = page.run(
        "return [...document.querySelectorAll('button[id], input, select, textarea, #list')]"
        ".filter(e => e.checkVisibility() && !e.disabled).map(e => e.id)"
    )
    assert set(shown) <= reached


def _media(page: Page, **features: str) -> None:
    listed = [{"name": name.replace("_", "-"), "value": v} for name, v in features.items()]
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": listed})


_COLOUR = """
const shown = document.body.appendChild(document.createElement("i"));
shown.style.color = `var(--${arguments[0]})`;
const colour = getComputedStyle(shown).color;
shown.remove();
return colour;
"""


def _contrast(page: Page, front: str, back: str) -> float:
    def light(color: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", color)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    a, b = sorted(light(page.run(_COLOUR, name)) for name in (front, back))
    return (b + 0.05) / (a + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("by", ["system", "page"])
def test_colours_are_readable_in_light_and_dark(page: Page, scheme: str, by: str) -> None:
    if by == "system":
        _media(page, prefers_color_scheme=scheme)
    else:
        _media(page, prefers_color_scheme="dark" if scheme == "light" else "light")
        page.set("#theme", scheme)
    ground = page.run("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(21, 23, 26)") == (scheme == "dark")
    pairs = [("ink", "ground"), ("ink", "card"), ("soft", "ground"), ("soft", "card")]
    pairs += [("soft", "well"), ("brand-ink", "brand"), ("wrong", "card"), ("bonus", "card")]
    pairs += [("wrong", "wrong-fill"), ("ink", "accepted-fill"), ("ink", "bonus-fill")]
    pairs += [("soft", "accepted-fill"), ("soft", "bonus-fill"), ("bonus", "accepted-fill")]
    for name in ("text", "datastore", "table", "prediction", "model", "grammar"):
        pairs += [(f"from-{name}", "card"), (f"from-{name}", "accepted-fill")]
    for front, back in pairs:
        assert _contrast(page, front, back) >= 4.5, (front, back)
    _media(page)


def test_nodes_say_by_letter_and_colour_what_drafted_them(page: Page, script: Script) -> None:
    tree = step(1, [" one", " two"], "!", extra=[(0, " other"), (1, " last")])
    names = [["text", "table"], ["model"], [], ["oracle"]]
    for node, sources in zip(tree["nodes"][1:], names, strict=True):
        node["sources"] = sources
    plain = step(2, [" three"], "?")
    parts = [chunk(" w", each) for each in (tree, plain)]
    script.answer = lambda body: Reply([*parts, ending(5), "data: [DONE]\n\n"])
    page.ask()
    page.until(lambda: "step 2 " in _title(page))
    assert page.all("#legend li.source") == page.all("#tree text.letter") == []
    page.click("#back")
    page.until(lambda: "step 1 " in _title(page))
    letters = [e.get_property("textContent") for e in page.all("#tree text.letter")]
    assert letters == ["T", "S", "M", "O"]
    legend = [e.get_property("textContent") for e in page.all("#legend li.source")]
    assert [each[0] for each in legend] == ["T", "S", "M", "O"] and "text itself" in legend[0]
    titles = [e.get_property("textContent") for e in page.all("#tree g title")]
    assert "accepted, from the text itself and what the model said before" in titles[1]
    assert "from" not in titles[3]
    fills = page.run(
        "return [...document.querySelectorAll('#tree path.source')]"
        ".map(e => getComputedStyle(e).fill)"
    )
    assert len(fills) == len(set(fills)) == 4
    inside = page.run(
        "return [...document.querySelectorAll('#tree g')].every(g => {"
        " const outer = g.querySelector('rect').getBBox();"
        " return [...g.querySelectorAll('text, path')].every(e => { const b = e.getBBox();"
        " return b.x >= outer.x - 1 && b.x + b.width <= outer.x + outer.width + 1; }); })"
    )
    assert inside
    overlap = page.run(
        "return [...document.querySelectorAll('#tree g')].some(g => {"
        " const at = [...g.querySelectorAll('text')].map(e => e.getBBox());"
        " return at.slice(1).some(b => b.x < at[0].x + at[0].width - 1); })"
    )
    assert not overlap
    page.run("document.getElementById('outline').open = true")
    page.until(lambda: "from a draft model" in page.text("#outline-body"))


def test_less_motion_means_one_picture_a_second(page: Page, script: Script) -> None:
    _media(page, prefers_reduced_motion="reduce")
    script.answer = lambda body: answer([" word"] * 40, pause=0.05)
    page.run(_COUNT_REDRAWS)
    page.ask()
    page.until(lambda: "step 40 " in _title(page))
    assert len(page.run("return window.drawn")) <= 5
    _media(page)


@pytest.mark.parametrize("width", [1440, 1000, 500])
def test_nothing_is_cut_off_at_any_width(page: Page, script: Script, width: int) -> None:
    page.browser.set_window_size(width, 900)
    script.answer = lambda body: answer(["a long answer of one step " * 4])
    page.click("#settings-button")
    page.ask("x" * 300)
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    cut = page.run(
        "return [...document.querySelectorAll('button, select, #facts dd')].filter(e =>"
        " e.checkVisibility() && e.scrollWidth > e.clientWidth + 1).map(e => e.outerHTML)"
    )
    assert cut == []


def test_the_page_follows_its_window(page: Page, script: Script) -> None:
    page.ask()
    before = page.one("#chart svg").get_attribute("width")
    page.browser.set_window_size(1100, 900)
    page.until(lambda: page.one("#chart svg").get_attribute("width") != before)
    time.sleep(0.1)
    chart = "const c = document.getElementById('chart');"
    assert page.run(f"{chart} return c.firstChild.clientWidth <= c.clientWidth")
