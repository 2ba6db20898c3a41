"""The versions that the tests run with: written for pip, from pyproject.toml or an environment.

python tools/versions.py oldest          # every requirement at its lower bound
python tools/versions.py torch           # torch alone, as constraints.txt has it
ENVIRONMENT/bin/python tools/versions.py lock > constraints.txt
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
_HEADER = (
    "# Versions that the tests last passed with; `make lock` writes them, `make venv` obeys.\n"
)
_NOT_LOCKED = {"pip", "redwood", "setuptools", "wheel"}
_NOT_IN_DEV = {"ray"}


def requirements() -> list[str]:
    """Returns all requirements of pyproject.toml that `make venv` installs, to build and to run."""
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = [*stated["build-system"]["requires"], *stated["project"]["dependencies"]]
    for extra, names in stated["project"]["optional-dependencies"].items():
        found += names if extra not in _NOT_IN_DEV else []
    return sorted({name for name in found if not name.startswith("redwood[")})


def torch() -> list[str]:
    """Returns the line of constraints.txt that chooses the build of PyTorch."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line.startswith("torch==")]


def oldest() -> list[str]:
    """Returns every requirement at its lower bound. PyTorch stays: its builds are large."""
    bounds = [
        re.sub(r"(\[.*?\])?>=([^,]+).*", r"==\2", requirement)
        for requirement in requirements()
        if not requirement.startswith("torch>=")
    ]
    return [*bounds, *torch()]


def locked() -> list[str]:
    """Returns what this environment holds. NOTE: torch 2.13.0+cpu is 2.13.0 on other machines."""
    held = {each.metadata["Name"]: each.version.partition("+")[0] for each in distributions()}
    names = sorted(set(held) - _NOT_LOCKED, key=str.lower)
    return [f"{name}=={held[name]}" for name in names]


def main() -> None:
    """Prints what is asked for."""
    made = {"oldest": oldest, "torch": torch, "lock": locked}
    if len(sys.argv) != 2 or sys.argv[1] not in made:
        sys.exit(f"error: one of {', '.join(made)} is needed")
    header = _HEADER if sys.argv[1] == "lock" else ""
    print(header + "\n".join(made[sys.argv[1]]()))


if __name__ == "__main__":
    main()
