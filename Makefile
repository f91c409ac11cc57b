# make train ARGS="--dataset synthetic --num-epochs 2"   sets up .venv and runs vit.py with these flags
# make benchmark                                         sets up .venv, compares JAX and torch on small made-up data
# make benchmark ARGS="--repeats 5 -- --num-epochs 5"    the same with the flags of benchmark.py and, after --, of vit.py
# make test                                              sets up .venv and passes the tests
# make lint                                              what CI checks besides
# Another interpreter: make test PYTHON=python3.12. Other backends for training: make train EXTRAS=tensorflow

PYTHON ?= python3
EXTRAS ?= jax,torch,wandb
ARGS ?=
VENV := .venv
FLOOR := .venv-floor
# The floor of the supported range is tested wherever a Python 3.10 is found (a pyenv shim may exist and not work).
PYTHON310 := $(shell for p in python3.10 $$HOME/.pyenv/versions/3.10.*/bin/python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 10))' 2>/dev/null && echo "$$p" && break; done)

# Minutes on two CPU cores: a small model, so that every run is compiled, timed and trained in about half a minute.
QUICK := --backends jax torch -- --dataset synthetic --image-size 32 --patch-size 8 --projection-dim 32 \
	--transformer-layers 2 --mlp-head-units 128 --batch-size 64 --num-epochs 6

.PHONY: train benchmark test test-floor lint clean

train: $(VENV)/train-$(EXTRAS)
	$(VENV)/bin/python vit.py $(ARGS)

benchmark: $(VENV)/benchmark
	$(VENV)/bin/python benchmark.py $(if $(ARGS),$(ARGS),$(QUICK))

test: $(VENV)/test
	$(VENV)/bin/python -m pytest
	$(if $(PYTHON310),$(MAKE) --no-print-directory test-floor,@echo "no Python 3.10 found: the floor of the supported range is not tested")

test-floor: $(FLOOR)/test
	$(FLOOR)/bin/python -m pytest

lint: $(VENV)/lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) $(FLOOR) build *.egg-info .pytest_cache .hypothesis

# Each stamp stands for what has been installed; a changed requirement installs again.
INSTALL = pip install --quiet --disable-pip-version-check -c constraints.txt

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/train-$(EXTRAS): $(VENV)/bin/python pyproject.toml constraints.txt
	$(VENV)/bin/python -m $(INSTALL) -e ".[$(EXTRAS)]"
	@touch $@

$(VENV)/benchmark: $(VENV)/bin/python pyproject.toml constraints.txt
	$(VENV)/bin/python -m $(INSTALL) -e ".[jax,torch,benchmark]"
	@touch $@

$(VENV)/test: $(VENV)/bin/python pyproject.toml constraints.txt
	$(VENV)/bin/python -m $(INSTALL) -e ".[jax,torch,tensorflow,test]"
	@touch $@

$(VENV)/lint: $(VENV)/bin/python
	$(VENV)/bin/python -m $(INSTALL) ruff
	@touch $@

$(FLOOR)/test: pyproject.toml constraints.txt
	$(PYTHON310) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m $(INSTALL) -e ".[jax,test]"
	@touch $@
