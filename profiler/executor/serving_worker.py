"""One rank of a replica that is served: ``python -P -m meshwright.profiler.executor.serving_worker FILE FOLDER``.

A step is one prefill of whole random prompts and :data:`NUM_DECODES` decode steps after it, each the next token of
every sequence by its largest logit. Weights are random; products are split by tensor parallelism as in training, and
keys and values stay in a cache. Arguments, variables and exit codes are those of
:mod:`meshwright.profiler.executor.worker`.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, distributed

from meshwright.errors import ExecutionError
from meshwright.profiler.executor.attention import Attention
from meshwright.profiler.executor.build import BuildContext
from meshwright.profiler.executor.kv_cache import KvCache
from meshwright.profiler.executor.linear import WeightGradients
from meshwright.profiler.executor.mesh import RankMesh, build_mesh
from meshwright.profiler.executor.model import Chunk
from meshwright.profiler.executor.recording import Recorder
from meshwright.profiler.executor.serving_run import NUM_DECODES
from meshwright.profiler.executor.weights import WeightSource
from meshwright.profiler.executor.worker import main
from meshwright.simcore.domain.execution import Execution

__all__ = ["ServedShard", "serve"]


class ServedShard:
    """A rank's part of a model with its caches.

    Parameters
    ----------
    execution : Execution
        Model, tensor parallel degree, sequences (the batch), tokens of a prompt and precision.
    mesh : RankMesh
        Groups.
    device : torch.device
        Where it stands.
    """

    def __init__(self, execution: Execution, mesh: RankMesh, device: torch.device) -> None:
        model, workload = execution.model, execution.workload
        dtype = torch.bfloat16 if workload.precision == "bf16" else torch.float32
        capacity = workload.sequence_length + NUM_DECODES
        context = BuildContext(
            model=model,
            plan=execution.plan,
            mesh=mesh,
            source=WeightSource(seed=execution.seed, dtype=dtype, device=device),
            gradients=WeightGradients(),
        )
        self._tp, self._vocab_size = mesh.tp, model.vocab_size
        self._chunk = Chunk(
            context,
            first_layer=0,
            num_layers=model.num_layers,
            has_embedding=True,
            has_head=True,
            num_tokens=workload.num_tokens,
            positions=torch.arange(capacity, device=device),
        )
        self._caches = []
        for layer in self._chunk.layers:
            cache = KvCache(
                batch=workload.global_batch_size,
                groups=model.num_query_groups // mesh.tp.size,
                capacity=capacity,
                head_dim=model.head_dim,
                dtype=dtype,
                device=device,
            )
            attention = layer.attention
            assert isinstance(attention, Attention)
            attention.cache = cache
            self._caches.append(cache)
        self._length = 0

    def clear(self) -> None:
        """Forget all sequences."""
        self._length = 0
        for cache in self._caches:
            cache.clear()

    def step(self, tokens: Tensor) -> Tensor:
        """Take tokens ``(sequence, batch)`` in and return the logits of the next ones, ``(batch, vocabulary)``."""
        with torch.no_grad():
            logits = self._chunk.next_logits(tokens, self._length)
            self._length += tokens.shape[0]
            return self._tp.all_gather(logits.t())[: self._vocab_size].t()


def serve(execution: Execution, recorder: Recorder) -> RankMesh:
    """Run the steps in this process, whose process group is there already; return the groups used.

    Raises
    ------
    ExecutionError
        If there are too few or too many ranks.
    """
    plan, workload = execution.plan, execution.workload
    if distributed.get_world_size() != plan.num_gpus:
        raise ExecutionError(
            f"a replica needs {plan.num_gpus} ranks, not the {distributed.get_world_size()} that were started"
        )
    recorder.place = "setup"
    recorder.say("forming the groups")
    mesh = build_mesh(plan, (), recorder)
    recorder.say("building the model")
    torch.backends.cuda.matmul.allow_tf32 = workload.precision == "tf32"
    shard = ServedShard(execution, mesh, recorder.device)
    generator = torch.Generator().manual_seed(execution.seed)
    shape = (workload.sequence_length, workload.global_batch_size)
    for step in range(execution.num_warmup_steps + execution.num_steps):
        recorder.place = f"step {step}"
        prompts = torch.randint(execution.model.vocab_size, shape, generator=generator).to(recorder.device)
        shard.clear()
        recorder.say("prefill")
        with recorder.whole_step():
            with recorder.phase("prefill"):
                tokens = shard.step(prompts).argmax(-1)
            recorder.say("decode")
            with recorder.phase("decode"):
                for _ in range(NUM_DECODES):
                    tokens = shard.step(tokens.unsqueeze(0)).argmax(-1)
    recorder.place = ""
    recorder.say("done")
    return mesh


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], serve))
