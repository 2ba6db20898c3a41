"""The OpenAPI document says what the server does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from redwood.server.fields import IGNORED, REFUSED
from redwood.server.schema import ChatRequest
from server_kit import CHAT, Live

KEY = "sk-document"


def test_every_reference_of_the_openapi_document_leads_somewhere(live: Any) -> None:
    document = live().http.get("/openapi.json").json()

    def check(node: Any) -> None:
        for name, value in node.items() if isinstance(node, dict) else enumerate(node):
            if name == "$ref":
                at = document
                for part in value.removeprefix("#/").split("/"):
                    at = at[part]
            elif isinstance(value, dict | list):
                check(value)

    check(document)
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    assert body["content"]["application/json"]["schema"]["$ref"].endswith("ChatRequest")


def test_the_openapi_document_lists_the_fields_that_pass(live: Callable[..., Live]) -> None:
    server = live()
    document = server.http.get("/openapi.json").json()
    described = document["components"]["schemas"]["ChatRequest"]
    listed = described["properties"]
    assert listed.keys() == {*ChatRequest.model_fields, *REFUSED, *IGNORED}
    assert not described["additionalProperties"]
    nothing = [name for name in listed if name != "messages"]
    assert {"type": "null"} in listed["temperature"]["anyOf"]
    assert all(None in listed[name]["enum"] for name in REFUSED)
    neutral = {name: values[0] for name, (values, _) in REFUSED.items() if values}
    for fields in (dict.fromkeys(nothing), neutral, {"metadata": [1], "user": 3}):
        answer = server.http.post("/v1/chat/completions", json={**CHAT, **fields})
        assert answer.status_code == 200, answer.text
    streamed = document["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert streamed["text/event-stream"] == {"schema": {}}


def test_the_openapi_document_lists_the_errors_that_are_given(live: Callable[..., Live]) -> None:
    server = live(keys=[KEY], max_body_bytes=1000)
    document = server.http.get("/openapi.json").json()
    posted = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert posted.keys() == set("200 400 401 403 404 408 413 415 429 500 503 504".split())
    assert set(posted["200"]["content"]) == {"application/json", "text/event-stream"}
    assert "Retry-After" in posted["429"]["headers"] and "Retry-After" in posted["503"]["headers"]
    named = document["paths"]["/v1/models/{name}"]["get"]["responses"]
    assert {"401", "404", "500"} <= named.keys() and "422" not in named
    health = document["paths"]["/health"]["get"]["responses"]
    assert "503" in health and "401" not in health
    metrics = document["paths"]["/metrics"]["get"]["responses"]["200"]["content"]
    assert set(metrics) == {"text/plain"}
    shape = document["components"]["schemas"]["Error"]["properties"]["error"]
    for path, responses, body, headers in (
        ("/v1/chat/completions", posted, {"messages": 3}, {}),
        ("/v1/chat/completions", posted, CHAT, {"authorization": "Bearer wrong"}),
        ("/v1/completions", posted, {"prompt": "x", "model": "none"}, {}),
        ("/v1/completions", posted, {"prompt": "x" * 2000}, {}),
        ("/v1/completions", posted, CHAT, {"content-type": "text/plain"}),
        ("/v1/models/none", named, None, {}),
    ):
        method = "GET" if body is None else "POST"
        response = server.http.request(method, path, json=body, headers=headers)
        assert str(response.status_code) in responses
        assert response.json()["error"].keys() == set(shape["required"])
