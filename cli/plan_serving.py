"""``meshwright plan`` for serving jobs: flags to a request, a search, a report and plan files."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from meshwright.cli.options import CommonOptions

__all__ = ["ServingOptions", "plan_serving", "refuse_serving_options", "serving_options"]

ServingOptions = dict[str, Any]
_SLO_FLAGS = ("ttft_p99", "tpot_p99", "ttft_mean", "tpot_mean", "itl_p99", "e2e_p99")
_FLAGS = (
    "prefill_cluster",
    "requests",
    "rate",
    "concurrency",
    "input_length",
    "output_length",
    "engine",
    "verify",
    "long_context",
)


def serving_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of serving jobs and pass them on as one ``serving`` mapping."""

    @click.option("--serve", is_flag=True, help="Plan serving; job files of kind 'serving' need no flag.")
    @click.option(
        "--prefill-cluster",
        metavar="NODE:COUNT",
        help="Serving: other GPUs for the prefill pools of disaggregated plans, in nodes.",
    )
    @click.option(
        "--requests", metavar="FILE", help="Serving: requests to serve (trace of times and lengths)."
    )
    @click.option("--rate", metavar="RATE", help="Serving: requests arrive at random, such as '4 /s'.")
    @click.option("--concurrency", type=click.IntRange(min=1), help="Serving: clients of a closed loop.")
    @click.option("--input-length", type=click.IntRange(min=1), help="Serving: prompt tokens of a request.")
    @click.option("--output-length", type=click.IntRange(min=1), help="Serving: answer tokens of a request.")
    @click.option("--engine", help="Serving: vllm, sglang or trtllm; all are tried without.")
    @click.option(
        "--ttft-p99", metavar="TIME", help="Serving: limit on the time to the first token, such as 2s."
    )
    @click.option("--tpot-p99", metavar="TIME", help="Serving: limit on the time per token after it.")
    @click.option("--ttft-mean", metavar="TIME", hidden=True)
    @click.option("--tpot-mean", metavar="TIME", hidden=True)
    @click.option("--itl-p99", metavar="TIME", hidden=True)
    @click.option("--e2e-p99", metavar="TIME", hidden=True)
    @click.option(
        "--slo",
        "slo_texts",
        multiple=True,
        metavar="NAME=TIME",
        help="Serving: any limit, such as e2e_p95=20s.",
    )
    @click.option(
        "--verify",
        type=click.IntRange(0, 100),
        help="Serving: shapes to simulate at least [5]; 0 ranks by bounds alone.",
    )
    @click.option(
        "--long-context", is_flag=True, help="Serving: what the KV cache costs from 4K to 10M tokens."
    )
    @wraps(command)
    def wrapped(**arguments: Any) -> None:
        names = ("serve", "slo_texts", *_FLAGS, *_SLO_FLAGS)
        command(serving={name: arguments.pop(name) for name in names}, **arguments)

    return wrapped


def refuse_serving_options(serving: ServingOptions) -> None:
    """Raise when a training job was given options that only serving jobs have."""
    from meshwright.errors import SpecError

    names = [f"--{name.removesuffix('_texts').replace('_', '-')}" for name, value in serving.items() if value]
    if names:
        raise SpecError(
            f"{', '.join(names)} {'go' if len(names) > 1 else 'goes'} with serving jobs; add --serve, or plan a job file of "
            "kind: serving"
        )


def plan_serving(
    job: Path | None,
    serving: ServingOptions,
    training: dict[str, object],
    *,
    model: str | None,
    cluster: str | None,
    precision: str | None,
    objective: str | None,
    target: str | None,
    top: int,
    out: Path,
    common: CommonOptions,
) -> None:
    """Search, rank, print and write serving plans.

    Parameters
    ----------
    job : Path | None
        The job file.
    serving : ServingOptions
        Options of :func:`serving_options`.
    training : dict[str, object]
        Options that mean nothing for serving, by flag; None or False where not given.
    model, cluster, precision, objective, target, top, out, common :
        Options of ``plan``.
    """
    from meshwright.errors import SpecError
    from meshwright.planner.serving.job_file import ServingFlags, read_serving_request

    given = [flag for flag, value in training.items() if value]
    if given:
        raise SpecError(
            f"{', '.join(given)} {'go' if len(given) > 1 else 'goes'} with training jobs, not with serving"
        )
    request = read_serving_request(
        job,
        ServingFlags(
            model=model,
            cluster=cluster,
            precision=precision,
            objective=objective,
            target=target,
            routing=serving["routing"],
            slo=_slo_texts(serving),
            **{name: serving[name] for name in _FLAGS if name not in ("verify", "long_context")},
        ),
    )
    if serving["long_context"]:
        from meshwright.cli.render.serving_long_context import show_long_context

        show_long_context(request, common)
        return

    from meshwright.cli.render.console import ProgressLine
    from meshwright.cli.render.serving_plans import (
        print_serving_report,
        serving_report_mapping,
        write_serving_plans,
    )
    from meshwright.planner.serving.answer import answer_request
    from meshwright.planner.serving.costs import JobCosts

    verify = serving["verify"]
    with ProgressLine(common.quiet or common.as_json) as progress:
        answer = answer_request(
            request,
            costs=JobCosts(request.job, common.calibrations),
            seed=common.seed,
            num_shapes=5 if verify is None else verify,
            progress=progress,
        )
    report = serving_report_mapping(answer, top)
    write_serving_plans(out, answer, report, top, force=common.force)
    if common.as_json:
        click.echo(json.dumps(report, indent=2, allow_nan=False))
    else:
        print_serving_report(answer, out, top, quiet=common.quiet)


def _slo_texts(serving: ServingOptions) -> dict[str, str]:
    from meshwright.errors import SpecError

    texts = {name: serving[name] for name in _SLO_FLAGS if serving[name] is not None}
    for text in serving["slo_texts"]:
        name, _, limit = text.partition("=")
        if not limit:
            raise SpecError(f"--slo: '{text}' is not NAME=TIME; write for example ttft_p99=2s")
        texts[name.strip()] = limit.strip()
    return texts
