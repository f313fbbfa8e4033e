"""Two pictures of measured files: time against batch size, width and depth; and a roofline.

Colours are those of Okabe and Ito, which people with any colour vision can tell apart; contenders
of one colour differ in their markers.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .report import along

OWN, INK, PALE = "#d55e00", "0.25", "0.9"
LOOP, REVERSE, FORWARD, COMPILED, JAX, EXPERT = (
    "#e69f00", "#56b4e9", "#cc79a7", "#000000", "#009e73", "#0072b2"
)  # fmt: skip
COMPILE = "torch.compile of the fastest it takes"
STYLES = {
    # name of a contender: colour, marker. In the order of the legend.
    "jactri": (OWN, "o"),
    "functional loop": (LOOP, "s"),
    "grad loop": (LOOP, "D"),
    "functional vectorize": (REVERSE, "s"),
    "vmap(jacrev)": (REVERSE, "v"),
    "jacrev of sum": (REVERSE, "<"),
    "functional forward": (FORWARD, "s"),
    "vmap(jacfwd)": (FORWARD, "^"),
    "jacfwd of f(x+e)": (FORWARD, ">"),
    COMPILE: (COMPILED, "X"),
    "jax vmap(jacrev)": (JAX, "v"),
    "jax vmap(jacfwd)": (JAX, "^"),
    "jax lax.map(jacrev)": (EXPERT, "v"),
    "jax lax.map(jacfwd)": (EXPERT, "^"),
}
AXES = {
    "batch": "batch size (samples)",
    "width": "width (units in a hidden layer)",
    "depth": "depth (hidden layers)",
}


def draw(files: Sequence[dict], folder: Path) -> Iterator[str]:
    """Write scaling.png and roofline.png; yield a line on each, or on why it is not there."""
    curves = [f for f in files if f.get("kind") == "scaling" and panels(f)]
    if curves:
        scaling(curves, folder / "scaling.png")
        yield f"wrote {folder / 'scaling.png'}"
    else:
        yield "no scaling.png: no file of `python -m benchmarks.scaling` with two points of an axis"
    roofs = []
    for f in files:
        if f.get("kind") != "scaling":
            roofs += (found := rooflines(f))
            if not found:
                yield f"left out of roofline.png, no copy bandwidth in it: {title(f)}"
    if roofs:
        roofline(roofs, folder / "roofline.png")
        yield f"wrote {folder / 'roofline.png'}"
    else:
        yield "no roofline.png: run `python -m benchmarks.compare --json FILE` again"


def title(measured: dict) -> str:
    """What a file was measured on."""
    m = measured["machine"]
    if "device" in m:
        return f"{m['device']}, torch {m['torch']}, {m['date']}"
    return f"{m['cpu']}, {m['threads']} threads, torch {m['torch']}, {m['date']}"


# ---- time against size


def panels(measured: dict) -> list[str]:
    """The axes along which there are two points or more."""
    return [a for a in measured["axes"] if len(along(measured, a)) > 1]


def lines(measured: dict, axis: str) -> dict[str, list[tuple[int, float]]]:
    """Contender: (size, median milliseconds). What torch.compile gets may differ by point."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in along(measured, axis):
        for name, fact in row["contenders"].items():
            if "seconds" in fact:
                name = COMPILE if fact["kind"] == "compiled" else name
                found.setdefault(name, []).append((row[axis], 1e3 * fact["seconds"]["median"]))
    return found


def scaling(files: Sequence[dict], path: Path) -> None:
    """A row of panels a file, an axis a panel, a line a contender."""
    plt = _pyplot()
    columns = max(len(panels(f)) for f in files)
    size = (1.6 + 3.9 * columns, 0.9 + 4.6 * len(files))
    figure = plt.figure(figsize=size, layout="constrained")
    shown: dict[str, Any] = {}
    for measured, part in zip(
        files, figure.subfigures(len(files), squeeze=False)[:, 0], strict=True
    ):
        part.suptitle(f"Jacobian of a tanh MLP from 32 to 32; {title(measured)}", fontsize=10)
        row = part.subplots(1, len(panels(measured)), squeeze=False, sharey=True)[0]
        for axis, ax in zip(panels(measured), row, strict=True):
            found = lines(measured, axis)
            for name in sorted(found, key=_rank):
                shown.setdefault(name, _line(ax, name, found[name]))
            sizes = sorted({size for points in found.values() for size, _ in points})
            others = {k: v for k, v in measured["base"].items() if k != axis}
            ax.set(xscale="log", yscale="log", xlabel=AXES.get(axis, axis))
            ax.set_xticks(sizes, [str(s) for s in sizes])
            ax.minorticks_off()
            ax.yaxis.set_major_formatter(lambda ms, _: f"{ms:g}")
            ax.grid(color=PALE)
            ax.set_title(", ".join(f"{k} {v}" for k, v in others.items()), fontsize=10)
        row[0].set_ylabel("milliseconds a call (median)")
    names = sorted(shown, key=_rank)
    figure.legend(
        [shown[n] for n in names], names, loc="outside lower center",
        ncols=min(1 + 2 * columns, 5), fontsize=9, frameon=False,
    )  # fmt: skip
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _rank(name: str) -> tuple[int, str]:
    known = list(STYLES)
    return known.index(name) if name in known else len(known), name


def _line(ax, name: str, points: list[tuple[int, float]]):
    """Draw one contender; jactri lies on top and is twice as thick."""
    colour, marker = STYLES.get(name, ("0.5", "."))
    own = name == "jactri"
    (drawn,) = ax.plot(
        *zip(*points, strict=True), color=colour, marker=marker, label=name, zorder=4 if own else 3,
        linewidth=3 if own else 1.1, markersize=8 if own else 5, markeredgecolor="white",
        markeredgewidth=0.5,
    )  # fmt: skip
    return drawn


# ---- roofline


@dataclass(frozen=True)
class Roofline:
    """A machine's roof, and where workloads lie under it: (name, flops a byte, rate, peer's rate)."""

    title: str
    flops: float
    by: str
    copied: float
    points: list[tuple[str, float, float, float | None]]


def rooflines(measured: dict) -> list[Roofline]:
    """One for a CPU, one a precision for a GPU, none where the copy bandwidth was not measured."""
    rows, found = measured["results"], []
    if measured.get("kind") == "gpu":
        card = measured.get("card", {})
        for setting in ("ieee", "tf32"):
            points = [
                (r["workload"], _intensity(r), *(1e3 * r["least_flops"] / r["best"][k] for k in ("own_ms", "peer_ms")))
                for r in rows
                if r["setting"] == setting and "best" in r
            ]  # fmt: skip
            if points and "copy_bytes_per_s" in card:
                rate = card[f"{setting}_flops_per_s"]
                what = f"{title(measured)}, float32 products at {setting}"
                found.append(Roofline(what, rate, "torch.mm", card["copy_bytes_per_s"], points))
        return found
    rows = [r for r in rows if "copy_peak" in r and "jactri" in r["contenders"]]
    if not rows:
        return []
    points = []
    for r in rows:
        times = {
            n: f["seconds"]["median"]
            for n, f in r["contenders"].items()
            if "seconds" in f and f["kind"] != "reference"
        }
        others = [s for n, s in times.items() if not n.startswith("jactri")]
        peer = r["least_flops"] / min(others) if others else None
        points.append((r["workload"], _intensity(r), r["least_flops"] / times["jactri"], peer))
    flops = statistics.median(r["gemm_peak"]["gflops_per_s"] for r in rows)
    copied = statistics.median(r["copy_peak"]["gbytes_per_s"] for r in rows)
    by = statistics.mode(r["gemm_peak"]["by"] for r in rows)
    return [Roofline(title(measured), 1e9 * flops, by, 1e9 * copied, points)]


def _intensity(row: dict) -> float:
    return row["least_flops"] / row["least_bytes"]


def roofline(roofs: Sequence[Roofline], path: Path) -> None:
    """A panel a machine; jactri and its best peer joined by a line, one label a workload."""
    plt = _pyplot()
    figure, axes = plt.subplots(
        len(roofs), 1, figsize=(10, 0.8 + 5.6 * len(roofs)), squeeze=False, layout="constrained"
    )
    for ax, roof in zip(axes[:, 0], roofs, strict=True):
        _roof(ax, roof)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.draw_without_rendering()  # labels can be placed once the axes have their final size
    for ax, roof in zip(axes[:, 0], roofs, strict=True):
        _labels(ax, roof)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _roof(ax, roof: Roofline) -> None:
    """Everything but the labels of the points."""
    own = [(x, y) for _, x, y, _ in roof.points]
    peers = [(x, p) for _, x, _, p in roof.points if p is not None]
    ridge = roof.flops / roof.copied
    xs = [x for x, _ in own] + [ridge]
    ys = [y for _, y in own + peers] + [roof.flops]
    low, high, bottom = min(xs) / 3, max(xs) * 6, min(ys) / 2
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom, max(ys) * 2))
    ax.plot(
        [low, ridge, high], [low * roof.copied, roof.flops, roof.flops], color=INK, linewidth=1.5,
        label="what the machine reaches: copying memory, one large product",
    )  # fmt: skip
    for _, x, y, p in roof.points:
        if p is not None:
            ax.plot([x, x], [y, p], color="0.75", linewidth=1, zorder=2)
    ax.scatter(*zip(*own, strict=True), s=70, color=OWN, label="jactri", zorder=4)
    if peers:
        ax.scatter(
            *zip(*peers, strict=True), s=45, marker="s", color=EXPERT, zorder=3,
            label="its best peer (torch, torch.compile, jax, by hand)",
        )  # fmt: skip
    unit = 1e12 if roof.flops > 5e12 else 1e9
    name = "TFLOP/s" if unit == 1e12 else "GFLOP/s"
    ax.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    ax.yaxis.set_major_formatter(lambda v, _: f"{v / unit:g}")
    ax.set_xlabel("least flops of the answer / least bytes moved (flop/byte)")
    ax.set_ylabel(f"least flops / time ({name})")
    ax.grid(color=PALE)
    ax.set_title(roof.title, fontsize=10, loc="left", color=INK)
    ax.annotate(
        f"product ({roof.by}): {roof.flops / unit:.3g} {name}", (high, roof.flops), (-4, 5),
        textcoords="offset points", ha="right", fontsize=9, color=INK,
    )  # fmt: skip


def _labels(ax, roof: Roofline) -> None:
    """Name the roof's slope, and each workload where its name hides nothing, as near as possible."""
    ridge = roof.flops / roof.copied
    start = max(ax.get_xlim()[0], ax.get_ylim()[0] / roof.copied)
    ends = ax.transData.transform([(x, x * roof.copied) for x in (start, ridge)])
    (dx, dy), middle = ends[1] - ends[0], math.sqrt(start * ridge)
    length = math.hypot(dx, dy)
    ax.annotate(
        f"copy: {roof.copied / 1e9:.3g} GB/s", (middle, middle * roof.copied),
        (-8 * dy / length, 8 * dx / length), textcoords="offset points", fontsize=9, color=INK,
        rotation=math.degrees(math.atan2(dy, dx)), rotation_mode="anchor", ha="center", va="center",
    )  # fmt: skip
    from matplotlib.text import Text

    renderer = ax.figure.canvas.get_renderer()
    near = 6 * ax.figure.dpi / 72
    taken = [t.get_window_extent(renderer) for t in ax.texts]
    groups: list[
        tuple[list[str], float, float]
    ] = []  # points that lie on one another share a label
    for name, x, y, p in sorted(roof.points, key=lambda point: -point[2]):
        here, there = ax.transData.transform([(x, y), (x, y if p is None else p)])
        taken += [_box(here, here, near), _box(there, there, near), _box(here, there, 1)]
        for names, a, b in groups:
            if math.dist(here, ax.transData.transform((a, b))) < near:
                names.append(name)
                break
        else:
            groups.append(([name], x, y))
    inside = ax.get_window_extent(renderer)
    for names, x, y in groups:
        for far, (dx, dy) in itertools.product((10, 20, 32, 46, 62, 80), SIDES):
            text = ax.annotate(
                ", ".join(sorted(names)), (x, y), (far * dx, far * dy), textcoords="offset points",
                ha={1: "left", -1: "right"}.get(round(dx), "center"), va="center", fontsize=9,
                zorder=5, arrowprops=LEADER if far > 10 else None,
            )  # fmt: skip
            text.update_positions(renderer)
            # an Annotation's own extent has its leader in it
            box = Text.get_window_extent(text, renderer).padded(near / 3)
            within = inside.containsx(box.x0) and inside.containsx(box.x1)
            within = within and inside.containsy(box.y0) and inside.containsy(box.y1)
            if within and not any(box.overlaps(t) for t in taken):
                taken.append(box)
                break
            text.remove()


LEADER = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.7, "shrinkB": 4}
SIDES = ((1, 0), (-1, 0), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7), (-0.7, -0.7), (0, 1), (0, -1))


def _box(one, other, margin: float):
    """The rectangle around two places on the picture."""
    from matplotlib.transforms import Bbox

    box = Bbox([one, other])
    return Bbox([box.min - margin, box.max + margin])


def _pyplot():
    """matplotlib, imported where a picture is asked for, drawing to files only."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
