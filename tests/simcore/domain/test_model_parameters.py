"""Parameter counts against published ones, against a count by hand, and by their properties.

Published counts are the ``safetensors`` totals that the Hugging Face hub shows for the 16-bit checkpoint
named in each preset's ``source``, unless a comment says otherwise.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.simcore.domain.model import MlaSpec, ModelSpec, MoeSpec
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.model_parameters import parameter_breakdown

PUBLISHED = {
    "bloom-176b": 176_247_271_424,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v2-lite": 15_706_484_224,
    "falcon-7b": 6_921_720_704,  # the hub's 7,217,189,760 stores the tied table (65,024 x 4,544) twice
    "falcon-40b": 41_303_293_952,  # likewise 41,835,970,560
    "falcon-180b": 178_557_088_768,  # likewise 179,522,565,120
    "gemma-2-27b": 27_227_128_320,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2b": 2_506_172_416,
    "gemma-3-1b": 999_885_952,
    "gemma-7b": 8_537_680_896,
    "gpt-j-6b": 6_050_882_784,
    "gpt-neox-20b": 20_554_567_680,
    "gpt-oss-120b": 116_829_156_672,  # model card: 116.83B
    "gpt-oss-20b": 20_914_757_184,  # model card: 20.91B
    "gpt2-xl": 1_557_611_200,
    "kimi-k2": 1_026_408_232_448,  # without the fp8 scales
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-2-7b": 6_738_415_616,
    "llama-3-70b": 70_553_706_496,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "minimax-m2.5": 228_689_764_864,  # the hub's total of MiniMax-M2, the same architecture
    "mistral-7b": 7_241_732_096,
    "mistral-large-123b": 122_610_069_504,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
    "mixtral-8x22b": 140_620_634_112,
    "mixtral-8x7b": 46_702_792_704,
    "mpt-125m": 125_311_488,  # this and the next six: llm-foundry, benchmarking/README.md, NumParams
    "mpt-13b": 12_853_954_560,
    "mpt-1b": 1_315_950_592,
    "mpt-350m": 355_985_408,
    "mpt-3b": 2_651_837_440,
    "mpt-70b": 64_862_437_376,
    "mpt-760m": 760_470_528,
    "mpt-7b": 6_649_286_656,
    "phi-2": 2_779_683_840,
    "phi-3-medium": 13_960_238_080,
    "phi-3-mini": 3_821_079_552,
    "phi-4": 14_659_507_200,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen2-57b-a14b": 57_408_658_944,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-14b": 14_768_307_200,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-32b": 32_762_123_264,
    "qwen3-8b": 8_190_735_360,
    "qwen3-coder-480b-a35b": 480_154_875_392,
    "yi-34b": 34_388_917_248,
}


@pytest.mark.parametrize("model_id", PUBLISHED)
def test_count_equals_the_published_one(model_id: str) -> None:
    assert load_model(model_id).num_parameters == PUBLISHED[model_id]


def test_deepseek_v3_counts_main_model_mtp_module_and_checkpoint() -> None:
    model = load_model("deepseek-v3")
    # The hub's total of DeepSeek-R1 without fp8 scales, and the same less the 14B of the MTP module
    # ("671B of the main model weights and 14B of the MTP module weights", README of DeepSeek-V3).
    assert model.num_checkpoint_parameters == 684_489_845_504
    assert model.num_main_parameters == 671_026_419_200
    assert model.num_parameters == 684_489_845_504 - 2 * 129_280 * 7_168
    assert model.num_active_parameters == pytest.approx(37e9, rel=0.02)  # "37B activated for each token"


@pytest.mark.parametrize(
    ("model_id", "published"), [("gemma-3-4b", 4_300_079_472), ("gemma-3-27b", 27_432_406_640)]
)
def test_gemma_3_is_the_published_count_without_vision(model_id: str, published: int) -> None:
    model = load_model(model_id)
    vision_tower = 416_866_032  # SigLIP so400m at 896 pixels, without its pooling head
    projector = 1_152 * model.hidden_size + 1_152
    assert model.num_parameters == published - vision_tower - projector


@pytest.mark.parametrize(
    ("model_id", "size"),
    [
        ("gpt-22b", 22e9),  # Korthikanti et al. 2022, table 3
        ("mt-nlg-530b", 529.6e9),  # Narayanan et al. 2021, table 1
        ("gpt-1t", 1008.0e9),  # Narayanan et al. 2021, table 1
        ("gpt3-175b", 174.6e9),  # 175B
        ("opt-175b", 174.6e9),
        ("internlm-20b", 20.1e9),
    ],
)
def test_count_is_near_a_rounded_one(model_id: str, size: float) -> None:
    assert load_model(model_id).num_parameters == pytest.approx(size, rel=0.004)


@pytest.mark.parametrize(
    ("model_id", "active"),
    [
        ("mixtral-8x7b", 12.9e9),  # arXiv 2401.04088: 13B active
        ("qwen3-235b-a22b", 22.19e9),  # 22B activated
        ("qwen3-30b-a3b", 3.35e9),  # 3.3B activated
        ("deepseek-v2", 21.4e9),  # arXiv 2405.04434: 21B
        ("kimi-k2", 32.9e9),  # 32B
    ],
)
def test_active_parameters_are_the_published_ones(model_id: str, active: float) -> None:
    assert load_model(model_id).num_active_parameters == pytest.approx(active, rel=0.01)


def test_gpt_oss_active_count_of_its_card_leaves_the_token_table_out() -> None:
    model = load_model("gpt-oss-120b")
    # arXiv 2508.10925, table 1: 5.13B active; "unembedding parameters are counted, embedding ones not".
    assert model.num_active_parameters - model.num_embedding_parameters == pytest.approx(5.13e9, rel=0.001)


def _tiny(**changes: object) -> ModelSpec:
    model = ModelSpec(
        name="tiny",
        num_layers=3,
        hidden_size=8,
        ffn_hidden_size=20,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=2,
        vocab_size=10,
        max_position_embeddings=16,
        is_gated_mlp=True,
        has_tied_embeddings=False,
    )
    return replace(model, **changes)  # type: ignore[arg-type]  # test shorthand: any field by name


def test_dense_layer_by_hand() -> None:
    attention = 8 * (4 + 2 + 2) * 2 + 4 * 2 * 8
    assert _tiny().num_layer_parameters == attention + 3 * 8 * 20 + 2 * 8
    assert _tiny().num_parameters == 10 * 8 + 3 * (attention + 480 + 16) + 8 + 10 * 8
    assert _tiny(has_tied_embeddings=True).num_head_parameters == 0


@pytest.mark.parametrize(
    ("changes", "added"),
    [
        ({"has_qkv_bias": True}, 3 * (4 + 2 + 2) * 2),
        ({"has_attention_output_bias": True}, 3 * 8),
        ({"has_mlp_bias": True}, 3 * (2 * 20 + 8)),
        ({"has_head_bias": True}, 10),
        ({"has_qk_norm": True}, 3 * 2 * 2),
        ({"has_qk_norm": True, "is_qk_norm_per_head": False}, 3 * (4 + 2) * 2),
        ({"has_attention_sinks": True}, 3 * 4),
        ({"has_embedding_norm": True}, 8),
        ({"has_final_norm": False}, -8),
        ({"norms_per_layer": 4}, 3 * 2 * 8),
        ({"normalization": "layernorm"}, 3 * 2 * 8 + 8),
        ({"position_embedding": "learned"}, 16 * 8),
        ({"position_embedding": "learned", "num_reserved_positions": 2}, 18 * 8),
        ({"is_gated_mlp": False}, -3 * 8 * 20),
    ],
)
def test_each_option_adds_exactly_its_own_term(changes: dict[str, object], added: int) -> None:
    assert _tiny(**changes).num_parameters - _tiny().num_parameters == added


def test_moe_layers_start_after_the_dense_ones_and_repeat() -> None:
    moe = MoeSpec(num_experts=4, top_k=2, moe_ffn_hidden_size=5)
    assert _tiny(moe=moe).num_moe_layers == 3
    assert _tiny(moe=replace(moe, num_dense_layers=1)).num_moe_layers == 2
    assert _tiny(moe=replace(moe, num_dense_layers=1, layer_frequency=2)).num_moe_layers == 1
    assert _tiny(num_layers=8, moe=replace(moe, num_dense_layers=1, layer_frequency=2)).num_moe_layers == 4
    assert _tiny(moe=replace(moe, num_dense_layers=5)).num_moe_layers == 0


def test_moe_layer_by_hand() -> None:
    moe = MoeSpec(
        num_experts=4,
        top_k=1,
        moe_ffn_hidden_size=5,
        shared_ffn_hidden_size=6,
        has_shared_expert_gate=True,
        has_router_bias=True,
    )
    expected = 192 + 2 * 8 + (8 * 4 + 4) + 4 * (3 * 8 * 5) + (3 * 8 * 6 + 8)
    assert _tiny(moe=moe).num_moe_layer_parameters == expected
    idle = 3 * 3 * (3 * 8 * 5)
    assert _tiny(moe=moe).num_active_parameters == _tiny(moe=moe).num_parameters - idle


def test_mla_by_hand() -> None:
    mla = MlaSpec(q_lora_rank=6, kv_lora_rank=5, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3)
    query = 8 * 6 + 6 + 6 * 4 * (4 + 2)
    key_value = 8 * (5 + 2) + 5 + 5 * 4 * (4 + 3)
    expected = query + key_value + 4 * 3 * 8 + 480 + 16
    assert _tiny(mla=mla).num_layer_parameters == expected
    direct = _tiny(mla=replace(mla, q_lora_rank=None))
    assert direct.num_layer_parameters == expected - query + 8 * 4 * (4 + 2)


_MODELS = st.builds(
    _tiny,
    has_tied_embeddings=st.booleans(),
    normalization=st.sampled_from(["rmsnorm", "layernorm", "layernorm_nobias"]),
    position_embedding=st.sampled_from(["rope", "learned", "alibi"]),
    has_qkv_bias=st.booleans(),
    has_mlp_bias=st.booleans(),
    has_qk_norm=st.booleans(),
    has_attention_sinks=st.booleans(),
    num_mtp_layers=st.integers(0, 2),
    moe=st.none()
    | st.builds(
        MoeSpec,
        num_experts=st.just(4),
        top_k=st.integers(1, 4),
        moe_ffn_hidden_size=st.integers(1, 9),
        shared_ffn_hidden_size=st.integers(0, 9),
        num_dense_layers=st.integers(0, 2),
        layer_frequency=st.integers(1, 2),
    ),
)


@given(_MODELS)
def test_breakdown_adds_up(model: ModelSpec) -> None:
    breakdown = parameter_breakdown(model)
    assert sum(breakdown.values()) == model.num_parameters
    assert min(breakdown.values()) >= 0


@given(_MODELS, st.sampled_from(["num_layers", "hidden_size", "head_dim", "vocab_size"]))
def test_count_grows_with_every_size(model: ModelSpec, field: str) -> None:
    larger = replace(model, **{field: getattr(model, field) + 1})
    assert larger.num_parameters > model.num_parameters


@given(_MODELS)
def test_active_parameters_are_at_most_all(model: ModelSpec) -> None:
    assert 0 < model.num_active_parameters <= model.num_main_parameters <= model.num_parameters
    assert model.num_parameters <= model.num_checkpoint_parameters


@given(_MODELS)
def test_tying_removes_exactly_the_head_matrix(model: ModelSpec) -> None:
    tied, untied = replace(model, has_tied_embeddings=True), replace(model, has_tied_embeddings=False)
    assert untied.num_parameters - tied.num_parameters == model.vocab_size * model.hidden_size
