# Every target makes .venv when it is missing or older than the lock file; see docs/setup.md.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-all lint format bench docs plan parity lock clean

BIN := .venv/bin
WORKERS ?= 2
WORKDIR ?= runs/quickstart
PROMPT ?= def __init__(self
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
export JAX_PLATFORMS ?= cpu
export WORKDIR PROMPT

help:  ## Show the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

setup:  ## Make .venv from the lock file (EXTRAS="gpu docs" adds to it)
	@bash launch/bootstrap.sh $(EXTRAS)

quickstart: setup  ## Pretrain a small MixCon on the standard library's text, then sample from it
	@$(BIN)/mixcon train --config experiments/quickstart.py --workdir "$$WORKDIR"
	@$(BIN)/mixcon generate --workdir "$$WORKDIR" --prompt "$$PROMPT" --temperature 0.7 --top-k 40

test: lint docs plan  ## Lint, type-check, build the documentation and run the tests
	@$(PYTEST) -m 'not slow'

test-all: lint docs plan  ## The same with slow tests, compiled as for real runs
	@XLA_FLAGS=--xla_backend_optimization_level=3 $(PYTEST)

lint: setup  ## ruff (rules and format) and mypy
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --check --quiet . && $(BIN)/mypy --no-error-summary

format: setup  ## Mend what ruff can mend
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

bench: setup  ## Time every benchmark against its baseline
	@$(BIN)/python -m tests.benchmarks

docs: setup  ## Build the documentation into site/
	@bash launch/bootstrap.sh docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir site && echo 'site/index.html is ready'

plan: setup  ## Install what compiles for GPUs that are not there, as the tests do
	@bash launch/bootstrap.sh plan

parity: setup  ## Recompute the reference outputs of the published implementations and compare
	@bash tests/parity/run.sh

lock: setup  ## Write the lock files anew (add LOCK_FLAGS=--upgrade for newer versions)
	@bash launch/lock.sh $(LOCK_FLAGS)

clean:  ## Remove what set-up and tests made; runs and prepared data stay
	@rm -rf .venv .cache .pytest_cache .ruff_cache build site *.egg-info
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
