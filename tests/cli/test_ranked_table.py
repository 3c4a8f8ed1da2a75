"""Plans that differ in what they offload alone take one row of the ranked table."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from meshwright.cli.render.plans import _offload_variants, _variants_text
from meshwright.simcore.domain.plan import ParallelPlan


def entry(plan: ParallelPlan, seconds: float) -> SimpleNamespace:
    return SimpleNamespace(plan=plan, seconds=seconds)


def test_variants_stand_with_the_best_plan_of_their_kind() -> None:
    plain = ParallelPlan(dp=8, micro_batch_size=1, schedule="none", layers_per_stage=(8,))
    offloads = replace(plain, optimizer_offload="cpu", optimizer_offload_fraction=0.5)
    sharded = replace(plain, sharding="zero1")
    ranked = [
        entry(offloads, 2.0),
        entry(sharded, 2.1),
        entry(replace(plain, activation_offload=True), 2.2),
        entry(replace(sharded, optimizer_offload="cpu"), 2.3),
        entry(plain, 2.4),
    ]
    variants = _offload_variants(ranked)
    assert variants == {1: [3, 5], 2: [4]}
    assert _variants_text(ranked, 1, variants[1]) == "3, 5: plan 1 with other offload, up to 20.00% slower"
    assert _offload_variants(ranked[:2]) == {}
