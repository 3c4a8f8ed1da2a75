"""How an engine schedules, as plain numbers: all that the time of a step does not say."""

from __future__ import annotations

from dataclasses import dataclass, field

from meshwright.errors import SpecError, did_you_mean
from meshwright.simcore.domain.serving import POLICIES, PolicyName
from meshwright.simcore.domain.speculation import Acceptance

__all__ = ["EngineBehaviour", "TransferLink"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineBehaviour:
    """One replica's scheduler, KV cache and front end.

    A replica has ``attention_dp * pipeline_stages`` engines, each with its own queue, sequences and KV cache; they
    step together. The ranks of ``attention_dp`` wait for the slowest, so a step lasts as long as the fullest rank's.
    Micro-batches of a pipeline follow each other: with step times ``t_i`` a round over them lasts
    ``max(max t_i, stage_share * sum t_i)``, ``stage_share`` from the step table.

    Parameters
    ----------
    policy : PolicyName
        How a step is formed.
    max_num_sequences : int
        Most requests running at a time, of each engine: the slot limit.
    max_num_batched_tokens : int
        Most tokens in a step, of each engine; policies without a token budget ignore it.
    num_kv_blocks, block_size : int
        Blocks of the KV cache of each engine, and tokens of a block.
    watermark : float
        Share of the blocks that admission of a further request leaves free.
    overlaps_steps : bool
        The host forms and starts a step while the device runs the one before, and handles the tokens of that one only
        then: a prompt just missed waits for a whole further step to be started, and so do the first and last tokens
        of a step before one with prompts, whose kernels the host starts one by one. (SGLang's and TensorRT-LLM's
        overlap scheduling: one process both starts kernels and answers.)
    serial_time_per_request, fixed_time_per_request : float
        A request passes the front end, which takes the first, and then waits the second [s].
    stream_time_per_token : float
        Time of the front end to send a token to its client [s]. One event loop does both, one thing at a time: it
        bounds tokens and requests per second, and requests wait for tokens that are to be sent.
    burst_spread : float
        Time between the first requests of a closed loop's clients [s].
    num_speculative_tokens : int
        Tokens drafted a step; 0 is off.
    acceptance : Acceptance
        How many of them stand.
    has_prefix_cache : bool
        Shared parts of prompts that :class:`RequestTable` names stay cached until evicted, least recently used
        first.
    cached_prompt_share : float
        Share of every prompt found in the cache, for workloads without named parts; ignored with
        ``has_prefix_cache``.
    attention_dp, pipeline_stages : int
        Engines of a replica, as above.
    prompt_wait_steps : int
        Attention ranks take in prompts together: while all of them decode, a prompt waits until every rank has one,
        and at most this many steps; 0 takes each in as it comes.
    splits_prompts, reserves_output : bool | None
        Override what the policy does; None leaves it.
    """

    policy: PolicyName = "chunked_prefill"
    max_num_sequences: int = 256
    max_num_batched_tokens: int = 8192
    num_kv_blocks: int = 1 << 20
    block_size: int = 16
    watermark: float = 0.0
    overlaps_steps: bool = False
    serial_time_per_request: float = 0.0
    fixed_time_per_request: float = 0.0
    stream_time_per_token: float = 0.0
    burst_spread: float = 0.0
    num_speculative_tokens: int = 0
    acceptance: Acceptance = field(default_factory=Acceptance)
    has_prefix_cache: bool = False
    cached_prompt_share: float = 0.0
    attention_dp: int = 1
    pipeline_stages: int = 1
    prompt_wait_steps: int = 0
    splits_prompts: bool | None = None
    reserves_output: bool | None = None

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise SpecError(
                f"engine behaviour: unknown policy '{self.policy}'{did_you_mean(self.policy, POLICIES) or '.'} "
                f"Known: {', '.join(POLICIES)}."
            )
        for name in (
            "max_num_sequences",
            "max_num_batched_tokens",
            "num_kv_blocks",
            "block_size",
            "attention_dp",
            "pipeline_stages",
        ):
            if getattr(self, name) < 1:
                raise SpecError(f"engine behaviour: {name} must be at least 1, not {getattr(self, name)}")
        for name in (
            "serial_time_per_request",
            "fixed_time_per_request",
            "stream_time_per_token",
            "burst_spread",
            "num_speculative_tokens",
            "prompt_wait_steps",
        ):
            if not getattr(self, name) >= 0:
                raise SpecError(f"engine behaviour: {name} must not be below 0, nor {getattr(self, name)}")
        for name in ("watermark", "cached_prompt_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise SpecError(
                    f"engine behaviour: {name} is a share from 0 to 1, not {getattr(self, name):g}"
                )

    @property
    def step_token_probabilities(self) -> tuple[float, ...]:
        """Probabilities of 1, 2, ... tokens of one sequence in one decode step."""
        return self.acceptance.step_token_probabilities(self.num_speculative_tokens)

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens that one sequence gets from one decode step."""
        return self.acceptance.tokens_per_step(self.num_speculative_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferLink:
    """The way of a KV cache from a prefill replica to the decode pool; transfers of one replica queue.

    Parameters
    ----------
    bytes_per_token : float
        KV cache of one token over all layers [B].
    bandwidth : float
        Of one prefill replica's links together [B/s].
    latency : float
        Beside the transfer itself [s].
    """

    bytes_per_token: float
    bandwidth: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        if not (self.bytes_per_token >= 0.0 and self.bandwidth > 0.0 and self.latency >= 0.0):
            raise SpecError("transfer link: bytes and latency must not be below 0, bandwidth must be above 0")
