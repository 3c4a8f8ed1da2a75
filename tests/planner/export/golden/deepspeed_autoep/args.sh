# shellcheck shell=bash
# shellcheck disable=SC2034  # read by launch.sh
# Meshwright: mixtral-8x7b on 16 GPUs, DeepSpeed 0.19.
# Note: TRAIN_SCRIPT builds the model, the data and the optimizer; this export sets batches, precision, sharding.
# Note: The script must take the batch sizes from ds_config.json and train on sequences of 8192 tokens, which no key of it sets.
# Note: ep 8 uses AutoEP (0.19.8 or later) on a Hugging Face model that it knows: Mixtral, Qwen3-MoE, DeepSeek-V2 or V3, or name its layers in expert_parallel.
# Note: The prediction assumes that the busiest expert rank gets 1 times the mean.
# Note: Recompute happens in the script: call gradient_checkpointing_enable() or deepspeed.checkpointing.

# EDIT HERE if needed: options before the path of ds_config.json; for Hugging Face's Trainer: (--deepspeed)
DEEPSPEED_ARGS=(
  --deepspeed
  --deepspeed_config
)
