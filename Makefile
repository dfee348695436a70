# Both `make demo` and `make test` set up everything they need on a machine with Python 3.10+, git, make and gcc.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROMPT ?= Read up to

# Releases of transformers, besides the newest one, that the host suite runs on; the last of 4.x is the oldest that works.
HOSTS ?= 5.23.0 4.57.6
# What depends on the release: names and roles, loops, modes of generate, families. Releases that do not exist yet are made
# from the newest one by `make test`, from these by `make tomorrow`.
HOST_TESTS := tests/test_host.py tests/test_generation_proof.py tests/test_generation_modes.py tests/test_step.py \
	tests/test_optimize.py tests/test_modules_rotary.py tests/test_modules_moe.py tests/test_chat.py \
	tests/test_generation_devices.py tests/test_generation_text.py tests/test_generation_streams.py

# Tests run in two processes at a time, but for those that begin processes of their own beside all others. In the order of
# their names files of ranks, which wait for each other on all cores, are apart.
ASKING := tests/test_tomorrow.py tests/test_other_machines.py
BESIDE := --numprocesses=2 $(ASKING:%=--ignore=%)

.PHONY: help setup demo test slow hosts tomorrow lint package bench clean

help:
	@echo "make demo   the embedded model, stock and optimised in one run"
	@echo "make test   the tests (make slow: the long ones too)"
	@echo "make hosts  the host suite on other releases of transformers (HOSTS='5.23.0 4.57.6')"
	@echo "make tomorrow  releases that do not exist yet, made from those"
	@echo "make lint   ruff and mypy"
	@echo "make package  wheel and sdist, checked, installed into a bare environment and used"
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
	$(BIN)/python -m pytest -m "not slow" $(BESIDE) --dist=loadfile --no-loadscope-reorder --durations=40
	$(BIN)/python -m pytest -m "not slow" $(ASKING)

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow $(BESIDE) --dist=worksteal --durations=40
	$(BIN)/python -m pytest -m slow $(ASKING)

# An environment of its own, which takes all but transformers (and what that release needs otherwise) from the first one.
$(VENV)/hosts/%/.installed: $(STAMP)
	$(PYTHON) -m venv $(@D)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/first.pth
	$(@D)/bin/python -m pip install --quiet transformers==$*
	@touch $@

.PRECIOUS: $(VENV)/hosts/%/.installed

host-%: $(VENV)/hosts/%/.installed
	$(VENV)/hosts/$*/bin/python -c 'import transformers; print("transformers", transformers.__version__)'
	$(VENV)/hosts/$*/bin/python -m pytest -m "not slow" $(HOST_TESTS)

hosts: $(HOSTS:%=host-%)

tomorrow-%: $(VENV)/hosts/%/.installed
	$(VENV)/hosts/$*/bin/python -m pytest tests/test_tomorrow.py

tomorrow: $(HOSTS:%=tomorrow-%)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Without git, make and a compiler in reach, and outside of this folder: what a user has.
package: $(STAMP)
	rm -rf dist build $(VENV)/bare
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	$(PYTHON) -m venv $(VENV)/bare
	$(VENV)/bare/bin/python -m pip install --quiet torch==2.13.0 dist/*.whl
	cd $(VENV)/bare && PATH=$$PWD/bin HF_HUB_OFFLINE=1 python -P $(CURDIR)/tests/installed.py

bench: $(STAMP)
	$(BIN)/python scripts/bench.py --json bench.json

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
