"""Tables beside a placement: layouts chosen among, ways to train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from meshwright.cli.render.console import make_table, stdout_console
from meshwright.planner.placement.joint_choice import JointChoice, LayoutCandidate
from meshwright.planner.placement.training import TrainingOption

__all__ = ["extra_mappings", "print_choice", "print_training_options"]

_ROWS_SHOWN = 12


def extra_mappings(choice: JointChoice | None, options: Sequence[TrainingOption] | None) -> dict[str, object]:
    """Return what was chosen among as plain data; nothing for what was not asked for."""
    mapping: dict[str, object] = {}
    if choice is not None:
        mapping["choice"] = {
            "best": asdict(choice.best),
            "reasons": list(choice.reasons),
            "candidates": [asdict(each) for each in choice.candidates],
        }
    if options is not None:
        mapping["training_options"] = [asdict(each) for each in options]
    return mapping


def print_choice(choice: JointChoice, tokens_per_gpu: int) -> None:
    """Print the fastest candidates, the winner and why."""
    console = stdout_console()
    table = make_table(
        f"Layouts, {tokens_per_gpu:,} tokens per GPU, layer time forward on held-out tokens; a few layers stand for all",
        (
            ("ep", True),
            ("redundant", True),
            ("capacity", True),
            ("overlap", True),
            ("layer us", True),
            ("imbalance", True),
            ("remote nodes", True),
            ("dropped", True),
            ("weights GB", True),
            ("", False),
        ),
    )
    shown = list(choice.candidates[:_ROWS_SHOWN])
    if choice.best not in shown:
        shown.append(choice.best)
    for each in shown:
        table.add_row(*_cells(each, is_best=each == choice.best))
    console.print(table)
    hidden = len(choice.candidates) - len(shown)
    if hidden:
        console.print(f"{hidden} more are in --json.")
    best = choice.best
    capacity = "no capacity limit" if best.capacity_factor is None else f"capacity {best.capacity_factor:g}"
    overlap = "no overlap" if best.overlap_degree == 1 else f"overlap in {best.overlap_degree} chunks"
    console.print(
        f"Chosen: ep {best.ep}, {best.redundant_experts} redundant experts ({best.slots_per_rank} slots per rank), "
        f"{capacity}, {overlap}.",
        soft_wrap=True,
    )
    for reason in choice.reasons:
        console.print(f"  {reason}", soft_wrap=True)


def _cells(each: LayoutCandidate, *, is_best: bool) -> tuple[str, ...]:
    remote = each.remote_nodes_per_token
    return (
        str(each.ep),
        str(each.redundant_experts),
        "-" if each.capacity_factor is None else f"{each.capacity_factor:g}",
        str(each.overlap_degree),
        f"{each.layer_seconds * 1e6:,.0f}",
        f"{each.imbalance:.3f}",
        "-" if remote is None else f"{remote:.3f}",
        f"{each.token_drop:.1%}",
        f"{each.weight_bytes / 1e9:,.0f}",
        "chosen" if is_best else each.obstacle,
    )


def print_training_options(options: Sequence[TrainingOption], tokens_per_gpu: int) -> None:
    """Print the ways to train, fastest first."""
    console = stdout_console()
    table = make_table(
        f"Training, {tokens_per_gpu:,} tokens per GPU: one layer forward and backward [us]; a few layers stand for all",
        (
            ("experts", False),
            ("imbalance", True),
            ("compute", True),
            ("exchange", True),
            ("gather", True),
            ("exposed", True),
            ("layer", True),
            ("gathered GB", True),
        ),
    )
    for each in options:
        seconds = (
            each.experts_seconds,
            each.exchange_seconds,
            each.gather_seconds,
            each.exposed_seconds,
            each.layer_seconds,
        )
        table.add_row(
            each.name,
            f"{each.imbalance:.3f}",
            *(f"{value * 1e6:,.0f}" for value in seconds),
            f"{each.gathered_bytes / 1e9:.2f}",
        )
    console.print(table)
