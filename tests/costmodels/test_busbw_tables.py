"""Published bus bandwidths against collectives priced from data sheets alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from meshwright.costmodels.calibration_choice import load_device_calibration, read_device_calibrations
from meshwright.costmodels.collectives import GroupPlacement, all_to_all_time, collective_time, send_time
from meshwright.costmodels.data_sheet_collectives import NIC_SHARE, data_sheet_collectives, link_share
from meshwright.errors import CalibrationError
from meshwright.hardware_specs.catalog import load_gpu, resolve_cluster
from meshwright.hardware_specs.specs import ClusterSpec, HostSpec

TABLES = yaml.safe_load((Path(__file__).parent / "busbw_tables.yaml").read_text(encoding="utf-8"))
DEFAULT_LIMIT = 0.10
# No cloud sells it as a node: eight on two sockets with 8 channels of DDR5-4800 each.
RTX_5090_HOST = HostSpec(num_sockets=2, memory_bandwidth_bytes_per_second=16 * 38.4e9)


def cluster_of(table: Mapping[str, Any]) -> ClusterSpec:
    if table["node"] == "rtx-5090":
        box = resolve_cluster("rtx-4090-8:2")
        node = replace(box.node, gpu=load_gpu("rtx-5090"), host=RTX_5090_HOST)
        return replace(box, node=node)
    return resolve_cluster(f"{table['node']}:{max(2, table.get('nodes', 1))}")


def predicted(cluster: ClusterSpec, collective: str, mebibytes: float, ranks: int, nodes: int) -> float:
    """Return the bus bandwidth as nccl-tests prints it [GB/s]."""
    # Of a measured device nothing but its curves of collectives is used, and those are replaced.
    borrowed = load_device_calibration(resolve_cluster("dgx-h100").gpu)
    calibration = replace(borrowed, collectives=data_sheet_collectives(cluster.node))
    num_bytes = np.array([mebibytes * 2.0**20])
    size = float(ranks * nodes)
    group = GroupPlacement(size=np.array([size]), ranks_per_node=np.array([float(ranks)]))
    if collective == "send":
        share = NIC_SHARE if nodes > 1 else link_share(cluster.node.intra_link.kind)
        seconds = send_time(num_bytes, np.array([nodes - 1.0]), cluster, share)
        return float(num_bytes[0] / seconds[0]) / 1e9
    if collective == "all_to_all":
        seconds = all_to_all_time(num_bytes, group, cluster, calibration, NIC_SHARE)
    else:
        seconds = collective_time(collective, num_bytes, group, cluster, calibration, NIC_SHARE)  # type: ignore[arg-type]  # by the file
    passes = 2.0 if collective == "all_reduce" else 1.0
    return float(passes * (size - 1.0) / size * num_bytes[0] / seconds[0]) / 1e9


def errors(table: Mapping[str, Any]) -> list[float]:
    cluster = cluster_of(table)
    ranks = table.get("ranks", cluster.node.num_gpus)
    pairs = [
        (size, count, value)
        for size, values in table["points"].items()
        for count, value in (
            zip(ranks, values, strict=True) if isinstance(ranks, list) else [(ranks, values)]
        )
    ]
    nodes = table.get("nodes", 1)
    return [
        predicted(cluster, table["collective"], size, count, nodes) / value - 1.0
        for size, count, value in pairs
    ]


@pytest.mark.parametrize("table", TABLES, ids=[table["name"] for table in TABLES])
def test_large_messages_are_within_ten_percent_without_calibration(table: Mapping[str, Any]) -> None:
    assert min(table["points"]) >= 64
    assert float(np.median(np.abs(errors(table)))) <= table.get("limit", DEFAULT_LIMIT)
    # A wider limit is explained.
    assert ("limit" in table) == ("why" in table)


def test_the_median_over_all_points_is_within_six_percent() -> None:
    every = [abs(error) for table in TABLES for error in errors(table)]
    assert len(every) >= 50
    assert float(np.median(every)) <= 0.06


def test_a_device_that_nobody_measured_takes_the_collectives_of_its_data_sheet(tmp_path: Path) -> None:
    node = resolve_cluster("mi300x-8").node
    unknown = replace(node.gpu, id="new-gpu", architecture="never-measured", aliases=())
    text = (files("meshwright.hardware_specs") / "calibrations" / "mi300x.yaml").read_text(encoding="utf-8")
    document = yaml.safe_load(text)
    for key in ("collectives", "covers", "represents_architecture"):
        document.pop(key, None)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(document | {"gpu": unknown.id}), encoding="utf-8")
    calibration = read_device_calibrations([path], unknown, replace(node, gpu=unknown))
    assert calibration.collectives == data_sheet_collectives(node)
    assert "collectives of mi300x-8's data sheet" in calibration.reason
    with pytest.raises(CalibrationError, match=r"lacks collectives\.all_reduce"):
        read_device_calibrations([path], unknown)
