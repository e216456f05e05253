# Every target sets up what it needs. A fresh machine wants make and Python 3.11 or newer, with venv.

PYTHON ?= python3
VENV ?= .venv
# Tests side by side; many of them run several ranks of their own, with one thread each.
WORKERS ?= 2
# Passed on: make train ARGS="--steps 50", make test ARGS="-k ring".
ARGS ?=

BIN := $(abspath $(VENV))/bin

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help train test lint style typecheck format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

train: $(VENV)/.installed-hf ## Train a small model on 2 ranks and verify its first step against an unsharded one
	$(BIN)/seqpar train --nproc 2 --verify $(ARGS)

test: $(VENV)/.installed-dev ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(WORKERS) --dist worksteal $(ARGS)

lint: style typecheck ## Check style, formatting and types

style: $(VENV)/.installed-dev ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# In the checkout seqpar.comm does not resolve, so the checker reads an unpacked wheel.
typecheck: $(VENV)/.installed-dev ## Check types
	rm -rf build
	$(BIN)/pip wheel -qq --no-deps --no-build-isolation --wheel-dir build/wheel .
	$(BIN)/python -m zipfile --extract build/wheel/*.whl build/typecheck
	cd build/typecheck && $(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache --package seqpar

format: $(VENV)/.installed-dev ## Format the code and mend what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

# A stamp for each extra, so that training does not wait for the developers' tools.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq --constraint constraints.txt --editable '.[$*]'
	touch $@
