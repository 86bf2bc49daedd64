# PageBrain's commands. `make` lists them. Works with GNU make 3.81 (macOS) and later.

PYTHON ?= python3
# Test processes at a time. Each computes with one thread: the models are tiny, and threads that wait for each other are not.
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo test test-long lint format bench lab notebooks docs clean

help: ## list the commands
	@awk -F ':[^#]*## ' '/^[a-z.-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(READY) ## stream a story and show where its K and V lie
	@$(BIN)/pagebrain demo

test: $(READY) ## run every test that needs no GPU, except the slow ones
	@$(PYTEST) --nbval-lax -m "not gpu and not slow" tests notebooks

test-long: $(READY) ## run every test that needs no GPU
	@$(PYTEST) --nbval-lax -m "not gpu" tests notebooks

lint: $(READY) ## check style, layout and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(READY) ## lay the code out as `make lint` wants it
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

bench: $(READY) ## measure throughput on this machine
	@$(BIN)/pagebrain bench offline

lab: $(READY) ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab --notebook-dir=. --FileContentsManager.preferred_dir=notebooks

notebooks: $(READY) ## make the notebooks anew from notebooks/src and execute them
	@$(BIN)/python -m tools.notebooks build

docs: $(READY) ## build the site into docs/_build/html
	@$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

clean: ## remove everything that was built, .venv included
	rm -rf $(VENV) build dist docs/_build docs/_notebooks *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment is made once, and again when what it holds has changed.
$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
		{ echo "PageBrain needs Python 3.10 or later: name one, as in make PYTHON=python3.11"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV) (once; a few minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@
