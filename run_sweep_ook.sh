#!/usr/bin/env bash
# Hyperparameter sweeps on ook: x86_64, RTX 4050 with 6 GB. See ./run_sweep_ook.sh --help.
# shellcheck disable=SC2034 # read by sweep.sh
DEVICE=ook
BACKENDS=(jax pytorch) # the order of `both`
DOCKER_GPU=(--gpus all)
PARAMETERS='{}' # sweep_config.json as it is
# shellcheck source=sweep.sh
source "$(dirname "${BASH_SOURCE[0]}")/sweep.sh"
