# Everything runs in .venv, made on first use. `make demo` is the main job, `make test` the tests.
# What is installed is fixed by constraints.txt; `make lock` makes it anew.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
OLDEST = $(VENV)/transformers-oldest
OLDEST_TESTS ?= tests/engine
PEERS ?= .venv-peers
NEWEST ?= .venv-newest
LOCK ?= .venv-lock
# What `make lock` pins. It names no build, so on Linux pip takes the one with CUDA unless it is
# told where a smaller one lies.
LOCKED_TORCH ?= torch==2.13.0
# What `make newest` tests. TORCH=torch==2.13.0 spares several GB when that is at hand.
TORCH ?= torch

.PHONY: demo test lint oldest newest lock peers

demo: $(VENV)/ready
	$(BIN)/pytest suites/ --kv-policy=shotkv --ratio=0.25 || test $$? -eq 1 # it shows fails too

test: $(VENV)/ready
	$(BIN)/pytest -n 2 --durations=10

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The engine at the other end of the supported range of transformers.
oldest: $(OLDEST)/ready
	PYTHONPATH=$(OLDEST) $(BIN)/pytest -n 2 $(OLDEST_TESTS)

# All tests on the newest versions that the ranges in pyproject.toml allow, whatever is locked.
newest:
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade pip
	$(NEWEST)/bin/python -m pip install --quiet "$(TORCH)" --editable ".[dev]"
	$(NEWEST)/bin/python -m pip freeze --exclude-editable | grep -iE "^(torch|transformers|pytest)="
	$(NEWEST)/bin/pytest -n 2

# Versions only, so that any build of them and any index will do. Run it with the oldest Python
# that pyproject.toml allows: what that can install, newer ones can too.
COMPILE = CUSTOM_COMPILE_COMMAND="make lock" $(LOCK)/bin/pip-compile --quiet --upgrade \
	--strip-extras --allow-unsafe --no-emit-options --no-annotate
lock:
	$(PYTHON) -m venv --clear $(LOCK)
	$(LOCK)/bin/python -m pip install --quiet --upgrade pip
	$(LOCK)/bin/python -m pip install --quiet pip-tools
	echo "$(LOCKED_TORCH)" > $(LOCK)/torch.txt
	$(COMPILE) --extra dev --build-deps-for editable --constraint $(LOCK)/torch.txt \
		--output-file $(LOCK)/newest.txt pyproject.toml
	echo "transformers==5.0.0" | $(COMPILE) --output-file $(LOCK)/oldest.txt -
	sed "s/+[a-z0-9.]*$$//" $(LOCK)/newest.txt > constraints.txt # torch's build: 2.13.0+cpu
	cp $(LOCK)/oldest.txt constraints-oldest.txt

# What is compared with kvpress, in an environment of its own: it needs an older transformers.
peers: $(PEERS)/ready
	$(PEERS)/bin/pytest tests/peers

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip hatchling editables
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation \
		--editable ".[dev]"
	touch $@

$(OLDEST)/ready: $(VENV)/ready constraints-oldest.txt
	rm -rf $(OLDEST)
	$(BIN)/python -m pip install --quiet --target $(OLDEST) --requirement constraints-oldest.txt
	touch $@

$(PEERS)/ready: pyproject.toml
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --upgrade pip
	$(PEERS)/bin/python -m pip install --quiet "$(LOCKED_TORCH)"
	$(PEERS)/bin/python -m pip install --quiet --editable ".[kvpress]"
	touch $@
