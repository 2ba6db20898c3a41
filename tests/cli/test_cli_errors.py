"""Bad input on the command line: one line each, and the exit code."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import redwood
from cli_kit import Ran, press_ctrl_c
from conftest import save_model, tiny_llama, tiny_tokenizer
from redwood import Engine
from redwood.backends.eager.backend import EagerBackend
from redwood.backends.native.backend import NativeBackend
from redwood.errors import ModelError


@pytest.fixture
def target(tiny_model_folder: Path) -> str:
    return str(tiny_model_folder)


@pytest.fixture(scope="module")
def engine(tiny_model_folder: Path) -> Engine:
    return redwood.load(str(tiny_model_folder))


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--nonsense"], "--nonsense"),
        (["nonsense"], "nonsense"),
        (["generate", "--temprature", "1", "x"], "--temprature"),
        (["generate", "--temperature", "hot", "x"], "--temperature"),
        (["generate", "--max-tokens", "1.5", "x"], "--max-tokens"),
        (["generate", "--max-tokens"], "--max-tokens"),
        (["generate", "--logit-bias", "5", "x"], "--logit-bias"),
        (["generate", "--tree", "1,x", "x"], "--tree"),
        (["generate", "--tree", "no-such-file.json", "x"], "--tree"),
        (["generate", "--law", "point", "x"], "--law"),
        (["generate", "--drafter", "", "x"], "--drafter"),
        (["generate", "--drafter", "ngram+", "x"], "--drafter"),
        (["generate", "--prompt", "y", "x"], "--prompt"),
        (["generate", "--json", "--show-drafts", "x"], "--show-drafts"),
        (["generate", "--raw", "--system", "y", "x"], "--system"),
        (["chat", "--json", "--show-drafts"], "--show-drafts"),
        (["chat", "--frobnicate"], "--frobnicate"),
        (["tree", "--size", "4"], "--acceptance"),
        (["tree", "--acceptance", "0.5"], "--size"),
        (["tree", "--acceptance", "0.5,much", "--size", "4"], "--acceptance"),
        (["tree", "--acceptance", "0.5", "--times", "1:30"], "--times"),
        (["tree", "--acceptance", "0.5", "--times", "1-30", "--draft-time", "1"], "--times"),
        (["tree", "--steps", "4"], "--steps"),
        (["tree", "--acceptance", "0.5", "--size", "4", "--drafter", "ngram"], "--drafter"),
        (["tree", "--prompt", "x", "--size", "4"], "--size"),
        (["tree", "--prompt", "x", "--vector-file", "rates.json"], "--vector-file"),
        (["generate", "--draft-vocab", "64", "x"], "--draft-vocab"),
        (["bench", "prompts"], "--prompts"),
        (["bench", "prompts", "--prompts", "x", "--limit", "0"], "--limit"),
        (["bench", "prompts", "--prompts", "x", "--budget", "4;8"], "--budget"),
        (["bench", "forward", "--tokens", "1,,2"], "--tokens"),
        (["generate", "--threads", "many", "x"], "--threads"),
        (["generate", "--cpus", "0-3", "x"], "--cpus"),
        (["chat", "--cpus", ""], "--cpus"),
        (["demo", "--cpus", "0,,1"], "--cpus"),
        (["bench", "forward", "--cpus", "-1"], "--cpus"),
        (["models", "fetch"], "NAME"),
        (["demo", "--repeats", "0"], "--repeats"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_usage_is_one_line_that_names_the_option(args: list[str], named: str) -> None:
    assert named in Ran(*args).error(code=2)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--temperature", "nan"], "temperature nan"),
        (["--temperature", "-1"], "temperature -1"),
        (["--temperature", "inf"], "temperature inf"),
        (["--top-p", "0"], "top_p 0"),
        (["--top-p", "1.5"], "top_p 1.5"),
        (["--top-p", "nan"], "top_p nan"),
        (["--top-k", "-1"], "top_k -1"),
        (["--max-tokens", "0"], "max_tokens 0"),
        (["--min-p", "2"], "min_p 2"),
        (["--repetition-penalty", "0"], "repetition_penalty 0"),
        (["--logit-bias", "5=nan"], "logit_bias"),
        (["--logit-bias", "-5=1"], "logit_bias"),
        (["--logit-bias", "9999=1"], "logit_bias"),
        (["--stop", ""], "stop"),
        (["--verifier", "hope"], "verifier 'hope'"),
        (["--backend", "abacus"], "backend 'abacus'"),
        (["--dtype", "int3"], "dtype 'int3'"),
        (["--device", "toaster"], "device 'toaster'"),
        (["--device", "cuda:77"], "cuda:77"),
        (["--capacity", "1"], "capacity 1"),
        (["--capacity", "100000"], "capacity 100000"),
        (["--weights", "int3"], "weights 'int3'"),
        (["--kv", "int8"], "kv 'int8'"),
        (["--threads", "0"], "threads 0"),
        (["--threads", "65"], "threads 65"),
        (["--cpus", "7777"], "not 7777"),
        (["--weights", "int8", "--backend", "eager"], "weights: only the native backend"),
        (["--kv", "f16", "--dtype", "float32"], "kv: only the native backend"),
        (["--backend", "native", "--dtype", "float32"], "does not take dtype float32"),
        (["--budget", "0"], "budget 0"),
        (["--budget", "300"], "budget 300 exceeds the capacity"),
        (["--tree", "2,1"], "tree"),
        (["--drafter", "no-such-model"], "no-such-model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_values_are_one_line(target: str, args: list[str], said: str) -> None:
    assert said in Ran("generate", "-t", target, "Tom", *args).error()


def test_a_missing_model_is_one_line_that_says_what_to_give() -> None:
    assert "smollm2-135m-instruct" in Ran("generate", "-t", "no-such-model", "Tom").error()


def test_a_truncated_model_is_one_line_with_its_file(target: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in Path(target).iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in Ran("generate", "-t", str(broken), "Tom").error()


def test_a_pickled_model_is_refused(target: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((Path(target) / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert "pickle" in Ran("generate", "-t", str(tmp_path), "Tom").error()


def test_another_tokenizer_is_refused_with_the_first_difference(
    target: str, tmp_path: Path
) -> None:
    other = save_model(tmp_path, tiny_llama(1, 1, vocab_size=280), tiny_tokenizer(280))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.get)[10:12]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    line = Ran("generate", "-t", target, "-d", str(other), "Tom").error()
    assert "different tokenizers: token 10" in line


def test_a_prompt_longer_than_the_context_is_one_line(target: str) -> None:
    line = Ran("generate", "-t", target, "Tom went. " * 300).error()
    assert "the context holds 256" in line and "shorten" in line


@pytest.mark.parametrize("stdin", ["", "\n"])
def test_an_empty_prompt_is_one_line(target: str, stdin: str) -> None:
    assert "empty" in Ran("generate", "-t", target, stdin=stdin).error()
    assert "empty" in Ran("generate", "-t", target, "").error()


def test_unreadable_prompts_are_one_line(target: str, tmp_path: Path) -> None:
    assert "no-file" in Ran("generate", "--file", str(tmp_path / "no-file")).error()
    assert "UTF-8" in Ran("generate", stdin=b"\xff\xfe").error()
    (tmp_path / "latin").write_bytes(b"Gr\xf6\xdfe")
    assert "UTF-8" in Ran("generate", "--file", str(tmp_path / "latin")).error()
    assert "UTF-8" in Ran("generate", "caf\udce9").error()


def test_a_tree_file_without_parents_is_one_line(tmp_path: Path) -> None:
    for text in ("{", "[1.5]", '{"size": 3}', "7"):
        (tmp_path / "tree.json").write_text(text)
        assert "tree.json" in Ran("generate", "Tom", "--tree", str(tmp_path / "tree.json")).error()


@pytest.mark.parametrize("kind", [NativeBackend, EagerBackend])
def test_logits_that_are_not_numbers_are_one_line(
    target: str, monkeypatch: pytest.MonkeyPatch, kind: type[Any]
) -> None:
    extend = kind.extend
    rows: list[int] = []

    def broken(self: Any, nodes: Any) -> list[torch.Tensor]:
        rows.append(1)
        logits = extend(self, nodes)
        return [row * float("nan") for row in logits] if len(rows) > 3 else logits

    monkeypatch.setattr(kind, "extend", broken)
    args = ["generate", "-t", target, "Tom", "--json", "--backend", kind.name]
    assert "NaN" in Ran(*args).error()


def test_a_chat_template_that_refuses_is_one_line(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    folder = save_model(tmp_path, tiny_llama(), tokenizer)
    assert "no system role" in Ran("generate", "-t", str(folder), "Tom").error()


def test_without_a_chat_template_the_prompt_stands_as_it_is(tmp_path: Path, target: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    folder = str(save_model(tmp_path, tiny_llama(), tokenizer))
    bare = Ran("generate", "-t", folder, "Tom", "--max-tokens", "5").stdout
    assert bare == Ran("generate", "-t", target, "Tom", "--max-tokens", "5", "--raw").stdout
    assert "chat template" in Ran("generate", "-t", folder, "Tom", "--system", "x").error()
    assert "chat template" in Ran("chat", "-t", folder, stdin="Tom\n").error()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EACCES, "Permission denied", "/cache"), "/cache: Permission denied"),
        (ModelError("two\nlines"), "two lines"),
        (MemoryError(), "out of memory"),
        (ZeroDivisionError("surprise"), "unexpected ZeroDivisionError: surprise"),
    ],
)
def test_errors_are_one_line_and_debug_shows_where(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("redwood.models.resolve", fail)
    assert said in Ran("generate", "-t", "some/model", "Tom").error()
    debug = Ran("generate", "-t", "some/model", "Tom", REDWOOD_DEBUG="1")
    assert debug.code == 1
    assert "Traceback" in debug.stderr and said in debug.stderr.splitlines()[-1]


def test_ctrl_c_ends_with_one_line_and_130(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Ran("generate", "-t", target, "Tom", "--max-tokens", "30", "--ignore-eos").stdout
    press_ctrl_c(monkeypatch, after=4)
    ran = Ran("generate", "-t", target, "Tom", "--max-tokens", "30", "--ignore-eos")
    assert (ran.code, ran.stderr) == (130, "interrupted\n")
    assert ran.stdout.endswith("\n") and whole.startswith(ran.stdout.removesuffix("\n"))
    assert 0 < len(ran.stdout) < len(whole)
