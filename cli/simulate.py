"""``meshwright simulate``: the exact schedule of one plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from meshwright.cli.contention import ContentionFlags, asked_contention, contention_options
from meshwright.cli.options import CommonOptions, common_options

if TYPE_CHECKING:
    from meshwright.costmodels.contention import ContentionOutcome
    from meshwright.costmodels.context import CostContext
    from meshwright.costmodels.prediction import Prediction
    from meshwright.planner.plan_file import PlanDocument
    from meshwright.simcore.domain.plan import ParallelPlan
    from meshwright.simcore.training.jitter import Jitter, JitterResult

__all__ = ["command"]

_DEFAULT_SEEDS = 100
_OTHER_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".pdf", ".html")


@click.command("simulate", short_help="Simulate a plan's exact schedule.")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option(
    "--timeline",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a trace (.json.gz) that opens in ui.perfetto.dev.",
)
@click.option("--picture", type=click.Path(path_type=Path), metavar="FILE", help="Write the timeline as SVG.")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Write the result as DIR/result.json."
)
@click.option(
    "--flops",
    type=click.Choice(["causal", "full-attention"]),
    default="causal",
    show_default=True,
    help="How MFU counts attention.",
)
@click.option("--jitter", metavar="SPREAD", help="Let every rank's time for an operation vary, e.g. by 2%.")
@click.option("--rank-spread", metavar="SPREAD", help="Let some ranks be slower for good, e.g. by 1%.")
@click.option(
    "--slow-rank", "slow_ranks", multiple=True, metavar="RANK=EXTRA", help="Slow one rank down, e.g. 17=20%."
)
@click.option(
    "--slow-node", "slow_nodes", multiple=True, metavar="NODE=EXTRA", help="Slow all ranks of a node down."
)
@click.option(
    "--requests",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Serving: requests to serve instead of the plan's own.",
)
@click.option("--explain", "explains", is_flag=True, help="Serving: split the time to the first token.")
@click.option(
    "--policy",
    metavar="NAME",
    help="Serving: form steps otherwise than the engine does: static, orca, chunked_prefill, prefill_first, split_fuse, "
    "inflight.",
)
@click.option(
    "--seeds",
    type=click.IntRange(1, 1_000_000),
    help="Iterations to draw with jitter, the first one with --seed; 100.",
)
@contention_options
@common_options
def command(
    *,
    plan: Path,
    timeline: Path | None,
    picture: Path | None,
    out: Path | None,
    flops: str,
    jitter: str | None,
    rank_spread: str | None,
    slow_ranks: tuple[str, ...],
    slow_nodes: tuple[str, ...],
    contention: ContentionFlags,
    requests: Path | None,
    explains: bool,
    policy: str | None,
    seeds: int | None,
    common: CommonOptions,
) -> None:
    """Simulate the exact schedule of PLAN (a file that 'meshwright plan' wrote), operation by operation.

    A serving plan is simulated request by request.

    \b
    meshwright simulate plans/1.yaml --timeline step.json.gz
    meshwright simulate plans/1.yaml --jitter 2% --rank-spread 1% --seeds 100
    meshwright simulate plans/1.yaml --contention --routing ecmp --background 'leaf up=30%'
    meshwright simulate serving-plan.yaml --requests requests.jsonl --out results/
    meshwright simulate serving-plan.yaml --policy orca
    """
    from meshwright.cli.render.console import print_json
    from meshwright.cli.render.simulation import print_simulation, simulation_mapping
    from meshwright.costmodels.context import cost_context
    from meshwright.costmodels.prediction import predict
    from meshwright.errors import SpecError
    from meshwright.planner.plan_file import read_plan
    from meshwright.planner.serving.plan_file import is_serving_plan

    if is_serving_plan(plan):
        from meshwright.cli.simulate_serving import simulate_serving

        simulate_serving(
            plan,
            {
                "--picture": picture,
                "--jitter": jitter,
                "--rank-spread": rank_spread,
                "--slow-rank": slow_ranks,
                "--slow-node": slow_nodes,
                "--seeds": seeds,
                **contention.given,
            },
            requests=requests,
            timeline=timeline,
            out=out,
            explains=explains,
            policy=policy,
            common=common,
        )
        return
    if requests is not None or explains or policy is not None:
        raise SpecError(
            f"{plan}: --requests, --explain and --policy go with serving plans, this is a training plan"
        )
    document = read_plan(plan)
    asked = _asked_jitter(
        document.plan, document.job.cluster.node.num_gpus, jitter, rank_spread, slow_ranks, slow_nodes, seeds
    )
    context = cost_context(document.job, calibration_paths=common.calibrations)
    prediction = predict(context, document.plan, flops)  # type: ignore[arg-type]  # click.Choice holds the words
    jittered = None
    if asked is not None:
        _check_equal_replicas(plan, document)
        jittered = _simulate_jitter(context, document.plan, prediction, asked, seeds, common)
    slow = () if asked is None else asked.slow_ranks
    contended = asked_contention(context, document.plan, contention, slow, common.seed)
    written = _write(prediction, jittered, contended, timeline, picture, out, force=common.force)
    if common.as_json:
        print_json(
            {**simulation_mapping(document, context, prediction, jittered, contended), "written": written}
        )
    else:
        print_simulation(document, context, prediction, jittered, contended, flops, written)


def _check_equal_replicas(path: Path, document: PlanDocument) -> None:
    """Refuse jitter of replicas that differ: it is drawn over ranks that all take the time of one replica."""
    from meshwright.costmodels.mixed import replica_groups
    from meshwright.errors import SpecError

    job = document.job
    if not job.cluster.is_mixed:
        return
    groups = replica_groups(job.cluster, document.plan, job.workload.global_batch_size)
    if len(groups) > 1:
        raise SpecError(
            f"{path}: its replicas run on different kinds of node or different numbers of micro-batches, and jitter is "
            "drawn over equal replicas; leave --jitter, --rank-spread, --slow-rank and --slow-node out"
        )


def _asked_jitter(
    plan: ParallelPlan,
    num_node_gpus: int,
    jitter: str | None,
    rank_spread: str | None,
    slow_ranks: tuple[str, ...],
    slow_nodes: tuple[str, ...],
    seeds: int | None,
) -> Jitter | None:
    """Return what the flags ask for; None when they ask for no jitter."""
    from meshwright.errors import SpecError
    from meshwright.simcore.training.jitter import Jitter

    if jitter is None and rank_spread is None and not slow_ranks and not slow_nodes:
        if seeds is not None:
            raise SpecError(
                "--seeds draws iterations with jitter: give --jitter, --rank-spread, --slow-rank or --slow-node too"
            )
        return None
    slow = [_slow("--slow-rank", "rank", text, plan.num_gpus) for text in slow_ranks]
    # Ranks fill the nodes in their global order; the last node may be used in part.
    num_nodes = -(-plan.num_gpus // num_node_gpus)
    for text in slow_nodes:
        node, factor = _slow("--slow-node", "node", text, num_nodes)
        first = node * num_node_gpus
        slow += [(rank, factor) for rank in range(first, min(first + num_node_gpus, plan.num_gpus))]
    return Jitter(
        operation_spread=0.0 if jitter is None else _share("--jitter", jitter, most=1.0),
        rank_spread=0.0 if rank_spread is None else _share("--rank-spread", rank_spread, most=1.0),
        slow_ranks=tuple(slow),
    )


def _slow(flag: str, what: str, text: str, count: int) -> tuple[int, float]:
    """Return number and factor of ``3=20%``."""
    from meshwright.errors import SpecError

    number, _, extra = text.partition("=")
    if not number.strip().isdecimal() or not extra.strip():
        raise SpecError(f"{flag}: '{text}' is not {what.upper()}=EXTRA; write for example 3=20%")
    # Longer numbers than any rank has are not even read.
    if len(number) > 18 or int(number) >= count:
        raise SpecError(f"{flag}: {what} {number} does not exist; the plan uses {what}s 0 to {count - 1}")
    return int(number), 1.0 + _share(flag, extra, most=999.0)


def _share(flag: str, text: str, most: float) -> float:
    from meshwright.errors import SpecError
    from meshwright.units import parse_quantity

    try:
        share = parse_quantity(text, "fraction")
    except SpecError as error:
        raise SpecError(f"{flag}: {error}") from None
    if share > most:
        raise SpecError(f"{flag}: '{text}' is more than {most:.0%}; write 0% to {most:.0%}")
    return share


def _simulate_jitter(
    context: CostContext,
    plan: ParallelPlan,
    prediction: Prediction,
    jitter: Jitter,
    seeds: int | None,
    common: CommonOptions,
) -> JitterResult:
    from meshwright.cli.render.console import ProgressLine
    from meshwright.costmodels.parallelism.data import is_fsdp_per_micro_batch
    from meshwright.costmodels.plan_columns import PlanColumns
    from meshwright.simcore.training.jitter import rank_groups, simulate_jitter

    columns = PlanColumns.from_plans([plan], context.workload.global_batch_size)
    syncs = bool(is_fsdp_per_micro_batch(context, columns)[0])
    if seeds is None:
        seeds = _DEFAULT_SEEDS if jitter.is_random else 1
    with ProgressLine(common.quiet or common.as_json) as progress:
        return simulate_jitter(
            prediction.iteration.costs,
            prediction.iteration.schedule,
            rank_groups(plan, syncs_every_micro_batch=syncs),
            jitter,
            num_seeds=seeds,
            first_seed=common.seed,
            progress=progress,
        )


def _write(
    prediction: Prediction,
    jittered: JitterResult | None,
    contended: ContentionOutcome | None,
    timeline: Path | None,
    picture: Path | None,
    out: Path | None,
    *,
    force: bool,
) -> list[str]:
    """Write what was asked for; every target is checked before the first is written. Returns what to print."""
    from meshwright.cli.render.contention import contention_mapping
    from meshwright.cli.render.jitter import jitter_mapping
    from meshwright.errors import SpecError
    from meshwright.planner.output_file import (
        check_replaceable,
        is_our_json,
        is_our_svg,
        is_our_trace,
        replace_file,
    )
    from meshwright.planner.plan_file import prediction_mapping
    from meshwright.simcore.chrome_trace import write_chrome_trace
    from meshwright.simcore.timeline import timeline_svg

    iteration = prediction.iteration if contended is None else contended.iteration.result
    result_path = out / "result.json" if out is not None else None
    if picture is not None and picture.suffix.lower() in _OTHER_PICTURES:
        raise SpecError(
            f"--picture {picture}: pictures are written as SVG; name it {picture.with_suffix('.svg')}"
        )
    for path, is_ours in ((timeline, is_our_trace), (picture, is_our_svg), (result_path, is_our_json)):
        if path is not None:
            check_replaceable(path, force=force, is_ours=is_ours)
    written = []
    if timeline is not None:
        try:
            timeline.parent.mkdir(parents=True, exist_ok=True)
            summary = write_chrome_trace(iteration, timeline)
        except OSError as error:
            raise SpecError(f"{timeline}: cannot be written ({error.strerror})") from None
        note = f"; {summary.note}" if summary.note else ""
        written.append(
            f"{timeline} ({summary.num_events:,} events, open it in https://ui.perfetto.dev{note})"
        )
    if picture is not None:
        svg = timeline_svg(iteration, "" if contended is None else "with contention")
        replace_file(picture, svg.encode(), force=force, is_ours=is_our_svg)
        written.append(str(picture))
    if result_path is not None:
        mapping = {"written_by": "meshwright", "schema_version": 1, **prediction_mapping(prediction)}
        if jittered is not None:
            mapping["jitter"] = jitter_mapping(jittered)
        if contended is not None:
            mapping["contention"] = contention_mapping(contended)
        text = json.dumps(mapping, indent=2, allow_nan=False) + "\n"
        replace_file(result_path, text.encode(), force=force, is_ours=is_our_json)
        written.append(str(result_path))
    return written
