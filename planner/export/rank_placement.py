"""Files that put the ranks of a plan on hosts and GPUs: host lists, a rankfile, the order of GPUs.

The user's list of hosts is not part of a plan, so ``place.sh`` turns it into the files: a hostfile (DeepSpeed and
Open MPI), a rankfile (Open MPI), the list that Slurm reads with ``--distribution=arbitrary``, and for a script that
starts a node its NODE_RANK, MASTER_ADDR and CUDA_VISIBLE_DEVICES. Sources: mpirun(1) of Open MPI 4.1 (hostfiles,
rankfiles), srun(1) (SLURM_HOSTFILE), DeepSpeed's "Resource Configuration (multi-node)".
"""

from __future__ import annotations

from meshwright.planner.export.base import ExportFile
from meshwright.planner.export.rules import server_size
from meshwright.simcore.domain.device_mapping import DeviceMapping
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["PLACEMENT_NAME", "placed_gpus", "placement_files"]

PLACEMENT_NAME = "placement.sh"


def placed_gpus(job: TrainingJob, plan: ParallelPlan) -> tuple[int, int]:
    """Return the nodes of a plan and the GPUs it takes of each."""
    gpus_per_node = min(server_size(job.cluster), plan.num_gpus)
    return plan.num_gpus // gpus_per_node, gpus_per_node


def placement_files(job: TrainingJob, plan: ParallelPlan) -> tuple[ExportFile, ...]:
    """Return ``placement.sh``, to be read by the launch script, and ``place.sh``, which writes host files.

    Parameters
    ----------
    job, plan : TrainingJob, ParallelPlan
        A plan whose mapping fits its nodes; without one, ranks stay in their natural order.
    """
    num_nodes, gpus_per_node = placed_gpus(job, plan)
    mapping = plan.device_mapping or DeviceMapping()
    orders = [",".join(map(str, mapping.gpus_of_node(node, gpus_per_node))) for node in range(num_nodes)]
    hosts = " ".join(str(mapping.host_of_node(node)) for node in range(num_nodes))
    same = len(set(orders)) == 1
    rows = [f"  '{order}'" for order in (orders[:1] if same else orders)]
    index = "0" if same else "NODE_RANK"
    placement = "\n".join(
        [
            "# shellcheck shell=bash",
            "# shellcheck disable=SC2034  # read by the scripts of this folder",
            "# Where the ranks run. Rank r is local rank r modulo the GPUs of a node.",
            f"# Axes of the plan, fastest first: {mapping.rank_order}.",
            "",
            "# Host of each node, by its place in the list of hosts.",
            f"HOST_ORDER=({hosts})",
            "",
            f"# GPUs of {'every node' if same else 'each node'}, in the order of local ranks.",
            "GPU_ORDERS=(",
            *rows,
            ")",
            "",
            "place_gpus() { # node rank",
            '  local NODE_RANK="$1"',
            '  if ! [[ "$NODE_RANK" =~ ^(0|[1-9][0-9]{0,6})$ ]]; then',
            '    echo "placement.sh: NODE_RANK $NODE_RANK is not a whole number from 0" >&2',
            "    return 2",
            "  fi",
            f'  export CUDA_VISIBLE_DEVICES="${{GPU_ORDERS[{index}]}}"',
            "}",
        ]
    )
    return (
        ExportFile(PLACEMENT_NAME, placement + "\n"),
        ExportFile("place.sh", _place_script(num_nodes, gpus_per_node), is_executable=True),
    )


def _place_script(num_nodes: int, gpus_per_node: int) -> str:
    return f"""#!/usr/bin/env bash
# Meshwright: orders a list of hosts as the plan wants it.
# place.sh HOSTS OUT: HOSTS has one host name per line; OUT is a folder, which gets hostfile, rankfile, slurm_hosts
# and nodes. Start node N of the plan on the host of line N+1 of nodes, or give the files to a launcher:
#   deepspeed --hostfile OUT/hostfile ...      mpirun --hostfile OUT/hostfile --rankfile OUT/rankfile ...
#   SLURM_HOSTFILE=OUT/slurm_hosts srun --distribution=arbitrary ...
# A rankfile binds each rank to cores: CORES_PER_RANK of them, 1 unless set.
set -euo pipefail

EXPORT_DIR="$(cd -- "$(dirname -- "${{BASH_SOURCE[0]}}")" && pwd)"

# shellcheck source={PLACEMENT_NAME}
source "$EXPORT_DIR/{PLACEMENT_NAME}"

if [[ "$#" -ne 2 ]]; then
  echo "usage: place.sh HOSTS OUT" >&2
  exit 2
fi
CORES_PER_RANK="${{CORES_PER_RANK:-1}}"
if ! [[ "$CORES_PER_RANK" =~ ^[1-9][0-9]{{0,3}}$ ]]; then
  echo "place.sh: CORES_PER_RANK $CORES_PER_RANK is not a whole number from 1" >&2
  exit 2
fi
mapfile -t HOSTS < <(grep -v '^[[:space:]]*\\(#\\|$\\)' -- "$1")
if [[ "${{#HOSTS[@]}}" -lt {num_nodes} ]]; then
  echo "place.sh: the plan runs on {num_nodes} nodes, but $1 names ${{#HOSTS[@]}} hosts" >&2
  exit 2
fi
for host in "${{HOSTS[@]}}"; do
  if ! [[ "$host" =~ ^[A-Za-z0-9][A-Za-z0-9._-]{{0,252}}$ ]]; then
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
for place in "${{HOST_ORDER[@]}}"; do
  if [[ "$place" -ge "${{#HOSTS[@]}}" ]]; then
    echo "place.sh: the plan wants host $place (from 0), but $1 names ${{#HOSTS[@]}}" >&2
    exit 2
  fi
  host="${{HOSTS[place]}}"
  printf '%s\\n' "$host" >>"$2/nodes"
  printf '%s\\n' "$host" >>"$2/slurm_hosts"
  printf '%s slots={gpus_per_node}\\n' "$host" >>"$2/hostfile"
  for ((local_rank = 0; local_rank < {gpus_per_node}; local_rank++)); do
    first=$((local_rank * CORES_PER_RANK))
    printf 'rank %d=%s slot=%d-%d\\n' "$rank" "$host" "$first" "$((first + CORES_PER_RANK - 1))" >>"$2/rankfile"
    rank=$((rank + 1))
  done
done
"""
