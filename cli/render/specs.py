"""Specs by name, as plain data for printing."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from meshwright.errors import SpecError, did_you_mean
from meshwright.hardware_specs.catalog import (
    SpecKind,
    list_specs,
    load_cluster,
    load_fabric,
    load_gpu,
    load_node,
    resolve_cluster,
)
from meshwright.hardware_specs.spec_writing import (
    cluster_to_mapping,
    fabric_to_mapping,
    gpu_to_mapping,
    node_to_mapping,
)
from meshwright.hardware_specs.specs import ClusterSpec
from meshwright.simcore.domain.model_catalog import list_models, load_model, model_to_mapping
from meshwright.simcore.domain.model_parameters import parameter_breakdown

__all__ = ["find_cluster", "find_spec", "spec_names"]


def _model_mapping(name: str) -> dict[str, object]:
    model = load_model(name)
    return {
        **model_to_mapping(model),
        "parameters": model.num_parameters,
        "active_parameters": model.num_active_parameters,
        "parameter_breakdown": parameter_breakdown(model),
    }


def find_cluster(name: str) -> ClusterSpec:
    """Return a cluster by id, alias, ``NODE:COUNT`` or the path of its YAML file."""
    is_described = name.lower().endswith((".yaml", ".yml")) or ":" in name
    return resolve_cluster(name) if is_described else load_cluster(name)


_SHOWERS: dict[str, Callable[[str], dict[str, object]]] = {
    "gpu": lambda name: gpu_to_mapping(load_gpu(name)),
    "node": lambda name: node_to_mapping(load_node(name)),
    "fabric": lambda name: fabric_to_mapping(load_fabric(name)),
    "cluster": lambda name: cluster_to_mapping(find_cluster(name)),
    "model": _model_mapping,
}


def spec_names(kind: str) -> tuple[str, ...]:
    """Return the ids of one kind, sorted."""
    return list_models() if kind == "model" else list_specs(cast("SpecKind", kind))


def find_spec(name: str) -> tuple[str, dict[str, object]]:
    """Return the kind and the data of the first spec of that name: GPU, node, fabric, cluster, then model.

    Raises
    ------
    SpecError
        If nothing has that name; names the nearest.
    """
    for kind, show in _SHOWERS.items():
        if name.lower() in spec_names(kind):
            return kind, show(name.lower())
    guesses = []
    for kind, show in _SHOWERS.items():
        # Aliases and paths: each catalogue knows its own.
        try:
            return kind, show(name)
        except SpecError as error:
            if not str(error).startswith("unknown"):
                raise
            if "did you mean" in str(error):
                guesses.append(error)
    known = [each for kind in _SHOWERS for each in spec_names(kind)]
    guess = did_you_mean(name[:80], known)
    if guesses and not guess:
        raise guesses[0]
    raise SpecError(f"unknown spec '{name[:80]}'{guess or ';'} run 'meshwright specs list' for all")
