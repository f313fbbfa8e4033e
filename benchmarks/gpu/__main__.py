"""Prove and measure jactri on a GPU, from a checkout:

    pip install --no-deps --no-build-isolation -e .
    python -m benchmarks.gpu check      # the tests on the device, accuracy against float64, memory
    python -m benchmarks.gpu bench      # the card's rates; jactri and its peers at equal precision
    python -m benchmarks.gpu profile    # kernels by time, launches a call
    python -m benchmarks.gpu limits     # what bounds each kernel, by Nsight Compute's counters
    python -m benchmarks.gpu prepare    # without a GPU: compile all kernels for one; see prepare --help

Each ends inside its budget (7 minutes) and writes benchmarks/results/gpu-<device>-<command>.json after every step; the
exit code is 1 if anything failed, 2 if there is no device. ``--device cpu --shrink 1000`` tries the command itself
on a machine without a GPU. Needs torch, triton, numpy and pytest.
"""

import argparse
import re
import sys
import warnings
from pathlib import Path

import torch

from ..machine import ROOT
from ..record import Record
from . import bench, cache, check, counters, prepare, profile
from .device import Cpu, Cuda, versions
from .sizes import sized


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=("check", "bench", "profile", "limits"))
    parser.add_argument(
        "workloads", nargs="*", metavar="WORKLOAD", help="W1, W2, ...; default: all"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds; default: 420")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: in benchmarks/results/")
    parser.add_argument("--shrink", type=int, default=1, help="divide all sizes, for a trial")
    parser.add_argument(
        "--no-compile", dest="compile", action="store_false", help="bench: no compiled peers"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=check.PARTS,
        default=list(check.PARTS),
        help="check: these only",
    )
    parser.add_argument(
        "--traces", type=Path, metavar="FOLDER", help="profile: write Chrome traces there"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["prepare"]:
        return prepare.main(arguments[1:])
    cache.begin()
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "no CUDA device: run this on a GPU machine, or try it with --device cpu --shrink 1000",
            file=sys.stderr,
        )
        return 2
    try:
        workloads = sized(options.workloads, options.shrink)
    except KeyError as error:
        print(error.args[0], file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")
    device = Cuda() if options.device == "cuda" else Cpu()
    about = {**device.describe(), **versions()}
    print(", ".join(f"{k} {v}" for k, v in about.items() if v is not None), flush=True)
    slug = re.sub(r"\W+", "-", about["device"].lower()).strip("-")
    path = options.json or ROOT / "benchmarks/results" / f"gpu-{slug}-{options.command}.json"
    record = Record(path, options.command, about, options.budget)
    if options.command == "check":
        check.run(device, record, workloads, options.parts)
    elif options.command == "bench":
        bench.run(device, record, workloads, options.shrink, options.compile)
    elif options.command == "limits":
        counters.run(device, record, workloads, options.shrink)
    else:
        if options.traces:
            options.traces.mkdir(parents=True, exist_ok=True)
        profile.run(device, record, workloads, options.traces)
    return record.close()


if __name__ == "__main__":
    sys.exit(main())
