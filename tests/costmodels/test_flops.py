from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.costmodels.flops import hardware_flops, model_flops
from meshwright.simcore.domain.model_catalog import load_model

GPTS = ["gpt-22b", "gpt3-175b", "mt-nlg-530b", "gpt-1t"]
DENSE = ["llama-3-8b", "llama-3-70b", "mistral-7b", "falcon-7b", "gemma-2-9b", *GPTS]


@pytest.mark.parametrize("name", GPTS)
def test_a_gpt_step_is_the_published_formula(name: str) -> None:
    # 72 B L s h^2 (1 + s / 6h + V / 12hL), Korthikanti et al. 2022, appendix A: attention counted whole.
    model, batch, s = load_model(name), 64, 2048
    num_layers, h, vocab = model.num_layers, model.hidden_size, model.vocab_size
    published = 72 * batch * num_layers * s * h**2 * (1 + s / (6 * h) + vocab / (12 * h * num_layers))
    assert model_flops(model, batch * s, s, "full-attention") == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("name", DENSE)
def test_short_sequences_take_six_flops_per_parameter_and_token(name: str) -> None:
    model = load_model(name)
    # Parameters that multiply: all but the tables that are looked up; a tied table multiplies as the head.
    lookups = 0 if model.has_tied_embeddings else model.num_embedding_parameters
    flops = model_flops(model, 1000, sequence_length=1)
    assert flops == pytest.approx(6.0 * (model.num_parameters - lookups) * 1000, rel=0.01)


@pytest.mark.parametrize("name", ["llama-3-8b", "gpt3-175b"])
def test_causal_attention_is_half_of_full_attention(name: str) -> None:
    model, s = load_model(name), 8192
    linear = model_flops(model, s, sequence_length=1) - _attention(name, 1) / 2 * s
    causal, full = (model_flops(model, s, s, which) for which in ("causal", "full-attention"))
    assert full - linear == pytest.approx(2 * (causal - linear), rel=1e-6)
    assert full - linear == pytest.approx(_attention(name, s) * s)


def _attention(name: str, sequence_length: int) -> float:
    """Forward and backward FLOPs per token of scores and weighted sums over a whole sequence."""
    model = load_model(name)
    width = model.num_attention_heads * model.head_dim
    return 3.0 * 4.0 * model.num_layers * sequence_length * width


@given(tokens=st.integers(1, 10**9), length=st.integers(1, 2**20))
def test_flops_are_proportional_to_the_tokens(tokens: int, length: int) -> None:
    model = load_model("llama-3-8b")
    assert model_flops(model, tokens, length) == pytest.approx(tokens * model_flops(model, 1, length))


def test_a_window_bounds_the_causal_attention() -> None:
    length = 65_536
    full = load_model("llama-3-8b")
    windowed = replace(full, sliding_window=4096)
    mixed = replace(windowed, full_attention_interval=4)
    flops = [model_flops(model, length, length) for model in (windowed, mixed, full)]
    assert flops[0] < flops[1] < flops[2]
    # A quarter of the layers attends to everything.
    assert flops[1] == pytest.approx(0.25 * flops[2] + 0.75 * flops[0])
    assert model_flops(replace(full, sliding_window=length), length, length) == flops[2]


def test_recompute_adds_what_runs_again_to_the_hardware_flops() -> None:
    model, s = load_model("gpt3-175b"), 2048
    none, selective, full = (
        hardware_flops(model, s, s, recompute, "full-attention")
        for recompute in ("none", "selective", "full")
    )
    assert none == model_flops(model, s, s, "full-attention")
    # Selective runs the forward attention again, a third of its share; full all layers but not the logits.
    assert selective - none == pytest.approx(_attention("gpt3-175b", s) * s / 3)
    logits = 3 * 2.0 * model.hidden_size * model.vocab_size * s
    assert full - none == pytest.approx((none - logits) / 3)
