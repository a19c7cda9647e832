# Two commands for a fresh machine: `make demo` and `make test`. Each makes .venv once; later calls reuse it.
#   make demo PYTHON=python3.12     another interpreter (3.11 or newer)
#   make test ARGS=tests/checkpoint  the tests of one room, or any other arguments for pytest

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Two workers share the machine, so each computes with one thread. Without its JIT numba costs 16 s less per process
# (pyts, which NeuroMANCER imports, compiles at import).
TEST_ENV := OMP_NUM_THREADS=1 NUMBA_DISABLE_JIT=1 MPLBACKEND=agg
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal

# Other versions of torch that the compiled core is tested on; each takes some gigabytes beside .venv.
TORCH ?= 2.11.0 2.12.1 2.14.1
CORE := tests/compile/test_quick_graphs.py tests/compile/test_compiled.py tests/compile/test_hard_to_trace.py \
	tests/compile/test_torchs_bugs.py

.PHONY: demo test test-long examples bench papers versions docs gpu gpu-tests lint clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       train the constrained Rosenbrock problem, write runs/demo/"
	@echo "make test       run the test suite        make test-long  its slow part"
	@echo "make examples   run all tutorials in full make bench      run the benchmarks"
	@echo "make versions   the compiled core on other versions of torch"
	@echo "make gpu        accept weft on a GPU          make gpu-tests  the tests that need one"
	@echo "make docs       build the site                make lint       ruff, format, types"
	@echo "make clean      remove .venv"

demo: $(VENV)/ready-demo
	$(BIN)/python -m weft.demo

test: $(VENV)/ready-test
	@$(PYTEST) -m "not long" $(ARGS)

test-long: $(VENV)/ready-test
	@$(PYTEST) -m long $(ARGS)

examples: $(VENV)/ready-test
	$(BIN)/python -m examples

bench: $(VENV)/ready-bench
	$(BIN)/python -m benchmarks --readme

papers: $(VENV)/ready-bench
	$(BIN)/python -m benchmarks.papers.hamiltonian_networks
	$(BIN)/python -m benchmarks.papers.energy_natural_gradient
	$(BIN)/python -m benchmarks.papers.convection
	$(BIN)/python -m benchmarks.papers.dc3_quadratic_program
	$(BIN)/python -m benchmarks.papers.parametric_programs

# Everything else stays as constraints.txt has it.
versions: $(VENV)/ready-test
	@status=0; for version in $(TORCH); do \
	  folder=$(VENV)/torch-$$version; \
	  test -e $$folder/ready || { rm -rf $$folder; $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --target $$folder torch==$$version && touch $$folder/ready; } || { status=1; continue; }; \
	  echo "weft: torch $$version"; \
	  PYTHONPATH=$$folder $(TEST_ENV) $(BIN)/python -m pytest -q $(CORE) $(ARGS) || status=1; \
	done; exit $$status

docs: $(VENV)/ready-docs
	$(BIN)/python docs/build.py

# These two run with whatever is there, as a GPU is seldom at hand and never for long: .venv, else PYTHON as it is.
# ARGS="--out FOLDER" puts the results elsewhere.
HERE = PYTHONPATH=src:$$PYTHONPATH $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

gpu:
	$(HERE) -m benchmarks.gpu $(ARGS)

gpu-tests:
	MPLBACKEND=agg $(HERE) -m pytest -m gpu -q $(ARGS)

lint: $(VENV)/ready-test
	@status=0; $(BIN)/ruff check --output-format concise . || status=1; $(BIN)/ruff format --check . || status=1; \
	$(BIN)/basedpyright || status=1; exit $$status

clean:
	rm -rf $(VENV)

# A stamp says which extras are installed; it is newer than the files that decide what they are.
$(VENV)/ready-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "weft: installing into $(VENV) (the first time this downloads PyTorch and takes minutes)"
	@$(PIP) -e ".[$*]"
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "weft needs Python 3.11 or newer; %s is %s. Try: make PYTHON=python3.12" % (sys.executable, sys.version.split()[0]))'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "weft: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
