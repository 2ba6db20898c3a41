"""`redwood serve` with several models: what is refused, and what is made of the command line."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from cli_kit import Ran, only_made
from redwood.cli.serve_models import Several, plans_of
from redwood.errors import ArgumentError
from redwood.server.models.pool import Pool


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the command would run."""
    return only_made(monkeypatch)


def _listed(tmp_path: Path, value: Any) -> str:
    path = tmp_path / "models.json"
    path.write_text(json.dumps(value))
    return str(path)


def test_targets_have_names() -> None:
    plans = plans_of(["fast=org/small", "org/large", "big=./folder=2"], Several(), {})
    assert [(plan.names, plan.target) for plan in plans] == [
        (("fast",), "org/small"),
        ((), "org/large"),
        (("big",), "./folder=2"),
    ]


def test_a_path_with_a_sign_in_it_is_a_path(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    for given in ("a=b", str(tmp_path / "a=c"), "=b", "a="):
        (plan,) = plans_of([given], Several(), {})
        assert (plan.names, plan.target) == ((), given)


def test_models_have_options_of_their_own(
    tiny_model_folder: Path, tiny_draft_folder: Path, tmp_path: Path, served: list[Any]
) -> None:
    models = [
        {"name": "one", "aliases": ["uno"], "target": str(tiny_model_folder), "max_rows": 3},
        {
            "name": "two",
            "target": str(tiny_draft_folder),
            "drafter": "ngram",
            "kv_tokens": 100,
            "tool_parser": "hermes",
        },
    ]
    options = ["--models", _listed(tmp_path, models), "--backend", "eager", "--port", "0"]
    ran = Ran("serve", *options, "--models-memory", "1GiB", "--idle-unload", "60")
    assert ran.code == 0, ran.stderr
    (pool,) = served
    assert isinstance(pool, Pool) and pool.settings.model_names == ("one", "uno", "two")
    assert pool.greeting() == ["2 models, loaded when asked for in 1.0 GiB: one, two"]
    one, two = pool.models
    assert one.service is not None and one.service.engine.max_rows == 3
    assert two.spec.settings.tool_parser == "hermes" and two.spec.settings.kv_tokens == 100
    engine = two.spec.load()
    service = two.spec.serve(engine, two.metrics, 0.5)
    assert (engine.max_rows, engine.kv_tokens, service.engine) == (64, 100, engine)
    assert two.spec.need() == sum(f.stat().st_size for f in tiny_draft_folder.glob("*.safetensors"))


def test_one_model_stays_as_it_is_unless_it_is_to_come_and_go(
    tiny_model_folder: Path, served: list[Any]
) -> None:
    options = ["-t", str(tiny_model_folder), "--backend", "eager", "--port", "0"]
    for more, kind in (([], "Service"), (["--idle-unload", "5"], "Pool")):
        ran = Ran("serve", *options, "--served-name", "x", "--served-name", "y", *more)
        assert ran.code == 0, ran.stderr
        assert type(served[-1]).__name__ == kind
        assert served[-1].settings.model_names == ("x", "y")


def test_one_file_for_two_models_is_refused(tmp_path: Path, tiny_model_folder: Path) -> None:
    two = ["-t", f"a={tiny_model_folder}", "-t", f"b={tiny_model_folder}"]
    for option, spelled in (
        ("--table", "table"),
        ("--kv-cache-file", "kv_cache_file"),
        ("--keep-answers", "keep_answers"),
    ):
        error = Ran("serve", *two, option, str(tmp_path / "kept")).error(code=2)
        assert option in error and f"`{spelled}` in --models FILE" in error
    target = str(tiny_model_folder)
    models = [
        {"name": "a", "target": target, "table": "kept"},
        {"name": "b", "target": target, "table": "./kept"},
    ]
    assert "--table" in Ran("serve", "--models", _listed(tmp_path, models)).error(code=2)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["-t", "org/a", "-t", "other/x", "-t", "x=org/b", "-t", "x=org/c"], "called 'x'"),
        (["-t", "org/a", "-t", "org/b", "--served-name", "x"], "--served-name"),
        (["-t", "x=org/a", "--served-name", "y"], "--served-name"),
        (["-t", "org/a", "-t", "org/b", "--parallel", "tensor"], "--parallel"),
        (["-t", "org/a", "-t", "org/b", "--offload", "disk"], "--offload"),
        (["-t", "org/a", "--models-memory", "much"], "--models-memory"),
        (["-t", "org/a", "--idle-unload", "0"], "--idle-unload"),
        (["-t", "org/a", "--models", "x.json"], "--models"),
    ],
)
def test_wrong_usage_names_the_option(args: list[str], said: str) -> None:
    assert said in Ran("serve", *args).error(code=2)


def test_a_model_that_can_never_fit_is_refused_at_the_start(tiny_model_folder: Path) -> None:
    two = ["-t", f"a={tiny_model_folder}", "-t", f"b={tiny_model_folder}"]
    error = Ran("serve", *two, "--models-memory", "1K").error(code=2)
    assert "--models-memory" in error and "a needs" in error


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({}, "must hold a list of models"),
        ([], "must hold a list of models"),
        ({"models": [], "more": 1}, "must hold a list of models"),
        (["x"], "model 1 of"),
        ([{"target": "x"}, {"name": "y"}], "model 2 of"),
        ([{"target": ""}], "target must be a text"),
        ([{"target": "x", "name": 3}], "name must be a text"),
        ([{"target": "x", "drafer": "none"}], "did you mean 'drafter'"),
        ([{"target": "x", "max_rows": "4"}], "max_rows must be a whole number"),
        ([{"target": "x", "max_rows": True}], "max_rows must be a whole number"),
        ([{"target": "x", "max_rows": -1}], "max_rows -1 must not be negative"),
        ([{"target": "x", "capacity": -5}], "capacity -5 must not be negative"),
        ([{"target": "x", "drafter": None}], "drafter must be a text"),
        ([{"target": "x", "port": 8000}], "no option 'port'"),
        ([{"target": "x", "parallel": "tensor"}], "no option 'parallel'"),
        ([{"target": "x", "aliases": ["y"]}], "give `name`, too"),
        ([{"target": "x", "name": "y", "aliases": "z"}], "aliases must be a list"),
    ],
)
def test_a_wrong_list_of_models_is_one_line(value: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError) as caught:
        plans_of(None, Several(models=Path(_listed(tmp_path, value))), {})
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"drafter": "ngrams"}, "drafter: "),
        ({"drafter": "ngram+/gone/model"}, "drafter: "),
        ({"drafter": "ngram+"}, "drafter: an empty name"),
        ({"drafter": "index:/gone"}, "drafter: "),
        ({"law": "point"}, "law: "),
        ({"law": "points", "drafter": "smollm2-135m-instruct"}, "law 'points'"),
        ({"draft_vocab": "9"}, "draft_vocab: "),
        ({"draft_vocab": "0", "drafter": "smollm2-135m-instruct"}, "draft_vocab 0"),
        ({"draft_vocab": "gone.table", "drafter": "smollm2-135m-instruct"}, "draft_vocab "),
        ({"draft_vocab": "table", "drafter": "smollm2-135m-instruct"}, "draft_vocab "),
        ({"tree": "1,1"}, "tree: "),
        ({"tree": "wide"}, "tree: "),
        ({"backend": "natve"}, "backend 'natve'"),
        ({"backend": "native", "dtype": "float16"}, "dtype float16"),
        ({"dtype": "float12"}, "dtype 'float12'"),
        ({"device": "gpu"}, "device 'gpu'"),
        ({"backend": "native", "weights": "int3"}, "weights 'int3'"),
        ({"weights": "int4"}, "weights: only the native backend"),
        ({"backend": "native", "kv": "f8"}, "kv 'f8'"),
        ({"backend": "native", "threads": 0}, "threads 0"),
        ({"backend": "native", "cpus": "0-1"}, "cpus: "),
        ({"backend": "native", "cpus": "99999"}, "cpus: "),
        ({"max_rows": 0}, "max_rows 0"),
        ({"budget": 0}, "budget 0"),
        ({"capacity": 0}, "capacity 0"),
        ({"prefill_beside": 0}, "prefill_beside 0"),
        ({"kv_cache": "much"}, "kv_cache 'much'"),
        ({"table": "kept", "drafter": "ngram"}, "table: "),
        ({"table_size": "1 bit"}, "table_size: "),
        ({"tokenizer": "/gone"}, "tokenizer: "),
        ({"tool_parser": "hermess"}, "tool_parser 'hermess'"),
    ],
    ids=lambda value: None if isinstance(value, str) else json.dumps(value),
)
def test_wrong_values_of_a_later_model_are_refused_at_the_start(
    own: dict[str, Any], said: str, tmp_path: Path, tiny_model_folder: Path, served: list[Any]
) -> None:
    target = str(tiny_model_folder)
    models = [{"name": "one", "target": target}, {"name": "two", "target": target, **own}]
    error = Ran("serve", "--models", _listed(tmp_path, models), "--backend", "eager").error()
    assert error.startswith("error: model 'two': ") and said in error and not served


def test_one_model_that_comes_and_goes_is_looked_at_too(
    tmp_path: Path, tiny_model_folder: Path, served: list[Any]
) -> None:
    models = [{"name": "one", "target": str(tiny_model_folder), "drafter": "ngrams"}]
    error = Ran("serve", "--models", _listed(tmp_path, models)).error()
    assert error.startswith("error: model 'one': drafter: ") and not served


def test_a_list_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    assert "gone.json" in Ran("serve", "--models", str(tmp_path / "gone.json")).error()
    (tmp_path / "bad.json").write_text("[{")
    assert "is not JSON" in Ran("serve", "--models", str(tmp_path / "bad.json")).error()


def test_replicas_have_one_model(tmp_path: Path) -> None:
    two = Ran("deploy", "-t", "org/a", "-t", "org/b").error(code=2)
    assert "--target" in two and "replicas have one model" in two
    listed = Ran("deploy", "--models", _listed(tmp_path, [{"target": "x"}])).error(code=2)
    assert "--models" in listed and "replicas have one model" in listed


def test_replicas_keep_texts_as_one_server_does(tmp_path: Path) -> None:
    import yaml

    ran = Ran("deploy", "-t", "org/a", "--kv-cache", "2GiB", "--prefill-beside", "4")
    assert ran.code == 0, ran.stderr
    (application,) = yaml.safe_load(ran.stdout)["applications"]
    assert application["args"]["engine"] == {"kv_cache": "2GiB", "prefill_beside": 4}
    refused = Ran("deploy", "-t", "org/a", "--kv-cache-file", str(tmp_path / "kept"))
    assert "--kv-cache-file" in refused.error(code=2)


def test_no_thread_is_left_by_a_start_that_is_refused(tiny_model_folder: Path) -> None:
    before = set(threading.enumerate())
    Ran("serve", "-t", f"a={tiny_model_folder}", "-t", "b=/gone", "--models-memory", "1K").error(2)
    assert set(threading.enumerate()) <= before
