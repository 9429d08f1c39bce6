"""Reading free memory: cgroup v2, cgroup v1, resource limits, the host; on trees made for the test."""

import resource

import pytest
import torch

from bs_memory import MemoryReading, read_memory
from bs_memory._readings import host_reading
from bs_memory.testing import limited_memory

MIB = 1 << 20


@pytest.fixture
def tree(tmp_path):
    """A root with 1,000 MiB of memory of which 600 are available."""
    write(tmp_path, "proc/meminfo", f"MemTotal: {1000 * 1024} kB\nMemFree: 1 kB\nMemAvailable: {600 * 1024} kB\n")
    return tmp_path


def write(root, path, text):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def v2(root, group, *, limit, used, inactive=0, high="max"):
    base = f"sys/fs/cgroup{group}"
    write(root, f"{base}/memory.max", f"{limit}\n")
    write(root, f"{base}/memory.high", f"{high}\n")
    write(root, f"{base}/memory.current", f"{used}\n")
    write(root, f"{base}/memory.stat", f"anon 1\ninactive_file {inactive}\n")


def v1(root, group, *, limit, used, inactive=0):
    base = f"sys/fs/cgroup/memory{group}"
    write(root, f"{base}/memory.limit_in_bytes", f"{limit}\n")
    write(root, f"{base}/memory.usage_in_bytes", f"{used}\n")
    write(root, f"{base}/memory.stat", f"inactive_file 7\ntotal_inactive_file {inactive}\n")


def test_a_bare_host(tree):
    assert host_reading(tree) == MemoryReading(600 * MIB, 1000 * MIB, "host")


def test_an_old_kernel_without_available(tmp_path):
    write(tmp_path, "proc/meminfo", "MemTotal: 1000 kB\nMemFree: 100 kB\nCached: 50 kB\n")
    assert host_reading(tmp_path) == MemoryReading(150 * 1024, 1000 * 1024, "host")


def test_cgroup_v2(tree):
    write(tree, "proc/self/cgroup", "0::/box\n")
    v2(tree, "/box", limit=400 * MIB, used=300 * MIB, inactive=50 * MIB)
    assert host_reading(tree) == MemoryReading(150 * MIB, 400 * MIB, "cgroup")


def test_cgroup_v2_without_a_limit_leaves_the_host(tree):
    write(tree, "proc/self/cgroup", "0::/box\n")
    v2(tree, "/box", limit="max", used=300 * MIB)
    assert host_reading(tree).source == "host"


def test_cgroup_v2_soft_limit_binds_first(tree):
    write(tree, "proc/self/cgroup", "0::/box\n")
    v2(tree, "/box", limit="max", high=200 * MIB, used=100 * MIB)
    assert host_reading(tree) == MemoryReading(100 * MIB, 200 * MIB, "cgroup")


def test_cgroup_v2_an_ancestor_may_bind(tree):
    write(tree, "proc/self/cgroup", "0::/outer/inner\n")
    v2(tree, "/outer", limit=500 * MIB, used=480 * MIB)
    v2(tree, "/outer/inner", limit=400 * MIB, used=100 * MIB)
    assert host_reading(tree) == MemoryReading(20 * MIB, 500 * MIB, "cgroup")


def test_cgroup_v2_in_a_namespace_that_hides_the_path(tree):
    write(tree, "proc/self/cgroup", "0::/../../elsewhere\n")
    v2(tree, "", limit=100 * MIB, used=90 * MIB)
    assert host_reading(tree) == MemoryReading(10 * MIB, 100 * MIB, "cgroup")


def test_cgroup_v1(tree):
    write(tree, "proc/self/cgroup", "9:name=systemd:/\n4:cpu,memory:/box\n0::/\n")
    v1(tree, "/box", limit=400 * MIB, used=300 * MIB, inactive=50 * MIB)
    assert host_reading(tree) == MemoryReading(150 * MIB, 400 * MIB, "cgroup")


def test_cgroup_v1_unlimited_is_no_limit(tree):
    write(tree, "proc/self/cgroup", "4:memory:/\n")
    v1(tree, "", limit=9223372036854771712, used=300 * MIB)
    assert host_reading(tree).source == "host"


def test_cgroup_v1_of_a_path_seen_from_outside(tree):
    write(tree, "proc/self/cgroup", "4:memory:/docker/abc\n")
    v1(tree, "", limit=100 * MIB, used=90 * MIB)
    assert host_reading(tree) == MemoryReading(10 * MIB, 100 * MIB, "cgroup")


def test_usage_above_the_limit_is_no_free_memory(tree):
    write(tree, "proc/self/cgroup", "0::/\n")
    v2(tree, "", limit=100 * MIB, used=120 * MIB)
    assert host_reading(tree).free == 0


def test_a_resource_limit_binds(tree):
    write(tree, "proc/self/status", f"VmSize: {300 * 1024} kB\nVmData: {100 * 1024} kB\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        pytest.skip("this process is limited already")
    # Far above what the test itself uses, and still the tightest of a larger host.
    write(tree, "proc/meminfo", f"MemTotal: {1 << 42} kB\nMemAvailable: {1 << 42} kB\n")
    resource.setrlimit(resource.RLIMIT_DATA, (1 << 44, hard))
    try:
        assert host_reading(tree) == MemoryReading((1 << 44) - 100 * MIB, 1 << 44, "rlimit")
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def test_nothing_known(tmp_path, monkeypatch):
    def refuse(name):
        raise ValueError(name)

    monkeypatch.setattr("os.sysconf", refuse)
    assert host_reading(tmp_path) == MemoryReading(0, 0, "unknown")
    assert read_memory("meta") == MemoryReading(0, 0, "unknown")


def test_this_machine():
    reading = read_memory()
    assert 0 < reading.free <= reading.total
    assert reading.source in ("host", "cgroup", "rlimit")


def test_limits_for_tests_are_checked():
    with pytest.raises(ValueError, match="headroom: "), limited_memory(-1):
        pass
    with pytest.raises(ValueError, match=r"limit: .*got 'stack'"), limited_memory(1 << 40, limit="stack"):
        pass


def test_limits_for_tests_come_and_go():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with limited_memory(1 << 42, limit="data") as bound:
        assert resource.getrlimit(resource.RLIMIT_DATA)[0] == bound
        reading = read_memory(torch.device("cpu"))
        assert reading.total <= bound
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
