# Everything runs in .venv, made on first use. `make demo` is the main job, `make test` the tests.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN = $(VENV)/bin
OLDEST = $(VENV)/transformers-oldest
PEERS ?= .venv-peers

.PHONY: demo test lint oldest peers

demo: $(VENV)/ready
	$(BIN)/pytest suites/ --kv-policy=shotkv --ratio=0.25 || test $$? -eq 1 # it shows fails too

test: $(VENV)/ready
	$(BIN)/pytest -n 2 --durations=10

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The engine at the other end of the supported range; the newest is what `make test` runs.
oldest: $(OLDEST)/ready
	PYTHONPATH=$(OLDEST) $(BIN)/pytest -n 2 tests/engine

# What is compared with kvpress, in an environment of its own: it needs an older transformers.
peers: $(PEERS)/ready
	$(PEERS)/bin/pytest tests/peers

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

$(OLDEST)/ready: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --target $(OLDEST) transformers==5.0.0
	touch $@

$(PEERS)/ready: pyproject.toml
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --upgrade pip
	$(PEERS)/bin/python -m pip install --quiet $(TORCH)
	$(PEERS)/bin/python -m pip install --quiet --editable ".[kvpress]"
	touch $@
