#!/usr/bin/env bash
# Hyperparameter sweeps on ook: x86_64, RTX 4050 with 6 GB. See ./run_sweep_ook.sh --help.
# shellcheck disable=SC2034 # sweeps/sweep.sh reads the variables
DEVICE=ook
BACKENDS=(jax pytorch) # the order in which `both` runs them
DOCKER_GPU=(--gpus all)
PARAMETERS='{}' # sweep_config.json is used unchanged
# shellcheck source=sweeps/sweep.sh
source "$(dirname "${BASH_SOURCE[0]}")/sweeps/sweep.sh"
