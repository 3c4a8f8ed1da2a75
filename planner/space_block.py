"""A product of plan choices: rows on demand, any of its axes alone, or fewer options of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.plan_columns import ALL_LAYERS, IntColumn, PlanColumns
from meshwright.planner.axes import Axis

__all__ = ["SpaceBlock", "concatenate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceBlock:
    """The plans of one set of degrees: the product of the remaining choices.

    Parameters
    ----------
    degrees : Mapping[str, int]
        ``tp``, ``cp``, ``pp``, ``dp``.
    axes : Mapping[str, Axis]
        The choices, by name; rows count through the last one fastest.
    global_batch_size, num_layers : int
        Of the job.
    """

    degrees: Mapping[str, int]
    axes: Mapping[str, Axis]
    global_batch_size: int
    num_layers: int

    def __len__(self) -> int:
        """Return the number of plans."""
        return math.prod(self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of options of each axis."""
        return tuple(len(axis) for axis in self.axes.values())

    def restricted(self, options: Mapping[str, IntColumn]) -> SpaceBlock:
        """Return the block with only some options of some axes, given by number."""
        axes = {
            name: axis
            if name not in options
            else Axis(columns={column: values[options[name]] for column, values in axis.columns.items()})
            for name, axis in self.axes.items()
        }
        return replace(self, axes=axes)

    def columns(self, rows: IntColumn) -> PlanColumns:
        """Return some of the plans; ``rows`` are numbers from 0 to the length of the block."""
        return self._columns(
            dict(zip(self.axes, np.unravel_index(rows, self.shape), strict=True)), (len(rows),)
        )

    def mesh(self, names: Sequence[str]) -> PlanColumns:
        """Return every combination of some axes' options as an open mesh; of other axes the first option.

        Columns have one dimension for each named axis: as long as its options where the column follows from it, 1
        elsewhere. A formula that treats every plan by itself broadcasts them and works out each of its parts on the
        axes this part depends on.
        """
        shape = [1] * len(names)
        chosen: dict[str, NDArray[np.intp]] = {}
        for name, axis in self.axes.items():
            is_named = name in names
            own = [len(axis) if name == other else 1 for other in names] if is_named else shape
            chosen[name] = np.arange(len(axis) if is_named else 1).reshape(own)
        return self._columns(chosen, tuple(shape))

    def _columns(self, chosen: Mapping[str, NDArray[np.intp]], shape: tuple[int, ...]) -> PlanColumns:
        values: dict[str, NDArray[np.generic]] = {
            name: np.full(shape, degree, dtype=np.int64) for name, degree in self.degrees.items()
        }
        for name, axis in self.axes.items():
            for column, options in axis.columns.items():
                values[column] = options[chosen[name]]
        per_step = values["dp"].astype(np.int64) * values["micro_batch_size"].astype(np.int64)
        return PlanColumns(
            recompute_layers=self._recompute_layers(values),
            **values,  # type: ignore[arg-type]  # the axes name the columns
            # Where the batch does not divide the constraint rejects the row; 1 keeps the arithmetic defined.
            num_micro_batches=np.maximum(self.global_batch_size // per_step, 1),
            secondary_group=np.zeros(shape, dtype=np.int64),
        )

    def _recompute_layers(self, values: dict[str, NDArray[np.generic]]) -> IntColumn:
        """Return the layers a share comes to, and 0 where another share comes to the same; takes the shares out."""
        share = values.pop("recompute_share").astype(np.float64)
        below = values.pop("recompute_share_below").astype(np.float64)
        stages = values["pp"].astype(np.float64) * values["vpp"].astype(np.float64)
        per_chunk = self.num_layers / stages
        layers = np.ceil(share * per_chunk)
        repeats = (layers == np.ceil(below * per_chunk)) | (layers >= np.ceil(per_chunk))
        return np.where(share < 1.0, np.where(repeats, 0.0, layers), ALL_LAYERS).astype(np.int64)


def concatenate(parts: list[PlanColumns]) -> PlanColumns:
    """Return the rows of several columns, one after the other."""
    if len(parts) == 1:
        return parts[0]
    return PlanColumns(
        **{
            each.name: np.concatenate([getattr(part, each.name) for part in parts])
            for each in fields(PlanColumns)
        }
    )
