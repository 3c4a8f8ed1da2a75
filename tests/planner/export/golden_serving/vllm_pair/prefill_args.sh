# shellcheck shell=bash
# shellcheck disable=SC2034  # read by prefill.sh
# Meshwright: deepseek-v3, prefill pool, 2 replicas, 8 GPUs each, vLLM 0.33.0.
# Note: MODEL is a checkpoint of the shape of deepseek-v3; the plan's shape was not compared with it.
# Note: Requests longer than the workload's longest are rejected; raise the limit on their length for others.
# Note: The prediction is for vllm 0.14.0; the options are those of 0.33.0.
# Note: The size of the KV cache is the prediction's; drop its option to let the engine fill the memory.
# Note: The prediction of the decode pool assumes that a drafted token is accepted with chance 0.7.
# Note: MODEL must hold weights in fp8_block; the engine reads the number format from it.
# Note: Share of GPU memory, CUDA graphs and kernels keep vLLM's defaults; add options to the script's call.
# Note: Router least_loaded is written as power_of_two: the less loaded of two replicas drawn.
# Note: Pools on different servers need NIXL's transport (UCX) to reach each other.

# Ranks of one replica.
PARALLEL_ARGS=(
  --tensor-parallel-size 8
  --pipeline-parallel-size 1
  --enable-expert-parallel
)

# Number formats and longest request.
MODEL_ARGS=(
  --dtype bfloat16
  --kv-cache-dtype fp8
  --max-model-len 2560
)

# What one step holds.
SCHEDULER_ARGS=(
  --enable-chunked-prefill
  --max-num-seqs 64
  --max-num-batched-tokens 16384
)

# KV cache.
CACHE_ARGS=(
  --block-size 16
  --no-enable-prefix-caching
)

# How the KV cache travels between the pools.
TRANSFER_ARGS=(
  --kv-transfer-config '{"kv_connector": "NixlConnector", "kv_role": "kv_producer"}'
)
