"""Arguments that are no JSON, form by form, as the rules of a grammar.

What is made here, `qwen3_coder`, `leading` and `gemma` read, and it follows the tool's schema then.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from redwood.server.tools.kinds import check_width
from redwood.server.tools.literals import Literals
from redwood.server.tools.qwen3_coder import takes_text
from redwood.server.tools.rules import NothingFitsError, Rules, quoted
from redwood.server.tools.texts import counted, lengths, shaped

Schema = Mapping[str, Any]
_PYTHON_ESCAPES = r"\\[\\nrt'\"]"


def without(text: str) -> str:
    """A regular expression for all texts in which this one does not stand."""
    return rf"~/(?s:.*){_escaped(text)}(?s:.*)/"


def _escaped(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_ ]", lambda found: f"\\x{{{ord(found.group()):x}}}", text)


def _raw(rules: Rules, schema: Schema, where: str, closing: str) -> str:
    """The terms of a regular expression for a string as it stands, in which `closing` does not.
    Raises NothingFitsError."""
    least, most = lengths(schema, rules, where)
    shapes = "".join(f" & /{shape}/" for shape in shaped(schema, rules, where))
    text = f"/(?s:.){counted(least, most)}/ & {without(closing)}{shapes}"
    if not _holds(rules, text):
        raise rules.unfitting(where)
    return text


def _holds(rules: Rules, terminal: str) -> bool:
    """Whether some text fits a terminal."""
    return rules.fits(f"start: X\nX: {terminal}")


# Qwen3-Coder: each parameter between tags of its own.

_CLOSE = "</parameter>"


class _TaggedValues(Literals):
    """Values that are JSON, but for strings, which stand as they are up to the closing tag."""

    def string(self, schema: Schema, where: str) -> str:
        """As `Literals.string`; the closing tag belongs to it."""
        text = _raw(self.rules, schema, where, _CLOSE)
        term = self.rules.add(text, kind="terminal")
        # the line break before the tag may be left out, where the text has none there that counts
        unbroken = self.rules.add(rf"{term} & ~/(?s:.*)\n/", kind="terminal")
        whole = f'({term} "\\n" | {unbroken}) {quoted(_END[1:])}'
        return self.rules.add(self.rules.add(whole, kind="terminal"), kind="lazy")

    def text(self, value: str, where: str) -> str:
        """As `Literals.text`; likewise."""
        if _CLOSE in value:
            raise self.rules.refused(where, f"the value {value!r}")
        return quoted(value + _END)

    def key(self, key: str | None, where: str) -> str:
        """The tag of a parameter."""
        assert key is not None
        if ">" in key or key != key.strip():
            raise self.rules.refused(where, f"the name {key!r}")
        return quoted(f"<parameter={key}>\n")


_END = f"\n{_CLOSE}\n"
_SCALARS = ("integer", "number", "boolean", "null")
_REFERRED = ("#/$defs/", "#/definitions/")


def tagged_parameters(rules: Rules, name: str, schema: Schema) -> str:
    """Parameters between tags, in the order of the schema."""
    values = _TaggedValues(rules, schema)
    members = values.members(schema, name)
    made = []
    for member in members.listed:
        where = f"{name}.{member.key}"
        key = values.key(member.key, where)
        kind = member.schema.get("type") if isinstance(member.schema, dict) else None
        try:
            if takes_text(member.schema):
                value = values.value(member.schema, where)
            elif kind in _SCALARS and "enum" not in member.schema and "const" not in member.schema:
                value = f"{values.value(member.schema, where)} {quoted(_END)}"
            else:
                value = f"{_json(rules, member.schema, schema, where)} {quoted(_END)}"
        except NothingFitsError:
            if member.needed:
                raise
            continue
        pair = f"{key} {value}"
        made.append(pair if member.needed else f"({pair})?")
    if members.least > sum(member.needed for member in members.listed):
        raise rules.refused(name, f"minProperties {members.least}")
    return " ".join(made)


def _json(rules: Rules, schema: Any, root: Schema, where: str) -> str:
    """A value in JSON, with the definitions of the whole schema if it names one."""
    check_width(root, "tools")
    whole = schema if isinstance(schema, dict) else {"anyOf": [schema]}
    if '"$ref"' in json.dumps(schema):
        kept = {name: root[name] for name in ("$defs", "definitions") if name in root}
        whole = {**whole, **kept}
        if not all(ref.startswith(_REFERRED) for ref in _references(whole)):
            raise rules.refused(where, "$ref to another place than $defs")
    return rules.add_json(guided(whole), where)


def object_schema(schema: Schema) -> dict[str, Any]:
    """Returns a schema of parameters for a grammar; arguments are an object whether it says so or
    not. Raises ArgumentError where it is too wide."""
    check_width(schema, "tools")
    return guided({"type": "object", **schema})


def guided(schema: Schema) -> dict[str, Any]:
    """Returns a schema for a grammar, with the white space that JSON may have."""
    return {**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}}


WHITESPACE = r"( |\n[ \t]{0,24})?"
"""What may stand between the parts of JSON."""


def _references(value: Any) -> list[str]:
    if isinstance(value, dict):
        mine = [str(value["$ref"])] if "$ref" in value else []
        return mine + [ref for each in value.values() for ref in _references(each)]
    return [ref for each in value for ref in _references(each)] if isinstance(value, list) else []


# Llama's Python: NAME(key=literal, ...)


class _Python(Literals):
    """Literals of Python."""

    constants = ("True", "False", "None")
    comma = ", "

    def string(self, schema: Schema, where: str) -> str:
        """As `Literals.string`; in one of the two quotes."""
        least, most = lengths(schema, self.rules, where)
        shapes = shaped(schema, self.rules, where)
        made: list[str] = []
        for quote in ('"', "'"):
            if shapes:  # signs that stand for themselves only
                parts = [rf"/[^{quote}\\\x00-\x1f\x7f]{counted(least, most)}/"]
                inner = " & ".join([*parts, *(f"/{shape}/" for shape in shapes)])
                if not _holds(self.rules, inner):
                    continue
            else:
                sign = rf"(?:[^{quote}\\\x00-\x1f\x7f]|{_PYTHON_ESCAPES})"
                inner = f"/{sign}{counted(least, most)}/"
            term = self.rules.add(inner, kind="terminal")
            made.append(self.rules.add(f"{quoted(quote)} {term} {quoted(quote)}", kind="terminal"))
        if not made:
            raise self.rules.unfitting(where)
        return f"({' | '.join(made)})"

    def text(self, value: str, where: str) -> str:
        """As `Literals.text`."""
        return quoted(_python_text(value))

    def key(self, key: str | None, where: str) -> str:
        """The key of a dictionary."""
        if key is None:
            return f"{self.string({}, where)} {quoted(': ')}"
        return quoted(f"{_python_text(key)}: ")


def _python_text(value: str) -> str:
    """A string in Python, whose escapes are JSON's here."""
    return json.dumps(value, ensure_ascii=False)


def _is_argument(key: str) -> bool:
    try:
        call = ast.parse(f"f({key}=1)", mode="eval").body
        compile(f"f({key}=1)", "", "eval")
    except (SyntaxError, ValueError):
        return False
    return isinstance(call, ast.Call) and [each.arg for each in call.keywords] == [key]


def python_arguments(rules: Rules, name: str, schema: Schema) -> str:
    """Arguments of a call in Python."""
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name, re.ASCII) or not _is_name(name):
        raise rules.refused(name, "the name of the tool")
    values = _Python(rules, schema)
    members = values.members(schema, name)
    if not members.listed:
        if members.least:
            raise rules.refused(name, f"minProperties {members.least}")
        return ""

    def argument(key: str, where: str) -> str:
        if not _is_argument(key):
            raise rules.refused(where, f"the name {key!r}")
        return quoted(f"{key}=")

    return values.joined(members, name, argument)


def _is_name(name: str) -> bool:
    try:
        ast.parse(f"{name}()", mode="eval")
    except SyntaxError:
        return False
    return True


# Gemma: {key:value}, strings between marks.


class _Marked(Literals):
    """Values of Gemma's form.

    Attributes:
        mark: stands on both sides of a string.
    """

    mark: ClassVar[str]

    def string(self, schema: Schema, where: str) -> str:
        """As `Literals.string`; between marks."""
        text = _raw(self.rules, schema, where, self.mark)
        mark = self.rules.spelled(self.mark)
        if mark.startswith("<"):  # a token of its own, which no regular expression holds
            longer = f"({text}) & /(?s:.+)/"
            if not _holds(self.rules, longer):
                return f"{mark} {mark}"
            nonempty = self.rules.add(longer, kind="terminal")
            empty = _holds(self.rules, f"({text}) & //")
            return f"{mark} {f'({nonempty})?' if empty else nonempty} {mark}"
        term = self.rules.add(text, kind="terminal")
        return f"{mark} {self.rules.add(f'{term} {mark}', kind='lazy')}"

    def text(self, value: str, where: str) -> str:
        """As `Literals.text`."""
        if self.mark in value:
            raise self.rules.refused(where, f"the value {value!r}")
        mark = self.rules.spelled(self.mark)
        return f"{mark} {quoted(value)} {mark}" if value else f"{mark} {mark}"

    def key(self, key: str | None, where: str) -> str:
        """A key as it stands; between marks where it has other signs than letters."""
        if key is None:
            return f'{self.rules.add("/[A-Za-z_][A-Za-z0-9_]{0,63}/", kind="terminal")} ":"'
        if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key, re.ASCII):
            return quoted(f"{key}:")
        return f'{self.text(key, where)} ":"'


class _Gemma4(_Marked):
    mark = '<|"|>'


class _FunctionGemma(_Marked):
    mark = "<escape>"


def gemma4_arguments(rules: Rules, name: str, schema: Schema) -> str:
    """An object between braces."""
    return _braced(_Gemma4(rules, schema), name, schema)


def function_gemma_arguments(rules: Rules, name: str, schema: Schema) -> str:
    """Likewise, with other marks."""
    return _braced(_FunctionGemma(rules, schema), name, schema)


def _braced(values: _Marked, name: str, schema: Schema) -> str:
    made = values.joined(values.members(schema, name), name)
    return f'"{{" {made} "}}"'


# gpt-oss: the arguments are JSON; what may come before the call is not.

_HARMONY_TAGS = ("start", "channel", "constrain", "message", "end", "call", "return")


def harmony_reasoning(rules: Rules) -> str:
    """A message of reasoning, or none, up to where the next message has its channel."""
    spelled = rules.spelled
    tags = "|".join(_HARMONY_TAGS)
    text = rf"/(?s:.+)/ & ~/(?s:.*)<\|(?:{tags})\|>(?s:.*)/"
    said = f"({rules.add(text, kind='terminal')})?"
    before = f'{spelled("<|channel|>")} "analysis" {spelled("<|message|>")}'
    return f'({before} {said} {spelled("<|end|>")} {spelled("<|start|>")} "assistant")?'
