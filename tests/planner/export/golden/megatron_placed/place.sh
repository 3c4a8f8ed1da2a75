#!/usr/bin/env bash
# Meshwright: orders a list of hosts as the plan wants it.
# place.sh HOSTS OUT: HOSTS has one host name per line; OUT is a folder, which gets hostfile, rankfile, slurm_hosts
# and nodes. Start node N of the plan on the host of line N+1 of nodes, or give the files to a launcher:
#   deepspeed --hostfile OUT/hostfile ...      mpirun --hostfile OUT/hostfile --rankfile OUT/rankfile ...
#   SLURM_HOSTFILE=OUT/slurm_hosts srun --distribution=arbitrary ...
# A rankfile binds each rank to cores: CORES_PER_RANK of them, 1 unless set.
set -euo pipefail

EXPORT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

# shellcheck source=placement.sh
source "$EXPORT_DIR/placement.sh"

if [[ "$#" -ne 2 ]]; then
  echo "usage: place.sh HOSTS OUT" >&2
  exit 2
fi
CORES_PER_RANK="${CORES_PER_RANK:-1}"
if ! [[ "$CORES_PER_RANK" =~ ^[1-9][0-9]{0,3}$ ]]; then
  echo "place.sh: CORES_PER_RANK $CORES_PER_RANK is not a whole number from 1" >&2
  exit 2
fi
mapfile -t HOSTS < <(grep -v '^[[:space:]]*\(#\|$\)' -- "$1")
if [[ "${#HOSTS[@]}" -lt 4 ]]; then
  echo "place.sh: the plan runs on 4 nodes, but $1 names ${#HOSTS[@]} hosts" >&2
  exit 2
fi
for host in "${HOSTS[@]}"; do
  if ! [[ "$host" =~ ^[A-Za-z0-9][A-Za-z0-9._-]{0,252}$ ]]; then
    echo "place.sh: $host in $1 is not a host name" >&2
    exit 2
  fi
done

mkdir -p -- "$2"
: >"$2/hostfile"
: >"$2/rankfile"
: >"$2/slurm_hosts"
: >"$2/nodes"
rank=0
for place in "${HOST_ORDER[@]}"; do
  if [[ "$place" -ge "${#HOSTS[@]}" ]]; then
    echo "place.sh: the plan wants host $place (from 0), but $1 names ${#HOSTS[@]}" >&2
    exit 2
  fi
  host="${HOSTS[place]}"
  printf '%s\n' "$host" >>"$2/nodes"
  printf '%s\n' "$host" >>"$2/slurm_hosts"
  printf '%s slots=8\n' "$host" >>"$2/hostfile"
  for ((local_rank = 0; local_rank < 8; local_rank++)); do
    first=$((local_rank * CORES_PER_RANK))
    printf 'rank %d=%s slot=%d-%d\n' "$rank" "$host" "$first" "$((first + CORES_PER_RANK - 1))" >>"$2/rankfile"
    rank=$((rank + 1))
  done
done
