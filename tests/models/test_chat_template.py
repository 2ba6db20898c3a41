"""Chat templates of any kind: no text is lost, and what a template cannot do is told in a line."""

from __future__ import annotations

from typing import Any

import pytest

from conftest import tiny_tokenizer
from redwood.errors import ArgumentError
from redwood.models import chat_template
from redwood.models.chat_template import chat_text

SOUP = "How is <soup> made? 東京 & co."
PARTS = "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}"


def each(content: str) -> str:
    """A template that writes role and content of each message."""
    return "{% for m in messages %}[{{ m.role }}]" + content + "{% endfor %}"


def rendered(template: Any, *messages: tuple[str, str], prompt: bool = True) -> str:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    given = [{"role": role, "content": content} for role, content in messages]
    return chat_text(tokenizer, given, add_generation_prompt=prompt)


def refusal(template: Any, *messages: tuple[str, str]) -> str:
    with pytest.raises(ArgumentError) as caught:
        rendered(template, *(messages or [("user", SOUP)]))
    said = str(caught.value)
    assert "\n" not in said and len(said) < 500
    return said


@pytest.mark.parametrize(
    "content",
    [
        PARTS,
        "{{ m.content[0].text }}",
        "{{ m['content'][0]['text'] }}",
        "{{ m.content | map(attribute='text') | join }}",
        "{% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ c.text }}{% endfor %}",
        "{% if m.content is string %}{{ raise_exception('no') }}{% endif %}" + PARTS,
        "{{ m.content }}",
        "{% if m.content is string %}{{ m.content }}{% else %}" + PARTS + "{% endif %}",
        "{% if m.content is not string %}{{ raise_exception('no') }}{% endif %}{{ m.content }}",
    ],
)
def test_a_template_gets_content_in_the_form_it_takes(content: str) -> None:
    messages = [("system", "Be brief."), ("user", SOUP), ("assistant", "Boil."), ("user", "So?")]
    expected = "".join(f"[{role}]{text}" for role, text in messages)
    assert rendered(each(content), *messages) == expected


def test_a_template_may_want_another_form_for_each_role() -> None:
    content = "{% if m.role == 'system' %}{{ m.content }}{% else %}" + PARTS + "{% endif %}"
    assert rendered(each(content), ("system", "Be brief."), ("user", "Hi")) == (
        "[system]Be brief.[user]Hi"
    )
    added = "{% if m.role == 'user' %}{{ 'Q: ' + m.content }}{% else %}" + PARTS + "{% endif %}"
    assert rendered(each(added), ("user", "Hi"), ("assistant", "Ho"), ("user", "He")) == (
        "[user]Q: Hi[assistant]Ho[user]Q: He"
    )


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ("{{ m.content | trim }}", "Hello World"),
        ("{{ m.content | trim | join(' ') }}", "H e l l o   W o r l d"),
        ("{{ m.content | upper }}", "  HELLO WORLD "),
        ("{{ m.content | tojson }}", '"  Hello World "'),
        ("{{ m.content | replace('World', 'all') | escape }}", "  Hello all "),
        ("{{ m.content.split('</think>')[-1].lstrip() }}", "Hello World "),
        ("{{ m.content | truncate(9, True, '', 0) }}", "  Hello W"),
    ],
)
def test_a_template_that_changes_texts_a_little_is_not_refused(content: str, shown: str) -> None:
    assert rendered(each(content), ("user", "  Hello World ")) == f"[user]{shown}"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
        "{{ messages[-1].content }}",
        "{% for m in messages if m.role != 'system' %}" + PARTS + "{% endfor %}",
        "{% for m in messages %}{% if m.role == 'system' %}S{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}",
    ],
)
def test_a_template_that_leaves_a_message_out_is_refused_by_its_role(template: str) -> None:
    said = refusal(template, ("system", "Be brief."), ("user", "Hi"))
    assert "leaves out message 1 (role 'system')" in said
    assert rendered(template, ("user", "Hi")) == "Hi"
    assert rendered(template, ("system", " "), ("user", "Hi")) in ("Hi", "SHi")  # nothing is lost


@pytest.mark.parametrize("content", ["x", "{{ m.text }}", "{% break %}", "{{ m.content[0] }}"])
def test_a_template_that_never_shows_the_text_is_refused(content: str) -> None:
    assert "leaves out message 1 (role 'user')" in refusal(each(content))


def test_a_list_that_is_printed_as_code_does_not_count_as_shown() -> None:
    content = "{{ m.content if m.content is not string }}"
    assert "leaves out" in refusal(each(content))
    assert "leaves out" in refusal(each("{{ m.content | tojson if m.content is not string }}"))


def test_text_that_is_no_prompt_may_lack_a_message() -> None:
    template = "{% for m in messages if m.role != 'system' %}" + PARTS + "{% endfor %}"
    messages = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho")]
    assert rendered(template, *messages, prompt=False) == "HiHo"


def test_a_template_that_refuses_marks_is_judged_by_the_text_itself() -> None:
    known = "{% if m.content not in ('yes', 'no') %}{{ raise_exception('what?') }}{% endif %}"
    assert rendered(each(known + "{{ m.content }}"), ("user", "yes")) == "[user]yes"
    assert "what?" in refusal(each(known + "{{ m.content }}"))
    assert "leaves out" in refusal(each(known), ("user", "yes"))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "these messages: roles must alt"),
        ("{{ 'x' + 3 }}", "TypeError: can only concatenate"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ ''.join([1]) }}", "TypeError"),
        ("{{ [].pop() }}", "refuses"),
        ("{{ 'a'.index('b') }}", "ValueError: substring not found"),
        ("{{ {}['a'].b }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{% for m in messages %}{{ m.content }", "TemplateSyntaxError"),
        ("{% include 'x' %}", "TypeError"),
        ("{{ x | nosuch }}", "No filter named 'nosuch'"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "OverflowError"),
        ({"rag": "R", "tool_use": "T"}, "rag, tool_use and none called default"),
    ],
)
def test_whatever_a_template_raises_is_told_in_one_line(template: Any, reason: str) -> None:
    assert reason in refusal(template)


def test_of_several_templates_the_default_is_taken() -> None:
    templates = {"default": each(PARTS), "tool_use": "T"}
    assert rendered(templates, ("user", "Hi")) == "[user]Hi"


@pytest.mark.parametrize("body", ["x", "{% set y = i * j %}", "{{ f(i) }}"])
def test_a_template_without_end_is_ended(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_LIMIT_S", 0.2)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}"
    macro = "{% macro f(n) %}{% endmacro %}"
    template = f"{macro}{loops}{body}{{% endfor %}}{{% endfor %}}{each('{{ m.content }}')}"
    assert "does not come to an end" in refusal(template)


def test_a_template_that_writes_without_measure_is_refused() -> None:
    assert "without measure" in refusal("{{ messages[0].content * 2000000 }}")
    long = "{% for i in range(99999) %}{{ 'all work and no play' }}{% endfor %}"
    assert "without measure" in refusal(long + each("{{ m.content }}"))
    at_times = "{% if m.content == 'Hi' %}{{ 'x' * 20000000 }}{% endif %}{{ m.content }}"
    assert "without measure" in refusal(each(at_times), ("user", "Hi"))


def test_long_conversations_are_watched_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_LIMIT_S", 0.2)
    squared = "{% for a in m.content %}{% for b in m.content %}{% endfor %}{% endfor %}"
    template = each(squared + "{{ m.content }}")
    assert rendered(template, ("user", "Hi")) == "[user]Hi"
    assert "does not come to an end" in refusal(template, ("user", "a" * 50_000))


def test_the_form_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    template = each(PARTS + "{# once #}")
    rendered(template, ("user", "Hi"))
    monkeypatch.setattr(chat_template, "_find_form", None)
    assert rendered(template, ("user", "Ho")) == "[user]Ho"


def test_a_template_without_end_is_ended_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_LIMIT_S", 0.2)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    template = loops + each("{{ m.content }}") + "{# ended once #}"
    said = refusal(template)
    monkeypatch.setattr(chat_template, "_find_form", None)
    assert refusal(template) == said
