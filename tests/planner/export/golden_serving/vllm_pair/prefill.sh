#!/usr/bin/env bash
# Meshwright: deepseek-v3, prefill pool, 2 replicas, 8 GPUs each, vLLM 0.33.0.
# Run once per replica, REPLICA from 0 to 1; further arguments go to the engine.
set -euo pipefail

EXPORT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

: "${MODEL:?set MODEL to the folder or the name of the checkpoint}"

# shellcheck source=prefill_args.sh
source "$EXPORT_DIR/prefill_args.sh"

REPLICA="${REPLICA:-0}"
if ! [[ "$REPLICA" =~ ^(0|[1-9][0-9]{0,5})$ ]] || [[ "$REPLICA" -gt 1 ]]; then
  echo "prefill.sh: the plan has replicas 0 to 1, not REPLICA $REPLICA" >&2
  exit 2
fi
SLOT=$((REPLICA % 1)) # replicas that share a server
PORT="${PORT:-$((8100 + SLOT))}"

# Where the other pool finds this replica's KV cache.
read -r -a ADDRESSES <<<"$(hostname -I)"
export VLLM_NIXL_SIDE_CHANNEL_HOST="${VLLM_NIXL_SIDE_CHANNEL_HOST:-${ADDRESSES[0]}}"
export VLLM_NIXL_SIDE_CHANNEL_PORT="${VLLM_NIXL_SIDE_CHANNEL_PORT:-$((5600 + SLOT * 1))}"

exec vllm serve "$MODEL" \
  --host 0.0.0.0 --port "$PORT" \
  "${PARALLEL_ARGS[@]}" \
  "${MODEL_ARGS[@]}" \
  "${SCHEDULER_ARGS[@]}" \
  "${CACHE_ARGS[@]}" \
  "${TRANSFER_ARGS[@]}" \
  "$@"
