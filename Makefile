# Every target that needs Python makes its own virtual environment first, and reuses it until
# pyproject.toml changes. Another interpreter: `make setup PYTHON=python3.12`; another place: `VENV=...`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EXTRAS := docs,export,openvino
UV := $(shell command -v uv 2>/dev/null)
# One thread per test worker: two workers with two threads each are slower than two with one on 2 cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all versions check lint docs format clean

help: ## list these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

setup: $(INSTALLED) ## make the virtual environment and install the package with its tools

demo: $(INSTALLED) ## train, score, mask, reconstruct and fine-tune on real digits; about four minutes
	$(BIN)/lightning-prune demo

test: $(INSTALLED) ## the ordinary tests
	$(PYTEST) -m "not slow and not gpu"

test-all: $(INSTALLED) ## the slow sweeps as well; all but what needs an accelerator
	$(PYTEST) -m "not gpu"

versions: ## the built wheel with the lowest and the newest versions; CASES="newest-3.12" for others
	.ci/versions $(CASES)

lint: $(INSTALLED) ## ruff, mypy and import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(INSTALLED) ## build the documentation into site/, its code run anew
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

check: lint ## what CI runs: lint, then test
	@$(MAKE) --no-print-directory test

format: $(INSTALLED) ## rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the virtual environments, caches and builds; keeps runs/
	rm -rf .venv .venv-ci build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an install that fails is tried again.
$(INSTALLED): pyproject.toml
ifneq ($(UV),)
	test -x $(BIN)/python || $(UV) venv --python $(PYTHON) $(VENV)
	$(UV) pip install --python $(BIN)/python --editable ".[$(EXTRAS)]" --group dev
else
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip  # none where uv made the venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"  # the first pip that knows dependency groups
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS)]" --group dev
endif
	@touch $@
