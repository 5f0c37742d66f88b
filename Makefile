# Everything runs in $(VENV), which the first target that needs it builds from the pins in requirements/.
VENV   ?= .venv
PYTHON ?= $(or $(shell command -v python3.11 || command -v python3.12),python3)
EXTRA  ?= cpu
CONFIG ?= configs/quickstart.yaml
ARGS   ?=

ifeq ($(filter cpu gpu,$(EXTRA)),)
$(error EXTRA=$(EXTRA) is unknown; it must be cpu or gpu)
endif

BIN   := $(VENV)/bin
STAMP := $(VENV)/.setup-$(EXTRA)
OTHER := $(filter-out $(STAMP),$(wildcard $(VENV)/.setup-*))
PINS  := requirements/$(EXTRA).txt requirements/dev.txt
PIP   := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps
TORCH := tools/torch_build.py

.PHONY: help setup train-async bench bench-gpu test test-unit test-gpu check lock-check docs clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## build .venv from the pins (EXTRA=cpu or gpu, PYTHON=python3.11)

# cpu.txt and gpu.txt fill the same folders, so the other one's environment is cleared first. The pinned pip comes first, since an
# older one downloads all of torch to say which build it would take.
$(STAMP): $(PINS) pyproject.toml tools/check_machine.py $(TORCH)
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null || \
	    { echo "make setup: PYTHON=$(PYTHON) is not Python 3.11 or 3.12 ($$("$(PYTHON)" --version 2>&1 | head -n 1)); pass one, as in make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" tools/check_machine.py $(EXTRA)
	@echo "make setup: installing $$(cat $(PINS) | grep -c ==) pinned packages into $(VENV) for $(EXTRA); this takes a few minutes"
	@"$(PYTHON)" -m venv $(if $(OTHER),--clear) $(VENV)
	@$(PIP) $(shell grep ^pip== requirements/dev.txt)
	@$(BIN)/python $(TORCH) take $(EXTRA)
	@$(PIP) $(addprefix -r ,$(PINS))
	@$(BIN)/python $(TORCH) check $(EXTRA)
	@$(PIP) --no-build-isolation -e .
	@touch $(STAMP)

train-async: setup ## run the main job (CONFIG=configs/quickstart.yaml, ARGS="objective.beta=0.1")
	@exec $(BIN)/ftb-llm train $(CONFIG) $(ARGS)

bench: setup ## run a benchmark (ARGS="staleness --seeds 0"); docs/cli.md names them
	@exec $(BIN)/ftb-llm bench $(or $(ARGS),staleness)

bench-gpu: setup ## time the learner's step on a CUDA device (EXTRA=gpu, ARGS="--steps 10")
	@exec $(BIN)/ftb-llm bench gpu $(ARGS)

test: setup ## run all tests but those that need a GPU (ARGS="-k name")
	@$(BIN)/python -m pytest -m "not gpu" $(ARGS)

test-unit: setup ## run the fast tests only
	@$(BIN)/python -m pytest tests/unit $(ARGS)

test-gpu: setup ## run the tests that need a GPU; without one they are skipped (EXTRA=gpu)
	@$(BIN)/python -m pytest tests/gpu $(ARGS)

check: setup ## lint, format, types, pins
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python tools/check_lock.py

lock-check: setup ## do the pins and pyproject.toml agree?
	@$(BIN)/python tools/check_lock.py

docs: setup ## write docs/configuration.md and configs/base.yaml from the schema
	@$(BIN)/python -m ftb_llm.config.docs

clean: ## remove caches and build output; .venv and runs stay
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find ftb_llm actors learner tests tools -name __pycache__ -prune -exec rm -rf {} +
