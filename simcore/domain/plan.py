"""What a parallel plan is. The docstring of :class:`ParallelPlan` is the glossary of the degrees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from meshwright.errors import SpecError, did_you_mean
from meshwright.simcore.domain.device_mapping import DeviceMapping
from meshwright.simcore.domain.layer_groups import LayerGroup, check_layer_groups

__all__ = [
    "CP_METHODS",
    "OFFLOADS",
    "RECOMPUTES",
    "RECOMPUTE_MODULES",
    "SCHEDULES_KNOWN",
    "SHARDINGS",
    "VOCAB_PARALLELS",
    "CpMethod",
    "Offload",
    "ParallelPlan",
    "Recompute",
    "ScheduleName",
    "Sharding",
    "VocabParallel",
    "can_partition",
    "partition_layers",
    "partition_with_ends",
]

Sharding = Literal["none", "zero1", "zero2", "zero3", "hsdp"]
Recompute = Literal["none", "selective", "full"]
ScheduleName = Literal[
    "none",
    "gpipe",
    "1f1b",
    "interleaved_1f1b",
    "zb_h1",
    "zb_h2",
    "zb_v",
    "v_half",
    "v_min",
    "dualpipe",
    "dualpipe_v",
]
VocabParallel = Literal["none", "redistributed", "vocab_1", "vocab_2", "interlaced"]
CpMethod = Literal["ring", "ulysses", "all_gather", "hierarchical"]
Offload = Literal["none", "cpu", "nvme"]
CP_METHODS: tuple[str, ...] = get_args(CpMethod)
OFFLOADS: tuple[str, ...] = get_args(Offload)
# Parts of a layer that selective recompute may name (Megatron-Core's --recompute-modules).
RECOMPUTE_MODULES = ("core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts")
SHARDINGS: tuple[str, ...] = get_args(Sharding)
RECOMPUTES: tuple[str, ...] = get_args(Recompute)
SCHEDULES_KNOWN: tuple[str, ...] = get_args(ScheduleName)
VOCAB_PARALLELS: tuple[str, ...] = get_args(VocabParallel)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelPlan:
    """How one training step is laid out over the ranks.

    Global rank order is Megatron's: tp fastest, then cp, dp, pp slowest; experts fold over tp x cp x dp.

    Parameters
    ----------
    dp : int
        Data parallel replicas; each takes ``global_batch_size / dp`` sequences.
    tp : int
        Tensor parallel ranks that split every layer's matrices (Megatron).
    pp : int
        Pipeline stages. ``world size = tp * cp * dp * pp``.
    vpp : int
        Model chunks per stage (interleaving); virtual stage ``i`` sits on stage ``i % pp``.
    cp : int
        Context parallel ranks that split every sequence.
    cp_method : CpMethod
        How they exchange: ``ring`` passes key/value blocks round, ``ulysses`` swaps sequence for heads by
        all-to-all, ``all_gather`` gathers keys and values, ``hierarchical`` is ulysses inside a node and a ring
        across nodes.
    ep, etp : int
        Expert parallel ranks that share out a layer's experts, and ranks that split each expert's matrices.
    expert_overlap : int
        Chunks into which a layer's tokens are cut so that the all-to-all of one runs beside the experts of
        another (Tutel's degree); 1 is no overlap.
    sequence_parallel : bool
        Megatron SP: activations outside the matrices are split over tp too. Needs tp > 1.
    micro_batch_size : int
        Sequences per micro-batch and replica.
    micro_batch_shares : tuple[int, ...]
        Micro-batches of each data parallel replica, in the order of their ranks, so that replicas on fast and on slow
        GPUs finish together; together with ``micro_batch_size`` they make up the global batch. Empty when all replicas
        take equally many. Needs sharding none or zero1: the others synchronise on every micro-batch.
    schedule : ScheduleName
        Pipeline schedule; ``none`` when pp is 1.
    recompute : Recompute
        ``none``; ``selective`` (attention core, or ``recompute_modules``); ``full`` (whole layers).
    recompute_modules : tuple[str, ...]
        What selective recomputes (:data:`RECOMPUTE_MODULES`); empty is the software's own choice.
    recompute_layers : int | None
        Layers of each virtual stage that full recomputes; None is all of them.
    sharding : Sharding
        What dp ranks share: zero1 optimizer states, zero2 also gradients, zero3 also weights; hsdp is
        zero3 inside groups of ``sharding_group`` ranks, replicated across them.
    sharding_group : int | None
        Ranks of one sharding group; None is all of dp.
    secondary_group : int | None
        ZeRO++ hpZ: ranks that keep a second copy of the weights among them, so that backward gathers inside
        the group; None is off.
    optimizer_offload, parameter_offload : Offload
        Where optimizer states (with their step) and weights rest: ``none`` (device), ``cpu``, ``nvme``.
    optimizer_offload_fraction : float
        Share of the optimizer states that rest there, 0 to 1; the device updates the rest meanwhile
        (Deep Optimizer States).
    activation_offload : bool
        Stored activations travel to host memory and back.
    vocab_parallel : VocabParallel
        How embedding and LM head are spread over pipeline stages.
    layers_per_stage : tuple[int, ...]
        Transformer layers of each virtual stage, in model order; length ``pp * vpp``.
    layer_groups : tuple[LayerGroup, ...]
        Groups of consecutive layers, in model order, each with its own tp, sequence parallelism, sharding and
        recompute; the fields above are then those of embedding and head, and of what stages send each other.
        Empty when all layers run alike. A group ends with every stage.
    device_mapping : DeviceMapping | None
        Which host and which GPU runs each rank; None is their natural order. Costs take account of hosts where the
        cluster has a topology.
    """

    dp: int
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    cp_method: CpMethod = "ring"
    ep: int = 1
    etp: int = 1
    expert_overlap: int = 1
    sequence_parallel: bool = False
    micro_batch_size: int
    schedule: ScheduleName
    recompute: Recompute = "none"
    recompute_modules: tuple[str, ...] = ()
    recompute_layers: int | None = None
    sharding: Sharding = "none"
    sharding_group: int | None = None
    secondary_group: int | None = None
    optimizer_offload: Offload = "none"
    optimizer_offload_fraction: float = 1.0
    parameter_offload: Offload = "none"
    activation_offload: bool = False
    vocab_parallel: VocabParallel = "none"
    layers_per_stage: tuple[int, ...]
    layer_groups: tuple[LayerGroup, ...] = ()
    device_mapping: DeviceMapping | None = None
    micro_batch_shares: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for axis in ("dp", "tp", "pp", "vpp", "cp", "ep", "etp", "expert_overlap", "micro_batch_size"):
            if getattr(self, axis) < 1:
                raise SpecError(f"plan.{axis} must be at least 1, not {getattr(self, axis)}")
        for name, known in (
            ("sharding", SHARDINGS),
            ("recompute", RECOMPUTES),
            ("schedule", SCHEDULES_KNOWN),
            ("vocab_parallel", VOCAB_PARALLELS),
            ("cp_method", CP_METHODS),
            ("optimizer_offload", OFFLOADS),
            ("parameter_offload", OFFLOADS),
        ):
            value = getattr(self, name)
            if value not in known:
                raise SpecError(
                    f"plan.{name}: unknown value '{value}'{did_you_mean(value, known) or '.'} "
                    f"Known: {', '.join(known)}."
                )
        if len(self.layers_per_stage) != self.pp * self.vpp:
            raise SpecError(
                f"plan.layers_per_stage names {len(self.layers_per_stage)} virtual stages, but pp x vpp "
                f"is {self.pp} x {self.vpp} = {self.pp * self.vpp}"
            )
        if min(self.layers_per_stage) < 0:
            raise SpecError("plan.layers_per_stage: a stage cannot hold a negative number of layers")
        if self.sequence_parallel and self.tp == 1:
            raise SpecError("plan.sequence_parallel needs tp > 1 (it splits over the tensor parallel ranks)")
        if self.vpp > 1 and self.pp == 1:
            raise SpecError("plan.vpp > 1 needs pp > 1 (interleaving splits a pipeline stage)")
        if (self.pp == 1) != (self.schedule == "none"):
            raise SpecError(
                f"plan.schedule '{self.schedule}' does not go with pp {self.pp}: "
                "write 'none' for pp 1 and a pipeline schedule otherwise"
            )
        if (self.vpp > 1) != (self.schedule == "interleaved_1f1b") and self.schedule in (
            "gpipe",
            "1f1b",
            "interleaved_1f1b",
        ):
            raise SpecError(
                f"plan.schedule '{self.schedule}' does not go with vpp {self.vpp}: "
                "interleaved_1f1b needs vpp > 1, gpipe and 1f1b have vpp 1"
            )
        if self.sharding_group is not None and (self.sharding_group < 1 or self.dp % self.sharding_group):
            raise SpecError(f"plan.sharding_group {self.sharding_group} must divide dp {self.dp}")
        self._check_levers()
        self._check_shares()
        check_layer_groups(self)

    def _check_levers(self) -> None:
        """Check the memory levers: recompute, offload and the secondary sharding group."""
        for module in self.recompute_modules:
            if module not in RECOMPUTE_MODULES:
                raise SpecError(
                    f"plan.recompute_modules: unknown module '{module}'{did_you_mean(module, RECOMPUTE_MODULES) or '.'} "
                    f"Known: {', '.join(RECOMPUTE_MODULES)}."
                )
        if self.recompute_modules and self.recompute != "selective":
            raise SpecError(f"plan.recompute_modules goes with recompute 'selective', not '{self.recompute}'")
        if self.recompute_layers is not None and (self.recompute != "full" or self.recompute_layers < 1):
            raise SpecError(
                "plan.recompute_layers is a number of layers of each virtual stage, at least 1, and goes with "
                f"recompute 'full' (recompute is '{self.recompute}', recompute_layers {self.recompute_layers})"
            )
        if self.secondary_group is not None and (
            self.sharding != "zero3" or self.secondary_group < 1 or self.dp % self.secondary_group
        ):
            raise SpecError(
                f"plan.secondary_group {self.secondary_group} goes with sharding zero3 and must divide dp {self.dp}"
            )
        if not 0.0 <= self.optimizer_offload_fraction <= 1.0:
            raise SpecError(
                f"plan.optimizer_offload_fraction must lie in 0..1, not {self.optimizer_offload_fraction}"
            )
        if self.parameter_offload != "none" and self.sharding not in ("zero3", "hsdp"):
            raise SpecError(
                f"plan.parameter_offload '{self.parameter_offload}' needs sharding zero3 or hsdp, which gather "
                f"weights layer by layer (sharding is '{self.sharding}')"
            )

    def _check_shares(self) -> None:
        """Check the micro-batches of unequal replicas."""
        shares = self.micro_batch_shares
        if not shares:
            return
        if len(shares) != self.dp or min(shares) < 1:
            raise SpecError(
                f"plan.micro_batch_shares names the micro-batches of {len(shares)} replicas, at least {min(shares)}; "
                f"give dp {self.dp} replicas 1 or more each, or leave it out"
            )
        if self.sharding not in ("none", "zero1"):
            raise SpecError(
                f"plan.micro_batch_shares does not go with sharding '{self.sharding}', whose replicas exchange on every "
                "micro-batch and must run equally many; use none or zero1"
            )

    @property
    def num_gpus(self) -> int:
        """World size: ``tp * cp * dp * pp``."""
        return self.tp * self.cp * self.dp * self.pp

    @property
    def expert_dp(self) -> int:
        """Ranks of one pipeline stage that hold the same experts: ``tp * cp * dp / (ep * etp)``."""
        return self.tp * self.cp * self.dp // (self.ep * self.etp)

    @property
    def num_layers(self) -> int:
        """Transformer layers of the model."""
        return sum(self.layers_per_stage)

    def num_micro_batches(self, global_batch_size: int) -> int:
        """Return the micro-batches each pipeline runs per iteration; of unequal replicas the most.

        Raises
        ------
        SpecError
            If the batch does not divide into ``dp * micro_batch_size`` sequences, or is not what the shares add up to.
        """
        if self.micro_batch_shares:
            total = sum(self.micro_batch_shares) * self.micro_batch_size
            if total != global_batch_size:
                raise SpecError(
                    f"plan.micro_batch_shares x micro_batch_size add up to {sum(self.micro_batch_shares)} x "
                    f"{self.micro_batch_size} = {total} sequences, but global_batch_size is {global_batch_size}"
                )
            return max(self.micro_batch_shares)
        per_step = self.dp * self.micro_batch_size
        if global_batch_size % per_step:
            lower = global_batch_size // per_step * per_step
            near = f"{lower} or {lower + per_step}" if lower else str(per_step)
            raise SpecError(
                f"global_batch_size {global_batch_size} is not a multiple of dp x micro_batch_size = "
                f"{self.dp} x {self.micro_batch_size} = {per_step}; the nearest batches are {near}"
            )
        return global_batch_size // per_step


def partition_layers(num_layers: int, num_virtual_stages: int) -> tuple[int, ...]:
    """Split layers over virtual stages as frameworks do.

    Even when they divide. Otherwise embedding and loss count as a layer each, so that the first and the
    last stage hold one fewer, none at all where every other holds one (interfaces.md; Megatron's
    account-for-embedding/loss); what still remains goes to the middle stages.

    Raises
    ------
    SpecError
        If there are fewer layers than stages to fill.

    Examples
    --------
    >>> partition_layers(126, 8)
    (15, 16, 16, 16, 16, 16, 16, 15)
    >>> partition_layers(32, 4)
    (8, 8, 8, 8)
    >>> partition_layers(6, 8)
    (0, 1, 1, 1, 1, 1, 1, 0)
    """
    if not can_partition(num_layers, num_virtual_stages):
        raise SpecError(f"{num_layers} layers cannot fill {num_virtual_stages} virtual stages")
    if num_layers % num_virtual_stages == 0:
        return (num_layers // num_virtual_stages,) * num_virtual_stages
    base, extra = divmod(num_layers + 2, num_virtual_stages)
    spares_ends = extra == 0 or base > 1
    if not spares_ends:
        # Too few layers to spare one at the ends: one each, the rest to the middle.
        base, extra = divmod(num_layers, num_virtual_stages)
    first = (num_virtual_stages - extra) // 2
    counts = [base + (first <= index < first + extra) for index in range(num_virtual_stages)]
    if spares_ends:
        counts[0] -= 1
        counts[-1] -= 1
    return tuple(counts)


def partition_with_ends(num_layers: int, num_virtual_stages: int, first: int, last: int) -> tuple[int, ...]:
    """Split layers over virtual stages with given numbers on the first and the last, the rest evenly.

    What remains of the middle goes to its later stages, which hold fewer activations.

    Raises
    ------
    SpecError
        If the middle cannot hold what the ends leave.

    Examples
    --------
    >>> partition_with_ends(32, 4, 8, 5)
    (8, 9, 10, 5)
    """
    inner, rest = num_virtual_stages - 2, num_layers - first - last
    if num_virtual_stages < 2 or min(first, last) < 0 or rest < inner or (inner == 0 and rest):
        raise SpecError(
            f"{num_layers} layers cannot fill {num_virtual_stages} virtual stages with {first} on the first and "
            f"{last} on the last"
        )
    base, extra = divmod(rest, inner) if inner else (0, 0)
    middle = (base + (index >= inner - extra) for index in range(inner))
    return (first, *middle, last)


def can_partition(num_layers: int, num_virtual_stages: int) -> bool:
    """Return whether every virtual stage gets a layer, or only embedding and loss stand alone."""
    return num_virtual_stages <= num_layers or num_virtual_stages == num_layers + 2
