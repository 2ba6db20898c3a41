"""Fetches and builds the peers into the user's cache; what is there already is left alone.

Nothing here becomes a dependency of Redwood. Time nothing meanwhile.

    python benchmarks/peers/build.py openvino     environment, and the models in 4 bits (10 minutes)
    python benchmarks/peers/build.py llama        llama.cpp's server (10 minutes)
    python benchmarks/peers/build.py bindings     llama.cpp's forward pass for native.py (9 minutes)
    python benchmarks/peers/build.py              the first two

Transformers is not built: it is in Redwood's own environment.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from places import CACHE, EXPORT_VENV, EXPORTED, LLAMA_BUILD, LLAMA_SERVER, LLAMA_VENV
from places import OPENVINO_PYTHON as OPENVINO

from redwood.models import PACKAGED, resolve

GENAI = ("openvino==2026.4.1", "openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0")
EXPORT = ("torch==2.13.0", "transformers==5.5.4", "optimum-intel[openvino]==2.2.0", "nncf==3.4.0")
LLAMA = "llama-cpp-python==0.3.36"
GROUP = 64  # weights of one scale and offset; SmolLM2's width of 576 is no multiple of 128
FLAGS = "-DGGML_NATIVE=ON -DGGML_OPENMP=ON -DLLAMA_OPENSSL=OFF"
BINDINGS = f"{FLAGS} -DLLAVA_BUILD=OFF"
SERVER = f"""-G Ninja -DCMAKE_BUILD_TYPE=Release {FLAGS} -DLLAMA_BUILD_UI=OFF
    -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF"""


def call(*command: str | Path, **environment: str) -> None:
    """Runs a command at low priority, and ends all with it if it fails."""
    words = [str(word) for word in command]
    print("+", *words, file=sys.stderr)
    environment = {**os.environ, **compilers(), **environment}
    done = subprocess.run(["nice", "-n", "10", *words], env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{words[0]} ended with {done.returncode}")


def compilers() -> dict[str, str]:
    """Flags of the compilers: llama.cpp's AMX kernels die of an illegal instruction (0.3.36)."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or "amx_tile" not in cpuinfo.read_text():
        return {}
    flags = " ".join(f"-mno-amx-{part}" for part in ("tile", "int8", "bf16"))
    return {"CFLAGS": flags, "CXXFLAGS": flags}


def venv(folder: Path) -> Path:
    """Makes an environment; returns its programs' folder."""
    if not (folder / "bin" / "pip").exists():
        call(sys.executable, "-m", "venv", folder)
    return folder / "bin"


def openvino() -> None:
    """The library, and each packaged model exported from Redwood's float weights."""
    if not OPENVINO.exists():
        call(venv(OPENVINO.parent.parent) / "pip", "install", *GENAI)
    wanted = [name for name in PACKAGED if not (EXPORTED / name).exists()]
    if not wanted:
        return
    bin_ = venv(EXPORT_VENV)
    if not (bin_ / "optimum-cli").exists():
        call(bin_ / "pip", "install", *EXPORT[:1])  # alone, so that its CPU build is kept
        call(bin_ / "pip", "install", *EXPORT, GENAI[0])
        # It comes along, does not fit this torch, and stops everything that imports it.
        call(bin_ / "pip", "uninstall", "-y", "torchvision")
    for name in wanted:
        export(bin_ / "optimum-cli", name)


def export(program: Path, name: str) -> None:
    part = EXPORTED / f"{name}.part"
    shutil.rmtree(part, ignore_errors=True)
    how = ["--task", "text-generation-with-past", "--weight-format", "int4"]
    how += ["--group-size", str(GROUP), "--ratio", "1.0"]
    call(program, "export", "openvino", "-m", resolve(name), *how, part, HF_HUB_OFFLINE="1")
    part.rename(EXPORTED / name)


def llama() -> None:
    """llama-server, out of the bindings' source package, which carries llama.cpp whole."""
    if LLAMA_SERVER.exists():
        return
    name, _, version = LLAMA.partition("==")
    folder = f"{name.replace('-', '_')}-{version}"
    sources, build = CACHE / "sdist", LLAMA_BUILD
    pip = venv(LLAMA_VENV) / "pip"
    call(pip, "download", "--no-binary", name, "--no-deps", "-d", sources, LLAMA)
    shutil.unpack_archive(sources / f"{folder}.tar.gz", CACHE, filter="data")
    call("cmake", "-S", CACHE / folder / "vendor" / "llama.cpp", "-B", build, *SERVER.split())
    call("cmake", "--build", build, "--target", "llama-server", "-j", str(os.cpu_count() or 1))


def bindings() -> None:
    """llama-cpp-python compiled for these processors, for llama_cpp.py."""
    pip = venv(LLAMA_VENV) / "pip"
    jobs = str(os.cpu_count() or 1)
    flags = {"CMAKE_ARGS": BINDINGS, "CMAKE_BUILD_PARALLEL_LEVEL": jobs}
    call(pip, "install", "-v", "--no-binary", LLAMA.partition("==")[0], LLAMA, **flags)


PEERS = {"openvino": openvino, "llama": llama, "bindings": bindings}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "peers", nargs="*", help=f"of {', '.join(PEERS)}; default: all but the last"
    )
    wanted = parser.parse_args().peers or ["openvino", "llama"]
    if unknown := set(wanted) - set(PEERS):
        parser.error(f"no peer {', '.join(unknown)}: {', '.join(PEERS)}")
    CACHE.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        PEERS[name]()


if __name__ == "__main__":
    main()
