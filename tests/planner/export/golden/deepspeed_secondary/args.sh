# shellcheck shell=bash
# shellcheck disable=SC2034  # read by launch.sh
# Meshwright: llama-3-8b on 16 GPUs, DeepSpeed 0.19.
# Note: TRAIN_SCRIPT builds the model, the data and the optimizer; this export sets batches, precision, sharding.
# Note: The script must take the batch sizes from ds_config.json and train on sequences of 8192 tokens, which no key of it sets.
# Note: The script passes deepspeed.ops.adam.DeepSpeedCPUAdam, which updates the offloaded states.

# EDIT HERE if needed: options before the path of ds_config.json; for Hugging Face's Trainer: (--deepspeed)
DEEPSPEED_ARGS=(
  --deepspeed
  --deepspeed_config
)
