# `make train` and `make test` need Python 3.11 or later and nothing else; the rest is for developers.
PYTHON ?= python3
BIN := .venv/bin
RUN := OMP_NUM_THREADS=1 $(BIN)

.PHONY: train test test-slow lint audit bench gpu gpu-packages clean
.DEFAULT_GOAL := train

# Train a GPT on real text over 2 processes, and print text it writes.
train: .venv/installed
	$(RUN)/torchrun --nproc_per_node=2 -m paratrain.train experiment=first_run

# What CI runs: style, types, and every test that takes seconds.
test: lint
	$(RUN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Every test, the minutes-long ones too.
test-slow: .venv/installed
	$(RUN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not gpu'

# Known vulnerabilities of what is installed. Asks PyPI, and fails where it gets no answer.
audit: .venv/installed
	$(BIN)/pip install -q -c constraints.txt pip-audit
	$(BIN)/pip-audit --local --skip-editable --strict --vulnerability-service pypi

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Measure against hand-written loops and rival libraries; writes benchmarks/results/.
bench: .venv/installed
	$(BIN)/pip install -q -c constraints.txt -e '.[bench]'
	$(RUN)/python -m benchmarks

# On a machine with one NVIDIA GPU and a torch that finds it: the GPU tests, then a benchmark, in less than 9 minutes. Needs no network
# and installs nothing; it names what is missing. Writes benchmarks/results/gpu-DEVICE.json.
gpu:
	PYTHONPATH=.:.gpu-packages $(PYTHON) -m tests.gpu

# What `make gpu` needs beside torch and numpy, fetched on a machine with a network, to be brought along.
PYTHON_VERSION ?= 3.12
gpu-packages:
	rm -rf .gpu-packages
	$(PYTHON) -m pip install -q --no-deps --no-compile --target .gpu-packages --implementation cp --python-version $(PYTHON_VERSION) \
		--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -r tests/gpu/packages.txt

clean:
	rm -rf .venv .gpu-packages build *.egg-info .pytest_cache .mypy_cache .ruff_cache

.venv/installed: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "paratrain needs Python 3.11 or later, this is " + sys.version.split()[0] + "; write make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,deepspeed,fairscale]'
	@touch $@
