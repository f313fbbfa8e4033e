"""Markdown and plots from measured files: ``python -m benchmarks.report [FILES] [--plots FOLDER]``.

Without files, all in benchmarks/results/. The tables of the README are this program's output, word for word; a test
compares them. ``--plots`` draws scaling.png (time against batch size, width and depth) and roofline.png; ``--plot``
one picture of all times.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

BEST = "best torch peer"
RESULTS = Path(__file__).parent / "results"


def table(measured: dict) -> str:
    """The table of one file of benchmarks.compare, benchmarks.scaling or ``benchmarks.gpu bench``."""
    return {"gpu": _gpu, "scaling": _scaling}.get(measured.get("kind"), _cpu)(measured)


WAYS = ("", ", compiled", ", static")
"""How jactri is called: `jacobian` and the like, `compile`, and ``compile(static=True)``."""


def _cpu(measured: dict) -> str:
    """One row a workload: jactri, and the fastest peer of all, compiled ones included."""
    machine = measured["machine"]
    lines = [
        f"CPU: {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, float32, "
        f"{machine['date']}; milliseconds, medians of interleaved calls (o: into `out=`); ratios to the best torch "
        "peer, paired round by round.",
        "",
        "| workload | answer | jactri | `compile` | `static=True` "
        "| best torch peer | ratio | `compile` | `static=True` |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in measured["results"]:
        ratios = row.get("ratios", {})
        if BEST in ratios:
            peer = ratios[BEST]["peer"]
            times = " | ".join(_time(row, BEST + way) for way in WAYS)
            gains = (ratios.get(BEST + way) for way in WAYS)
            lines.append(
                f"| {row['title']} | {_shape(row)} | {times} | {_median(row, peer)} ({peer}) | "
                f"{' | '.join(_ratio(g['median']) if g else '-' for g in gains)} |"
            )
    return "\n".join(lines)


def _median(row: dict, name: str) -> str:
    return _ms(row["contenders"][name]["seconds"]["median"])


def _time(row: dict, whom: str) -> str:
    """jactri's time by one of `WAYS`, also into memory that is there."""
    names = [row["ratios"].get(whom + how, {}).get("by") for how in ("", ", into out=")]
    if names[0] is None:
        return "-"
    into = f" (o {_median(row, names[1])})" if names[1] else ""
    return _median(row, names[0]) + into


def _against(row: dict, whom: str) -> str:
    """Three cells: jactri's time, the peer's, and the ratio."""
    ratio = row["ratios"][whom]
    own, peer = (
        row["contenders"][name]["seconds"]["median"] for name in (ratio["by"], ratio["peer"])
    )
    return f"{_ms(own)} | {_ms(peer)} ({ratio['peer']}) | {_ratio(ratio['median'])}"


def along(measured: dict, axis: str) -> list[dict]:
    """The points of a scaling file that differ from its base in this size only, in order."""
    others = {k: v for k, v in measured["base"].items() if k != axis}
    rows = [r for r in measured["results"] if all(r[k] == v for k, v in others.items())]
    return sorted(rows, key=lambda r: r[axis])


def _scaling(measured: dict) -> str:
    """One row a point, axis by axis."""
    machine, base = measured["machine"], measured["base"]
    lines = [
        f"CPU: {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, float32, "
        f"{machine['date']}; one size of the dynamics MLP changed at a time, the others as in "
        f"{', '.join(f'{k} {v}' for k, v in base.items())}.",
        "",
        "| size changed | jactri ms | best torch peer ms | ratio |",
        "|---|---|---|---|",
    ]
    for axis in measured["axes"]:
        for row in along(measured, axis):
            if BEST in row.get("ratios", {}):
                lines.append(f"| {axis} {row[axis]} | {_against(row, BEST)} |")
    return "\n".join(lines)


def _gpu(measured: dict) -> str:
    """One row a workload and precision: the fastest peer, jactri, and its share of the card's lower bound."""
    m = measured["machine"]
    versions = f"torch {m['torch']}, triton {m['triton']}"
    lines = [
        f"GPU: {m['device']}, {versions}, {m['date']}, commit {(m['commit'] or 'unknown')[:9]}; medians of "
        "interleaved calls with a cold L2 cache; the bound is the larger of flops and bytes at the card's measured "
        "rates.",
        "",
        "| workload | answer | float32 products | jactri ms | of the bound | best peer ms | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in measured["results"]:
        if "best" in row:
            b = row["best"]
            lines.append(
                f"| {row['title']} | {_shape(row)} | {row['setting']} | {_ms(1e-3 * b['own_ms'])} | {b['share']:.0%} "
                f"| {_ms(1e-3 * b['peer_ms'])} ({b['peer']}) | {_ratio(b['ratio'])} |"
            )
    return "\n".join(lines)


def _shape(row: dict) -> str:
    return " x ".join(map(str, row["shape"]))


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def _ratio(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}" if value >= 1 else f"{value:.2f}"


GROUPS = {
    # kinds of contenders: how they are drawn
    ("torch", "compiled"): ("torch", {"marker": "|", "s": 90, "color": "0.55"}),
    ("expert", "jax"): ("written by hand, jax", {"marker": "x", "s": 40, "color": "0.35"}),
    ("jactri",): ("jactri", {"marker": "o", "s": 46, "color": "#1b9e77"}),
}


def rows(measured: dict) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """(workload, {group: milliseconds}) of everything that was timed, for plots."""
    for row in measured["results"]:
        times: dict[str, list[float]] = {}
        for fact in row.get("contenders", {}).values():
            ms = fact["ms"]["median"] if "ms" in fact else None
            if "seconds" in fact:
                ms = 1e3 * fact["seconds"]["median"]
            for kinds, (group, _) in GROUPS.items():
                if ms is not None and fact["kind"] in kinds:
                    times.setdefault(group, []).append(ms)
        if times:
            setting = f" {row['setting']}" if "setting" in row else ""
            yield row["workload"] + setting, times


def plot(files: Sequence[dict], path: Path) -> None:
    """Times a call of jactri and all others, a row a workload; the ratio is that of the best of torch to jactri."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = [(f, list(rows(f))) for f in files if f.get("kind") != "scaling"]
    found = [(f, r) for f, r in found if r]
    if not found:
        raise SystemExit("none of the files holds times")
    heights = [len(r) for _, r in found]
    figure, axes = plt.subplots(
        len(found), 1, figsize=(9, 1.2 + 0.42 * sum(heights) + 0.9 * len(found)), squeeze=False,
        gridspec_kw={"height_ratios": heights}, layout="constrained",
    )  # fmt: skip
    for axis, (measured, entries) in zip(axes[:, 0], found, strict=True):
        for group, style in GROUPS.values():
            points = [(ms, y) for y, (_, t) in enumerate(entries) for ms in t.get(group, [])]
            if points:
                axis.scatter(*zip(*points, strict=True), zorder=3, label=group, **style)
        for y, (_, times) in enumerate(entries):
            if "torch" in times and "jactri" in times:
                own, best = min(times["jactri"]), min(times["torch"])
                axis.plot([own, best], [y, y], color="0.8", zorder=1)
                axis.annotate(
                    f"{_ratio(best / own)} times", (max(own, best), y), (0, 8), textcoords="offset points",
                    fontsize=8, color="0.3", ha="center",
                )  # fmt: skip
        machine = measured["machine"]
        axis.set_yticks(range(len(entries)), [name for name, _ in entries])
        axis.invert_yaxis()
        axis.margins(y=0.5 / max(len(entries), 1) + 0.04)
        axis.set_xscale("log")
        axis.grid(axis="x", color="0.92")
        axis.set_title(machine.get("device") or machine.get("cpu", ""), fontsize=10, loc="left")
        axis.set_xlabel("milliseconds a call (median)")
        axis.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def load(path: Path) -> dict:
    """A measured file; a ValueError says what is wrong with it."""
    try:
        measured = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{path}: not JSON") from None
    if not isinstance(measured, dict):
        raise ValueError(f"{path}: not a file of benchmarks")
    return measured


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of each file that holds times; draw the plots that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument(
        "files", nargs="*", type=Path, help="JSON files; default: benchmarks/results/*.json"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw all times")
    parser.add_argument(
        "--plots", type=Path, metavar="FOLDER", help="draw time against size, and a roofline"
    )
    options = parser.parse_args(argv)
    try:
        files = [load(p) for p in options.files or sorted(RESULTS.glob("*.json"))]
        if options.plots:
            options.plots.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        parser.error(f"--plots {options.plots}: not a folder")
    except ValueError as error:
        parser.error(str(error))
    files = [f for f in files if "results" in f]  # counts.json holds no times
    files = [f for f in files if f.get("kind") != "gpu" or f.get("command") == "bench"]
    print("\n\n".join(map(table, files)))
    if options.plot:
        plot(files, options.plot)
    if options.plots:
        from . import plots  # not at the top: the tables need no package around this file

        for line in plots.draw(files, options.plots):
            print(line, file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
