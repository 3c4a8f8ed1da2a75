"""Replicas that are served: the cache changes nothing, ranks agree with one, and what cannot run is refused."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.profiler.executor.layouts import ALIBI, DENSE, LATENT, LATENT_LITE, MIXTURE, ODD, SANDWICH, SINKS
from torch import distributed

from meshwright.profiler.executor.launch import EXECUTION_FILE
from meshwright.profiler.executor.mesh import build_mesh
from meshwright.profiler.executor.recording import Recorder
from meshwright.profiler.executor.serving_run import (
    NUM_DECODES,
    pool_execution,
    run_pool,
    step_times,
    unsupported_pool,
)
from meshwright.profiler.executor.serving_worker import ServedShard
from meshwright.simcore.domain.execution import Execution, execution_text
from meshwright.simcore.domain.model import ModelSpec
from meshwright.simcore.domain.serving import ServingPlan, ServingPool

PROMPT, BATCH = 6, 3
CPU = torch.device("cpu")


def served(model: ModelSpec = DENSE, prompt: int = PROMPT, **pool: Any) -> tuple[ServingPlan, Execution]:
    each = ServingPool(**pool)
    plan = ServingPlan(engine="vllm", pools=(each,), precision="fp32", kv_precision="fp32")
    return plan, pool_execution(
        model,
        plan,
        each,
        batch=BATCH,
        prompt=prompt,
        device="cpu",
        num_steps=2,
        num_warmup_steps=1,
        seed=7,
    )


@pytest.fixture
def world() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def shard_of(execution: Execution) -> ServedShard:
    mesh = build_mesh(execution.plan, (), Recorder(0, None, CPU))
    return ServedShard(execution, mesh, Recorder(0, None, CPU))


@pytest.mark.parametrize(
    "model",
    [DENSE, ODD, MIXTURE, LATENT, LATENT_LITE, SINKS, SANDWICH, ALIBI],
    ids=["llama", "odd", "experts", "mla", "lite", "sinks", "window", "alibi"],
)
def test_a_decode_step_says_what_a_whole_prompt_would(world: None, model: ModelSpec) -> None:
    shard = shard_of(served(model)[1])
    tokens = torch.randint(
        model.vocab_size, (PROMPT + NUM_DECODES, BATCH), generator=torch.Generator().manual_seed(1)
    )
    stepwise = [shard.logits(tokens[:PROMPT])]
    stepwise += [shard.logits(tokens[end : end + 1]) for end in range(PROMPT, PROMPT + NUM_DECODES)]
    for index, logits in enumerate(stepwise):
        shard.clear()
        torch.testing.assert_close(logits, shard.logits(tokens[: PROMPT + index]), rtol=1e-4, atol=1e-5)
        assert logits.shape == (BATCH, model.vocab_size)
    # Other tokens before it, other logits: the cache is read.
    shard.clear()
    other = tokens.clone()
    other[0] = (other[0] + 1) % model.vocab_size
    shard.logits(other[:PROMPT])
    assert not torch.allclose(shard.logits(tokens[PROMPT : PROMPT + 1]), stepwise[1], rtol=1e-3, atol=1e-4)


class _Parts:
    """A tensor parallel group of threads of this process, as far as serving calls it."""

    def __init__(self, index: int, size: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.index, self.size, self._slots, self._barrier = index, size, slots, barrier

    def _all(self, x: torch.Tensor) -> list[torch.Tensor]:
        self._slots[self.index] = x.clone()
        self._barrier.wait(timeout=20.0)
        found = list(self._slots)
        self._barrier.wait(timeout=20.0)
        return found

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(torch.stack(self._all(x)).sum(0))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._all(x))


@pytest.mark.parametrize("model", [DENSE, ODD, LATENT_LITE], ids=["llama", "odd", "latent"])
def test_two_shards_together_say_what_one_says(world: None, model: ModelSpec) -> None:
    whole = shard_of(served(model)[1])
    mesh = build_mesh(served(model)[1].plan, (), Recorder(0, None, CPU))
    tokens = torch.randint(model.vocab_size, (PROMPT, BATCH), generator=torch.Generator().manual_seed(1))
    execution = served(model, tp=2)[1]
    slots, barrier = [None, None], threading.Barrier(2)
    said: dict[int, list[torch.Tensor]] = {}

    def be(index: int) -> None:
        part: Any = _Parts(index, 2, slots, barrier)
        shard = ServedShard(execution, dataclasses.replace(mesh, tp=part), Recorder(0, None, CPU))
        said[index] = [shard.logits(tokens), shard.logits(tokens[:1])]

    threads = [threading.Thread(target=be, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30.0)
    alone = [whole.logits(tokens), whole.logits(tokens[:1])]
    for index in range(2):
        for found, expected in zip(said[index], alone, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_two_processes_serve_and_are_measured(tmp_path: Path) -> None:
    execution = served(tp=2)[1]
    (tmp_path / EXECUTION_FILE).write_text(execution_text(execution), encoding="utf-8")
    report = run_pool(execution, tmp_path)
    assert len(report.ranks) == 2
    for rank in report.ranks:
        assert set(rank.phase_seconds) == {"prefill", "decode"}
        assert len(rank.step_seconds) == execution.num_steps
        assert rank.losses == ()
        sent = {(each.axis, each.operation): (each.num_messages, each.num_bytes) for each in rank.traffic}
        # A sum after the embedding, and two in each layer, over what each step holds; the logits of the last tokens.
        steps, rows = 1 + NUM_DECODES, BATCH * (PROMPT + NUM_DECODES)
        sums = 1 + 2 * DENSE.num_layers
        assert sent == {
            ("tp", "all_reduce"): (steps * sums, rows * sums * DENSE.hidden_size * 4),
            ("tp", "all_gather"): (steps, steps * BATCH * DENSE.vocab_size // 2 * 4),
        }
    times = step_times(report)
    assert 0.0 < times.decode < times.prefill + NUM_DECODES * times.decode <= 2.0 * report.step_seconds


@pytest.mark.parametrize(
    ("model", "prompt", "pool", "reason"),
    [
        (MIXTURE, PROMPT, {"tp": 2}, "ep 1 x moe_tp 1 is not the 2 ranks"),
        (ODD, 62, {}, "max_position_embeddings 64 are fewer learned positions than the 66 tokens"),
        (DENSE, PROMPT, {"pp": 8}, "pp 8 has more stages than the model's num_layers 4"),
        (DENSE, PROMPT, {"attention_dp": 2}, "dense has none"),
        (DENSE, PROMPT, {"num_speculative_tokens": 2}, "num_speculative_tokens 2"),
        (DENSE, PROMPT, {"tp": 3}, "tp 3 does not divide"),
    ],
)
def test_what_cannot_be_served_is_refused(
    model: ModelSpec, prompt: int, pool: dict[str, Any], reason: str
) -> None:
    plan, execution = served(model, prompt, **pool)
    assert any(reason in each for each in unsupported_pool(plan, plan.pools[0], execution))


def test_formats_it_does_not_have_are_refused() -> None:
    plan, execution = served()
    assert unsupported_pool(plan, plan.pools[0], execution) == ()
    mixed = dataclasses.replace(plan, precision="bf16", kv_precision="fp8")
    assert any(
        "kv_precision fp8 beside precision bf16" in each
        for each in unsupported_pool(mixed, mixed.pools[0], execution)
    )
