"""The command line, in process, on a tiny random model: help, start, and `generate`."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import redwood
from cli_kit import Ran, chat_prompt
from redwood import Engine, SamplingParams, _defaults
from redwood.cli.terminal import Shades
from redwood.engine.engine import RowEngine
from redwood.tuning.project import TuningPlan
from redwood.tuning.training import Settings

ANSI = re.compile(r"\x1b\[[0-9;]*m")
COMMANDS = [
    [],
    ["generate"],
    ["chat"],
    ["tree"],
    ["demo"],
    ["models", "list"],
    ["models", "fetch"],
    ["models", "verify"],
    ["models", "remove"],
    ["bench", "prompts"],
    ["bench", "forward"],
]


@pytest.fixture
def target(tiny_model_folder: Path) -> str:
    return str(tiny_model_folder)


@pytest.fixture(scope="module")
def engine(tiny_model_folder: Path) -> Engine:
    return redwood.load(str(tiny_model_folder))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_examples(command: list[str]) -> None:
    ran = Ran(*command, "--help")
    assert ran.code == 0
    assert "Examples:" in ran.stdout and "$ redwood" in ran.stdout


def test_the_version_is_shown() -> None:
    assert Ran("--version").stdout == f"redwood {redwood.__version__}\n"


@pytest.mark.parametrize(
    ("command", "owner", "library"),
    [
        ("generate", _defaults.Sampling, [SamplingParams]),
        ("serve", _defaults.Loading, [redwood.load]),
        ("tune", _defaults.Tuning, [Settings, TuningPlan]),
    ],
)
def test_defaults_in_the_help_are_those_of_the_library(
    command: str, owner: type, library: list[Any]
) -> None:
    shown = " ".join(Ran(command, "--help", COLUMNS="200").stdout.split())
    known = {
        name: each.default
        for made in library
        for name, each in inspect.signature(made).parameters.items()
    }
    for name, value in vars(owner).items():
        if not name.startswith("_"):
            assert known[name] == value, name
            option = rf"--{name.replace('_', '-')} "
            assert re.search(rf"{option}[^\[]*\[default: \({re.escape(str(value))}\)\]", shown), (
                name
            )


def test_nothing_heavy_is_imported_before_a_command_needs_it() -> None:
    check = (
        "import sys, redwood, redwood.cli.app\n"
        "heavy = {'torch', 'transformers', 'numpy'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)


def _commands(group: Any, words: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [words]
    for name, command in getattr(group, "commands", {}).items():
        found += _commands(command, (*words, name))
    return found


def test_version_and_every_help_come_without_torch() -> None:
    from redwood.cli.app import app

    pages = [
        ["--version"],
        *([*words, "--help"] for words in _commands(typer.main.get_command(app))),
    ]
    assert ["tune", "--help"] in pages and ["index", "create", "--help"] in pages
    check = (
        "import sys\n"
        "from redwood.cli import main\n"
        f"for page in {pages!r}:\n"
        "    sys.argv = ['redwood', *page]\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as end:\n"
        "        assert not end.code, page\n"
        "    heavy = {'torch', 'transformers', 'numpy'} & sys.modules.keys()\n"
        "    assert not heavy, (page, heavy)\n"
    )
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60, stdout=subprocess.DEVNULL)


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = [sys.executable, "-m", "redwood", "tree", "--acceptance", "0.9,0.5", "--size", "9000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"root  1.0000\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        process.wait(timeout=60)


def test_generate_prints_the_answer_of_the_engine(target: str, engine: Engine) -> None:
    expected = engine.generate(chat_prompt("Tom went"), max_tokens=20)
    ran = Ran("generate", "-t", target, "Tom went", "--max-tokens", "20")
    assert (ran.code, ran.stderr) == (0, "")
    assert ran.stdout == expected.text.removesuffix("\n") + "\n"
    whole = Ran("generate", "-t", target, "Tom went", "--max-tokens", "20", "--no-stream")
    assert whole.stdout == ran.stdout


def test_generate_json_holds_text_tokens_and_stats(target: str, engine: Engine) -> None:
    expected = engine.generate(chat_prompt("Tom"), max_tokens=9)
    value = Ran("generate", "-t", target, "Tom", "--max-tokens", "9", "--json").json
    assert value["text"] == expected.text
    assert value["token_ids"] == expected.token_ids
    assert value["finish_reason"] == expected.finish_reason
    assert value["stats"].keys() == expected.stats.to_dict().keys()
    assert (value["target"], value["drafter"], value["seed"]) == (target, "auto", None)


def test_a_predicted_answer_is_drafted_and_changes_nothing(
    target: str, tmp_path: Path, engine: Engine
) -> None:
    common = ["generate", "-t", target, "Tom", "--max-tokens", "12", "--ignore-eos", "--json"]
    plain = Ran(*common, "--drafter", "none", "--logprobs", "2").json
    assert len(plain["logprobs"]) == 12 and len(plain["logprobs"][0]["top"]) == 2
    (tmp_path / "old.txt").write_text(plain["text"])
    told = Ran(*common, "--drafter", "none", "--prediction", str(tmp_path / "old.txt")).json
    assert told["token_ids"] == plain["token_ids"]
    assert told["stats"]["num_prediction_tokens"] > 0
    assert "logprobs" not in told
    assert "with --json" in Ran("generate", "-t", target, "Tom", "--logprobs", "2").stderr
    assert "logprobs 21" in Ran(*common, "--logprobs", "21").stderr
    assert "cannot read" in Ran(*common, "--prediction", str(tmp_path / "none.txt")).stderr


def test_the_prompt_comes_from_anywhere(target: str, tmp_path: Path, engine: Engine) -> None:
    text = "Größe\n東京"
    (tmp_path / "p.txt").write_text(text + "\n", "utf-8")
    common = ["generate", "-t", target, "--max-tokens", "6", "--json"]
    expected = engine.generate(chat_prompt(text), max_tokens=6).token_ids
    for args, stdin in [
        ([text], None),
        (["--prompt", text], None),
        (["--file", str(tmp_path / "p.txt")], None),
        ([], text + "\n"),
        (["-"], text),
    ]:
        assert Ran(*common, *args, stdin=stdin).json["token_ids"] == expected


def test_raw_and_system_change_the_prompt(target: str, engine: Engine) -> None:
    common = ["generate", "-t", target, "Tom", "--max-tokens", "6", "--json"]
    raw = engine.generate("Tom", max_tokens=6).token_ids
    assert Ran(*common, "--raw").json["token_ids"] == raw
    messages = [{"role": "system", "content": "Be brief."}, *chat_prompt("Tom")]
    with_system = engine.generate(messages, max_tokens=6).token_ids
    assert Ran(*common, "--system", "Be brief.").json["token_ids"] == with_system


def test_every_sampling_option_reaches_the_engine(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[SamplingParams] = []
    add = RowEngine.add

    def spy(self: RowEngine, prompt: Any, params: SamplingParams | None = None) -> int:
        assert params is not None
        seen.append(params)
        return add(self, prompt, params)

    monkeypatch.setattr(RowEngine, "add", spy)
    settings = {
        "max_tokens": 3,
        "temperature": 0.7,
        "top_k": 30,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.1,
        "seed": 0,
        "verifier": "coupled",
    }
    args = [
        part for name, v in settings.items() for part in (f"--{name.replace('_', '-')}", str(v))
    ]
    args += ["--stop", "a", "--stop", "bb", "--logit-bias", "5=-2.5", "--logit-bias", "6=1"]
    ran = Ran("generate", "-t", target, "Tom", *args, "--ignore-eos")
    assert ran.code == 0, ran.stderr
    assert seen == [
        SamplingParams(**settings, stop=("a", "bb"), logit_bias={5: -2.5, 6: 1.0}, ignore_eos=True)
    ]
    assert Ran("generate", "-t", target, "Tom", "--max-tokens", "2").code == 0
    assert seen[1] == SamplingParams(max_tokens=2)


def test_every_model_option_reaches_load(
    target: str, tiny_draft_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    load = redwood.engine.load.load

    def spy(*args: Any, **options: Any) -> Engine:
        calls.append((args, options))
        return load(*args, **options)

    monkeypatch.setattr("redwood.engine.load.load", spy)
    options = {
        "backend": "eager",
        "dtype": "bfloat16",
        "device": "cpu",
        "capacity": 128,
        "budget": 4,
        "law": "point",
    }
    args = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    drafter = f"{tiny_draft_folder}+ngram"
    common = ["generate", "-t", target, "-d", drafter, "Tom", "--max-tokens", "4"]
    assert Ran(*common, *args, "--tree", "2,1").code == 0
    assert calls == [((target, drafter), {**options, "tree": [-1, 0, 0, 1, 2]})]
    (tmp_path / "list.json").write_text("[-1, 0, 0]")
    (tmp_path / "object.json").write_text('{"parents": [-1, 0, 0]}')
    for name in ("list.json", "object.json"):
        assert Ran(*common, "--tree", str(tmp_path / name)).code == 0
        assert calls[-1][1] == {"tree": [-1, 0, 0]}


def test_the_tree_that_redwood_tree_writes_is_taken(
    target: str, tiny_draft_folder: Path, tmp_path: Path
) -> None:
    shape = tmp_path / "shape.json"
    shape.write_text(Ran("tree", "--acceptance", "0.7,0.2", "--size", "5", "--json").stdout)
    common = ["generate", "-t", target, "Tom", "--max-tokens", "12", "--json"]
    drafted = Ran(*common, "-d", str(tiny_draft_folder), "--tree", str(shape)).json
    assert drafted["token_ids"] == Ran(*common, "-d", "none").json["token_ids"]
    assert drafted["stats"]["num_draft_tokens"] > 0


def test_stats_are_a_table_on_stderr(target: str) -> None:
    ran = Ran("generate", "-t", target, "Tom", "--max-tokens", "4", "--stats")
    assert "mean acceptance length" in ran.stderr and "seconds: prefill" in ran.stderr
    assert "acceptance" not in ran.stdout


def test_shown_drafts_change_the_colours_and_not_the_text(target: str) -> None:
    common = ["generate", "-t", target, "Tom went. Tom went. Tom", "--max-tokens", "60"]
    common += ["--budget", "8"]  # a planner would soon leave such a text alone
    plain = Ran(*common).stdout
    for more in ([], ["--no-stream"]):
        shaded = Ran(*common, "--show-drafts", *more, FORCE_COLOR="1", TERM="xterm")
        assert shaded.code == 0
        assert ANSI.sub("", shaded.stdout) == plain
        assert "\x1b[32m" in shaded.stdout and shaded.stdout.count("\x1b[0m") > 0


def test_shades_without_colours_are_said_to_be_missing(target: str) -> None:
    common = ["generate", "-t", target, "Tom", "--max-tokens", "8"]
    ran = Ran(*common, "--show-drafts")
    assert ran.stdout == Ran(*common).stdout
    assert ran.stderr.count("\n") == 1 and "nothing is shaded" in ran.stderr


@pytest.mark.parametrize("stop", [None, "on", "é 東"])
def test_shades_follow_the_tokens_through_held_back_text(engine: Engine, stop: str | None) -> None:
    """Any text as the answer, its tokens in random steps with random parts of them drafted."""
    from redwood.engine.detokenizer import Detokenizer

    text = "Tom went on, naïve 東京 😀 ones: café 東 and on"
    tokens = engine.encode(text)
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        engines = Detokenizer(engine.tokenizer, (stop,) if stop else ())
        shades = Shades(engine.tokenizer)
        drafted_bytes, parts, pieces, start = b"", list[tuple[str, bool]](), "", 0
        while start < len(tokens) and not engines.stopped:
            count = int(torch.randint(1, 6, (), generator=rng))
            chunk = tokens[start : start + count]
            taken = []
            for token in chunk:
                taken.append(token)
                if engines.push(token):
                    break
            start += count
            accepted = min(int(torch.randint(0, 6, (), generator=rng)), len(taken))
            last = start >= len(tokens) or engines.stopped
            words = Words(engines.take(final=last), taken, accepted, "stop" if last else None)
            split = shades.split(words)
            assert "".join(part for part, _ in split) == words.text
            parts += split
            pieces += words.text
            drafted_bytes += b"".join(str(int(i < accepted)).encode() for i in range(len(taken)))
        assert pieces == (text if stop is None else text[: text.index(stop)])
        assert flags(parts) == expected_flags(engine, tokens, drafted_bytes.decode(), pieces)


class Words:
    """A step."""

    def __init__(self, text: str, token_ids: list[int], accepted: int, reason: str | None) -> None:
        self.text, self.token_ids = text, token_ids
        self.num_accepted, self.finish_reason = accepted, reason


def flags(parts: list[tuple[str, bool]]) -> str:
    return "".join(str(int(drafted)) * len(text) for text, drafted in parts)


def expected_flags(engine: Engine, tokens: list[int], drafted: str, text: str) -> str:
    """For each character, whether the token that completes it was drafted."""
    made, count = "", 0
    for end in range(1, len(drafted) + 1):
        known = engine.tokenizer.decode(tokens[:end]).rstrip("\ufffd")
        made += drafted[end - 1] * (len(known) - count)
        count = len(known)
    return made[: len(text)]
