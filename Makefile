# Both `make demo` and `make test` set up everything they need on a machine with Python 3.10+, git, make and gcc.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROMPT ?= Read up to

.PHONY: help setup demo test slow lint bench clean

help:
	@echo "make demo   the embedded model, stock and optimised in one run"
	@echo "make test   the tests (make slow: the long ones too)"
	@echo "make lint   ruff and mypy"
	@echo "make bench  the table of the README, measured on this machine"

setup: $(STAMP)

# The stamp holds as long as the dependencies do; the package itself is installed editable.
# torch comes first and pinned: left to the dependencies of the package, pip takes the newest torch, which on Linux is a
# CUDA build of several GB, and passes over the CPU build that the configured index or find-links folder offers.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

demo: $(STAMP)
	$(BIN)/python scripts/run.py --compare --greedy --dtype float32 --prompt "$(PROMPT)"

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" --durations=40

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python scripts/bench.py --json bench.json

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
