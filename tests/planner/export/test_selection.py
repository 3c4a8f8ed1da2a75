"""Targets and releases are found by what users type."""

from __future__ import annotations

import pytest

from meshwright.errors import SpecError
from meshwright.planner.export import EXPORTERS, SERVING_EXPORTERS
from meshwright.planner.export.selection import find_exporter


def found(target, version=None, kind="training"):
    tables = (EXPORTERS, SERVING_EXPORTERS)
    table, others = tables if kind == "training" else reversed(tables)
    return find_exporter(table, others, target, version, kind).target


@pytest.mark.parametrize(
    ("target", "version", "kind", "name"),
    [
        ("megatron", "0.16", "training", "megatron"),
        ("megatron", "core_r0.16", "training", "megatron"),
        ("megatron", "0.16.1", "training", "megatron"),
        ("torchtitan", None, "training", "torchtitan"),
        ("torchtitan", "0.3", "training", "torchtitan"),
        ("torchtitan", "0.2", "training", "torchtitan-0.2"),
        ("torchtitan", "v0.2.1", "training", "torchtitan-0.2"),
        ("torchtitan-0.2", "0.2.1", "training", "torchtitan-0.2"),
        ("dynamo", "v1beta1", "serving", "dynamo-v1beta1"),
        ("dynamo", "v1alpha1", "serving", "dynamo"),
        ("vllm", "0.33", "serving", "vllm"),
    ],
)
def test_a_release_is_found(target, version, kind, name):
    assert found(target, version, kind) == name


@pytest.mark.parametrize(
    ("target", "version", "kind", "words"),
    [
        ("megatron", "0.15", "training", "megatron 0.15 are known; known: core_r0.16"),
        ("megatron", "0.1", "training", "known: core_r0.16"),
        ("torchtitan", "0.4", "training", r"known: 0\.3\.0, 0\.2\.1"),
        ("megatorn", None, "training", "did you mean 'megatron'"),
        ("vllm", None, "training", "'vllm' takes no training plan; known: accelerate"),
        ("kubernetes", None, "training", "--launcher kubernetes"),
        ("megatron", None, "serving", "'megatron' takes no serving plan; known: dynamo"),
        ("vlm", None, "serving", "did you mean 'vllm'"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(target, version, kind, words):
    with pytest.raises(SpecError, match=words):
        found(target, version, kind)


def test_no_target_is_in_both_tables():
    assert not set(EXPORTERS) & set(SERVING_EXPORTERS)
