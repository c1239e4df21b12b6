# The list of commands. Each sets up what it needs in .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed

.PHONY: help setup demo test lint format bench clean

help:  ## show the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

setup: $(STAMP)  ## make .venv with the package (editable) and the developer tools

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard mambascope/ops/native/*.cpp mambascope/ops/native/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip "setuptools>=77,<81" wheel
	$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(STAMP)  ## train the coarse-to-fine classifier on the built-in data and write its report
	$(BIN)/python tools/train_cls.py

test: $(STAMP)  ## run the tests
	$(BIN)/python -m pytest

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what the commands made, but not runs/
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	rm -f mambascope/ops/native/*.so $(STAMP)
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

bench: $(STAMP)  ## time the models on this CPU against DeiT, and write benchmarks/results/
	$(BIN)/python benchmarks/vim_cpu.py
