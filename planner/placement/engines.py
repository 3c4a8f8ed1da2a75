"""Engines: how each dispatches tokens, which file it reads a placement from, and how it is started with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from meshwright.errors import SpecError
from meshwright.planner.export.base import ExportBundle, ExportFile
from meshwright.planner.placement.formats.ascend import read_ascend, write_ascend
from meshwright.planner.placement.formats.exflow import read_exflow, write_exflow
from meshwright.planner.placement.formats.sglang import read_sglang, write_sglang
from meshwright.planner.placement.formats.tables import LayerTable
from meshwright.planner.placement.formats.trtllm import read_trtllm, write_trtllm
from meshwright.planner.placement.formats.vllm import write_vllm
from meshwright.planner.placement.request import Dispatch
from meshwright.simcore.domain.expert_placement import ExpertPlacement

__all__ = ["ENGINES", "Engine", "placement_bundle", "read_placement"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What one engine needs.

    Parameters
    ----------
    name, version : str
        Id, and the release whose format and options these are.
    dispatch : Dispatch
        How its usual all-to-all sends tokens.
    file_name : str
        Of the file it reads.
    write : Callable
        Text of that file.
    read : Callable | None
        Placement of such a text; None where the file holds none.
    command : str
        Options that make it use the file, with ``{slots}`` and ``{redundant}``.
    note : str
        What the user must know.
    has_copies_apart : bool
        A rank of it holds an expert once at most.
    """

    name: str
    version: str
    dispatch: Dispatch
    file_name: str
    write: Callable[[ExpertPlacement, LayerTable], str]
    read: Callable[[str, LayerTable, str], ExpertPlacement] | None
    command: str
    note: str
    has_copies_apart: bool = False


ENGINES: dict[str, Engine] = {
    "sglang": Engine(
        name="sglang",
        version="0.5",
        dispatch="deduplicated",
        file_name="expert_location.json",
        write=write_sglang,
        read=read_sglang,
        # Static dispatch is refused without an all-to-all backend (0.5.23, arg_groups/parallel_hook.py).
        command="--moe-a2a-backend deepep --init-expert-location expert_location.json "
        "--ep-num-redundant-experts {redundant} --ep-dispatch-algorithm static",
        note="static dispatch takes the copy on the same GPU, in recent releases then the one on the same node; "
        "older ones choose among the rest at random",
    ),
    "trtllm": Engine(
        name="trtllm",
        version="1.0",
        dispatch="full",
        file_name="moe_load_balancer.yaml",
        write=write_trtllm,
        read=read_trtllm,
        command="moe_config: {{backend: WIDEEP, load_balancer: moe_load_balancer.yaml}}",
        note="layer_updates_per_iter 0 keeps the placement fixed",
    ),
    "vllm": Engine(
        name="vllm",
        version="0.24",
        dispatch="full",
        file_name="eplb_config.json",
        write=lambda placement, _: write_vllm(placement),
        read=None,
        command='--enable-expert-parallel --enable-eplb --eplb-config "$(cat eplb_config.json)"',
        note="vLLM reads no placement: it takes the number of copies and finds its own; without copies a permuted "
        "checkpoint fixes ours",
    ),
    "vllm-ascend": Engine(
        name="vllm-ascend",
        version="0.11",
        dispatch="full",
        file_name="expert_map.json",
        write=write_ascend,
        read=read_ascend,
        command='--additional-config \'{{"eplb_config": {{"expert_map_path": "expert_map.json"}}}}\'',
        note="layers are numbered from the first mixture-of-experts layer",
        # A device's map has one place for each expert (vllm_ascend/eplb/core/eplb_utils.py).
        has_copies_apart=True,
    ),
    "exflow": Engine(
        name="exflow",
        version="2024",
        dispatch="coherent",
        file_name="placement.csv",
        write=write_exflow,
        read=read_exflow,
        command="placement.csv",
        note="context-coherent dispatch keeps the context of all requests on every rank",
    ),
}


def placement_bundle(
    engine: Engine, placement: ExpertPlacement, table: LayerTable, report: str
) -> ExportBundle:
    """Return the engine's file and the report beside it.

    Raises
    ------
    ExportError
        If the engine's format cannot hold the placement.
    """
    redundant = placement.num_slots - placement.num_experts
    return ExportBundle(
        target=f"placement for {engine.name}",
        target_version=engine.version,
        files=(
            ExportFile(engine.file_name, engine.write(placement, table)),
            ExportFile("report.json", report),
        ),
        launch_command=engine.command.format(redundant=redundant, slots=placement.num_slots),
        notes=(engine.note,),
    )


def read_placement(text: str, table: LayerTable, name: str) -> ExpertPlacement:
    """Return the placement of a file of any engine, told apart by what it holds.

    Raises
    ------
    SpecError
        If no engine's format fits, or the placement is of another model.
    """
    start = text.lstrip()
    if start.startswith("Expert"):
        return read_exflow(text, table, name)
    if start.startswith("{"):
        return (read_ascend if '"layer_list"' in start[:10_000] else read_sglang)(text, table, name)
    if "initial_global_assignments" in text:
        return read_trtllm(text, table, name)
    raise SpecError(f"{name}: is no placement of SGLang, TensorRT-LLM, vLLM-Ascend or ExFlow")
