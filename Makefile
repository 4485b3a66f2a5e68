# `make demo` and `make test` set up all they need on a fresh machine: an environment in .venv, through `make setup`.

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := .venv/.ready

# Two test processes; each keeps to one core. The long tests are added by `make test-all`.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q --show-capture=no -n $(JOBS)

# What the demo runs; `make demo PIPELINE=raise,fuse` tries another pipeline.
PIPELINE ?= raise,quantize{weights=int8},fuse

# What builds the site; nothing else needs them.
SITE := mkdocs==1.6.1 mkdocs-material==9.8.2

# `make gpu`: the Python whose torch sees the GPU, and how many test processes share it.
GPU_PYTHON ?= python3
GPU_JOBS ?= 6

# What `make replay` compares the emitted kernels with, and for which models: tiny, families or a TOML file.
REV ?= HEAD
CORPUS ?= tiny

.PHONY: setup demo test test-all gpu lint format docs replay clean
.DEFAULT_GOAL := help
.PHONY: help

help:
	@echo "make setup      the environment in .venv (torch first); nothing to do the second time"
	@echo "make demo       compile SmolLM2-135M and print the report"
	@echo "make test       the tests that need no GPU and little time"
	@echo "make test-all   those and the long ones"
	@echo "make gpu        the tests and the decode table of a machine with a GPU"
	@echo "make lint       ruff and mypy"
	@echo "make docs       the documentation as a site, build/site/index.html"
	@echo "make replay     what the changes since REV ($(REV)) do to the emitted kernels"

setup: $(STAMP)

# torch is installed first and alone, so that nothing else decides which build of it comes. Where that build brought its
# own triton (the CUDA builds do), that one stays; elsewhere the pinned one is taken.
$(STAMP): requirements-dev.txt pyproject.toml
	@if [ ! -x $(BIN)/python ]; then \
	  for candidate in $(PYTHON) python3.11 python3.12 python3.13; do \
	    if $$candidate -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then \
	      found=$$candidate; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "error: Fuseline needs Python 3.11, 3.12 or 3.13, and none of them runs here." >&2; \
	    echo "  try: apt-get install python3.11 python3.11-venv   (or: make setup PYTHON=/path/to/python3.11)" >&2; \
	    exit 2; fi; \
	  echo "creating .venv with $$found"; $$found -m venv .venv; fi
	$(PIP) install -q "$$(grep '^torch==' requirements-dev.txt)"
	@if $(BIN)/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("triton") is None)'; \
	  then grep -v '^triton==' requirements-dev.txt; else cat requirements-dev.txt; fi > .venv/requirements.txt
	$(PIP) install -q -r .venv/requirements.txt
	$(PIP) install -q --no-build-isolation --no-deps -e .
	@touch $(STAMP)

demo: setup
	$(BIN)/fuseline run demo:smollm2 -p "$(PIPELINE)"

# TRITON_INTERPRET must be set before triton is imported, so the tests that run kernels in Triton's interpreter have a
# process of their own. Both runs happen even if the first fails.
test: setup
	@status=0; \
	TRITON_INTERPRET=1 $(PYTEST) -m "not gpu and not slow" tests/interpreted || status=$$?; \
	$(PYTEST) -m "not gpu and not slow" --ignore=tests/interpreted tests || status=$$?; \
	exit $$status

test-all: setup
	@status=0; \
	TRITON_INTERPRET=1 $(PYTEST) -m "not gpu" tests/interpreted || status=$$?; \
	$(PYTEST) -m "not gpu" --ignore=tests/interpreted tests || status=$$?; \
	exit $$status

# On a machine with a GPU of 16 GB or more: the tests that need one, then the decode table with as many layers as fit.
# Not in setup's environment, whose PyTorch may be a build for CPUs.
gpu:
	@$(GPU_PYTHON) -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2> /dev/null || { \
	  echo "error: torch sees no GPU in $(GPU_PYTHON)" >&2; \
	  echo "  try: fuseline doctor, or another Python: make gpu GPU_PYTHON=/path/to/python3" >&2; exit 2; }
	@mkdir -p build; status=0; \
	OMP_NUM_THREADS=1 $(GPU_PYTHON) -m pytest -q --show-capture=no -n $(GPU_JOBS) -m gpu tests/gpu || status=$$?; \
	$(GPU_PYTHON) benchmarks/decode.py --fit --budget 300 --json build/decode.json || status=$$?; \
	exit $$status

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fuseline/compiler

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	@$(BIN)/python -c "import mkdocs, material" 2>/dev/null || $(PIP) install -q $(SITE)
	$(BIN)/python docs/site.py

replay: setup
	$(BIN)/python -m fuseline replay --against "$(REV)" --corpus "$(CORPUS)"

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
