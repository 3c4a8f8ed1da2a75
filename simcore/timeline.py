"""Draw a simulated iteration: as text for a terminal, as an SVG picture for a page."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

import numpy as np
from numpy.typing import NDArray

from meshwright.simcore.schedules import BACKWARD, NO_OPERATION, WEIGHT_GRADIENT
from meshwright.simcore.training.iteration import IterationResult
from meshwright.units import format_quantity

__all__ = ["timeline_svg", "timeline_text"]

_LETTERS, _FILLS = "FBBW", "-==~"
_JOINT_LETTER, _JOINT_FILL = "&", "+"
_MAX_TEXT_ROWS, _MAX_PICTURE_ROWS = 24, 64

_WIDTH, _LEFT, _RIGHT, _TOP = 900, 78, 62, 92
_FORWARD_COLOUR, _BACKWARD_COLOUR, _WEIGHT_COLOUR = "#4f86d9", "#e39a3c", "#58a874"
_OPERATION_COLOURS = (_FORWARD_COLOUR, _BACKWARD_COLOUR, _BACKWARD_COLOUR, _WEIGHT_COLOUR)
_COMMUNICATION_COLOUR, _OPTIMIZER_COLOUR, _IDLE_COLOUR = "#a06cb8", "#5d6676", "#edeff3"
# Pixels of one column where operations are too narrow to be drawn one by one; divides the lane's 760.
_COLUMN = 4


def timeline_text(result: IterationResult, width: int = 100) -> str:
    """Return a chart of what each stage's compute stream does over time, one line per stage.

    Parameters
    ----------
    result : IterationResult
        The iteration.
    width : int
        Columns of the whole chart, at least 40.
    """
    stages = _chosen_rows(result.operations.num_stages, _MAX_TEXT_ROWS)
    label = len(f"stage {result.operations.num_stages - 1}")
    columns = max(width, 40) - label - 8
    lines = [_headline(result)]
    previous = -1
    for stage in stages:
        if stage > previous + 1:
            lines.append(f"{'...':>{label}}")
        previous = stage
        busy = 1.0 - result.idle_fraction[stage]
        lines.append(f"{f'stage {stage}':>{label}} |{_text_row(result, stage, columns)}| {busy:4.0%}")
    end = format_quantity(result.iteration_time, "seconds")
    lines.append(f"{'':{label}} 0{end:>{columns + 1}}  busy")
    letters = ["F forward", "B backward"]
    if _has_weight_gradients(result):
        whole = "backward or " if (result.operations.kind == BACKWARD).any() else ""
        letters[1:] = [f"B {whole}input gradient", "W weight gradient"]
    if result.operations.is_overlapped is not None:
        letters.append(f"{_JOINT_LETTER} F and B at once")
    lines.append(f"{'':{label}}  {'  '.join([*letters, 'g gather', 'r reduce', 'O optimizer', '. idle'])}")
    return "\n".join(lines) + "\n"


def timeline_svg(result: IterationResult, note: str = "") -> str:
    """Return a self-contained SVG picture of the iteration, 900 pixels wide; ``note`` is added to its title.

    Each stage has a lane for its compute stream and, below it, a thin one for its communication stream.
    Where operations are too narrow to be seen, the lane shows the share of time that each kind takes.
    """
    stages = _chosen_rows(result.operations.num_stages, _MAX_PICTURE_ROWS)
    pitch = max(14.0, min(40.0, 560.0 / len(stages)))
    bottom = _TOP + pitch * len(stages)
    height = bottom + 42
    scale = (_WIDTH - _LEFT - _RIGHT) / max(result.iteration_time, 1e-30)
    title, _, detail = _headline(result).partition(": ")
    title = f"{title}, {note}" if note else title
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height:.0f}" '
        f'viewBox="0 0 {_WIDTH} {height:.0f}" role="img" font-family="system-ui, -apple-system, \'Segoe UI\', '
        'Helvetica, Arial, sans-serif">',
        "<metadata>written by meshwright</metadata>",
        f"<title>{escape(f'{title}: {detail}')}</title>",
        f'<rect width="{_WIDTH}" height="{height:.0f}" rx="8" fill="#ffffff"/>',
        f'<text x="20" y="32" font-size="17" font-weight="600" fill="#1d2430">{escape(title)}</text>',
        f'<text x="20" y="52" font-size="13" fill="#5d6676">{escape(detail)}</text>',
        *_legend(result),
        *_axis(result.iteration_time, scale, bottom),
    ]
    for row, stage in enumerate(stages):
        parts += _lane(result, stage, _TOP + row * pitch, pitch, scale)
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def _chosen_rows(num_stages: int, limit: int) -> list[int]:
    if num_stages <= limit:
        return list(range(num_stages))
    half = limit // 2
    return [*range(half), *range(num_stages - half, num_stages)]


def _has_weight_gradients(result: IterationResult) -> bool:
    return bool((result.operations.kind[0] == WEIGHT_GRADIENT).any())


def _headline(result: IterationResult) -> str:
    costs = result.costs
    chunks = f" x {costs.num_chunks} chunks" if costs.num_chunks > 1 else ""
    stages = "stage" if costs.num_stages == 1 else "stages"
    batches = "micro-batch" if costs.num_micro_batches == 1 else "micro-batches"
    return (
        f"{result.schedule}, {costs.num_stages} {stages}{chunks}, {costs.num_micro_batches} {batches}: "
        f"{format_quantity(result.iteration_time, 'seconds')} per iteration, "
        f"bubble {result.bubble_fraction:.1%}, at most {result.peak_in_flight.max()} activations in flight"
    )


def _sampled(result: IterationResult, stage: int, columns: int) -> NDArray[np.int64]:
    """Return the index of the operation at the middle of each column, -1 where there is none."""
    times = (np.arange(columns) + 0.5) * (result.iteration_time / columns)
    index = np.searchsorted(result.operation_start[stage], times, side="right") - 1
    return np.where((index >= 0) & (times < result.operation_end[stage][index]), index, -1)


def _text_row(result: IterationResult, stage: int, columns: int) -> str:
    times = (np.arange(columns) + 0.5) * (result.iteration_time / columns)
    row = np.full(columns, ".", dtype="<U1")
    for begin, end, letter in _communication(result, stage):
        row[(times >= begin) & (times < end)] = letter
    row[(times >= result.optimizer_start[stage]) & (times < result.optimizer_end[stage])] = "O"
    index = _sampled(result, stage, columns)
    edges = np.flatnonzero(np.diff(index, prepend=-2, append=-2))
    text = "".join(row)
    for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        operation = int(index[begin])
        if operation >= 0:
            kind = int(result.operations.kind[stage, operation])
            letter, fill = _LETTERS[kind], _FILLS[kind]
            name = f"{letter}{result.operations.micro_batch[stage, operation]}"
            if _is_joint(result, stage, operation):
                name = f"{_LETTERS[0]}{result.operations.micro_batch[stage, operation - 1]}{name}"
                letter, fill = _JOINT_LETTER, _JOINT_FILL
            # A number that does not fit would read as another number: leave it out whole.
            name = name if len(name) <= end - begin else letter
            text = text[:begin] + name.ljust(end - begin, fill) + text[end:]
    return text


def _is_joint(result: IterationResult, stage: int, operation: int) -> bool:
    is_overlapped = result.operations.is_overlapped
    return is_overlapped is not None and bool(is_overlapped[stage, operation])


def _communication(result: IterationResult, stage: int) -> Iterator[tuple[float, float, str]]:
    """Yield begin, end and letter of each gather and reduction of a stage."""
    for virtual in result.operations.placement[stage].tolist():
        yield float(result.gather_start[virtual]), float(result.gather_end[virtual]), "g"
        for part in range(2):
            yield float(result.reduce_start[virtual, part]), float(result.reduce_end[virtual, part]), "r"


def _legend(result: IterationResult) -> Iterator[str]:
    entries = [("forward", _FORWARD_COLOUR), ("backward", _BACKWARD_COLOUR)]
    if _has_weight_gradients(result):
        whole = "backward or " if (result.operations.kind == BACKWARD).any() else ""
        entries[1:] = [(f"{whole}input gradient", _BACKWARD_COLOUR), ("weight gradient", _WEIGHT_COLOUR)]
    if result.gather_end.max() > 0 or (result.reduce_end > result.reduce_start).any():
        entries.append(("communication", _COMMUNICATION_COLOUR))
    if (result.optimizer_end > result.optimizer_start).any():
        entries.append(("optimizer", _OPTIMIZER_COLOUR))
    entries.append(("idle", _IDLE_COLOUR))
    left = float(_LEFT)
    for name, colour in entries:
        yield f'<rect x="{left:.0f}" y="66" width="12" height="12" rx="3" fill="{colour}"/>'
        yield f'<text x="{left + 17:.0f}" y="76" font-size="12" fill="#3b4350">{name}</text>'
        left += 34 + 7.0 * len(name)
    yield f'<text x="{_WIDTH - 14}" y="76" font-size="12" fill="#5d6676" text-anchor="end">busy</text>'


def _axis(duration: float, scale: float, bottom: float) -> Iterator[str]:
    rough = max(duration, 1e-30) / 6
    power = 10.0 ** np.floor(np.log10(rough))
    step = float(next(nice * power for nice in (1, 2, 5, 10) if nice * power >= rough * (1 - 1e-9)))
    for tick in range(int(duration / step * (1 + 1e-9)) + 1):
        x = _LEFT + tick * step * scale
        yield f'<path d="M{x:.2f} {_TOP - 4}V{bottom + 4:.1f}" stroke="#d5d9e0" stroke-width="1"/>'
        label = format_quantity(tick * step, "seconds") if tick else "0"
        yield (
            f'<text x="{x:.2f}" y="{bottom + 20:.1f}" font-size="12" fill="#5d6676" '
            f'text-anchor="middle">{label}</text>'
        )


def _lane(result: IterationResult, stage: int, top: float, pitch: float, scale: float) -> Iterator[str]:
    thick, thin = 0.66 * pitch, 0.16 * pitch
    width = _WIDTH - _LEFT - _RIGHT
    size = min(13.0, thick)
    middle = top + thick / 2 + 0.36 * size
    yield (
        f'<text x="{_LEFT - 10}" y="{middle:.2f}" font-size="{size:.1f}" fill="#3b4350" '
        f'text-anchor="end">stage {stage}</text>'
    )
    yield _box(_LEFT, top, width, thick, _IDLE_COLOUR)
    yield _box(_LEFT, top + thick + 1, width, thin, "#f6f7f9")
    yield from _operations(result, stage, top, thick, scale)
    begin, end = float(result.optimizer_start[stage]), float(result.optimizer_end[stage])
    if end > begin:
        yield _box(_LEFT + begin * scale, top, (end - begin) * scale, thick, _OPTIMIZER_COLOUR)
    for begin, end, _ in _communication(result, stage):
        if end > begin:
            left = _LEFT + begin * scale
            yield _box(left, top + thick + 1, (end - begin) * scale, thin, _COMMUNICATION_COLOUR)
    busy = 1.0 - result.idle_fraction[stage]
    yield (
        f'<text x="{_WIDTH - 14}" y="{middle:.2f}" font-size="{size:.1f}" fill="#5d6676" '
        f'text-anchor="end">{busy:.0%}</text>'
    )


def _operations(result: IterationResult, stage: int, top: float, thick: float, scale: float) -> Iterator[str]:
    begins, ends = result.operation_start[stage], result.operation_end[stage]
    kinds, chunks = result.operations.kind[stage], result.operations.chunk[stage]
    num_chunks = result.costs.num_chunks
    # What takes no time, as the forwards of joint pairs, is not drawn.
    is_drawn = (kinds != NO_OPERATION) & (ends > begins)
    if not is_drawn.any() or np.median((ends - begins)[is_drawn]) * scale < 1.5:
        yield from _blended(result, stage, top, thick)
        return
    for operation in np.flatnonzero(is_drawn).tolist():
        wide = float(ends[operation] - begins[operation]) * scale
        left = _LEFT + float(begins[operation]) * scale
        colour = _lighter(_OPERATION_COLOURS[kinds[operation]], 0.5 * chunks[operation] / num_chunks)
        name = str(result.operations.micro_batch[stage, operation])
        if _is_joint(result, stage, operation):
            upper = _lighter(_FORWARD_COLOUR, 0.5 * chunks[operation - 1] / num_chunks)
            upper_name = str(result.operations.micro_batch[stage, operation - 1])
            yield from _operation(left, top, wide, thick / 2, upper, upper_name)
            yield from _operation(left, top + thick / 2, wide, thick / 2, colour, name)
        else:
            yield from _operation(left, top, wide, thick, colour, name)


def _operation(left: float, top: float, wide: float, thick: float, colour: str, name: str) -> Iterator[str]:
    yield _box(left, top, max(wide - 0.6, 0.4), thick, colour)
    if wide >= 6.5 * len(name) + 3 and thick >= 11:
        yield (
            f'<text x="{left + wide / 2:.2f}" y="{top + thick / 2 + 3.8:.2f}" font-size="10.5" '
            f'fill="#ffffff" text-anchor="middle">{name}</text>'
        )


def _blended(result: IterationResult, stage: int, top: float, thick: float) -> Iterator[str]:
    """Yield one outline per kind, stacked: its height is the share of time spent in that kind."""
    width = _WIDTH - _LEFT - _RIGHT
    edges = np.linspace(0.0, result.iteration_time, width // _COLUMN + 1)
    begins, ends = result.operation_start[stage], result.operation_end[stage]
    points = np.stack([begins, ends], axis=1).ravel()
    layers = []
    stacked = np.zeros(len(edges) - 1)
    for colour in (_FORWARD_COLOUR, _BACKWARD_COLOUR, _WEIGHT_COLOUR):
        kinds = [kind for kind in range(len(_OPERATION_COLOURS)) if _OPERATION_COLOURS[kind] == colour]
        spent = np.where(np.isin(result.operations.kind[stage], kinds), ends - begins, 0.0)
        if result.operations.is_overlapped is not None and colour != _WEIGHT_COLOUR:
            # A joint pair, which its backward has all the time of, shows in equal parts as both.
            spent = np.where(result.operations.is_overlapped[stage], 0.5 * (ends - begins), spent)
        until = np.cumsum(spent)
        passed = np.interp(edges, points, np.stack([until - spent, until], axis=1).ravel())
        stacked = stacked + np.diff(passed) / edges[1]
        layers.append((colour, stacked))
    for colour, share in reversed(layers):
        heights = top + thick * (1.0 - np.minimum(share, 1.0))
        steps = "".join(f"V{height:.1f}h{_COLUMN}" for height in heights)
        yield f'<path d="M{_LEFT} {top + thick:.1f}{steps}V{top + thick:.1f}Z" fill="{colour}"/>'


def _box(left: float, top: float, width: float, height: float, colour: str) -> str:
    corner = ' rx="2"' if width > 5 and height > 5 else ""
    return f'<rect x="{left:.2f}" y="{top:.2f}" width="{width:.2f}" height="{height:.2f}"{corner} fill="{colour}"/>'


def _lighter(colour: str, share: float) -> str:
    channels = (int(colour[index : index + 2], 16) for index in (1, 3, 5))
    return "#" + "".join(f"{round(channel + (255 - channel) * share):02x}" for channel in channels)
