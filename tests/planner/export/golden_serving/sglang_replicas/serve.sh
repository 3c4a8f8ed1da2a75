#!/usr/bin/env bash
# Meshwright: mixtral-8x7b, aggregated pool, 4 replicas, 2 GPUs each, SGLang 0.5.23.
# Run once per replica, REPLICA from 0 to 3; further arguments go to the engine.
set -euo pipefail

EXPORT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

: "${MODEL:?set MODEL to the folder or the name of the checkpoint}"

# shellcheck source=serve_args.sh
source "$EXPORT_DIR/serve_args.sh"

REPLICA="${REPLICA:-0}"
if ! [[ "$REPLICA" =~ ^(0|[1-9][0-9]{0,5})$ ]] || [[ "$REPLICA" -gt 3 ]]; then
  echo "serve.sh: the plan has replicas 0 to 3, not REPLICA $REPLICA" >&2
  exit 2
fi
SLOT=$((REPLICA % 4)) # replicas that share a server
# Set CUDA_VISIBLE_DEVICES where other pools share the server.
DEVICES="$(seq -s, $((SLOT * 2)) $((SLOT * 2 + 1)))"
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-$DEVICES}"
PORT="${PORT:-$((8000 + SLOT))}"

exec python3 -m sglang.launch_server --model-path "$MODEL" \
  --host 0.0.0.0 --port "$PORT" \
  "${PARALLEL_ARGS[@]}" \
  "${MODEL_ARGS[@]}" \
  "${SCHEDULER_ARGS[@]}" \
  "${CACHE_ARGS[@]}" \
  "$@"
