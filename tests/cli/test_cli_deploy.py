"""`redwood deploy` and its plan: what is printed, what is refused; Ray is not needed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli_kit import Ran
from redwood.errors import ArgumentError, UnsupportedError
from redwood.server import replicas
from redwood.server.replicas.plan import DeployPlan
from redwood.server.settings import Settings

SETTINGS = Settings(model_names=("m",))


def printed(*args: str) -> dict[str, Any]:
    """The configuration that a command line prints."""
    ran = Ran("deploy", *args)
    assert ran.code == 0, ran.stderr
    return dict(yaml.safe_load(ran.stdout))


def test_what_is_printed_says_everything_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("a-long-enough-key\n")
    args = ["--replicas", "3", "--max-replicas", "5", "--target-ongoing", "7", "--routers", "2"]
    args += ["--replica-cpus", "2", "--replica-gpus", "0.5", "--retries", "4", "--max-rows", "8"]
    args += ["--queue-timeout", "3", "--served-name", "a", "--served-name", "b", "--no-trace"]
    args += ["--host", "0.0.0.0", "--port", "9000", "--api-key-file", str(tmp_path / "keys")]
    args += ["--tree", "1,2", "--drafter", "ngram+smollm2-135m-instruct", "--log-format", "json"]
    config = printed(*args)
    assert config["http_options"] == {"host": "0.0.0.0", "port": 9000}
    (entry,) = config["applications"]
    assert entry["import_path"] == "redwood.server.replicas:application"
    plan = DeployPlan.from_args(entry["args"])
    assert (plan.replicas, plan.max_replicas, plan.target_ongoing) == (3, 5, 7.0)
    assert (plan.routers, plan.retries, plan.threads, plan.replica_gpus) == (2, 4, 2, 0.5)
    assert plan.engine == {"max_rows": 8, "tree": [-1, 0, 1, 1]} and plan.rows == 8
    assert plan.settings.model_names == ("a", "b")
    assert (plan.settings.queue_timeout_s, plan.settings.trace) == (3.0, False)
    assert plan.drafter == "ngram+smollm2-135m-instruct" and plan.log_format == "json"
    assert len(plan.keys()) == 1
    assert "a-long-enough-key" not in yaml.safe_dump(config)
    assert DeployPlan.from_args(plan.args()) == plan


def test_what_was_not_asked_for_is_left_to_the_defaults() -> None:
    (entry,) = printed()["applications"]
    assert set(entry["args"]) == {"target", "drafter", "server"}
    assert set(entry["args"]["server"]) == {"model_names"}


def test_paths_are_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    args = printed("--target", "model", "--drafter", "ngram+index:model")["applications"][0]["args"]
    assert args["target"] == str(tmp_path / "model")
    assert args["drafter"] == f"ngram+index:{tmp_path / 'model'}"
    assert args["server"]["model_names"] == ["model"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--replicas", "0"], "replicas 0"),
        (["--replicas", "3", "--max-replicas", "2"], "max_replicas 2"),
        (["--target-ongoing", "3"], "max_replicas"),
        (["--retries", "-1"], "retries -1"),
        (["--replica-cpus", "nan"], "replica_cpus nan"),
        (["--port", "0"], "port"),
        (["--host", "0.0.0.0"], "--api-key-file"),
        (["--api-key-file", "no-such-file"], "no-such-file"),
        (["--max-queue", "-1"], "max_queue -1"),
    ],
)
def test_a_wrong_value_is_one_line(args: list[str], said: str) -> None:
    assert said in Ran("deploy", *args).error()


@pytest.mark.parametrize(
    "option",
    ["--send-timeout", "--keep-answers", "--share-answers", "--keep-every", "--cpus", "--api-key"],
)
def test_options_that_would_mean_nothing_are_not_there(option: str) -> None:
    assert option in Ran("deploy", option, "1").error(code=2)


def test_wrong_usage_names_the_option() -> None:
    assert "--log-format" in Ran("deploy", "--log-format", "xml").error(code=2)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"server": {"model_names": ["m"]}}, "target"),
        ({"target": "t"}, "model_names"),
        ({"target": "t", "replcas": 2, "server": {"model_names": ["m"]}}, "replcas"),
        ({"target": "t", "server": {"model_names": ["m"], "max_qeue": 2}}, "max_qeue"),
    ],
)
def test_a_wrong_configuration_is_named(args: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        DeployPlan.from_args(args)


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    assert 'pip install "redwood[ray]"' in Ran("deploy", "--run").error()
    with pytest.raises(UnsupportedError, match="redwood"):
        replicas.application({})
    assert printed()["applications"]
