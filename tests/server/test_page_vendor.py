"""The libraries inside the page: as their authors published them, with their licences, shipped."""

from __future__ import annotations

import hashlib
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
STATIC = ROOT / "src" / "redwood" / "server" / "static"
_VENDOR = STATIC / "vendor"
_LISTED: dict[str, Any] = json.loads((_VENDOR / "versions.json").read_text("utf-8"))["files"]


def test_every_library_is_listed_and_no_bit_of_it_was_changed() -> None:
    there = {file.name for file in _VENDOR.iterdir()} - {"versions.json", "LICENSES.txt"}
    assert there == set(_LISTED) and there
    for name, said in _LISTED.items():
        data = (_VENDOR / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == said["sha256"], name
        head = f"/*! {said['package']} {said['version']} "
        assert data.startswith(head.encode()), name
        assert said["integrity"].startswith("sha512-") and said["path"].endswith(name)


def test_every_licence_is_there() -> None:
    texts = (_VENDOR / "LICENSES.txt").read_text("utf-8")
    for said in _LISTED.values():
        for package, name in {said["package"]: said["license"], **said["contains"]}.items():
            part = texts.partition(f"==== {package} ({name})")[2].partition("====")[0]
            assert "Copyright" in part and len(part) > 1000, package


def test_no_library_makes_code_from_text_or_loads_anything() -> None:
    for name in _LISTED:
        text = (_VENDOR / name).read_text("utf-8")
        for way in ("eval(", "new Function", "import(", "fetch(", "XMLHttpRequest", "innerHTML"):
            assert way not in text, f"{way} in {name}"


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_the_package_has_the_whole_page(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = pytest.importorskip("scikit_build_core.build")  # what `pip install` builds with
    monkeypatch.chdir(ROOT)
    if kind == "wheel":  # without the native module, which takes minutes and holds no page
        made = build.build_wheel(str(tmp_path), {"wheel.cmake": "false"})
        with zipfile.ZipFile(tmp_path / made) as wheel:
            names = set(wheel.namelist())
            files = {name: wheel.read(name) for name in names if "/static/" in name}
        prefix = "redwood/server/static/"
        assert any(name.endswith("licenses/src/redwood/server/static/vendor/LICENSES.txt")
                   for name in names)  # fmt: skip
    else:
        made = build.build_sdist(str(tmp_path))
        with tarfile.open(tmp_path / made) as sdist:
            members = [each for each in sdist if "/static/" in each.name and each.isfile()]
            files = {each.name: sdist.extractfile(each).read() for each in members}  # type: ignore[union-attr]
        prefix = f"{made.removesuffix('.tar.gz')}/src/redwood/server/static/"
    for file in STATIC.rglob("*"):
        if file.is_file():
            assert files[prefix + file.relative_to(STATIC).as_posix()] == file.read_bytes()
