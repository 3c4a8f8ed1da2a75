# shellcheck shell=bash
# shellcheck disable=SC2034  # read by serve.sh
# Meshwright: llama-3-8b, aggregated pool, 4 replicas, 2 GPUs each, vLLM 0.33.0.
# Note: MODEL is a checkpoint of the shape of llama-3-8b; the plan's shape was not compared with it.
# Note: Requests longer than the workload's longest are rejected; raise the limit on their length for others.
# Note: Share of GPU memory, CUDA graphs and kernels keep vLLM's defaults; add options to the script's call.

# Ranks of one replica.
PARALLEL_ARGS=(
  --tensor-parallel-size 2
  --pipeline-parallel-size 1
)

# Number formats and longest request.
MODEL_ARGS=(
  --dtype bfloat16
  --quantization fp8
  --kv-cache-dtype fp8
  --max-model-len 2560
)

# What one step holds.
SCHEDULER_ARGS=(
  --enable-chunked-prefill
  --max-num-seqs 256
  --max-num-batched-tokens 8192
)

# KV cache.
CACHE_ARGS=(
  --block-size 16
  --enable-prefix-caching
)
