"""What an engine costs beside its kernels: constants by engine, release range, kind of model and architecture.

One YAML file per engine under ``engines/``; every block says which releases it is for, what it rests on and how certain
it is. Blocks are laid over each other from the general to the particular; what no block names is a default.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib.resources import files
from typing import Literal, cast, get_args

from meshwright.errors import SpecError, did_you_mean
from meshwright.hardware_specs.yaml_document import Section, parse_yaml
from meshwright.simcore.domain.serving import ENGINES, POLICIES, PolicyName

__all__ = [
    "CERTAINTIES",
    "FITTABLE",
    "TIME_CONSTANTS",
    "UNSTATED",
    "Certainty",
    "EngineConstants",
    "engine_constants",
    "release_key",
    "with_engine_constants",
]

Certainty = Literal["fitted", "borrowed", "default"]
"""Fitted to runs of the release range itself; of another range, architecture or kind of model; nobody's measurement."""
CERTAINTIES: tuple[Certainty, ...] = get_args(Certainty)


UNSTATED = "unstated"
"""The release of a measured run that names none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConstants:
    """Costs and habits of an engine release.

    Parameters
    ----------
    engine, version : str
        Engine and release the constants were asked for.
    kernel_time : float
        Device time of one small kernel (norm, rotary, activation, cache write), gap to the next included [s].
    elementwise_factor : float
        Bytes moved by small kernels over the ideal count.
    step_latency : float
        Device time of a step beside its kernels: sampling, copies of inputs and outputs, gaps [s].
    logit_bytes : float
        Traffic of sampling per logit of the vocabulary [B].
    host_time, host_time_per_sequence : float
        Host work of a step, and of each sequence in it [s].
    host_time_per_prompt : float
        Host work of taking one prompt into a step that no graph replays, beside the kernels' [s].
    eager_kernel_time : float
        Host work of each kernel started in a step that is not replayed from a graph [s].
    is_host_hidden : bool
        The host prepares the next step while the device runs this one.
    serial_draft_time : float
        Host work per sequence of a step that verifies drafts, where the engine overlaps none of it with the device [s]; 0
        is an engine that treats such a step like any other.
    max_graph_tokens : float
        Largest batch captured as a graph, in sequences of one token.
    fuses_all_reduce_norm : bool
        The all-reduce kernel applies the residual and the norm that follow.
    expert_factor : float
        Time of routed experts over the tables', which were measured under a power law of routing.
    fused_expert_factor : float
        The same where the engine runs the shared expert of DeepSeek-V3 as one routed expert more; 0 is an engine that
        does not.
    fuses_rotary_cache : bool
        The attention kernel rotates queries and keys and writes the cache.
    overlaps_shared_experts : bool
        Steps replayed from a graph run shared experts on a stream of their own beside the routed ones.
    splits_linear_projections : bool
        Linear attention projects queries, keys and values, the output's gate and both gates of the state one by one.
    split_norm_kernels : float
        Small kernels of norms over all heads of a layer whose heads are split, once for queries and keys.
    absorbs_prompts : bool
        Latent attention runs prompts in the absorbed form of its decode steps.
    prompt_expert_factor : float
        Further factor on 8-bit routed experts in steps with prompts.
    prefill_attention_factor : float
        Time of attention over prompts over the kernel's own.
    decode_skew : float
        Extra decode attention per coefficient of variation of the contexts.
    mixed_decode_factor : float
        Time of decode attention in a step that holds prompts over that of a pure decode step.
    request_time : float
        Serial work of the front end per request [s].
    token_time : float
        Serial work of the front end per token streamed out [s].
    response_latency : float
        Fixed delay between client and engine, both ways together [s].
    overlaps_steps : bool
        One process of the host starts the kernels of a step before it handles the tokens of the step before.
    policy : PolicyName
        How steps are formed unless the pool says otherwise.
    reserves_output : bool
        A request is admitted when its prompt and whole answer fit, whatever the policy does.
    prompts_per_step : float
        Prompts that enter one step when many wait, as the front end hands them over; 0 is no limit.
    max_num_batched_tokens : float
        Default token budget of a step.
    max_num_sequences : float
        Default largest batch.
    memory_fraction : float
        Share of the device's memory the engine plans with.
    overhead_bytes : float
        Of that, what is neither weights nor KV cache: activations, graphs, communicators [B].
    certainty : Mapping[str, Certainty]
        By constant.
    evidence : tuple[str, ...]
        What the blocks that apply rest on.
    """

    engine: str
    version: str
    kernel_time: float = 2e-6
    elementwise_factor: float = 1.0
    step_latency: float = 5e-4
    logit_bytes: float = 8.0
    host_time: float = 0.0
    host_time_per_sequence: float = 0.0
    host_time_per_prompt: float = 0.0
    eager_kernel_time: float = 1.5e-5
    is_host_hidden: bool = True
    serial_draft_time: float = 0.0
    max_graph_tokens: float = 512.0
    fuses_all_reduce_norm: bool = False
    fuses_rotary_cache: bool = False
    overlaps_shared_experts: bool = False
    splits_linear_projections: bool = False
    split_norm_kernels: float = 4.0
    absorbs_prompts: bool = False
    expert_factor: float = 1.0
    fused_expert_factor: float = 0.0
    prompt_expert_factor: float = 1.0
    prefill_attention_factor: float = 1.0
    decode_skew: float = 0.0
    mixed_decode_factor: float = 1.0
    request_time: float = 0.0
    token_time: float = 0.0
    response_latency: float = 1e-2
    overlaps_steps: bool = False
    policy: PolicyName = "chunked_prefill"
    reserves_output: bool = False
    prompts_per_step: float = 0.0
    max_num_batched_tokens: float = 8192.0
    max_num_sequences: float = 1024.0
    memory_fraction: float = 0.9
    overhead_bytes: float = 3.5e9
    certainty: Mapping[str, Certainty] = field(default_factory=dict)
    evidence: tuple[str, ...] = ()

    def names(self, certainty: Certainty) -> tuple[str, ...]:
        """Return the constants of a certainty, sorted."""
        return tuple(
            sorted(name for name in (*FITTABLE, *_FLAGS, "policy") if self._certainty(name) == certainty)
        )

    def drafting(self, num_speculative_tokens: int) -> EngineConstants:
        """Return what holds while so many tokens are drafted a step."""
        if not (num_speculative_tokens and self.serial_draft_time):
            return self
        return replace(
            self,
            is_host_hidden=False,
            overlaps_steps=False,
            host_time_per_sequence=self.host_time_per_sequence + self.serial_draft_time,
        )

    def _certainty(self, name: str) -> Certainty:
        return self.certainty.get(name, "default")


_FLAGS: tuple[str, ...] = (
    "is_host_hidden",
    "fuses_all_reduce_norm",
    "fuses_rotary_cache",
    "overlaps_shared_experts",
    "splits_linear_projections",
    "absorbs_prompts",
    "overlaps_steps",
    "reserves_output",
)
FITTABLE: tuple[str, ...] = tuple(each.name for each in fields(EngineConstants) if each.type == "float")
"""Constants that are plain numbers, which a calibration may replace."""
TIME_CONSTANTS: tuple[str, ...] = (
    "kernel_time",
    "step_latency",
    "host_time",
    "host_time_per_sequence",
    "host_time_per_prompt",
    "serial_draft_time",
    "eager_kernel_time",
    "request_time",
    "token_time",
    "response_latency",
)
_BYTES = ("overhead_bytes",)
_KINDS = ("any", "dense", "moe")
_ARCHITECTURES = ("any", "ampere", "ada", "hopper", "blackwell")
_EXPERTS = ("any", "int4_wo")
# Names that are no release sort after every release: they were built from a branch newer than the last one.
_NO_RELEASE = (10**6,)
_BEFORE_ALL = -9


def release_key(version: str) -> tuple[int, ...]:
    """Return what releases sort by; release candidates before their release, names that are none after all.

    Two numbers alone are a bound: they come before every candidate of that release.

    Examples
    --------
    >>> release_key("1.0.0rc3") < release_key("1.0.0") < release_key("1.1") < release_key("1.1.0rc2.post2")
    True
    """
    match = re.fullmatch(
        r"v?(\d+)\.(\d+)(?:\.(\d+))?(?:[.-]?(rc|post|a|b|dev)(\d+))?(?:\.(post|pre)(\d+))?", version
    )
    if match is None:
        return _NO_RELEASE
    major, minor, patch = (int(match[group] or 0) for group in (1, 2, 3))
    if match[3] is None:
        return (major, minor, 0, _BEFORE_ALL, 0, 0)
    stage = {"dev": -4, "a": -3, "b": -2, "rc": -1, "post": 1, None: 0}[match[4]]
    return (major, minor, patch, stage, int(match[5] or 0), int(match[7] or 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """Constants of one block and what it is for."""

    first: tuple[int, ...]
    below: tuple[int, ...]
    build: str
    includes_unstated: bool
    unstated_only: bool
    kind: str
    architecture: str
    experts: str
    certainty: Certainty
    evidence: str
    values: Mapping[str, float | bool | str]

    def applies(self, version: str, kind: str, architecture: str, experts: str) -> bool:
        """Whether the block is for a release or build, kind of model, architecture and format of experts."""
        if version == UNSTATED:
            in_range = self.includes_unstated or self.unstated_only
        elif self.build and version.startswith(self.build):
            in_range = True
        else:
            in_range = not self.unstated_only and self.first <= release_key(version) < self.below
        return (
            in_range
            and self.kind in ("any", kind)
            and self.architecture in ("any", architecture)
            and self.experts in ("any", experts)
        )


def engine_constants(
    engine: str, version: str, *, is_moe: bool, architecture: str, experts: str = ""
) -> EngineConstants:
    """Return the constants of an engine release for a kind of model on an architecture.

    Parameters
    ----------
    engine, version : str
        A release such as ``0.12.0``; empty and other names count as newer than every release, ``unstated`` is
        that of a published run that does not say.
    is_moe : bool
        Whether the model is a mixture of experts.
    architecture : str
        Of the GPU, such as ``hopper``.
    experts : str
        Format of the routed experts: some run kernels of their own.

    Raises
    ------
    SpecError
        If the engine is unknown.
    """
    if engine not in ENGINES:
        raise SpecError(
            f"unknown engine '{engine}'{did_you_mean(engine, ENGINES)}; known: {', '.join(ENGINES)}"
        )
    kind = "moe" if is_moe else "dense"
    values: dict[str, float | bool | str] = {}
    certainty: dict[str, Certainty] = {}
    evidence = []
    for block in _blocks(engine):
        if block.applies(version, kind, architecture, experts):
            values |= block.values
            certainty |= dict.fromkeys(block.values, block.certainty)
            evidence.append(block.evidence)
    return replace(
        EngineConstants(engine=engine, version=version),
        **values,  # type: ignore[arg-type]  # names checked when read
        certainty=certainty,
        evidence=tuple(evidence),
    )


def with_engine_constants(
    constants: EngineConstants, software: Mapping[str, Mapping[str, float]]
) -> EngineConstants:
    """Return the constants with the user's own, from the ``software`` part of a calibration, in their place.

    Raises
    ------
    SpecError
        If a constant is unknown.
    """
    own = software.get(f"serving-{constants.engine}", {})
    for name in own:
        if name not in FITTABLE:
            raise SpecError(
                f"calibration: software.serving-{constants.engine}.{name}: unknown constant{did_you_mean(name, FITTABLE)}"
            )
    if not own:
        return constants
    fitted: Certainty = "fitted"
    return replace(
        constants,
        **own,  # type: ignore[arg-type]  # number fields only
        certainty={**constants.certainty, **dict.fromkeys(own, fitted)},
        evidence=(*constants.evidence, "the given calibration"),
    )


@cache
def _blocks(engine: str) -> tuple[_Block, ...]:
    entry = files("meshwright.costmodels.serving") / "engines" / f"{engine}.yaml"
    section = parse_yaml(entry.read_text(encoding="utf-8"), entry.name)
    section.integer("schema_version")
    section.text("engine")
    blocks = tuple(_block(part) for part in section.sections("blocks"))
    section.close()
    return blocks


def _block(section: Section) -> _Block:
    first, below = section.optional_text("from"), section.optional_text("below")
    constants = section.section("constants")
    block = _Block(
        first=release_key(first) if first else (-1,),
        below=release_key(below) if below else (*_NO_RELEASE, 1),
        build=section.optional_text("build") or "",
        includes_unstated=section.boolean("includes_unstated", default=False),
        unstated_only=section.boolean("unstated_only", default=False),
        kind=section.choice("models", _KINDS, default="any"),
        architecture=section.choice("architecture", _ARCHITECTURES, default="any"),
        experts=section.choice("experts", _EXPERTS, default="any"),
        certainty=cast("Certainty", section.choice("certainty", CERTAINTIES)),
        evidence=section.text("evidence"),
        values={name: _value(constants, name) for name in constants},
    )
    constants.close()
    section.close()
    return block


def _value(section: Section, name: str) -> float | bool | str:
    if name == "policy":
        return section.choice(name, POLICIES)
    if name in _FLAGS:
        return section.boolean(name)
    if name not in FITTABLE:
        raise section.error(name, f"unknown constant{did_you_mean(name, FITTABLE)}")
    if name in TIME_CONSTANTS:
        return section.quantity(name, "seconds")
    return section.quantity(name, "bytes") if name in _BYTES else section.number(name)
