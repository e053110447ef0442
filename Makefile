# memjax: each target installs what it needs into .venv and runs alone.
#   make quickstart           train, resume, evaluate and sample a small model (under 6 minutes)
#   make test                 the test suite;  make test-all adds the slow checks
#   make lint                 ruff;  make bench the benchmarks
# PYTHON chooses the interpreter (3.11 or newer): make test PYTHON=python3.12

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
# One environment an interpreter, so that changing PYTHON never mixes two.
VENV := .venv/$(VERSION)
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
export JAX_PLATFORMS ?= cpu
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: quickstart quickstart-smoke test test-all lint bench clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.user
	$(RUN) experiments/quickstart.py --config=configs/quickstart.py

quickstart-smoke: $(VENV)/.user
	$(RUN) experiments/quickstart.py --config=configs/quickstart.py:smoke

# Workers share compiled programs through .cache/jax.
PYTEST := -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal

test: $(VENV)/.dev
	$(RUN) $(PYTEST)

test-all: $(VENV)/.dev
	$(RUN) $(PYTEST) -m ''

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: $(VENV)/.dev
	$(RUN) experiments/benchmarks/neural_memory.py
	$(RUN) experiments/benchmarks/length.py
	$(RUN) experiments/benchmarks/decode.py
	$(RUN) experiments/benchmarks/rules.py

clean:
	rm -rf .venv .cache build *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'memjax needs Python 3.11 or newer, and PYTHON=$(PYTHON) is $(VERSION):' \
	         'try make PYTHON=python3.12'; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.user: pyproject.toml | $(VENV)/bin/python
	$(PIP) install --quiet --editable '.[plot]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(PIP) install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.user
