# make run: answer a prompt with a real model. make test: lint, types, tests. make venv: the
# environment alone. make slow: the long runs on real models.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: run test venv slow lint clean

run: venv
	@$(BIN)/redwood demo

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/native/*)
	@echo "Making the environment in $(VENV) (a few minutes the first time) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Redwood needs Python 3.11 or newer (PYTHON=... chooses one)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch first and by its pin: its CPU build is chosen before anything else asks for torch.
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt torch
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt -e '.[dev]'
	@$(BIN)/python -c 'import redwood._native' 2>/dev/null || \
		echo "note: the native CPU backend was not built; it needs a C++17 compiler (docs/native.md)"
	@touch $(STAMP)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -m "not slow"

slow: venv
	$(BIN)/pytest -m slow

clean:
	rm -rf $(VENV) build dist
