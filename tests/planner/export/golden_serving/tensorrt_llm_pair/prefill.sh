#!/usr/bin/env bash
# Meshwright: deepseek-v3, prefill pool, 2 replicas, 8 GPUs each, TensorRT-LLM 1.2.
# Run once per replica, REPLICA from 0 to 1; further arguments go to the engine.
set -euo pipefail

EXPORT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

: "${MODEL:?set MODEL to the folder or the name of the checkpoint}"

REPLICA="${REPLICA:-0}"
if ! [[ "$REPLICA" =~ ^(0|[1-9][0-9]{0,5})$ ]] || [[ "$REPLICA" -gt 1 ]]; then
  echo "prefill.sh: the plan has replicas 0 to 1, not REPLICA $REPLICA" >&2
  exit 2
fi
SLOT=$((REPLICA % 1)) # replicas that share a server
PORT="${PORT:-$((8100 + SLOT))}"

exec trtllm-serve "$MODEL" \
  --host 0.0.0.0 --port "$PORT" \
  --extra_llm_api_options "$EXPORT_DIR/prefill.yaml" \
  "$@"
