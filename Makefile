# make run: answer a prompt with a real model. make test: lint, types, tests. make venv: the
# environment alone. make native-check: the C++ code alone, under sanitizers. make slow: the long
# runs on real models. make digests: whether this machine says bit for bit what all others say
# (WRITE=1: write down what it says). make bench: the table beside peers, which it fetches and
# builds (hours).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: run test venv slow lint native-check digests bench clean

run: venv
	@$(BIN)/redwood demo

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/native/*)
	@echo "Making the environment in $(VENV) (a few minutes the first time) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Redwood needs Python 3.11 or newer (PYTHON=... chooses one)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch first and by its pin: its CPU build is chosen before anything else asks for torch.
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt torch nanobind scikit-build-core
	@# Builds in this environment where CMake is here: pip's own would compile all anew every time.
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt \
		$(if $(shell command -v cmake),--no-build-isolation) -e '.[dev]'
	@$(BIN)/python -c 'import redwood._native' 2>/dev/null || \
		echo "note: the native CPU backend was not built; it needs a C++17 compiler (docs/native.md)"
	@touch $(STAMP)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint native-check
	@# Two at a time, with one thread of torch each: threads that wait for each other cost more.
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow"

native-check:
	@command -v $(CXX) >/dev/null || { echo "native-check: no C++ compiler ($(CXX)); skipped"; exit 0; }; \
		$(MAKE) --no-print-directory -C tests/native -j2

digests: venv
	$(BIN)/python tests/digests.py $(if $(WRITE),--write)

slow: venv
	$(BIN)/pytest -m slow

SPECBENCH ?=
LIMIT ?= 6
SETS := humaneval mtbench editing $(if $(SPECBENCH),specbench)

# Stops at what fails, not at a run that something else disturbed (status 3).
bench: venv
	$(BIN)/python benchmarks/peers/build.py
	@for pair in smollm2 qwen; do for set in $(SETS); do for t in 0 0.6; do \
		$(BIN)/python benchmarks/compare.py --pair $$pair --set $$set --temperature $$t --limit $(LIMIT) \
			$$(test $$set != specbench || echo --prompts $(SPECBENCH)) \
			--json benchmarks/results/compare_$${pair}_$${set}_$$t.json || test $$? = 3 || exit 1; \
	done; done; done
	$(BIN)/python benchmarks/compare.py --show benchmarks/results/compare_*.json

clean:
	rm -rf $(VENV) build dist
