#!/usr/bin/env bash
# Meshwright: llama-3-8b, aggregated pool, 1 replica, 2 GPUs, TensorRT-LLM 1.2.
# Run once per replica; further arguments go to the engine.
set -euo pipefail

EXPORT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

: "${MODEL:?set MODEL to the folder or the name of the checkpoint}"

REPLICA="${REPLICA:-0}"
if ! [[ "$REPLICA" =~ ^(0|[1-9][0-9]{0,5})$ ]] || [[ "$REPLICA" -gt 0 ]]; then
  echo "serve.sh: the plan has replicas 0 to 0, not REPLICA $REPLICA" >&2
  exit 2
fi
SLOT=$((REPLICA % 4)) # replicas that share a server
# Set CUDA_VISIBLE_DEVICES where other pools share the server.
DEVICES="$(seq -s, $((SLOT * 2)) $((SLOT * 2 + 1)))"
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-$DEVICES}"
PORT="${PORT:-$((8000 + SLOT))}"

exec trtllm-serve "$MODEL" \
  --host 0.0.0.0 --port "$PORT" \
  --extra_llm_api_options "$EXPORT_DIR/serve.yaml" \
  "$@"
