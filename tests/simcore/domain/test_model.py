"""What ModelSpec and its parts refuse, and that they travel."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, replace

import pytest

from meshwright.errors import SpecError
from meshwright.simcore.domain.model import MlaSpec, ModelSpec, MoeSpec
from meshwright.simcore.domain.model_catalog import load_model


@pytest.fixture
def model() -> ModelSpec:
    return load_model("deepseek-v3")


@pytest.mark.parametrize(
    "field",
    ["num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "head_dim", "vocab_size"],
)
def test_sizes_must_be_positive(model: ModelSpec, field: str) -> None:
    with pytest.raises(SpecError, match=f"model deepseek-v3: {field} must be at least 1, not 0"):
        replace(model, **{field: 0})  # type: ignore[arg-type]  # any field by name


def test_query_groups_must_divide_heads(model: ModelSpec) -> None:
    with pytest.raises(SpecError, match="num_attention_heads 128 must be a multiple of num_query_groups 3"):
        replace(model, num_query_groups=3)


def test_unknown_words_are_named_with_the_nearest_known(model: ModelSpec) -> None:
    with pytest.raises(SpecError, match="normalization: unknown value 'rmsnrom'; did you mean 'rmsnorm'"):
        replace(model, normalization="rmsnrom")  # type: ignore[arg-type]  # the mistake under test
    with pytest.raises(SpecError, match="position_embedding: unknown value 'rotary'"):
        replace(model, position_embedding="rotary")  # type: ignore[arg-type]  # the mistake under test


def test_windows_must_be_positive_or_absent(model: ModelSpec) -> None:
    with pytest.raises(SpecError, match="sliding_window must be at least 1 or absent, not 0"):
        replace(model, sliding_window=0)


def test_experts_per_token_cannot_exceed_experts() -> None:
    with pytest.raises(SpecError, match=r"moe\.top_k 9 is more than moe\.num_experts 8"):
        MoeSpec(num_experts=8, top_k=9, moe_ffn_hidden_size=4)
    with pytest.raises(SpecError, match="moe: layer_frequency must be at least 1, not 0"):
        MoeSpec(num_experts=8, top_k=2, moe_ffn_hidden_size=4, layer_frequency=0)


def test_mla_ranks_must_be_positive() -> None:
    with pytest.raises(SpecError, match=r"mla\.q_lora_rank must be at least 1 or absent, not 0"):
        MlaSpec(q_lora_rank=0, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4)


def test_model_is_frozen_hashable_and_picklable(model: ModelSpec) -> None:
    assert pickle.loads(pickle.dumps(model)) == model
    assert len({model, load_model("deepseek-v3")}) == 1
    with pytest.raises(FrozenInstanceError):
        model.num_layers = 1  # type: ignore[misc]  # the mistake under test
