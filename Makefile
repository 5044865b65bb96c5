# Two commands on a fresh machine with Python and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help install demo test check clean

help:
	@echo "make demo   set up, then run LPCAM on the bundled creatures (runs/demo/)"
	@echo "make test   set up, then lint, check types and run the tests"
	@echo "make check  lint and types alone"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[develop]'
	touch $@

install: $(VENV)/installed

demo: install
	$(BIN)/lpcam demo

check: install
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/mypy

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

clean:
	rm -rf $(VENV) runs build dist
