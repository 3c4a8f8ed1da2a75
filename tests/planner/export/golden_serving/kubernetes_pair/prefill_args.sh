# shellcheck shell=bash
# shellcheck disable=SC2034  # read by prefill.sh
# Meshwright: deepseek-v3, prefill pool, 2 replicas, 8 GPUs each, SGLang 0.5.23.
# Note: MODEL is a checkpoint of the shape of deepseek-v3; the plan's shape was not compared with it.
# Note: Requests longer than the workload's longest are rejected; raise the limit on their length for others.
# Note: The prediction is for sglang 0.14.0; the options are those of 0.5.23.
# Note: The size of the KV cache is the prediction's; drop its option to let the engine fill the memory.
# Note: The prediction of the decode pool assumes that a drafted token is accepted with chance 0.7.
# Note: MODEL must hold weights in fp8_block; the engine reads the number format from it.
# Note: Share of GPU memory, CUDA graphs and kernels keep SGLang's defaults; add options to the script's call.
# Note: Router least_loaded is written as power_of_two: the less loaded of two replicas drawn.
# Note: Pools on different servers need NIXL's transport (UCX) to reach each other.

# Ranks of one replica.
PARALLEL_ARGS=(
  --tp-size 8
  --pp-size 1
  --ep-size 8
)

# Number formats and longest request.
MODEL_ARGS=(
  --dtype bfloat16
  --kv-cache-dtype fp8_e4m3
  --context-length 2560
)

# What one step holds.
SCHEDULER_ARGS=(
  --max-running-requests 64
  --chunked-prefill-size 16384
  --max-prefill-tokens 16384
)

# KV cache.
CACHE_ARGS=(
  --page-size 16
  --disable-radix-cache
)

# How the KV cache travels between the pools.
TRANSFER_ARGS=(
  --disaggregation-mode prefill
  --disaggregation-transfer-backend nixl
)
