"""Markdown and plots from measured files: ``python -m benchmarks.report [FILES] [--plots FOLDER]``.

Without files, all in benchmarks/results/. The tables of the README are this program's output, word for word; a test
compares them. ``--plots`` draws scaling.png (time against batch size, width and depth) and roofline.png; ``--plot``
one picture of all times. ``--gpu FILE`` prints what README may say of a card, by a file of ``benchmarks.gpu lease``.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

BEST = "best torch peer"
RESULTS = Path(__file__).parent / "results"


def table(measured: dict) -> str:
    """The table of one file of benchmarks.compare, scaling, penalty, worst, sparse, or of ``benchmarks.gpu lease``."""
    kinds = {
        "gpu": _gpu,
        "scaling": _scaling,
        "penalty": _penalty,
        "worst": _worst,
        "sparse": _sparse,
    }
    return kinds.get(measured.get("kind"), _cpu)(measured)


WAYS = ("", ", compiled", ", aot")
"""How jactri is called: `jacobian` and the like, `compile`, and ``compile(engine="aot")``."""


def _cpu(measured: dict) -> str:
    """One row a workload: jactri, and the fastest peer of all, compiled ones included."""
    machine = measured["machine"]
    lines = [
        f"CPU: {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, float32, "
        f"{machine['date']}; milliseconds, medians of interleaved calls (o: into `out=`); ratios to the best torch "
        "peer, paired round by round.",
        "",
        '| workload | answer | jactri | `compile` | `"aot"` '
        '| best torch peer | ratio | `compile` | `"aot"` |',
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


HEADLINE = ("W6-n4", "W8-divergence", "W9-ntk", "W7", "W1-silu")


def headline(measured: dict) -> str:
    """The rows of a file of benchmarks.compare with which README begins."""
    lines = ["| | jactri, ms | best of torch, ms | times |", "|---|---|---|---|"]
    by_name = {row["workload"]: row for row in measured["results"]}
    for row in map(by_name.__getitem__, HEADLINE):
        best = row["ratios"][BEST]
        lines.append(
            f"| {row['title']} | {_median(row, best['by'])} | {_median(row, best['peer'])} ({best['peer']}) | "
            f"{_ratio(best['median'])} |"
        )
    return "\n".join(lines)


def _penalty(measured: dict) -> str:
    """One row a network: the steps of a loss with a Jacobian in it."""
    calls = list(measured["results"][0]["seconds"])
    lines = [f"| gradient of a Jacobian's square in the weights, ms | {' | '.join(calls)} |"]
    lines.append("|---" * (1 + len(calls)) + "|")
    for row in measured["results"]:
        times = " | ".join(_ms(row["seconds"][c]["median"]) for c in calls)
        lines.append(f"| {row['title']} | {times} |")
    return "\n".join(lines)


def _worst(measured: dict) -> str:
    """One row an input of benchmarks.worst."""
    machine = measured["machine"]
    lines = [
        f"CPU: {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, {machine['date']}; ratios of "
        "jactri to the fastest of the others: above 1, jactri takes more. First calls and memory in a fresh process, "
        "MB above what it held, planned and under a limit without what the function's own run keeps.",
        "",
        "| input | jactri, ms | other, ms | time | first call | jactri, MB | other, MB | memory | planned, MB "
        "| under a limit, MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += map(worst_row, measured["results"])
    loud = {
        r["case"]: r["alone"]["jactri"]["stderr_lines"] for r in measured["results"] if "alone" in r
    }
    noise = ", ".join(f"{name} {count} lines" for name, count in loud.items() if count)
    return "\n".join([*lines, *(["", f"Written to stderr: {noise}."] if noise else [])])


def worst_row(row: dict) -> str:
    """A line of that table; "-" for what was not measured."""
    cells = ["-"] * 9
    if "peer" in row:
        cells[:2] = _median(row, "jactri"), f"{_median(row, row['peer'])} ({row['peer']})"
        cells[2] = _ratio(row["ratio"]["median"])
    if "peak_ratio" in row:
        cells[3] = _ratio(row["first_ratio"])
        cells[4:6] = (_mb(row["alone"][n]["peak_bytes"]) for n in ("jactri", row["peer"]))
        cells[6] = _ratio(row["peak_ratio"])
        if "planned_bytes" in row:
            cells[7] = f"{_mb(row['planned_bytes'])}, was {_mb(row['above_forward_bytes'])}"
    if row.get("limits"):
        cells[8] = "; ".join(f"{k}: {_under(found)}" for k, found in row["limits"].items())
    return f"| {row['title']} | {' | '.join(cells)} |"


def _under(found: dict) -> str:
    if "refused" in found:
        return "refused"
    if "kept" not in found:
        return "failed"
    return _mb(found["above_forward_bytes"]) + ("" if found["kept"] else " PASSED")


SPARSE = ("jactri", "jactri.compile", "asdex", "sparsejac", "coloured torch.func")
"""Whose times stand in the table of benchmarks.sparse, beside those of dense Jacobians by torch.func."""


def _sparse(measured: dict) -> str:
    """One row a problem of benchmarks.sparse."""
    machine = measured["machine"]
    peers = (f"{n} {machine[n]}" for n in ("torch", "jax", "asdex", "sparsejac") if machine[n])
    lines = [
        f"CPU: {machine['cpu']}, {machine['threads']} threads, {', '.join(peers)}, float64, {machine['date']}; "
        "milliseconds, medians of interleaved calls, planned and compiled before; ratio: the fastest of the others to "
        "jactri, paired round by round: above 1, jactri is faster. Largest first: colours that networkx' greedy "
        "colouring gives, as sparsejac and coloured torch.func use them. First: seconds to the first answer, with "
        "planning and compiling.",
        "",
        "| problem | entries | products: jactri | asdex | largest first | jactri, ms | `compile` | asdex | sparsejac "
        "| coloured torch.func | dense torch.func | fastest of these | ratio | `compile` | first, s: jactri "
        "| `compile` | asdex |",
        "|---" * 17 + "|",
    ]
    return "\n".join([*lines, *map(sparse_row, measured["results"])])


def sparse_row(row: dict) -> str:
    """A line of that table; "-" for what was not measured."""
    found = row["contenders"]
    own, made, asdex, *_ = (found.get(n, {}) for n in SPARSE)
    timed = {n: f["seconds"]["median"] for n, f in found.items() if "seconds" in f}
    dense = min((s for n, s in timed.items() if n not in SPARSE), default=None)
    ratios = row.get("ratios", {})
    cells = [
        _than(own["entries"], asdex.get("entries")) if own else "-",
        *(str(f.get("products", "-")) for f in (own, asdex)),
        str(row.get("largest_first", "-")),
        *(_ms(timed[n]) if n in timed else "-" for n in SPARSE),
        "-" if dense is None else _ms(dense),
        row.get("peer") or "-",
        *(_ratio(ratios[n]["median"]) if n in ratios else "-" for n in SPARSE[:2]),
        *(f"{f['first_s']:.2g}" if f else "-" for f in (own, made, asdex)),
    ]
    return f"| {row['title']} | {' | '.join(cells)} |"


def _than(own: int, other: int | None) -> str:
    """A count, and another's where that differs."""
    return f"{own:,}" + (f" (asdex {other:,})" if other not in (None, own) else "")


def _mb(size: int) -> str:
    return f"{1e-6 * size:.3g}"


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


def contests(measured: dict) -> list[dict]:
    """The timed rows of a lease, one a workload and precision; best of all peers, also of those under torch.compile."""
    found: dict[tuple, dict] = {}
    for kind in ("bench", "compiled"):
        for item in measured.get("items", []):
            if item["name"].startswith(kind + ":"):
                for row in item.get("results", []):
                    key = row["workload"], row["setting"]
                    known = found.setdefault(key, row)
                    if known is not row:
                        found[key] = _joined(known, row)
    return list(found.values())


def _joined(row: dict, more: dict) -> dict:
    """A row with the contenders of another; each ratio is of two that were timed side by side."""
    both = [r["best"] for r in (row, more) if "best" in r]
    best = {"best": min(both, key=lambda b: b["ratio"])} if both else {}
    return row | {"contenders": more["contenders"] | row["contenders"]} | best


CALL, COMPILE = "jactri auto", "jactri compile"
TESTED = {
    "smoke": "a few tests of each kernel", "kernels": "kernel tests", "suite": "suite",
    "memcheck": "those few under compute-sanitizer's memcheck", "racecheck": "under its racecheck",
}  # fmt: skip


def _gpu(measured: dict) -> str:
    """What a lease found: one row a workload and precision, then what was proven, what failed, and what was not run."""
    m, card = measured["machine"], measured["card"]
    rates = ", ".join(
        f"{name} {card[f'{name}_flops_per_s'] / 1e12:.3g}" for name in ("ieee", "tf32", "bf16")
    )
    lines = [
        f"GPU: {m['device']}, torch {m['torch']}, triton {m['triton']}, {m['date']}, commit {_commits(measured)}, "
        f"kernels {measured['kernels']}. "
        f"It copies {card['copy_bytes_per_s'] / 1e12:.3g} TB/s (read and written) and multiplies, in TFLOP/s, "
        f"{rates}; the bound is the larger of least flops and least bytes at these rates (at ieee a sixth of bf16's, "
        "at most 130, where that is more). Medians of interleaved calls with a cold L2 cache, in milliseconds; "
        "kernels: the sum of their times in one call; ratio: the best peer to jactri's plain call, timed side by side.",
        "",
        "| workload | answer | float32 products | bound | kernels (of the bound) | call | `compile` | CUDA graph "
        "| best torch peer | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in contests(measured):
        lines.append(
            f"| {row['title']} | {_shape(row)} | {row['setting']} | {' | '.join(_figures(row))} |"
        )
    return "\n".join([*lines, "", *_proven(measured)])


def _commits(measured: dict) -> str:
    """Of all items that ran, those of an earlier lease too."""
    found = dict.fromkeys(i.get("commit") for i in measured["items"] if i["state"] != "not run")
    named = [c[:9] for c in found if c]
    changed = " with changes" if measured["machine"].get("uncommitted_changes") else ""
    return (" and ".join(named) or "unknown") + changed


def _figures(row: dict) -> list[str]:
    """The cells of a row from the bound on; "-" for what was not measured."""
    own, made = (row["contenders"].get(n, {}) for n in (CALL, COMPILE))
    cells = [_ms(1e-3 * row["least_ms"]), "-"]
    if own.get("kernel_ms"):
        cells[1] = f"{_ms(1e-3 * own['kernel_ms'])} ({row['least_ms'] / own['kernel_ms']:.0%})"
    medians = (
        f.get("median") for f in (own.get("ms", {}), made.get("ms", {}), own.get("graph", {}))
    )
    cells += ["-" if ms is None else _ms(1e-3 * ms) for ms in medians]
    best = row.get("best")
    peer = f"{_ms(1e-3 * best['peer_ms'])} ({best['peer']})" if best else "-"
    return [*cells, peer, _ratio(best["ratio"]) if best else "-"]


def _proven(measured: dict) -> list[str]:
    """Sentences on tests, accuracy and captures, and on what failed or was not run."""
    kinds: dict[str, list[dict]] = {}
    for item in measured["items"]:
        kinds.setdefault(item["name"].partition(":")[0], []).append(item)
    rows = contests(measured)
    compiled = [r for r in rows if any(f["kind"] == "compiled" for f in r["contenders"].values())]
    lines = [f"- a peer under torch.compile was run in {len(compiled)} of the {len(rows)} rows"]
    for kind, title in TESTED.items():
        counts = [r for i in kinds.get(kind, []) for r in i.get("results", []) if "passed" in r]
        if counts:
            passed, failed = (sum(r[k] for r in counts) for k in ("passed", "failed"))
            lines.append(f"- {title}: {passed} passed, {failed} failed")
    if "accuracy" in kinds:
        done = [i["name"].partition(":")[2] for i in kinds["accuracy"] if i["state"] == "done"]
        lines.append(f"- as accurate as torch.func at full size: {', '.join(done) or 'none'}")
    for call, title in (("auto", "the plain call"), ("compiled", "`compile`")):
        rows = [
            (i, r)
            for i in kinds.get("capture", [])
            for r in i.get("results", [])
            if r["call"] == call
        ]
        if rows:
            taken = [i["name"].partition(":")[2] for i, r in rows if r["captured"]]
            lines.append(f"- {title} runs as a CUDA graph: {len(taken)} of {len(rows)} workloads")
    for state, title in (("failed", "failed"), ("timeout", "cut off"), ("not run", "not run")):
        names = [i["name"] for i in measured["items"] if i["state"] == state]
        if names:
            lines.append(f"- {title}: {', '.join(names)}")
    return lines


def _shape(row: dict) -> str:
    return " x ".join(map(str, row["shape"]))


def _ms(seconds: float) -> str:
    ms = 1e3 * seconds
    return f"{ms:.3g}" if ms < 999.5 else f"{ms:.0f}"


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
    if measured.get("kind") == "gpu":
        measured["results"] = contests(measured)
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
    parser.add_argument(
        "--gpu", type=Path, metavar="FILE", help="print the section of a card, and no more"
    )
    options = parser.parse_args(argv)
    try:
        paths = [options.gpu] if options.gpu else options.files or sorted(RESULTS.glob("*.json"))
        files = [load(p) for p in paths]
        if options.plots:
            options.plots.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        parser.error(f"--plots {options.plots}: not a folder")
    except ValueError as error:
        parser.error(str(error))
    files = [f for f in files if "results" in f]  # counts.json holds no times
    print("\n\n".join(map(table, files)))
    files = [
        f for f in files if f.get("kind") not in ("penalty", "worst", "sparse")
    ]  # no plot has those
    if options.plot:
        plot(files, options.plot)
    if options.plots:
        from . import plots  # not at the top: the tables need no package around this file

        for line in plots.draw(files, options.plots):
            print(line, file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
