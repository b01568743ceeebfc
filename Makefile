# Two commands: `make demo` runs the main job, `make test` checks everything. Both set up
# .venv on first use, and again only when pyproject.toml has changed.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Test workers; more than the cores there are only makes compilation slower.
JOBS   ?= auto

.PHONY: demo test lint bench format clean

demo: $(STAMP)
	$(BIN)/python -m experiments.train --config=experiments/configs/digits.py

test: lint
	$(BIN)/python -m pytest -n $(JOBS) --dist=worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m experiments.benchmarks.selection

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "sparseopt_jax needs Python 3.11 or later; $(PYTHON) is" \
	    "$$($(PYTHON) -V 2>&1). Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[experiments,test]'
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
