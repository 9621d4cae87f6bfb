# make demo · make test · make bench · make lint
# A virtual environment in .venv, torch's CPU build first (pip's default for an open range is a CUDA build of several GB).

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
BUILT  := $(VENV)/.fastalign-built
SOURCES := $(wildcard csrc/*) setup.py pyproject.toml

.PHONY: demo test bench lint build clean

demo: $(BUILT)
	$(BIN)/fastalign demo --out out/demo $(ARGS)

test: $(BUILT)
	$(BIN)/python -m pytest $(ARGS)

bench: $(BUILT)
	$(BIN)/python -m bench $(ARGS)

lint: $(BUILT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --diff . > /dev/null || (echo "run: $(BIN)/ruff format ." && false)

build: $(BUILT)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.torch: $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet "$(TORCH)" "numpy>=1.26"
	touch $@

$(BUILT): $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

clean:
	rm -rf build dist *.egg-info fastalign/_C*.so
