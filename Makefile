# make          install into .venv, then run the main job (the same as `make demo`)
# make test     install, lint, type-check, run every test but the studies
# make lint     install, lint and type-check
# make docs     install, build the docs into build/docs; a warning is an error
# make studies  install, run every study of simulations/ with --quick, and every notebook at its smoke setting
# make notebooks   install, open the notebooks in JupyterLab
# make keys     write the config keys into pyproject.toml, after one was added
# make clean    remove .venv, caches and build leftovers; run folders stay
#
# PYTHON=... chooses the interpreter (3.11 or newer). pip's own settings and PIP_* variables hold:
# where they offer a CPU build of torch, that one is taken.

VENV := .venv
BIN := $(VENV)/bin
LAB := $(VENV)/lab
READY := $(VENV)/.ready
WORKERS ?= 3

# Nothing here phones home or needs an account or a model hub.
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1
export RAY_USAGE_STATS_ENABLED = 0
export HF_HUB_DISABLE_TELEMETRY = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# One thread in every process: results depend on the number, and the processes share the cores.
export OMP_NUM_THREADS = 1

PIP := $(BIN)/python -m pip install -qq --constraint constraints.txt --no-build-isolation

.DEFAULT_GOAL := demo
.PHONY: demo test lint docs notebooks studies keys clean install

demo: $(READY)
	@$(BIN)/python -m fedsplit.demo

test: lint
	@echo "tests (all, $(WORKERS) at a time)"
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(READY)
	@echo "ruff, mypy"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/python -m fedsplit.manifest --check
	@$(BIN)/mypy --strict fedsplit

docs: $(VENV)/.docs
	@$(BIN)/python -m sphinx -q -E -W --keep-going docs build/docs
	@echo "docs: build/docs/index.html"

notebooks: $(VENV)/.notebooks
	@$(LAB)/bin/jupyter lab notebooks

studies: $(READY)
	@echo "studies and notebooks, at their smallest sizes ($(WORKERS) at a time)"
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n $(WORKERS) -m study

keys: $(READY)
	@$(BIN)/python -m fedsplit.manifest

install: $(READY)

# The stamp is newer than what decides the packages, so a second `make` installs nothing.
$(READY): setup.cfg pyproject.toml constraints.txt
	@set -e; \
	for python in $(PYTHON) python3.11 python3 python3.12 python3.13 python3.14; do \
	  if $$python -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "fedsplit needs Python 3.11 or newer with its venv module (Debian, Ubuntu: python3-venv); set PYTHON=/path/to/python3.11." >&2; exit 1; \
	fi; \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then echo "[1/3] $(VENV), $$($$found --version)"; $$found -m venv $(VENV); fi
	@echo "[2/3] torch"
	@$(PIP) setuptools torch
	@echo "[3/3] fedsplit and what it needs (a few minutes the first time)"
	@$(PIP) --editable '.[simulation,audit,lora,knapsack,track,dev]'
	@touch $@

$(VENV)/.docs: $(READY)
	@$(PIP) --editable '.[docs]'
	@touch $@

# An environment of its own: JupyterLab brings prometheus_client, with which Ray, without its dashboard, does not start.
$(VENV)/.notebooks: $(READY)
	@$(BIN)/python -m venv $(LAB)
	@$(LAB)/bin/python -m pip install -qq --constraint constraints.txt jupyterlab
	@$(BIN)/python -m ipykernel install --prefix $(LAB) --name python3 --display-name fedsplit >/dev/null 2>&1
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
