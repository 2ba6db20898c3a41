"""The same bits on every processor: digests that are checked in, and every pair of kernels here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("redwood._native", reason="installed without a compiler")

import digests
from bits_kit import Made, first_difference, instruction_sets, logits_of, made_spec
from decoder_kit import CLASSES
from redwood.backends.native.rope import make_rope

SETS = instruction_sets()


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("family", CLASSES)
def test_logits_are_those_of_every_machine(family: str, isa: str) -> None:
    wanted, found = digests.expected(), digests.of_family(family, isa)
    assert [name for name, each in found.items() if wanted[name] != each] == []


def test_what_comes_from_libraries_is_that_of_every_machine() -> None:
    wanted = digests.expected()
    assert {n: wanted[n] for n in digests.of_libraries()} == digests.of_libraries()


def test_libraries_may_use_any_instructions() -> None:
    # As on a processor without vectors: other code in PyTorch, NumPy and the C library.
    found: dict[str, Any] = np.show_config(mode="dicts")["SIMD Extensions"]  # type: ignore[assignment]
    plain = {
        "ATEN_CPU_CAPABILITY": "default",
        "NPY_DISABLE_CPU_FEATURES": ",".join(found.get("found", [])),
        "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-AVX512F,-AVX512VL",
    }
    code = "import json, sys, digests as d; isa = sys.argv[1]; "
    code += "print(json.dumps(d.of_libraries() | d.of_family('llama', isa)))"
    ran = subprocess.run(
        [sys.executable, "-c", code, SETS[0]],
        cwd=Path(__file__).parents[1],
        env={**os.environ, **plain},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == digests.of_libraries() | digests.of_family("llama", SETS[0])


def test_a_caller_that_flushes_subnormal_numbers_changes_nothing() -> None:
    model = digests.made("llama", "Q6_K")  # its scales are subnormal
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("not on this processor")
        found = logits_of(model.backend(SETS[0], threads=2))
    finally:
        torch.set_flush_denormal(False)
    assert digests.digest(found) == digests.expected()["llama, Q6_K"]


SHAPES: list[tuple[str, list[str], dict[str, Any]]] = [
    ("llama", ["Q4_1", "Q5_1"], {"num_attention_heads": 9, "hidden_size": 576}),
    ("qwen2", ["Q4_K", "Q5_K"], {"hidden_size": 512, "sliding_window": 100}),
    ("gemma2", ["Q6_K"], {"hidden_size": 512, "head_dim": 128, "sliding_window": 90}),
    ("gemma3", ["Q5_0"], {"hidden_size": 384, "head_dim": 128, "sliding_window": 33}),
    ("phi3", ["Q3_K"], {"hidden_size": 512, "sliding_window": 200}),
    ("mistral", ["Q8_0"], {"hidden_size": 320, "sliding_window": 77}),
    ("qwen3", ["Q4_0"], {"hidden_size": 448, "head_dim": 128}),
    ("llama", ["Q2_K", "IQ4_XS", "TQ1_0"], {"hidden_size": 512}),
    ("gemma3", ["IQ2_XS", "IQ1_M", "IQ3_S"], {"hidden_size": 512, "sliding_window": 60}),
    ("qwen2", ["IQ4_NL", "MXFP4"], {"hidden_size": 320, "sliding_window": 100}),
    ("gemma2", ["F32", "F16", "BF16"], {"intermediate_size": 256, "sliding_window": 150}),
]


@pytest.mark.parametrize(
    "family, kinds, changes", SHAPES, ids=["-".join([shape[0], *shape[1]]) for shape in SHAPES]
)
def test_every_pair_of_instruction_sets_gives_the_same_bits(
    family: str, kinds: list[str], changes: dict[str, Any]
) -> None:
    heads = changes.get("num_attention_heads", 4)
    layers = 2 if family.startswith("gemma") else 1  # those of one kind take what the first gives
    changes = {"num_key_value_heads": 3 if heads == 9 else 2, "intermediate_size": 768, **changes}
    changes |= {"num_hidden_layers": layers}
    for kind in kinds:
        model = Made.of(made_spec(family, **changes), kind)
        logits = {
            isa: logits_of(model.backend(isa, threads=2), prompt=300, nodes=70, scored=5)
            for isa in SETS
        }
        differ = {
            f"{one} and {other}, {kind}": first_difference(logits[one], logits[other])
            for one, other in combinations(SETS, 2)
        }
        assert {pair: where for pair, where in differ.items() if where} == {}


@pytest.mark.slow
@pytest.mark.parametrize("isa", SETS)
def test_the_real_model_says_what_it_says_on_every_machine(isa: str) -> None:
    wanted, found = digests.expected(), digests.of_model(isa)
    assert digests.split_texts(found) == []
    assert {name: wanted[name] for name in found} == found


def test_one_moved_bit_moves_the_digest() -> None:
    model = digests.made("llama", "F32")  # rounding to 8 bits may swallow a bit
    logits = logits_of(model.backend(SETS[0]))
    moved = logits.copy()
    moved.view(np.uint32)[17, 3] ^= 1
    assert digests.digest(moved) != digests.digest(logits)
    assert "1 of 5200, first node 17 token 3" in first_difference(logits, moved)
    vectors = {name: vector.copy() for name, vector in model.vectors.items()}
    vectors["1.ffn_norm"].view(np.uint32)[5] ^= 1
    changed = logits_of(replace(model, vectors=vectors).backend(SETS[0]))
    assert digests.digest(changed) != digests.digest(logits)


def test_the_command_tells_what_differs_and_does_not_write_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = digests.expected()
    other = {**wanted, "llama, Q4_0": "0" * 64}
    file = tmp_path / "digests.json"
    file.write_text(json.dumps(wanted))
    monkeypatch.setattr(digests, "FILE", file)
    for found, status, said in (
        ({"one": wanted, "two": wanted}, 0, "two: all the same"),
        ({"one": wanted, "two": other}, 1, f"two: 1 of {len(wanted)} differ"),
    ):
        monkeypatch.setattr(digests, "_measured", lambda say, found=found: (found, True))
        assert digests.main([]) == status
        assert said in capsys.readouterr().out
        assert digests.main(["--write"]) == status
    assert digests.expected() == wanted
    assert "two differs" in capsys.readouterr().out


def test_frequencies_are_the_nearest_float32() -> None:
    # Where torch's powers differ between processors, one or two of these do.
    rope = make_rope({"rope_theta": 150000.0}, 64, context=2048, capacity=None, where=Path("here"))
    exact = [1 / float(np.float32(150000.0 ** float(np.float32(i / 64)))) for i in range(0, 64, 2)]
    assert np.array_equal(np.float32(rope.inv_freq), np.float32(exact))
