"""The Jacobian lens of a language model: ``python -m benchmarks.lens [--rows K] [--json FILE]``.

For every layer the mean, over source tokens, of the sum over target tokens of the derivative of the last layer in it:
a (d, d) matrix each. The model is GPT-2 in plain torch (12 layers, d = 768, 12 heads; random, frozen weights), the
prompt 128 tokens, float32, on the CPU. `jactri.layer_jacobian` runs beside what people write for it: the prompt is
repeated along the batch and runs once; a backward pass with another one-hot cotangent in each copy gives as many rows,
at all layers at once (`reference`). How many copies run at once decides its speed and its memory: each number of
``--batch`` is a contender, and jactri is held against all of them.

A whole lens takes minutes. ``--rows K`` computes and times the first K of its rows with all contenders: K should be a
multiple of the batches. Rows are held against float64 first. Peaks are those of fresh processes, forward pass included.
Exit status 1 if an answer was wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

import jactri

from . import checks, compare, machine, memory, nets, timing
from .record import Record

OURS = "jactri"
CHECKED = 3
"""Rows that are held against float64."""


@dataclass(frozen=True)
class Sizes:
    """Those of GPT-2, small."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    tokens: int = 128
    words: int = 1000
    """As many as there are, no lens depends on it."""


class Block(nn.Module):
    """A layer of GPT-2."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = (
            p.view(n, t, self.heads, d // self.heads).transpose(1, 2)
            for p in self.attend(self.ln_1(x)).split(d, -1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(n, t, d))
        return x + self.down(nn.functional.gelu(self.up(self.ln_2(x)), approximate="tanh"))


class Model(nn.Module):
    """GPT-2 up to its last norm."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.word = nn.Embedding(sizes.words, sizes.width)
        self.place = nn.Embedding(sizes.tokens, sizes.width)
        self.h = nn.ModuleList([Block(sizes.width, sizes.heads) for _ in range(sizes.layers)])
        self.norm = nn.LayerNorm(sizes.width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.word(tokens) + self.place.weight
        for block in self.h:
            x = block(x)
        return self.norm(x)


def problem(sizes: Sizes) -> tuple[Model, Tensor]:
    """The model and a prompt ``(1, tokens)``: the same numbers at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(nets.SEED)
        model = Model(sizes).requires_grad_(False).eval()
        return model, torch.randint(sizes.words, (1, sizes.tokens))


def reference(model: Model, prompt: Tensor, rows: Tensor, batch: int) -> Tensor:
    """Some rows of the lens, ``(layers, rows, d)``, by one-hot backward passes of a prompt repeated ``batch`` times."""
    layers = len(model.h)
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        if not found:  # weights are frozen: what is asked for begins here
            y = y.detach().requires_grad_().view_as(y)  # the counter of flops takes no leaf
        found.append(y)
        return y

    hooks = [block.register_forward_hook(keep) for block in model.h]
    try:
        y = model(prompt.expand(batch, -1))
    finally:
        for hook in hooks:
            hook.remove()
    lens = y.new_empty(layers, len(rows), y.shape[-1])
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        cotangent = torch.zeros_like(y)
        cotangent[torch.arange(len(some)), :, some] = 1.0
        grads = torch.autograd.grad(y, found, cotangent, retain_graph=True)
        for layer, grad in enumerate(grads):
            lens[layer, start : start + batch] = grad[: len(some)].mean(1)
    return lens


def ours(model: Model, prompt: Tensor, rows: Tensor, **options: Any) -> Tensor:
    """The same by `jactri.layer_jacobian`."""
    width = model.norm.normalized_shape[0]
    some = None
    if len(rows) < width:
        some = nn.functional.one_hot(rows, width).to(model.norm.weight.dtype)
    lens = jactri.layer_jacobian(model, prompt, "h.*", "norm", rows=some, **options)
    return torch.stack(list(lens.values()))


def contenders(
    options: argparse.Namespace, sizes: Sizes
) -> dict[str, Callable[[int | None], Tensor]]:
    """Calls that compute so many rows, None for those that were asked for, by their names; jactri first."""
    model, prompt = problem(sizes)

    def rows(count: int | None) -> Tensor:
        return torch.arange(options.rows or sizes.width)[:count]

    more = {k: v for k, v in (("chunk_size", options.chunk), ("memory_limit", options.limit)) if v}

    def repeated(batch: int) -> Callable[[int | None], Tensor]:
        return lambda count: reference(model, prompt, rows(count), batch)

    calls = {OURS: lambda count: ours(model, prompt, rows(count), **more)}
    return calls | {f"reference, {b} copies": repeated(b) for b in options.batch}


def check(lens: Tensor, want: Tensor, every: Tensor | None) -> float:
    """The largest error of the rows that ``want`` has in float64. All are held against those of a contender."""
    step = max(1, lens.shape[1] // CHECKED)
    error = checks.distance(lens[:, ::step][:, :CHECKED], want, torch.float32)
    if every is not None:
        checks.distance(lens, every, torch.float32)
    return error


def truth(sizes: Sizes, rows: int) -> Tensor:
    """Some of the rows in float64, by autograd."""
    model, prompt = problem(sizes)
    some = torch.arange(rows)[:: max(1, rows // CHECKED)][:CHECKED]
    return reference(model.double(), prompt, some, 1)


def _linear(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    """A product with a matrix by oneDNN."""
    return 2 * math.prod(a) * b[0]


def _attention(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_back(grad: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


def flops(call: Callable[[], Any]) -> int:
    """Those of the products of matrices that torch runs, a CPU's among them."""
    more: dict[Any, Any] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_back,
    }
    if torch.backends.mkldnn.is_available():
        more[torch.ops.mkldnn._linear_pointwise] = _linear
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        call()
    return counter.get_total_flops()


def alone(call: Callable[[int | None], Tensor]) -> dict[str, Any]:
    """Bytes by which the first call at these sizes raises this process, its answer included."""
    kept: list[Any] = []
    extra = machine.extra_peak(lambda: kept.append(call(None)))
    return {"peak_bytes": extra, "shape": list(kept.pop().shape)}


def measure(options: argparse.Namespace, sizes: Sizes, record: Record) -> None:
    """All contenders: answers, then flops, times and peaks."""
    want, every = truth(sizes, options.rows or sizes.width), None
    calls: dict[str, Callable[[], Tensor]] = {}
    facts: dict[str, dict[str, Any]] = {}
    # jactri, last, is held against all rows of another
    for name, call in reversed(contenders(options, sizes).items()):
        seconds, lens = timing.once(lambda call=call: call(None))
        try:
            error = check(lens, want, every)
        except checks.WrongResult as wrong:
            record.failed(name, wrong)
            continue
        every = lens if every is None else every
        calls[name] = lambda call=call: call(None)
        facts[name] = {"contender": name, "error": error, "estimate_s": seconds}
        del lens
    del every
    if OURS not in facts:
        return
    for name, call in calls.items():
        facts[name]["flops"] = flops(call)
    if options.rounds:
        table = timing.interleave(
            calls, {n: f["estimate_s"] for n, f in facts.items()},
            rounds=options.rounds, budget=options.budget, fewest=1, seed=options.seed,
        )  # fmt: skip
        for name, fact in facts.items():
            fact["seconds"] = asdict(table.spread(name))
    if options.memory:
        for name, fact in facts.items():
            fact |= in_subprocess(name, options, sizes)
    for name in (OURS, *(n for n in facts if n != OURS)):
        record.add(facts[name])
    peers = [n for n in facts if n != OURS]
    if not options.rounds or not peers:
        return
    against = {
        n: compared(facts[OURS], facts[n]) | {"speed": asdict(table.ratio(n, OURS))} for n in peers
    }
    record.data["summary"] = {"fastest": table.fastest(peers), "against": against}
    record.write()


def compared(mine: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """jactri's flops and peak over another's."""
    ratios = {"flops": mine["flops"] / other["flops"]}
    if mine.get("peak_bytes") and other.get("peak_bytes"):
        ratios["memory"] = mine["peak_bytes"] / other["peak_bytes"]
    return ratios


def in_subprocess(name: str, options: argparse.Namespace, sizes: Sizes) -> dict[str, Any]:
    """`alone` in a fresh process."""
    words = ["--alone", name, "--threads", str(torch.get_num_threads())]
    given = {**{f.replace("_", "-"): v for f, v in asdict(sizes).items()}, "rows": options.rows,
             "chunk": options.chunk, "limit": options.limit}  # fmt: skip
    words += [w for option, v in given.items() if v for w in (f"--{option}", str(v))]
    words += ["--batch", *map(str, options.batch)]
    found, _ = memory.fresh("benchmarks.lens", *words, timeout=3600)
    return found


def lines(record: dict[str, Any]) -> Iterator[str]:
    """What was found, to read."""
    for r in record["results"]:
        text = f"{r['contender']:<24}{r['flops'] / 1e9:>12.4g} Gflop"
        if "seconds" in r:
            text += f"{r['seconds']['median']:>10.4g} s"
        if r.get("peak_bytes") is not None:
            text += f"{r['peak_bytes'] / 1e6:>10.4g} MB"
        yield f"{text}   error {r['error']:.1e}"
    found = record.get("summary", {"against": {}})
    for name, r in found["against"].items():
        yield (
            f"{r['speed']['median']:.2f} times as fast as {name}, with {r['flops']:.2f} of its flops"
            + (f" and {r['memory']:.2f} of its memory" if "memory" in r else "")
            + (" (the fastest)" if name == found["fastest"] else "")
        )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lens", description=__doc__)
    for name, size in asdict(Sizes()).items():
        parser.add_argument(f"--{name}", type=compare.count, default=size, help=f"default: {size}")
    parser.add_argument(
        "--rows", type=compare.count, help="how many rows of each lens; default: all"
    )
    parser.add_argument(
        "--batch", type=compare.count, nargs="+", default=[1, 8, 64], help="copies of the prompt"
    )
    parser.add_argument("--chunk", type=compare.count, help="jactri's chunk_size")
    parser.add_argument("--limit", help="jactri's memory_limit")
    parser.add_argument(
        "--no-memory", dest="memory", action="store_false", help="no fresh processes"
    )
    parser.add_argument("--no-times", dest="timed", action="store_false", help="counts and peaks")
    parser.add_argument(
        "--alone", metavar="CONTENDER", help="its first call in this process, as one line of JSON"
    )
    compare.add_options(parser, 600.0, "seconds of timing", rounds=5)
    options = parser.parse_args(arguments)
    options.rounds = options.rounds if options.timed else 0
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 1 if an answer was wrong."""
    options = parse(arguments)
    sizes = Sizes(**{name: getattr(options, name) for name in asdict(Sizes())})
    if options.alone:
        torch.set_num_threads(options.threads or torch.get_num_threads())
        warnings.simplefilter("ignore")
        print(json.dumps(alone(contenders(options, sizes)[options.alone])))
        return 0
    about = compare.start(options)
    record = Record(options.json, math.inf, kind="lens", machine=about, sizes=asdict(sizes))
    record.data["rows"] = options.rows or sizes.width
    measure(options, sizes, record)
    for line in lines(record.data):
        print(line, flush=True)
    return record.close()


if __name__ == "__main__":
    sys.exit(main())
