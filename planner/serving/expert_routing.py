"""How unevenly a served model's experts are used on every number of ranks, from recorded routing."""

from __future__ import annotations

from pathlib import Path

from meshwright.errors import SpecError
from meshwright.hardware_specs.specs import ClusterSpec
from meshwright.planner.placement.job import moe_layer_indices
from meshwright.planner.placement.layout import placement_reach
from meshwright.planner.placement.routing_files import read_routing
from meshwright.simcore.domain.model import ModelSpec

__all__ = ["ServedRouting"]


class ServedRouting:
    """Imbalance that placements of a model's experts reach on recorded routing.

    Parameters
    ----------
    path : Path
        Routing data as :func:`meshwright.planner.placement.routing_files.read_routing` takes it.
    model, cluster : ModelSpec, ClusterSpec
        A mixture-of-experts model and the machines.

    Raises
    ------
    SpecError
        If the model has no experts, or the file is bad or of another model.
    """

    def __init__(self, path: Path, model: ModelSpec, cluster: ClusterSpec) -> None:
        moe = model.moe
        if moe is None:
            raise SpecError(
                f"routing: model {model.name} has no experts; leave the routing data out, or choose a "
                "mixture-of-experts model"
            )
        self._model, self._cluster, self.name = model, cluster, path.name
        self._routing = read_routing(path, moe.num_experts, moe_layer_indices(model), model.num_layers)
        self._reached: dict[tuple[int, int], float] = {}

    def imbalance(self, ep: int, redundant_experts: int) -> float:
        """Return the rows of the most loaded rank over the mean, on tokens that the placement was not solved with."""
        key = (ep, redundant_experts)
        if key not in self._reached:
            reach = placement_reach(
                self._model, self._cluster, ep, redundant_experts, routing=self._routing, dispatch="full"
            )
            self._reached[key] = min(max(1.0, reach.imbalance), float(ep))
        return self._reached[key]
