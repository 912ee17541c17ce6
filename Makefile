# `make demo` and `make test` each work first on a fresh machine: both make .venv and install what they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint bench install clean
install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

demo: $(STAMP)
	$(BIN)/vaevq-med demo

# Two processes of one thread each: the tests are many small ones, which leave further threads idle.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(STAMP)
	$(BIN)/python benchmarks/nearest_codeword.py
	$(BIN)/python benchmarks/quantizers.py
	$(BIN)/python benchmarks/slice_extract.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
