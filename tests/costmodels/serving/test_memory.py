from __future__ import annotations

from collections.abc import Callable

import pytest

from meshwright.costmodels.serving.memory import kv_bytes_per_token, serving_memory, weight_bytes_per_gpu
from meshwright.costmodels.serving.step import ServedModel
from meshwright.errors import InfeasiblePlanError
from meshwright.simcore.domain.serving import ServingPool

MakeServed = Callable[..., ServedModel]


def test_sixteen_bit_weights_are_two_bytes_a_parameter(make_served: MakeServed) -> None:
    served = make_served("qwen3-32b")
    whole = weight_bytes_per_gpu(served.model, served.formats, ServingPool())
    assert whole == pytest.approx(2.0 * served.model.num_parameters, rel=0.001)
    assert weight_bytes_per_gpu(served.model, served.formats, ServingPool(tp=4)) == pytest.approx(
        whole / 4, rel=0.001
    )


@pytest.mark.parametrize(
    ("model", "precision", "gigabytes"),
    [
        ("gpt-oss-120b", "fp8", 65.0),  # 63.0 GiB of safetensors in openai/gpt-oss-120b
        ("deepseek-v3", "fp8", 673.0),  # 671 B parameters, tables in 16 bits
        ("kimi-k2.5", "int4_wo", 575.0),  # moonshotai/Kimi-K2.5: about 595 GB with the vision tower
        ("qwen3.5-397b-a17b", "bf16", 793.0),
    ],
)
def test_quantised_checkpoints_have_their_published_size(
    make_served: MakeServed, model: str, precision: str, gigabytes: float
) -> None:
    served = make_served(model, precision)
    weights = weight_bytes_per_gpu(served.model, served.formats, ServingPool())
    assert weights / 1e9 == pytest.approx(gigabytes, rel=0.04)


@pytest.mark.parametrize(
    ("model", "kv", "tp", "expected"),
    [
        ("llama-3.1-8b", "bf16", 1, 32 * 2 * 8 * 128 * 2),
        ("llama-3.1-8b", "fp8", 2, 32 * 2 * 4 * 128),
        ("llama-3.1-8b", "bf16", 16, 32 * 2 * 1 * 128 * 2),
        ("deepseek-v3", "bf16", 8, 61 * 576 * 2),
        ("qwen3.5-397b-a17b", "bf16", 2, 15 * 2 * 1 * 256 * 2),
    ],
)
def test_a_cached_token_takes_its_heads_and_layers(
    make_served: MakeServed, model: str, kv: str, tp: int, expected: int
) -> None:
    served = make_served(model, kv_precision=kv)
    assert kv_bytes_per_token(served.model, served.formats, ServingPool(tp=tp)) == expected


def test_what_is_left_of_the_devices_share_holds_the_cache(make_served: MakeServed) -> None:
    served = make_served("qwen3-32b")
    memory = serving_memory(
        served.model, served.formats, ServingPool(tp=2), served.cluster.gpu, served.constants
    )
    spent = memory.weight_bytes + memory.overhead_bytes + memory.kv_cache_bytes
    assert spent == pytest.approx(served.constants.memory_fraction * served.cluster.gpu.memory_bytes)
    assert 200_000 < memory.kv_cache_tokens < 330_000  # 275,000 to 289,000 held by the measured runs


def test_a_model_that_does_not_fit_says_how_much_is_missing(make_served: MakeServed) -> None:
    served = make_served("deepseek-v3", "fp8")
    with pytest.raises(InfeasiblePlanError, match=r"deepseek-v3 does not fit on h100-sxm-80 .* GiB short of"):
        serving_memory(
            served.model, served.formats, ServingPool(tp=4, moe_tp=4), served.cluster.gpu, served.constants
        )


def test_copies_of_experts_take_their_share_of_every_rank(make_served: MakeServed) -> None:
    served = make_served("deepseek-v3", "fp8")
    plain, copies = (
        weight_bytes_per_gpu(
            served.model, served.formats, ServingPool(attention_dp=16, ep=16, redundant_experts=extra)
        )
        for extra in (0, 32)
    )
    each = served.model.num_moe_layers * served.model.num_expert_parameters
    assert copies - plain == pytest.approx(2.0 * each, rel=0.02)  # two slots a rank, a byte a weight
