"""Prove and measure jactri on a GPU, from a checkout, within a time:

    pip install -q --no-deps --no-build-isolation -e . &&
        python -m benchmarks.gpu lease --seconds 540 --json FILE

runs the items of a lease, most valuable first, each in a process of its own with its own limit: the card's rates, a few
tests of each kernel, which calls a CUDA graph captures, accuracy at GPU sizes, times (jactri's call and its `compile`,
CUDA graphs, sums of kernels, peers) beside the card's lower bound, Nsight Compute's counters, the kernel tests, the
suite, compute-sanitizer, and peers under torch.compile. FILE is written after each item, and what they print goes to a
.log beside it. What does not fit in the time is listed as not run; another call goes on where this one ended:

        python -m benchmarks.gpu lease --seconds 240 --json FILE2 --skip-done FILE

does what is not done in FILE, where kernels/, the card and the versions are still the same. ``--only bench:W1`` does
that alone, ``--device cpu --shrink 1000`` tries it all on a machine without a GPU. The last thing printed is a short
table; the exit code is 1 if anything failed or was cut off, 2 if there is no device. Without ``--json`` the file is
benchmarks/results/gpu-<device>.json, of which ``python -m benchmarks.report --gpu FILE`` makes README's section.

``python -m benchmarks.gpu prepare`` compiles the kernels beforehand, on any machine, into build/gpu/kernels.tar.xz,
which git ignores: a lease unpacks it if it lies there, or what ``--cache PACKAGE`` names. Without it, or where it is of
other kernels, each kernel is compiled when it is first asked for.

Needs torch, triton, numpy and pytest.
"""

import argparse
import json
import re
import signal
import sys
import time
from pathlib import Path

from .cache import ROOT
from .lease import Lease

STARTED = time.monotonic()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "command", choices=("lease", "prepare"), help="prepare has a --help of its own"
    )
    parser.add_argument(
        "--seconds", type=float, default=540.0, help="of the whole run; default: 540"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: in benchmarks/results/")
    parser.add_argument("--skip-done", type=Path, metavar="FILE", help="of an earlier lease")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="ITEM",
        help="such as smoke, bench:W1, kernels:1of14",
    )
    parser.add_argument(
        "--cache", type=Path, metavar="PACKAGE", help="compiled kernels, of prepare"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shrink", type=int, default=1, help="divide all sizes, for a trial")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None, started: float | None = None) -> int:
    """Run the command line; the exit code. ``started``: when the time began, now if not given."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["prepare"]:
        from . import prepare

        return prepare.main(arguments[1:])
    options = parse(arguments)
    try:
        earlier = json.loads(options.skip_done.read_text()) if options.skip_done else None
    except (OSError, ValueError) as error:
        print(f"--skip-done {options.skip_done}: {error}", file=sys.stderr)
        return 2
    from . import (
        cache,
        device,
        items,
    )  # not at the top: with torch, and its seconds are of the lease

    if options.device == "cuda" and not device.there():
        print(
            "no CUDA device: run this on a GPU machine, or try it with --device cpu --shrink 1000",
            file=sys.stderr,
        )
        return 2
    name = device.asked("name") or "cuda" if options.device == "cuda" else "cpu"
    slug = re.sub(r"\W+", "-", name.lower()).strip("-")
    path = options.json or ROOT / "benchmarks/results" / f"gpu-{slug}.json"
    archive = options.cache
    if archive is None and options.device == "cuda" and cache.ARCHIVE.exists():
        archive = cache.ARCHIVE
    try:
        every = items.listed(options.device, options.shrink, path.resolve(), archive)
        todo = items.chosen(every, options.only)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    lease = Lease(path, options.seconds, cache.kernels_hash(), earlier, started)
    lease.run(todo)
    return lease.close()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # its items are ended on the way
    sys.exit(main(started=STARTED))
