# lowgad: `make demo` shows the main job, `make test` proves it; both set up everything they need.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# The two wheels of onnxruntime break each other: a machine gets exactly one.
RUNTIME := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
OTHER_RUNTIME := $(if $(filter gpu,$(RUNTIME)),onnxruntime,onnxruntime-gpu)
# On Debian and Ubuntu the venv module is a package of its own, for each version of Python.
VENV_PACKAGE := $(if $(PYTHON),$(shell test -x $(BIN)/pip || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || echo $(notdir $(PYTHON))-venv))
PEERS := redis-server postgresql dcmtk orthanc orthanc-dicomweb dicom3tools chromium chromium-driver

.PHONY: help setup setup-tests peers demo check test bench train evaluate clean

help: ## what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: .venv/.run-$(RUNTIME) ## a virtual environment with .venv/bin/lowgad and the onnxruntime that fits this machine

setup-tests: .venv/.test-$(RUNTIME) ## what tests and training need beside it

demo: setup ## the main job on this machine: simulate, send, process, receive, look
	$(BIN)/lowgad demo --out demo-out

check: setup-tests ## linters, types and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# One thread for each process: the processes share the cores. What talks to peers comes after, two tests at a time: each
# has peers, ports and folders of its own, and waits for them while the other computes.
test: peers check ## everything CI runs, with real peers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --ignore tests/wire --ignore tests/browser
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal tests/wire tests/browser

bench: setup ## wall time and memory of `lowgad run` on STUDY=<folder>
	$(BIN)/python benchmarks/run_real.py $(STUDY)

train: setup-tests ## train a network from nothing into runs/small-cpu (hours); goes on where it was interrupted
	$(BIN)/lowgad train --preset small-cpu --workers $(shell nproc) --out runs/small-cpu

evaluate: setup-tests ## tables, figures and card of MODEL=<folder>, which are replaced (20 minutes on 2 cores)
	$(BIN)/lowgad evaluate $(MODEL) --studies 40 --workers $(shell nproc)

peers: ## the programs that the tests talk to, from the distribution; the tests start their own, never its services
	@deploy/install-packages.sh $(VENV_PACKAGE) $(PEERS)

clean: ## remove what the targets made, results of the demo included, but for training runs
	rm -rf .venv demo-out build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(BIN)/pip:
	@test -n "$(PYTHON)" || { echo 'lowgad needs Python 3.11 or newer, and finds none as python3 or python3.<n>' >&2; exit 1; }
	@deploy/install-packages.sh $(VENV_PACKAGE)
	$(PYTHON) -m venv .venv

# A stamp for each set of requirements: quick the second time, made anew when the requirements or the machine change.
.venv/.run-$(RUNTIME): pyproject.toml | $(BIN)/pip
	@echo 'installing the Python packages that lowgad needs ($(RUNTIME)) into .venv'
	@rm -f .venv/.run-* .venv/.test-*
	$(PIP) --quiet uninstall --yes $(OTHER_RUNTIME)
	$(PIP) install --editable '.[$(RUNTIME)]'
	@touch $@

.venv/.test-$(RUNTIME): .venv/.run-$(RUNTIME)
	@echo 'installing the Python packages that tests and training need (torch among them) into .venv'
	$(PIP) install --editable '.[$(RUNTIME),train,dev]'
	@touch $@
