"""The device mapping of a plan file comes back as it was written."""

from __future__ import annotations

import pytest

from meshwright.errors import SpecError
from meshwright.hardware_specs.spec_writing import dump_yaml
from meshwright.hardware_specs.yaml_document import parse_yaml
from meshwright.planner.device_mapping_section import device_mapping_mapping, device_mapping_of_section
from meshwright.simcore.domain.device_mapping import DeviceMapping


@pytest.mark.parametrize(
    "mapping",
    [
        DeviceMapping(),
        DeviceMapping(host_order=(1, 0), rank_order="tp-cp-ep-pp-dp"),
        DeviceMapping(host_order=(0, 2, 1), gpu_orders=((3, 2, 1, 0),)),
        DeviceMapping(gpu_orders=((0,), (1,))),
    ],
)
def test_a_mapping_survives_the_file(mapping):
    section = parse_yaml(dump_yaml(device_mapping_mapping(mapping)), "plan.yaml")
    assert device_mapping_of_section(section) == mapping


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gpu_orders: ['0,1', '0;1']\n", "plan.yaml:1: gpu_orders: expected numbers of GPUs"),
        ("gpu_orders: ['0,0']\n", "0 occurs 2 times"),
        ("host_order: [0, 0]\n", "0 occurs 2 times"),
        ("rank_order: dp-first\n", "rank_order"),
        ("hosts: [0]\n", "hosts"),
    ],
)
def test_a_wrong_mapping_is_refused_with_its_place(text, words):
    with pytest.raises(SpecError, match=words):
        device_mapping_of_section(parse_yaml(text, "plan.yaml"))
