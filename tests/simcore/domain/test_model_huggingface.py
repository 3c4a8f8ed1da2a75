"""Hugging Face configurations: every family, the defaults of absent keys, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meshwright.errors import SpecError
from meshwright.simcore.domain.huggingface import FAMILIES, model_from_huggingface, read_model_config
from meshwright.simcore.domain.model_catalog import load_model

# Published config.json files by preset id, without the keys that say nothing about the shape.
CONFIGS: dict[str, dict[str, object]] = json.loads(
    (Path(__file__).parent / "data" / "huggingface_configs.json").read_text(encoding="utf-8")
)
LLAMA: dict[str, object] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": 100,
}
GLM: dict[str, object] = {
    "model_type": "glm",
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 151552,
    "attention_bias": True,
}
COHERE: dict[str, object] = {
    "model_type": "cohere",
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "vocab_size": 256000,
}
COHERE_PLUS: dict[str, object] = {
    "model_type": "cohere",
    "hidden_size": 12288,
    "intermediate_size": 33792,
    "num_hidden_layers": 64,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "vocab_size": 256000,
    "use_qk_norm": True,
}
INTERNLM2: dict[str, object] = {
    "model_type": "internlm2",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 92544,
    "bias": False,
}


@pytest.mark.parametrize("model_id", CONFIGS)
def test_published_config_gives_the_preset(model_id: str) -> None:
    assert model_from_huggingface(CONFIGS[model_id], model_id) == load_model(model_id)


@pytest.mark.parametrize(
    ("config", "published"),
    [
        pytest.param(GLM, 9_399_951_360, id="glm-4-9b-chat-hf"),
        pytest.param({**GLM, "model_type": "glm4"}, 9_400_279_040, id="GLM-4-9B-0414"),
        pytest.param(COHERE, 34_980_831_232, id="c4ai-command-r-v01"),
        pytest.param(COHERE_PLUS, 103_810_674_688, id="c4ai-command-r-plus"),
        pytest.param(INTERNLM2, 7_737_708_544, id="internlm2-7b"),
    ],
)
def test_family_without_preset_has_the_published_count(config: dict[str, object], published: int) -> None:
    assert model_from_huggingface(config, "m").num_parameters == published


def test_every_family_is_tested() -> None:
    texts = [config.get("text_config") or config for config in CONFIGS.values()]
    tested = {config["model_type"] for config in [*CONFIGS.values(), GLM, COHERE, INTERNLM2]}
    tested |= {text["model_type"] for text in texts if isinstance(text, dict)} | {"glm4"}
    assert tested == set(FAMILIES)


@pytest.mark.parametrize(
    ("changes", "field", "expected"),
    [
        ({}, "head_dim", 8),  # hidden_size / num_attention_heads
        ({"head_dim": None}, "head_dim", 8),
        ({"head_dim": 32}, "head_dim", 32),
        ({}, "num_query_groups", 8),
        ({"num_key_value_heads": None}, "num_query_groups", 8),
        ({}, "has_tied_embeddings", False),
        ({"model_type": "mistral", "num_attention_heads": 16}, "num_query_groups", 8),  # the class's default
        ({"model_type": "mistral", "num_key_value_heads": None}, "num_query_groups", 8),
        ({"model_type": "mistral"}, "sliding_window", 4096),
        ({"model_type": "mistral", "sliding_window": None}, "sliding_window", None),
        ({"model_type": "qwen3", "num_key_value_heads": 2}, "head_dim", 128),
        ({"model_type": "gemma", "num_key_value_heads": 2}, "head_dim", 256),
        ({"model_type": "gemma", "num_key_value_heads": 2}, "has_tied_embeddings", True),
        ({"model_type": "gpt_oss", "intermediate_size": 64}, "head_dim", 64),
        ({"model_type": "gpt_oss"}, "full_attention_interval", 2),
        ({"model_type": "qwen2", "num_key_value_heads": 2, "sliding_window": 9}, "sliding_window", None),
    ],
)
def test_absent_keys_default_as_in_the_family(
    changes: dict[str, object], field: str, expected: object
) -> None:
    assert getattr(model_from_huggingface({**LLAMA, **changes}, "m"), field) == expected


@pytest.mark.parametrize(
    ("kinds", "window", "interval"),
    [
        (["sliding_attention", "full_attention"] * 2, 128, 2),
        (["sliding_attention"] * 4, 128, None),
        (["full_attention"] * 4, None, None),
        (["sliding_attention"] * 3 + ["full_attention"], 128, 4),
    ],
)
def test_layer_types_say_which_layers_are_windowed(
    kinds: list[str], window: int | None, interval: int | None
) -> None:
    config = {**LLAMA, "model_type": "gpt_oss", "num_hidden_layers": 4, "layer_types": kinds}
    model = model_from_huggingface(config, "m")
    assert (model.sliding_window, model.full_attention_interval) == (window, interval)


def test_irregular_windows_are_refused() -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    config = {**LLAMA, "model_type": "gpt_oss", "num_hidden_layers": 4, "layer_types": kinds}
    with pytest.raises(SpecError, match="layer_types must list every layer"):
        model_from_huggingface(config, "m")
    qwen = {**LLAMA, "model_type": "qwen2", "num_key_value_heads": 8, "use_sliding_window": True}
    with pytest.raises(SpecError, match="set use_sliding_window to false"):
        model_from_huggingface({**qwen, "max_window_layers": 1}, "m")


@pytest.mark.parametrize(
    ("changes", "dense", "frequency"),
    [
        ({}, 0, 1),
        ({"decoder_sparse_step": 2}, 1, 2),
        ({"mlp_only_layers": [0, 1]}, 2, 1),
    ],
)
def test_qwen_moe_layers_follow_step_and_mlp_only(
    changes: dict[str, object], dense: int, frequency: int
) -> None:
    config = {**LLAMA, "model_type": "qwen3_moe", "num_hidden_layers": 6, **changes}
    moe = model_from_huggingface(config, "m").moe
    assert moe is not None
    assert (moe.num_dense_layers, moe.layer_frequency) == (dense, frequency)


def test_multimodal_config_gives_its_language_model() -> None:
    wrapped = {"model_type": "some_vision_model", "tie_word_embeddings": True, "text_config": LLAMA}
    model = model_from_huggingface(wrapped, "m")
    assert model == model_from_huggingface({**LLAMA, "tie_word_embeddings": True}, "m")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "lama"}, "m: unknown model_type 'lama'; did you mean 'llama'\\? Known: bloom, "),
        ({"model_type": "t5"}, "m: unknown model_type 't5'. Known: bloom, .* YAML preset"),
        ({"model_type": None}, "m: required key 'model_type' is missing. Known: bloom"),
        ({"model_type": 3}, "m: model_type must be text, not 3"),
        ({"hidden_size": None}, "m: required key 'hidden_size' is missing"),
        ({"hidden_size": "64"}, "m: hidden_size must be an integer from 1 to .*, not '64'"),
        ({"hidden_size": True}, "m: hidden_size must be an integer from 1 to .*, not True"),
        ({"hidden_size": 64.0}, "m: hidden_size must be an integer from 1 to .*, not 64.0"),
        ({"hidden_size": 10**400}, "m: hidden_size must be an integer from 1 to .*, not 10000.*\\.\\.\\.$"),
        ({"vocab_size": 0}, "m: vocab_size must be an integer from 1 to .*, not 0"),
        ({"num_attention_heads": 7}, "m: head_dim is needed: hidden_size 64 does not divide into 7 heads"),
        ({"num_key_value_heads": 3}, "num_attention_heads 8 must be a multiple of num_query_groups 3"),
        ({"tie_word_embeddings": "no"}, "m: tie_word_embeddings must be true or false, not 'no'"),
        ({"text_config": []}, "m: text_config must be an object, not \\[\\]"),
        (
            {"text_config": {"hidden_size": 4}},
            "m: text_config: required key 'num_attention_heads' is missing",
        ),
        (
            {"model_type": "gpt2"},
            "m: required key 'n_layer' \\(or 'num_hidden_layers'\\) is missing|n_positions",
        ),
        (
            {"model_type": "qwen3_moe", "mlp_only_layers": [1]},
            "m: mlp_only_layers is supported for leading layers",
        ),
        ({"model_type": "opt", "ffn_dim": 4, "word_embed_proj_dim": 32}, "m: word_embed_proj_dim differs"),
    ],
)
def test_bad_config_is_one_sentence(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        model_from_huggingface({**LLAMA, **changes}, "m")
    assert "\n" not in str(caught.value)


def test_config_is_read_from_a_file_or_its_directory(tmp_path: Path) -> None:
    folder = tmp_path / "My-Llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    model = read_model_config(folder / "config.json")
    assert model == read_model_config(folder) == model_from_huggingface(LLAMA, "My-Llama")
    (tmp_path / "other.json").write_text("\ufeff" + json.dumps(LLAMA), encoding="utf-8")
    assert read_model_config(tmp_path / "other.json").name == "other"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"[1]", "holds a list, not an object"),
        (b"null", "holds null, not an object"),
        (b'"x"', "holds text, not an object"),
        (b"3", "holds a number, not an object"),
        (b"{", "config.json:1:2: not valid JSON"),
        (b'{"a": 1,}', "not valid JSON"),
        (b'{"a": 1, "a": 2}', "key 'a' appears twice in one object"),
        (b'{"a": NaN}', "NaN is not a finite number"),
        (b'{"a": -Infinity}', "-Infinity is not a finite number"),
        (b'{"a": 1e999}', "1e999 is not a finite number"),
        (b"\x00\x01\x02", "is binary"),
        (b"\x80abc", "is binary"),
        (b"[" * 100_000, "not usable JSON"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "not usable JSON"),
        (b" " * 5_000_001, "more than the 5000000 allowed"),
        (b"hello", "not valid JSON"),
    ],
)
def test_bad_file_is_one_sentence_with_its_path(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=message) as caught:
        read_model_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_directory_without_config_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"none\.json: cannot be read: No such file"):
        read_model_config(tmp_path / "none.json")
    with pytest.raises(SpecError, match=r"the directory has no config\.json"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(SpecError, match="is not a regular file"):
        read_model_config(tmp_path)
