"""Build specs from the sections of a YAML file, whether built in or written by a user.

A number is ``key: "3.35 TB/s"`` or ``key: {value: "3.35 TB/s", source: "data sheet"}``. With a ``base``, a key
that is left out keeps the base's value and source, and one that is given replaces both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeVar, cast, get_args

from meshwright.hardware_specs.specs import (
    FabricSpec,
    GpuSpec,
    HostSpec,
    IntraNodeTopology,
    LinkSpec,
    NodeSpec,
)
from meshwright.hardware_specs.yaml_document import Section
from meshwright.units import Kind

__all__ = ["SCHEMA_VERSION", "NumberReader", "check_schema", "read_fabric", "read_gpu", "read_node"]

_T = TypeVar("_T", int, float)

SCHEMA_VERSION: Final = 1
_FABRIC_KINDS: Final = ("infiniband", "roce", "ethernet", "efa", "slingshot")
_FABRIC_OF_NIC: Final = {
    "infiniband": "infiniband-ndr",
    "roce": "roce-v2",
    "efa": "efa",
    "slingshot": "slingshot-11",
    "ethernet": "ethernet",
}
# Host, switches and NICs of DGX-class nodes draw about 40 % on top of the accelerators' limits.
_NODE_POWER_FACTOR: Final = 1.4
_MAX_GPUS_PER_NODE: Final = 100_000
_MAX_CORES_PER_NODE: Final = 10_000_000


def check_schema(section: Section) -> None:
    """Reject a file of a schema this version does not read; a missing version is the current one."""
    version = section.integer("schema_version", default=SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise section.error("schema_version", f"this version reads schema {SCHEMA_VERSION}, not {version}")


class NumberReader:
    """Reads the numbers of a section and collects their sources by key.

    Parameters
    ----------
    section : Section
        Where the numbers stand.
    sources : dict[str, str]
        Sources so far (the base's); updated in place.
    prefix : str
        Put before the key in ``sources``: ``"peak."``.
    """

    def __init__(self, section: Section, sources: dict[str, str], prefix: str = "") -> None:
        self._section = section
        self._sources = sources
        self._prefix = prefix

    def quantity(self, key: str, kind: Kind, base: float | None, *, or_zero: bool = False) -> float:
        """Return a quantity above zero (or not below it), the base's when the key is absent."""
        if base is not None and not self._section.has(key):
            return base
        section, name = self._place(key)
        value = section.quantity(name, kind)
        if value == 0 and not or_zero:
            raise section.error(name, "must be above zero")
        self._note_source(key, section)
        return value

    def optional_quantity(self, key: str, kind: Kind, base: float | None) -> float | None:
        """Return a quantity, the base's when the key is absent, None when it is ``null``."""
        return self.quantity(key, kind, base) if self._section.has(key) else self._absent(key, base)

    def count(self, key: str, base: int | None, maximum: int) -> int:
        """Return a whole number from 1 to ``maximum``."""
        if base is not None and not self._section.has(key):
            return base
        section, name = self._place(key)
        value = section.integer(name, minimum=1)
        if value > maximum:
            raise section.error(name, f"must be at most {maximum}, not {value}")
        self._note_source(key, section)
        return value

    def optional_count(self, key: str, base: int | None, maximum: int) -> int | None:
        """Return a whole number, the base's when the key is absent, None when it is ``null``."""
        return self.count(key, base, maximum) if self._section.has(key) else self._absent(key, base)

    def number(self, key: str, base: float | None, minimum: float) -> float:
        """Return a plain number of at least ``minimum``."""
        if base is not None and not self._section.has(key):
            return base
        section, name = self._place(key)
        value = section.number(name, minimum=minimum)
        self._note_source(key, section)
        return value

    def _absent(self, key: str, base: _T | None) -> _T | None:
        self._section.optional_text(key)
        if key not in self._section:
            return base
        self._sources.pop(self._prefix + key, None)
        return None

    def _place(self, key: str) -> tuple[Section, str]:
        if self._section.is_section(key):
            return self._section.section(key), "value"
        return self._section, key

    def _note_source(self, key: str, section: Section) -> None:
        name = self._prefix + key
        self._sources.pop(name, None)
        if section is not self._section:
            source = section.optional_text("source")
            if source is not None:
                self._sources[name] = source
            section.close()


def read_gpu(section: Section, base: GpuSpec | None = None) -> GpuSpec:
    """Return the GPU a mapping describes.

    Parameters
    ----------
    section : Section
        ``id, name, vendor, architecture, aliases, peak, memory, memory_bandwidth, num_sms, l2, power,
        scale_up, host_link, price``.
    base : GpuSpec | None
        Where values that are left out come from.

    Raises
    ------
    SpecError
        If a key is missing, unknown or malformed.
    """
    sources = dict(base.sources) if base else {}
    numbers = NumberReader(section, sources)
    identity = _read_identity(section, base.id if base else None, base.name if base else None, "custom-gpu")
    gpu = GpuSpec(
        id=identity[0],
        name=identity[1],
        aliases=section.texts("aliases"),
        vendor=section.text("vendor", default=base.vendor if base else "unknown"),
        architecture=section.text("architecture", **_default(base.architecture if base else None)),
        peak_flops_per_second=_read_peaks(section, base, sources),
        memory_bytes=numbers.quantity("memory", "bytes", base.memory_bytes if base else None),
        memory_bandwidth_bytes_per_second=numbers.quantity(
            "memory_bandwidth", "bytes_per_second", base.memory_bandwidth_bytes_per_second if base else None
        ),
        num_sms=numbers.count("num_sms", base.num_sms if base else None, maximum=1_000_000),
        l2_bytes=numbers.quantity("l2", "bytes", base.l2_bytes if base else None),
        power_watts=numbers.quantity("power", "watts", base.power_watts if base else None),
        scale_up=_read_optional_link(section, "scale_up", base.scale_up if base else None, sources),
        host_link=_read_link(section, "host_link", base.host_link if base else None, sources),
        price_dollars_per_hour=numbers.optional_quantity(
            "price", "dollars_per_hour", base.price_dollars_per_hour if base else None
        ),
        sources=sources,
    )
    section.close()
    return gpu


def read_node(section: Section, gpu: GpuSpec, base: NodeSpec | None = None) -> NodeSpec:
    """Return the node a mapping describes, around a GPU that was read already.

    Parameters
    ----------
    section : Section
        ``id, name, aliases, num_gpus, topology, nic, num_nics, power, host_memory, host, price,
        default_fabric``; without ``power`` the node draws 1.4 times the limits of its GPUs.
    gpu : GpuSpec
        The accelerator.
    base : NodeSpec | None
        Where values that are left out come from.

    Raises
    ------
    SpecError
        If a key is missing, unknown or malformed.
    """
    sources = dict(base.sources) if base else {}
    numbers = NumberReader(section, sources)
    identity = _read_identity(section, base.id if base else None, base.name if base else None, "custom-node")
    num_gpus = numbers.count("num_gpus", base.num_gpus if base else None, _MAX_GPUS_PER_NODE)
    topology = section.choice(
        "topology", get_args(IntraNodeTopology), **_default(base.topology if base else None)
    )
    nic = _read_link(section, "nic", base.nic if base else None, sources)
    power = numbers.optional_quantity("power", "watts", base.power_watts if base else None)
    if power is None:
        power = _NODE_POWER_FACTOR * num_gpus * gpu.power_watts
        sources["power"] = f"estimate: {_NODE_POWER_FACTOR} x the limits of the GPUs"
    fabric = base.default_fabric if base else _FABRIC_OF_NIC.get(nic.kind, "ethernet")
    node = NodeSpec(
        id=identity[0],
        name=identity[1],
        aliases=section.texts("aliases"),
        gpu=gpu,
        num_gpus=num_gpus,
        topology=cast("IntraNodeTopology", topology),
        nic=nic,
        num_nics=numbers.count("num_nics", base.num_nics if base else None, _MAX_GPUS_PER_NODE),
        power_watts=power,
        price_dollars_per_hour=numbers.optional_quantity(
            "price", "dollars_per_hour", base.price_dollars_per_hour if base else None
        ),
        host_memory_bytes=numbers.optional_quantity(
            "host_memory", "bytes", base.host_memory_bytes if base else None
        ),
        host=_read_host(section, base.host if base else None, sources),
        default_fabric=section.text("default_fabric", default=fabric),
        sources=sources,
    )
    section.close()
    return node


def read_fabric(section: Section, base: FabricSpec | None = None) -> FabricSpec:
    """Return the fabric a mapping describes: ``id, name, aliases, kind, latency, oversubscription, rail_optimized``.

    Raises
    ------
    SpecError
        If a key is missing, unknown or malformed.
    """
    sources = dict(base.sources) if base else {}
    numbers = NumberReader(section, sources)
    identity = _read_identity(
        section, base.id if base else None, base.name if base else None, "custom-fabric"
    )
    fabric = FabricSpec(
        id=identity[0],
        name=identity[1],
        aliases=section.texts("aliases"),
        kind=section.choice("kind", _FABRIC_KINDS, **_default(base.kind if base else None)),
        latency=numbers.quantity("latency", "seconds", base.latency if base else None, or_zero=True),
        oversubscription=numbers.number(
            "oversubscription", base.oversubscription if base else 1.0, minimum=1.0
        ),
        is_rail_optimized=section.boolean("rail_optimized", default=base.is_rail_optimized if base else True),
        sources=sources,
    )
    section.close()
    return fabric


def _default(value: str | None) -> Mapping[str, str]:
    return {} if value is None else {"default": value}


def _read_identity(
    section: Section, base_id: str | None, base_name: str | None, fallback: str
) -> tuple[str, str]:
    identity = section.text("id", default=f"{base_id}-custom" if base_id else fallback)
    if not identity.strip():
        raise section.error("id", "is empty; give it a name")
    return identity, section.text("name", default=f"{base_name} (custom)" if base_name else identity)


def _read_peaks(section: Section, base: GpuSpec | None, sources: dict[str, str]) -> dict[str, float]:
    peaks = dict(base.peak_flops_per_second) if base else {}
    child = section.optional_section("peak") if base else section.section("peak")
    if child is not None:
        numbers = NumberReader(child, sources, "peak.")
        for precision in child:
            peaks[precision] = numbers.quantity(precision, "flops_per_second", None)
        child.close()
    if not peaks:
        raise section.error("peak", "names no format; give at least one, e.g. bf16: 989.4 TFLOP/s")
    return peaks


def _read_optional_link(
    section: Section, key: str, base: LinkSpec | None, sources: dict[str, str]
) -> LinkSpec | None:
    if section.has(key):
        return _read_link(section, key, base, sources)
    section.optional_section(key)
    if key not in section:
        return base
    for field in ("bandwidth", "latency"):
        sources.pop(f"{key}.{field}", None)
    return None


def _read_link(section: Section, key: str, base: LinkSpec | None, sources: dict[str, str]) -> LinkSpec:
    if base is not None and not section.has(key):
        return base
    child = section.section(key)
    numbers = NumberReader(child, sources, f"{key}.")
    link = LinkSpec(
        kind=child.text("kind", **_default(base.kind if base else None)),
        bandwidth_bytes_per_second=numbers.quantity(
            "bandwidth", "bytes_per_second", base.bandwidth_bytes_per_second if base else None
        ),
        latency=numbers.quantity("latency", "seconds", base.latency if base else None, or_zero=True),
    )
    child.close()
    return link


def _read_host(section: Section, base: HostSpec | None, sources: dict[str, str]) -> HostSpec | None:
    if not section.has("host"):
        section.optional_section("host")
        if "host" not in section:
            return base
        for key in [key for key in sources if key.startswith("host.")]:
            del sources[key]
        return None
    child = section.section("host")
    numbers = NumberReader(child, sources, "host.")
    known = base or HostSpec()
    host = HostSpec(
        num_sockets=numbers.optional_count("num_sockets", known.num_sockets, _MAX_GPUS_PER_NODE),
        num_cores=numbers.optional_count("num_cores", known.num_cores, _MAX_CORES_PER_NODE),
        memory_bandwidth_bytes_per_second=numbers.optional_quantity(
            "memory_bandwidth", "bytes_per_second", known.memory_bandwidth_bytes_per_second
        ),
        link_bandwidth_bytes_per_second=numbers.optional_quantity(
            "link_bandwidth", "bytes_per_second", known.link_bandwidth_bytes_per_second
        ),
        gpus_per_link=numbers.count("gpus_per_link", known.gpus_per_link, _MAX_GPUS_PER_NODE),
        nvme_bytes=numbers.optional_quantity("nvme", "bytes", known.nvme_bytes),
        nvme_read_bytes_per_second=numbers.optional_quantity(
            "nvme_read", "bytes_per_second", known.nvme_read_bytes_per_second
        ),
        nvme_write_bytes_per_second=numbers.optional_quantity(
            "nvme_write", "bytes_per_second", known.nvme_write_bytes_per_second
        ),
    )
    child.close()
    return host
