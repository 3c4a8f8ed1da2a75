"""Ask Accelerate about configuration files: ``python ask_accelerate.py QUESTIONS ANSWERS``.

Goes the way of ``accelerate launch`` up to the environment it gives the ranks, then that of ``Accelerator()`` on a rank:
``ParallelismConfig`` and ``FullyShardedDataParallelPlugin`` read that environment, and the mesh is built on torch's
"fake" backend.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import accelerate.utils.dataclasses as plugins
import accelerate.utils.launch as launching
import torch.distributed as dist
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType
from torch.testing._internal.distributed.fake_pg import FakeStore

launching.is_port_in_use = lambda port=None: False  # nothing is launched here
if "transformers" not in sys.modules:
    # Tensor parallelism asks for transformers' version, of which nothing else is used here.
    _compare = plugins.compare_versions
    plugins.compare_versions = lambda name, *rest: name == "transformers" or _compare(name, *rest)


def read(question: dict) -> dict:
    """Read one configuration the way launcher and ranks do; return the mesh."""
    for name in [
        name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_"))
    ]:
        del os.environ[name]
    load_config_from_file(question["path"])
    arguments = launch_command_parser().parse_args(question["words"])
    arguments, _, _ = _validate_launch_command(arguments)
    os.environ.update(launching.prepare_multi_gpu_env(arguments))
    parallelism = ParallelismConfig()
    is_fsdp = bool(arguments.use_fsdp)
    if is_fsdp:
        plugin = plugins.FullyShardedDataParallelPlugin()
        if plugin.fsdp_version != 2:
            raise ValueError("fsdp_version is not 2")
    world = int(arguments.num_processes)
    if world != question["world"]:
        raise ValueError(f"num_processes {world} is not the {question['world']} ranks of the plan")
    kind = DistributedType.FSDP if is_fsdp else DistributedType.MULTI_GPU
    accelerator = SimpleNamespace(
        multi_device=world > 1,
        num_processes=world,
        is_fsdp2=is_fsdp,
        distributed_type=kind,
        is_main_process=True,
    )
    parallelism._validate_accelerator(accelerator)
    if not is_fsdp:
        return {"mesh": []}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        mesh = parallelism.build_device_mesh("cpu")
        return {"mesh": [list(mesh.mesh_dim_names), list(mesh.mesh.shape), mesh.mesh.flatten().tolist()]}
    finally:
        dist.destroy_process_group()


def answer(question: dict) -> dict:
    """Return the framework's error, None without one, and the mesh."""
    try:
        return {"error": None, **read(question)}
    except SystemExit as stop:
        return {"error": f"accelerate launch stopped with {stop.code}"}
    except (
        AssertionError,
        AttributeError,
        KeyError,
        ImportError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def main() -> None:
    """Answer every question of a file."""
    questions = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([answer(question) for question in questions]))


if __name__ == "__main__":
    main()
