# Everything runs in ./.venv, which `make install` (and so every other target) makes.
# Needs Python 3.11 or newer and make; nothing else, and no root.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
# torch runs as many threads as there are cores by default; two test processes would fight for them.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help install install-bench demo check format test test-long spec-coverage clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

install: $(STAMP) ## make .venv with everything needed to run and test

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is older than 3.11. Run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { echo "error: $(PYTHON) cannot make a virtual environment. On Debian: apt install python3-venv" >&2; exit 1; }
	$(PIP) install --quiet --constraint constraints.txt pip
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable '.[all,dev]'
	@touch $@

install-bench: $(STAMP) ## add the peers that benchmarks/ measures against
	$(PIP) install --quiet --constraint constraints.txt --editable '.[all,dev,bench]'

demo: $(STAMP) ## train a small adapter through the whole fleet, with live progress
	@$(BIN)/llamahome demo --state .llamahome

check: $(STAMP) ## format, lint, types, import contracts, fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python docs/spec_coverage.py --check
	$(PYTEST) -q -n 2 -m 'not fleet and not model and not long and not gpu'

format: $(STAMP) ## rewrite the sources in the house format
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format --quiet .

test: $(STAMP) ## every test, in small doses (under 15 minutes on 2 cores)
	$(PYTEST) -n 2 --dist loadgroup -m 'not long and not gpu'

test-long: $(STAMP) ## every test, in full doses
	$(PYTEST) -n 2 --dist loadgroup -m 'not gpu'

spec-coverage: $(STAMP) ## write docs/spec_coverage.md from the tests
	$(BIN)/python docs/spec_coverage.py

clean: ## remove what the demo and the tests left in this folder (not .venv)
	rm -rf .llamahome .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
