"""The table of measured serving runs: its columns, its rows, and what a row means for a simulation.

The rules that a row does not state were deduced from rows that repeat each other under other labels: clients are
``concurrency x attention_dp``; where ``attention_dp`` or ``tp`` equals ``moe_tp x moe_ep`` and both of these are equal,
degrees were multiplied by each other and the run had ``moe_ep`` GPUs; mean times include the initial burst of all
clients, after which each goes on for eight to twelve requests.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from meshwright.costmodels.serving.constants import UNSTATED
from meshwright.errors import SpecError, did_you_mean
from meshwright.hardware_specs.catalog import load_gpu, resolve_cluster
from meshwright.hardware_specs.specs import ClusterSpec, NodeSpec
from meshwright.simcore.domain.model import ModelSpec
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.serving import ENGINES, EngineName, ServingPlan, ServingPool
from meshwright.simcore.domain.workload import PRECISIONS, Precision

__all__ = [
    "SERVING_COLUMNS",
    "ServingRun",
    "ServingSetup",
    "UnstatedLoadError",
    "decode_setup",
    "is_serving_table",
    "prefill_setup",
    "read_serving_runs",
    "serving_setup",
]

_POOL_COLUMNS = ("workers", "batch", "tp", "pp", "attention_dp", "moe_tp", "moe_ep")
SERVING_COLUMNS = (
    "id",
    "quality",
    "engine",
    "engine_version",
    "model",
    "gpu",
    "mode",
    "precision",
    "moe_precision",
    "input_length",
    "output_length",
    "length_ratio",
    "concurrency",
    "tp",
    "pp",
    "attention_dp",
    "moe_tp",
    "moe_ep",
    *(f"prefill_{name}" for name in _POOL_COLUMNS),
    *(f"decode_{name}" for name in _POOL_COLUMNS),
    "ttft_mean_s",
    "tpot_mean_s",
)
_REQUIRED = (
    "id",
    "engine",
    "model",
    "gpu",
    "input_length",
    "output_length",
    "concurrency",
    "ttft_mean_s",
    "tpot_mean_s",
)
_MODES = ("aggregated", "disaggregated")
# Requests of each client: ten where lengths vary (the InferenceX recipe: ten times the concurrency), and what fixed
# lengths fit best, eight to ten in every group of rows.
_REQUESTS_PER_CLIENT, _FIXED_REQUESTS_PER_CLIENT = 10, 9
# Releases whose published runs of the InferenceX recipe draft with DeepSeek's own module though no column says so: times
# per token are 1.5 to 1.9 times below those of the same configuration in other releases, or in other runs of the same
# one. Drafts and their acceptance are near the 85 to 90 % for the first one of the DeepSeek-V3 report (arXiv 2412.19437,
# section 5.4.3), less for those after it.
_DRAFTING: Mapping[tuple[str, str], tuple[int, float]] = {
    ("trtllm", "1.1.0rc2.post2"): (1, 0.78),
    ("trtllm", "1.2.0rc6.post3"): (2, 0.75),
}
# Qwen3.5 fp8 on B200 in sglang 0.5.9 ran at tp 4 and ep 1 with drafts only: the recipe with them had no other degrees
# (InferenceX pull request 898 of 2026-03-20: 3 steps, 4 tokens verified), the one without never these (804, 918) before it
# took another release (1027 of 2026-04-30). Acceptance is the default one, 2.5 tokens a step: the only published figure,
# 3.3 (golden_al_distribution/qwen3.5_mtp.yaml), is of coding, and these prompts are random.
_DRAFTING_DEGREES = (("sglang", "0.5.9", "b200-sxm-180", "fp8_block", 4, 1),)
_DRAFTS_OF_DEGREES = (3, 0.7)
# Published runs of these releases and formats always keep one client waiting (Little's law: 1.01 to 1.15 of 8, at every
# answer length): their batch was limited to one less than the clients. Runs of the same release in 8 bits do not.
_WITHOUT_LAST_SLOT = (("trtllm", "1.0.0rc3", "bf16"),)
# Releases that rows without one are of, by the formats and labels of the InferenceX recipes' history
# (dsr1_fp4_b200_docker.sh from 2025-09-21, dsr1_fp8_b200_docker.sh from 2025-11-10 with expert ranks in its labels; the
# images of dsr1-tmpl.yml and 70b-tmpl.yml on TensorRT-LLM from 2025-09-18 to 2025-11-03, when results began to name them).
# Those of gpt-oss on TensorRT-LLM changed within that time.
_UNNAMED_RELEASES: Mapping[tuple[str, str, str], str] = {
    ("sglang", "b200-sxm-180", "nvfp4"): "0.5.3rc1",
    ("sglang", "b200-sxm-180", "fp8_block"): "0.5.5",
    ("trtllm", "b200-sxm-180", "fp8"): "1.1.0rc2.post2",
    ("trtllm", "h200-sxm-141", "fp8"): "1.1.0rc2.post2",
}
# Releases whose recipes spread experts over the tensor parallel ranks (--enable-ep-moe) before labels told so.
_UNLABELLED_EXPERT_RANKS = (("sglang", "0.5.3rc1"),)
# What recipes of DeepSeek on TensorRT-LLM chose by load while results named no release (dsr1_fp8_h200_trt_slurm.sh,
# dsr1_fp8_b200_trt_slurm.sh, dsr1_fp4_b200_trt_slurm.sh until InferenceX pull request 145 of 2025-11-03) and no label
# tells: the most clients without expert ranks, and the most without attention ranks, for each of the three shapes.
_RANKS_BY_LOAD: Mapping[tuple[str, str, int], tuple[tuple[int, int], ...]] = {
    ("h200-sxm-141", "fp8", 8): ((0, 64), (0, 64), (0, 32)),
    ("b200-sxm-180", "fp8", 8): ((0, 32), (0, 64), (0, 64)),
    ("b200-sxm-180", "nvfp4", 8): ((8, 255), (16, 255), (32, 32)),
    ("b200-sxm-180", "nvfp4", 4): ((32, 255), (32, 255), (32, 32)),
}
# The three shapes of the InferenceX recipe draw lengths from 0.8 of the nominal one up whatever the ratio column says:
# such rows labelled 1.0 repeat both values of rows labelled 0.8. These releases were measured by a campaign of its own,
# with fixed lengths.
_VARIED_SHAPES = ((1024, 1024), (1024, 8192), (8192, 1024))
_VARIED_RATIO = 0.8
_FIXED_CAMPAIGNS = (("trtllm", "1.0.0rc3"), ("vllm", "0.12.0"), ("sglang", "0.5.1.post1"))
# Releases whose runs of fixed lengths were launched as aiconfigurator's generator writes it (rule_plugin/sglang.rule:
# --enable-mixed-chunk, --max-prefill-tokens of a prompt and 1,500 more, --max-running-requests of the clients): a further
# prompt enters a step while it stays within those, beside all decoding sequences. Its own benchmark asks ten requests of
# each client after a warm-up (eval/benchmarks/genai_perf_runner.py).
_GENERATED_LAUNCHES = (("sglang", "0.5.6.post2"), ("sglang", "0.5.8.post1"))
_GENERATED_SPARE_TOKENS = 1500
# Launch flags of the InferenceX recipes that make prompts wait while others decode, in steps. TensorRT-LLM's attention
# ranks begin prompts together or after so many steps (attention_dp_config: enable_balance, timeout_iters 60). SGLang on
# Blackwell looks for requests every 10 steps, and every 30 from 16 clients on (--scheduler-recv-interval).
_BALANCED_RANKS_WAIT = 60
_POLLING_WAIT, _BUSY_POLLING_WAIT, _BUSY_CLIENTS = 10, 30, 16
# TensorRT-LLM puts prompts off so that they share a step (batch_wait_timeout_iters, PyExecutor._waiting_requests): 20 steps
# in the recipes of Llama-3.3-70B for 1,024 tokens in and out below tp 8 (70b_fp8_h200_trt_slurm.sh and its siblings, all
# runs before results named releases), 40 in that of DeepSeek-R1 fp8 for the same lengths from 64 clients on
# (dsr1_fp8_b200_trt.sh). That a step with 0.9 or 0.8 of the token budget ends the wait is left out: few runs get there.
_BATCHED_SHAPE = (1024, 1024)
_DENSE_BATCHING_WAIT, _DENSE_BATCHING_BELOW_TP = 20, 8
_BATCHING_RELEASES: Mapping[tuple[str, str], tuple[int, int]] = {("1.2.0rc6.post2", "fp8"): (64, 40)}
# The usual machine of a GPU.
_NODES: Mapping[str, str] = {
    "a100-sxm-80": "dgx-a100",
    "h100-sxm-80": "dgx-h100",
    "h200-sxm-141": "dgx-h200",
    "b200-sxm-180": "dgx-b200",
    "b300-sxm-270": "dgx-b300",
    "gb200": "gb200-nvl72",
    "gb300": "gb300-nvl72",
    "l40s": "l40s-8",
}


class UnstatedLoadError(SpecError):
    """A row that does not say how many clients asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingRun:
    """One row as text, and its measured means.

    ``ttft_mean`` and ``tpot_mean`` are seconds to the first and per further output token [s].
    """

    id: str
    quality: str
    line: int
    ttft_mean: float
    tpot_mean: float
    cells: Mapping[str, str]

    def cell(self, column: str) -> str:
        """Return a cell's text, blank when the table lacks the column."""
        return self.cells.get(column, "")

    @property
    def is_disaggregated(self) -> bool:
        """Whether prefill and decode ran on pools of their own."""
        return self.cell("mode") == "disaggregated"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingSetup:
    """What a row was taken to mean.

    Parameters
    ----------
    model, cluster, plan : ModelSpec, ClusterSpec, ServingPlan
        What ran where; the plan has one aggregated pool.
    expert_precision : str
        Format of the routed experts where the row names one.
    num_clients, num_requests : int
        Closed-loop clients, and all their requests.
    max_num_sequences : int
        Most requests the engine ran at a time.
    input_length, output_length : int
        Nominal lengths [tokens].
    length_ratio : float
        Lowest length over the nominal one.
    prompt_wait_steps : int
        Steps that the run's launch flags let prompts wait while others decode.
    mixed_step_tokens : int
        Most tokens of a step by the run's launch flags, which put whole prompts beside all decoding sequences; 0
        leaves how steps are formed to the engine.
    """

    model: ModelSpec
    cluster: ClusterSpec
    plan: ServingPlan
    expert_precision: str
    num_clients: int
    num_requests: int
    max_num_sequences: int
    input_length: int
    output_length: int
    length_ratio: float
    prompt_wait_steps: int = 0
    mixed_step_tokens: int = 0


def is_serving_table(path: Path) -> bool:
    """Return whether a file starts like a table of measured serving runs; False when it cannot be read."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            header = stream.readline()
    except (OSError, UnicodeDecodeError):
        return False
    columns = {column.strip() for column in header.split(",")}
    return {"engine", "ttft_mean_s", "tpot_mean_s"} <= columns


def read_serving_runs(path: Path) -> tuple[ServingRun, ...]:
    """Return the rows of a table of measured serving runs.

    Raises
    ------
    SpecError
        If the file cannot be read as such a table: names the line and the column.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise SpecError(f"{path}: is not UTF-8 text; save the table as CSV") from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        header = tuple(reader.fieldnames or ())
        for column in header:
            if column not in SERVING_COLUMNS:
                raise SpecError(f"{path}:1: unknown column '{column}'{did_you_mean(column, SERVING_COLUMNS)}")
        missing = [column for column in _REQUIRED if column not in header]
        if missing:
            raise SpecError(
                f"{path}:1: not a table of measured serving runs: column(s) {', '.join(missing)} are missing"
            )
        return tuple(_run(path, reader.line_num, row) for row in reader)
    except csv.Error as error:
        raise SpecError(f"{path}: is not a CSV table ({error})") from None


def _run(path: Path, line: int, row: Mapping[str | None, str | list[str] | None]) -> ServingRun:
    if None in row or any(value is None for value in row.values()):
        raise SpecError(f"{path}:{line}: the row has more or fewer cells than the header")
    cells = {str(key): str(value).strip() for key, value in row.items()}
    mode = cells.get("mode") or "aggregated"
    if mode not in _MODES:
        raise SpecError(f"{path}:{line}: mode: '{mode}' is not one of {', '.join(_MODES)}")

    def seconds(column: str) -> float:
        try:
            value = float(cells[column])
        except ValueError:
            raise SpecError(f"{path}:{line}: {column}: '{cells[column]}' is not a number") from None
        if not 0.0 < value < float("inf"):
            raise SpecError(f"{path}:{line}: {column} must be a finite number above zero, not {value:g}")
        return value

    return ServingRun(
        id=cells["id"],
        quality=cells.get("quality", "") or "ok",
        line=line,
        ttft_mean=seconds("ttft_mean_s"),
        tpot_mean=seconds("tpot_mean_s"),
        cells={**cells, "mode": mode},
    )


def serving_setup(run: ServingRun) -> ServingSetup:
    """Return what an aggregated row means.

    Raises
    ------
    SpecError
        If a cell is no number or names what is not known.
    UnstatedLoadError
        If the row does not state its clients (disaggregated rows).
    """
    if run.is_disaggregated or not run.cell("concurrency"):
        raise UnstatedLoadError("the row does not say how many clients asked")
    model = load_model(run.cell("model"))
    pool, factor = _pool(run, model, "")
    return _setup(run, model, pool, _count(run, "concurrency") * factor)


def decode_setup(run: ServingRun) -> tuple[ServingSetup, float]:
    """Return the decode pool of a row of separate pools, and the batch it states per rank.

    Raises
    ------
    SpecError
        If a cell is no number or names what is not known.
    UnstatedLoadError
        If the row does not state its decode batch.
    """
    if not run.cell("decode_batch"):
        raise UnstatedLoadError("the row states neither its clients nor its decode batch")
    model = load_model(run.cell("model"))
    pool, _ = _pool(run, model, "decode_")
    batch = _count(run, "decode_batch")
    return _setup(run, model, pool, batch), float(batch)


def prefill_setup(run: ServingRun) -> tuple[ServingSetup, float]:
    """Return the prefill pool of a row of separate pools, and its ranks per rank of the decode pool.

    Raises
    ------
    SpecError
        If a cell is no number or names what is not known.
    """
    model = load_model(run.cell("model"))
    pool, _ = _pool(run, model, "prefill_")
    decode, _ = _pool(run, model, "decode_")
    ranks = _count(run, "prefill_workers") * pool.attention_dp
    return _setup(run, model, pool, 1), ranks / (_count(run, "decode_workers") * decode.attention_dp)


def _setup(run: ServingRun, model: ModelSpec, pool: ServingPool, clients: int) -> ServingSetup:
    engine = run.cell("engine")
    if engine not in ENGINES:
        raise SpecError(f"engine '{engine}' is none of {', '.join(ENGINES)}{did_you_mean(engine, ENGINES)}")
    precision = run.cell("precision") or "bf16"
    if precision not in PRECISIONS:
        raise SpecError(f"precision '{precision}' is none of {', '.join(PRECISIONS)}")
    version = _release(run)
    drafts, rate = _unsaid_drafts(run, model, pool)
    if drafts:
        pool = replace(pool, num_speculative_tokens=drafts, acceptance_rate=rate)
    cluster = _cluster(run.cell("gpu"), pool.gpus_per_replica)
    lengths = (_count(run, "input_length"), _count(run, "output_length"))
    ratio = float(run.cell("length_ratio") or 1.0)
    if lengths in _VARIED_SHAPES and (engine, version) not in _FIXED_CAMPAIGNS:
        ratio = min(ratio, _VARIED_RATIO)
    is_generated = ratio == 1.0 and (engine, version) in _GENERATED_LAUNCHES
    is_other_fixed = ratio == 1.0 and not is_generated
    per_client = _FIXED_REQUESTS_PER_CLIENT if is_other_fixed else _REQUESTS_PER_CLIENT
    return ServingSetup(
        model=model,
        cluster=cluster,
        plan=ServingPlan(
            engine=cast("EngineName", engine),
            engine_version=version or UNSTATED,
            precision=cast("Precision", precision),
            kv_precision=_kv_precision(engine, precision, cluster.gpu.architecture),
            pools=(pool,),
        ),
        expert_precision=run.cell("moe_precision"),
        num_clients=clients,
        num_requests=clients * per_client,
        max_num_sequences=max(1, clients - ((engine, version, precision) in _WITHOUT_LAST_SLOT)),
        input_length=lengths[0],
        output_length=lengths[1],
        length_ratio=ratio,
        prompt_wait_steps=_batching_wait(run, model, pool, lengths, clients)
        or _prompt_wait(engine, model, pool, cluster, clients),
        mixed_step_tokens=lengths[0] + _GENERATED_SPARE_TOKENS + clients if is_generated else 0,
    )


def _unsaid_drafts(run: ServingRun, model: ModelSpec, pool: ServingPool) -> tuple[int, float]:
    """Return the drafts a step, and the chance of each, that a row's recipe had though no column says so."""
    if not model.num_mtp_layers or run.cell("length_ratio") != f"{_VARIED_RATIO:g}":
        return 0, 0.0
    # Rows that name no release are older than every recipe with drafts.
    engine, version = run.cell("engine"), run.cell("engine_version")
    recipe = (engine, version, load_gpu(run.cell("gpu")).id, run.cell("moe_precision"), pool.tp, pool.ep)
    if recipe in _DRAFTING_DEGREES and model.linear_attention is not None:
        return _DRAFTS_OF_DEGREES
    return _DRAFTING.get((engine, version), (0, 0.0))


def _release(run: ServingRun) -> str:
    """Return the release a row names, or the one its recipe had; blank where neither is known."""
    recipe = (run.cell("engine"), load_gpu(run.cell("gpu")).id, run.cell("moe_precision"))
    return run.cell("engine_version") or _UNNAMED_RELEASES.get(recipe, "")


def _batching_wait(
    run: ServingRun, model: ModelSpec, pool: ServingPool, lengths: tuple[int, int], clients: int
) -> int:
    """Return how many steps TensorRT-LLM was told to put prompts off for others to come; 0 where it was not."""
    if run.cell("engine") != "trtllm" or lengths != _BATCHED_SHAPE or pool.attention_dp > 1:
        return 0
    version = run.cell("engine_version")
    if model.moe is None:
        return 0 if version or pool.tp >= _DENSE_BATCHING_BELOW_TP else _DENSE_BATCHING_WAIT
    fewest, steps = _BATCHING_RELEASES.get((version, run.cell("moe_precision")), (0, 0))
    return steps if clients >= fewest else 0


def _prompt_wait(engine: str, model: ModelSpec, pool: ServingPool, cluster: ClusterSpec, clients: int) -> int:
    if engine == "trtllm":
        return _BALANCED_RANKS_WAIT if pool.attention_dp > 1 else 0
    if engine == "sglang" and model.moe is not None and cluster.gpu.architecture == "blackwell":
        return _BUSY_POLLING_WAIT if clients >= _BUSY_CLIENTS else _POLLING_WAIT
    return 0


def _count(run: ServingRun, column: str) -> int:
    text = run.cell(column) or "1"
    if not text.isdigit():
        raise SpecError(f"{column}: '{text}' is not a whole number")
    # A degree of 0 is how some rows write "not used".
    return max(1, int(text))


def _pool(run: ServingRun, model: ModelSpec, prefix: str) -> tuple[ServingPool, int]:
    """Return the pool a row ran on, and how many clients stand behind each of its concurrency."""
    tp, pp, attention_dp, moe_tp, ep = (
        _count(run, f"{prefix}{column}") for column in ("tp", "pp", "attention_dp", "moe_tp", "moe_ep")
    )
    factor = attention_dp
    if model.moe is None:
        return ServingPool(tp=tp, pp=pp, attention_dp=attention_dp), factor
    ranks = moe_tp * ep
    if ep == 1 and (run.cell("engine"), _release(run)) in _UNLABELLED_EXPERT_RANKS:
        moe_tp, ep = 1, moe_tp
    unsplit = _loads_without_ranks(run, model, tp)
    if unsplit is not None and ep == 1:
        clients = _count(run, "concurrency")
        if clients > unsplit[1]:
            return ServingPool(attention_dp=tp, moe_tp=1, ep=tp), 1
        if clients > unsplit[0]:
            moe_tp, ep = 1, tp
    is_multiplied = (run.cell("engine"), run.cell("engine_version")) not in _FIXED_CAMPAIGNS
    if is_multiplied and moe_tp == ep > 1 and ranks in (tp, attention_dp):
        if attention_dp == ranks:
            attention_dp = ep
        else:
            tp = ep
        moe_tp = 1
    elif tp > 1 and attention_dp > 1 and ep == tp * attention_dp:
        # The experts were spread over the tensor parallel ranks, and only the load was multiplied.
        attention_dp, moe_tp, ep = 1, 1, tp
    elif model.num_attention_heads % tp:
        # Heads that do not divide were not split: the ranks hold whole attention each and share out the experts.
        attention_dp, tp, moe_tp, ep = tp * attention_dp, 1, 1, tp * attention_dp
        factor = 1
    elif ranks > tp * attention_dp:
        # A plan of aiconfigurator has as many attention as expert ranks; its column of vLLM's data parallel degree stays 1.
        factor = attention_dp = ranks // tp
    elif ranks < tp * attention_dp:
        moe_tp = tp * attention_dp // ep
    return ServingPool(tp=tp, pp=pp, attention_dp=attention_dp, moe_tp=moe_tp, ep=ep), factor


def _loads_without_ranks(run: ServingRun, model: ModelSpec, tp: int) -> tuple[int, int] | None:
    """Return the most clients without expert ranks and without attention ranks, where the row's recipe chose by them."""
    if run.cell("engine") != "trtllm" or run.cell("engine_version") or not model.num_mtp_layers:
        return None
    lengths = (_count(run, "input_length"), _count(run, "output_length"))
    loads = _RANKS_BY_LOAD.get((load_gpu(run.cell("gpu")).id, run.cell("moe_precision"), tp))
    return None if loads is None or lengths not in _VARIED_SHAPES else loads[_VARIED_SHAPES.index(lengths)]


def _kv_precision(engine: str, precision: str, architecture: str) -> Precision:
    """Return the format of the KV cache, which no column states: 8 bits with quantised weights where it is usual.

    TensorRT-LLM follows the checkpoint, NVIDIA's recipes for Blackwell ask for it; elsewhere the default is 16 bits.
    """
    is_narrow = precision != "bf16" and (engine == "trtllm" or architecture == "blackwell")
    return "fp8" if is_narrow else "bf16"


def _cluster(name: str, num_gpus: int) -> ClusterSpec:
    gpu = load_gpu(name)
    if gpu.id not in _NODES:
        raise SpecError(f"gpu '{name}': no usual machine is known for it; known: {', '.join(sorted(_NODES))}")
    cluster = resolve_cluster(f"{_NODES[gpu.id]}:1")
    node: NodeSpec = cluster.node
    nodes = -(-num_gpus // node.num_gpus)
    return cluster if nodes == 1 else resolve_cluster(f"{_NODES[gpu.id]}:{nodes}")
