"""What a call does beside the forward pass, in whole numbers: ``python -m benchmarks.counts [--write]``.

Times depend on the machine and on who else is on it; these figures do not, so a change that makes a call do more is
seen on any machine. They are held against benchmarks/results/counts.json: exit status 1 if one differs, which
``--write`` accepts. A test compares them too.

``planned_...`` is what `jactri.explain` predicts. The others count the operations that torch was given in one call:
``ops`` that compute something, each about one kernel launch; ``bytes_moved`` by them; the ``allocations`` of new
memory; ``flops`` of those ops that torch can count (products), left out where there are none.

The second table is of the inputs of `benchmarks.worst` at small sizes, the function's own run included: ``naive_...``
is what is written without jactri, ``node_calls`` are calls of nodes of autograd's graph, one a block of cotangents,
``peak_bytes`` the most that ops had allocated at one time.

The third table is of the GPU workloads, counted without a GPU, see `benchmarks.gpu.traffic`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import jactri
from jactri._src.base import backends
from jactri._src.base.memory import Taken
from jactri._src.read.opaque import OpaqueCall

from .workloads import ALL, Workload
from .worst_cases import CASES, Case

FILE = Path(__file__).parent / "results" / "counts.json"
FIGURES = (
    "planned_flops", "planned_bytes", "planned_peak_bytes",
    "ops", "bytes_moved", "allocations", "allocated_bytes", "flops",
)  # fmt: skip
PLANNED = FIGURES[:3]
OF_CASES = (
    *FIGURES[3:7], "node_calls", "peak_bytes", "naive_ops", "naive_bytes_moved", "naive_peak_bytes",
)  # fmt: skip
ON_GPU = ("ops", "bytes_moved", "launches", "launch_bytes")

SAMPLES = {"square": 100}  # of 10^4: its inputs alone would take 1.2 GB to draw
WORKLOADS = tuple(
    replace(w, samples=SAMPLES.get(w.name, w.samples)) for w in ALL if w.operator is None
)

LIMIT = 1 << 40  # without one, chunks depend on how much memory is free now

aten = torch.ops.aten
OVERWRITES = {aten.copy_, aten.fill_, aten.zero_}  # in place, and what was there is not read

Counts = dict[str, int]


class Counter(TorchDispatchMode):
    """Counts the operations that torch is given while ``on``."""

    def __init__(self) -> None:
        super().__init__()
        self.on = True
        self.counts = dict.fromkeys(FIGURES[3:7], 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operation and count it."""
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and not isinstance(args[0], Tensor):
            return args[0]  # torch hands a number that it wrapped itself over as the number
        result = func(*args, **kwargs)
        if self.on:
            self._count(func, args, kwargs, result)
        return result

    def _count(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        if func.namespace == "jactri":
            return  # a kernel of our own: `gpu.traffic` counts launches
        counts, name = self.counts, func.overloadpacket.__name__
        given = _tensors((args, kwargs))
        held = {_storage(t) for t in given}
        made = [t for t in _tensors(result) if _storage(t) not in held]
        new = {_storage(t): t.untyped_storage().nbytes() for t in made}
        counts["allocations"] += sum(map(bool, new.values()))
        counts["allocated_bytes"] += sum(new.values())
        if name.startswith(("empty", "new_empty")) or torch.Tag.inplace_view in func.tags:
            return  # memory as it comes, or another view of it: nothing runs
        changed, lost = _written(func, args, kwargs)
        if not made and not changed:
            return
        if name.startswith("new_") or name.endswith("_like"):
            given = []  # only their shape is looked at
        unread = {region(t) for t in lost}
        read = {region(t): extent(t) for t in given if region(t) not in unread}
        wrote = {region(t): extent(t) for t in (*made, *changed)}
        counts["ops"] += 1
        counts["bytes_moved"] += sum(read.values()) + sum(wrote.values())


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _written(func: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The arguments that an operation writes to, and those of them that it does not read."""
    changed, lost, operands = [], [], set()
    for i, a in enumerate(func._schema.arguments):
        found = _tensors(args[i] if i < len(args) else kwargs.get(a.name))
        if a.alias_info is None or not a.alias_info.is_write:
            operands.update(map(region, found))
            continue
        changed += found
        if a.is_out:  # it may be an operand too, and follows them
            lost += [t for t in found if region(t) not in operands]
        elif func.overloadpacket in OVERWRITES:
            lost += found
    return changed, lost


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def region(t: Tensor) -> tuple:
    """What makes two tensors the same entries of the same memory."""
    return _storage(t), t.storage_offset(), t.shape, t.stride()


def extent(t: Tensor) -> int:
    """Bytes of the different entries behind a tensor: expanded axes and overlapping windows count once."""
    if not t.numel():
        return 0
    axes = [(n, s) for n, s in zip(t.shape, t.stride(), strict=True) if s]
    entries = math.prod(n for n, _ in axes)
    return t.itemsize * min(entries, 1 + sum((n - 1) * s for n, s in axes))


@contextlib.contextmanager
def untimed() -> Iterator[None]:
    """Products go to torch.mm: which of two ways runs is otherwise decided by timing them."""
    before, backends._probe = backends._probe, backends.Probe(None, None, "not timed for counts")
    try:
        yield
    finally:
        backends._probe = before


def counted(call: Callable[[Callable], Any], net: nn.Module) -> Counts:
    """What ``call(func)`` does beside ``func``, which is the network."""
    inside = 0
    with FlopCounterMode(display=False) as flops, Counter() as counter:

        def forward(x: Tensor) -> Tensor:
            nonlocal inside
            counter.on, before = False, flops.get_total_flops()
            try:
                return net(x)
            finally:
                counter.on = True
                inside += flops.get_total_flops() - before

        call(forward)
    products = flops.get_total_flops() - inside
    return {**counter.counts, **({"flops": products} if products else {})}


def measure(workload: Workload) -> Counts:
    """All figures of one workload."""
    net = workload.build()
    x = workload.draw(net)
    options = {"per_sample": not workload.full, "memory_limit": LIMIT}

    def call(func: Callable) -> Any:
        return jactri.jacobian(func, x, **options)

    with untimed():
        plan = jactri.explain(net, x, **options)
        planned = (plan.flops, plan.bytes, plan.peak_bytes)
        call(net)  # what happens once a process is not part of a call
        return {**dict(zip(PLANNED, map(int, planned), strict=True)), **counted(call, net)}


@contextlib.contextmanager
def node_calls() -> Iterator[list[int]]:
    """A list of one number: how often jactri has called a node by itself."""
    plain, found = OpaqueCall.edges, [0]

    def edges(self: OpaqueCall, grads: tuple) -> tuple:
        found[0] += 1
        return plain(self, grads)

    OpaqueCall.edges = edges
    try:
        yield found
    finally:
        OpaqueCall.edges = plain


def measure_case(case: Case) -> Counts:
    """All figures of an input of `benchmarks.worst`, at its small sizes and at a call that is not the first."""
    given = case.given(quick=True)
    (naive, *_) = given.peers.values()
    with untimed():
        given.ours(LIMIT)
        with node_calls() as calls, Counter() as ours:
            given.ours(LIMIT)
        naive()
        with Counter() as other:
            naive()
        mine, theirs = _peak(lambda: given.ours(LIMIT)), _peak(naive)
    found = {**ours.counts, "node_calls": calls[0], "peak_bytes": mine}
    found |= {f"naive_{n}": other.counts[n] for n in ("ops", "bytes_moved")}
    return {**found, "naive_peak_bytes": theirs}


def _peak(call: Callable[[], Any]) -> int:
    """The most bytes that torch's ops had allocated at one time; cycles are not collected meanwhile."""
    gc.collect()
    gc.disable()
    try:
        with Taken() as taken:
            call()
        return taken.peak
    finally:
        gc.enable()


def traffic(names: Iterable[str] = ()) -> dict[str, Counts]:
    """`gpu.traffic` of workloads (default: all), in a process of its own, which it patches."""
    made = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"{__package__}.gpu.traffic", *names],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(made.stdout)


def version() -> str:
    """torch's version without the build: a torch for CUDA gives the CPU the same operations."""
    return torch.__version__.split("+")[0]


def changes(found: Counts, kept: Counts, figures: Iterable[str] = FIGURES) -> dict[str, str]:
    """The figures that differ, each with how."""
    differ = {}
    for name in figures:
        new, old = found.get(name), kept.get(name)
        if new != old:
            both = new is not None and old is not None
            differ[name] = f"{new - old:+,}" if both else f"was {_text(old)}"
    return differ


def moved(
    found: dict[str, Counts],
    kept: dict[str, Any],
    part: str = "gpu",
    figures: Iterable[str] = ON_GPU,
) -> dict[str, dict[str, str]]:
    """What differs from a part of a file that holds no plans, by row; nothing if another torch wrote it."""
    if kept.get("torch") != version():
        return {}
    rows = kept.get(part, {})
    differ = {n: changes(f, rows.get(n, {}), figures) for n, f in found.items()}
    return {n: d for n, d in differ.items() if d}


def comparable(kept: dict[str, Any]) -> tuple[str, ...]:
    """The figures that can be held against a file: another torch may run other ops for the same call."""
    return FIGURES if kept.get("torch") == version() else PLANNED


def _text(figure: int | None) -> str:
    return "-" if figure is None else f"{figure:,}"


def table(
    found: dict[str, Counts], differ: dict[str, dict[str, str]], columns: Iterable[str] = FIGURES
) -> str:
    """A row a workload, differences in brackets."""
    rows = [("", *(f.replace("_", " ") for f in columns))]
    for name, figures in found.items():
        how = differ.get(name, {})
        cells = (_text(figures.get(f)) + (f" ({how[f]})" if f in how else "") for f in columns)
        rows.append((name, *cells))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 1 if a figure is not the file's."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counts", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"rewrite {FILE.name}")
    options = parser.parse_args(arguments)
    kept = json.loads(FILE.read_text()) if FILE.exists() else {"torch": version(), "workloads": {}}
    found = {w.name: measure(w) for w in WORKLOADS}
    against = comparable(kept)
    differ = {n: changes(f, kept["workloads"].get(n, {}), against) for n, f in found.items()}
    print(table(found, differ))
    if against == PLANNED:
        print(f"counted with torch {version()}, {FILE.name} with {kept['torch']}: plans compared")
    cases = {c.name: measure_case(c) for c in CASES}
    differ_of_cases = moved(cases, kept, "worst", OF_CASES)
    print(f"\n{table(cases, differ_of_cases, OF_CASES)}")
    on_gpu = traffic()
    differ_on_gpu = moved(on_gpu, kept)
    print(f"\n{table(on_gpu, differ_on_gpu, ON_GPU)}")
    gone = [n for n in kept["workloads"] if n not in found]
    gone += [n for n in kept.get("worst", {}) if n not in cases]
    gone += [n for n in kept.get("gpu", {}) if n not in on_gpu]
    if gone:
        print(f"in {FILE.name} only: {', '.join(gone)}")
    if options.write:
        data = {"torch": version(), "workloads": found, "worst": cases, "gpu": on_gpu}
        FILE.write_text(json.dumps(data, indent=1) + "\n")
        return 0
    return 1 if gone or differ_of_cases or differ_on_gpu or any(differ.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
