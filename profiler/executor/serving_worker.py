"""One rank of a replica that is served: ``python -P -m meshwright.profiler.executor.serving_worker FILE FOLDER``.

A step is one prefill of whole random prompts and :data:`NUM_DECODES` decode steps after it, each the next token of
every sequence by its largest logit, which the last stage of a pipeline tells the first. Weights are random; products are
split by tensor parallelism as in training, experts are shared out over the ranks of a stage, and keys and values stay in
a cache. Arguments, variables and exit codes are those of
:mod:`meshwright.profiler.executor.worker`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, distributed

from meshwright.errors import ExecutionError
from meshwright.profiler.executor.build import BuildContext
from meshwright.profiler.executor.linear import WeightGradients
from meshwright.profiler.executor.local_tensors import num_copies
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
        Model, degrees, sequences of a rank (the micro-batch), tokens of a prompt and precision.
    mesh : RankMesh
        Groups.
    recorder : Recorder
        Counts what stages send.
    """

    def __init__(self, execution: Execution, mesh: RankMesh, recorder: Recorder) -> None:
        model, plan, workload = execution.model, execution.plan, execution.workload
        device, stage = recorder.device, mesh.at.pp
        self._dtype = torch.bfloat16 if workload.precision == "bf16" else torch.float32
        capacity = workload.sequence_length + NUM_DECODES
        context = BuildContext(
            model=model,
            plan=plan,
            mesh=mesh,
            source=WeightSource(seed=execution.seed, dtype=self._dtype, device=device),
            gradients=WeightGradients(),
            is_served=True,
        )
        self._mesh, self._recorder = mesh, recorder
        self._vocab_size, self._hidden_size = model.vocab_size, model.hidden_size
        self._is_first, self._is_last = stage == 0, stage == plan.pp - 1
        self._chunk = Chunk(
            context,
            first_layer=sum(plan.layers_per_stage[:stage]),
            num_layers=plan.layers_per_stage[stage],
            has_embedding=self._is_first,
            has_head=self._is_last,
            num_tokens=workload.num_tokens,
            positions=torch.arange(capacity, device=device),
        )
        layers: list[Any] = list(self._chunk.layers)
        self._caches = [layer.attention.new_cache(plan.micro_batch_size, capacity) for layer in layers]
        self._length = 0

    def clear(self) -> None:
        """Forget all sequences."""
        self._length = 0
        for cache in self._caches:
            cache.clear()

    def step(self, tokens: Tensor) -> Tensor:
        """Take tokens in and return the next one of each sequence, ``(1, batch)``, where a rank learns of it.

        Parameters
        ----------
        tokens : Tensor
            Token numbers ``(sequence, batch)``; stages after the first read the shape alone. The last stage tells the
            first what it has found; stages between learn nothing.
        """
        x, found = self._computed(tokens), torch.zeros_like(tokens[:1])
        if self._is_last:
            found = self._whole(x).argmax(-1).unsqueeze(0)
        if not (self._is_first and self._is_last):
            sent = self._sent(found if self._is_last else x)
            if self._is_first:
                found = self._received(found)
            sent.wait()
        return found

    def logits(self, tokens: Tensor) -> Tensor:
        """Take tokens in and return the logits of the next ones, ``(batch, vocabulary)``; of a model on one stage."""
        return self._whole(self._computed(tokens))

    def _computed(self, tokens: Tensor) -> Tensor:
        """Return what this stage makes of new tokens, those of the stage before where there is one."""
        x = tokens
        if not self._is_first:
            device = self._recorder.device
            x = self._received(
                torch.empty((*tokens.shape, self._hidden_size), dtype=self._dtype, device=device)
            )
        with torch.no_grad():
            x = self._chunk.served(x, self._length)
        self._length += tokens.shape[0]
        return x

    def _whole(self, logits: Tensor) -> Tensor:
        """Return the logits of all tensor parallel ranks, ``(batch, vocabulary)``."""
        return self._mesh.tp.all_gather(logits.t())[: self._vocab_size].t()

    def _received(self, buffer: Tensor) -> Tensor:
        """Fill a tensor with what the stage before sends; before the first stands the last."""
        source = self._mesh.stages[self._mesh.at.pp - 1]
        with self._recorder.waiting("pp", "send", f"rank {source}"):
            distributed.recv(buffer, src=source)
        return buffer

    def _sent(self, tensor: Tensor) -> Any:
        stages = self._mesh.stages
        to, tensor = stages[(self._mesh.at.pp + 1) % len(stages)], tensor.contiguous()
        with self._recorder.sending("pp", "send", tensor.numel() * tensor.element_size(), f"rank {to}"):
            return distributed.isend(tensor, dst=to)


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
    mesh = build_mesh(plan, (), recorder, num_copies(execution.model, plan))
    recorder.say("building the model")
    torch.backends.cuda.matmul.allow_tf32 = workload.precision == "tf32"
    shard = ServedShard(execution, mesh, recorder)
    generator = torch.Generator().manual_seed(execution.seed)
    shape = (workload.sequence_length, workload.global_batch_size)
    own = slice(mesh.at.dp * plan.micro_batch_size, (mesh.at.dp + 1) * plan.micro_batch_size)
    for step in range(execution.num_warmup_steps + execution.num_steps):
        recorder.place = f"step {step}"
        prompts = torch.randint(execution.model.vocab_size, shape, generator=generator)
        prompts = prompts[:, own].contiguous().to(recorder.device)
        shard.clear()
        recorder.say("prefill")
        with recorder.whole_step():
            with recorder.phase("prefill"):
                tokens = shard.step(prompts)
            recorder.say("decode")
            with recorder.phase("decode"):
                for _ in range(NUM_DECODES):
                    tokens = shard.step(tokens)
    recorder.place = ""
    recorder.say("done")
    return mesh


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], serve))
