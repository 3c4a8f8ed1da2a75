"""``meshwright place``: experts on ranks."""

from __future__ import annotations

from pathlib import Path

import click

from meshwright.cli.options import CommonOptions, common_options

__all__ = ["command"]


@click.command("place", short_help="Place the experts of a mixture-of-experts model.")
@click.option("--model", required=True, help="Model id, published name, or path of a config.json.")
@click.option("--cluster", required=True, help="NODE:COUNT, cluster id, or a .yaml file.")
@click.option(
    "--routing",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Trace, transitions or loads: .npz, .parquet, SGLang .json or .pt, TensorRT-LLM folder.",
)
@click.option(
    "--loads", type=click.Path(path_type=Path), metavar="FILE", help="Load of each expert, one row per layer."
)
@click.option(
    "--synthetic", type=click.Choice(["weak", "strong"]), help="No data: draw routing with this affinity."
)
@click.option("--synthetic-tokens", type=click.IntRange(64, 1_000_000), default=16_384, show_default=True)
@click.option("--ep", type=click.IntRange(1, 65_536), help="Expert parallel ranks; all GPUs by default.")
@click.option("--redundant-experts", type=click.IntRange(0, 65_536), help="Slots for copies; 0 by default.")
@click.option(
    "--choose",
    is_flag=True,
    help="Choose ranks, redundant experts, capacity factor and overlap together; --ep and --redundant-experts fix theirs.",
)
@click.option(
    "--max-token-drop",
    type=click.FloatRange(0.0, 1.0, max_open=True),
    default=0.0,
    show_default=True,
    help="For --choose: share of the tokens that a capacity factor may drop.",
)
@click.option("--engine", default="sglang", show_default=True, help="Whose file to write.")
@click.option(
    "--objective", help="balance, traffic, joint or active; by default what dispatch and data allow."
)
@click.option("--dispatch", help="deduplicated, full or coherent; by default the engine's.")
@click.option(
    "--current", type=click.Path(path_type=Path), metavar="FILE", help="Placement in use: move few experts."
)
@click.option(
    "--imbalance-slack",
    type=float,
    default=1.25,
    show_default=True,
    help="Points of imbalance above EPLB that a joint placement may have.",
)
@click.option(
    "--speculative-grouping",
    is_flag=True,
    help="Hand tokens to where their next experts are expected; experts that are chosen together share a home.",
)
@click.option("--active-batch", type=click.IntRange(1, 1_000_000), default=128, show_default=True)
@click.option("--solver", help="auto, heuristic, highs or cbc.", default="auto", show_default=True)
@click.option("--simulate", is_flag=True, help="Layer time before and after: compute and all-to-all.")
@click.option(
    "--training",
    is_flag=True,
    help="Layer time forward and backward: experts at home, hot ones copied each iteration, smaller groups.",
)
@click.option(
    "--tokens-per-gpu",
    type=click.IntRange(1, 1_000_000),
    default=4096,
    show_default=True,
    help="For --simulate, --choose and --training.",
)
@click.option(
    "--permute-checkpoint",
    type=(click.Path(path_type=Path), click.Path(path_type=Path)),
    metavar="IN OUT",
    help="Write the safetensors of folder IN with experts in the placement's order to the new folder OUT.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder to write the engine's file to."
)
@common_options
def command(
    *,
    model: str,
    cluster: str,
    routing: Path | None,
    loads: Path | None,
    synthetic: str | None,
    synthetic_tokens: int,
    ep: int | None,
    redundant_experts: int | None,
    choose: bool,
    max_token_drop: float,
    engine: str,
    objective: str | None,
    dispatch: str | None,
    current: Path | None,
    imbalance_slack: float,
    speculative_grouping: bool,
    active_batch: int,
    solver: str,
    simulate: bool,
    training: bool,
    tokens_per_gpu: int,
    permute_checkpoint: tuple[Path, Path] | None,
    out: Path | None,
    common: CommonOptions,
) -> None:
    """Place experts on ranks, with copies in redundant slots; print bounds, and EPLB's placement beside it.

    \b
    meshwright place --model deepseek-v3 --cluster dgx-h200:4 --routing trace.npz --redundant-experts 32 --out placement/
    meshwright place --model deepseek-v3 --cluster dgx-h200:4 --routing trace.npz --choose --out placement/
    meshwright place --model mixtral-8x7b --cluster dgx-h100:1 --ep 4 --synthetic weak
    """
    from meshwright.cli.render.console import ProgressLine, print_json
    from meshwright.cli.render.place import placement_mapping, print_placement, report_text
    from meshwright.cli.render.place_choices import extra_mappings, print_choice, print_training_options
    from meshwright.planner.export.writer import write_bundle
    from meshwright.planner.placement.engines import placement_bundle
    from meshwright.planner.placement.job import PlacementFlags, read_placement_job, with_layout
    from meshwright.planner.placement.joint_choice import ChoiceLimits, choose_layout
    from meshwright.planner.placement.simulation import job_calibration, simulate_layers
    from meshwright.planner.placement.solving import solve_placement
    from meshwright.planner.placement.training import training_options

    job = read_placement_job(
        PlacementFlags(
            model=model,
            cluster=cluster,
            routing=routing,
            loads=loads,
            synthetic=synthetic,
            synthetic_tokens=synthetic_tokens,
            ep=ep,
            redundant_experts=redundant_experts,
            is_choosing=choose,
            engine=engine,
            objective=objective,
            dispatch=dispatch,
            current=current,
            imbalance_slack=imbalance_slack / 100.0,
            active_batch=active_batch,
            is_grouping_tokens=speculative_grouping,
            solver=solver,
            seed=common.seed,
        )
    )
    calibration = job_calibration(job, common.calibrations) if simulate or choose or training else None
    choice = layer_seconds = options = None
    with ProgressLine(common.quiet or common.as_json) as progress:
        if choose and calibration is not None:
            limits = ChoiceLimits(
                ep=ep,
                redundant_experts=redundant_experts,
                max_token_drop=max_token_drop,
                tokens_per_gpu=tokens_per_gpu,
            )
            choice = choose_layout(job, calibration, limits, progress)
            job = with_layout(job, choice.best.ep, choice.best.redundant_experts, job.request.routing)
        answer = solve_placement(job.request, progress)
        if simulate and calibration is not None:
            layer_seconds = simulate_layers(job, answer, tokens_per_gpu, calibration)
        if training and calibration is not None:
            options = training_options(job, calibration, tokens_per_gpu)
    mapping = placement_mapping(job, answer, layer_seconds)
    mapping |= extra_mappings(choice, options)
    if permute_checkpoint is not None:
        from meshwright.planner.placement.checkpoint import permute_checkpoint as permute

        source, target = permute_checkpoint
        groups = job.request.num_groups if job.request.top_groups < job.request.num_groups else 1
        written = permute(source, target, answer.placement, job.table.moe_layers, groups)
        mapping["checkpoint_files"] = [str(path) for path in written]
    bundle = None
    if out is not None:
        bundle = placement_bundle(job.engine, answer.placement, job.table, report_text(mapping))
        paths = write_bundle(bundle, out, common.force)
        mapping["files"] = [str(path) for path in paths]
    if common.as_json:
        print_json(mapping)
    else:
        if choice is not None:
            print_choice(choice, tokens_per_gpu)
        print_placement(job, answer, layer_seconds, bundle, mapping)
        if options is not None:
            print_training_options(options, tokens_per_gpu)
