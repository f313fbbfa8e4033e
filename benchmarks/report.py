"""Markdown from measured files: ``python -m benchmarks.report benchmarks/results/cpu-2core.json``.

The table of the README is this program's output, word for word; a test compares the two.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

BEST = "best torch peer"


def table(measured: dict) -> str:
    """One row a workload: the fastest peer of all, compiled ones included, and jactri."""
    machine = measured["machine"]
    lines = [
        f"CPU: {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, float32, "
        f"{machine['date']}; medians of interleaved calls, ratios paired round by round.",
        "",
        "| workload | J | jactri ms | best torch peer ms | ratio |",
        "|---|---|---|---|---|",
    ]
    for row in measured["results"]:
        if BEST not in row["ratios"]:
            continue
        ratio = row["ratios"][BEST]
        own, peer = (
            row["contenders"][name]["seconds"]["median"] for name in (ratio["by"], ratio["peer"])
        )
        shape = " x ".join(map(str, row["shape"]))
        lines.append(
            f"| {row['title']} | {shape} | {_ms(own)} | {_ms(peer)} ({ratio['peer']}) "
            f"| {_ratio(ratio['median'])} |"
        )
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def _ratio(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}" if value >= 1 else f"{value:.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of each file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="JSON files of benchmarks.compare")
    for path in parser.parse_args(argv).files:
        print(table(json.loads(path.read_text())))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
