"""Check exported LeaderWorkerSets against the schema that a Kubernetes API server holds them to.

    python benchmarks/conformance_kubernetes.py leaderworkerset.x-k8s.io_leaderworkersets.yaml

The file is the CustomResourceDefinition of kubernetes-sigs/lws (config/crd/bases, v0.7 and later). Checked are types,
required fields, enumerations, patterns and bounds, and fields that the schema does not know, as strict validation does.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))

from conformance_missing import exit_with
from conformance_serving import good_cases

from meshwright.planner.export import SERVING_EXPORTERS

TARGET, KIND = "kubernetes", "LeaderWorkerSet"
# What the API server itself fills every object with.
_OBJECT = ("apiVersion", "kind", "metadata")
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
}


def main() -> int:
    """Print how many sets the schema accepts; return 1 if it refuses one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("definition", type=Path)
    definition = yaml.safe_load(parser.parse_args().definition.read_text(encoding="utf-8"))
    versions = {each["name"]: each["schema"]["openAPIV3Schema"] for each in definition["spec"]["versions"]}
    group, counts = definition["spec"]["group"], Counter[bool]()
    exporter = SERVING_EXPORTERS[TARGET]
    for case in itertools.chain(good_cases("vllm"), good_cases("sglang")):
        if exporter.unsupported(case.job, case.plan):
            continue
        for file in exporter.export(case.job, case.plan).files:
            for manifest in yaml.safe_load_all(file.text) if file.name.endswith(".yaml") else ():
                if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
                    continue
                given, _, version = manifest["apiVersion"].partition("/")
                wrong = [f"apiVersion: {manifest['apiVersion']}"]
                if given == group and version in versions:
                    wrong = list(violations(manifest, versions[version], ""))
                counts[not wrong] += 1
                if wrong:
                    print(f"REJECTED {case.job.model.name} {case.plan}\n  " + "\n  ".join(wrong))
    print(f"{KIND}: {counts[True]} of {counts.total()} manifests accepted")
    return 1 if counts[False] or not counts else 0


def violations(value: Any, schema: dict[str, Any], where: str) -> Iterator[str]:
    """Yield what a value breaks of a structural schema."""
    if schema.get("x-kubernetes-int-or-string"):
        if not isinstance(value, int | str):
            yield f"{where}: neither a number nor a text"
        return
    kind = schema.get("type")
    is_slip = isinstance(value, bool) and kind != "boolean"
    if kind and (not isinstance(value, _TYPES[kind]) or is_slip):
        yield f"{where}: {type(value).__name__} is no {kind}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value} is none of {schema['enum']}"
    if "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{where}: '{value}' does not match {schema['pattern']}"
    if value in ("", 0) or value:
        if "minimum" in schema and value < schema["minimum"]:
            yield f"{where}: {value} is below {schema['minimum']}"
        if "maxLength" in schema and len(value) > schema["maxLength"]:
            yield f"{where}: longer than {schema['maxLength']}"
    if kind == "array":
        for index, each in enumerate(value):
            yield from violations(each, schema["items"], f"{where}[{index}]")
    if kind == "object":
        yield from _fields(value, schema, where)


def _fields(value: dict[str, Any], schema: dict[str, Any], where: str) -> Iterator[str]:
    yield from (f"{where}.{name}: missing" for name in schema.get("required", ()) if name not in value)
    known, others = schema.get("properties", {}), schema.get("additionalProperties")
    for name, each in value.items():
        if name in known and not (where == "" and name == "metadata"):
            yield from violations(each, known[name], f"{where}.{name}")
        elif isinstance(others, dict):
            yield from violations(each, others, f"{where}.{name}")
        elif not (where == "" and name in _OBJECT) and (
            known or not schema.get("x-kubernetes-preserve-unknown-fields")
        ):
            yield f"{where}.{name}: unknown field"


if __name__ == "__main__":
    exit_with(main, "the custom resource's published definition, as --help says")
