# lowgad: `make demo` shows the main job, `make test` proves it; both set up everything they need.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
RUNTIME := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
BIN := .venv/bin
PEERS := redis-server postgresql dcmtk orthanc orthanc-dicomweb dicom3tools chromium chromium-driver

.PHONY: help setup setup-tests peers demo check test bench clean

help: ## what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: .venv/.run ## a virtual environment with .venv/bin/lowgad and the onnxruntime that fits this machine

demo: setup ## the main job on this machine: simulate, send, process, receive, look
	$(BIN)/lowgad demo --out demo-out

check: setup-tests ## linters, types and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: peers check ## everything CI runs, with real peers
	$(BIN)/python -m pytest

bench: setup ## wall time and memory of `lowgad run` on STUDY=<folder>
	$(BIN)/python benchmarks/run_real.py $(STUDY)

setup-tests: .venv/.test ## what tests and training need beside it

clean: ## remove what the targets made, results of the demo included
	rm -rf .venv demo-out build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

# The venv module is a package of its own on Debian and Ubuntu.
.venv/bin/python:
	@[ -n "$(PYTHON)" ] || { echo "lowgad needs Python 3.11 or newer; install python3 first" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || deploy/install-packages.sh python3-venv
	$(PYTHON) -m venv .venv

# One stamp for each set of requirements; both wheels of onnxruntime at once break each other, so the other one goes.
.venv/.run: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip uninstall --quiet --yes $(if $(filter gpu,$(RUNTIME)),onnxruntime,onnxruntime-gpu)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(RUNTIME)]'
	touch $@

.venv/.test: pyproject.toml | .venv/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(RUNTIME),train,dev]'
	touch $@

peers:
	@deploy/install-packages.sh $(PEERS)
