# shellcheck shell=bash
# shellcheck disable=SC2034  # read by serve.sh
# Meshwright: mixtral-8x7b, aggregated pool, 4 replicas, 2 GPUs each, SGLang 0.5.23.
# Note: MODEL is a checkpoint of the shape of mixtral-8x7b; the plan's shape was not compared with it.
# Note: Requests longer than the workload's longest are rejected; raise the limit on their length for others.
# Note: Share of GPU memory, CUDA graphs and kernels keep SGLang's defaults; add options to the script's call.

# Ranks of one replica.
PARALLEL_ARGS=(
  --tp-size 2
  --pp-size 1
  --ep-size 2
)

# Number formats and longest request.
MODEL_ARGS=(
  --dtype bfloat16
  --kv-cache-dtype bf16
  --context-length 2560
)

# What one step holds.
SCHEDULER_ARGS=(
  --max-running-requests 256
  --chunked-prefill-size 8192
  --max-prefill-tokens 8192
  --enable-mixed-chunk
)

# KV cache.
CACHE_ARGS=(
  --page-size 16
)
