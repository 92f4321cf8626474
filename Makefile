# make demo | test | lint | soak | bench | gpu-check
# Everything but gpu-check runs in .venv, made on first use with the versions of constraints.txt.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
PINNED := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint soak bench gpu-check clean

help:
	@sed -n '1,2p' Makefile

demo: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m fastdpo demo

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not soak" -n 2 --dist loadfile

soak: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak -n 2 --dist loadfile

bench: $(VENV)/.installed-test
	mkdir -p .benchmarks
	$(BIN)/python -m pytest benchmarks/bench_*.py --benchmark-json=.benchmarks/benchmark.json

# pyright reads the tests and benchmarks too, so it needs what they import.
lint: $(VENV)/.installed-lint $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# On the machine's own Python, which has torch with CUDA: nothing is installed.
gpu-check:
	PYTHONPATH=.:kernels/torch-ext$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m benchmarks.gpu_check

# The build tools are installed first and pinned too: an isolated build would fetch others.
$(VENV)/.installed: $(PINNED)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt hatchling editables
	$(PIP) install -c constraints.txt --no-build-isolation -e .
	touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .benchmarks
