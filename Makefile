# make demo: set up, write small motion videos, pre-train on them.  make test: set up, check everything.
# make gpu-check: one GPU looked at.
# With VENV= PYTHON=python3: the same in the environment that is there, with nothing installed (docs/offline.md).
PYTHON ?= python3
VENV ?= .venv
BIN := $(addsuffix /bin/,$(VENV))
RUN := $(if $(VENV),$(BIN)python,$(PYTHON))
INSTALLED := $(addsuffix /.installed,$(VENV))

PYTHON_OLDEST ?= python3.10
VENV_OLDEST ?= .venv-oldest
# Two workers: most tests are processes that start, one core each.
PYTEST := -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

ifndef VENV
export PYTHONPATH := $(CURDIR)$(addprefix :,$(PYTHONPATH))
endif

.PHONY: demo gpu-check test test-oldest soak lint install bundle clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)python -m pip install --disable-pip-version-check --quiet --editable '.[test]'
	@touch $@

demo: install
	$(RUN) tools/demo.py

# One GPU beside what the project says of it, in 8 minutes: docs/gpu-check/README.md.
gpu-check: install
	$(RUN) tools/gpu_check.py $(GPU_CHECK)

test: install lint
	$(RUN) $(PYTEST)

# The oldest version of everything that pyproject.toml allows: 30 minutes on two cores. Its compiled ops are its own.
# Left alone, torch 2.6 starts a compile worker for each core in every process that imports DeepSpeed.
test-oldest: install
	$(PYTHON_OLDEST) -m venv --clear $(VENV_OLDEST)
	$(RUN) -m uv pip install --quiet --python $(VENV_OLDEST)/bin/python --resolution lowest-direct --editable '.[test]'
	TORCHINDUCTOR_COMPILE_THREADS=1 TORCH_EXTENSIONS_DIR=$(abspath $(VENV_OLDEST))/ops $(VENV_OLDEST)/bin/python $(PYTEST)

# Wheels for a machine without a network: make bundle PYTHON_VERSION=3.12 (docs/offline.md).
bundle: install
	$(RUN) tools/bundle.py $(addprefix --python-version ,$(PYTHON_VERSION))

# Kills at random moments, many times over (docs/reliability.md): SOAK_KILLS of each kind of run, drawn from SOAK_SEED.
soak: install
	$(RUN) -m pytest -m slow tests/resilience -s

lint: install
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(BIN)mypy
	$(BIN)lint-imports

clean:
	rm -rf $(VENV) $(VENV_OLDEST) build dist *.egg-info
