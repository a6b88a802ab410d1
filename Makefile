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
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile -m "not soak and not gpu" --cov --cov-report=term

soak: setup
	$(BIN)/python -m pytest -m soak

bench: setup
	$(BIN)/python scripts/fetch_demo.py
	$(BIN)/python benchmarks/harvest.py
	$(BIN)/python benchmarks/store.py
	$(BIN)/python scripts/set_up_peers.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/training.py --scaling
	$(BIN)/python benchmarks/training.py --first-steps
	$(BIN)/python benchmarks/sweep.py
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/evidence.py
	$(BIN)/python benchmarks/client.py

# BENCH_PYTHON and PEERS name interpreters that have our packages and the peers' already, for machines without a network
BENCH_PYTHON ?= $(BIN)/python
bench-gpu:
	$(BENCH_PYTHON) benchmarks/training.py --device cuda $(if $(PEERS),--peer-python $(PEERS))
	$(BENCH_PYTHON) benchmarks/training.py --device cuda --scaling
	$(BENCH_PYTHON) benchmarks/sweep.py --device cuda

clean:
	rm -rf .venv .venv-peers demo runs build *.egg-info
