"""Values that follow a JSON schema, as the rules of a grammar, for forms whose values are no JSON.

A subset of JSON schema: what is not in it is refused, part by part, with the place where it stands.
What is made may allow less than the schema does (members come in its order, and no further ones),
and never more.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import Any, ClassVar, NamedTuple

from redwood.server.tools.kinds import (
    KEYWORDS,
    OF_NUMBERS,
    apart,
    kinds_of,
    listed_kinds,
    spoken_of,
)
from redwood.server.tools.rules import NothingFitsError, Rules, quoted
from redwood.server.tools.texts import counts

_UNKEPT = (
    "not if then else dependentRequired dependentSchemas dependencies propertyNames "
    "patternProperties unevaluatedProperties unevaluatedItems contains uniqueItems $dynamicRef "
    "$recursiveRef"
).split()
_KEPT_IF_FALSE = ("not", "uniqueItems", "unevaluatedProperties", "unevaluatedItems")
_COMBINING = ("$ref", "allOf", "anyOf", "oneOf")
_KNOWN = frozenset(
    [*(name for each in KEYWORDS.values() for name in each), *_COMBINING, *_UNKEPT]
    + ["type", "enum", "const"]
)
"""Keywords that say something about values."""
_WHOLE = "-?(?:0|[1-9][0-9]{0,17})"
_REAL = rf"{_WHOLE}(?:\.[0-9]{{1,17}})?(?:[eE][+-]?[0-9]{{1,2}})?"
_LIMIT = 10**15  # of numbers of which the schema bounds one side only
_MOST_ITEMS = 1000
_MOST_OPTIONAL, _MOST_WAYS = 200, 500
"""Members that may be left out, and choices: each of them is a way that the parser follows at once,
and it has 2000."""
_FREE_LEVELS = 4  # of values that a schema leaves free


Keyed = Callable[[str, str], str]
"""From a key, and where it stands, to its expression with what stands behind it."""


class Member(NamedTuple):
    """A member of an object."""

    key: str
    schema: Any
    needed: bool


class Members(NamedTuple):
    """What an object has: members in their order, or else any, each with a value of a schema.

    Args:
        listed: may be empty.
        others: of members that are not listed, False: there are none. Not used beside listed ones.
        least, most: how many others.
    """

    listed: list[Member]
    others: Any
    least: int
    most: int | None


class Literals(ABC):
    """How a form writes values.

    Attributes:
        constants: true, false and null.
        comma: what stands between members, and between items.

    Args:
        rules: to add to.
        root: the schema that references start from.
    """

    constants: ClassVar[Sequence[str]] = ("true", "false", "null")
    comma: ClassVar[str] = ","

    def __init__(self, rules: Rules, root: Mapping[str, Any]) -> None:
        self.rules, self._root = rules, root
        self._targets: dict[str, str | NothingFitsError | None] = {}

    @abstractmethod
    def string(self, schema: Mapping[str, Any], where: str) -> str:
        """Returns the expression of a string with these bounds; raises ArgumentError."""

    @abstractmethod
    def text(self, value: str, where: str) -> str:
        """Returns the expression of one string; raises ArgumentError."""

    @abstractmethod
    def key(self, key: str | None, where: str) -> str:
        """Returns the expression of a key with what stands behind it; None: of any key."""

    def value(self, schema: Any, where: str) -> str:
        """Returns the expression of a value of this schema.

        Raises:
            ArgumentError: a part of it cannot be kept.
            NothingFitsError: no value fits it.
        """
        if schema is True:
            return self._free(_FREE_LEVELS)
        if schema is False:
            raise self.rules.unfitting(where)
        if not isinstance(schema, dict):
            raise self.rules.refused(where, f"schema {schema!r}")
        self._check(schema, where)
        if "$ref" in schema:
            return self._referred(schema, where)
        for name in ("allOf", "anyOf", "oneOf"):
            if name in schema:
                return self._combined(name, schema, where)
        if "const" in schema or "enum" in schema:
            return self._chosen(schema, where)
        kinds = schema.get("type", spoken_of(schema))
        if kinds is None:
            return self._free(_FREE_LEVELS)
        if kinds == []:
            raise self.rules.refused(where, "type []")
        return self._some(lambda kind: self._typed(kind, schema, where), listed_kinds(kinds), where)

    def members(self, schema: Mapping[str, Any], where: str) -> Members:
        """Returns the members of an object of this schema; raises as `value`."""
        schema = self._resolved(schema, where)
        self._check(schema, where)
        for name in (*_COMBINING, "const", "enum"):
            if name in schema:
                raise self.rules.refused(where, name)
        properties, needed = schema.get("properties", {}), schema.get("required", [])
        others = schema.get("additionalProperties", schema.get("unevaluatedProperties", True))
        if not isinstance(properties, dict) or not isinstance(needed, list):
            raise self.rules.refused(where, "properties")
        listed = [Member(key, each, key in needed) for key, each in properties.items()]
        for key in dict.fromkeys(map(str, needed)):
            if key not in properties:
                if others is False:
                    raise self.rules.unfitting(f"{where}.{key}")
                listed.append(Member(key, others, True))
        if sum(not member.needed for member in listed) > _MOST_OPTIONAL:
            raise self.rules.refused(where, f"more than {_MOST_OPTIONAL} optional properties")
        least, most = counts(schema, "Properties", _MOST_ITEMS, self.rules, where)
        sure = sum(member.needed for member in listed)
        if least > max(sure, 0 if listed or others is False else 1):
            raise self.rules.refused(where, f"minProperties {least}")
        if most is not None and listed and most < len(listed):
            raise self.rules.refused(where, f"maxProperties {most}")
        return Members(listed, others, least, most)

    def joined(self, members: Members, where: str, key: Keyed | None = None) -> str:
        """Returns the expression of members with commas between them, "" for none.

        Args:
            key: writes their keys, in place of `self.key`.
        """
        if not members.listed:
            return self._map(members, where)
        key = key or self.key
        pairs, needed = [], []
        for each in members.listed:
            place = f"{where}.{each.key}"
            with _left_out(not each.needed):
                pairs.append(f"{key(each.key, place)} {self.value(each.schema, place)}")
                needed.append(each.needed)
        made = self._first(pairs, needed) if pairs else ""
        return made if any(needed) or not made else f"({made})?"

    def _first(self, pairs: Sequence[str], needed: Sequence[bool]) -> str:
        """One pair or more, the first without a comma before it. Halves, since a parser of rules
        that stand in each other one by one would need a stack as deep."""
        if len(pairs) == 1:
            return pairs[0]
        half = len(pairs) // 2
        left = (
            f"{self._first(pairs[:half], needed[:half])} {self._more(pairs[half:], needed[half:])}"
        )
        if any(needed[:half]):
            return self.rules.add(left)
        return self.rules.add(f"{left} | {self._first(pairs[half:], needed[half:])}")

    def _more(self, pairs: Sequence[str], needed: Sequence[bool]) -> str:
        """Pairs with commas before them, those that are not needed or not."""
        if len(pairs) == 1:
            pair = f"{quoted(self.comma)} {pairs[0]}"
            return pair if needed[0] else f"({pair})?"
        half = len(pairs) // 2
        left = self._more(pairs[:half], needed[:half])
        return self.rules.add(f"{left} {self._more(pairs[half:], needed[half:])}")

    def _check(self, schema: Mapping[str, Any], where: str) -> None:
        for name in _UNKEPT:
            if name in schema and (schema[name] is not False or name not in _KEPT_IF_FALSE):
                raise self.rules.refused(where, name)

    def _resolved(self, schema: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """The schema that a root's reference names."""
        for _ in range(8):
            if "$ref" not in schema:
                return schema
            target = self._target(schema, where)
            if not isinstance(target, dict):
                break
            schema = target
        raise self.rules.refused(where, "$ref")

    def _target(self, schema: Mapping[str, Any], where: str) -> Any:
        ref = schema["$ref"]
        beside = [name for name in schema if name in _KNOWN and name != "$ref"]
        if beside or not isinstance(ref, str) or not ref.startswith("#"):
            raise self.rules.refused(where, f"$ref {ref!r}")
        at: Any = self._root
        for step in ref[1:].split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if not isinstance(at, dict) or step not in at:
                raise self.rules.refused(where, f"$ref {ref!r}")
            at = at[step]
        return at

    def _referred(self, schema: Mapping[str, Any], where: str) -> str:
        ref = str(schema["$ref"])
        if ref not in self._targets:
            self._targets[ref] = None
            try:
                self._targets[ref] = self.rules.add(self.value(self._target(schema, where), where))
            except NothingFitsError as error:
                self._targets[ref] = error
        made = self._targets[ref]
        if made is None:
            raise self.rules.refused(where, f"recursive $ref {ref!r}")
        if isinstance(made, NothingFitsError):
            raise self.rules.unfitting(where)
        return made

    def _combined(self, name: str, schema: Mapping[str, Any], where: str) -> str:
        beside = [each for each in schema if each in _KNOWN and each != name]
        parts = schema[name]
        if beside or not isinstance(parts, list) or not parts:
            raise self.rules.refused(where, f"{name} with {beside[0]}" if beside else name)
        if name == "allOf" and len(parts) > 1:
            raise self.rules.refused(where, name)
        if name == "oneOf" and not apart(parts):
            raise self.rules.refused(where, "oneOf of values that are not of different types")
        return self._some(lambda part: self.value(part, where), parts, where)

    def _chosen(self, schema: Mapping[str, Any], where: str) -> str:
        beside = [name for name in schema if name in _KNOWN and name not in ("const", "enum")]
        wanted = [name for name in beside if name != "type"]
        choices = [schema["const"]] if "const" in schema else schema["enum"]
        if wanted or ("const" in schema and "enum" in schema) or not isinstance(choices, list):
            raise self.rules.refused(where, f"enum with {wanted[0]}" if wanted else "enum")
        kinds = listed_kinds(schema.get("type", list(KEYWORDS)))
        fitting = [each for each in choices if any(kind in kinds for kind in kinds_of(each))]
        if not fitting:
            raise self.rules.unfitting(where)
        return self._either([self.fixed(each, where) for each in fitting], where)

    def fixed(self, value: Any, where: str) -> str:
        """Returns the expression of one value; raises as `value`."""
        match value:
            case None | bool():
                return quoted(self.constants[2 if value is None else not value])
            case str():
                return self.text(value, where)
            case list():
                items = [self.fixed(each, where) for each in value]
                return " ".join([quoted("["), _with(quoted(self.comma), items), quoted("]")])
            case dict():
                pairs = [
                    f"{self.key(key, where)} {self.fixed(each, where)}"
                    for key, each in value.items()
                ]
                return " ".join([quoted("{"), _with(quoted(self.comma), pairs), quoted("}")])
        if not isfinite(value):
            raise self.rules.refused(where, f"the value {value}")
        return quoted(json.dumps(value))

    def _typed(self, kind: Any, schema: Mapping[str, Any], where: str) -> str:
        match kind:
            case "string":
                return self.string(schema, where)
            case "integer" | "number":
                return self._number(kind, schema, where)
            case "boolean":
                return f"({quoted(self.constants[0])} | {quoted(self.constants[1])})"
            case "null":
                return quoted(self.constants[2])
            case "array":
                return self._list(schema, where)
            case "object":
                made = self.joined(self.members(schema, where), where)
                return self.rules.add(f'"{{" {made} "}}"')
        raise self.rules.refused(where, f"type {kind!r}")

    def _number(self, kind: str, schema: Mapping[str, Any], where: str) -> str:
        bounds = {name: schema[name] for name in OF_NUMBERS if name in schema}
        if not bounds:
            pattern = _WHOLE if kind == "integer" else _REAL
            return self.rules.add(f"/{pattern}/", kind="terminal")
        low, high = bounds.get("minimum"), bounds.get("maximum")
        if low is None and "exclusiveMinimum" not in bounds:
            bounds["minimum"] = -_LIMIT
        if high is None and "exclusiveMaximum" not in bounds:
            bounds["maximum"] = _LIMIT
        return self.rules.add_json({"type": kind, **bounds}, where)

    def _list(self, schema: Mapping[str, Any], where: str) -> str:
        least, most = counts(schema, "Items", _MOST_ITEMS, self.rules, where)
        heads = schema.get("prefixItems")
        if heads is not None:
            count = len(heads) if isinstance(heads, list) else -1
            if not least <= count <= (count if most is None else most):
                raise self.rules.refused(where, "prefixItems")
            items = list[str]()
            for place, each in enumerate(heads):
                with _left_out(place >= least):
                    items.append(self.value(each, f"{where}[]"))
                if len(items) == place:
                    break
            return self.rules.add(f'"[" {_with(quoted(self.comma), items)} "]"')
        items = schema.get("items", schema.get("unevaluatedItems", True))
        if most == 0:
            return quoted("[]")
        made = ""
        with _left_out(not least):
            item = self.rules.add(self.value(items, f"{where}[]"))
            made = self._repeated(item, least, most)
        return self.rules.add(f'"[" {made} "]"')

    def _repeated(self, item: str, least: int, most: int | None) -> str:
        """Items with commas between them."""
        last = "" if most is None else str(most - 1)
        more = f"({quoted(self.comma)} {item}){{{max(0, least - 1)},{last}}}"
        if last == "0":
            more = ""
        return f"{item} {more}" if least else f"({item} {more})?"

    def _map(self, members: Members, where: str) -> str:
        """Members with any keys."""
        if members.others is False or members.most == 0:
            return ""
        made = ""
        with _left_out(not members.least):
            value = self.value(members.others, f"{where}.*")
            pair = self.rules.add(f"{self.key(None, where)} {value}")
            made = self._repeated(pair, members.least, members.most)
        return made

    def _free(self, levels: int) -> str:
        """Any value, with so many levels in it."""
        made = [self.string({}, ""), self._number("number", {}, ""), *map(quoted, self.constants)]
        if levels:
            inner = self._free(levels - 1)
            pair = self.rules.add(f"{self.key(None, '')} {inner}")
            made.append(f'"[" {self._repeated(inner, 0, None)} "]"')
            made.append(f'"{{" {self._repeated(pair, 0, None)} "}}"')
        return self.rules.add(" | ".join(made))

    def _some(self, make: Callable[[Any], str], parts: Sequence[Any], where: str) -> str:
        """A choice of what `make` returns for each part, without those that nothing fits."""
        made = list[str]()
        for part in parts:
            with _left_out(True):
                made.append(make(part))
        if not made:
            raise self.rules.unfitting(where)
        return self._either(made, where)

    def _either(self, made: Sequence[str], where: str) -> str:
        made = list(dict.fromkeys(made))
        if len(made) > _MOST_WAYS:
            raise self.rules.refused(where, f"a choice of more than {_MOST_WAYS}")
        return made[0] if len(made) == 1 else self.rules.add(" | ".join(made))


@contextmanager
def _left_out(may_be: bool) -> Iterator[None]:
    """Goes on behind a part that nothing fits, if there may be none."""
    try:
        yield
    except NothingFitsError:
        if not may_be:
            raise


def _with(comma: str, made: Sequence[str]) -> str:
    return f" {comma} ".join(made)
