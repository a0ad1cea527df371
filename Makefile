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
test unit quick coverage test-oldest: export OMP_NUM_THREADS ?= 1
# Hundreds of them import the same modules, which are compiled once, whatever the machine does otherwise.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test quick lint unit coverage oldest test-oldest test-slow test-gpu clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev,triton]'
	touch $@

# The oldest supported libraries, on top of the same torch; few tests import them, and what they import is compiled then.
$(OLDEST)/installed: pyproject.toml constraints/oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet --no-compile --editable '.[dev]' --constraint constraints/oldest.txt
	touch $@

demo: $(VENV)/installed
	$(BIN)/pantheraml demo $(if $(MODEL),--model $(MODEL))

# Everything CI runs: style, types, layers, tests, and the family and trainer tests with the oldest libraries. Those are
# installed beside lint: each of the two keeps one core busy.
test: $(VENV)/installed
	$(MAKE) --jobs=2 --output-sync lint $(OLDEST)/installed
	$(MAKE) unit
	$(MAKE) test-oldest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/pyright --pythonpath $(BIN)/python

unit: $(VENV)/installed
	$(BIN)/python -m pytest $(SPREAD)

# Two minutes: what starts no ranks and trains little.
quick: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 $(addprefix tests/,api checkpoint config data devices errors house)

# The same, counting lines, which takes a third longer: 90 % must have run.
coverage: $(VENV)/installed
	$(BIN)/python -m pytest $(SPREAD) --cov --cov-report=term:skip-covered --cov-fail-under=90

# What calls, reads or replaces parts of transformers, TRL and PEFT: every family loaded, fused, split, trained and saved,
# the trainers, and a run of each strategy. Kernels, processes, files and arithmetic of ours are the same with all of them.
OF_VERSIONS := tests/families tests/facade tests/hooks/test_enable.py tests/hooks/test_ranks.py \
	$(addprefix tests/fused/test_,decoder_layer.py experts.py known_layers.py) \
	$(addprefix tests/training/test_,arguments.py checkpoints.py grpo_ranks.py head.py merging.py packing.py preference.py \
		resume_oracle.py::test_two_ranks router_balance.py trainer.py trainer_edges.py) \
	$(addprefix tests/export/test_,adapter.py gguf.py merge.py quantized.py) \
	$(addprefix tests/distributed/test_,parity.py fsdp.py::test_equals_one_process \
		deepspeed.py::test_the_training_is_that_of_one_process \
		tensor_parallel.py::test_two_ranks_train_evaluate_and_generate_as_one_process \
		pipeline.py::test_losses_and_gradients_are_those_of_the_whole_model \
		pipeline.py::test_the_trainer_gives_the_numbers_of_the_whole_model)
test-oldest: $(OLDEST)/installed
	$(OLDEST)/bin/python -m pytest $(SPREAD) $(OF_VERSIONS)

# What CI leaves out, since it takes long: more ranks, more ways to start them, a queue.
test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m "slow and not gpu" tests

# On a machine with a CUDA GPU, with whatever environment is active.
test-gpu:
	$(PYTHON) -m pytest -m gpu tests

clean:
	rm -rf $(VENV) $(OLDEST) demo-output build dist *.egg-info
