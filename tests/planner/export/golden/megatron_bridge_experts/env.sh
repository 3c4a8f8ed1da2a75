# shellcheck shell=bash
# Environment of every rank.
# One hardware queue keeps communication ahead of the matrix multiply it overlaps; required here.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# Lets the training script import meshwright_plan.
export PYTHONPATH="$EXPORT_DIR${PYTHONPATH:+:$PYTHONPATH}"
