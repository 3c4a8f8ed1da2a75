"""Ask the real frameworks whether they accept every exported plan, and count the broken plans refused.

    python benchmarks/conformance.py --tier 1
    python benchmarks/conformance.py --tier 2 --megatron-lm ~/Megatron-LM --torchtitan-0-2 ~/torchtitan-0.2.1

Tier 1 asks what the extra "conformance" installs: megatron-core (configuration and process groups), DeepSpeed and
Accelerate. Tier 2 asks the command lines of Megatron-LM (a checkout of core_r0.16 and what it imports) and torchtitan
(0.3 installed or given; a checkout of 0.2.1). Each path may hold several folders, separated like those of PATH; the
environment variables MESHWRIGHT_MEGATRON_LM, MESHWRIGHT_TORCHTITAN and MESHWRIGHT_TORCHTITAN_0_2 stand for the options.
A client that is absent is left out, with the reason.

Broken plans are written out without Meshwright's rules for the client to judge; what the files cannot say (a schedule,
a sharding, adapters) is lost in writing, and no client can object to it. That is what the rules are for.

Serving engines, Kubernetes, NVIDIA Dynamo and Megatron-Bridge have programs of their own: conformance_serving.py,
conformance_kubernetes.py, conformance_dynamo.py and conformance_bridge.py.

The plans, the questions and the scripts that ask are those of tests/conformance. With ``--verbose`` every rejected export
and every broken plan that the client lets through is listed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "conformance"))

from conformance_missing import exit_missing, exit_with
from conformance_questions import CLIENTS, TIER_1
from conformance_report import Row, absent, row

_PATHS = {
    "megatron_lm": "MESHWRIGHT_MEGATRON_LM",
    "torchtitan": "MESHWRIGHT_TORCHTITAN",
    "torchtitan-0.2": "MESHWRIGHT_TORCHTITAN_0_2",
}
_NEEDS = "the extra 'conformance' (pip install -e '.[conformance]') for tier 1, checkouts named by options for tier 2"
_SHOWN = {
    "accelerate": "Accelerate loader and mesh",
    "deepspeed": "DeepSpeedConfig",
    "megatron_core": "megatron-core configuration and groups",
    "megatron_lm": "Megatron-LM command line",
    "torchtitan": "torchtitan command line and mesh",
}


def main() -> int:
    """Print one line per target and client; returns 1 where a client or Meshwright errs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tier", type=int, choices=(1, 2), default=1)
    for name, variable in _PATHS.items():
        option = "--" + name.replace("_", "-").replace(".", "-")
        parser.add_argument(option, dest=name, default=os.environ.get(variable, ""), help=f"or ${variable}")
    parser.add_argument("--verbose", action="store_true")
    options = vars(parser.parse_args())
    paths = {name: [part for part in options[name].split(os.pathsep) if part] for name in _PATHS}
    start, rejected, num_asked = time.perf_counter(), 0, 0
    print(
        "| target | client | plans exported | accepted | broken plans refused by Meshwright | by the client |"
    )
    print("|---|---|---|---|---|---|")
    for target, clients in CLIENTS.items():
        for client in clients:
            if (client in TIER_1) != (options["tier"] == 1):
                continue
            reason = absent(client, paths, target)
            if reason is not None:
                print(f"| {target} | {_SHOWN[client]} | skipped: {reason} | | | |")
                continue
            num_asked += 1
            found = row(target, client, paths)
            print(line(found), flush=True)
            rejected += len(found.exports) - found.num_accepted + len(found.missed)
            if options["verbose"]:
                show(found)
    print(f"\n{time.perf_counter() - start:.0f} s")
    if not num_asked:
        exit_missing("no client of the tier could be asked", _NEEDS)
    return 1 if rejected else 0


def line(found: Row) -> str:
    """Return a row of the table."""
    refused = len(found.broken) - len(found.missed)
    return (
        f"| {found.target} | {_SHOWN[found.client]} | {len(found.exports)} | {found.num_accepted} | "
        f"{refused} of {len(found.broken)} | {found.num_refused_by_client} of {len(found.asked)} asked |"
    )


def show(found: Row) -> None:
    """List what is not as it should be, and what the client lets through."""
    for verdict in found.exports:
        if verdict.error is not None:
            print(f"  rejected {verdict.name}: {verdict.error}")
    for rule in found.missed:
        print(f"  not refused by Meshwright: {rule}")
    for verdict in found.asked:
        print(
            f"  broken, client {'accepts' if verdict.error is None else 'refuses'}: {verdict.name}: {verdict.error or ''}"
        )


if __name__ == "__main__":
    exit_with(main, _NEEDS)
