#!/usr/bin/env bash
# Meshwright: deepseek-v3, decode pool, 1 replica, 16 GPUs, SGLang 0.5.23.
# Run on every server of a replica, with NODE_RANK from 0; further arguments go to the engine.
set -euo pipefail

EXPORT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

: "${MODEL:?set MODEL to the folder or the name of the checkpoint}"

# shellcheck source=decode_args.sh
source "$EXPORT_DIR/decode_args.sh"

REPLICA="${REPLICA:-0}"
if ! [[ "$REPLICA" =~ ^(0|[1-9][0-9]{0,5})$ ]] || [[ "$REPLICA" -gt 0 ]]; then
  echo "decode.sh: the plan has replicas 0 to 0, not REPLICA $REPLICA" >&2
  exit 2
fi
SLOT=$((REPLICA % 1)) # replicas that share a server
PORT="${PORT:-$((8200 + SLOT))}"

NNODES=2
NODE_RANK="${NODE_RANK:-${SLURM_NODEID:-0}}"
MASTER_PORT="${MASTER_PORT:-29501}"
if ! [[ "$NODE_RANK" =~ ^(0|[1-9][0-9]{0,5})$ ]] || [[ "$NODE_RANK" -ge 2 ]]; then
  echo "decode.sh: a replica has servers 0 to 1, not NODE_RANK $NODE_RANK" >&2
  exit 2
fi
if [[ -z "${MASTER_ADDR:-}" ]]; then
  echo "decode.sh: set MASTER_ADDR to the host name of server 0 of the replica" >&2
  exit 2
fi
NODE_ARGS=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --dist-init-addr "$MASTER_ADDR:$MASTER_PORT")

exec python3 -m sglang.launch_server --model-path "$MODEL" \
  --host 0.0.0.0 --port "$PORT" \
  "${PARALLEL_ARGS[@]}" \
  "${MODEL_ARGS[@]}" \
  "${SCHEDULER_ARGS[@]}" \
  "${CACHE_ARGS[@]}" \
  "${SPECULATIVE_ARGS[@]}" \
  "${TRANSFER_ARGS[@]}" \
  "${NODE_ARGS[@]}" \
  "$@"
