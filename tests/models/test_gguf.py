"""The GGUF reader: equal to the gguf package on good files, one ModelError on bad ones."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calls_kit import counted_calls, ended_where_it_hangs  # noqa: F401
from redwood.errors import ModelError
from redwood.models._gguf import BLOCKS, GGUFFile, Tensor

KINDS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
KINDS += [f"Q{bits}_K" for bits in range(2, 7)]
VALUES: dict[str, tuple[str, Any]] = {
    "u8": ("uint8", 255),
    "i8": ("int8", -128),
    "u16": ("uint16", 65535),
    "i16": ("int16", -32768),
    "u32": ("uint32", 2**32 - 1),
    "i32": ("int32", -(2**31)),
    "u64": ("uint64", 2**64 - 1),
    "i64": ("int64", -(2**63)),
    "f32": ("float32", 0.5),
    "f64": ("float64", 0.1),
    "yes": ("bool", True),
    "no": ("bool", False),
    "text": ("string", "東京 and\na line"),
    "numbers": ("array", [1, -2, 3]),
    "halves": ("array", [0.5, 1.5]),
    "flags": ("array", [True, False]),
    "texts": ("array", ["a", "", "ß"]),
}


def full_file(path: Path) -> Path:
    """Every value type and the tensor types that models are made of."""
    writer = GGUFWriter(path, "llama")
    for key, (kind, value) in VALUES.items():
        getattr(writer, f"add_{kind}")(key, value)
    random = np.random.default_rng(0)
    for kind in KINDS:
        elements, size = BLOCKS[kind]
        raw = random.integers(0, 256, (3, 2 * size), dtype=np.uint8)
        number = GGMLQuantizationType[kind]
        if kind == "F32":
            writer.add_tensor(kind, raw.view(np.float32))
        elif kind == "F16":
            writer.add_tensor(kind, raw.view(np.float16))
        else:
            writer.add_tensor(kind, raw, raw_dtype=number)
    writer.add_tensor("cube", np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    writer.add_tensor("vector", np.arange(5, dtype=np.float32))
    return finish(writer, path)


def finish(writer: GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return full_file(tmp_path_factory.mktemp("gguf") / "good.gguf")


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str | bytes, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def build(
    entries: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: int = 64,
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    entries, tensors = entries or [], tensors or []
    num_tensors, num_entries = counts or (len(tensors), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_entries)
    head += b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


def refusal(tmp_path: Path, contents: bytes) -> str:
    path = tmp_path / "bad.gguf"
    path.write_bytes(contents)
    with pytest.raises(ModelError) as caught, counted_calls() as calls:
        GGUFFile(path)
    assert sum(calls.values()) < 20 * (100 + len(contents) / 8), "a long loop"
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message


def contents_of(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], list[bytes]]:
    """Everything in a file; asserts what holds for each file that opens."""
    with GGUFFile(path) as file:
        size = path.stat().st_size
        spans = sorted((t.offset, t.offset + t.size) for t in file.tensors.values())
        assert all(0 < start < end <= size for start, end in spans)
        assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
        values = {key: file.metadata[key] for key in file.metadata}
        return values, file.tensors, [file.data(name).tobytes() for name in file.tensors]


def test_all_value_types_round_trip(good: Path) -> None:
    with GGUFFile(good) as file:
        read = {key: file.metadata[key] for key in VALUES}
        assert read == {key: value for key, (_, value) in VALUES.items()}
        assert {key: type(value) for key, value in read.items()} == {
            key: type(value) for key, (_, value) in VALUES.items()
        }
        assert file.metadata["general.architecture"] == "llama"
        assert len(file.metadata) == len(VALUES) + 1
        assert "u8" in file.metadata and "u9" not in file.metadata
        with pytest.raises(KeyError):
            file.metadata["u9"]


def test_equals_the_gguf_package_on_a_good_file(good: Path) -> None:
    theirs = GGUFReader(good)
    with GGUFFile(good) as file:
        fields = {k: f for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
        assert list(file.metadata) == list(fields)
        for key, field in fields.items():
            assert file.metadata[key] == field.contents(), key
        assert list(file.tensors) == [t.name for t in theirs.tensors]
        for t in theirs.tensors:
            mine = file.tensors[t.name]
            assert (mine.kind, mine.offset) == (t.tensor_type.name, t.data_offset)
            assert (mine.shape, mine.size) == (tuple(t.shape.tolist()[::-1]), t.n_bytes)
            assert file.data(t.name).tobytes() == t.data.tobytes()


def test_the_table_of_kinds_equals_the_gguf_package(good: Path) -> None:
    known = {kind.name: size for kind, size in GGML_QUANT_SIZES.items()}
    assert {name: BLOCKS.get(name) for name in known} == known  # older ones know fewer
    with GGUFFile(good) as file:
        assert {name: t.kind for name, t in file.tensors.items() if name in KINDS} == {
            kind: kind for kind in KINDS
        }
        assert file.tensors["cube"].shape == (2, 3, 4)


def test_version_2_and_another_alignment_are_read(tmp_path: Path) -> None:
    path = tmp_path / "two.gguf"
    path.write_bytes(build(tensors=[tensor("a", [4, 2]), tensor("b", [8], offset=32)], version=2))
    with GGUFFile(path) as file:
        assert file.tensors["a"].shape == (2, 4)
        assert file.tensors["b"].offset == file.tensors["a"].offset + 32
    path.write_bytes(build([entry("general.alignment", 4, U32(8))], [tensor("nine char", [2])]))
    with GGUFFile(path) as file:
        assert file.tensors["nine char"].offset == 104  # not 128
    path.write_bytes(build())
    with GGUFFile(path) as file:
        assert file.tensors == {} and dict(file.metadata) == {}


def test_views_are_read_only_and_outlive_the_file(good: Path) -> None:
    with GGUFFile(good) as file:
        view = file.data("vector")
        before = view.tobytes()
        assert not view.flags.writeable and view.flags.c_contiguous
        with pytest.raises(ModelError, match="no tensor 'nothing'"):
            file.data("nothing")
    assert view.tobytes() == before == np.arange(5, dtype=np.float32).tobytes()
    for use in (lambda: file.data("vector"), lambda: file.metadata["texts"]):
        with pytest.raises(ModelError, match="was closed"):
            use()
    file.close()


def test_invalid_text_is_replaced_in_values_and_refused_in_names(tmp_path: Path) -> None:
    path = tmp_path / "text.gguf"
    words = struct.pack("<IQ", 8, 2) + text(b"a\xff") + text(b"b")
    path.write_bytes(build([entry("one", 8, text(b"\xfex")), entry("two", 9, words)]))
    with GGUFFile(path) as file:
        assert dict(file.metadata) == {"one": "\ufffdx", "two": ["a\ufffd", "b"]}
    assert "UTF-8" in refusal(tmp_path, build([entry(b"\xff", 0, b"\0")]))
    assert "UTF-8" in refusal(tmp_path, build(tensors=[tensor(b"\xff", [1])]))


HUGE = 1 << 60
U32 = struct.Struct("<I").pack
LIST = struct.Struct("<IQ").pack
TWICE = [tensor("w", [8]), tensor("w", [8], offset=32)]
BAD = {
    "begins with": b"GGML" + build()[4:],
    "is big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "big-endian; convert": b"FUGG" + build()[4:],
    "version is 1": build(version=1),
    "version is 4": build(version=4),
    "version is 0": build(version=0),
    "do not fit": build(counts=(HUGE, 0)),
    "metadata entries do not fit": build(counts=(0, HUGE)),
    "'k' occurs twice": build([entry("k", 0, b"\0")] * 2),
    "key at byte 32 is 0 bytes": build([entry("", 0, b"\0")], data=99),
    f"is {HUGE} bytes long": build([struct.pack("<Q", HUGE) + bytes(64)]),
    "unknown value type 13": build([entry("k", 13, b"\0")]),
    "boolean of value 2": build([entry("k", 7, b"\2")]),
    "neither 0 nor 1": build([entry("k", 9, LIST(7, 3) + b"\0\1\2")]),
    f"a string of {HUGE} bytes": build([entry("k", 8, struct.pack("<Q", HUGE))]),
    "value of 'k' at byte": build([entry("k", 8, struct.pack("<Q", 4096))]),
    "list of lists": build([entry("k", 9, LIST(9, 1) + LIST(4, 1) + U32(1))]),
    "list of the unknown value type 99": build([entry("k", 9, LIST(99, 1))]),
    f"cannot have {HUGE} strings": build([entry("k", 9, LIST(8, HUGE))]),
    "4 strings runs past": build([entry("k", 9, LIST(8, 4) + struct.pack("<Q", HUGE))], data=99),
    "1 strings runs past": build([entry("k", 9, LIST(8, 1) + struct.pack("<Q", HUGE))], data=99),
    "the list 'k' at byte": build([entry("k", 9, LIST(10, HUGE))]),
    "instead of uint32": build([entry("general.alignment", 10, struct.pack("<Q", 32))]),
    "alignment 0 is no power": build([entry("general.alignment", 4, U32(0))]),
    "alignment 24 is no power": build([entry("general.alignment", 4, U32(24))]),
    "tensor 'w' occurs twice": build(tensors=TWICE),
    "has 0 dimensions": build(tensors=[tensor("w", [])]),
    "has 5 dimensions": build(tensors=[tensor("w", [1] * 5)]),
    "unknown type 4": build(tensors=[tensor("w", [32], kind=4)]),
    "of shape (0, 4)": build(tensors=[tensor("w", [4, 0])]),
    "shape (33,) cannot be of type Q4_0": build(tensors=[tensor("w", [33], kind=2)]),
    f"takes {4 * HUGE**4} bytes": build(tensors=[tensor("w", [HUGE] * 4)]),
    "no multiple of 32": build(tensors=[tensor("w", [1], offset=4)]),
    f"at byte {64 + (1 << 63)}": build(tensors=[tensor("w", [1], offset=1 << 63)])[:-32],
    "the file ends at byte 128": build(tensors=[tensor("w", [17])]),
    "'v' and 'w' overlap": build(tensors=[tensor("v", [9]), tensor("w", [4], offset=32)]),
}


@pytest.mark.parametrize("fault", BAD)
def test_each_fault_is_named(fault: str, tmp_path: Path) -> None:
    assert fault in refusal(tmp_path, BAD[fault])


def test_what_is_no_file_is_refused(
    tmp_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "is empty" in refusal(tmp_path, b"")
    with pytest.raises(ModelError, match="is not a file"):
        GGUFFile(tmp_path)
    with pytest.raises(ModelError, match="is not a file"):
        GGUFFile(tmp_path / "absent.gguf")
    monkeypatch.setattr("mmap.mmap", Mock(side_effect=OSError(5, "broken disk")))
    with pytest.raises(ModelError, match="cannot be read: broken disk"):
        GGUFFile(good)


def small_file(path: Path) -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_array("texts", ["a", "bc"])
    writer.add_bool("yes", True)
    writer.add_float32("f", 0.5)
    writer.add_tensor("w", np.zeros((2, 34), np.uint8), raw_dtype=GGMLQuantizationType.Q8_0)
    writer.add_tensor("v", np.zeros(3, np.float32))
    return finish(writer, path)


with tempfile.TemporaryDirectory() as _folder:
    SMALL = small_file(Path(_folder) / "small.gguf").read_bytes()


def test_a_file_cut_at_any_byte_is_refused(good: Path, tmp_path: Path) -> None:
    whole, path = SMALL, tmp_path / "cut.gguf"
    path.write_bytes(whole)
    expected = contents_of(path)
    last = max(t.offset + t.size for t in expected[1].values())
    for length in range(last):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError):
            GGUFFile(path)
    path.write_bytes(whole[:last])  # only padding is gone
    assert contents_of(path) == expected
    for length in range(0, good.stat().st_size - 64, 7):
        path.write_bytes(good.read_bytes()[:length])
        with pytest.raises(ModelError):
            GGUFFile(path)


def survives(path: Path) -> None:
    try:
        contents_of(path)
    except ModelError:
        pass


FUZZ = settings(
    max_examples=700,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
    database=None,
)
PATCH = st.tuples(
    st.floats(0, 1, exclude_max=True),
    st.one_of(
        st.binary(min_size=1, max_size=4),
        st.integers(0, 2**64 - 1).map(struct.Struct("<Q").pack),
        st.sampled_from([0, 1, 8, 9, 2**31, 2**32 - 1, HUGE, 2**63, 2**64 - 1]).map(
            struct.Struct("<Q").pack
        ),
    ),
)


@FUZZ
@given(patches=st.lists(PATCH, min_size=1, max_size=3))
def test_overwritten_bytes_are_read_or_refused(
    patches: list[tuple[float, bytes]], tmp_path: Path
) -> None:
    path = tmp_path / "fuzz.gguf"
    contents = bytearray(SMALL)
    header = len(contents) - 150  # the data itself can hold anything
    for place, patch in patches:
        at = int(place * header)
        contents[at : at + len(patch)] = patch
    path.write_bytes(contents)
    survives(path)


def test_every_single_bit_may_flip(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    path.write_bytes(SMALL)
    whole, data = SMALL, min(t.data_offset for t in GGUFReader(path).tensors)
    for at in range(data):
        for bit in (0, 2, 5, 7):
            flipped = bytearray(whole)
            flipped[at] ^= 1 << bit
            path.write_bytes(flipped)
            survives(path)


@FUZZ
@given(tail=st.binary(max_size=300), counts=st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_noise_after_a_header_is_read_or_refused(
    tail: bytes, counts: tuple[int, int], tmp_path: Path
) -> None:
    path = tmp_path / "noise.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + tail)
    survives(path)


def test_a_long_vocabulary_is_decoded_where_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    words = b"".join(text(f"word{number}") for number in range(150_000))
    path.write_bytes(build([entry("words", 9, LIST(8, 150_000) + words)]))
    with counted_calls() as calls:
        file = GGUFFile(path)
    # To open it means one look at each length, and nothing else for each of the words.
    assert calls.pop("unpack_from") < 150_100 and sum(calls.values()) < 500
    with file:
        assert file.metadata["words"][149_999] == "word149999"  # type: ignore[index]
