"""A model's shape from a Hugging Face ``config.json``, without its weights or any download."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from meshwright.errors import SpecError, did_you_mean
from meshwright.simcore.domain import model_families, model_families_classic, model_families_moe
from meshwright.simcore.domain.model import ModelSpec
from meshwright.simcore.domain.model_config import ModelConfig, read_json_object

__all__ = ["FAMILIES", "model_from_huggingface", "read_model_config"]

FAMILIES: dict[str, Callable[[ModelConfig, str], ModelSpec]] = {
    "bloom": model_families_classic.bloom,
    "cohere": model_families.cohere,
    "deepseek_v2": model_families_moe.deepseek_v2,
    "deepseek_v3": model_families_moe.deepseek_v3,
    "falcon": model_families_classic.falcon,
    "gemma": model_families.gemma,
    "gemma2": model_families.gemma2,
    "gemma3": model_families.gemma3,
    "gemma3_text": model_families.gemma3,
    "glm": model_families.glm,
    "glm4": model_families.glm4,
    "gpt2": model_families_classic.gpt2,
    "gpt_neox": model_families_classic.gpt_neox,
    "gpt_oss": model_families_moe.gpt_oss,
    "gptj": model_families_classic.gptj,
    "internlm": model_families.internlm,
    "internlm2": model_families.internlm2,
    "kimi_k2": model_families_moe.deepseek_v3,
    "llama": model_families.llama,
    "minimax_m2": model_families_moe.minimax_m2,
    "mistral": model_families.mistral,
    "mixtral": model_families_moe.mixtral,
    "mpt": model_families_classic.mpt,
    "opt": model_families_classic.opt,
    "phi": model_families_classic.phi,
    "phi3": model_families.phi3,
    "qwen2": model_families.qwen2,
    "qwen2_moe": model_families_moe.qwen2_moe,
    "qwen3": model_families.qwen3,
    "qwen3_moe": model_families_moe.qwen3_moe,
}


def model_from_huggingface(config: Mapping[str, object], name: str) -> ModelSpec:
    """Return the model a Hugging Face configuration describes.

    Parameters
    ----------
    config : Mapping[str, object]
        The content of ``config.json``. Of a multimodal one (``text_config``), only the language model counts.
    name : str
        What the model will be called.

    Returns
    -------
    ModelSpec
        The shape; keys absent from ``config`` default as in the family's configuration class.

    Raises
    ------
    SpecError
        If the ``model_type`` is missing or unknown, or a key is missing or impossible.

    Examples
    --------
    >>> model_from_huggingface({"model_type": "gpt2", "n_layer": 48, "n_embd": 1600, "n_head": 25,
    ...     "n_positions": 1024, "vocab_size": 50257}, "gpt2-xl").num_parameters
    1557611200
    """
    return _convert(ModelConfig(config, name), name)


def read_model_config(path: Path) -> ModelSpec:
    """Return the model of a ``config.json``, or of a directory that holds one.

    The model is called after the directory, or after the file where that is not ``config.json``.

    Raises
    ------
    SpecError
        If there is no such file, or it does not describe a model of a known family.
    """
    if path.is_dir():
        if not (path / "config.json").exists():
            raise SpecError(
                f"{path}: the directory has no config.json; give a Hugging Face model's directory or file"
            )
        path = path / "config.json"
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    return _convert(ModelConfig(read_json_object(path), str(path)), name or "model")


def _convert(config: ModelConfig, name: str) -> ModelSpec:
    family = config.text("model_type", default="")
    text = config.section("text_config")
    if not text.is_empty:
        text = text.with_default("tie_word_embeddings", config)
        family, config = text.text("model_type", default=family), text
    known = ", ".join(FAMILIES)
    if not family:
        raise SpecError(f"{config.where}: required key 'model_type' is missing. Known: {known}.")
    if family not in FAMILIES:
        raise SpecError(
            f"{config.where}: unknown model_type {family[:60]!r}{did_you_mean(family[:60], FAMILIES) or '.'} "
            f"Known: {known}. "
            "A model of another family can be described in a YAML preset."
        )
    return FAMILIES[family](config, name)
