"""jactri and its peers at equal precision, each checked against float64 before it is timed; kernels by time."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import jactri
from jactri._src.device import chooser

from ..peers import BY_OPERATOR, JACTRI_COMPILE, OWN, TORCH, Peer, compiled
from ..record import Record
from ..timing import Spread
from ..workloads import Workload
from .device import SETTINGS, Device, precision
from .sizes import Sized, bound_ms, distance, problem, truth

ALLOWED = {"ieee": 1e-5, "tf32": 1e-2}
"""Relative error of a result that may be timed; its own error is in the record."""

ROUNDS, SECONDS = 12, 1.5
"""Rounds of timing, fewer (three at least) where the calls have taken so many seconds."""
LAUNCH_BOUND_MS = 1.0
"""Below this a call is bound by the host's launches: a peer's CUDA graph is timed too."""
PROFILED = 3
"""Calls of which the kernels are added up."""


def own(backend: str) -> Peer:
    """jactri with a backend as a contender."""

    def make(w: Workload, net: nn.Module) -> Callable[[Tensor], Any]:
        if w.operator is not None:
            return lambda x: w.operator.jactri(net, x, backend=backend)
        return lambda x: jactri.jacobian(net, x, per_sample=True, backend=backend)

    return Peer(f"jactri {backend}", "jactri", make)


AUTO = own("auto")


def rivals(w: Workload) -> list[Peer]:
    """The best-known peers: of torch.func, for Jacobians those with the fewer seeds (both, where about equal)."""
    if w.operator is not None:
        return [p for p in BY_OPERATOR[w.operator] if p.func][:3]
    forward = w.columns <= 2 * w.rows, "forward"
    reverse = w.rows <= 2 * w.columns, "reverse"
    modes = [mode for fits, mode in (forward, reverse) if fits]
    return [p for p in TORCH if p.func and p.mode in modes and not p.left_out(w)]


def run(device: Device, record: Record, size: Sized, card: dict[str, float]) -> None:
    """At each precision: the plain call, `compile`, the peers, CUDA graphs, kernels. What is compiled by torch is not
    among them, see `against_compiled`."""
    w = size.workload
    mine = JACTRI_COMPILE if w.operator is None else OWN[1]
    _each(device, record, size, card, lambda setting: [AUTO, mine, *rivals(w)])


def against_compiled(
    device: Device, record: Record, size: Sized, card: dict[str, float], rows: list[dict[str, Any]]
) -> None:
    """The plain call beside the best peer under torch.compile: the fastest in ``rows`` of `run`, else the first."""
    able = {p.name: p for p in rivals(size.workload)}
    times = {
        r["setting"]: {n: f["ms"]["median"] for n, f in r["contenders"].items() if n in able and "ms" in f}
        for r in rows
    }  # fmt: skip

    def peers(setting: str) -> list[Peer]:
        known = times.get(setting)
        return [
            AUTO,
            compiled(able[min(known, key=known.get)] if known else next(iter(able.values()))),
        ]

    _each(device, record, size, card, peers)


def _each(device: Device, record: Record, size: Sized, card, peers) -> None:
    for setting in SETTINGS:
        if not record.has_time(setting, 3):
            continue
        with precision(setting):
            contest = Contest(device, record, size, setting, bound_ms(size.workload, card, setting))
            for peer in peers(setting):
                contest.add(peer)
            contest.time()
        record.add(contest.summary())
        record.data["line"] = "; ".join(map(_line, record.data["results"]))
        device.release()


class Contest:
    """The contenders of one workload at one setting: those that are right, and what is known of all."""

    def __init__(self, device: Device, record: Record, size: Sized, setting: str, least: float):
        self.device, self.record, self.size, self.setting = device, record, size, setting
        self.w, self.least = size.workload, least
        self.net, self.x = problem(self.w, device.device)
        self.want = truth(self.w, self.net, self.x, min(self.w.samples, 8))
        self.calls: dict[str, Callable[[], Any]] = {}
        self.facts: dict[str, dict[str, Any]] = {}

    def add(self, peer: Peer) -> None:
        """Run a contender once and hold the result against float64."""
        fact = self.facts[peer.name] = {"kind": peer.kind}
        try:
            call = peer.make(self.w, self.net)
            fact["error"] = distance(call(self.x), self.want, self.w.operator)
            if not fact["error"] <= ALLOWED[self.setting]:
                raise AssertionError(
                    f"off by {fact['error']:.1e}, {ALLOWED[self.setting]:.0e} allowed"
                )
            self.calls[peer.name] = lambda: call(self.x)
        except Exception as error:  # any contender may fail in any way: the others go on
            self._failed(peer.name, "failed", error)
            self.record.failed(f"{self.setting} {peer.name}", error)
        finally:
            self.device.release()

    def time(self) -> None:
        """Milliseconds of all, in shuffled rounds; then their kernels; then CUDA graphs, as far as they go."""
        for name, samples in _interleave(self.device, self.calls).items():
            self.facts[name]["ms"] = asdict(Spread.of(samples))
        for name, call in self.calls.items():
            fact = self.facts[name]
            try:
                kernels = kernels_of(self.device, call)
            except (
                Exception
            ) as error:  # a profiler that does not work here costs its own figures only
                self._failed(name, "kernels_failed", error)
                continue
            fact["kernel_ms"] = sum(k["us"] for k in kernels) / 1e3
            fact["launches"] = sum(k["count"] for k in kernels)
            fact["kernels"] = kernels[:8]
        for name, call in self.calls.items():
            if name == AUTO.name or self.facts[name]["ms"]["median"] < LAUNCH_BOUND_MS:
                self.facts[name]["graph"] = _graph(self.device, call)

    def _failed(self, name: str, key: str, error: Exception) -> None:
        self.facts[name][key] = f"{type(error).__name__}: {error}"[:500]

    def summary(self) -> dict[str, Any]:
        """The contest as plain data: for a file."""
        w, goal = self.w, {"share": self.size.share, "ratio": self.size.ratio[self.setting]}
        timed = {n: f["ms"]["median"] for n, f in self.facts.items() if "ms" in f}
        peers = {n: ms for n, ms in timed.items() if self.facts[n]["kind"] != "jactri"}
        found: dict[str, Any] = {
            "workload": self.size.name, "title": w.title, "shape": w.shape, "setting": self.setting,
            "least_ms": self.least, "least_flops": w.flops, "least_bytes": w.bytes,
            "contenders": self.facts, "goal": goal, "ways": chooser.chosen(),
        }  # fmt: skip
        if AUTO.name in timed and peers:
            peer, mine = min(peers, key=peers.get), timed[AUTO.name]
            found["best"] = {
                "own_ms": mine, "peer": peer, "peer_ms": peers[peer],
                "ratio": peers[peer] / mine, "share": self.least / mine,
            }  # fmt: skip
        return found


def _interleave(device: Device, calls) -> dict[str, list[float]]:
    """Milliseconds of each call over shuffled rounds."""
    times: dict[str, list[float]] = {n: [] for n in calls}
    order, spent = random.Random(0), 0.0
    for call in calls.values():
        call()
    for r in range(ROUNDS):
        if r >= 3 and spent > 1e3 * SECONDS:
            break
        names = list(calls)
        order.shuffle(names)
        for name in names:
            times[name].append(device.milliseconds(calls[name]))
            spent += times[name][-1]
    return times


def _graph(device: Device, call) -> dict[str, Any]:
    """Times of replays, or why there is no graph."""
    try:
        replay = device.graph(call)
    except Exception as error:  # what cannot be captured says so in many ways
        return {"failed": f"{type(error).__name__}: {error}"[:300]}
    replay()
    return asdict(Spread.of([device.milliseconds(replay) for _ in range(ROUNDS)]))


def kernels_of(device: Device, call: Callable[[], Any]) -> list[dict[str, Any]]:
    """The kernels of a call by the profiler, the longest first: name, microseconds and launches a call."""
    on_device = device.name == "cuda"
    activities = [ProfilerActivity.CUDA if on_device else ProfilerActivity.CPU]
    device.synchronize()
    with profile(activities=activities) as taken:
        for _ in range(PROFILED):
            call()
        device.synchronize()
    found = []
    for event in taken.key_averages():
        us = event.self_device_time_total if on_device else event.self_cpu_time_total
        if us > 0 and (not on_device or str(event.device_type).endswith("CUDA")):
            found.append(
                {"name": event.key[:120], "us": us / PROFILED, "count": event.count / PROFILED}
            )
    return sorted(found, key=lambda k: -k["us"])


def _line(r: dict[str, Any]) -> str:
    own = r["contenders"].get(AUTO.name, {})
    text = f"{r['setting']} bound {r['least_ms']:.3g} ms"
    if "kernel_ms" in own:
        text += f", kernels {own['kernel_ms']:.3g} ({r['least_ms'] / own['kernel_ms']:.0%})"
    if "best" not in r:
        return text + ", nothing to compare"
    b = r["best"]
    return (
        text + f", call {b['own_ms']:.3g}, {b['peer']} {b['peer_ms']:.3g}: {b['ratio']:.2g} times"
    )
