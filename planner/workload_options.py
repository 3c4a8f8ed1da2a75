"""What job and plan files may say of a workload and its software beyond batch, length and precision."""

from __future__ import annotations

from typing import TypedDict

from meshwright.costmodels.context import KNOWN_FEATURES
from meshwright.errors import did_you_mean
from meshwright.hardware_specs.yaml_document import Section
from meshwright.simcore.domain.workload import ExpertRouting
from meshwright.simcore.domain.workload_section import routing_by_ep_of_section

__all__ = ["WorkloadOptions", "software_features", "workload_options"]


class WorkloadOptions(TypedDict, total=False):
    """Optional fields of :class:`meshwright.simcore.domain.workload.TrainingWorkload`."""

    routing_imbalance: float
    routing_by_ep: tuple[ExpertRouting, ...]
    expert_capacity_factor: float
    lora_rank: int


def workload_options(section: Section) -> WorkloadOptions:
    """Return the optional fields that a ``workload:`` section states.

    Raises
    ------
    SpecError
        If a value is no number: file, line and key.
    """
    options = WorkloadOptions()
    imbalance = section.optional_number("routing_imbalance")
    if imbalance is not None:
        options["routing_imbalance"] = imbalance
    by_ep = routing_by_ep_of_section(section)
    if by_ep:
        options["routing_by_ep"] = by_ep
    capacity = section.optional_number("expert_capacity_factor")
    if capacity is not None:
        options["expert_capacity_factor"] = capacity
    rank = section.optional_integer("lora_rank", minimum=1)
    if rank is not None:
        options["lora_rank"] = rank
    return options


def software_features(section: Section | None) -> tuple[str, ...]:
    """Return the software switches a file names under ``features:``, sorted, each once; none without the key.

    Raises
    ------
    SpecError
        If one is unknown: file, line and the nearest known one.
    """
    if section is None or not section.has("features"):
        return ()
    words = section.texts("features")
    for word in words:
        if word not in KNOWN_FEATURES:
            known = sorted(KNOWN_FEATURES)
            raise section.error(
                "features",
                f"unknown feature '{word}'{did_you_mean(word, known) or ';'} known: {', '.join(known)}",
            )
    return tuple(sorted(set(words)))
