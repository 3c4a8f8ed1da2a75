"""What ``simulate --contention`` shows: the iteration with and without it, the links in dispute, who is slowed."""

from __future__ import annotations

import numpy as np
from rich.console import Console

from meshwright.cli.render.console import make_table
from meshwright.costmodels.contention import ContentionOutcome
from meshwright.units import format_change, format_quantity

__all__ = ["contention_mapping", "print_contention"]

_MOST_ROWS = 8
# Slowdowns below this share are rounding and not shown.
_SHOWN = 1e-6


def contention_mapping(outcome: ContentionOutcome) -> dict[str, object]:
    """Return the contention as plain data, SI units in the key names."""
    iteration, names = outcome.iteration, outcome.traffic.names
    return {
        "iteration_time_without_contention_seconds": outcome.alone_time,
        "iteration_time_seconds": outcome.contended_time,
        "slowdown": outcome.slowdown,
        "routing": outcome.traffic.fabric.routing,
        "links": [
            {"link": name, "links_alike": alike, "contended_seconds": seconds, "channels": channels}
            for name, alike, seconds, channels in _links(outcome)
        ],
        "communications": [
            {
                "name": names[channel],
                "times": int(iteration.num_communications[channel]),
                "alone_seconds": float(iteration.alone_time[channel]),
                "contended_seconds": float(iteration.taken_time[channel]),
            }
            for channel in np.flatnonzero(iteration.num_communications).tolist()
        ],
        "checkpoint_seconds": list(iteration.beside_end),
    }


def print_contention(console: Console, outcome: ContentionOutcome) -> None:
    """Print times, links and communications."""
    times = make_table("Iteration time with contention", (("", False), ("time", True), ("slowdown", True)))
    times.add_row("without contention", f"{outcome.alone_time:.4g} s", "")
    times.add_row("with contention", f"{outcome.contended_time:.4g} s", format_change(outcome.slowdown, 2))
    console.print(times)
    _print_links(console, outcome)
    _print_communications(console, outcome)
    for seconds in outcome.iteration.beside_end:
        console.print(f"The checkpoint is written after {format_quantity(seconds, 'seconds')}.")


def _print_links(console: Console, outcome: ContentionOutcome) -> None:
    links = _links(outcome)
    if not links:
        console.print("No link is ever asked for more than it carries.")
        return
    table = make_table(
        "Links asked for more than they carry",
        (("link", False), ("links alike", True), ("time", True), ("most of it by", False)),
    )
    for name, alike, seconds, channels in links[:_MOST_ROWS]:
        table.add_row(name, str(alike), _milliseconds(seconds), "; ".join(channels[:2]))
    console.print(table)
    if len(links) > _MOST_ROWS:
        console.print(f"Rows left out: {len(links) - _MOST_ROWS}, with less time; --json has all.")


def _links(outcome: ContentionOutcome) -> list[tuple[str, int, float, list[str]]]:
    """Return name, number alike, contended seconds and channels by what they send there, most contended first."""
    channels, iteration = outcome.traffic.traffic.channels, outcome.iteration
    found = []
    for place in np.argsort(-iteration.link_seconds, kind="stable").tolist():
        seconds = float(iteration.link_seconds[place])
        if seconds <= _SHOWN * outcome.contended_time:
            break
        sent = channels.load[:, place] * iteration.alone_time
        order = [channel for channel in np.argsort(-sent, kind="stable").tolist() if sent[channel] > 0.0]
        name = outcome.traffic.fabric.link_name(int(channels.links[place]))
        names = [outcome.traffic.names[channel] for channel in order]
        found.append((name, int(channels.num_alike[place]), seconds, names))
    return found


def _print_communications(console: Console, outcome: ContentionOutcome) -> None:
    iteration = outcome.iteration
    lost = iteration.taken_time - iteration.alone_time
    order = [
        channel
        for channel in np.argsort(-lost, kind="stable").tolist()
        if lost[channel] > _SHOWN * outcome.contended_time
    ]
    table = make_table(
        "Communication slowed most",
        (("", False), ("times", True), ("each alone", True), ("with contention", True), ("slowdown", True)),
    )
    for channel in order[:_MOST_ROWS]:
        count, alone = int(iteration.num_communications[channel]), iteration.alone_time[channel]
        taken = iteration.taken_time[channel]
        table.add_row(
            outcome.traffic.names[channel],
            str(count),
            _milliseconds(alone / count),
            _milliseconds(taken / count),
            format_change(taken / alone - 1.0),
        )
    if order:
        console.print(table)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f} ms" if seconds >= 1.0 else f"{1e3 * seconds:.3g} ms"
