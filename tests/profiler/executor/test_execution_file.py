from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from tests.profiler.executor.layouts import DENSE, execution, layouts

from meshwright.errors import SpecError
from meshwright.profiler.executor.execution_file import read_execution
from meshwright.simcore.domain.device_mapping import DeviceMapping
from meshwright.simcore.domain.execution import Execution, execution_text
from meshwright.simcore.domain.layer_groups import LayerGroup
from meshwright.simcore.domain.workload import ExpertRouting


def written(folder: Path, each: Execution) -> Path:
    path = folder / "execution.json"
    path.write_text(execution_text(each), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", layouts())
def test_what_is_written_is_read_back(tmp_path: Path, name: str) -> None:
    each = layouts()[name]
    assert read_execution(written(tmp_path, each)) == each


def test_groups_and_mappings_are_read_back(tmp_path: Path) -> None:
    mapping = DeviceMapping(host_order=(1, 0), gpu_orders=((1, 0), (0, 1)))
    groups = (LayerGroup(num_layers=2, tp=2), LayerGroup(num_layers=2, tp=2, sharding="zero1"))
    each = execution(DENSE, dp=2, tp=2, layer_groups=groups, device_mapping=mapping)
    assert read_execution(written(tmp_path, each)) == each


def test_the_routing_of_each_ep_is_read_back(tmp_path: Path) -> None:
    each = execution(DENSE, dp=2)
    table = (
        ExpertRouting(ep=2, imbalance=1.5),
        ExpertRouting(ep=4, imbalance=2.0, remote_nodes_per_token=0.5),
    )
    routed = dataclasses.replace(each, workload=dataclasses.replace(each.workload, routing_by_ep=table))
    assert read_execution(written(tmp_path, routed)) == routed


def _without(document: dict[str, Any], key: str) -> None:
    del document[key]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: document.update(surprise=1), "surprise: unknown key"),
        (lambda document: document["plan"].update(tpp=1), "tpp: unknown key"),
        (lambda document: document["workload"].update(batch=1), "batch: unknown key"),
        (lambda document: document["model"].update(layers=1), "layers: unknown key"),
        (lambda document: document.update(kind="training_plan"), "kind: expected the file of an execution"),
        (lambda document: document.update(schema_version=2), "reads version 1"),
        (lambda document: document.update(device="tpu"), "device"),
        (lambda document: document.update(num_steps=0), "num_steps: must be at least 1"),
        (lambda document: document["plan"].update(dp=-1), "plan.dp"),
        (lambda document: document["plan"].update(schedule="1f1b"), "does not go with pp 1"),
        (lambda document: document["plan"].update(layers_per_stage=[3]), "adds up to 3"),
        (lambda document: _without(document, "workload"), "workload: is required"),
        (lambda document: document["plan"].update(
            device_mapping={"rank_order": "tp-cp-ep-dp-pp", "host_order": [], "gpu_orders": ["0;ls"]}
        ), "expected numbers of GPUs"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, change: Any, message: str) -> None:
    document = json.loads(execution_text(execution(DENSE)))
    change(document)
    path = tmp_path / "execution.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(SpecError, match=message) as caught:
        read_execution(path)
    assert "\n" not in str(caught.value)


def test_a_seed_goes_through(tmp_path: Path) -> None:
    each = dataclasses.replace(execution(DENSE), seed=123)
    assert read_execution(written(tmp_path, each)).seed == 123
