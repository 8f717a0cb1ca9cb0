# Every target sets up .venv once; a second call starts at once.
#   make PYTHON=python3.12        another interpreter
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help docs schema demo test test-compiled test-fidelity fuzz test-weights format lint check bench gpu-check gpu-train study sweep photographs leaderboard pictures screenshot verify cards

demo: $(VENV)/.installed  ## measure the two bundled tokenizers on the bundled photographs
	$(BIN)/tokbench run --models ssdd,klvae --res 256

help:  ## what can be made
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

test: $(VENV)/.installed  ## all tests that need neither network nor GPU nor minutes of torch.compile
	$(BIN)/python -m pytest -n 2

test-compiled: $(VENV)/.installed  ## tests that wait for torch.compile
	$(BIN)/python -m pytest -m compiled

test-fidelity: $(VENV)/.installed  ## run, score and generate against torch-fidelity on 2,300 images: half an hour
	$(BIN)/python -m pytest -m fidelity

SECONDS := 300
fuzz: $(VENV)/.installed  ## damaged files for every reader: SECONDS=300
	$(BIN)/python -m tests.fuzz $(SECONDS)

test-weights: $(VENV)/.installed  ## tests with published weights; needs the network
	$(BIN)/python -m pytest -m weights

format: $(VENV)/.installed  ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: $(VENV)/.installed  ## ruff and mypy, as CI and pre-commit run them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Our own use of `tokbench check`: the demo weights, and rows that no model can change, against results/. Weights and
# seeds are fixed, so only rounding may differ between machines. LPIPS is left out where its network cannot be had.
CHECKED := identity,jpeg-q10,klvae,ssdd
check: $(VENV)/.installed  ## our own results against results/
	metrics=psnr,ssim; if $(BIN)/tokbench weights fetch lpips-alex; then metrics=$$metrics,lpips-alex; fi; \
	$(BIN)/tokbench run --fresh --models $(CHECKED) --res 128,256 --metrics $$metrics --save-images 0 --out runs/check && \
	$(BIN)/tokbench check runs/check --against results --metrics $$metrics --two-sided --strict \
	  --tolerance psnr=0.002,ssim=0.0002,lpips-alex=0.0005 && \
	for res in 128 256; do \
	  $(BIN)/tokbench check runs/check/adm/samples-$$res/identity.json --against results --metrics $$metrics --exact || exit; \
	done

# Fetches published tokenizers and writes down which work: make verify MODELS=a,b VERIFY="--max-size 1 --data DIR"
verify: $(VENV)/.installed  ## which published tokenizers work with their files
	$(BIN)/python -m baselines.verify --models "$(MODELS)" $(VERIFY)

cards: $(VENV)/.installed  ## docs/tokenizers/ from the tables of facts
	$(BIN)/python -m baselines.cards

bench: $(VENV)/.installed  ## our speed beside other software's
	$(BIN)/python -m tests.bench_pipeline
	$(BIN)/python -m tests.bench_metrics
	$(BIN)/python -m tests.bench_report
	$(BIN)/python -m tests.bench_data
	$(BIN)/python -m tests.bench_tiles
	$(BIN)/python -m tests.bench_ssdd
	$(BIN)/python -m tests.bench_train

# Everything that needs CUDA. PYTHON=python3 runs it from the checkout alone, without an environment of its own.
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu-check:  ## 8 minutes of a GPU: decodes, speed, kernels, attention, tests
	$(GPU_PYTHON) -m tests.gpu_check

gpu-train:  ## 20 minutes of a GPU: demo weights of two latents, a short study: TRAIN=FOLDER
	$(GPU_PYTHON) -m tests.gpu_train --train $(TRAIN)

# After a field of a record has changed; a test fails where this was forgotten.
schema: $(VENV)/.installed  ## docs/schema
	$(BIN)/python -m tokbench.sharing.schema docs/schema

# Commands of the tutorials run while it is built, in build/docs; their real output is what is shown.
docs: $(VENV)/.installed  ## the documentation site, into build/site
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	rm -rf build/docs && mkdir -p build/docs
	PATH="$(CURDIR)/$(BIN):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

PRESET ?= cpu
study: $(VENV)/.installed  ## the study: PRESET=cpu|gpu TRAIN=FOLDER
	$(BIN)/python -m results.study.run --preset $(PRESET) --train $(TRAIN)

sweep: $(VENV)/.installed  ## both decoders on four latents: PRESET=cpu|gpu TRAIN=FOLDER
	$(BIN)/python -m results.sweep.run --preset $(PRESET) --train $(TRAIN)

photographs: $(VENV)/.installed  ## photographs to train on, out of Debian's packages: OUT=FOLDER BESIDE=FOLDER
	$(BIN)/python -m results.photographs.build $(OUT) $(if $(BESIDE),--beside $(BESIDE))

# Beside the records, where the page looks. PNG: every program reads it.
PICTURED := ssdd,klvae,taef2,jpeg-q30,bicubic-f8
pictures: $(VENV)/.installed  ## the first eight samples, for the page of results/
	$(BIN)/tokbench run --fresh --models $(PICTURED) --res 256 --limit 8 --metrics psnr --save-images 8 --out runs/pictures
	rm -rf results/adm/samples-256/*.images
	cp -r runs/pictures/adm/samples-8-256/*.images results/adm/samples-256/

screenshot: $(VENV)/.installed  ## docs/page.png, by the test that looks at the page of results/
	$(BIN)/python -m pytest -q tests/report/test_page.py -k our_own_results
	cp build/page.png docs/page.png

# After results/ has changed; a test fails where this was forgotten.
leaderboard: $(VENV)/.installed  ## tables and plots of results/
	$(BIN)/tokbench report --results results --format markdown --out results/LEADERBOARD.md --plots results/plots
	$(BIN)/tokbench report --results results --format csv --out results/leaderboard.csv

# torch and torchvision first and alone, so that pip settles on a pair that belongs together.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch torchvision
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@
