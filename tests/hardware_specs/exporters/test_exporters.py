"""Networks for other simulators: whole files by hand, and refusals with every reason."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import yaml

from meshwright.errors import SpecError, UnsupportedByTargetError
from meshwright.hardware_specs import ClusterSpec, resolve_cluster
from meshwright.hardware_specs.exporters import EXPORTERS, export_topology
from meshwright.hardware_specs.topology import ClusterTopology, IslandSpec, LinkMatrix, TierSpec


def cluster(name: str, **topology: object) -> ClusterSpec:
    found = resolve_cluster(name)
    return replace(found, topology=ClusterTopology(**topology)) if topology else found  # type: ignore[arg-type]


EOS = """\
# written by meshwright for ASTRA-sim's analytical network
# eos: 576 x dgx-h100; peaks of data sheets
topology: [ Switch, Switch ]
npus_count: [ 8, 576 ]
bandwidth: [ 450.0, 50.0 ]  # GB/s
latency: [ 500.0, 1250.0 ]  # ns
"""

# Two nodes below each of two leaves, four NICs a node but no rails: GPUs 0 to 31, NVSwitches 32 to 35, leaves 36 and
# 37, core 38. Eight GPUs a node at 400 Gbit/s, a leaf's 16 NICs over half as much uplink.
SIMAI_HEADER = "39 8 4 3 66 H100"
SIMAI_LAST = ["36 38 3200Gbps 0.0005ms 0", "37 38 3200Gbps 0.0005ms 0"]


def test_astra_sim_gets_the_golden_file() -> None:
    assert export_topology(resolve_cluster("eos"), "astra-sim") == EOS


def test_astra_sim_describes_meshes_single_nodes_and_tiers() -> None:
    mesh = yaml.safe_load(export_topology(resolve_cluster("mi300x-8:2"), "astra-sim"))
    # Seven links of 64 GB/s; a pair owns one, and it is one hop.
    assert mesh["topology"] == ["FullyConnected", "Switch"]
    assert mesh["bandwidth"] == [64.0, 50.0]
    single = yaml.safe_load(export_topology(resolve_cluster("dgx-h100:1"), "astra-sim"))
    assert single == {"topology": ["Switch"], "npus_count": [8], "bandwidth": [450.0], "latency": [500.0]}
    tiers = (TierSpec(name="leaf", nodes_per_group=2, latency=1e-6),)
    tiered = yaml.safe_load(export_topology(cluster("dgx-h100:4", tiers=tiers), "astra-sim"))
    assert tiered["latency"][1] == single["latency"][0] + 1250.0


def test_simai_gets_the_golden_file() -> None:
    found = cluster(
        "dgx-h100:4", tiers=(TierSpec(name="leaf", nodes_per_group=2, oversubscription=2.0, latency=1e-6),)
    )
    found = replace(found, fabric=replace(found.fabric, is_rail_optimized=False))
    lines = export_topology(found, "simai").splitlines()
    assert lines[0] == SIMAI_HEADER
    assert lines[1] == "32 33 34 35 36 37 38"
    nvlinks = [f"{gpu} {32 + gpu // 8} 3600Gbps 0.0005ms 0" for gpu in range(32)]
    nics = [f"{gpu} {36 + gpu // 16} 400Gbps 0.00125ms 0" for gpu in range(32)]
    assert lines[2:] == [*nvlinks, *nics, *SIMAI_LAST]


@pytest.mark.parametrize("name", ["dgx-h100:1", "dgx-h100:5", "dgx-a100:3", "gb200-nvl72:1", "eos"])
@pytest.mark.parametrize("group", [1, 2])
def test_every_simai_network_is_connected_and_counts_right(name: str, group: int) -> None:
    found = cluster(name, tiers=(TierSpec(name="leaf", nodes_per_group=group, oversubscription=1.5),))
    if EXPORTERS["simai"].unsupported(found):
        assert name.startswith("gb200")
        return
    lines = export_topology(found, "simai").splitlines()
    total, per_server, nvswitches, switches, links = (int(field) for field in lines[0].split()[:5])
    assert (per_server, nvswitches) == (8, found.num_nodes)
    assert total == found.num_gpus + nvswitches + switches
    assert [int(each) for each in lines[1].split()] == list(range(found.num_gpus, total))
    assert len(lines) == 2 + links
    neighbours = defaultdict(list)
    for line in lines[2:]:
        source, destination, *_ = line.split()
        neighbours[int(source)].append(int(destination))
        neighbours[int(destination)].append(int(source))
    reached, waiting = {0}, [0]
    while waiting:
        new = [each for each in neighbours[waiting.pop()] if each not in reached]
        reached.update(new)
        waiting += new
    assert reached == set(range(total))


@pytest.mark.parametrize(
    ("target", "name", "topology", "reasons"),
    [
        ("astra-sim", "dgx-1v:2", {}, ["hybrid cube mesh"]),
        (
            "astra-sim",
            "dgx-h100:2",
            {
                "islands": (IslandSpec(name="a", num_nodes=1), IslandSpec(name="b", num_nodes=1)),
                "island_bandwidth": 1e9,
                "tiers": (TierSpec(name="leaf", nodes_per_group=1, oversubscription=2.0),),
            },
            ["islands are not", r"oversubscribed tier \(leaf\)"],
        ),
        (
            "astra-sim",
            "dgx-h100:2",
            {"matrix": LinkMatrix(bandwidth=np.ones((2, 2)), latency=np.ones((2, 2)))},
            ["matrix"],
        ),
        (
            "simai",
            "dgx-h100:2",
            {"matrix": LinkMatrix(bandwidth=np.ones((2, 2)), latency=np.ones((2, 2)))},
            ["matrix"],
        ),
        ("simai", "mi300x-8:2", {}, ["direct links", "nothing like mi300x"]),
        ("simai", "dgx-1v:2", {}, ["direct links", "8 GPUs share 4", "nothing like v100"]),
    ],
)
def test_what_cannot_be_expressed_is_refused_with_every_reason(
    target: str, name: str, topology: dict[str, object], reasons: list[str]
) -> None:
    with pytest.raises(UnsupportedByTargetError) as refusal:
        export_topology(cluster(name, **topology), target)
    for reason in reasons:
        assert refusal.match(reason)


def test_an_unknown_simulator_is_named_with_the_nearest() -> None:
    with pytest.raises(SpecError, match="did you mean 'simai'"):
        export_topology(resolve_cluster("eos"), "simia")
