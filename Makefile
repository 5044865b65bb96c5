# Two commands on a fresh machine with Python and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin

.PHONY: help install demo test check docs bench fault-test clean

help:
	@echo "make demo   set up, then run LPCAM on the bundled creatures (runs/demo/)"
	@echo "make test   set up, then lint, check types, run the tests and the examples of docstrings"
	@echo "            WORKERS=3 in three processes, ORDER=7 in a random order that 7 fixes"
	@echo "make check  lint and types alone"
	@echo "make docs   build the documentation (build/docs/index.html)"
	@echo "make bench  set up with the peers, then every benchmark (DATA=VOC folder WEIGHTS=safetensors file)"
	@echo "make fault-test  kill small runs at random moments, resume, compare the bytes"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[develop]'
	touch $@

install: $(VENV)/installed

demo: install
	$(BIN)/lpcam demo

check: install
	$(BIN)/ruff check src tests benchmarks docs examples tools
	$(BIN)/ruff format --check src tests benchmarks docs examples tools
	$(BIN)/mypy

# Tests of one file stay together: they share what is costly to make. Slow files come first, so
# that no process waits for the last of them.
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile \
		--no-loadscope-reorder $(if $(ORDER),--random-order-seed=$(ORDER))

docs: install
	$(BIN)/sphinx-build -q -W --keep-going -d build/docs-trees docs build/docs

$(VENV)/peers: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[develop,benchmarks]'
	touch $@

bench: $(VENV)/peers
	$(BIN)/python -m benchmarks $(if $(DATA),--data $(DATA)) $(if $(WEIGHTS),--weights $(WEIGHTS)) $(OPTIONS)

fault-test: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/fault_test.py $(OPTIONS)

clean:
	rm -rf $(VENV) runs build dist
