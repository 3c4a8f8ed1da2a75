"""Shell text shared by the serving exporters: one script that starts a replica's part on a server, and a router."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from meshwright.planner.export.base import ExportBundle, ExportFile
from meshwright.planner.export.rules import server_size
from meshwright.planner.export.scripts import required_variables
from meshwright.simcore.domain.serving import ServingJob, ServingPlan, ServingPool

__all__ = [
    "MODEL_VARIABLE",
    "ReplicaShape",
    "pool_script_name",
    "pools_bundle",
    "replica_shape",
    "router_file",
    "serving_file",
]

MODEL_VARIABLE = ("MODEL", "the folder or the name of the checkpoint")
# The first port of a pool; replicas that share a server count up from it.
_FIRST_PORT = {"aggregated": 8000, "prefill": 8100, "decode": 8200}
_SCRIPT = {"aggregated": "serve", "prefill": "prefill", "decode": "decode"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaShape:
    """How a replica sits on servers.

    Parameters
    ----------
    num_servers : int
        Servers of one replica.
    gpus_per_server : int
        GPUs it takes of each.
    replicas_per_server : int
        Replicas that fit one server; 1 for those that span servers.
    """

    num_servers: int
    gpus_per_server: int
    replicas_per_server: int


def replica_shape(job: ServingJob, pool: ServingPool) -> ReplicaShape:
    """Return how a replica of the pool sits on servers of the cluster."""
    size, gpus = server_size(job.cluster_of(pool.role)), pool.gpus_per_replica
    if gpus > size:
        return ReplicaShape(num_servers=gpus // size, gpus_per_server=size, replicas_per_server=1)
    return ReplicaShape(num_servers=1, gpus_per_server=gpus, replicas_per_server=size // gpus)


def pool_script_name(pool: ServingPool) -> str:
    """Return the stem of the files of a pool: ``serve``, ``prefill`` or ``decode``."""
    return _SCRIPT[pool.role]


def pools_bundle(
    target: str,
    target_version: str,
    plan: ServingPlan,
    pool_files: Sequence[tuple[ExportFile, ...]],
    router: ExportFile | None,
    notes: tuple[str, ...],
) -> ExportBundle:
    """Return the bundle of an engine that one script per pool starts, with a router in front where there is one."""
    files = [file for files in pool_files for file in files]
    return ExportBundle(
        target=target,
        target_version=target_version,
        files=(*files, router) if router is not None else tuple(files),
        launch_command=" and ".join(
            f"MODEL=/path/to/checkpoint bash {pool_script_name(pool)}.sh" for pool in plan.pools
        ),
        notes=notes,
    )


def serving_file(
    job: ServingJob,
    pool: ServingPool,
    *,
    title: str,
    sources: Iterable[str],
    words: Iterable[str],
    exports: Iterable[str] = (),
    node_words: Iterable[str] = (),
    follower_words: Iterable[str] = (),
) -> ExportFile:
    """Return the script that starts the part of one replica that runs on one server.

    Parameters
    ----------
    job, pool : ServingJob, ServingPool
        What runs.
    title : str
        First comment; printable ASCII of ours.
    sources : Iterable[str]
        Files of the bundle to read first.
    words : Iterable[str]
        Program and arguments, as quoted shell words; the user's arguments follow.
    exports : Iterable[str]
        Lines of shell that set the environment; PORT, REPLICA, SLOT and NODE_RANK are known to them.
    node_words, follower_words : Iterable[str]
        Arguments of replicas that span servers, and further ones for all servers but the first.
    """
    shape, name = replica_shape(job, pool), f"{pool_script_name(pool)}.sh"
    sourced = "\n".join(f'# shellcheck source={file}\nsource "$EXPORT_DIR/{file}"' for file in sources)
    spans = shape.num_servers > 1
    all_words = [*words, *(('"${NODE_ARGS[@]}"',) if spans else ()), '"$@"']
    command = " \\\n  ".join(all_words)
    parts = [
        f"""#!/usr/bin/env bash
# {title}
# {_how_to_run(pool, shape)}
set -euo pipefail

EXPORT_DIR="$(cd -- "$(dirname -- "${{BASH_SOURCE[0]}}")" && pwd)"

{required_variables((MODEL_VARIABLE,))}
""",
        *((f"{sourced}\n",) if sourced else ()),
        _replica_lines(pool, shape, name),
    ]
    if spans:
        parts.append(_node_lines(shape, name, node_words, follower_words))
    if exported := "\n".join(exports):
        parts.append(f"{exported}\n")
    parts.append(f"exec {command}\n")
    return ExportFile(name, "\n".join(parts), is_executable=True)


def _how_to_run(pool: ServingPool, shape: ReplicaShape) -> str:
    where = (
        "on every server of a replica, with NODE_RANK from 0" if shape.num_servers > 1 else "once per replica"
    )
    which = f", REPLICA from 0 to {pool.num_replicas - 1}" if pool.num_replicas > 1 else ""
    return f"Run {where}{which}; further arguments go to the engine."


def _replica_lines(pool: ServingPool, shape: ReplicaShape, name: str) -> str:
    last, gpus, port = pool.num_replicas - 1, shape.gpus_per_server, _FIRST_PORT[pool.role]
    lines = [
        'REPLICA="${REPLICA:-0}"',
        f'if ! [[ "$REPLICA" =~ ^(0|[1-9][0-9]{{0,5}})$ ]] || [[ "$REPLICA" -gt {last} ]]; then',
        f'  echo "{name}: the plan has replicas 0 to {last}, not REPLICA $REPLICA" >&2',
        "  exit 2",
        "fi",
        f"SLOT=$((REPLICA % {shape.replicas_per_server})) # replicas that share a server",
    ]
    if shape.replicas_per_server > 1:
        lines += [
            "# Set CUDA_VISIBLE_DEVICES where other pools share the server.",
            f'DEVICES="$(seq -s, $((SLOT * {gpus})) $((SLOT * {gpus} + {gpus - 1})))"',
            'export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-$DEVICES}"',
        ]
    lines.append(f'PORT="${{PORT:-$(({port} + SLOT))}}"')
    return "\n".join(lines) + "\n"


def _node_lines(
    shape: ReplicaShape, name: str, node_words: Iterable[str], follower_words: Iterable[str]
) -> str:
    followers = " ".join(follower_words)
    lines = [
        f"NNODES={shape.num_servers}",
        'NODE_RANK="${NODE_RANK:-${SLURM_NODEID:-0}}"',
        'MASTER_PORT="${MASTER_PORT:-29501}"',
        f'if ! [[ "$NODE_RANK" =~ ^(0|[1-9][0-9]{{0,5}})$ ]] || [[ "$NODE_RANK" -ge {shape.num_servers} ]]; then',
        f'  echo "{name}: a replica has servers 0 to {shape.num_servers - 1}, not NODE_RANK $NODE_RANK" >&2',
        "  exit 2",
        "fi",
        'if [[ -z "${MASTER_ADDR:-}" ]]; then',
        f'  echo "{name}: set MASTER_ADDR to the host name of server 0 of the replica" >&2',
        "  exit 2",
        "fi",
        f"NODE_ARGS=({' '.join(node_words)})",
    ]
    if followers:
        lines += ['if [[ "$NODE_RANK" -gt 0 ]]; then', f"  NODE_ARGS+=({followers})", "fi"]
    return "\n".join(lines) + "\n"


def router_file(
    plan: ServingPlan,
    *,
    title: str,
    words: Iterable[str],
    aggregated_option: str,
    prefill_words: str,
    decode_words: str,
) -> ExportFile | None:
    """Return the script that starts the router; None for a single aggregated replica, which needs none.

    Parameters
    ----------
    plan : ServingPlan
        Its pools and how requests choose a replica.
    title : str
        First comment.
    words : Iterable[str]
        Router and its arguments but the URLs, as quoted shell words.
    aggregated_option : str
        Option that all URLs of aggregated replicas follow.
    prefill_words, decode_words : str
        Shell words of one URL, where ``$url`` is the URL and ``$index`` its place.
    """
    if not plan.is_disaggregated and plan.pools[0].num_replicas == 1:
        return None
    variables, loops = [], []
    for pool in plan.pools:
        variable = {"aggregated": "REPLICA_URLS", "prefill": "PREFILL_URLS", "decode": "DECODE_URLS"}[
            pool.role
        ]
        meaning = f"the URLs of the {pool.role} replicas in their order, separated by spaces"
        variables.append((variable, meaning))
        lines = [
            f'read -r -a URLS <<<"${variable}"',
            f'if [[ "${{#URLS[@]}}" -ne {pool.num_replicas} ]]; then',
            f'  echo "router.sh: the plan has {pool.num_replicas} in the {pool.role} pool,'
            f' but {variable} names ${{#URLS[@]}}" >&2',
            "  exit 2",
            "fi",
        ]
        if pool.role == "aggregated":
            lines.append(f'URL_ARGS+=({aggregated_option} "${{URLS[@]}}")')
        else:
            each = prefill_words if pool.role == "prefill" else decode_words
            lines += [
                'for index in "${!URLS[@]}"; do',
                '  url="${URLS[index]}"',
                f"  URL_ARGS+=({each})",
                "done",
            ]
        loops.append("\n".join(lines) + "\n")
    command = " \\\n  ".join([*words, '"${URL_ARGS[@]}"', '"$@"'])
    text = "\n".join(
        [
            f"#!/usr/bin/env bash\n# {title}\n# Run once, where every replica can be reached.\nset -euo pipefail\n",
            f'{required_variables(variables)}\n\nPORT="${{PORT:-8080}}"\nURL_ARGS=()\n',
            *loops,
            f"exec {command}\n",
        ]
    )
    return ExportFile("router.sh", text, is_executable=True)
