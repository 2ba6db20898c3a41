# make run: answer a prompt with a real model. make test: lint, types, tests. make venv: the
# environment alone. make native-check: the C++ code alone, under sanitizers. make slow: the long
# runs on real models. make smoke: every dtype, kind of weights and backend on real models, first of
# all on a new machine (FULL=1: every pair of them, and the 1.5B; JSON=FILE: the rows as a file, too).
# make digests: whether this machine says bit for bit what all others say (WRITE=1: write down what
# it says). make bench: the table beside peers, which it fetches and builds (hours). make dist: wheel
# and sdist, in dist/. make dist-check: both installed where nothing is, answering. make test-newest,
# make test-oldest: what touches other packages, with the newest
# versions of them and at the lower bounds of pyproject.toml. make lock: writes constraints.txt from
# the environment in FROM, in which the tests have passed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: run test venv slow smoke lint native-check digests bench clean dist dist-check lock test-newest test-oldest

NEW_ENOUGH = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "error: Redwood needs Python 3.11 or newer (PYTHON=... chooses one)"; exit 1; }

run: venv
	@$(BIN)/redwood demo

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/native/*)
	@echo "Making the environment in $(VENV) (a few minutes the first time) ..."
	@$(NEW_ENOUGH)
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
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -rfEs -m "not slow"

# Environments of their own, with the other packages as they are today (renewed once a day), or as
# old as pyproject.toml allows. PyTorch is that of constraints.txt in both: see tools/versions.py.
SURFACE := tests/test_transformers.py tests/test_versions.py tests/hf/test_hf*.py tests/backends/test_load.py \
	tests/backends/test_backends.py tests/backends/test_eager_hybrids.py tests/backends/test_parallel.py tests/backends/test_cuda_graph.py tests/backends/test_native.py \
	tests/models/test_models.py tests/models/test_gguf.py tests/backends/test_offload.py \
	tests/datastore/test_datastore.py tests/bench/test_plotting.py tests/sampling/test_sampling.py tests/cli/test_cli.py \
	tests/server/test_server_api.py tests/server/test_server_real.py tests/server/test_server_grammar.py \
	tests/server/test_server_document.py tests/server/test_server_clients.py tests/tuning/test_tuning.py tests/server/test_page.py
TODAY := $(shell date +%F)

test-newest: .venv-newest/.installed-$(TODAY)
test-oldest: .venv-oldest/.installed
test-newest test-oldest: test-%:
	.venv-$*/bin/python tools/versions.py lock > .venv-$*/versions.txt
	OMP_NUM_THREADS=1 .venv-$*/bin/pytest -n 2 -rfEs -m "not slow" $(SURFACE)
	@echo "passed with: $$(grep -iE '^($(SHOWN))==' .venv-$*/versions.txt | tr '\n' ' ')"

SHOWN := transformers|tokenizers|huggingface_hub|numpy|safetensors|gguf|fastapi|starlette|pydantic|openai|typer

.venv-newest/.installed-$(TODAY): NAMES = torch
.venv-newest/.installed-$(TODAY): UPGRADE = --upgrade --upgrade-strategy eager
.venv-oldest/.installed: NAMES = oldest
.venv-newest/.installed-$(TODAY) .venv-oldest/.installed: pyproject.toml constraints.txt \
		tools/versions.py CMakeLists.txt $(wildcard src/native/*)
	@echo "Making the environment in $(@D) (a few minutes) ..."
	@$(NEW_ENOUGH)
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@rm -f $(@D)/.installed*
	@$(@D)/bin/python tools/versions.py $(NAMES) > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install -q $(UPGRADE) -c $(@D)/constraints.txt \
		torch nanobind scikit-build-core
	$(@D)/bin/python -m pip install -q $(UPGRADE) -c $(@D)/constraints.txt -C build-dir=build/$(@D) \
		$(if $(shell command -v cmake),--no-build-isolation) -e '.[dev]'
	@touch $@

dist: venv
	@rm -rf dist
	$(BIN)/python -m build -o dist .

CHECK := .venv-dist

dist-check: dist
	@for made in dist/redwood-*.whl dist/redwood-*.tar.gz; do \
		rm -rf $(CHECK) && $(PYTHON) -m venv $(CHECK) && \
		$(CHECK)/bin/python -m pip install -q -c constraints.txt torch && \
		$(CHECK)/bin/python -m pip install -q -c constraints.txt $$made && \
		(cd $(CHECK) && bin/redwood generate --target smollm2-135m-instruct --drafter ngram \
			--backend native --max-tokens 16 "Name three trees.") && echo "$$made answers" || exit 1; \
	done; rm -rf $(CHECK)

FROM ?= $(VENV)

lock:
	@$(FROM)/bin/python tools/versions.py lock > constraints.txt.new
	@mv constraints.txt.new constraints.txt
	@git --no-pager diff --stat constraints.txt 2>/dev/null || true

native-check:
	@command -v $(CXX) >/dev/null || { echo "native-check: no C++ compiler ($(CXX)); skipped"; exit 0; }; \
		$(MAKE) --no-print-directory -C tests/native -j2

digests: venv
	$(BIN)/python tests/digests.py $(if $(WRITE),--write)

slow: venv
	$(BIN)/pytest -m slow

smoke: venv
	@$(BIN)/python benchmarks/smoke.py $(if $(FULL),--full) $(if $(JSON),--json $(JSON))

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
	rm -rf $(VENV) .venv-newest .venv-oldest $(CHECK) build dist
