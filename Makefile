# Every target sets up .venv once; a second call starts at once.
#   make PYTHON=python3.12        another interpreter
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-weights lint bench

demo: $(VENV)/.installed
	$(BIN)/tokbench run --models ssdd,klvae --res 256

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2

test-weights: $(VENV)/.installed
	$(BIN)/python -m pytest -m weights

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m tests.bench_pipeline
	$(BIN)/python -m tests.bench_data

# torch and torchvision first and alone, so that pip settles on a pair that belongs together.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch torchvision
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@
