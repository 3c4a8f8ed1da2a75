from __future__ import annotations

from collections.abc import Callable

import pytest

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.software import SoftwareGeneration, list_software, load_software
from meshwright.errors import SpecError

MakeContext = Callable[..., CostContext]

DOCUMENTED = {
    "megatron-2021",
    "megatron-2023",
    "megatron-deepspeed-2022",
    "megatron-2024",
    "megatron-core",
    "meshwright-executor",
    "llm-foundry-fsdp1",
    "torchtitan",
    "internevo",
}


def test_every_documented_generation_exists() -> None:
    assert set(list_software()) == DOCUMENTED
    assert list(list_software()) == sorted(list_software())


@pytest.mark.parametrize("name", sorted(DOCUMENTED))
def test_every_generation_loads_and_names_its_evidence(name: str) -> None:
    software = load_software(name)
    assert software.id == name
    assert len(software.evidence.split()) >= 5


@pytest.mark.parametrize("name", sorted(DOCUMENTED))
def test_shares_are_shares_and_overheads_are_not_negative(name: str) -> None:
    software = load_software(name)
    shares = ("tp_overlap", "async_tp_overlap", "gradient_reduce_overlap", "parameter_gather_overlap")
    for field in (*shares, "fsdp_contention", "inter_node_efficiency", "attention_efficiency"):
        assert 0.0 <= getattr(software, field) <= 1.0, field
    for field in ("fixed_time", "host_launch_latency", "framework_bytes", "fragmentation"):
        assert getattr(software, field) >= 0.0, field
    # Moving more than the fused count is what the eager factor is for.
    assert 1.0 <= software.elementwise_factor <= software.eager_elementwise_factor


def test_only_old_generations_keep_the_scores_in_memory() -> None:
    unfused = {name for name in list_software() if load_software(name).attention_kernel == "unfused"}
    assert "megatron-2021" in unfused
    assert not unfused & {"megatron-core", "torchtitan", "internevo", "llm-foundry-fsdp1"}


def test_durations_are_read_with_their_units() -> None:
    assert load_software("megatron-core").fixed_time == 0.1
    assert load_software("torchtitan").framework_bytes == 2 * 2**30


def test_unknown_software_is_refused_with_a_suggestion() -> None:
    with pytest.raises(SpecError, match=r"did you mean 'torchtitan'.*Known: internevo, llm-foundry-fsdp1"):
        load_software("torchtitn")


def test_a_generation_is_loaded_once() -> None:
    first: SoftwareGeneration = load_software("megatron-core")
    assert load_software("megatron-core") is first


def test_megatron_accumulates_bf16_gradients_in_fp32_and_fp16_ones_as_they_are(
    make_context: MakeContext,
) -> None:
    # Megatron's --bf16 forces --accumulate-allreduce-grads-in-fp32; its fp16 runs of 2021 kept fp16 buffers.
    wide = make_context(software="megatron-2021", precision="bf16")
    narrow = make_context(software="megatron-2021", precision="fp16")
    assert (wide.gradient_bytes, narrow.gradient_bytes) == (4.0, 2.0)
    assert (wide.gradient_accumulation_bytes, narrow.gradient_accumulation_bytes) == (8.0, 4.0)
