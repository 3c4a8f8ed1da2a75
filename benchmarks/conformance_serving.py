"""Print how many exported serving plans vLLM and SGLang accept, and which broken ones they and our rules refuse.

    PYTHONPATH=WHEEL VLLM_TARGET_DEVICE=cpu HF_HUB_OFFLINE=1 python benchmarks/conformance_serving.py vllm
    PYTHONPATH=WHEEL python benchmarks/conformance_serving.py sglang

WHEEL is the folder of an unzipped wheel of the engine, without its compiled libraries and its dependencies on CUDA (pip
download ENGINE --no-deps; unzip FILE -d WHEEL -x '*.so'); vLLM starts a process of its own that reads PYTHONPATH. No GPU
is used. vLLM goes through ``AsyncEngineArgs.create_engine_config``, its check of a whole configuration, on every server
of a replica; SGLang through its parser of arguments, which checks names and types only, and with ``--resolve`` through
the resolution of its arguments too, which imports more of its dependencies.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from conformance_missing import exit_with

from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.planner.export import SERVING_EXPORTERS
from meshwright.planner.export.serving_scripts import replica_shape
from meshwright.planner.export.sglang import sglang_arguments
from meshwright.planner.export.vllm import vllm_arguments
from meshwright.simcore.domain.model import ModelSpec
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.serving import (
    EngineName,
    LengthDistribution,
    ServingJob,
    ServingPlan,
    ServingPool,
    ServingWorkload,
)

MODELS = ("llama-3.1-8b", "llama-3.3-70b", "mixtral-8x7b", "qwen3-235b-a22b", "deepseek-v3")
CLUSTER = "dgx-h100:8"
# Tensor parallel ranks, stages, attention data parallel ranks of a replica.
SHAPES = (
    (1, 1, 1),
    (2, 1, 1),
    (4, 1, 1),
    (8, 1, 1),
    (8, 2, 1),
    (16, 1, 1),
    (1, 1, 8),
    (2, 1, 4),
    (4, 2, 1),
    (1, 1, 16),
)
# What stands for the answer to a plan whose words the engine has no options for.
UNSPOKEN = "no option"
# Accepts or refuses the arguments of one server; returns why it refuses.
Client = Callable[[list[str]], str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A plan and the job it serves."""

    job: ServingJob
    plan: ServingPlan


def main() -> int:
    """Run the corpus of one engine; returns 1 when a plan that our rules pass is refused by the engine."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", choices=["vllm", "sglang"])
    parser.add_argument(
        "--resolve", action="store_true", help="SGLang: resolve the arguments after parsing them"
    )
    flags = parser.parse_args()
    engine: EngineName = flags.engine
    logging.disable(logging.WARNING)
    client = vllm_client() if engine == "vllm" else sglang_client(flags.resolve)
    with tempfile.TemporaryDirectory() as folder:
        configs = {name: write_config(load_model(name), Path(folder) / name) for name in MODELS}
        counts: Counter[str] = Counter()
        for case in itertools.chain(good_cases(engine), broken_cases(engine)):
            ours = SERVING_EXPORTERS[engine].unsupported(case.job, case.plan)
            theirs = asked(client, engine, case, configs[case.job.model.name])
            verdict = {None: "accepted by", UNSPOKEN: "without words in"}.get(theirs, "refused by")
            counts[f"{'refused' if ours else 'passed'} by our rules, {verdict} {engine}"] += 1
            if theirs and not ours:
                print(f"REFUSED {case.job.model.name} {case.plan}\n  {theirs}")
    print(f"{engine}: {sum(counts.values())} plans")
    for words, count in sorted(counts.items()):
        print(f"  {count:4d} {words}")
    return 1 if counts[f"passed by our rules, refused by {engine}"] else 0


def good_cases(engine: EngineName) -> Iterator[Case]:
    """Yield plans over models, shapes, policies, caches, number formats and pools that our rules pass."""
    exporter = SERVING_EXPORTERS[engine]
    for name, shape, option in itertools.product(MODELS, SHAPES, range(4)):
        case = make_case(engine, load_model(name), shape, option)
        if not exporter.unsupported(case.job, case.plan):
            yield case


def broken_cases(engine: EngineName) -> Iterator[Case]:
    """Yield plans with one slip each, all of which our rules must refuse."""
    for name in MODELS:
        model = load_model(name)
        base = make_case(engine, model, (8, 1, 1), 0)
        (pool,) = base.plan.pools
        slips: list[dict[str, object]] = [
            {"tp": 3, "moe_tp": 1, "ep": 1},
            {"tp": 7, "moe_tp": 1, "ep": 1},
            {"max_num_sequences": 9000, "max_num_batched_tokens": 4096},
            {"block_size": 24},
            {"pp": 200},
            {"num_speculative_tokens": 2} if not model.num_mtp_layers else {"policy": "static"},
            {"policy": "split_fuse"},
            {"policy": "orca", "max_num_batched_tokens": 1024},
            {"kv_cache_tokens": 160},
        ]
        if model.moe is None:
            slips += [{"ep": 8}, {"attention_dp": 2, "tp": 4}]
        else:
            slips += [{"moe_tp": 1, "ep": 1}, {"tp": 24, "ep": 24, "moe_tp": 1}, {"redundant_experts": 3}]
        for slip in slips:
            yield dataclasses.replace(
                base, plan=dataclasses.replace(base.plan, pools=(dataclasses.replace(pool, **slip),))
            )
        for fields in ({"kv_precision": "int8"}, {"precision": "tf32"}):
            yield dataclasses.replace(base, plan=dataclasses.replace(base.plan, **fields))


def make_case(engine: EngineName, model: ModelSpec, shape: tuple[int, int, int], option: int) -> Case:
    """Return a plan of a shape; ``option`` varies what else a plan says."""
    tp, pp, attention_dp = shape
    shares_experts = option % 2 == 0
    moe: dict[str, int] = {}
    if model.moe is not None:
        ranks = tp * attention_dp
        moe = {"ep": ranks, "moe_tp": 1} if shares_experts else {"moe_tp": ranks, "ep": 1}
        if option == 2 and ranks > 1:
            moe["redundant_experts"] = ranks
    usual = "chunked_prefill" if engine == "vllm" or option == 2 else "prefill_first"
    pool = ServingPool(
        tp=tp,
        pp=pp,
        attention_dp=attention_dp,
        policy="orca" if engine == "vllm" and option == 3 else usual,
        max_num_sequences=(32, 64, 256, 128)[option],
        max_num_batched_tokens=(2048, 8192, 16384, 8192)[option],
        block_size=(16, 64, 16, 32)[option],
        kv_cache_tokens=64 * 4096 if option == 1 else None,
        has_prefix_cache=option >= 2,
        num_speculative_tokens=1 if model.num_mtp_layers and option == 1 else 0,
        **moe,
    )
    pools = (pool,)
    if option == 1:
        pools = (
            dataclasses.replace(pool, role="prefill", num_speculative_tokens=0),
            dataclasses.replace(pool, role="decode"),
        )
    workload = ServingWorkload(
        arrival="poisson",
        rate=1.0,
        input_length=LengthDistribution(mean=2000),
        output_length=LengthDistribution(mean=500),
    )
    plan = ServingPlan(
        engine=engine,
        pools=pools,
        precision="fp8" if option == 2 else "bf16",
        kv_precision="fp8" if option == 2 else "bf16",
        router="round_robin",
    )
    return Case(job=ServingJob(model=model, cluster=resolve_cluster(CLUSTER), workload=workload), plan=plan)


def asked(client: Client, engine: EngineName, case: Case, config: Path) -> str | None:
    """Return why the engine refuses the arguments of some server of some pool; None when it takes all."""
    for pool in case.plan.pools:
        arguments = vllm_arguments if engine == "vllm" else sglang_arguments
        try:
            words = [word for group in arguments(case.job, case.plan, pool) for word in group.argv]
        except KeyError:
            return UNSPOKEN
        shape = replica_shape(case.job, pool)
        for rank in range(shape.num_servers):
            joined: list[str] = []
            if shape.num_servers > 1:
                joined = ["--nnodes", str(shape.num_servers), "--node-rank", str(rank)]
                joined += (
                    ["--master-addr", "127.0.0.1"]
                    if engine == "vllm"
                    else ["--dist-init-addr", "127.0.0.1:29501"]
                )
            refused = client(
                ["--model" if engine == "vllm" else "--model-path", str(config), *words, *joined]
            )
            if refused is not None:
                return refused
    return None


def vllm_client() -> Client:
    """Return a client that builds vLLM's whole configuration."""
    from vllm.config import parallel  # type: ignore[import-not-found]
    from vllm.engine.arg_utils import AsyncEngineArgs  # type: ignore[import-not-found]  # from the wheel
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # type: ignore[import-not-found]

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    # Copies of experts are refused on a machine without GPUs, whatever the arguments.
    parallel.current_platform = _AsOnGpus(parallel.current_platform)

    def ask(words: list[str]) -> str | None:
        own = ["--skip-tokenizer-init", "--distributed-executor-backend", "mp"]
        rank = words[words.index("--node-rank") + 1] if "--node-rank" in words else "0"
        return said(
            lambda: AsyncEngineArgs.from_cli_args(parser.parse_args([*words, *own])).create_engine_config(
                headless=rank != "0"
            )
        )

    return ask


class _AsOnGpus:
    """vLLM's platform of this machine, which says of itself that it is like CUDA."""

    def __init__(self, platform: object) -> None:
        self._platform = platform

    def __getattr__(self, name: str) -> object:
        return (lambda: True) if name == "is_cuda_alike" else getattr(self._platform, name)


def sglang_client(resolves: bool) -> Client:
    """Return a client that parses SGLang's arguments, and resolves them where asked to."""
    from sglang.srt.server_args import ServerArgs  # type: ignore[import-not-found]  # from the wheel

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)

    def ask(words: list[str]) -> None:
        # Without a GPU the resolution wants to be told.
        arguments = parser.parse_args([*words, *(["--device", "cpu"] if resolves else [])])
        if resolves:
            ServerArgs.from_cli_args(arguments).resolve_once()

    return lambda words: said(lambda: ask(words))


def said(ask: Callable[[], object]) -> str | None:
    """Return the last line of what a client says when it refuses; None when it does not."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            ask()
    except (Exception, SystemExit) as error:
        lines = (str(error) if not isinstance(error, SystemExit) else errors.getvalue()).strip().splitlines()
        # Pydantic says why before the address of its manual.
        words = [line for line in lines if "errors.pydantic.dev" not in line]
        return f"{type(error).__name__}: {words[-1] if words else ''}"
    return None


def write_config(model: ModelSpec, folder: Path) -> Path:
    """Write a config.json of the model's shape and return its folder."""
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.head_dim,
        "num_hidden_layers": model.num_layers,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "torch_dtype": "bfloat16",
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": model.has_tied_embeddings,
    }
    moe = model.moe
    if moe is not None and model.mla is not None:
        config |= {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "n_routed_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.moe_ffn_hidden_size,
            "n_shared_experts": moe.shared_ffn_hidden_size // moe.moe_ffn_hidden_size,
            "n_group": moe.num_expert_groups,
            "topk_group": moe.top_k_groups,
            "first_k_dense_replace": moe.num_dense_layers,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
            "num_nextn_predict_layers": model.num_mtp_layers,
            "q_lora_rank": model.mla.q_lora_rank,
            "kv_lora_rank": model.mla.kv_lora_rank,
            "qk_nope_head_dim": model.mla.qk_nope_head_dim,
            "qk_rope_head_dim": model.mla.qk_rope_head_dim,
            "v_head_dim": model.mla.v_head_dim,
        }
        del config["head_dim"]
    elif moe is not None:
        config |= {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "num_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.moe_ffn_hidden_size,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
        }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(cast("dict[str, object]", config)))
    return folder


if __name__ == "__main__":
    exit_with(
        main,
        "the engine's own code: pip download ENGINE --no-deps, unzip the wheel and name the folder in PYTHONPATH (see --help)",
    )
