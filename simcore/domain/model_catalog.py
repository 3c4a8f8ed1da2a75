"""Models by name or path: built-in presets, YAML files in their format, and ``config.json`` files."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import cast

from meshwright.errors import SpecError, did_you_mean
from meshwright.hardware_specs.yaml_document import Section, parse_yaml, read_yaml
from meshwright.simcore.domain.huggingface import read_model_config
from meshwright.simcore.domain.model import (
    NORMALIZATIONS,
    POSITION_EMBEDDINGS,
    LinearAttentionSpec,
    MlaSpec,
    ModelSpec,
    MoeSpec,
    Normalization,
    PositionEmbedding,
)

__all__ = ["list_models", "load_model", "model_from_section", "model_to_mapping"]

_SCHEMA_VERSION = 1
_PRESET_ID = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
# Parts of published names that change the weights but not the shape.
_VARIANT_SUFFIXES = ("-instruct", "-chat", "-base", "-hf", "-it", "-fp8", "-nvfp4", "-awq", "-gptq", "-bf16")


def load_model(name_or_path: str) -> ModelSpec:
    """Return a model by preset id, published name or path.

    Tried in this order: a preset id in any case; a path that exists or looks like one; a published name
    (``meta-llama/Meta-Llama-3-70B-Instruct`` is ``llama-3-70b``: the organisation and the suffixes that leave
    the shape alone are dropped, then the presets' aliases are searched).

    Parameters
    ----------
    name_or_path : str
        Preset id, published name, ``config.json``, YAML preset, or a directory that holds a ``config.json``.

    Returns
    -------
    ModelSpec
        The model.

    Raises
    ------
    SpecError
        If there is no such model, or its file is not usable.

    Examples
    --------
    >>> load_model("Llama-2-7B").num_parameters
    6738415616
    """
    preset = _preset(name_or_path.lower())
    if preset is not None:
        return _load_preset(preset)
    if _is_path(name_or_path):
        return _load_path(Path(name_or_path).expanduser())
    for spelling in _spellings(name_or_path):
        preset = _preset(spelling) or _aliased_preset(spelling)
        if preset is not None:
            return _load_preset(preset)
    guess = did_you_mean(name_or_path[:80], list_models()) or "."
    raise SpecError(f"unknown model {name_or_path[:80]!r}{guess} Run 'meshwright specs list' for all.")


def list_models() -> tuple[str, ...]:
    """Return the ids of the built-in presets, sorted."""
    return tuple(sorted(preset.name.removesuffix(".yaml") for preset in _presets()))


def model_from_section(section: Section) -> ModelSpec:
    """Return the model that a YAML mapping describes; its keys are the fields of :class:`ModelSpec`.

    ``schema_version``, ``aliases``, ``source``, ``published_parameters`` and ``published_size`` are allowed
    beside them, so that a preset can be pasted into a job.

    Raises
    ------
    SpecError
        If a key is unknown, missing or impossible; with file, line and key.
    """
    _skip_provenance(section)
    moe, mla = section.optional_section("moe"), section.optional_section("mla")
    linear = section.optional_section("linear_attention")
    try:
        model = _model(
            section,
            None if moe is None else _moe(moe),
            None if mla is None else _mla(mla),
            None if linear is None else _linear_attention(linear),
        )
    except SpecError as error:
        if str(error).startswith(f"{section.file}:"):
            raise
        raise section.error("", str(error)) from None
    section.close()
    return model


def model_to_mapping(model: ModelSpec) -> dict[str, object]:
    """Return every field of a model as plain data; :func:`model_from_section` reads it back exactly.

    Absent values (None) have no key.
    """
    return _without_none(dataclasses.asdict(model))


def _without_none(mapping: dict[str, object]) -> dict[str, object]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in mapping.items()
        if value is not None
    }


def _skip_provenance(section: Section) -> None:
    version = section.integer("schema_version", default=_SCHEMA_VERSION)
    if version != _SCHEMA_VERSION:
        raise section.error("schema_version", f"is {version}; this release reads {_SCHEMA_VERSION}")
    section.texts("aliases")
    section.optional_text("source")
    section.optional_integer("published_parameters", minimum=1)
    section.optional_text("published_size")


def _model(
    section: Section, moe: MoeSpec | None, mla: MlaSpec | None, linear: LinearAttentionSpec | None
) -> ModelSpec:
    normalization = section.choice("normalization", NORMALIZATIONS, default="rmsnorm")
    positions = section.choice("position_embedding", POSITION_EMBEDDINGS, default="rope")
    return ModelSpec(
        name=section.text("name", default="custom"),
        num_layers=section.integer("num_layers", minimum=1),
        hidden_size=section.integer("hidden_size", minimum=1),
        ffn_hidden_size=section.integer("ffn_hidden_size", minimum=1),
        num_attention_heads=section.integer("num_attention_heads", minimum=1),
        num_query_groups=section.integer("num_query_groups", minimum=1),
        head_dim=section.integer("head_dim", minimum=1),
        vocab_size=section.integer("vocab_size", minimum=1),
        max_position_embeddings=section.integer("max_position_embeddings", minimum=1),
        is_gated_mlp=section.boolean("is_gated_mlp"),
        has_tied_embeddings=section.boolean("has_tied_embeddings"),
        normalization=cast("Normalization", normalization),
        norms_per_layer=section.integer("norms_per_layer", default=2, minimum=0),
        has_final_norm=section.boolean("has_final_norm", default=True),
        has_embedding_norm=section.boolean("has_embedding_norm", default=False),
        position_embedding=cast("PositionEmbedding", positions),
        num_reserved_positions=section.integer("num_reserved_positions", default=0, minimum=0),
        has_qkv_bias=section.boolean("has_qkv_bias", default=False),
        has_attention_output_bias=section.boolean("has_attention_output_bias", default=False),
        has_mlp_bias=section.boolean("has_mlp_bias", default=False),
        has_head_bias=section.boolean("has_head_bias", default=False),
        has_attention_sinks=section.boolean("has_attention_sinks", default=False),
        has_qk_norm=section.boolean("has_qk_norm", default=False),
        is_qk_norm_per_head=section.boolean("is_qk_norm_per_head", default=True),
        has_parallel_block=section.boolean("has_parallel_block", default=False),
        has_attention_output_gate=section.boolean("has_attention_output_gate", default=False),
        linear_attention=linear,
        sliding_window=section.optional_integer("sliding_window", minimum=1),
        full_attention_interval=section.optional_integer("full_attention_interval", minimum=1),
        moe=moe,
        mla=mla,
        num_mtp_layers=section.integer("num_mtp_layers", default=0, minimum=0),
    )


def _moe(section: Section) -> MoeSpec:
    moe = MoeSpec(
        num_experts=section.integer("num_experts", minimum=1),
        top_k=section.integer("top_k", minimum=1),
        moe_ffn_hidden_size=section.integer("moe_ffn_hidden_size", minimum=1),
        shared_ffn_hidden_size=section.integer("shared_ffn_hidden_size", default=0, minimum=0),
        num_dense_layers=section.integer("num_dense_layers", default=0, minimum=0),
        layer_frequency=section.integer("layer_frequency", default=1, minimum=1),
        num_expert_groups=section.integer("num_expert_groups", default=1, minimum=1),
        top_k_groups=section.integer("top_k_groups", default=1, minimum=1),
        has_shared_expert_gate=section.boolean("has_shared_expert_gate", default=False),
        has_router_bias=section.boolean("has_router_bias", default=False),
    )
    section.close()
    return moe


def _mla(section: Section) -> MlaSpec:
    mla = MlaSpec(
        q_lora_rank=section.optional_integer("q_lora_rank", minimum=1),
        kv_lora_rank=section.integer("kv_lora_rank", minimum=1),
        qk_nope_head_dim=section.integer("qk_nope_head_dim", minimum=1),
        qk_rope_head_dim=section.integer("qk_rope_head_dim", minimum=1),
        v_head_dim=section.integer("v_head_dim", minimum=1),
        index_top_k=section.optional_integer("index_top_k", minimum=1),
        index_num_heads=section.integer("index_num_heads", default=0, minimum=0),
        index_head_dim=section.integer("index_head_dim", default=0, minimum=0),
    )
    section.close()
    return mla


def _linear_attention(section: Section) -> LinearAttentionSpec:
    linear = LinearAttentionSpec(
        num_key_heads=section.integer("num_key_heads", minimum=1),
        num_value_heads=section.integer("num_value_heads", minimum=1),
        key_head_dim=section.integer("key_head_dim", minimum=1),
        value_head_dim=section.integer("value_head_dim", minimum=1),
        conv_kernel_size=section.integer("conv_kernel_size", default=4, minimum=1),
    )
    section.close()
    return linear


def _folder() -> Traversable:
    return files("meshwright.simcore.domain") / "models"


def _presets() -> Iterator[Traversable]:
    return (entry for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def _preset(model_id: str) -> Traversable | None:
    if not _PRESET_ID.fullmatch(model_id):
        return None
    preset = _folder() / f"{model_id}.yaml"
    return preset if preset.is_file() else None


def _aliased_preset(spelling: str) -> Traversable | None:
    for preset in _presets():
        text = preset.read_text(encoding="utf-8")
        # Parsing is a hundred times dearer than looking for the word first.
        if spelling in text and spelling in parse_yaml(text, preset.name).texts("aliases"):
            return preset
    return None


def _load_preset(preset: Traversable) -> ModelSpec:
    return model_from_section(parse_yaml(preset.read_text(encoding="utf-8"), f"models/{preset.name}"))


def _spellings(name: str) -> list[str]:
    """Return the names to look for: without organisation, then without one variant suffix after the other."""
    spelling = name.lower().rstrip("/").rsplit("/", 1)[-1].replace("_", "-")
    spellings = [spelling]
    while suffix := next((suffix for suffix in _VARIANT_SUFFIXES if spelling.endswith(suffix)), ""):
        spelling = spelling.removesuffix(suffix)
        spellings.append(spelling)
    return [spelling for spelling in spellings if spelling]


def _is_path(name: str) -> bool:
    if name.startswith((".", "/", "~")) or name.endswith((".json", ".yaml", ".yml")):
        return True
    try:
        return bool(name) and Path(name).exists()
    except OSError:  # a name too long for a file
        return False


def _load_path(path: Path) -> ModelSpec:
    if path.is_dir() or path.suffix == ".json":
        return read_model_config(path)
    if path.suffix in (".yaml", ".yml"):
        return model_from_section(read_yaml(path))
    raise SpecError(
        f"{path}: is neither a .json nor a .yaml file; give a config.json, a YAML preset or a preset id"
    )
