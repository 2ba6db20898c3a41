"""`redwood tree`, `models`, `bench` and `demo`, in process on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import redwood
from cli_kit import Ran
from redwood import Engine


@pytest.fixture
def target(tiny_model_folder: Path) -> str:
    return str(tiny_model_folder)


@pytest.fixture(scope="module")
def engine(tiny_model_folder: Path) -> Engine:
    return redwood.load(str(tiny_model_folder))


def test_tree_draws_every_node_and_its_expected_tokens(tmp_path: Path) -> None:
    svg = tmp_path / "tree.svg"
    ran = Ran("tree", "--acceptance", "0.8,0.1,0.05", "--size", "6", "--svg", str(svg))
    assert ran.code == 0
    *drawn, empty, summary = ran.stdout.splitlines()
    assert len(drawn) == 6 and empty == ""
    assert summary.startswith("6 nodes, ") and "expected tokens per target pass" in summary
    assert svg.read_text("utf-8").count("<circle") == 6


def test_tree_json_agrees_with_the_library(tmp_path: Path) -> None:
    from redwood.algorithms.sequoia import choose_tree, expected_tokens, optimal_tree

    rates = [[0.9, 0.3], [0.4, 0.5]]
    (tmp_path / "rates.json").write_text(json.dumps(rates))
    common = ["tree", "--vector-file", str(tmp_path / "rates.json"), "--json"]
    bounds = ["--max-levels", "3", "--max-branch", "2"]
    value = Ran(*common, "--size", "5", *bounds).json
    assert value["parents"] == optimal_tree(rates, 5, max_levels=3, max_branch=2)
    assert value["expected_tokens"] == expected_tokens(value["parents"], rates)
    assert (value["size"], value["plan"]) == (5, None)
    assert sum(node["score"] for node in value["nodes"]) == pytest.approx(value["expected_tokens"])
    timed = Ran(*common, "--times", "1:30,2:31,4:35,8:50", "--draft-time", "3").json
    plan = choose_tree(rates, {1: 30, 2: 31, 4: 35, 8: 50}, 3)
    assert timed["plan"] == plan._asdict() and timed["parents"] == plan.parents
    both = Ran(*common, "--size", "5", "--times", "1:30,2:31", "--draft-time", "3").json
    assert both["size"] == 5 and both["plan"]["size"] <= 2


def test_tree_draws_an_answers_trees_and_their_sources(target: str, tmp_path: Path) -> None:
    args = ["tree", "--prompt", "one two one two one two", "--target", target, "--budget", "6"]
    args += ["--drafter", f"auto+{target}", "--steps", "5"]
    steps = Ran(*args, "--json").json["steps"]
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5]
    seen = {name for step in steps for node in step["nodes"] for name in node["sources"]}
    assert "model" in seen and seen <= {"text", "table", "model"}
    ran = Ran(*args, "--table", str(tmp_path / "said"))
    assert ran.code == 0 and ran.stdout.count("step ") == 5
    assert ran.stdout.count("  root") == 5 and "M  accepted" in ran.stdout
    assert "Drafted by: " in ran.stdout and "M a draft model" in ran.stdout
    plain = Ran("tree", "--prompt", "x", "--target", target, "--drafter", "none", "--steps", "2")
    assert "0 drafted" in plain.stdout and "Drafted by" not in plain.stdout


def test_tree_prints_the_plan() -> None:
    ran = Ran("tree", "--acceptance", "0.8", "--times", "1:30,4:35", "--draft-time", "3")
    assert "best for these times: 4 nodes" in ran.stdout and "x plain decoding" in ran.stdout


@pytest.mark.parametrize(
    "args",
    [
        ["--acceptance", "1.5", "--size", "4"],
        ["--acceptance", "nan", "--size", "4"],
        ["--acceptance", "0.5", "--size", "0"],
        ["--acceptance", "0.5", "--size", "9", "--max-levels", "2", "--max-branch", "2"],
        ["--acceptance", "0.5", "--times", "4:30", "--draft-time", "3"],
        ["--acceptance", "0.5", "--times", "1:30", "--draft-time", "nan"],
        ["--acceptance", "0.5", "--size", "4", "--svg", "/no/such/folder/tree.svg"],
        ["--vector-file", "/no/such/file.json", "--size", "4"],
    ],
    ids=" ".join,
)
def test_wrong_trees_are_one_line(args: list[str]) -> None:
    Ran("tree", *args).error()


def test_a_vector_file_without_rates_is_one_line(tmp_path: Path) -> None:
    for text in ("[", '{"a": 1}', '["x"]', "[[0.5], 1]", "3"):
        (tmp_path / "rates.json").write_text(text)
        args = ["tree", "--vector-file", str(tmp_path / "rates.json"), "--size", "4"]
        assert "rates.json" in Ran(*args).error()


def test_models_are_listed_fetched_and_removed(target: str) -> None:
    listed = Ran("models", "list", "--json").json
    assert {"name", "state", "size_bytes", "path", "source"} == listed[0].keys()
    assert all(model["state"] == "absent" for model in listed)
    table = Ran("models", "list")
    assert table.code == 0 and "smollm2-135m-instruct" in table.stdout
    assert "98.4 MB to fetch" in table.stdout and "Apache-2.0" in table.stdout
    assert Ran("models", "fetch", target).stdout == f"{target}\n"
    assert Ran("models", "fetch", target, "--json").json == [{"name": target, "path": target}]
    name = listed[0]["name"]
    assert Ran("models", "remove", name, "--json").json == [{"name": name, "freed_bytes": 0}]
    assert Ran("models", "remove", name).stdout == f"{name}: 0 bytes freed\n"


def test_models_verify_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    monkeypatch.setattr("redwood.models.verify", checked.append)
    assert Ran("models", "verify", "a", "b").stdout == "a: intact\nb: intact\n"
    assert Ran("models", "verify", "c", "--json").json == [{"name": "c", "intact": True}]
    assert checked == ["a", "b", "c"]


@pytest.mark.parametrize("command", ["fetch", "remove", "verify"])
def test_unknown_models_are_one_line(command: str) -> None:
    assert "smollm" in Ran("models", command, "smollm").error()


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    lines: list[Any] = [
        {"prompt": "Tom went. Tom went.", "category": "walks"},
        {"turns": ["Anna bought pears", "And then?"], "category": "markets"},
        {"prompt": "def add(a, b):"},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    return str(path)


def test_bench_prompts_gives_a_list_of_objects(
    target: str, tiny_draft_folder: Path, prompts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import redwood.backends.load as loading

    loaded: list[str] = []
    open_model = loading.open_model

    def spy(name: str, **options: Any) -> Any:
        loaded.append(name)
        return open_model(name, **options)

    monkeypatch.setattr(loading, "open_model", spy)
    names = f"ngram,{tiny_draft_folder},{tiny_draft_folder}+ngram"
    common = ["bench", "prompts", "-t", target, "--prompts", prompts, "--max-tokens", "8"]
    made = Ran(*common, "--drafter", names, "--budget", "3,5", "--repeats", "2", "--json").json
    assert [(m["drafter"], m["budget"]) for m in made] == [("none", 1)] + [
        (name, budget) for name in names.split(",") for budget in (3, 5)
    ]
    for report in made:
        assert report["identical"] is True and report["num_prompts"] == 3
        assert report["tokens_per_s"] > 0 and report["ratio_to_plain"] > 0
        assert report["mean_acceptance_length"] >= 1.0
        assert report["differences"] == [] and report["num_differences"] == 0
    assert sorted(loaded) == sorted([target, str(tiny_draft_folder)])  # each model once


def test_bench_prompts_shows_a_table(target: str, prompts: str) -> None:
    common = ["bench", "prompts", "-t", target, "--prompts", prompts, "--max-tokens", "6"]
    ran = Ran(*common, "--limit", "2")
    assert ran.code == 0
    assert "auto" in ran.stdout and "2/2" in ran.stdout and "x plain" in ran.stdout
    sampled = Ran(*common, "--temperature", "1", "--category", "walks", "--category", "markets")
    assert "not compared" in sampled.stdout and "without a seed" in sampled.stdout


@pytest.mark.parametrize(
    ("sampled", "identical"), [([], None), (["--seed", "3"], True)], ids=["no seed", "seed"]
)
def test_bench_prompts_compares_only_what_is_one_text(
    target: str, prompts: str, sampled: list[str], identical: bool | None
) -> None:
    common = ["bench", "prompts", "-t", target, "--prompts", prompts, "--max-tokens", "6"]
    made = Ran(*common, "--temperature", "0.9", "--top-p", "0.95", *sampled, "--json").json
    assert [report["identical"] for report in made] == [identical, identical]
    assert [report["num_prompts"] for report in made] == [3, 3]


def test_bench_prompts_shows_where_texts_differ(
    target: str, prompts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from redwood.bench.interleave import Stepper

    def wrong(lane: Stepper) -> list[list[int]]:
        found = [list(text) for text in lane._texts.values()]
        if lane.engine.drafter.name == "ngram+table":
            found[0][2] = (found[0][2] + 1) % 300
        return found

    monkeypatch.setattr(Stepper, "texts", property(wrong))
    common = ["bench", "prompts", "-t", target, "--prompts", prompts, "--max-tokens", "6"]
    ran = Ran(*common, "--category", "markets")
    assert "auto (budget auto), line 3: token 2 is" in ran.stdout and "margin" in ran.stdout
    plain, other = Ran(*common, "--category", "markets", "--json").json
    assert plain["identical"] is True and other["identical"] is False
    (difference,) = other["differences"]
    assert (difference["line"], difference["position"]) == (3, 2)
    assert difference["margin"] > 0
    monkeypatch.setattr("redwood.cli.demo.PROMPT", "Tom went. Tom went.")
    ran = Ran("demo", "-t", target, "--max-tokens", "6")
    assert ran.code == 1 and ran.stderr.startswith("error: the answers differ from token 2 on")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no prompts"),
        ("{\n", "line 1"),
        ('{"prompt": "a"}\n{"prompt": ""}\n', "line 2"),
        ('{"turns": []}', "line 1"),
        ('{"text": "a"}', "line 1"),
        ('["a"]', "line 1"),
        ('{"prompt": 3}', "line 1"),
        (json.dumps({"prompt": "Tom went. " * 200}), "line 1: the prompt has"),
    ],
)
def test_wrong_prompt_files_are_one_line(target: str, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    args = ["bench", "prompts", "-t", target, "--prompts", str(tmp_path / "p.jsonl")]
    assert said in Ran(*args).error()


def test_an_unknown_category_is_one_line_with_the_known_ones(prompts: str) -> None:
    line = Ran("bench", "prompts", "--prompts", prompts, "--category", "songs").error()
    assert "markets, walks" in line
    assert "no-file" in Ran("bench", "prompts", "--prompts", "no-file").error()


def test_bench_forward_gives_medians_by_number_of_tokens(target: str) -> None:
    common = ["bench", "forward", "-t", target, "--tokens", "1,4", "--context", "16"]
    value = Ran(*common, "--repeats", "3", "--dtype", "bfloat16", "--json").json
    assert value["backend"] == "eager" and list(value["ms"]) == ["1", "4"]
    assert all(ms > 0 for ms in value["ms"].values())
    assert (value["context"], value["dtype"], value["device"]) == (16, "bfloat16", "cpu")
    table = Ran(*common, "--repeats", "1")
    assert table.code == 0 and "16 tokens before" in table.stdout
    assert "capacity" in Ran("bench", "forward", "-t", target, "--context", "255").error()
    assert "tokens [0]" in Ran("bench", "forward", "-t", target, "--tokens", "0").error()


def test_demo_compares_trees_with_plain_decoding(target: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("redwood.cli.demo.PROMPT", "Tom went. Tom went.")
    common = ["demo", "-t", target, "--max-tokens", "24", "--repeats", "2"]
    ran = Ran(*common)
    assert (ran.code, ran.stderr) == (0, "")
    for said in ("token tree", "plain", "target passes", "seconds: verify", "x plain decoding"):
        assert said in ran.stdout
    assert "The answers are equal, all " in ran.stdout
    value = Ran(*common, "--json").json
    assert value["identical"] is True and value["ratio_to_plain"] > 0
    assert value["text"] and value["text"] in ran.stdout
    for kind in ("tree", "plain"):
        assert value[kind]["seconds"].keys() == {"prefill", "draft", "target", "verify", "other"}
    assert value["plain"]["target_passes"] == value["plain"]["num_generated_tokens"]
    assert "--drafter" in Ran("demo", "-t", target, "-d", "none").error(code=2)
