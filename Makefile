# The README's two commands: `make train` and `make test`. Each makes .venv if needed, installs, and runs.
# On Linux the package index serves PyTorch for CUDA; the README says what to type on a machine without a GPU.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile
ARGS ?=

.PHONY: train test test-all check clean

train: $(READY)
	$(LAUNCH) scripts/train.py --method tdpo $(ARGS)

test: check
	$(PYTEST) -m "not slow" $(ARGS)

test-all: check
	$(PYTEST) $(ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first: whatever is built later finds it; an installed torch within the bounds is kept
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --editable ".[dev]" --constraint constraints.txt
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
