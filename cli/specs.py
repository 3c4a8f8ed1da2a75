"""``meshwright specs``: what hardware and models are known."""

from __future__ import annotations

from pathlib import Path

import click

from meshwright.cli.options import CommonOptions, common_options

__all__ = ["command"]

_KINDS = ("gpu", "node", "fabric", "cluster", "model")


@click.group("specs", short_help="List, show, import and export hardware; list and show models.")
def command() -> None:
    """List and show the built-in GPUs, nodes, fabrics, clusters and models; import and export topologies."""


@command.command("list")
@click.option("--kind", type=click.Choice(_KINDS), help="Only this kind.")
@common_options
def list_command(*, kind: str | None, common: CommonOptions) -> None:
    """List every built-in spec by kind."""
    from meshwright.cli.render.console import print_json, stdout_console
    from meshwright.cli.render.specs import spec_names

    names = {each: spec_names(each) for each in (_KINDS if kind is None else (kind,))}
    if common.as_json:
        print_json({"kind": "specs", "specs": {each: list(ids) for each, ids in names.items()}})
        return
    console = stdout_console()
    for each, ids in names.items():
        console.print(f"{each} ({len(ids)})", style="bold")
        console.print("  " + ", ".join(ids), soft_wrap=not console.is_terminal)


@command.command("show")
@click.argument("name")
@common_options
def show_command(*, name: str, common: CommonOptions) -> None:
    """Show one spec with the source of each number; NAME may be an alias, NODE:COUNT or the path of a file.

    Of a cluster also its tiers, its bisection and its slowest links.
    """
    from meshwright.cli.render.console import print_json, stdout_console
    from meshwright.cli.render.specs import find_cluster, find_spec
    from meshwright.cli.render.topology import topology_lines, topology_summary
    from meshwright.hardware_specs.spec_writing import dump_yaml

    kind, mapping = find_spec(name)
    cluster = find_cluster(name) if kind == "cluster" else None
    if common.as_json:
        links = {} if cluster is None else {"links": topology_summary(cluster)}
        print_json({"kind": kind, "spec": mapping, **links})
        return
    drawn = "" if cluster is None else "".join(f"# {line}\n" for line in topology_lines(cluster))
    # Comments, because a fabric has a key 'kind' of its own; the rest can be pasted into a cluster file.
    stdout_console().print(f"# {kind}\n{drawn}{dump_yaml(mapping)}", soft_wrap=True, markup=False, end="")


@command.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--node", help="Built-in node that the machines are; guessed from their GPUs where the file shows them."
)
@click.option("--count", type=click.IntRange(1, 1_000_000), help="Nodes, where the file describes one node.")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE", help="Write the cluster file; else print it."
)
@common_options
def import_command(
    *, file: Path, node: str | None, count: int | None, out: Path | None, common: CommonOptions
) -> None:
    """Turn a topology FILE of another program into a cluster file, and say what had to be guessed.

    Reads 'nvidia-smi topo -m', NCCL's XML (NCCL_TOPO_DUMP_FILE), Slurm's topology.conf and topology.yaml, and a CSV of
    measured links between nodes.

    \b
    meshwright specs import links.csv --node dgx-h100 --out cluster.yaml
    """
    from meshwright.cli.render.console import print_json, stdout_console
    from meshwright.cli.render.topology import import_text
    from meshwright.hardware_specs.catalog import imported_cluster
    from meshwright.hardware_specs.importers import IMPORTERS, import_file
    from meshwright.hardware_specs.spec_writing import cluster_to_mapping, dump_yaml
    from meshwright.planner.output_file import replace_file

    key, imported = import_file(file)
    cluster, more = imported_cluster(imported, node, count, str(file))
    mapping = cluster_to_mapping(cluster)
    title = IMPORTERS[key].title
    if out is not None:
        text = import_text(imported, title, dump_yaml(mapping), more)
        replace_file(
            out,
            text.encode(),
            force=common.force,
            is_ours=lambda data: data.startswith(b"# written by meshwright"),
        )
    guesses = [*imported.guesses, *more]
    if common.as_json:
        print_json({"kind": "cluster", "importer": key, "guesses": guesses, "spec": mapping})
        return
    console = stdout_console()
    if out is None:
        console.print(
            import_text(imported, title, dump_yaml(mapping), more), soft_wrap=True, markup=False, end=""
        )
        return
    for sentence in guesses:
        console.print(f"Guessed: {sentence}", markup=False, soft_wrap=True)
    console.print(f"Wrote {out}", markup=False, soft_wrap=True)


@command.command("export")
@click.argument("cluster")
@click.option(
    "--to", "target", required=True, metavar="TARGET", help="Simulator: astra-sim or simai.", type=str
)
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write the file; else print it.")
@common_options
def export_command(*, cluster: str, target: str, out: Path | None, common: CommonOptions) -> None:
    """Write a CLUSTER's network for another simulator; what it cannot express is refused with the reasons.

    \b
    meshwright specs export eos --to astra-sim --out network.yml
    """
    from meshwright.cli.render.console import print_json, stdout_console
    from meshwright.hardware_specs import resolve_cluster
    from meshwright.hardware_specs.exporters import export_topology
    from meshwright.planner.output_file import replace_file

    text = export_topology(resolve_cluster(cluster), target)
    content = text.encode()
    if out is not None:
        # SimAI's file has no room for a mark of ours; the same content loses nobody anything.
        replace_file(
            out,
            content,
            force=common.force,
            is_ours=lambda data: data == content or data.startswith(b"# written by meshwright"),
        )
    if common.as_json:
        print_json({"kind": "topology", "target": target, "text": text})
    elif out is None:
        stdout_console().print(text, soft_wrap=True, markup=False, highlight=False, end="")
    elif not common.quiet:
        stdout_console().print(f"Wrote {out}", markup=False, soft_wrap=True)
