#!/usr/bin/env bash
# Hyperparameter sweeps on ojo: ARM64, Jetson AGX Orin. See ./run_sweep_ojo.sh --help.
# shellcheck disable=SC2034 # sweeps/sweep.sh reads the variables
DEVICE=ojo
BACKENDS=(pytorch jax) # the order in which `both` runs them
DOCKER_GPU=(--runtime nvidia)
# Replaces these parameters of sweep_config.json: the Orin computes at less than half the speed of ook's GPU.
PARAMETERS='{
  "batch_size": { "values": [32, 64] },
  "projection_dim": { "values": [48, 64] },
  "transformer_layers": { "values": [4, 6] },
  "image_size": { "value": 48 },
  "num_epochs": { "value": 20 }
}'
# shellcheck source=sweeps/sweep.sh
source "$(dirname "${BASH_SOURCE[0]}")/sweeps/sweep.sh"
