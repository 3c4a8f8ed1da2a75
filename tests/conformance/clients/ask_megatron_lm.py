"""Ask Megatron-LM's own command line: ``PYTHONPATH=<checkout> python ask_megatron_lm.py QUESTIONS ANSWERS``.

Runs ``parse_args``, ``validate_args`` and ``core_transformer_config_from_args`` of the checkout. Without a GPU a few
answers of the machine are given here: the GPU's generation, and a Transformer Engine new enough for the options.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

os.environ.setdefault("RANK", "0")
GENERATION = [9]
torch.cuda.get_device_capability = lambda *_, **__: (GENERATION[0], 0)
torch.cuda.get_device_properties = lambda *_, **__: SimpleNamespace(
    major=GENERATION[0], minor=0, multi_processor_count=132, total_memory=80 << 30, name="GPU"
)

import megatron.core.utils as core_utils  # noqa: E402
from packaging.version import Version  # noqa: E402

core_utils.get_te_version = lambda: Version("2.9.0")
core_utils.is_te_min_version = lambda version, check_equality=True: Version("2.9.0") >= Version(version)

import megatron.core.models.common.embeddings.rope_utils as rope_utils  # noqa: E402
import megatron.core.transformer.transformer_config as config_module  # noqa: E402
import megatron.training.arguments as arguments_module  # noqa: E402

for module in (arguments_module, config_module):
    for name in ("is_te_min_version", "get_te_version"):
        if hasattr(module, name):
            setattr(module, name, getattr(core_utils, name))
rope_utils.fused_apply_rotary_pos_emb = rope_utils.fused_apply_rotary_pos_emb_thd = lambda *_: None
arguments_module._print_args = lambda *_, **__: None
logging.disable(logging.INFO)

QUEUES = ("CUDA_DEVICE_MAX_CONNECTIONS", "NVTE_CPU_OFFLOAD_V1")


def answer(question: dict) -> dict:
    """Return the framework's error, None without one."""
    GENERATION[0] = question.get("generation", 9)
    os.environ["WORLD_SIZE"] = str(question["world"])
    for variable in QUEUES:
        os.environ.pop(variable, None)
    os.environ.update({name: value for name, value in question["environment"].items() if name in QUEUES})
    sys.argv = ["pretrain_gpt.py", *question["arguments"]]
    written = io.StringIO()
    try:
        with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
            parsed = arguments_module.parse_args()
            arguments_module.validate_args(parsed)
            arguments_module.core_transformer_config_from_args(parsed)
    except SystemExit:
        return {"error": f"parser: {written.getvalue()[-400:]}"}
    except Exception as error:  # whatever it raises is its verdict
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    return {"error": None}


def main() -> None:
    """Answer every question of a file."""
    questions = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([answer(question) for question in questions]))


if __name__ == "__main__":
    main()
