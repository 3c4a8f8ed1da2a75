# shellcheck shell=bash
# shellcheck disable=SC2034  # read by launch.sh
# Meshwright: llama-3-8b on 16 GPUs, DeepSpeed 0.19.
# Note: TRAIN_SCRIPT builds the model, the data and the optimizer; this export sets batches, precision, sharding.
# Note: The script must take the batch sizes from ds_config.json and train on sequences of 131072 tokens, which no key of it sets.
# Note: cp 8 is Ulysses: the script calls UlyssesSPAttentionHF.register_with_transformers and wraps its data loader in UlyssesSPDataLoaderAdapter (deepspeed.runtime.sequence_parallel.ulysses_sp).
# Note: Recompute happens in the script: call gradient_checkpointing_enable() or deepspeed.checkpointing.

# EDIT HERE if needed: options before the path of ds_config.json; for Hugging Face's Trainer: (--deepspeed)
DEEPSPEED_ARGS=(
  --deepspeed
  --deepspeed_config
)
