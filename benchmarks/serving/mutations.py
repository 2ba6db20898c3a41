"""Requests that are nearly right, in every way that comes to mind."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

from raw import request
from running import Server

PATHS = ("/v1/chat/completions", "/v1/completions")
ROUTES = (*PATHS, "/v1/models", "/health", "/ready", "/metrics", "/version", "/openapi.json", "/")
METHODS = ("GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "CONNECT", "BREW", "post")
SAID = {"role": "user", "content": "Name a tree."}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
CHAT: Mapping[str, Any] = {
    "model": None,
    "messages": [{"role": "system", "content": "Be short."}, SAID],
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "repetition_penalty": 1.1,
    "logit_bias": {"17": -100, "30": 5.5},
    "seed": 3,
    "stop": ["\n\n", "zzz"],
    "n": 2,
    "max_tokens": 3,
    "stream": True,
    "stream_options": {"include_usage": True, "include_obfuscation": True},
    "logprobs": True,
    "top_logprobs": 3,
    "response_format": {"type": "text"},
    "prediction": {"type": "content", "content": "An oak."},
    "redwood": {"speculate": True, "trace": False},
    "user": "me",
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "t", "schema": SCHEMA}}
TEXTS = (
    "",
    " ",
    "\x00",
    "\ufeffx",
    "\u202eabc",
    "👩\u200d👩\u200d👧\u200d👦" * 20,
    "e\u0301" * 50,
    "\U0010ffff",
    "<|im_end|><|im_start|>system",
    "𝕏" * 300,
    "a" * 3000,
    "../../../etc/passwd",
    "{{ 7 * 7 }}{% for x in range(9) %}x{% endfor %}",
    "\r\nX-Evil: 1",
    "'; DROP TABLE rows; --",
)
NUMBERS = (0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**40, 0.0, -0.0, 1e-300, 1e300, 0.5, 2.0)
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [None], [[]], {"a": {}}, [1, "a", None])
RAW = ("NaN", "Infinity", "-Infinity", "1e999", "01", "1" * 5000, '"\\ud800"', "'x'", "undefined")
WORDS = (*CHAT, "tools", "suffix", "best_of", "echo", "prompt", "temprature", "", "__class__", "ä")


class Mutations:
    """Requests from a seed; always the same ones."""

    def __init__(self, server: Server, seed: int) -> None:
        self.server, self.rng = server, random.Random(seed)
        self.kinds: list[tuple[Callable[[], bytes], float]] = [
            (self.wrong_value, 40),
            (self.wrong_structure, 15),
            (self.cut_text, 10),
            (self.spoilt_bytes, 10),
            (self.raw_number, 8),
            (self.wrong_method, 5),
            (self.odd_headers, 5),
            (self.odd_path, 3),
            (self.nested, 2),
            (self.valid, 5),
        ]

    def next(self) -> tuple[str, bytes]:
        """Name and bytes of a request."""
        makers, weights = zip(*self.kinds, strict=True)
        make = self.rng.choices(makers, weights)[0]
        return make.__name__, make()

    def body(self) -> dict[str, Any]:
        """A body that is right, with some of the fields."""
        rng = self.rng
        kept = {name: value for name, value in CHAT.items() if rng.random() < 0.35}
        kept |= {"messages": CHAT["messages"], "max_tokens": 3}
        if "top_logprobs" in kept:
            kept["logprobs"] = True
        if rng.random() < 0.1:
            kept["response_format"] = FORMAT
        return json.loads(json.dumps(kept))

    def completion(self) -> dict[str, Any]:
        """A body for /v1/completions."""
        body = self.body()
        del body["messages"]
        body.pop("top_logprobs", None)
        prompts: list[Any] = ["Once", ["One", "two"], [1, 2, 3], [[4, 5], [6]]]
        body["prompt"] = self.rng.choice(prompts)
        if "logprobs" in body:
            body["logprobs"] = 2
        return body

    def some(self) -> tuple[str, dict[str, Any]]:
        """Path and right body."""
        path = self.rng.choice(PATHS)
        return path, self.body() if path == PATHS[0] else self.completion()

    def value(self) -> Any:
        """Any value."""
        return deepcopy(self.rng.choice(self.rng.choice([TEXTS, NUMBERS, OTHERS])))

    def post(self, path: str, body: Any, **headers: str) -> bytes:
        return request(self.server, path, body, **headers)

    def valid(self) -> bytes:
        return self.post(*self.some())

    def wrong_value(self) -> bytes:
        """Some values replaced, anywhere in the tree of a body."""
        path, body = self.some()
        for _ in range(self.rng.choice([1, 1, 1, 2, 4])):
            place: Any = body
            while True:
                keys = list(place) if isinstance(place, dict) else list(range(len(place)))
                if not keys:
                    break
                key = self.rng.choice(keys)
                if isinstance(place[key], dict | list) and self.rng.random() < 0.6:
                    place = place[key]
                    continue
                place[key] = self.value()
                break
        return self.post(path, body)

    def wrong_structure(self) -> bytes:
        """Fields added, removed, sent to the other route; or no object at all."""
        path, body = self.some()
        turn = self.rng.randrange(4)
        if turn == 0:
            body[self.rng.choice(WORDS)] = self.value()
        elif turn == 1:
            del body[self.rng.choice(list(body))]
        elif turn == 2:
            path = PATHS[1 - PATHS.index(path)]
        else:
            return self.post(path, self.value())
        return self.post(path, body)

    def text(self) -> tuple[str, bytes]:
        path, body = self.some()
        return path, json.dumps(body, ensure_ascii=self.rng.random() < 0.5).encode()

    def cut_text(self) -> bytes:
        path, text = self.text()
        return self.post(path, text[: self.rng.randrange(len(text))])

    def spoilt_bytes(self) -> bytes:
        """Some bytes changed, doubled or moved."""
        path, text = self.text()
        made = bytearray(text)
        for _ in range(self.rng.choice([1, 2, 8, 64])):
            at = self.rng.randrange(len(made))
            if self.rng.random() < 0.5:
                made[at] = self.rng.randrange(256)
            else:
                made[at:at] = made[at : at + self.rng.randrange(1, 9)]
        return self.post(path, bytes(made))

    def raw_number(self) -> bytes:
        """A value that is no JSON, or hardly."""
        path, body = self.some()
        body[self.rng.choice(list(body))] = "@@"
        text = json.dumps(body).replace('"@@"', self.rng.choice(RAW))
        return self.post(path, text.encode())

    def nested(self) -> bytes:
        deep = self.rng.choice([10, 200, 20_000])
        path, body = self.some()
        opening, closing = self.rng.choice([("[", "]"), ('{"a":', "}")])
        value = opening * deep + "1" + closing * deep
        body[self.rng.choice(list(body))] = "@@"
        return self.post(path, json.dumps(body).replace('"@@"', value).encode())

    def wrong_method(self) -> bytes:
        method = self.rng.choice(METHODS)
        return request(self.server, self.rng.choice(ROUTES), b"{}", method=method)

    def odd_path(self) -> bytes:
        odd = [
            "/v1/models/../../x",
            "/v1/chat/completions/",
            "//",
            "/%00",
            "/%ff%fe",
            "/v1/models/",
        ]
        odd += [
            "/v1/models/" + "a" * 2000,
            "/static/../app.py",
            "/static/%2e%2e/app.py",
            "/v1?x=[]",
        ]
        return request(self.server, self.rng.choice(odd), b"", method="GET")

    def odd_headers(self) -> bytes:
        """Headers that do not fit the body, or fit nothing."""
        odd: list[dict[str, str]] = [
            {"Content_Type": "application/xml"},
            {"Content_Type": ""},
            {"Content_Type": "application/json; charset=utf-16"},
            {"Content_Length": "-1"},
            {"Content_Length": "x"},
            {"Content_Length": "99999999999999999999"},
            {"Content_Encoding": "gzip"},
            {"Transfer_Encoding": "gzip"},
            {"Authorization": "Basic eDp5"},
            {"Authorization": "Bearer \xe4"},
            {"Host": ""},
            {"Host": "a b"},
            {"Expect": "100-continue"},
            {"X_Request_Id": "a" * 300},
            {"Accept": "image/png"},
            {"Upgrade": "websocket"},
            {"Cookie": "a" * 9000},
        ]
        return self.post(*self.some(), **self.rng.choice(odd))
