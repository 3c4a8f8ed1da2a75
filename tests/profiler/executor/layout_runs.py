"""Many layouts on a few processes: torch is imported once, before they fork.

Run as a program: ``python -P layout_runs.py LAYOUTS FOLDER``. ``LAYOUTS`` is a JSON file of lists ``[name, number of
ranks, text of an execution]``. Eight processes form one world of eight, then two of four, four of two and eight of one;
layouts are dealt out to the worlds of their size. Rank ``r`` of a layout writes ``FOLDER/NAME.r``; where one fails, the
whole ends with its traceback in ``FOLDER/process{p}.log``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed.device_mesh
import torch.distributed.fsdp
import torch.distributed.tensor
import torch.utils.checkpoint
from torch import distributed

from meshwright.profiler.executor.execution_file import read_execution
from meshwright.profiler.executor.local_tensors import num_copies
from meshwright.profiler.executor.mesh import build_mesh
from meshwright.profiler.executor.recording import Recorder
from meshwright.profiler.executor.serving_run import NUM_DECODES
from meshwright.profiler.executor.serving_worker import ServedShard
from meshwright.profiler.executor.worker import execute

NUM_PROCESSES = 8
TIMEOUT = timedelta(seconds=60)


def run_layout(name: str, text: str, rank: int, folder: Path) -> None:
    """Run one layout as one of its ranks and write what it did."""
    file = folder / f"{name}.{rank}.json"
    file.write_text(text, encoding="utf-8")
    recorder = Recorder(rank, folder, torch.device("cpu"))
    begin = time.process_time()
    mesh = execute(read_execution(file), recorder)
    groups = {
        "tp": mesh.tp.ranks,
        "cp": mesh.cp.ranks,
        "ep": mesh.ep.ranks,
        "etp": mesh.etp.ranks,
        "dp_cp": mesh.dp.ranks,
        "edp": mesh.expert_dp.ranks,
        "pp": mesh.stages,
    }
    mesh.destroy()
    recorder.close()
    result = {
        "losses": [step.loss for step in recorder.steps],
        "gradient_norms": [step.gradient_norm for step in recorder.steps],
        "groups": groups,
        "operations": recorder.steps[-1].operations,
        "traffic": [
            {
                f"{axis} {operation}": [each.messages, each.num_bytes]
                for (axis, operation), each in sorted(step.traffic.items())
            }
            for step in recorder.steps
        ],
        "cpu_seconds": time.process_time() - begin,
    }
    (folder / f"{name}.{rank}").write_text(json.dumps(result), encoding="utf-8")


def serve_layout(name: str, text: str, rank: int, folder: Path) -> None:
    """Serve prompts as one rank of a replica and write the tokens it learnt of and what it sent."""
    file = folder / f"{name}.{rank}.json"
    file.write_text(text, encoding="utf-8")
    execution, recorder = read_execution(file), Recorder(rank, folder, torch.device("cpu"))
    plan = execution.plan
    mesh = build_mesh(plan, (), recorder, num_copies(execution.model, plan))
    shard = ServedShard(execution, mesh, recorder)
    shape = (execution.workload.sequence_length, execution.workload.global_batch_size)
    prompts = torch.randint(execution.model.vocab_size, shape, generator=torch.Generator().manual_seed(1))
    # A replica of one rank serves all the sequences, its ranks their own.
    own = slice(mesh.at.dp * plan.micro_batch_size, (mesh.at.dp + 1) * plan.micro_batch_size)
    tokens, learnt = prompts[:, own].contiguous(), []
    for _ in range(1 + NUM_DECODES):
        tokens = shard.step(tokens)
        learnt.append(tokens[0].tolist())
    traffic = {
        f"{key[0]} {key[1]}": [each.messages, each.num_bytes] for key, each in recorder.step.traffic.items()
    }
    mesh.destroy()
    recorder.close()
    (folder / f"{name}.{rank}").write_text(
        json.dumps({"tokens": learnt, "traffic": traffic}), encoding="utf-8"
    )


def run_process(process: int, layouts: list[Any], folder: Path) -> None:
    """Be one process in worlds of every size."""
    torch.set_num_threads(1)
    for size in (8, 4, 2, 1):
        world, rank = divmod(process, size)
        mine = [each for each in layouts if each[1] == size][world :: NUM_PROCESSES // size]
        if mine:
            meeting = f"file://{folder}/meeting-{size}-{world}"
            distributed.init_process_group(
                "gloo", init_method=meeting, rank=rank, world_size=size, timeout=TIMEOUT
            )
            for name, _, text in mine:
                (folder / f"process{process}.now").write_text(name, encoding="utf-8")
                (serve_layout if name.startswith("served") else run_layout)(name, text, rank, folder)
            distributed.destroy_process_group()


def main(layouts_file: str, folder: Path) -> int:
    """Fork the processes, wait for them, and end all when one fails."""
    warnings.simplefilter("error")
    layouts = json.loads(Path(layouts_file).read_text(encoding="utf-8"))
    # The first optimizer of a process makes torch import half of itself.
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    children = {}
    for process in range(NUM_PROCESSES):
        child = os.fork()
        if child:
            children[child] = process
            continue
        code = 1
        try:
            run_process(process, layouts, folder)
            code = 0
        except BaseException:
            (folder / f"process{process}.log").write_text(traceback.format_exc(), encoding="utf-8")
        finally:
            os._exit(code)

    def end(number: int = 0, frame: FrameType | None = None) -> None:
        for each in children:
            os.kill(each, signal.SIGKILL)
        if number:
            os._exit(1)

    signal.signal(signal.SIGTERM, end)
    while children:
        child, status = os.wait()
        process = children.pop(child)
        if status:
            end()
            print(f"process {process}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
