"""Plans that cannot fit by arithmetic on paper are refused, and their nearest neighbours that can are not.

Mixed precision training with Adam keeps 18 bytes per parameter: 2 weight, 4 main gradient, 12 optimizer states
(Rajbhandari et al. 2020, arXiv 1910.02054, with a gradient buffer of 4 bytes). Of activations, one layer without
recompute stores more than ``20 * sequence * micro_batch * hidden`` bytes even with fused attention (Korthikanti et
al. 2022, arXiv 2205.05198, equation 1, counts 34 with dropout), and 1F1B's first stage holds ``pp`` micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from meshwright.costmodels.context import CostContext, cost_context
from meshwright.costmodels.prediction import predict
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.planner.space import SearchLimits
from meshwright.planner.violations import find_violation
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.plan import ParallelPlan, partition_layers
from meshwright.simcore.domain.workload import TrainingWorkload

pytestmark = pytest.mark.validation


@dataclass(frozen=True)
class Case:
    """A plan whose memory is at least ``floor_bytes`` on paper, and the changes that make it fit."""

    name: str
    model: str
    cluster: str
    batch: int
    length: int
    plan: dict[str, object]
    floor_bytes: float
    fits_with: dict[str, object]
    software: str = "megatron-core"


def states(parameters: float, weights: float = 1.0, gradients: float = 1.0, optimizer: float = 1.0) -> float:
    """Return 2 + 4 + 12 bytes per parameter, each divided by the ranks that share it."""
    return parameters * (2.0 / weights + 4.0 / gradients + 12.0 / optimizer)


CASES = (
    # The weights alone: 70.6e9 * 2 B = 131 GiB on one GPU.
    Case("weights of 70B on one GPU", "llama-3-70b", "dgx-h100:8", 64, 4096,
         {"dp": 64, "sharding": "zero1", "recompute": "full"}, states(70.5e9, optimizer=64),
         {"dp": 8, "tp": 8, "sequence_parallel": True}),
    # Nothing is shared: 6.7e9 * 18 B = 113 GiB.
    Case("unsharded Adam of 7B", "llama-2-7b", "dgx-h100:1", 8, 4096,
         {"dp": 8, "sharding": "none", "recompute": "full"}, states(6.7e9), {"sharding": "zero1"}),
    # tp 8 alone: 70.6e9 / 8 * 18 B = 148 GiB.
    Case("70B split by tp only", "llama-3-70b", "dgx-h100:1", 8, 4096,
         {"dp": 1, "tp": 8, "sequence_parallel": True, "recompute": "full"}, states(70.5e9 / 8),
         {"dp": 4, "sharding": "zero1", "tp": 8, "pp": 2, "cluster": "dgx-h100:8"}),
    # 405e9 / 64 * 18 B = 106 GiB.
    Case("405B on 64 GPUs", "llama-3.1-405b", "dgx-h100:8", 8, 8192,
         {"dp": 1, "tp": 8, "pp": 8, "sequence_parallel": True, "recompute": "full"}, states(405e9 / 64 * 0.9),
         {"pp": 16, "dp": 1, "cluster": "dgx-h100:16"}),
    # 53e9 of 70.6e9 parameters' gradients: zero1 shares only the states, 6 B of 13e9 are 73 GiB.
    Case("zero1 of 13B on 40 GB", "llama-2-13b", "dgx-a100-40:1", 8, 2048,
         {"dp": 8, "sharding": "zero1", "recompute": "full"}, states(13.0e9, optimizer=8), {"sharding": "zero3"}),
    # 8 micro-batches of 12 layers, each 20 * 2048 * 4 * 12288 / 8 B: 22 GiB beside states of 46 GiB, mb 8: 45 GiB.
    Case("stored activations of 175B", "gpt3-175b", "dgx-a100:8", 64, 2048,
         {"dp": 1, "tp": 8, "pp": 8, "sequence_parallel": True, "micro_batch_size": 8, "recompute": "none"},
         states(175e9 / 64 * 0.95) + 8 * 12 * 20 * 2048 * 8 * 12288 / 8, {"recompute": "full"}),
    # A long sequence without recompute: 32 layers * 20 * 131072 * 4096 / 8 B = 40 GiB beside 17 GiB of states, and
    # the logits of 131072 tokens, 6 B * 128256 / 8 each: 12 GiB.
    Case("stored activations of 256k tokens", "llama-3.1-8b", "dgx-h100:1", 1, 262144,
         {"dp": 1, "tp": 8, "sequence_parallel": True, "recompute": "none"},
         states(8.0e9 / 8) + 32 * 20 * 262144 * 4096 / 8, {"recompute": "full", "length": 131072}),
    # Logits of 16 sequences: 16 * 8192 * 256000 * 4 B = 125 GiB.
    Case("logits of a large vocabulary", "gemma-2-2b", "dgx-h100:1", 128, 8192,
         {"dp": 8, "sharding": "zero1", "micro_batch_size": 16, "recompute": "full"}, 16 * 8192 * 256000 * 4,
         {"micro_batch_size": 2}),
    # 46.7e9 * (2 + 4) B = 261 GiB: experts are not shared out.
    Case("all experts on every rank", "mixtral-8x7b", "dgx-h100:4", 64, 4096,
         {"dp": 32, "sharding": "zero1", "recompute": "full"}, states(46.7e9, optimizer=32),
         {"dp": 8, "tp": 4, "sequence_parallel": True, "ep": 8, "etp": 1}),
    # 656e9 expert parameters over ep 64, all states: 656e9 / 64 * 6 B = 57 GiB, and 17e9 others at 6 B = 95 GiB.
    Case("dense part of DeepSeek-V3 on every rank", "deepseek-v3", "dgx-h100:8", 128, 4096,
         {"dp": 64, "ep": 64, "sharding": "zero1", "recompute": "full"},
         6 * (656e9 / 64 + 15e9), {"dp": 128, "pp": 16, "ep": 64, "cluster": "dgx-h100:256"}),
    # No recompute, unfused attention: 5 * heads * sequence / hidden = 64 times hidden more, split by tp; 3 layers of 35
    # micro-batches, (10 + 24 / 8 + 64 / 8) * 2048 * 20480 B each: 86 GiB.
    Case("stored scores of 530B", "mt-nlg-530b", "dgx-a100:35", 280, 2048,
         {"dp": 1, "tp": 8, "pp": 35, "recompute": "none"},
         states(530e9 / 280 * 0.9) + 35 * 3 * (10 + 24 / 8 + 64 / 8) * 2048 * 20480, {"recompute": "full"},
         software="megatron-2021"),
    # zero2 keeps whole weights: 65e9 * 2 B = 121 GiB.
    Case("zero2 keeps the weights of 65B whole", "llama-65b", "dgx-a100:16", 128, 2048,
         {"dp": 128, "sharding": "zero2", "recompute": "full"}, states(65e9, gradients=128, optimizer=128),
         {"sharding": "zero3"}),
)  # fmt: skip


def built(case: Case, changes: dict[str, object]) -> tuple[CostContext, ParallelPlan]:
    """Return the case with some changes."""
    fields: dict[str, object] = {"micro_batch_size": 1, **case.plan, **changes}
    cluster, length = str(fields.pop("cluster", case.cluster)), int(str(fields.pop("length", case.length)))
    model = load_model(case.model)
    pp = int(str(fields.get("pp", 1)))
    job = TrainingJob(
        model=model,
        cluster=resolve_cluster(cluster),
        workload=TrainingWorkload(global_batch_size=case.batch, sequence_length=length),
        software=case.software,
    )
    plan = ParallelPlan(
        **{
            "schedule": "1f1b" if pp > 1 else "none",
            "layers_per_stage": partition_layers(model.num_layers, pp),
            **fields,
        }  # type: ignore[arg-type]  # keywords are checked by the class
    )
    return cost_context(job), plan


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_cannot_fit_on_paper_is_refused_for_its_memory(case: Case) -> None:
    context, plan = built(case, {})
    prediction = predict(context, plan)
    assert case.floor_bytes > prediction.usable_memory_bytes, "the case itself must not fit"
    assert prediction.peak_memory_bytes >= case.floor_bytes
    violation = find_violation(context, plan, SearchLimits(memory_headroom=0.0))
    assert violation is not None
    assert violation.constraint == "memory"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_neighbour_that_fits_is_not_refused(case: Case) -> None:
    context, plan = built(case, case.fits_with)
    prediction = predict(context, plan)
    assert prediction.memory_headroom > 0.0
    assert find_violation(context, plan, SearchLimits(memory_headroom=0.0)) is None
