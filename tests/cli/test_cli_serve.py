"""`redwood serve` on the command line: what it refuses, and how."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from cli_kit import Ran, only_made
from redwood.cli import serve
from redwood.errors import ArgumentError
from redwood.server.auth import Keys
from redwood.server.listening import address_of, check_exposure, listen
from redwood.server.settings import Settings, is_loopback


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--port", "70000"], "--port"),
        (["--port", "x"], "--port"),
        (["--log-format", "xml"], "--log-format"),
        (["--max-qeue", "3"], "--max-qeue"),
    ],
)
def test_wrong_usage_names_the_option(args: list[str], named: str) -> None:
    assert named in Ran("serve", *args).error(code=2)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--max-queue", "-1"], "max_queue -1"),
        (["--request-timeout", "0"], "request_timeout_s"),
        (["--send-timeout", "nan"], "send_timeout_s"),
        (["--api-key", "short"], "API key 1"),
        (["--api-key-file", "no-such-file"], "no-such-file"),
        (["--host", "0.0.0.0"], "--api-key-file"),
        (["--host", "no.such.host.invalid"], "no.such.host.invalid"),
    ],
)
def test_a_wrong_value_is_one_line_before_any_model_is_loaded(args: list[str], said: str) -> None:
    options = ["--allow-no-key"] if "no.such.host.invalid" in args else []
    assert said in Ran("serve", "--target", "no-such-model", *args, *options).error()


def test_a_port_in_use_is_said_before_the_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        error = Ran("serve", "--port", port, "--target", "no-such-model").error()
    assert port in error and "in use" in error


def test_missing_packages_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = serve.find_spec
    monkeypatch.setattr(serve, "find_spec", lambda n: None if n == "uvicorn" else real(n))
    error = Ran("serve").error()
    assert "uvicorn" in error and "pip install 'redwood[serve]'" in error


def test_the_server_needs_no_packages_until_it_is_used() -> None:
    import subprocess
    import sys

    code = (
        "import sys, redwood.cli.app\n"
        "heavy = {'fastapi', 'uvicorn', 'pydantic', 'prometheus_client', 'llguidance', 'torch'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("host", "safe"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("127.9.9.9", True)]
    + [("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("example.com", False)],
)
def test_a_server_that_others_can_reach_needs_a_key(host: str, safe: bool) -> None:
    settings = Settings(model_names=("x",), host=host)
    assert is_loopback(host) == safe
    check_exposure(settings, Keys(["a-long-key"]))
    check_exposure(settings, Keys(), without_key=True)
    if safe:
        check_exposure(settings, Keys())
    else:
        with pytest.raises(ArgumentError, match="API key"):
            check_exposure(settings, Keys())


@pytest.mark.parametrize(
    "changes",
    [{"max_body_bytes": 0}, {"max_choices": 0}, {"port": -1}, {"ping_s": float("inf")}]
    + [{"model_names": ()}, {"max_output_tokens": 0}, {"max_queue": True}],
)
def test_settings_refuse_what_cannot_be(changes: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        Settings(**{"model_names": ("x",), **changes})


def test_any_free_port_can_be_asked_for() -> None:
    with listen(Settings(model_names=("x",), port=0)) as made:
        assert address_of(made).startswith("http://127.0.0.1:")


def test_clients_see_no_path_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    (tmp_path / "other.gguf").touch()
    assert serve.public_name(str(tmp_path / "my-model")) == "my-model"
    assert serve.public_name(str(tmp_path / "other.gguf")) == "other"
    assert serve.public_name("org/name") == "org/name"
    assert serve.public_name("smollm2-135m-instruct") == "smollm2-135m-instruct"


def test_the_engine_of_a_server_gets_its_limits(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = only_made(monkeypatch)
    options = ["--max-rows", "3", "--kv-tokens", "200", "--max-queue", "7", "--port", "0"]
    kept = ["--keep-answers", str(tmp_path / "kept"), "--keep-every", "3600"]
    ran = Ran("serve", "--target", str(tiny_model_folder), "-d", "ngram", *options, *kept)
    assert ran.code == 0, ran.stderr
    (service,) = made
    assert (service.engine.max_rows, service.engine.kv_tokens) == (3, 200)
    assert service.settings.max_queue == 7
    assert service.worker._memory is not None
    refused = Ran("serve", "--target", str(tiny_model_folder), "-d", "none", "--port", "0", *kept)
    assert "add ngram" in refused.error()
