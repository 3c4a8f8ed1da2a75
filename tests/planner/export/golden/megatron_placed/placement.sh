# shellcheck shell=bash
# shellcheck disable=SC2034  # read by the scripts of this folder
# Where the ranks run. Rank r is local rank r modulo the GPUs of a node.
# Axes of the plan, fastest first: tp-cp-ep-pp-dp.

# Host of each node, by its place in the list of hosts.
HOST_ORDER=(2 0 3 1)

# GPUs of every node, in the order of local ranks.
GPU_ORDERS=(
  '0,1,2,3,7,6,5,4'
)

place_gpus() { # node rank
  local NODE_RANK="$1"
  if ! [[ "$NODE_RANK" =~ ^(0|[1-9][0-9]{0,6})$ ]]; then
    echo "placement.sh: NODE_RANK $NODE_RANK is not a whole number from 0" >&2
    return 2
  fi
  export CUDA_VISIBLE_DEVICES="${GPU_ORDERS[0]}"
}
