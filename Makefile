# Every target sets up .venv once; a second call starts at once.
#   make PYTHON=python3.12        another interpreter
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-weights lint bench leaderboard

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
	$(BIN)/python -m tests.bench_report
	$(BIN)/python -m tests.bench_data

# After results/ has changed; a test fails where this was forgotten.
leaderboard: $(VENV)/.installed
	$(BIN)/tokbench report --format markdown --out results/LEADERBOARD.md --plots results/plots
	$(BIN)/tokbench report --format csv --out results/leaderboard.csv

# torch and torchvision first and alone, so that pip settles on a pair that belongs together.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch torchvision
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@
