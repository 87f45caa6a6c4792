# Everything from a fresh clone: `make quickstart` and `make test`. Needs python3 >= 3.11 and nothing else.
#   make setup PYTHON=python3.12                                            another interpreter
#   make setup PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cu126"   another CUDA build

PYTHON ?= python3
PIP_ARGS ?=
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.lensmini-setup
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: help setup quickstart test test-slow lint format bench ablations docs peers clean

help:
	@echo "make setup       create $(VENV) and install the package with its extras"
	@echo "make quickstart  train a tiny Lens from scratch and look at its pictures (about 8 minutes)"
	@echo "make test        tests and doctests (minutes, no GPU, no download)"
	@echo "make test-slow   the tests marked slow"
	@echo "make lint        ruff and pyright"
	@echo "make format      let ruff format and fix"
	@echo "make bench       speed against peers"
	@echo "make ablations   every study of the miniature, hours; goes on after any stop"
	@echo "make docs        the documentation as a site, site/docs"
	@echo "make peers       create .venv-peers for two benchmarks (6 GB: streaming's pins clash with ours)"

setup: $(STAMP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lensmini needs Python >= 3.11; use make setup PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install $(PIP_ARGS) -c constraints.txt -e ".[dev,data,diffusers,endpoints,lora,ray,xformers]"
	@touch $@

quickstart: setup
	$(BIN)/python -m experiments.quickstart

test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# pytest exits with 5 when it selects no test, which is no failure here.
test-slow: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m slow || [ $$? -eq 5 ]

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pyright

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	$(BIN)/python -m benchmarks.block
	$(BIN)/python -m benchmarks.packing
	$(BIN)/python -m benchmarks.plan_build
	$(BIN)/python -m benchmarks.plan_assign
	$(BIN)/python -m benchmarks.plan_seek
	$(BIN)/python -m benchmarks.plan_balance
	$(BIN)/python -m benchmarks.plan_resume
	$(BIN)/python -m benchmarks.shards
	$(BIN)/python -m benchmarks.filters
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.generate_cpu
	$(BIN)/python -m benchmarks.generate_gpu
	$(BIN)/python -m benchmarks.profile_generate

ablations: setup
	$(BIN)/python -m experiments.ablations.all

docs: setup
	$(BIN)/python -m mkdocs build --strict --quiet

peers: setup
	$(BIN)/python -m venv .venv-peers
	.venv-peers/bin/python -m pip install --disable-pip-version-check -q mosaicml-streaming==0.13.0 webdataset==1.0.2

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis dist build
