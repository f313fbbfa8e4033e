"""``bench``: jactri and its peers at equal precision, each checked against float64 before it is timed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

import jactri
from jactri import chooser

from ..peers import BY_OPERATOR, JACTRI_COMPILE, TORCH, Peer, compiled
from ..record import Record
from ..timing import Spread
from ..workloads import Workload
from .device import SETTINGS, Device, precision, rates
from .sizes import Sized, bound_ms, distance, problem, truth

ALLOWED = {"ieee": 1e-5, "tf32": 1e-2}
"""Relative error of a result that may be timed; its own error is in the record."""

ROUNDS = 12
LAUNCH_BOUND_MS = 1.0
"""Below this a call is bound by the host's launches: its CUDA graph is timed too."""


def own(backend: str) -> Peer:
    """jactri with a backend as a contender."""

    def make(w: Workload, net: nn.Module) -> Callable[[Tensor], Any]:
        if w.operator is not None:
            return lambda x: w.operator.jactri(net, x, backend=backend)
        return lambda x: jactri.jacobian(net, x, per_sample=True, backend=backend)

    return Peer(f"jactri {backend}", "jactri", make)


def run(
    device: Device, record: Record, workloads: list[Sized], shrink: int, compile_too: bool
) -> None:
    """Fill the record: first everything that needs no compilation by torch, then the best of it compiled."""
    card = rates(device, (4 << 30) // shrink, 8192 // shrink)
    record.data["card"] = card
    print(", ".join(f"{k} {v:.3g}" for k, v in card.items()), flush=True)
    later = []
    for size in workloads:
        for setting in SETTINGS:
            if record.has_time(f"{size.name} {setting}", 10):
                with precision(setting):
                    result = _contend(device, record, size, setting, card)
                record.add(result)
                later.append((size, setting, result))
                print(_line(result), flush=True)
                device.release()
    for size, setting, result in later if compile_too else ():
        if record.has_time(f"{size.name} {setting} compiled", 60):
            with precision(setting):
                _compile_best(device, record, size, setting, result)
            record.write()
            print(_line(result), flush=True)
            device.release()


class Contest:
    """The contenders of one workload at one setting: those that are right, and what is known of all."""

    def __init__(self, device: Device, record: Record, size: Sized, setting: str):
        self.device, self.record, self.w, self.setting = device, record, size.workload, setting
        self.net, self.x = problem(self.w, device.device)
        self.want = truth(self.w, self.net, self.x, min(self.w.samples, 8))
        self.calls: dict[str, Callable[[], Any]] = {}
        self.facts: dict[str, dict[str, Any]] = {}

    def add(self, peer: Peer) -> None:
        """Run a contender once and hold the result against float64."""
        fact = self.facts[peer.name] = {"kind": peer.kind}
        reason = peer.left_out(self.w)
        if reason:
            fact["left_out"] = reason
            return
        try:
            call = peer.make(self.w, self.net)
            fact["error"] = distance(call(self.x), self.want, self.w.operator)
            if not fact["error"] <= ALLOWED[self.setting]:
                raise AssertionError(
                    f"off by {fact['error']:.1e}, {ALLOWED[self.setting]:.0e} allowed"
                )
            self.calls[peer.name] = lambda: call(self.x)
        except Exception as error:  # any contender may fail in any way: the others go on
            fact["failed"] = f"{type(error).__name__}: {error}"[:500]
            self.record.failed(f"{self.w.name} {self.setting} {peer.name}", error)
        finally:
            self.device.release()

    def time(self, least: float, seconds: float) -> None:
        """Milliseconds of all, in shuffled rounds."""
        for name, samples in _interleave(self.device, self.calls, seconds).items():
            spread = Spread.of(samples)
            self.facts[name] |= {"ms": asdict(spread), "share_of_bound": least / spread.median}
            if spread.median < LAUNCH_BOUND_MS:
                self.facts[name]["graph"] = _graph(self.device, self.calls[name])


def _contend(device, record: Record, size: Sized, setting: str, card) -> dict[str, Any]:
    contest = Contest(device, record, size, setting)
    for peer in (*map(own, device.backends), *_others(size.workload)):
        contest.add(peer)
    least = bound_ms(size.workload, card, setting)
    contest.time(least, record.left / 16)
    return _summary(size, setting, least, contest.facts)


def _others(w: Workload) -> list[Peer]:
    """The contenders beside `own`."""
    if w.operator is None:
        return [JACTRI_COMPILE, *TORCH]
    same = ("jactri static", "jactri static out=")  # a CUDA graph is static
    found = [p for p in BY_OPERATOR[w.operator] if p.name not in ("jactri", *same)]
    return [p for p in found if p.kind != "expert"]


def _compile_best(device, record: Record, size: Sized, setting: str, result) -> None:
    """Add the fastest peer that torch.compile takes whole, compiled, timed beside jactri again."""
    facts = result["contenders"]
    able = [p for p in _others(size.workload) if p.func and "ms" in facts.get(p.name, {})]
    if not able:
        return
    contest = Contest(device, record, size, setting)
    contest.add(own("auto"))
    contest.add(compiled(min(able, key=lambda p: facts[p.name]["ms"]["median"])))
    contest.time(result["least_ms"], record.left / 16)
    facts |= contest.facts
    result |= _summary(size, setting, result["least_ms"], facts)


def _interleave(device: Device, calls, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each call over shuffled rounds, for about so many seconds."""
    times: dict[str, list[float]] = {n: [] for n in calls}
    order, spent = random.Random(0), 0.0
    for call in calls.values():
        call()
    for r in range(ROUNDS):
        if r >= 3 and spent > 1e3 * seconds:
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


def _summary(size: Sized, setting: str, least: float, facts) -> dict[str, Any]:
    timed = {n: f["ms"]["median"] for n, f in facts.items() if "ms" in f}
    own = {n: ms for n, ms in timed.items() if n.startswith("jactri")}
    peers = {n: ms for n, ms in timed.items() if n not in own}
    found: dict[str, Any] = {
        "workload": size.name, "title": size.workload.title, "shape": size.workload.shape, "setting": setting,
        "least_ms": least, "least_flops": size.workload.flops, "least_bytes": size.workload.bytes,
        "contenders": facts, "goal": {"share": size.share, "ratio": size.ratio[setting]},
        "ways": chooser.chosen(),
    }  # fmt: skip
    if "jactri auto" in own and peers:
        peer = min(peers, key=peers.get)
        found["best"] = {
            "own_ms": own["jactri auto"], "peer": peer, "peer_ms": peers[peer],
            "ratio": peers[peer] / own["jactri auto"], "share": least / own["jactri auto"],
        }  # fmt: skip
    return found


def _line(r: dict[str, Any]) -> str:
    head = f"{r['workload']:8} {r['setting']:5} bound {r['least_ms']:8.3f} ms"
    if "best" not in r:
        return f"{head}  nothing to compare"
    b = r["best"]
    return (
        f"{head}  jactri {b['own_ms']:8.3f} ms ({b['share']:.0%} of the bound, goal {r['goal']['share']:.0%})  "
        f"{b['peer']} {b['peer_ms']:8.3f} ms, ratio {b['ratio']:.2f} (goal {r['goal']['ratio']})"
    )
