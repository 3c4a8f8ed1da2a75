#!/usr/bin/env bash
# Meshwright: deepseek-v3, prefill pool, 2 replicas, 8 GPUs each, SGLang 0.5.23.
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

BOOTSTRAP_PORT="${BOOTSTRAP_PORT:-$((8998 + REPLICA))}"

exec python3 -m sglang.launch_server --model-path "$MODEL" \
  --host 0.0.0.0 --port "$PORT" \
  "${PARALLEL_ARGS[@]}" \
  "${MODEL_ARGS[@]}" \
  "${SCHEDULER_ARGS[@]}" \
  "${CACHE_ARGS[@]}" \
  "${TRANSFER_ARGS[@]}" \
  --disaggregation-bootstrap-port "$BOOTSTRAP_PORT" \
  "$@"
