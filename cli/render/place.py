"""A placement, as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields

from meshwright import __version__
from meshwright.cli.render.console import make_table, stdout_console
from meshwright.planner.export.base import ExportBundle
from meshwright.planner.placement.certificates import Certificate
from meshwright.planner.placement.job import PlacementJob
from meshwright.planner.placement.request import PlacementAnswer
from meshwright.planner.placement.token_groups import SpeculativeGrouping
from meshwright.units import format_change

__all__ = ["is_gain_claimed", "placement_mapping", "print_placement", "report_text"]

_ROWS = (
    ("imbalance", "heaviest rank / mean, mean over layers"),
    ("worst_imbalance", "heaviest rank / mean, worst layer"),
    ("node_imbalance", "heaviest node / mean"),
    ("window_imbalance", "heaviest rank / mean in a window"),
    ("locality", "transitions that stay on a rank"),
    ("nodes_per_token", "nodes per token"),
    ("remote_nodes_per_token", "remote nodes per token"),
    ("active_experts", "active experts of the busiest rank"),
)


def placement_mapping(
    job: PlacementJob, answer: PlacementAnswer, layer_times: Mapping[str, object] | None
) -> dict[str, object]:
    """Return the answer as plain data."""
    request, routing = job.request, job.request.routing
    mapping: dict[str, object] = {
        "kind": "placement",
        "written_by": "meshwright",
        "version": __version__,
        "model": job.model.name,
        "cluster": job.cluster.id,
        "engine": job.engine.name,
        "objective": request.objective,
        "dispatch": request.dispatch,
        "routing": {
            "origin": routing.origin,
            "is_synthetic": routing.is_synthetic,
            "num_layers": routing.num_layers,
            "num_experts": routing.num_experts,
            "num_tokens": routing.num_tokens,
            "held_out_share": request.held_out_share if answer.held_out is not None else 0.0,
        },
        "num_slots": request.num_slots,
        "num_ranks": request.num_ranks,
        "ranks_per_node": request.ranks_per_node,
        "method": answer.method,
        "solved": asdict(answer.solved),
        "eplb_solved": asdict(answer.baseline_solved),
        "held_out": None if answer.held_out is None else asdict(answer.held_out),
        "eplb_held_out": None if answer.baseline_held_out is None else asdict(answer.baseline_held_out),
        "eplb_nearest": None if answer.baseline_nearest is None else asdict(answer.baseline_nearest),
        "is_gain_claimed": is_gain_claimed(answer, is_synthetic=routing.is_synthetic),
        "certificates": [{**asdict(each), "gap": each.gap} for each in answer.certificates],
        "warnings": list(answer.warnings),
        "moved_slots": answer.moved_slots,
    }
    if answer.moved_slots is not None:
        mapping["moved_bytes"] = answer.moved_slots * request.expert_bytes
    if answer.grouping is not None:
        mapping["grouping"] = _grouping_mapping(answer.grouping)
    if layer_times is not None:
        mapping["layer_times"] = dict(layer_times)
    return mapping


def _grouping_mapping(grouping: SpeculativeGrouping) -> dict[str, object]:
    return {
        "num_homes": grouping.num_homes,
        "is_of_nodes": grouping.is_of_nodes,
        **{
            name: {each.name: float(getattr(groups, each.name).mean()) for each in fields(groups)}
            for name, groups in (
                ("by_chance", grouping.by_chance),
                ("grouped", grouping.grouped),
                ("foreknown", grouping.foreknown),
            )
        },
    }


def is_gain_claimed(answer: PlacementAnswer, *, is_synthetic: bool) -> bool:
    """Return whether the comparison may be called a gain: real tokens, judged on ones that were held out."""
    return not is_synthetic and answer.held_out is not None


def report_text(mapping: Mapping[str, object]) -> str:
    """Return the report that stands beside the engine's file."""
    return json.dumps(mapping, indent=2, allow_nan=False) + "\n"


def print_placement(
    job: PlacementJob,
    answer: PlacementAnswer,
    layer_times: Mapping[str, object] | None,
    bundle: ExportBundle | None,
    mapping: Mapping[str, object],
) -> None:
    """Print the comparison with EPLB, the certificates, the warnings and what was written."""
    console = stdout_console()
    request, routing = job.request, job.request.routing
    label = " [SYNTHETIC]" if routing.is_synthetic else ""
    console.print(
        f"{job.model.name} on {job.cluster.id}: {routing.num_experts} experts in {request.num_slots} slots of "
        f"{request.num_ranks} ranks, {routing.num_layers} layers; objective {request.objective}, dispatch "
        f"{request.dispatch}{label}",
        soft_wrap=True,
    )
    console.print(
        f"Routing: {routing.origin}, {_amount(routing.num_tokens)}. Found by: {answer.method}.",
        soft_wrap=True,
    )
    ours, theirs = answer.held_out or answer.solved, answer.baseline_held_out or answer.baseline_solved
    title = "On held-out tokens" if answer.held_out is not None else "On the data solved with"
    near = answer.baseline_nearest
    columns = [("measure", False), ("EPLB", True), ("this placement", True), ("change", True)]
    if near is not None:
        columns.insert(2, ("EPLB, nearest copies", True))
    table = make_table(title + label, tuple(columns))
    for field, name in _ROWS:
        before, after = getattr(theirs, field), getattr(ours, field)
        if before is None or after is None:
            continue
        name_with_batch = f"{name}, batch of {ours.active_batch}" if field == "active_experts" else name
        between = () if near is None else (f"{getattr(near, field):.4f}",)
        change = format_change(after / before - 1.0, 2) if before else ""
        table.add_row(name_with_batch, f"{before:.4f}", *between, f"{after:.4f}", change)
    console.print(table)
    if answer.grouping is not None:
        console.print(_grouping_table(answer.grouping, label))
    console.print(_certificate_table(answer.certificates))
    if layer_times is not None:
        _print_layer_times(layer_times)
    if answer.moved_slots is not None:
        moved_gb = answer.moved_slots * request.expert_bytes / 1e9
        console.print(
            f"Coming from the current placement, {answer.moved_slots:,} slots are filled anew ({moved_gb:,.1f} GB)."
        )
    for warning in answer.warnings:
        console.print(f"Warning: {warning}", soft_wrap=True)
    for key in ("files", "checkpoint_files"):
        files = mapping.get(key)
        for path in files if isinstance(files, list) else ():
            console.print(f"Wrote {path}", soft_wrap=True)
    if bundle is not None:
        console.print(f"{job.engine.name}: {bundle.launch_command}", soft_wrap=True)
        for note in bundle.notes:
            console.print(f"Note: {note}", soft_wrap=True)


def _amount(num_tokens: int) -> str:
    """Return how much routing was read; sums of loads count no tokens."""
    return f"{num_tokens:,} tokens" if num_tokens else "loads only, no tokens"


def _grouping_table(grouping: SpeculativeGrouping, label: str) -> object:
    """Return what this placement's tokens reach from homes at random, foretold, and known before."""
    homes = "nodes" if grouping.is_of_nodes else "ranks"
    table = make_table(
        f"Tokens grouped on {grouping.num_homes} {homes}{label}",
        (("measure", False), ("by chance", True), ("grouped", True), ("known before", True)),
    )
    for field, name in (
        ("remote_nodes", f"remote {homes} per token"),
        ("local_pairs", "share of pairs at home"),
        ("imbalance", "heaviest rank / mean"),
    ):
        cells = (grouping.by_chance, grouping.grouped, grouping.foreknown)
        table.add_row(name, *(f"{getattr(each, field).mean():.4f}" for each in cells))
    return table


def _certificate_table(certificates: tuple[Certificate, ...]) -> object:
    table = make_table(
        "Certificates, on the tokens solved with",
        (("quantity", False), ("reached", True), ("bound", True), ("gap", True), ("from", False)),
    )
    for each in certificates:
        table.add_row(each.quantity, f"{each.value:.4f}", f"{each.bound:.4f}", f"{each.gap:.2%}", each.method)
    return table


def _print_layer_times(layer_times: Mapping[str, object]) -> None:
    console = stdout_console()
    table = make_table(
        "Time of one layer [us], mean over layers",
        (("placement", False), ("experts", True), ("dispatch", True), ("combine", True), ("layer", True)),
    )
    rows = layer_times["placements"]
    assert isinstance(rows, dict)
    for name, row in rows.items():
        cells = (row["experts"], row["dispatch"], row["combine"], row["layer"])
        table.add_row(name, *(f"{each * 1e6:,.1f}" for each in cells))
    console.print(table)
