"""What the system lets a process take: of the machine, of control groups, of ``ulimit``; no call goes beyond it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jactri._src.base import free

MB = 10**6


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Writes files of a system: 1 GB available, and what a test adds."""
    monkeypatch.setattr(free, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(free, "_GROUPS", tmp_path / "groups")

    def write(**files):
        for name, text in {
            "proc/meminfo": "MemTotal: 2000000 kB\nMemAvailable: 1000000 kB\n",
            **files,
        }.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(text))
        return free.free_on_host()

    return write


def group(at, most, used, cache=0, version=2):
    """The files of one control group."""
    if version == 2:
        files = {"memory.max": most, "memory.current": used}
        stat = f"anon 1\ninactive_file {cache}\nactive_file 0\n"
    else:
        files = {"memory.limit_in_bytes": most, "memory.usage_in_bytes": used}
        stat = f"cache 7\ninactive_file 0\ntotal_inactive_file {cache}\ntotal_active_file 0\n"
    return {f"groups/{at}/{name}": text for name, text in {**files, "memory.stat": stat}.items()}


def test_of_the_machine(system):
    assert system() == 1024 * MB


V2, V1 = {"proc/self/cgroup": "0::/a/b\n"}, {"proc/self/cgroup": "9:cpu:/\n4:memory:/a/b\n0::/\n"}
GROUPS = {
    "its own": ({**V2, **group("a/b", 300 * MB, 100 * MB)}, 200 * MB),
    "files in memory give way": ({**V2, **group("a/b", 300 * MB, 100 * MB, 40 * MB)}, 240 * MB),
    "one around it": ({**V2, **group("a/b", "max", 100 * MB), **group("a", 500 * MB, 400 * MB)}, 100 * MB),
    "in a container": ({"proc/self/cgroup": "0::/\n", **group(".", 300 * MB, 50 * MB)}, 250 * MB),
    "a path that is not there": ({**V2, **group(".", 300 * MB, 50 * MB)}, 250 * MB),
    "beside version 1": ({**V1, "proc/self/cgroup": "0::/a\n", **group("unified/a", 90 * MB, 0)}, 90 * MB),
    "throttled": ({**V2, **group("a/b", "max", 0), "groups/a/b/memory.high": 80 * MB}, 80 * MB),
    "version 1": ({**V1, **group("memory/a/b", 300 * MB, 100 * MB, 40 * MB, 1)}, 240 * MB),
    "version 1, in a container": ({**V1, **group("memory", 300 * MB, 100 * MB, 0, 1)}, 200 * MB),
    "no bound": ({**V1, **group("memory", 9223372036854771712, 100 * MB, 0, 1)}, 1024 * MB),
    "above it": ({**V2, **group("a/b", 100 * MB, 120 * MB)}, 0),
    "not to be read": ({**V2, "groups/a/b/memory.max": 100}, 1024 * MB),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
def test_of_control_groups(system, name):
    files, want = GROUPS[name]
    assert system(**files) == want


def test_of_the_process(system, monkeypatch):
    import resource

    limits = {resource.RLIMIT_AS: 900 * MB, resource.RLIMIT_DATA: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], resource.RLIM_INFINITY))
    page = resource.getpagesize()
    statm = {"proc/self/statm": "1000 900 80 7 0 500 0\n"}
    assert system(**statm) == 900 * MB - 1000 * page
    limits[resource.RLIMIT_DATA] = 600 * MB
    assert system(**statm) == 600 * MB - 500 * page


CALLS = """
import json, resource, sys
import torch
import jactri
from jactri._src.base.memory import MemoryLimitTooSmall

torch.set_num_threads(1)
net = torch.nn.Sequential(torch.nn.Linear(32, 1024), torch.nn.Tanh(), torch.nn.Linear(1024, 32))
square = torch.nn.Sequential(torch.nn.Linear(8, 2048), torch.nn.Tanh(), torch.nn.Linear(2048, 1))
mixed = lambda v: (net(v) + 1j).abs()  # computed as a whole
sums = lambda v: net(v).cumsum(0)

def parameters(n):
    return jactri.parameter_jacobian(net, torch.randn(n, 32))

calls = {
    "jacobian": lambda n: jactri.jacobian(net, torch.randn(n, 32)),
    "per_sample": lambda n: jactri.jacobian(net, torch.randn(n, 32), per_sample=True),
    "forward": lambda n: jactri.jacobian(net, torch.randn(n, 32), per_sample=True, strategy="forward-mode"),
    "whole": lambda n: jactri.jacobian(mixed, torch.randn(n, 32)),
    "mixing": lambda n: jactri.jacobian(sums, torch.randn(n, 32)),
    "jacrev": lambda n: jactri.func.jacrev(net)(torch.randn(n, 32)),
    "hessian": lambda n: jactri.func.hessian(lambda v: net(v).square().sum())(torch.randn(n, 32)),
    "jtj": lambda n: jactri.jtj(net, torch.randn(n, 32)),
    "jjt": lambda n: jactri.jjt(net, torch.randn(n, 32), per_sample=True),
    "jvp": lambda n: jactri.jvp(net, torch.randn(n, 32), torch.randn(64, n, 32)),
    "vjp": lambda n: jactri.vjp(net, torch.randn(n, 32), torch.randn(64, n, 32)),
    "gradient": lambda n: jactri.gradient(net, torch.randn(n, 32)),
    "divergence": lambda n: jactri.divergence(net, torch.randn(n, 32)),
    "diagonal": lambda n: jactri.diagonal(net, torch.randn(n, 32)),
    "laplacian": lambda n: jactri.laplacian(square, torch.randn(n, 8)),
    "finite_difference": lambda n: jactri.finite_difference(net, torch.randn(n, 32), per_sample=True),
    "dense": lambda n: parameters(n).dense(),
    "gram": lambda n: parameters(n).gram(),
    "ntk": lambda n: jactri.empirical_ntk(net, torch.randn(n, 32)),
    "ggn": lambda n: jactri.ggn(net, torch.randn(n, 32), torch.ones(n, 32)).diagonal(),
}
for call in calls.values():
    call(2)
with open("/proc/self/statm") as pages:
    taken = int(pages.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + int(sys.argv[1]), resource.RLIM_INFINITY))
found = {}
for name, call in calls.items():
    for n in map(int, sys.argv[2:]):
        try:
            call(n)
            found[f"{name} of {n}"] = "answered"
        except MemoryLimitTooSmall:
            found[f"{name} of {n}"] = "refused"
        except (RuntimeError, MemoryError) as error:
            found[f"{name} of {n}"] = str(error)
print(json.dumps(found))
"""


def run(*words, before=None):
    """What became of each call, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CALLS, *map(str, words)],
        capture_output=True, text=True, timeout=300, preexec_fn=before,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="limits as Linux has them")
def test_no_call_goes_beyond_an_address_space():
    """Each is answered where 300 MB are left, in parts if need be, or refused."""
    found = run(300 * MB, 64, 1024)
    assert {k: v for k, v in found.items() if v not in ("answered", "refused")} == {}
    refused = [k for k, v in found.items() if v == "refused"]
    assert [k for k in refused if k.endswith(" of 64")] == ["dense of 64"]  # 550 MB
    assert 3 < len(refused) < 12


@pytest.fixture
def group_of_700_mb():
    """A control group, where one may be made; gives the file by which a process enters it."""
    mine = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    path = next((path for _, controllers, path in mine if controllers == "memory"), None)
    if path is None:
        pytest.skip("no control groups of version 1")
    group = Path("/sys/fs/cgroup/memory") / path.lstrip("/") / f"jactri-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error}")
    try:
        (group / "memory.limit_in_bytes").write_text(str(700 * MB))
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


def test_no_call_is_killed_in_a_control_group(group_of_700_mb):
    found = run(1 << 46, 64, 1024, before=lambda: group_of_700_mb.write_text(str(os.getpid())))
    assert set(found.values()) == {"answered", "refused"}
    assert found["jacobian of 1024"] == "refused"  # 4.3 GB
