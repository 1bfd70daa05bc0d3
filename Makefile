# Every target sets up what it needs in .venv; PYTHON names the interpreter that makes it.
PYTHON ?= python3
PYTEST_FLAGS ?= -n auto --dist worksteal
# What `make test-versions` tries: some combinations, or all.
VERSIONS ?= some

VENV := .venv
BIN := $(VENV)/bin
SAMPLE := scripts/sample/pruned_residual_cnn.onnx

export PIP_DISABLE_PIP_VERSION_CHECK = 1

# One thread per test worker: the workers fill the cores already.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS)
FAST := -m "not slow and not torch"

.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo check test test-slow test-versions lint sample clean

help:
	@echo "make demo       simplify and benchmark the sample model (no torch needed)"
	@echo "make check      lint and fast tests without torch: the loop while working"
	@echo "make test       all tests but the slow ones"
	@echo "make test-slow  the slow tests"
	@echo "make test-versions  the fast tests on other Pythons and at the lowest versions promised;"
	@echo "                with VERSIONS=all, in all combinations of these"
	@echo "make lint       ruff and mypy"
	@echo "make sample     make the sample model anew"
	@echo "make clean      remove everything made here, .venv included"

# Stamps: an environment is set up once, and again when its requirements change.
$(VENV)/made:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/core: $(VENV)/made setup.cfg
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# One pip command per environment, so that torch and torchvision are chosen to match.
$(VENV)/extra-%: $(VENV)/made setup.cfg
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

demo: $(VENV)/core
	mkdir -p build/demo
	$(BIN)/python -m onnx_simplify $(SAMPLE) build/demo/sample-simplified.onnx --benchmark

check: lint
	$(PYTEST) $(FAST)

test: $(VENV)/extra-test
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/extra-test
	$(PYTEST) -m slow

test-versions:
	OMP_NUM_THREADS=1 $(PYTHON) scripts/try_versions.py $(VERSIONS) $(PYTEST_FLAGS) $(FAST)

lint: $(VENV)/extra-check
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check --diff .
	$(BIN)/python -m mypy

sample: $(VENV)/core
	$(BIN)/python scripts/make_sample.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
