# Two commands: `make demo` runs the main job, `make test` checks everything. Both set up .venv
# with what they need on first use, and again only when pyproject.toml has changed. Another Python
# goes into a folder of its own: make test PYTHON=python3.13 VENV=.venv-3.13
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RUN    := $(VENV)/.installed-experiments
LEAN   := $(VENV)/.installed-library
CHECK  := $(VENV)/.installed-test
SITE   := $(VENV)/.installed-docs
# The TPU compiler that this jax asks for, as its extra `tpu` has it, e.g. libtpu==0.0.42.*
LIBTPU := $(BIN)/python -c 'import importlib.metadata as m; \
  print(next(r for r in m.requires("jax") if r.startswith("libtpu")).split(";")[0])'
# Test workers; more than the cores there are only makes compilation slower.
JOBS   ?= auto
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist=worksteal
# What tests the library alone, by what it imports: see tests/conftest.py.
OF_LIBRARY := --library tests sparseopt_jax
NEWEST  = $(shell $(PYTHON) .ci/newest_python.py)
# Where `make bench` keeps its results until all are there: the tree stays that of a commit.
BENCH  := bench.jsonl

.PHONY: demo test test-library test-fast test-newest lint bench format docs clean

demo: $(RUN)
	$(BIN)/python -m experiments.demo

test: lint
	$(PYTEST)

test-library: $(LEAN)
	$(PYTEST) $(OF_LIBRARY)

# For the loop of a contributor, some two minutes on two cores: without what tries the same with all
# of optax's optimizers, in every framework and on eight devices, and without the wheel.
SLOW := optimizer* framework* shard* wheel
test-fast: $(LEAN)
	$(PYTEST) $(OF_LIBRARY) $(SLOW:%=--ignore-glob='*/test_%.py')

# On the newest Python of this machine, where that is newer than the one of the other targets.
test-newest:
	@newest='$(NEWEST)'; if [ -n "$$newest" ]; then \
	  $(MAKE) test-library PYTHON="$$newest" VENV=.venv-newest; \
	else echo "test-newest: skipped, no Python here is newer than $$($(PYTHON) -V 2>&1)"; fi

lint: $(CHECK)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(CHECK)
	$(BIN)/python -m experiments.benchmarks.selection --json=$(BENCH)
	$(BIN)/python -m experiments.benchmarks.bcsr --json=$(BENCH)
	$(BIN)/python -m experiments.benchmarks.removal --json=$(BENCH)
	$(BIN)/python -m experiments.benchmarks.topology_update --json=$(BENCH)
	$(BIN)/python -m experiments.benchmarks.keep_top_k --json=$(BENCH)
	$(BIN)/python -m experiments.benchmarks.structures --json=$(BENCH)
	$(BIN)/python -m experiments.benchmarks.update_bytes --json=$(BENCH)
	$(BIN)/python -m experiments.benchmarks.step_time --json=$(BENCH)
	$(BIN)/python -m experiments.benchmarks.convolution --json=$(BENCH)
	$(BIN)/python -m experiments.benchmarks.memory --json=$(BENCH)
	$(BIN)/python -m experiments.benchmarks.host --json=$(BENCH)
	$(BIN)/python -m experiments.benchmarks.input_pipeline --json=$(BENCH)
	cat $(BENCH) >> experiments/results/benchmarks.jsonl && rm $(BENCH)
	$(BIN)/python -m experiments.benchmarks.page

format: $(CHECK)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Without a network once installed. Sphinx reads the top folder, so that a page's links to files of
# the repository hold here too; what a link does not find is an error.
docs: $(SITE)
	$(BIN)/python -m sphinx -W --keep-going -n -q -c docs . docs/_build
	@echo docs/_build/index.html

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "sparseopt_jax needs Python 3.11 or later; $(PYTHON) is" \
	    "$$($(PYTHON) -V 2>&1). Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(RUN): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[experiments]'
	@touch $@

$(SITE): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@

# flax, and what the tests compare with: nothing that trains on data.
$(LEAN): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[models,test]'
	@touch $@

# TensorFlow is among it: the tests prepare datasets, and the benchmark compares with tf.data. The
# TPU compiler goes into a folder of its own: where jax finds it, it looks for a TPU at every start.
$(CHECK): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[experiments,prepare,test]'
	case "$$(uname -sm)" in "Linux x86_64") $(BIN)/python -m pip install --quiet --no-deps \
	  --upgrade --target $(VENV)/tpu "$$($(LIBTPU))";; esac
	@touch $@ $(RUN) $(LEAN)

clean:
	rm -rf $(VENV) .venv-newest docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis
