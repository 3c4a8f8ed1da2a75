"""The ``device_mapping`` of a plan file: host order, GPU order per host, rank order."""

from __future__ import annotations

import re
from typing import cast

from meshwright.errors import SpecError
from meshwright.hardware_specs.yaml_document import Section
from meshwright.simcore.domain.device_mapping import RANK_ORDERS, DeviceMapping, RankOrder

__all__ = ["device_mapping_mapping", "device_mapping_of_section"]

_GPU_ORDER = re.compile(r"[0-9]{1,4}(,[0-9]{1,4})*")


def device_mapping_mapping(mapping: DeviceMapping) -> dict[str, object]:
    """Return a mapping as plain data; each row of GPUs as CUDA_VISIBLE_DEVICES writes it, ``3,2,1,0``."""
    rows = [",".join(map(str, row)) for row in mapping.gpu_orders]
    return {
        "rank_order": mapping.rank_order,
        **({"host_order": list(mapping.host_order)} if mapping.host_order else {}),
        **({"gpu_orders": rows} if rows else {}),
    }


def device_mapping_of_section(section: Section) -> DeviceMapping:
    """Return the mapping of a section.

    Raises
    ------
    SpecError
        If it names a host or a GPU twice, or something else: file, line, key.
    """
    rank_order = cast("RankOrder", section.choice("rank_order", RANK_ORDERS, default=RANK_ORDERS[0]))
    host_order = section.integers("host_order")
    rows = section.texts("gpu_orders")
    section.close()
    for row in rows:
        if not _GPU_ORDER.fullmatch(row):
            raise section.error("gpu_orders", f"expected numbers of GPUs like '0,1,2,3', not {row!r}")
    try:
        return DeviceMapping(
            rank_order=rank_order,
            host_order=host_order,
            gpu_orders=tuple(tuple(map(int, row.split(","))) for row in rows),
        )
    except SpecError as error:
        raise section.error("", str(error)) from None
