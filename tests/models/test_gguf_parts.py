"""Models in several GGUF files, and GGUF files that are no language models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import redwood
from conftest import tiny_tokenizer
from decoder_kit import gguf_settings, gguf_tensors, tiny_model, write_gguf
from redwood.backends.load import open_model
from redwood.backends.native import load as native_load
from redwood.errors import ModelError
from redwood.models import _convert, _packed, gguf_parts, locate
from redwood.models._gguf import GGUFFile
from redwood.models._gguf_parts import GGUFModel, merge
from redwood.profiling import key

pytestmark = pytest.mark.usefixtures("forked_conversions")
MODEL = tiny_model("llama", vocab_size=300)
TENSORS = gguf_tensors(MODEL)
NAMES = list(TENSORS)


def tokenizer_settings() -> dict[str, Any]:
    made = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    vocabulary = sorted(made["vocab"], key=made["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [3 if token in ("<s>", "</s>") else 1 for token in vocabulary],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in made["merges"]],
        "tokenizer.ggml.eos_token_id": vocabulary.index("</s>"),
    }


def whole(folder: Path, **general: Any) -> Path:
    path = folder / "whole.gguf"
    return write_gguf(path, "llama", gguf_settings(MODEL), TENSORS, tokenizer_settings() | general)


def split(folder: Path, cuts: tuple[int, ...] = (0, 5, 9), **changes: dict[str, Any]) -> list[Path]:
    """The model in parts that begin at these tensors; `part2` etc. change what a part says."""
    ends = [*cuts[1:], len(NAMES)]
    paths = []
    for number, (start, end) in enumerate(zip(cuts, ends, strict=True)):
        path = folder / f"tiny-{number + 1:05d}-of-{len(cuts):05d}.gguf"
        said = {"split.no": number, "split.count": len(cuts), "split.tensors.count": len(NAMES)}
        settings = {} if number else gguf_settings(MODEL)
        general = said if number else {**tokenizer_settings(), **said}
        general |= changes.get(f"part{number + 1}", {})
        general = {key: value for key, value in general.items() if value is not None}
        write_gguf(path, "llama", settings, {n: TENSORS[n] for n in NAMES[start:end]}, general)
        paths.append(path)
    return paths


def answer(path: Path, **options: Any) -> tuple[str, list[int]]:
    engine = redwood.load(str(path), **options)
    made = engine.generate("Tom went to", max_tokens=12, temperature=0)
    return engine.target.name, made.token_ids


@pytest.mark.parametrize("options", [{"threads": 1}, {"backend": "eager"}])
@pytest.mark.parametrize("cuts", [(0, 5, 9), (0, 0)])
def test_parts_answer_as_the_whole_file_does(
    cache: Path, tmp_path: Path, options: dict[str, Any], cuts: tuple[int, ...]
) -> None:
    parts, expected = split(tmp_path, cuts), answer(whole(tmp_path), **options)
    assert expected[0] == ("eager" if "backend" in options else "native")
    for part in parts:
        assert answer(part, **options) == expected


def test_any_part_stands_for_the_model(cache: Path, tmp_path: Path) -> None:
    parts = split(tmp_path)
    made = [locate(str(part), progress=False) for part in parts]
    assert made == [(made[0][0], parts[0])] * 3
    assert all(gguf_parts(part) == parts for part in parts)
    alone = whole(tmp_path)
    assert gguf_parts(alone) == [alone]


def test_parts_behind_links_of_other_names_are_found(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "names").mkdir()
    for part in split(tmp_path):
        blob = part.rename(tmp_path / "blobs" / f"x{part.name[5:10]}")
        (tmp_path / "names" / part.name).symlink_to(blob)
    name, _ = answer(tmp_path / "names" / "tiny-00001-of-00003.gguf", threads=1)
    assert name == "native"


def test_a_change_of_any_part_is_seen(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_load, "_IN_MEMORY", 0)
    parts = split(tmp_path)
    first = locate(str(parts[0]), progress=False)[0]
    before, known = answer(parts[0], threads=1), key._identity(str(parts[0]))
    (packed,) = _packed.folders()
    TENSORS[NAMES[-1]][:] *= -1  # a matrix or a norm of the last part, of the same size
    try:
        split(tmp_path)
    finally:
        TENSORS[NAMES[-1]][:] *= -1
    assert locate(str(parts[0]), progress=False)[0] != first
    assert key._identity(str(parts[0])) != known
    assert answer(parts[0], threads=1) != before
    assert packed not in _packed.folders()


def test_a_merged_file_is_the_whole_model(tmp_path: Path) -> None:
    parts, alone = split(tmp_path), GGUFFile(whole(tmp_path))
    for weights in (True, False):
        merge(parts[1], tmp_path / "merged.gguf", weights=weights)
        with GGUFFile(tmp_path / "merged.gguf") as made:
            assert dict(made.metadata) == dict(alone.metadata)
            assert list(made.tensors) == list(alone.tensors)
            for name in NAMES:
                assert made.tensors[name].shape == alone.tensors[name].shape
                if weights:
                    assert made.data(name).tobytes() == alone.data(name).tobytes()
    assert _convert.converted_size(parts[0], "float32") > _convert.converted_size(
        tmp_path / "whole.gguf", "float32"
    )


@pytest.mark.parametrize("backend", ["auto", "native", "eager"])
def test_a_missing_part_is_named(cache: Path, tmp_path: Path, backend: str) -> None:
    parts = split(tmp_path)
    parts[1].unlink()
    with pytest.raises(ModelError, match="is one of 3 parts, and .*-00002-of-00003.gguf is missi"):
        open_model(str(parts[0]), backend=backend)
    with pytest.raises(ModelError, match="tiny-00003.*00002-of-00003.gguf is missing"):
        open_model(str(parts[2]), backend=backend)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"part2": {"split.count": 4}}, "00002-of-00003.gguf says split.count 4, not 3"),
        ({"part2": {"split.count": None}}, "00002-of-00003.gguf says split.count 0, not 3"),
        ({"part3": {"split.no": 1}}, "00003-of-00003.gguf says split.no 1, not 2"),
        ({"part1": {"split.no": True}}, "split.no 'True', which is no number"),
        ({"part1": {"split.count": "3"}}, "split.count '3', which is no number"),
        ({"part3": {"split.tensors.count": 99}}, "disagree: split.tensors.count"),
        (
            {f"part{n}": {"split.tensors.count": 99} for n in (1, 2, 3)},
            f"hold {len(NAMES)} tensors, and say 99",
        ),
    ],
)
def test_parts_that_contradict_each_other_are_refused(
    cache: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    parts = split(tmp_path, **changes)
    with pytest.raises(ModelError, match=reason):
        open_model(str(parts[0]))
    assert not list(cache.rglob("*.json"))  # nothing was made of it


def test_a_tensor_in_two_parts_is_refused_by_name(cache: Path, tmp_path: Path) -> None:
    parts = split(tmp_path, (0, 5))
    said = {"split.no": 1, "split.count": 2}
    write_gguf(parts[1], "llama", {}, {n: TENSORS[n] for n in NAMES[4:]}, said)
    with pytest.raises(ModelError, match=f"{NAMES[4]}' is in .*00001-of.* and in .*00002-of"):
        open_model(str(parts[0]))


def test_a_part_of_another_model_or_cut_short_is_refused(cache: Path, tmp_path: Path) -> None:
    parts = split(tmp_path, (0, 5))
    said = {"split.no": 1, "split.count": 2}
    write_gguf(parts[1], "qwen2", {}, {n: TENSORS[n] for n in NAMES[5:]}, said)
    with pytest.raises(ModelError, match="of another model: architecture 'qwen2'"):
        open_model(str(parts[0]))
    parts = split(tmp_path, (0, 5))
    parts[1].write_bytes(parts[1].read_bytes()[:-40])
    with pytest.raises(ModelError, match="00002-of-00002.gguf .* the file ends at byte"):
        open_model(str(parts[0]))


def test_a_part_under_another_name_is_refused(cache: Path, tmp_path: Path) -> None:
    moved = split(tmp_path)[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(ModelError, match="its name must end in -00001-of-00003.gguf"):
        open_model(str(moved))
    moved = moved.rename(tmp_path / "tiny-00001-of-00002.gguf")
    with pytest.raises(ModelError, match="its name must end in -00001-of-00003.gguf"):
        open_model(str(moved))


def test_a_file_that_is_no_part_may_be_called_like_one(cache: Path, tmp_path: Path) -> None:
    path = whole(tmp_path).rename(tmp_path / "tiny-00001-of-00002.gguf")
    assert gguf_parts(path) == [path]
    with GGUFModel(path) as model:
        assert model.parts == [path]


SOME = {"x.weight": TENSORS[NAMES[0]]}
OTHERS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "mmproj": ("clip", {"general.type": "mmproj"}, SOME, "is the image or audio encoder"),
    "old mmproj": ("clip", {}, SOME, "is the image or audio encoder"),
    "lora": ("llama", {"general.type": "adapter"}, SOME, "LoRA adapter.*merge it into its base"),
    "old lora": ("llama", {"adapter.type": "lora"}, TENSORS, "is a LoRA adapter"),
    "imatrix": ("llama", {"general.type": "imatrix"}, SOME, "is an importance matrix"),
    "vocabulary": ("llama", {}, {}, "is a vocabulary without weights"),
    "controls": ("controlvector", {}, SOME, "is a control vector"),
    "images": ("flux", {}, SOME, "of architecture 'flux' and has no tensor token_embd.weight"),
    "later type": ("llama", {"general.type": "thing"}, TENSORS, "is of type 'thing'"),
    "embedder": ("bert", {"bert.attention.causal": False}, TENSORS, "attention is not causal"),
    "diffusion": ("dream", {"dream.attention.causal": False}, TENSORS, "is not causal"),
}


@pytest.mark.parametrize("backend", ["auto", "native", "eager"])
@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_language_model_is_refused_in_one_line_by_all_backends(
    cache: Path,
    tmp_path: Path,
    kind: str,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    architecture, general, tensors, reason = OTHERS[kind]
    path = write_gguf(tmp_path / "other.gguf", architecture, {}, tensors, general)
    monkeypatch.setattr(_convert, "convert", None)  # nothing is begun
    with pytest.raises(ModelError, match=reason) as caught:
        open_model(str(path), backend=backend)
    assert "\n" not in str(caught.value) and "convert" not in str(caught.value)
    assert not caplog.records


def test_a_refusal_of_both_backends_says_both_reasons(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = gguf_settings(MODEL) | {"later": 1}
    fewer = {name: TENSORS[name] for name in NAMES if name != NAMES[3]}
    path = write_gguf(tmp_path / "x.gguf", "llama", settings, fewer, tokenizer_settings())
    with pytest.raises(ModelError, match="1 weights .*; and the native backend: .*llama.later"):
        open_model(str(path), device="cpu")
    assert "eager backend runs it" not in caplog.text
