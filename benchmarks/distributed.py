"""What ranks save, and what they cost: ``python -m benchmarks.distributed [--flops F] [--link B] [--latency S]``.

Four workloads run here by 1 and by 2 processes of gloo on the CPU, a thread each; every answer is held against that of
a rank alone. Of each rank its flops are counted, and the calls and bytes of its collectives. From these counts a model
tells of many cards that share one problem (strong scaling), of the size that was run and of ``--larger`` times that:

    seconds(n) = host + (own + shared / n) / F + latencies(n) S + bytes(n) / B

``F`` are the flops of a card in a second, ``B`` the bytes that its link takes in a second, ``S`` a latency: arguments,
not measured. ``own`` are the flops that every rank does, ``shared`` those that are dealt out, as both follow from the
counts of 1 and 2 ranks. The host's time, to read, plan and launch, is that of the same call on a tiny problem, measured
here. No card was asked: what is printed of cards is this formula. Exit status 1 if an answer was wrong.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil, log2
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import jactri

from . import machine, timing
from .record import Record

CARDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
TOLERANCE = 1e-12
HALF = 0.5
"""The efficiency below which a workload is said to have stopped scaling."""


@dataclass(frozen=True)
class Workload:
    """A call of a network with ``width`` units, on ``samples`` points.

    ``call``: of a network, points and a mesh; its answer is a DTensor, or the same on all ranks.
    """

    name: str
    what: str
    width: int
    samples: int
    call: Callable[[nn.Module, Tensor, Any], Any]
    sharded: bool
    """Whether points are dealt out to ranks, before the call."""


def _seeds(net: nn.Module, x: Tensor, mesh: Any) -> Tensor:
    return jactri.jacobian(net, x, mesh=mesh)


def _blocks(net: nn.Module, x: Tensor, mesh: Any) -> Tensor:
    return jactri.jacobian(net, x, per_sample=True)


def _sums(net: nn.Module, x: Tensor, mesh: Any) -> Tensor:
    G = jactri.ggn(net, x, lambda block: block)
    v = {name: torch.ones_like(p) for name, p in net.named_parameters()}
    return torch.cat([t.flatten() for t in (G @ v).values()])


def _kernel(net: nn.Module, x: Tensor, mesh: Any) -> Tensor:
    return jactri.empirical_ntk(net, x, compute="trace")


WORKLOADS = [
    Workload("seeds", "one Jacobian, its rows by rank (mesh=)", 384, 1, _seeds, False),
    Workload("samples", "blocks of samples by rank (a DTensor)", 96, 256, _blocks, True),
    Workload("sums", "a GGN times a vector (all_reduce)", 256, 256, _sums, True),
    Workload("kernel", "an empirical NTK in tiles (a ring)", 128, 128, _kernel, True),
]


def problem(w: Workload, smaller: int = 1) -> tuple[nn.Module, Tensor]:
    """The network and the points, the same in every process; widths divided by ``smaller``."""
    torch.manual_seed(0)
    n = max(4, w.width // smaller)
    net = nn.Sequential(nn.Linear(n, n), nn.Tanh(), nn.Linear(n, n), nn.Tanh(), nn.Linear(n, n - 1))
    net = net.double()
    many = w.samples if w.samples == 1 else max(4, w.samples // smaller)
    return net, torch.randn(many, n, dtype=torch.float64)[0 if w.samples == 1 else slice(None)]


# -- one rank ----------------------------------------------------------------------------------------


class Sent(TorchDispatchMode):
    """The calls and bytes of collectives, by name: of what this rank puts in."""

    def __init__(self):
        super().__init__()
        self.found: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in func.namespace:
            kind = func._schema.name.split("::")[1].replace("_", "")
            name = next((k for k in ("allgather", "allreduce", "send") if kind.startswith(k)), None)
            if name is not None:
                # a gather that is given tensors for its results names them first
                given = args[1] if kind == "allgather" and len(args) > 1 else args[0]
                sent = self.found.setdefault(name, [0, 0])
                sent[0] += 1
                sent[1] += sum(t.nbytes for t in _tensors(given))
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, (list, tuple)) else []


def run_rank(rank: int, ranks: int, folder: str, smaller: int, repeats: int) -> None:
    """All workloads on one rank; what it found goes to a file of ``folder``."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), ranks)
    wait = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=wait)
    mesh = init_device_mesh("cpu", (ranks,))
    found = {}
    for w in WORKLOADS:
        net, x = problem(w, smaller)
        given = distribute_tensor(x, mesh, [Shard(0)]) if w.sharded else x
        w.call(net, given, mesh)  # the first call of a process may measure the machine
        with FlopCounterMode(display=False) as flops, Sent() as sent:
            answer = w.call(net, given, mesh)
        whole = w.call(net, x, None)
        mine = answer.full_tensor() if hasattr(answer, "full_tensor") else answer
        times = []
        for _ in range(repeats):
            dist.barrier()
            times.append(timing.once(lambda: w.call(net, given, mesh))[0])  # noqa: B023
        found[w.name] = {
            "flops": flops.get_total_flops(),
            "sent": sent.found,
            "error": float((mine - whole).abs().max() / whole.abs().max()),
            "seconds": statistics.median(times),
        }
    dist.destroy_process_group()
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


def measured(ranks: int, smaller: int, repeats: int) -> dict[str, list[dict[str, Any]]]:
    """By workload, what each of some ranks found."""
    with tempfile.TemporaryDirectory() as folder:
        given = ranks, folder, smaller, repeats
        torch.multiprocessing.spawn(run_rank, given, nprocs=ranks)
        each = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]
    return {w.name: [found[w.name] for found in each] for w in WORKLOADS}


# -- the model ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    """Of one problem: flops that every rank does, those that are dealt out, and what goes from rank to rank."""

    own: float
    shared: float
    calls: dict[str, float]
    sent: dict[str, float]
    """Bytes: of the answer of an all_reduce, of all that goes round, of what a rank puts into an all_gather."""

    @classmethod
    def of(cls, one: list[dict[str, Any]], two: list[dict[str, Any]]) -> Counts:
        """From what 1 and 2 ranks found."""
        alone, most = one[0]["flops"], max(r["flops"] for r in two)
        shared = min(alone, max(0.0, 2.0 * (alone - most)))
        sent = two[0]["sent"]
        return cls(
            alone - shared, shared, {k: v[0] for k, v in sent.items()},
            # of two ranks, each sends its half of what goes round
            {k: v[1] * (2 if k == "send" else 1) for k, v in sent.items()},
        )  # fmt: skip

    def grown(self, half: Counts, times: float) -> Counts:
        """Of a problem so many times as large, from one of half the size: by the powers that the counts have."""

        def more(a: float, b: float) -> float:
            return a * times ** log2(a / b) if a > 0 and b > 0 else a

        return Counts(
            more(self.own, half.own), more(self.shared, half.shared), self.calls,
            {k: more(v, half.sent.get(k, 0)) for k, v in self.sent.items()},
        )  # fmt: skip


@dataclass(frozen=True)
class Card:
    """Rates of a card and its link, and the seconds of the host's part of a call."""

    flops: float
    link: float
    latency: float
    host: float


def predicted(counts: Counts, card: Card, n: int) -> dict[str, float]:
    """The seconds of a call on n cards, by what takes them."""
    made = {"host": card.host, "arithmetic": (counts.own + counts.shared / n) / card.flops}
    waits = moved = 0.0
    hops = ceil(log2(n)) if n > 1 else 0
    for name, size in counts.sent.items():
        calls = counts.calls[name]
        if name == "allreduce":  # a ring for the bytes, a tree for the latency
            waits += 2 * hops * calls
            moved += 2 * (n - 1) / n * size
        elif name == "send":  # tiles: all but a rank's own come by
            waits += n - 1
            moved += (n - 1) / n * size
        else:
            waits += hops * calls
            moved += (n - 1) * size
    return made | {"latency": waits * card.latency, "link": moved / card.link}


def model(counts: Counts, card: Card) -> Iterator[dict[str, Any]]:
    """By number of cards: seconds, efficiency, and what takes the most but for arithmetic."""
    alone = sum(predicted(counts, card, 1).values())
    for n in CARDS:
        parts = predicted(counts, card, n)
        total = sum(parts.values())
        rest = {k: v for k, v in parts.items() if k != "arithmetic"}
        rest["arithmetic of every rank"] = counts.own / card.flops
        yield {
            "cards": n, "seconds": total, "efficiency": alone / total / n, "parts": parts,
            "limit": max(rest, key=lambda k: rest[k]),
        }  # fmt: skip


def verdict(rows: list[dict[str, Any]]) -> str:
    """Where a workload stops scaling, and why."""
    for row in rows:
        if row["efficiency"] < HALF:
            limit = row["limit"]
            spent = row["parts"].get(limit, row["parts"]["arithmetic"])
            said = f"{limit}, {spent * 1e3:.3g} of {row['seconds'] * 1e3:.3g} ms"
            return f"below {HALF:.0%} from {row['cards']} cards on: {said}"
    return f"above {HALF:.0%} to {rows[-1]['cards']} cards"


# -- the command -------------------------------------------------------------------------------------


def told(sent: dict[str, list[int]]) -> str:
    """What a rank sent, in words."""
    return ", ".join(f"{c} {name} of {b} B" for name, (c, b) in sent.items()) or "nothing"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distributed", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--flops", type=float, default=3e13, help="of a card in a second (default: %(default).0e)"
    )
    parser.add_argument(
        "--link", type=float, default=4e11, help="bytes in a second (default: %(default).0e)"
    )
    parser.add_argument(
        "--latency", type=float, default=2e-5, help="seconds of a message (default: %(default).0e)"
    )
    parser.add_argument(
        "--larger", type=float, default=16.0, help="times the size (default: %(default).0f)"
    )
    parser.add_argument(
        "--smaller", type=int, default=1, help="run sizes divided by this (default: 1)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="of each call (default: 5)")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 1 if an answer was wrong."""
    options = parse(arguments)
    rates = {"flops": options.flops, "link": options.link, "latency": options.latency}
    about = {
        "kind": "distributed",
        "machine": machine.description(),
        "rates": rates,
        "larger": options.larger,
    }
    record = Record(options.json, float("inf"), **about)
    small = options.smaller
    one, two = measured(1, small, options.repeats), measured(2, small, options.repeats)
    tiny = measured(1, 64 * small, options.repeats)
    half = [measured(n, 2 * small, 1) for n in (1, 2)]
    for w in WORKLOADS:
        a, b = one[w.name], two[w.name]
        wrong = [r["error"] for r in (*a, *b) if not r["error"] <= TOLERANCE]
        print(f"\n{w.name}: {w.what}")
        if wrong:
            record.failed(w.name, f"an error of {wrong[0]:.1e} against one process")
            continue
        for found in (a, b):
            r = max(found, key=lambda r: r["flops"])
            took = f"{r['seconds'] * 1e3:.3g} ms here"
            print(f"  {len(found)} ranks: {r['flops']:.4g} flops a rank, {told(r['sent'])}, {took}")
        counts = Counts.of(a, b)
        grown = counts.grown(Counts.of(*(h[w.name] for h in half)), options.larger)
        card = Card(**rates, host=tiny[w.name][0]["seconds"])
        models = {}
        for name, these in (
            ("as it was run", counts),
            (f"{options.larger:g} times as large", grown),
        ):
            rows = models[name] = list(model(these, card))
            print(f"  {name}: {these.own:.3g} + {these.shared:.3g} / n flops; {verdict(rows)}")
            print("    cards       " + "".join(f"{r['cards']:>9}" for r in rows))
            print("    ms          " + "".join(f"{r['seconds'] * 1e3:>9.3g}" for r in rows))
            print("    efficiency  " + "".join(f"{r['efficiency']:>9.0%}" for r in rows))
        record.add({"workload": w.name, "one": a, "two": b, "host": card.host, "model": models})
    return record.close()


if __name__ == "__main__":
    sys.exit(main())
