# Everything is set up in .venv by the first target that needs it.
#   make demo   the main job on the model that ships with the package
#   make test   the test suite
#   make bench  the microbenchmarks
# On a GPU machine: make demo TORCH="torch"    (or any other requirement that pip can resolve)

PYTHON ?= python3
# Installed before everything else, and pinned, so that no other requirement decides which build of torch it is.
TORCH ?= torch==2.13.0
VENV ?= .venv

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
QUIET := --quiet --disable-pip-version-check

.PHONY: demo test bench clean

demo: $(STAMP)
	$(BIN)/corrsteer demo

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

bench: $(STAMP)
	$(BIN)/python -m pytest bench --benchmark-only

$(STAMP): pyproject.toml setup.py csrc/native.cpp Makefile
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or later is needed, this is " + sys.version) if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); the first time this takes a few minutes ..."
	$(BIN)/python -m pip install $(QUIET) "$(TORCH)"
	$(BIN)/python -m pip install $(QUIET) --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info corrsteer/_native*.so
