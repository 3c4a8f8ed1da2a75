"""The corpus is the same everywhere and reaches every lever of every target; every broken plan is refused."""

from __future__ import annotations

from collections import Counter

import conformance_corpus
import pytest
from conformance_broken import BROKEN, reasons_of
from conformance_corpus import TARGETS, corpus, takers

from meshwright.simcore.domain.device_mapping import RANK_ORDERS

# Values of plan fields that at least one plan of the corpus must have.
_REACHED = {
    "tp": (1, 2, 4, 8),
    "pp": (1, 2, 4, 8),
    "vpp": (1, 2, 3),
    "cp": (1, 2, 4, 8),
    "ep": (1, 2, 4, 8, 16),
    "etp": (1, 2),
    "cp_method": ("ring", "ulysses", "all_gather", "hierarchical"),
    "sharding": ("none", "zero1", "zero2", "zero3", "hsdp"),
    "recompute": ("none", "selective", "full"),
    "schedule": (
        "none",
        "gpipe",
        "1f1b",
        "interleaved_1f1b",
        "zb_h1",
        "zb_h2",
        "zb_v",
        "v_half",
        "v_min",
        "dualpipe_v",
    ),
    "optimizer_offload": ("none", "cpu", "nvme"),
    "parameter_offload": ("none", "cpu", "nvme"),
    "activation_offload": (False, True),
    "sequence_parallel": (False, True),
    "vocab_parallel": ("none", "redistributed"),
}


def test_the_corpus_is_drawn_the_same_again():
    first = corpus()
    conformance_corpus.corpus.cache_clear()
    assert corpus() == first


def test_the_corpus_has_two_hundred_plans_and_forty_for_every_target():
    plans = {(item.job.model.name, item.plan, item.job.workload) for item in corpus()}
    assert len(plans) >= 200
    taken = Counter(target for item in corpus() for target in takers(item.job, item.plan))
    assert set(taken) == set(TARGETS)
    assert min(taken.values()) >= 40


@pytest.mark.parametrize("field", _REACHED)
def test_the_corpus_reaches_every_value(field):
    assert set(_REACHED[field]) <= {getattr(item.plan, field) for item in corpus()}


def test_the_corpus_reaches_models_formats_and_uneven_stages():
    models = [item.job.model for item in corpus()]
    assert any(model.moe is None and model.num_query_groups == model.num_attention_heads for model in models)
    assert any(model.num_query_groups < model.num_attention_heads for model in models)
    assert any(model.moe is not None and model.mla is None for model in models)
    assert any(model.mla is not None for model in models)
    formats = {item.job.workload.precision for item in corpus()}
    assert {"bf16", "fp16", "fp32", "fp8", "fp8_block", "mxfp8"} <= formats
    assert any(item.job.workload.lora_rank is not None for item in corpus())
    assert any(model.num_mtp_layers for model in models)
    assert any(model.sliding_window is not None for model in models)
    assert sum(len(set(item.plan.layers_per_stage)) > 1 for item in corpus()) >= 20
    orders = [
        item.plan.device_mapping.rank_order for item in corpus() if item.plan.device_mapping is not None
    ]
    assert len(orders) >= 20
    assert set(orders) == set(RANK_ORDERS)


def test_there_are_sixty_broken_plans_with_a_rule_each():
    assert len(BROKEN) >= 60
    assert len({(item.target, item.rule) for item in BROKEN}) == len(BROKEN)
    assert {item.target for item in BROKEN} == set(TARGETS)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: f"{broken.target}: {broken.rule}")
def test_every_broken_plan_is_refused(broken):
    reasons = reasons_of(broken)
    assert reasons
    # One rule is broken; a second one may follow from it.
    assert len(reasons) <= 2
    assert all(reason.isprintable() for reason in reasons)
