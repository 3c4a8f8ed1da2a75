#!/usr/bin/env bash
# Meshwright: llama-3-8b on 16 GPUs, Megatron-LM core_r0.16.
# Run on every node, with NODE_RANK from 0; further arguments go to the program.
set -euo pipefail

EXPORT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

: "${MEGATRON_PATH:?set MEGATRON_PATH to a Megatron-LM checkout (core_r0.16)}"

# shellcheck source=env.sh
source "$EXPORT_DIR/env.sh"
# shellcheck source=args.sh
source "$EXPORT_DIR/args.sh"

NNODES="${NNODES:-2}"
GPUS_PER_NODE="${GPUS_PER_NODE:-8}"
NODE_RANK="${NODE_RANK:-${SLURM_NODEID:-0}}"
MASTER_PORT="${MASTER_PORT:-29500}"

# Bash would run commands hidden in the subscript of a "number".
if ! [[ "$NNODES $GPUS_PER_NODE" =~ ^[1-9][0-9]{0,6}" "[1-9][0-9]{0,3}$ ]]; then
  echo "launch.sh: NNODES and GPUS_PER_NODE must be whole numbers from 1" >&2
  exit 2
fi
if [[ $((NNODES * GPUS_PER_NODE)) -ne 16 ]]; then
  echo "launch.sh: the plan is for 16 GPUs," \
    "not NNODES $NNODES x GPUS_PER_NODE $GPUS_PER_NODE" >&2
  exit 2
fi
if [[ "$NNODES" -gt 1 && -z "${MASTER_ADDR:-}" ]]; then
  echo "launch.sh: set MASTER_ADDR to the host name of node 0" >&2
  exit 2
fi
MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}"

exec torchrun \
  --nnodes "$NNODES" \
  --nproc-per-node "$GPUS_PER_NODE" \
  --node-rank "$NODE_RANK" \
  --master-addr "$MASTER_ADDR" \
  --master-port "$MASTER_PORT" \
  "$MEGATRON_PATH/pretrain_gpt.py" \
  "${MODEL_ARGS[@]}" \
  "${PARALLEL_ARGS[@]}" \
  "${TRAINING_ARGS[@]}" \
  "${DATA_ARGS[@]}" \
  "$@"
