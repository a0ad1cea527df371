# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
OLDEST := .venv-oldest
BIN    := $(VENV)/bin
# Files go to two processes as they come: sorted by their number of tests, the few that take longest would come last.
SPREAD := -n 2 --dist loadfile --no-loadscope-reorder
MODEL  ?=
export HF_HUB_DISABLE_TELEMETRY ?= 1
# Test processes share the cores; more than one thread each makes them wait for one another.
test unit coverage test-oldest: export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint unit coverage oldest test-oldest test-slow test-gpu clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev,triton]'
	touch $@

# The oldest supported libraries, on top of the same torch.
$(OLDEST)/installed: pyproject.toml constraints/oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet --editable '.[dev]' --constraint constraints/oldest.txt
	touch $@

demo: $(VENV)/installed
	$(BIN)/pantheraml demo $(if $(MODEL),--model $(MODEL))

# Everything CI runs: style, types, layers, tests, and the family and trainer tests with the oldest libraries.
test: lint unit test-oldest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/pyright --pythonpath $(BIN)/python

unit: $(VENV)/installed
	$(BIN)/python -m pytest $(SPREAD)

# The same, counting lines, which takes a third longer: 90 % must have run.
coverage: $(VENV)/installed
	$(BIN)/python -m pytest $(SPREAD) --cov --cov-report=term:skip-covered --cov-fail-under=90

# Processes, threads, files, downloads and arithmetic of ours, in which these libraries have no part.
SAME := $(patsubst %,tests/distributed/test_%.py,settings process_group schedule agreement watchdog sample_dropout \
	joining deepspeed pipeline_ranks) \
	tests/training/test_prepared_once.py tests/training/test_terminal.py tests/export/test_hub.py
test-oldest: $(OLDEST)/installed
	$(OLDEST)/bin/python -m pytest $(SPREAD) $(addprefix --ignore=,$(SAME)) tests/families tests/fused tests/training tests/distributed tests/export tests/facade \
		tests/hooks/test_enable.py tests/hooks/test_ranks.py

# What CI leaves out, since it takes long: more ranks, more ways to start them, a queue.
test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m "slow and not gpu" tests

# On a machine with a CUDA GPU, with whatever environment is active.
test-gpu:
	$(PYTHON) -m pytest -m gpu tests

clean:
	rm -rf $(VENV) $(OLDEST) demo-output build dist *.egg-info
