"""Topology files of other programs: what is read, what is guessed, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from meshwright.errors import SpecError
from meshwright.hardware_specs.catalog import imported_cluster
from meshwright.hardware_specs.importers import import_file, import_topology
from meshwright.hardware_specs.importers.hostlist import expand_hostlist
from meshwright.hardware_specs.spec_writing import topology_to_mapping

# As NCCL issue 933 and DeepEP issue 145 print it, shortened to four GPUs.
SMI = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tNIC1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tNV18\tNV18\tPXB\tSYS\t0-55,112-167\t0\t\tN/A
GPU1\tNV18\t X \tNV18\tNV18\tNODE\tSYS\t0-55,112-167\t0\t\tN/A
GPU2\tNV18\tNV18\t X \tNV18\tNODE\tSYS\t0-55,112-167\t0\t\tN/A
GPU3\tNV18\tNV18\tNV18\t X \tSYS\tSYS\t56-111\t1\t\tN/A
NIC0\tPXB\tNODE\tNODE\tSYS\t X \tSYS\t\t\t\t
NIC1\tSYS\tSYS\tSYS\tSYS\tSYS\t X \t\t\t\t

Legend:

  X    = Self
  NV#  = Connection traversing a bonded set of # NVLinks

NIC Legend:

  NIC0: mlx5_0
  NIC1: mlx5_1
"""
# The structure of NCCL issue 1505, shortened to two GPUs.
NCCL = """\
<system version="1">
  <cpu numaid="0" affinity="ffff" arch="x86_64" vendor="GenuineIntel" familyid="6" modelid="143">
    <pci busid="0000:17:00.0" class="0x060400" link_speed="32.0 GT/s PCIe" link_width="16">
      <pci busid="0000:19:00.0" class="0x030200"><gpu dev="0" sm="90" rank="0" gdr="1">
        <nvlink target="0000:07:00.0" count="9" tclass="0x068000"/></gpu></pci>
      <pci busid="0000:1a:00.0" class="0x030200"><gpu dev="1" sm="90" rank="1" gdr="1">
        <nvlink target="0000:07:00.0" count="9" tclass="0x068000"/></gpu></pci>
      <pci busid="0000:18:00.0" class="0x020700"><nic>
        <net name="mlx5_0" dev="0" speed="400000" port="1" guid="0x1" maxconn="131072" gdr="1"/></nic></pci>
      <pci busid="0000:1b:00.0" class="0x020700"><nic>
        <net name="mlx5_9" dev="1" speed="100000" port="1" guid="0x2" maxconn="131072" gdr="1"/></nic></pci>
    </pci>
  </cpu>
</system>
"""
SLURM = """\
# two leaves below a spine
SwitchName=leaf1 Nodes=n[01-04] LinkSpeed=400
SwitchName=leaf2 Nodes=n[05-08]
SwitchName=spine Switches=leaf[1-2]
"""
SLURM_YAML = """\
---
- topology: flat-one
  flat: true
- topology: tree-one
  cluster_default: true
  tree:
    switches:
      - switch: root
        children: s[1-2]
      - switch: s1
        nodes: node[01-02]
      - switch: s2
        nodes: node[03-04]
"""
PAIRS = """\
source,destination,bandwidth,latency
a,b,40 GB/s,5 us
b,a,20 GB/s,6 us
"""
MATRIX = """\
bandwidth,a,b,c
a,,40 GB/s,10 GB/s
b,40 GB/s,,10 GB/s
c,10 GB/s,10 GB/s,
latency,a,b,c
a,,5 us,9 us
b,5 us,,9 us
c,9 us,9 us,
"""


def test_nvidia_smi_shows_gpus_links_and_nearby_nics() -> None:
    key, imported = import_topology(SMI, "topo.txt")
    assert key == "nvidia-smi"
    assert (imported.num_gpus, imported.intra_node, imported.num_nics) == (4, "switch", 1)
    assert any("1 of 2 NICs" in sentence for sentence in imported.guesses)
    assert imported.node_guess is None
    cluster, more = imported_cluster(imported, "dgx-h100", 2, "topo.txt")
    assert (cluster.num_gpus, cluster.node.num_nics) == (8, 1)
    assert any("num_gpus 4 instead of the 8" in sentence for sentence in more)


def test_eight_gpus_with_eighteen_links_are_taken_for_hopper() -> None:
    names = [f"GPU{index}" for index in range(8)]
    rows = [
        "\t".join([name, *(" X " if other == name else "NV18" for other in names), "0-55", "0"])
        for name in names
    ]
    imported = import_topology("\t" + "\t".join([*names, "CPU Affinity"]) + "\n" + "\n".join(rows), "t")[1]
    assert imported.node_guess == "dgx-h100"


def test_nccl_shows_the_kind_of_gpu_and_the_speed_of_nics() -> None:
    key, imported = import_topology(NCCL, "topo.xml")
    assert key == "nccl"
    assert (imported.num_gpus, imported.intra_node, imported.node_guess) == (2, "switch", "dgx-h100")
    assert (imported.num_nics, imported.nic_bandwidth) == (1, 400e9 / 8.0)
    assert any("NICs of 2 speeds" in sentence for sentence in imported.guesses)


@pytest.mark.parametrize(("text", "hosts", "size"), [(SLURM, 8, 4), (SLURM_YAML, 4, 2)])
def test_slurm_shows_which_nodes_share_a_switch(text: str, hosts: int, size: int) -> None:
    imported = import_topology(text, "topology")[1]
    assert imported.topology is not None
    assert imported.num_nodes == len(imported.topology.hosts) == hosts
    assert [(tier.name, tier.nodes_per_group) for tier in imported.topology.tiers] == [("leaf", size)]
    assert any("non-blocking" in sentence for sentence in imported.guesses)


def test_slurm_blocks_become_one_tier() -> None:
    text = "BlockName=b1 Nodes=n[01-03]\nBlockName=b2 Nodes=n[04-06]\nBlockSizes=3,6\n"
    imported = import_topology(text, "topology.conf")[1]
    assert imported.topology is not None
    assert imported.topology.tiers[0].nodes_per_group == 3


@pytest.mark.parametrize("text", [PAIRS, MATRIX])
def test_measured_links_come_with_their_hosts(text: str) -> None:
    imported = import_topology(text, "links.csv")[1]
    assert imported.topology is not None
    matrix = imported.topology.matrix
    assert matrix is not None
    assert imported.topology.hosts[:2] == ("a", "b")
    assert matrix.bandwidth[0, 1] == 40e9
    assert matrix.latency[0, 1] == pytest.approx(5e-6)
    assert np.all(np.diag(matrix.bandwidth) == 0.0)


def test_directions_that_differ_are_named() -> None:
    guesses = import_topology(PAIRS, "links.csv")[1].guesses
    assert any("differ by up to 100%" in sentence for sentence in guesses)


def test_lists_of_hosts_expand_as_slurm_does() -> None:
    assert expand_hostlist("a[1-2]b,c", "t") == ("a1b", "a2b", "c")
    assert expand_hostlist("n[098-101]", "t") == ("n098", "n099", "n100", "n101")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", "not a topology file"),
        (SMI.replace("NV18", "??", 1), "row of GPU0 needs 6 cells"),
        (SMI.replace("GPU3\tNV18", "GPX3\tNV18"), "row of GPU3 is missing"),
        (NCCL.replace("</system>", ""), "not well-formed XML"),
        (NCCL.replace('sm="90" rank="1"', 'sm="80" rank="1"'), "different kinds"),
        (NCCL.replace('speed="400000"', 'speed="fast"'), "not a whole number"),
        ('<!DOCTYPE x [<!ENTITY a "b">]>' + NCCL, "no document type"),
        (SLURM.replace("leaf[1-2]", "leaf[1-3]"), "switch 'leaf3' is not described"),
        (SLURM.replace("n[05-08]", "n[04-08]"), "node 'n04' is below two switches"),
        (SLURM.replace("n[05-08]", "n[08-05]"), "runs backwards"),
        (SLURM + "Nonsense\n", "expected SwitchName="),
        (SLURM + "SwitchName=spine Switches=spine\n", "'spine' is described twice"),
        (SLURM + "SwitchName=a Switches=b\nSwitchName=b Switches=a\n", "'a' is below itself"),
        (PAIRS.replace("b,a,20 GB/s,6 us\n", ""), "no line from b to a"),
        (PAIRS.replace("20 GB/s", "20"), "links.csv:3"),
        (PAIRS.replace("bandwidth", "bandwith"), "did you mean 'bandwidth'"),
        (MATRIX.replace("c,10 GB/s,10 GB/s,\n", "", 1), "one line per host"),
        (MATRIX.replace("10 GB/s", "0 GB/s"), "does not reach"),
    ],
)
def test_wrong_files_get_one_line(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        import_topology(text, "links.csv")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        import_file(tmp_path / "absent")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="not UTF-8"):
        import_file(tmp_path / "binary")


def test_somebody_must_say_what_the_machines_are() -> None:
    imported = import_topology(SLURM, "topology.conf")[1]
    with pytest.raises(SpecError, match="add --node"):
        imported_cluster(imported, None, None, "topology.conf")
    with pytest.raises(SpecError, match="names 8 nodes, --count says 4"):
        imported_cluster(imported, "dgx-h100", 4, "topology.conf")


BRIDGED = """\
        GPU0  GPU1  GPU2  GPU3  CPU Affinity
GPU0     X    NV12  NODE  SYS   0-31
GPU1    NV12   X    NODE  SYS   0-31
GPU2    NODE  NODE   X    NV12  32-63
GPU3    SYS   SYS   NV12   X    32-63
"""


def test_pairs_of_gpus_that_differ_keep_their_own_links() -> None:
    _, imported = import_topology(BRIDGED, "topo.txt")
    assert imported.intra_node == "pcie"
    cluster, guesses = imported_cluster(imported, "a100-pcie-8", 2, "topo.txt")
    assert cluster.topology is not None
    links = cluster.topology.gpu_links
    assert links is not None
    # Twelve NVLinks of 25 GB/s, PCIe 4.0 x16, and half of it between sockets.
    assert (links[0][1], links[0][2], links[0][3]) == (300e9, 32e9, 16e9)
    assert any("pairs of GPUs differ" in guess for guess in guesses)
    written = topology_to_mapping(cluster.topology)
    assert written == {
        "gpu_links_gigabytes_per_second": ["32 300 32 16", "300 32 32 16", "32 32 32 300", "16 16 300 32"]
    }


def test_nccl_shows_which_gpus_face_each_other() -> None:
    def gpu(bus: str, peer: str) -> str:
        link = f'<nvlink target="{peer}" count="4" tclass="0x030200"/>'
        return f'<pci busid="{bus}" class="0x030200"><gpu dev="0" sm="80" rank="0" gdr="1">{link}</gpu></pci>'

    names = ("0000:01:00.0", "0000:02:00.0", "0000:81:00.0", "0000:82:00.0")
    first = "".join(gpu(bus, peer) for bus, peer in zip(names[:2], (names[1], names[0]), strict=True))
    second = "".join(gpu(bus, peer) for bus, peer in zip(names[2:], (names[3], names[2]), strict=True))
    text = f'<system version="1"><cpu numaid="0">{first}</cpu><cpu numaid="1">{second}</cpu></system>'
    _, imported = import_topology(text, "topo.xml")
    assert imported.gpu_cells == (
        ("X", "NV4", "SYS", "SYS"),
        ("NV4", "X", "SYS", "SYS"),
        ("SYS", "SYS", "X", "NV4"),
        ("SYS", "SYS", "NV4", "X"),
    )
