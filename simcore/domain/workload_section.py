"""What routing comes to by number of ranks, as files state it."""

from __future__ import annotations

from dataclasses import asdict

from meshwright.errors import SpecError
from meshwright.hardware_specs.yaml_document import Section
from meshwright.simcore.domain.workload import ExpertRouting

__all__ = ["routing_by_ep_mappings", "routing_by_ep_of_section"]


def routing_by_ep_of_section(workload: Section) -> tuple[ExpertRouting, ...]:
    """Return the ``routing_by_ep`` list of a ``workload:`` section, empty without one.

    Raises
    ------
    SpecError
        If an entry is none: file, line and key.
    """
    if not workload.has("routing_by_ep"):
        return ()
    return tuple(_entry(section) for section in workload.sections("routing_by_ep"))


def routing_by_ep_mappings(entries: tuple[ExpertRouting, ...]) -> list[dict[str, object]]:
    """Return the list as plain data; what is unknown or unlimited is left out."""
    return [{key: value for key, value in asdict(each).items() if value is not None} for each in entries]


def _entry(section: Section) -> ExpertRouting:
    ep = section.integer("ep", minimum=2)
    imbalance = section.number("imbalance")
    remote = section.optional_number("remote_nodes_per_token")
    capacity = section.optional_number("capacity_factor")
    section.close()
    try:
        return ExpertRouting(
            ep=ep, imbalance=imbalance, remote_nodes_per_token=remote, capacity_factor=capacity
        )
    except SpecError as error:
        raise section.error("", str(error)) from None
