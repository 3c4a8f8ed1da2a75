"""Multi-head latent attention: its products, what its ranks share, and what they send."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.layers.attention import attention_times
from meshwright.costmodels.layers.cases import LayerCases
from meshwright.costmodels.layers.elementwise import elementwise_times
from meshwright.costmodels.layers.layer import layer_times
from meshwright.costmodels.layers.projections import linear_times, projections
from meshwright.simcore.domain import model_parameters

MakeContext = Callable[..., CostContext]
Idealise = Callable[[CostContext], CostContext]
MODELS = ["deepseek-v3", "deepseek-v2-lite", "kimi-k2"]


def cases(tp: int = 1, *, sp: bool | None = None) -> LayerCases:
    one = np.ones(1)
    return LayerCases(
        tp=tp * one,
        cp=one,
        cp_method=np.zeros(1, dtype=np.int64),
        ep=one,
        etp=one,
        expert_overlap=one,
        micro_batch_size=one,
        sequence_parallel=np.array([tp > 1 if sp is None else sp]),
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tp", [1, 4, 16])
def test_matrices_of_all_ranks_are_the_models(make_context: MakeContext, name: str, tp: int) -> None:
    context = make_context(name)
    model = context.model
    assert model.mla is not None
    parts = projections(context, cases(tp), is_moe=False)
    held = dict.fromkeys((False, True), 0.0)
    for part in parts:
        held[part.is_whole] += float(part.out_width[0] * part.in_width[0])
    # Norms of the latents and of the layer are no matrices.
    norms = (model.mla.q_lora_rank or 0) + model.mla.kv_lora_rank + 2 * model.hidden_size
    matrices = model_parameters.layer_parameters(model) - norms
    assert tp * held[False] + held[True] == pytest.approx(matrices, rel=1e-12)
    # Hidden to key/value latent and rotary key, and to the query latent where there is one, are whole on every rank.
    down = (model.mla.q_lora_rank or 0) + model.mla.kv_lora_rank + model.mla.qk_rope_head_dim
    assert held[True] == model.hidden_size * down


@pytest.mark.parametrize("name", MODELS)
def test_ranks_project_down_their_part_of_the_sequence(
    make_context: MakeContext, idealise: Idealise, name: str
) -> None:
    # Megatron-Core keeps the sequence split through the down projections (multi_latent_attention.py,
    # "q_compressed: [s / TP, b, q_lora_rank]"): all products of 8 ranks together are those of one.
    context = idealise(make_context(name, length=8192))
    alone = linear_times(context, cases(), projections(context, cases(), is_moe=False))
    split = linear_times(context, cases(8), projections(context, cases(8), is_moe=False))
    whole = cases(8, sp=False)
    repeated = linear_times(context, whole, projections(context, whole, is_moe=False))
    for part in ("forward", "input_gradient", "weight_gradient"):
        one, eight, copies = (float(getattr(each, part)[0]) for each in (alone, split, repeated))
        assert 8 * eight == pytest.approx(one, rel=1e-12), part
        # Without sequence parallelism every rank repeats them.
        assert 8 * copies > one * 1.02, part


def test_latents_are_normalised_where_the_sequence_is_split(make_context: MakeContext) -> None:
    context = make_context("deepseek-v3", length=8192)
    whole, split = (elementwise_times(context, cases(8, sp=sp), 0.0) for sp in (False, True))
    assert split.norms[0] == pytest.approx(whole.norms[0] / 8)


def test_only_latents_are_gathered(make_context: MakeContext) -> None:
    # 1,536 + 512 + 64 of 7,168 channels enter the split products, all 7,168 leave them; the MLP's pair is whole.
    made = make_context("deepseek-v3", "dgx-h100:1", length=65_536)
    context = replace(made, software=replace(made.software, tp_overlap=0.0))
    like_dense = replace(context, model=replace(context.model, mla=None))
    latent, dense = (
        float(layer_times(each, cases(8)).forward_axes["tp"][0]) for each in (context, like_dense)
    )
    share = (1536 + 512 + 64) / 7168
    # Two pairs of a gather and a scatter of about equal time; one of the gathers shrinks.
    assert latent / dense == pytest.approx((3 + share) / 4, rel=0.03)
    without_latent = make_context("deepseek-v2-lite", "dgx-h100:1", length=65_536)
    assert without_latent.model.mla is not None
    wide = layer_times(
        replace(without_latent, model=replace(without_latent.model, mla=None)), cases(8)
    ).forward_axes["tp"]
    # Without a query latent the hidden state is gathered, and the key/value latent besides.
    assert layer_times(without_latent, cases(8)).forward_axes["tp"][0] > wide[0]


@pytest.mark.parametrize("kernel", ["flash_2", "unfused"])
def test_scores_and_values_have_their_own_widths(make_context: MakeContext, kernel: str) -> None:
    # Queries and keys 192 wide, values 128: the work of 160 for both products.
    context = make_context("deepseek-v3", length=32_768, kernel=kernel)
    model = context.model
    as_wide = replace(context, model=replace(model, mla=None, head_dim=160))
    for latent, plain in zip(
        attention_times(context, cases()), attention_times(as_wide, cases()), strict=True
    ):
        assert latent[0] == pytest.approx(plain[0])


def test_recomputing_the_up_projections_costs_their_products(make_context: MakeContext) -> None:
    context = make_context("deepseek-v3", length=8192)
    times = layer_times(context, cases(), is_moe=True)
    parts = [part for part in projections(context, cases(), is_moe=True) if part.module == "mla_up_proj"]
    assert len(parts) == 2
    assert times.module_forward["mla_up_proj"][0] == linear_times(context, cases(), parts).forward[0]
    assert times.module_forward["mla_up_proj"][0] < 0.5 * times.forward[0]
