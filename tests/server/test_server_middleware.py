"""Keys, hosts, names of requests; what the log and the metrics say, and what they never say."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Mount

from redwood import Engine
from redwood.errors import ArgumentError
from redwood.server import auth, logs, watching
from redwood.server.app import create_app
from redwood.server.auth import Keys, read_keys
from redwood.server.errors import as_api_error
from redwood.server.logs import Record
from redwood.server.middleware import PUBLIC
from server_kit import CHAT, Live, Raw, wait_for

KEY = "sentinel-0123456789"


def header(value: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"x"), (b"authorization", value.encode("latin-1"))]


def test_every_key_is_compared_even_after_a_match(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    real = auth.hmac.compare_digest

    def counted(a: bytes, b: bytes) -> bool:
        compared.append(len(a) - len(b))
        return real(a, b)

    monkeypatch.setattr(auth.hmac, "compare_digest", counted)
    keys = Keys(["first-key", "second-key", "third-key"])
    assert keys.owner(header("Bearer first-key")) == "key-1"
    assert keys.owner(header("bearer  third-key ")) == "key-3"
    assert compared == [0] * 6  # digests of one length


def test_no_keys_means_open_and_keys_are_kept_as_digests() -> None:
    assert Keys().owner([]) == "open"
    assert KEY not in repr(vars(Keys([KEY])))


@pytest.mark.parametrize("key", ["short", "with space", "näïve-key-1", "tab\tkey-1", ""])
def test_keys_that_no_header_carries_are_refused(key: str) -> None:
    with pytest.raises(ArgumentError, match="API key 1"):
        Keys([key])


def test_keys_come_from_options_file_and_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    file.write_text("# ours\n\nfrom-the-file\n")
    keys = read_keys(["from-an-option"], file, {"REDWOOD_API_KEY": "from-env-1, from-env-2"})
    assert len(keys) == 4 and keys.owner(header("Bearer from-env-2")) == "key-4"
    file.write_text("# none\n")
    with pytest.raises(ArgumentError, match="no API key"):
        read_keys([], file, {})
    with pytest.raises(ArgumentError, match="cannot read"):
        read_keys([], tmp_path / "missing", {})


WRONG = {
    "none": {},
    "wrong": {"authorization": "Bearer wrong-key-000"},
    "case": {"authorization": f"Bearer {KEY.upper()}"},
    "prefix": {"authorization": f"Bearer {KEY[:-1]}"},
    "longer": {"authorization": f"Bearer {KEY}x"},
    "empty": {"authorization": "Bearer"},
    "bare": {"authorization": KEY},
    "basic": {"authorization": f"Basic {KEY}"},
    "other header": {"x-token": KEY},
    "wrong in Anthropic's header": {"x-api-key": KEY[:-1]},
    "right there, wrong in the usual one": {"authorization": "Bearer no", "x-api-key": KEY},
}


@pytest.fixture(scope="module")
def locked(tiny_engine: Engine) -> Iterator[Live]:
    server = Live(Engine(tiny_engine.target, tokenizer=tiny_engine.tokenizer), keys=[KEY])
    server.http.headers.pop("authorization")
    yield server
    server.stop()


@pytest.mark.parametrize("headers", WRONG.values(), ids=WRONG)
def test_without_the_key_nothing_but_public_routes_answers(
    locked: Live, headers: dict[str, str]
) -> None:
    app = create_app(locked.service).app  # type: ignore[attr-defined]
    checked = 0
    for route in app.routes:
        path = route.path.replace("{name:path}", "tiny")
        if isinstance(route, Mount) or path in PUBLIC:
            continue
        for method in route.methods - {"HEAD"}:
            response = locked.http.request(method, path, headers=headers)
            if path.startswith("/v1/messages"):  # Anthropic's shape
                assert response.status_code == 401
                assert response.json()["error"]["type"] == "authentication_error"
            else:
                assert locked.error(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
            checked += 1
    assert checked >= 6 and locked.http.get("/health").status_code == 200
    assert locked.http.get("/nothing", headers=headers).status_code == 401
    assert locked.stage.calls == 0


def test_odd_authorization_headers_get_401_and_never_500(live: Callable[..., Live]) -> None:
    server = live(keys=[KEY])
    for value in ("Bearer \xff\xfe", f"Bearer {KEY}\r\nAuthorization: Bearer {KEY}"):
        with Raw(server.port) as client:
            client.send(
                f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: {value}\r\n\r\n".encode(
                    "latin-1"
                )
            )
            assert b" 401 " in client.read_until(b"\r\n")
    with Raw(server.port) as client:
        client.send(b"GET /v1/models HTTP/1.1\r\nAuthorization: " + b"x" * 100_000 + b"\r\n\r\n")
        assert b" 400 " in client.read_until(b"\r\n")
    assert server.chat().status_code == 200


def test_metrics_can_be_left_open(live: Callable[..., Live]) -> None:
    server = live(keys=[KEY], metrics_without_key=True)
    server.http.headers.pop("authorization")
    assert server.http.get("/metrics").status_code == 200
    assert server.http.get("/v1/models").status_code == 401


def test_a_private_server_answers_to_its_own_names_only(live: Callable[..., Live]) -> None:
    server = live(allowed_hosts=("my.proxy",))
    for host, status in (
        ("127.0.0.1", 200),
        ("localhost:1234", 200),
        ("[::1]:80", 200),
        ("my.proxy", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("[", 403),
    ):
        response = server.http.get("/v1/models", headers={"host": host})
        assert response.status_code == status, host
    with_key = live(keys=[KEY])
    assert with_key.http.get("/v1/models", headers={"host": "any.name"}).status_code == 200


def test_other_sites_are_given_no_leave_to_call(live: Callable[..., Live]) -> None:
    server = live()
    origin = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    response = server.http.options("/v1/chat/completions", headers=origin)
    assert response.status_code == 405
    response = server.http.get("/v1/models", headers=origin)
    assert not [name for name in response.headers if name.startswith("access-control")]
    assert response.headers["x-content-type-options"] == "nosniff"


def test_the_page_may_load_nothing_from_elsewhere(
    live: Callable[..., Live], tmp_path: Path
) -> None:
    server = live()
    (tmp_path / "index.html").write_text("<p>page</p>")
    (tmp_path / "app.js").write_text("1")
    response = server.http.get("/")
    if response.status_code == 200:
        assert "default-src 'none'" in response.headers["content-security-policy"]
        huge = {"range": "bytes=" + ",".join(f"{i}-{i}" for i in range(2000))}
        assert server.http.get("/static/app.js", headers=huge).status_code in (200, 206, 400, 416)
    assert server.http.get("/static/../app.py").status_code == 404
    assert server.http.get("/static/%2e%2e/app.py").status_code == 404


def test_a_sane_request_id_is_kept_and_others_are_replaced(live: Callable[..., Live]) -> None:
    server = live()
    get = server.http.get
    assert get("/health", headers={"x-request-id": "my-id.1"}).headers["x-request-id"] == "my-id.1"
    for odd in ("x" * 129, "a b", 'x"y', "http://evil/"):
        assert get("/health", headers={"x-request-id": odd}).headers["x-request-id"] != odd


def test_secrets_are_nowhere(live: Callable[..., Live], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server = live(keys=[KEY])
    assert server.chat().status_code == 200
    assert server.chat(temperature=9).status_code == 400
    server.stage.before = lambda call: 1 / 0
    assert server.chat().status_code == 500
    server.http.get("/v1/models", headers={"authorization": "Bearer wrong-sentinel-1"})
    shown = "".join(server.http.get(path).text for path in ("/metrics", "/health", "/openapi.json"))
    ours = [r for r in caplog.records if r.name.startswith(("redwood", "uvicorn", "asyncio"))]
    logged = "".join(str(vars(record)) + str(record.getMessage()) for record in ours)
    assert len(ours) >= 4
    for secret in (KEY, "wrong-sentinel-1", "Bearer"):
        assert secret not in shown and secret not in logged


def test_prompts_and_answers_are_logged_only_where_it_is_said(
    live: Callable[..., Live], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "redwood.requests")
    messages = [{"role": "user", "content": "Anna and Tom"}]
    live().chat(messages=messages)
    assert "Anna" not in "".join(str(vars(record)) for record in caplog.records)
    server = live(log_prompts=True)
    text = server.text(messages=messages)
    wait_for(lambda: any("answer" in fields(r) for r in caplog.records), "a line")
    line = next(fields(r) for r in caplog.records if "answer" in fields(r))
    assert "Anna and Tom" in line["prompt"] and line["answer"] == text


def fields(record: logging.LogRecord) -> dict[str, Any]:
    return dict(getattr(record, "fields", {}))


def test_each_request_is_one_line(
    live: Callable[..., Live], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "redwood.requests")
    server = live(keys=[KEY])
    server.chat(stream=True)
    server.chat(temperature=9)
    wait_for(lambda: len(caplog.records) >= 2, "two lines")
    first, second = sorted(map(fields, caplog.records), key=lambda line: line["status"])
    assert (first["status"], first["key"], first["stream"]) == (200, "key-1", True)
    assert first["completion_tokens"] == 12 and 0 < first["first_token_s"] <= first["seconds"]
    assert (second["status"], second["error"]) == (400, "invalid_value")
    assert len(caplog.records) == 2
    server.http.get("/health")
    assert len(caplog.records) == 2  # heartbeats of others are not worth a line


@pytest.mark.parametrize("form", logs.FORMATS)
def test_no_value_can_begin_a_line_of_its_own(form: str) -> None:
    evil = "x\n2026 error forged=1\x1b[31m\u2028"
    record = logging.LogRecord("redwood.requests", logging.INFO, "", 0, "request", (), None)
    record.fields = {"path": evil, "key": "a b"}
    line = logs._Formatter(form).format(record)
    assert len(line.splitlines()) == 1 and "\x1b" not in line
    if form == "json":
        assert json.loads(line)["path"] == evil


def test_a_failed_request_is_an_error_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "redwood.requests")
    for status in (200, 404, 500):
        Record("id", "GET", "/", status=status).write()
    assert [r.levelname for r in caplog.records] == ["INFO", "INFO", "ERROR"]


def test_labels_do_not_grow_with_what_clients_send(live: Callable[..., Live]) -> None:
    server = live()

    def names() -> set[str]:
        lines = server.service.metrics.text().decode().splitlines()
        return {line.rpartition(" ")[0] for line in lines if not line.startswith("#")}

    def odd(i: int) -> None:
        server.chat(model=f"m{i}")
        server.http.get(f"/x{i}")
        server.http.get(f"/v1/models/m{i}")
        server.http.get("/health", headers={"x-request-id": f"id{i}"})

    odd(0)
    before = names()
    for i in range(1, 6):
        odd(i)
    assert names() == before


def test_metrics_count_what_vllm_counts_under_our_prefix(live: Callable[..., Live]) -> None:
    server = live()
    usage = server.chat(max_tokens=60).json()["usage"]
    ours, metric = usage["redwood"], server.metric
    assert metric("redwood:spec_decode_num_drafts_total") == ours["num_drafts"]
    assert metric("redwood:spec_decode_num_draft_tokens_total") == ours["num_draft_tokens"]
    assert metric("redwood:spec_decode_num_accepted_tokens_total") == ours["num_accepted_tokens"]
    name = "redwood:spec_decode_num_accepted_tokens_per_pos_total"
    by_position = [metric(f'{name}{{position="{i}"}}') for i in range(8)]
    assert sum(by_position) == ours["num_accepted_tokens"] > 0
    assert by_position == sorted(by_position, reverse=True)
    assert metric("redwood:generation_tokens_total") == usage["completion_tokens"]
    assert metric("redwood:prompt_tokens_total") == usage["prompt_tokens"]
    count = 'redwood:requests_total{code="200",route="/v1/chat/completions"}'
    wait_for(lambda: metric(count) == 1, "a count, which follows the answer")
    for name in ("time_to_first_token", "request_queue_time", "e2e_request_latency"):
        assert metric(f"redwood:{name}_seconds_count") == 1
    assert metric("redwood:num_requests_running") == metric("redwood:num_requests_waiting") == 0
    assert metric("redwood:engine_up") == 1


def test_an_error_that_nobody_expected_tells_the_client_no_details(
    live: Callable[..., Live], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = live()

    async def broken(*_: Any) -> None:
        raise KeyError("inner secret")

    monkeypatch.setattr(server.service.preparer, "prepare", broken)
    response = server.http.post("/v1/chat/completions", json=CHAT)
    assert "secret" not in server.error(response, 500)["message"]
    assert response.headers["x-should-retry"] == "false"
    wait_for(lambda: "KeyError" in caplog.text, "a traceback in the log")
    monkeypatch.undo()
    server.alive_and_right()
    assert "secret" not in as_api_error(KeyError("secret")).message


def test_a_slash_too_many_gets_404_and_leads_nowhere_else(live: Callable[..., Live]) -> None:
    server = live(keys=[KEY])
    for path in ("/v1/models/", "/v1/chat/completions/", "/v1/completions/", "/version/"):
        method = "POST" if path.endswith("completions/") else "GET"
        response = server.http.request(method, path, json=CHAT)
        assert server.error(response, 404)["type"] == "not_found_error"
        assert "location" not in response.headers
    slashed = server.openai.with_options(base_url=f"{server.url}/v1/")  # joined by the client
    assert [model.id for model in slashed.models.list()] == ["tiny"]


class _Transport:
    def __init__(self) -> None:
        self.left, self.aborted = 1000, False

    def is_closing(self) -> bool:
        return True

    def get_write_buffer_size(self) -> int:
        return self.left

    def abort(self) -> None:
        self.aborted = True


def test_a_closed_connection_may_take_its_answer_as_slowly_as_it_likes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(watching, "monotonic", lambda: now[0])

    class Connection:
        cycle = object()

    connection: Any = Connection()
    connection.transport = transport = _Transport()
    quiet: watching.Quiet = watching.WeakKeyDictionary()
    for _ in range(9):  # 90 seconds in which it takes some every ten
        watching.close_stalled({connection}, quiet, 30.0, 30.0)
        now[0] += 10.0
        transport.left -= 100
        assert not transport.aborted
    for _ in range(5):  # then nothing more
        watching.close_stalled({connection}, quiet, 30.0, 30.0)
        now[0] += 10.0
    assert transport.aborted


def test_an_error_before_any_route_has_openais_shape_too(
    live: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = live()

    def broken(headers: Any) -> None:
        raise KeyError("inner secret")

    monkeypatch.setattr(server.service.keys, "owner", broken)
    error = server.error(server.http.get("/v1/models"), 500)
    assert error["code"] == "internal_error" and "secret" not in error["message"]
    monkeypatch.undo()
    server.alive_and_right()
