# make demo | test | test-all | lint | prove | tables | wheel | venv-optimum | clean          docs/install.md has the same as plain commands
#
# VENV=dir          where the virtual environment lies
# PYTHON=python3.12 which Python 3.11-3.13 makes it
# TORCH_INDEX=URL   where torch comes from: auto (the vendor's CPU index where it answers), pypi, or an index URL
# OUT=dir           where the demo writes

PYTHON ?= python3
VENV ?= .venv
OUT ?= out
TORCH_INSTALL ?= torch==2.13.0
TORCH_INDEX ?= auto
PYTEST_ARGS ?=
# two processes, each with the tests of whole files, so that a file's fixtures are made once
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist loadfile

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DIFFSHIP := $(BIN)/diffship

OPTIMUM ?= $(VENV)-optimum

.PHONY: demo test test-all lint prove tables wheel clean venv-optimum
.DELETE_ON_ERROR:

demo: $(VENV)/.runs
	$(DIFFSHIP) export emoji --to onnx -o $(OUT)/emoji --overwrite
	$(DIFFSHIP) verify $(OUT)/emoji
	$(DIFFSHIP) run $(OUT)/emoji --prompts-file docs/demo-prompts.txt --steps 25 --guidance 4 --seed 1 -o $(OUT)/pictures --grid $(OUT)/grid.png --overwrite
	@echo "The bundle lies in $(OUT)/emoji, the pictures in $(OUT)/pictures, the grid in $(OUT)/grid.png"

test: $(VENV)/.tests
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow" $(PYTEST_ARGS)

test-all: $(VENV)/.tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

prove: $(VENV)/.tests
	DIFFSHIP_PROVE=1 $(BIN)/python -m pytest -m "proof" $(PYTEST_ARGS)

lint: $(VENV)/.tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The tables of README and docs, from benchmarks/results/*.json alone.
tables: $(VENV)/.runs
	$(BIN)/python -m diffship.benchmarks.publish

# optimum pins an older transformers: the client that our bundles must satisfy has an environment of its own.
venv-optimum: $(OPTIMUM)/.made

$(OPTIMUM)/.made: $(VENV)/.made
	$(PYTHON) -m venv $(OPTIMUM)
	$(OPTIMUM)/bin/python -m pip install $$($(PYTHON) scripts/torch_index.py "$(TORCH_INDEX)") "$(TORCH_INSTALL)"
	$(OPTIMUM)/bin/python -m pip install "optimum-onnx[onnxruntime]==0.1.0" diffusers==0.36.0 transformers==4.57.3 accelerate
	touch $@

wheel: $(VENV)/.runs
	$(PIP) wheel --no-deps -w dist .

$(VENV)/.made:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"Python {v[0]}.{v[1]} is not 3.11 to 3.13; use make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.torch: $(VENV)/.made
	$(PIP) install $$($(PYTHON) scripts/torch_index.py "$(TORCH_INDEX)") "$(TORCH_INSTALL)"
	touch $@

$(VENV)/.runs: $(VENV)/.torch pyproject.toml
	$(PIP) install -e '.[torch,onnx,onnxruntime]'
	touch $@

$(VENV)/.tests: $(VENV)/.runs pyproject.toml
	$(PIP) install -e '.[dev]'
	touch $@

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache
