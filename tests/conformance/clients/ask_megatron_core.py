"""Ask megatron-core about arguments and rank groups: ``python ask_megatron_core.py QUESTIONS ANSWERS``.

A question with ``arguments`` builds the TransformerConfig that Megatron-LM would build from them (its
``core_transformer_config_from_args``, re-stated here because the wheel has no command line) and, with ``world``, the
process groups. A question with ``groups`` answers with every group that ``initialize_model_parallel`` creates.
torch's "fake" backend stands for the network, so that one process plays any rank of any world; a Transformer Engine new
enough for the options is assumed, since without a GPU there is none to ask.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import megatron.core.transformer.transformer_config as config_module
import megatron.core.utils as core_utils
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from packaging.version import Version
from torch.testing._internal.distributed.fake_pg import FakeStore

_TRANSFORMER_ENGINE = Version("2.9.0")


def _get_version() -> Version:
    return _TRANSFORMER_ENGINE


def _is_at_least(version: str, check_equality: bool = True) -> bool:
    return Version(version) <= _TRANSFORMER_ENGINE


for _module in (config_module, core_utils):
    for _name, _function in (("get_te_version", _get_version), ("is_te_min_version", _is_at_least)):
        if hasattr(_module, _name):
            setattr(_module, _name, _function)

# Options of training, data and launch that no field of the configuration holds.
OTHER_OPTIONS = {
    "ckpt_format",
    "clip_grad",
    "data_parallel_sharding_strategy",
    "eval_iters",
    "global_batch_size",
    "group_query_attention",
    "log_interval",
    "lr",
    "lr_decay_style",
    "lr_warmup_iters",
    "make_vocab_size_divisible_by",
    "max_position_embeddings",
    "micro_batch_size",
    "min_lr",
    "mock_data",
    "mtp_num_layers",
    "no_gradient_accumulation_fusion",
    "num_distributed_optimizer_instances",
    "optimizer_cpu_offload",
    "optimizer_offload_fraction",
    "overlap_cpu_optimizer_d2h_h2d",
    "overlap_grad_reduce",
    "overlap_param_gather",
    "position_embedding_type",
    "seq_length",
    "split",
    "tokenizer_type",
    "train_iters",
    "untie_embeddings_and_output_weights",
    "use_distributed_optimizer",
    "use_megatron_fsdp",
    "use_precision_aware_optimizer",
    "use_tp_pp_dp_mapping",
    "vocab_size",
    "weight_decay",
}
RENAMED = {
    "num_experts": "num_moe_experts",
    "fp8_format": "fp8",
    "decoder_first_pipeline_num_layers": "num_layers_in_first_pipeline_stage",
    "decoder_last_pipeline_num_layers": "num_layers_in_last_pipeline_stage",
}


def read_options(arguments: list[str]) -> dict[str, list[str]]:
    """Return the values of each option."""
    options: dict[str, list[str]] = {}
    for word in arguments:
        if word.startswith("--"):
            name = word[2:].replace("-", "_")
            options[name] = []
        else:
            options[name].append(word)
    return options


def value_of(words: list[str]) -> object:
    """Return the value of an option as the command line types it."""
    values: list[object] = []
    for word in words:
        for kind in (int, float):
            try:
                values.append(kind(word))
                break
            except ValueError:
                continue
        else:
            values.append(word)
    return True if not values else values[0] if len(values) == 1 else values


def expand_pattern(text: str) -> list[int]:
    """Return the list that an expression like ``[0]*3+[1]*58`` writes."""
    return [int(kind) for kind, count in re.findall(r"\[(\d)\]\*(\d+)", text) for _ in range(int(count))]


def fields_of(options: dict[str, list[str]], config_class: type) -> tuple[dict[str, object], list[str]]:
    """Return the fields that the options set, and the options that set none."""
    known = {field.name for field in dataclasses.fields(config_class)}
    fields: dict[str, object] = {
        "pipeline_dtype": torch.bfloat16,
        "bf16": "bf16" in options,
        "fp16": "fp16" in options,
    }
    unknown = []
    for name, words in options.items():
        target, value = RENAMED.get(name, name), value_of(words)
        if name == "swiglu":
            fields |= {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}
        elif name == "disable_bias_linear":
            fields["add_bias_linear"] = False
        elif name == "multi_latent_attention":
            fields[name] = True
        elif name == "moe_layer_freq":
            fields[name] = expand_pattern(str(value))
        elif name == "window_size":
            fields[name] = tuple(int(part) for part in words[0].split(","))
        elif name == "num_layers_per_virtual_pipeline_stage":
            per_rank = int(options["num_layers"][0]) // int(options["pipeline_model_parallel_size"][0])
            fields["virtual_pipeline_model_parallel_size"] = per_rank // int(words[0])
        elif name in ("recompute_modules", "hierarchical_context_parallel_sizes"):
            fields[name] = [value_of([word]) for word in words]
        elif target in known:
            fields[target] = value
            if name == "cpu_offloading_num_layers":
                fields["cpu_offloading"] = True
        elif name not in OTHER_OPTIONS:
            unknown.append(name)
    return fields, unknown


def build(arguments: list[str]) -> None:
    """Build the configuration of a command line."""
    options = read_options(arguments)
    config_class = MLATransformerConfig if "multi_latent_attention" in options else TransformerConfig
    fields, unknown = fields_of(options, config_class)
    if unknown:
        raise ValueError(f"options that no field holds: {', '.join(unknown)}")
    # Command lines turn sequence parallelism off at tp 1; the class refuses it.
    config_class(**fields)


def initialize(sizes: dict, world: int, rank: int, created: dict[str, list[list[int]]] | None = None) -> None:
    """Create every group as a rank of a world, and record them."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    create_group = parallel_state.create_group

    def recorded(ranks: list[int], **keywords: object) -> object:
        if created is not None:
            created[str(keywords.get("group_desc"))].append(list(ranks))
        return create_group(ranks, **keywords)

    parallel_state.create_group = recorded
    try:
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False, **sizes)
        if created is not None:
            for name, group in (
                ("OWN_TP", parallel_state.get_tensor_model_parallel_group()),
                ("OWN_CP", parallel_state.get_context_parallel_group()),
                ("OWN_DP", parallel_state.get_data_parallel_group()),
                ("OWN_DP_CP", parallel_state.get_data_parallel_group(with_context_parallel=True)),
                ("OWN_PP", parallel_state.get_pipeline_model_parallel_group()),
                ("OWN_EP", parallel_state.get_expert_model_parallel_group()),
                ("OWN_ETP", parallel_state.get_expert_tensor_parallel_group()),
                ("OWN_EDP", parallel_state.get_expert_data_parallel_group()),
            ):
                created[name].append(dist.get_process_group_ranks(group))
    finally:
        parallel_state.create_group = create_group
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def answer(question: dict) -> dict:
    """Return the framework's error, None without one, and the groups where they were asked for."""
    created: dict[str, list[list[int]]] = defaultdict(list)
    try:
        if "arguments" in question:
            build(question["arguments"])
        if "groups" in question:
            initialize(question["groups"], question["world"], question.get("rank", 0), created)
    except (
        AssertionError,
        AttributeError,
        RuntimeError,
        TypeError,
        ValueError,
        ImportError,
        KeyError,
    ) as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    return {"error": None, "created": created if question.get("shows_groups") else {}}


def main() -> None:
    """Answer every question of a file."""
    questions = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([answer(question) for question in questions]))


if __name__ == "__main__":
    main()
