"""Device mappings: permutations of hosts and GPUs that fit a plan's nodes."""

from __future__ import annotations

import pytest

from meshwright.errors import SpecError
from meshwright.simcore.domain.device_mapping import DeviceMapping


def test_the_identity_is_recognized_however_it_is_written():
    assert DeviceMapping().is_identity
    assert DeviceMapping(host_order=(0, 1, 2), gpu_orders=((0, 1),)).is_identity
    assert not DeviceMapping(host_order=(1, 0)).is_identity
    assert not DeviceMapping(gpu_orders=((0, 1), (1, 0))).is_identity
    assert not DeviceMapping(rank_order="tp-cp-ep-pp-dp").is_identity


def test_hosts_and_gpus_of_a_node():
    mapping = DeviceMapping(host_order=(2, 0), gpu_orders=((3, 2), (0, 1)))
    assert [mapping.host_of_node(node) for node in (0, 1)] == [2, 0]
    assert [mapping.gpus_of_node(node, 2) for node in (0, 1)] == [(3, 2), (0, 1)]
    assert DeviceMapping(gpu_orders=((1, 0),)).gpus_of_node(5, 2) == (1, 0)
    assert DeviceMapping().gpus_of_node(5, 2) == (0, 1)
    assert DeviceMapping().host_of_node(5) == 5


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"host_order": (0, 1, 0)}, "0 occurs 2 times"),
        ({"host_order": (0, -1)}, "-1 is negative"),
        ({"gpu_orders": ((0, 0),)}, r"gpu_orders\[0\]: 0 occurs 2 times"),
        ({"gpu_orders": ((0, 1), (0,))}, r"gpu_orders\[1\] has 1 GPUs"),
        ({"gpu_orders": ((),)}, "at least 1"),
        ({"rank_order": "tp-cp-ep-pp-d"}, "did you mean 'tp-cp-ep-pp-dp'"),
    ],
)
def test_what_is_no_permutation_is_refused(fields, words):
    with pytest.raises(SpecError, match=words):
        DeviceMapping(**fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"host_order": (0, 1, 2)}, "names 3 hosts, but the plan runs on 2 nodes"),
        ({"gpu_orders": ((0, 1),) * 3}, "has 3 rows"),
        ({"gpu_orders": ((0, 1),)}, "names 2 GPUs per node, but the plan uses 4"),
    ],
)
def test_a_mapping_of_other_nodes_does_not_fit(fields, words):
    with pytest.raises(SpecError, match=words):
        DeviceMapping(**fields).check_fits(2, 4)
