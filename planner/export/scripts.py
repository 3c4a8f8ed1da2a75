"""Shell text shared by the exporters: quoted arrays, a torchrun launcher, a Slurm job.

Names that users choose (models, clusters) enter a script only through :func:`label`; every other value
goes through ``shlex.quote``. The launcher takes NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT from the
environment, which is what the Slurm job sets.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["TORCHRUN", "ArgumentGroup", "args_file", "label", "launch_script", "slurm_job"]

#: The command that starts a program on every GPU of a node.
TORCHRUN = (
    "torchrun",
    '--nnodes "$NNODES"',
    '--nproc-per-node "$GPUS_PER_NODE"',
    '--node-rank "$NODE_RANK"',
    '--master-addr "$MASTER_ADDR"',
    '--master-port "$MASTER_PORT"',
)

_ORDERED_HOSTS = """# shellcheck source={placement}
source "$EXPORT_DIR/{placement}"
PLACED=()
for place in "${{HOST_ORDER[@]}}"; do
  if [[ "$place" -ge "${{#HOSTS[@]}}" ]]; then
    echo "job.sbatch: the plan wants host $place (from 0) of the job, which has ${{#HOSTS[@]}}" >&2
    exit 2
  fi
  PLACED+=("${{HOSTS[place]}}")
done
HOSTS=("${{PLACED[@]}}")
LIST="$(mktemp)"
trap 'rm -f -- "$LIST"' EXIT
printf '%s\\n' "${{HOSTS[@]}}" >"$LIST"
"""
# Task i runs on line i of the list, whatever number Slurm gives the node.
_PLACED_LAUNCH = """\\
  bash -c 'NODE_RANK="$SLURM_PROCID" exec bash "$0" "$@"' "$EXPORT_DIR/launch.sh" "$@"\
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArgumentGroup:
    """One bash array of command-line arguments.

    Parameters
    ----------
    name : str
        Shell variable.
    comment : str
        One line written above it.
    options : tuple[tuple[str, ...], ...]
        Each option with its values; one line of the file.
    """

    name: str
    comment: str
    options: tuple[tuple[str, ...], ...]

    @property
    def argv(self) -> tuple[str, ...]:
        """The arguments as the program sees them."""
        return tuple(word for option in self.options for word in option)


def label(name: str) -> str:
    """Return a name reduced to what is safe in comments, job names and file names.

    Examples
    --------
    >>> label("llama-3-8b")
    'llama-3-8b'
    >>> label("x; rm -rf $HOME")
    'x-rm--rf-HOME'
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:48] or "model"


def args_file(
    title: str, groups: Iterable[ArgumentGroup], notes: Iterable[str], reader: str = "launch.sh"
) -> str:
    """Return a file of bash arrays, to be sourced by ``reader``."""
    lines = ["# shellcheck shell=bash", f"# shellcheck disable=SC2034  # read by {reader}", f"# {title}"]
    lines += [f"# Note: {note}" for note in notes]
    for group in groups:
        lines += ["", f"# {group.comment}", f"{group.name}=("]
        lines += ["  " + " ".join(_quote(word) for word in option) for option in group.options]
        lines.append(")")
    return "\n".join(lines) + "\n"


def _quote(word: str) -> str:
    # Unquoted commas are legal but look like a mistaken separator of array elements, to linters too.
    return f"'{word}'" if shlex.quote(word) == word and "," in word else shlex.quote(word)


def required_variables(required: Iterable[tuple[str, str]]) -> str:
    """Return the lines that end a script where a variable is unset.

    Examples
    --------
    >>> print(required_variables([("MODEL", "a folder")]))
    : "${MODEL:?set MODEL to a folder}"
    """
    return "\n".join(f': "${{{variable}:?set {variable} to {meaning}}}"' for variable, meaning in required)


def launch_script(
    *,
    title: str,
    sources: Iterable[str],
    required: Iterable[tuple[str, str]],
    num_nodes: int,
    gpus_per_node: int,
    words: Iterable[str],
    last_words: Iterable[str] = (),
    checks: Iterable[str] = (),
    starter: Iterable[str] = TORCHRUN,
    placing: str = "",
) -> str:
    """Return the script that starts torchrun, or another starter, on one node.

    Parameters
    ----------
    title : str
        First comment; printable ASCII of ours.
    sources : Iterable[str]
        Files of the bundle to read first.
    required : Iterable[tuple[str, str]]
        Environment variables that must be set, and what each must name.
    num_nodes, gpus_per_node : int
        Default world; another split of the same world is accepted.
    words, last_words : Iterable[str]
        Program that torchrun starts and its arguments, as quoted shell words, before and after those that the
        user adds to the script.
    checks : Iterable[str]
        Shell commands of ours that end the script where a file still needs the user's hand.
    starter : Iterable[str]
        The command that starts the program and its options, one line of the script each.
    placing : str
        Shell line that puts the ranks of node NODE_RANK on its GPUs; empty leaves them in their order.
    """
    read = "\n".join(f'# shellcheck source={name}\nsource "$EXPORT_DIR/{name}"' for name in sources)
    command = " \\\n  ".join([*starter, *words, '"$@"', *last_words])
    needed = required_variables(required)
    placed = f"{placing}\n" if placing else ""
    checked = "".join(f"\n{check}\n" for check in checks)
    return f"""#!/usr/bin/env bash
# {title}
# Run on every node, with NODE_RANK from 0; further arguments go to the program.
set -euo pipefail

EXPORT_DIR="$(cd -- "$(dirname -- "${{BASH_SOURCE[0]}}")" && pwd)"

{needed}

{read}
{checked}
NNODES="${{NNODES:-{num_nodes}}}"
GPUS_PER_NODE="${{GPUS_PER_NODE:-{gpus_per_node}}}"
NODE_RANK="${{NODE_RANK:-${{SLURM_NODEID:-0}}}}"
MASTER_PORT="${{MASTER_PORT:-29500}}"

# Bash would run commands hidden in the subscript of a "number".
if ! [[ "$NNODES $GPUS_PER_NODE" =~ ^[1-9][0-9]{{0,6}}" "[1-9][0-9]{{0,3}}$ ]]; then
  echo "launch.sh: NNODES and GPUS_PER_NODE must be whole numbers from 1" >&2
  exit 2
fi
if [[ $((NNODES * GPUS_PER_NODE)) -ne {num_nodes * gpus_per_node} ]]; then
  echo "launch.sh: the plan is for {num_nodes * gpus_per_node} GPUs," \\
    "not NNODES $NNODES x GPUS_PER_NODE $GPUS_PER_NODE" >&2
  exit 2
fi
if [[ "$NNODES" -gt 1 && -z "${{MASTER_ADDR:-}}" ]]; then
  echo "launch.sh: set MASTER_ADDR to the host name of node 0" >&2
  exit 2
fi
MASTER_ADDR="${{MASTER_ADDR:-127.0.0.1}}"
{placed}
exec {command}
"""


def slurm_job(
    *, title: str, name: str, num_nodes: int, gpus_per_node: int, owns_nodes: bool, placement: str = ""
) -> str:
    """Return the batch script that starts ``launch.sh`` once per node.

    With ``placement``, a file of the bundle that defines HOST_ORDER, nodes stand in that order of the job's hosts.

    The script cannot find its own folder (Slurm runs a copy), so it is submitted from there. CPU binding
    is off because one task per node would otherwise be pinned to one core.
    """
    exclusive = "#SBATCH --exclusive\n" if owns_nodes else ""
    ordered, srun, launched = "", "srun", 'bash "$EXPORT_DIR/launch.sh" "$@"'
    if placement:
        ordered = _ORDERED_HOSTS.format(placement=placement)
        srun = f'# shellcheck disable=SC2016  # the variables are those of the node\nSLURM_HOSTFILE="$LIST" srun --ntasks={num_nodes} --distribution=arbitrary'
        launched = _PLACED_LAUNCH
    return f"""#!/usr/bin/env bash
#SBATCH --job-name=meshwright-{label(name)}
#SBATCH --nodes={num_nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus_per_node}
{exclusive}#SBATCH --output=%x-%j.log
# {title}
# Submit from the folder of this file, or set EXPORT_DIR to it.
set -euo pipefail

EXPORT_DIR="${{EXPORT_DIR:-${{SLURM_SUBMIT_DIR:-$PWD}}}}"
if [[ ! -f "$EXPORT_DIR/launch.sh" ]]; then
  echo "job.sbatch: no launch.sh in $EXPORT_DIR; submit from its folder or set EXPORT_DIR" >&2
  exit 2
fi

mapfile -t HOSTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
{ordered}export MASTER_ADDR="${{HOSTS[0]}}"
export MASTER_PORT="${{MASTER_PORT:-$((20000 + 10#${{SLURM_JOB_ID//[!0-9]/}} % 10000))}}"
export NNODES="$SLURM_JOB_NUM_NODES"
unset NODE_RANK

{srun} --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 {launched}
"""
