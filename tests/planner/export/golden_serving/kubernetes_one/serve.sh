#!/usr/bin/env bash
# Meshwright: llama-3-8b, aggregated pool, 1 replica, 16 GPUs, vLLM 0.33.0.
# Run on every server of a replica, with NODE_RANK from 0; further arguments go to the engine.
set -euo pipefail

EXPORT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

: "${MODEL:?set MODEL to the folder or the name of the checkpoint}"

# shellcheck source=serve_args.sh
source "$EXPORT_DIR/serve_args.sh"

REPLICA="${REPLICA:-0}"
if ! [[ "$REPLICA" =~ ^(0|[1-9][0-9]{0,5})$ ]] || [[ "$REPLICA" -gt 0 ]]; then
  echo "serve.sh: the plan has replicas 0 to 0, not REPLICA $REPLICA" >&2
  exit 2
fi
SLOT=$((REPLICA % 1)) # replicas that share a server
PORT="${PORT:-$((8000 + SLOT))}"

NNODES=2
NODE_RANK="${NODE_RANK:-${SLURM_NODEID:-0}}"
MASTER_PORT="${MASTER_PORT:-29501}"
if ! [[ "$NODE_RANK" =~ ^(0|[1-9][0-9]{0,5})$ ]] || [[ "$NODE_RANK" -ge 2 ]]; then
  echo "serve.sh: a replica has servers 0 to 1, not NODE_RANK $NODE_RANK" >&2
  exit 2
fi
if [[ -z "${MASTER_ADDR:-}" ]]; then
  echo "serve.sh: set MASTER_ADDR to the host name of server 0 of the replica" >&2
  exit 2
fi
NODE_ARGS=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
if [[ "$NODE_RANK" -gt 0 ]]; then
  NODE_ARGS+=(--headless)
fi

exec vllm serve "$MODEL" \
  --host 0.0.0.0 --port "$PORT" \
  "${PARALLEL_ARGS[@]}" \
  "${MODEL_ARGS[@]}" \
  "${SCHEDULER_ARGS[@]}" \
  "${CACHE_ARGS[@]}" \
  "${NODE_ARGS[@]}" \
  "$@"
