"""How much memory is left: one reading for an accelerator, a cgroup, a resource limit or a bare host."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

_UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as 2⁶³ rounded down to a page; nothing real is this large


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """Memory of one device at one moment.

    Attributes:
        free: bytes that could still be allocated; what the kernel or the caching allocator would give back counts.
        total: bytes of the limit that binds; 0 where nothing is known.
        source: which limit binds: "cuda", "cgroup", "rlimit", "host" or "unknown".
    """

    free: int
    total: int
    source: str


def read_memory(device: torch.device | str = "cpu") -> MemoryReading:
    """Reads the memory of a device now, without a cache.

    Args:
        device: `cpu` reads the tightest of the cgroups (v2 and v1, ancestors included), the process's own resource
            limits and the host; an accelerator reads its driver plus what torch's caching allocator holds unused.

    Returns:
        The reading with the least free bytes among the limits that apply.

    Source:
        cgroup memory in use counts file cache that the kernel drops before it kills, so `inactive_file` is subtracted,
        as the kubelet does for its working set.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return host_reading()
    if device.type == "meta":
        return MemoryReading(0, 0, "unknown")
    return _accelerator_reading(device)


def _accelerator_reading(device: torch.device) -> MemoryReading:
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return MemoryReading(0, 0, "unknown")
    free, total = module.mem_get_info(device)
    reserved, allocated = module.memory_reserved(device), module.memory_allocated(device)
    free += reserved - allocated
    fraction = getattr(module, "get_per_process_memory_fraction", None)
    if fraction is not None:
        limit = int(fraction(device) * total)
        if limit < total:
            free, total = min(free, limit - allocated), limit
    return MemoryReading(max(0, free), total, device.type)


def host_reading(root: Path = Path("/")) -> MemoryReading:
    """Reads the host's memory as this process may use it.

    Args:
        root: where `proc` and `sys` are found; tests point it at a tree of their own.

    Returns:
        The binding limit: host, cgroup or rlimit.
    """
    readings = [
        reading
        for reading in (_meminfo(root), *_cgroup_v2(root), *_cgroup_v1(root), *_rlimits(root))
        if reading is not None
    ]
    return min(readings, key=lambda reading: reading.free, default=MemoryReading(0, 0, "unknown"))


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _fields(text: str) -> dict[str, int]:
    """`key value`, `key: value kB`: the first number after each key."""
    found = {}
    for line in text.splitlines():
        parts = line.replace(":", " ").split()
        if len(parts) >= 2 and parts[1].isdigit():
            found[parts[0]] = int(parts[1])
    return found


def _meminfo(root: Path) -> MemoryReading | None:
    text = _read(root / "proc/meminfo")
    if text is not None:
        fields = _fields(text)
        if "MemTotal" in fields:
            available = fields.get("MemAvailable", fields.get("MemFree", 0) + fields.get("Cached", 0))
            return MemoryReading(available * 1024, fields["MemTotal"] * 1024, "host")
    try:
        page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
        free = os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None  # a host that does not say (macOS has no count of available pages, Windows no sysconf)
    return MemoryReading(free * page, pages * page, "host")


def _groups(root: Path) -> list[tuple[str, str]]:
    """(controllers, path) of each line of /proc/self/cgroup; "" is the unified (v2) hierarchy."""
    text = _read(root / "proc/self/cgroup") or ""
    lines = (line.split(":", 2) for line in text.splitlines())
    return [(parts[1], parts[2]) for parts in lines if len(parts) == 3]


def _ancestry(mount: Path, group: str) -> list[Path]:
    """The group's directory and its ancestors up to the mount, which stands alone where a namespace hides the path."""
    found = [mount]
    for part in Path(group.lstrip("/")).parts:
        if part == "..":  # a path outside this cgroup namespace
            return [mount]
        found.append(found[-1] / part)
    return [directory for directory in found if directory.is_dir()]


def _cgroup_v2(root: Path) -> list[MemoryReading]:
    readings = []
    for controllers, group in _groups(root):
        if controllers:
            continue
        for mount in (root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"):
            for directory in _ancestry(mount, group):
                limits = [_read(directory / name) for name in ("memory.max", "memory.high")]
                numbers = [int(text) for text in limits if text is not None and text.strip().isdigit()]
                used = _read(directory / "memory.current")
                if numbers and used is not None:
                    cache = _fields(_read(directory / "memory.stat") or "").get("inactive_file", 0)
                    readings.append(_group_reading(min(numbers), int(used), cache))
    return readings


def _cgroup_v1(root: Path) -> list[MemoryReading]:
    readings = []
    for controllers, group in _groups(root):
        if "memory" not in controllers.split(","):
            continue
        for directory in _ancestry(root / "sys/fs/cgroup/memory", group):
            limit, used = _read(directory / "memory.limit_in_bytes"), _read(directory / "memory.usage_in_bytes")
            if limit is None or used is None or int(limit) >= _UNLIMITED:
                continue
            cache = _fields(_read(directory / "memory.stat") or "").get("total_inactive_file", 0)
            readings.append(_group_reading(int(limit), int(used), cache))
    return readings


def _group_reading(limit: int, used: int, cache: int) -> MemoryReading:
    working_set = max(0, used - cache)
    return MemoryReading(max(0, limit - working_set), limit, "cgroup")


def _rlimits(root: Path) -> list[MemoryReading]:
    try:
        import resource
    except ImportError:
        return []  # Windows
    readings = []
    status: dict[str, int] | None = None
    for limit, field in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft = resource.getrlimit(limit)[0]
        if soft == resource.RLIM_INFINITY:
            continue
        if status is None:
            status = _fields(_read(root / "proc/self/status") or "")
        if field in status:
            readings.append(MemoryReading(max(0, soft - status[field] * 1024), soft, "rlimit"))
    return readings
