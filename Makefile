# make demo: set up, write small motion videos, pre-train on them.  make test: set up, check everything.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test soak lint install clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[test]'
	@touch $@

demo: install
	$(BIN)/python tools/demo.py

# Two workers: most tests are processes that start, one core each.
test: install lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Kills at random moments, many times over (docs/reliability.md): SOAK_KILLS of each kind of run, drawn from SOAK_SEED.
soak: install
	$(BIN)/python -m pytest -m slow tests/resilience -s

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist *.egg-info
