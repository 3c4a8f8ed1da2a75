"""Ask DeepSpeed about configuration files: ``python ask_deepspeed.py QUESTIONS ANSWERS``.

Without a process group DeepSpeedConfig counts one rank and refuses every larger plan, or accepts a wrong batch; here
its communication module answers with the size of the plan's world, and of the group it asks about.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["DS_IGNORE_CUDA_DETECTION"] = "1"
logging.disable(logging.WARNING)

import deepspeed.runtime.config as config_module  # noqa: E402
from deepspeed.module_inject.auto_ep_config import validate_autoep_config  # noqa: E402


class Mesh:
    """A device mesh whose groups are their own sizes."""

    def __init__(self, data_parallel: int) -> None:
        self.data_parallel = data_parallel

    def get_group(self, mesh_dim: str) -> int:
        """Return the group of data parallel ranks, the only one asked for."""
        assert mesh_dim == "data_parallel"
        return self.data_parallel


class ModelParallelUnit:
    """What a training script with tensor parallelism hands over."""

    def __init__(self, data_parallel: int) -> None:
        self.data_parallel = data_parallel

    def get_data_parallel_world_size(self) -> int:
        """Return the data parallel ranks."""
        return self.data_parallel


def read(question: dict) -> None:
    """Read one configuration in the world of its plan."""
    document, world, tp, cp = (question[name] for name in ("config", "world", "tp", "cp"))
    config_module.dist.get_rank = lambda group=None: 0
    config_module.dist.get_world_size = lambda group=None: world if group is None else group
    unit = ModelParallelUnit(question["dp"]) if tp > 1 else None
    mesh = Mesh(question["dp"]) if "data_parallel_size" in document else None
    config = config_module.DeepSpeedConfig(document, unit, mesh_device=mesh)
    if config.train_batch_size != question["batch"]:
        raise ValueError(
            f"DeepSpeed trains on {config.train_batch_size} sequences, the plan on {question['batch']}"
        )
    if "expert_parallel" in document:
        zero = document["zero_optimization"]
        validate_autoep_config(
            config.expert_parallel_config,
            world,
            1,
            tp,
            cp,
            zero_stage=config.zero_optimization_stage,
            zero_offload_optimizer="offload_optimizer" in zero,
            zero_offload_param="offload_param" in zero,
        )


def answer(question: dict) -> dict:
    """Return the framework's error, None without one."""
    try:
        read(question)
    # Pydantic's errors are ValueErrors; the parser also asserts and looks keys up.
    except (
        AssertionError,
        AttributeError,
        KeyError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    return {"error": None}


def main() -> None:
    """Answer every question of a file."""
    questions = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([answer(question) for question in questions]))


if __name__ == "__main__":
    main()
