"""The Bridge module sets the fields of a configuration that the plan decides, and checks the recipe's model."""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType, SimpleNamespace

import pytest
from export_cases import CASES, LLAMA_405B, make_job, make_plan

from meshwright.planner.export import EXPORTERS
from meshwright.planner.export.megatron_bridge import bridge_settings

SECTIONS = ("model", "train", "dataset", "ddp", "optimizer", "dist", "checkpoint")


def applied(monkeypatch, job, plan, **model: int) -> SimpleNamespace:
    """Return a bare configuration after the exported function has worked on it."""
    source = EXPORTERS["megatron-bridge"].export(job, plan, "torchrun").files[0].text
    overlap = ModuleType("megatron.bridge.training.comm_overlap")
    overlap.CommOverlapConfig = SimpleNamespace  # type: ignore[attr-defined]  # stands for Bridge's class
    for name in ("megatron", "megatron.bridge", "megatron.bridge.training"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, overlap.__name__, overlap)
    scope: dict[str, object] = {}
    exec(compile(source, "meshwright_plan.py", "exec"), scope)
    config = SimpleNamespace(**{name: SimpleNamespace() for name in SECTIONS}, comm_overlap=None)
    shape = {
        "num_layers": job.model.num_layers,
        "hidden_size": job.model.hidden_size,
        "num_attention_heads": job.model.num_attention_heads,
        "num_moe_experts": job.model.moe.num_experts if job.model.moe else None,
    }
    config.model = SimpleNamespace(**(shape | model))
    scope["apply_plan"](config)  # type: ignore[operator]
    return config


def test_the_plan_is_in_the_configuration(monkeypatch):
    job, plan = CASES["megatron_bridge_experts"][2:]
    config = applied(monkeypatch, job, plan)
    assert (config.model.tensor_model_parallel_size, config.model.pipeline_model_parallel_size) == (2, 4)
    assert config.model.pipeline_model_parallel_layout == "Et*7|t*9|t*9|t*7L"
    assert (config.model.expert_model_parallel_size, config.model.expert_tensor_parallel_size) == (8, 1)
    assert config.model.moe_expert_capacity_factor == 1.25
    assert config.model.recompute_modules == ["moe_act"]
    assert (config.train.micro_batch_size, config.train.global_batch_size) == (1, 128)
    assert config.dataset.seq_length == config.model.seq_length == 8192
    assert config.mixed_precision == "bf16_mixed"
    assert config.comm_overlap.tp_comm_overlap is True
    assert config.ddp.use_distributed_optimizer is True


def test_the_recipe_of_another_model_is_refused(monkeypatch):
    job, plan = CASES["megatron_bridge_experts"][2:]
    with pytest.raises(ValueError, match="num_layers 32, not 33"):
        applied(monkeypatch, job, plan, num_layers=33)


def test_interleaving_with_equal_stages_is_a_number():
    settings = bridge_settings(make_job(), make_plan(dp=4, pp=4, vpp=2))
    assert settings["model.virtual_pipeline_model_parallel_size"] == 2
    assert settings["model.pipeline_model_parallel_layout"] is None


def test_what_megatron_refuses_bridge_refuses_and_the_same_plans_pass():
    bridge, megatron = EXPORTERS["megatron-bridge"], EXPORTERS["megatron"]
    assert bridge.search_limits == megatron.search_limits
    for target, _, job, plan in CASES.values():
        if target == "megatron":
            assert bridge.unsupported(job, plan) == ()
    broken = dataclasses.replace(make_plan(126, dp=2, tp=8, pp=1), sharding="zero1")
    assert bridge.unsupported(make_job(), broken) == megatron.unsupported(make_job(), broken) != ()
    assert bridge.unsupported(make_job(LLAMA_405B), make_plan(126, dp=2, tp=8)) == ()
