# The commands of the README. Everything lands in .venv, demo/ and runs/; nothing else is touched.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PACKAGES := activation_store sae explain monosem

.PHONY: setup demo test lint soak bench bench-gpu clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "monosem needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/python scripts/demo.py $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest -m "not soak and not gpu" --cov --cov-report=term

soak: setup
	$(BIN)/python -m pytest -m soak

bench: setup
	$(BIN)/python scripts/fetch_demo.py
	$(BIN)/python benchmarks/harvest.py
	$(BIN)/python benchmarks/store.py

bench-gpu: bench

clean:
	rm -rf .venv demo runs build *.egg-info
