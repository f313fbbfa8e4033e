"""``python -m jactri jacobian``: one Jacobian into a file, by one process or those of torchrun, which can be
interrupted."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import jactri
from jactri._src.base.journal import left_by_ranks
from jactri._src.base.memory import si
from jactri._src.spread.agreement import Ranks

from .inputs import add_inputs, called
from .processes import processes
from .targets import UserError, refusal

DESCRIPTION = """\
The Jacobian of your function at an input, written to a .npy file as it is
computed, part by part: it may be larger than memory. The same command goes on
where an interrupted one stopped, with as many processes as you like.
"""

EPILOG = """\
Under torchrun each process computes its part of the rows, columns or samples,
and all write to the one file, on one machine. The model and the inputs must be
the same each time, and in every process: seed what is random.

examples:
  python -m jactri jacobian model.py:net --input x.npy --out J.npy
  python -m jactri jacobian model.py:net --input x.npy --out J.npy \\
      --per-sample --memory-limit 2GB
  torchrun --standalone --nproc-per-node 4 -m jactri jacobian \\
      model.py:net --input x.npy --out J.npy

exit codes: 0 the file is whole, 2 the call was wrong or a process failed,
130 interrupted.
"""

STRATEGIES = {
    "auto": "auto",
    "forward": "forward-mode",
    "reverse": "reverse-mode",
    "mixed": "mixed",
}


def add_parser(commands) -> None:
    """Add the command to a parser's ``commands``."""
    command = commands.add_parser(
        "jacobian",
        help="the whole Jacobian of your own function into a file, by several processes if asked for",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_inputs(command)
    command.add_argument(
        "--out",
        dest="outs",
        action="append",
        required=True,
        type=Path,
        metavar="FILE.npy",
        help="the file to write, (*out, *in); give it again for each further input",
    )
    command.add_argument(
        "--strategy",
        choices=STRATEGIES,
        default="auto",
        help="the order of accumulation (default: the cheapest)",
    )
    command.add_argument(
        "--chunk-size", type=int, metavar="K", help="how many rows or columns run at once"
    )
    command.add_argument(
        "--memory-limit",
        metavar="SIZE",
        help="what a process may allocate beside the model, as 2GB",
    )
    command.add_argument(
        "--device", metavar="DEVICE", help="where to compute, as cuda (a card for each process)"
    )
    command.add_argument(
        "--restart", action="store_true", help="begin anew, whatever is in the file"
    )
    command.add_argument(
        "--timeout", type=float, default=24.0, metavar="HOURS",
        help="how long a process that is done waits for the others (default: 24)",
    )  # fmt: skip
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    if not dist.is_available():
        raise UserError("jacobian needs torch.distributed, which this torch was built without")
    for path in arguments.outs:
        if path.suffix != ".npy":
            raise UserError(
                f"--out {path}: is written as numpy.save does; name it {path.with_suffix('.npy')}"
            )
    function, inputs, output = called(arguments, _device(arguments.device))
    shapes = _shapes(arguments, inputs, output)
    with processes(arguments.timeout, "jacobian") as ranks:
        shown = any(map(importlib.util.find_spec, ("rich", "tqdm")))
        single = len(inputs) == 1
        made: list[Path] = []
        try:
            outs = _files(arguments, shapes, inputs[0].dtype, ranks, made)
            jactri.jacobian(
                function,
                inputs[0] if single else inputs,
                strategy=STRATEGIES[arguments.strategy],
                per_sample=arguments.per_sample,
                chunk_size=arguments.chunk_size,
                memory_limit=arguments.memory_limit,
                out=outs[0] if single else tuple(outs),
                progress=shown,
                resume=not arguments.restart,
                mesh=ranks.mesh,
            )
        except KeyboardInterrupt:
            _drop(made)
            print("\njactri: interrupted: the same command goes on from there", file=sys.stderr)
            return 130
        except Exception as error:
            _drop(made)
            known = isinstance(error, (IndexError, RuntimeError, TypeError, ValueError))
            if not known or not refusal(error):
                raise
            who = f"process {ranks.rank}: " if ranks.size > 1 else ""
            told = str(error).replace("resume=False", "--restart")  # as it is written here
            raise UserError(f"{who}{arguments.target}: {told}") from error
        if ranks.rank == 0:
            for path, out in zip(arguments.outs, outs, strict=True):
                print(f"wrote {path}, {out.dtype} {tuple(out.shape)}, {si(out.nbytes)}B")
    return 0


def _device(name: str | None) -> torch.device | None:
    """The device of this process."""
    if name is None:
        return None
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name}: {str(error).splitlines()[0]}; leave it out for the CPU"
        ) from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _shapes(arguments, inputs, output) -> list[tuple[int, ...]]:
    """Of the files. Raises UserError where they are not as many as Jacobians, or hold none."""
    if isinstance(output, tuple):
        raise UserError(
            f"{arguments.target} returned a tuple of {len(output)} tensors, and a file holds the Jacobian of one; "
            "write a function that returns one of them"
        )
    if len(arguments.outs) != len(inputs):
        raise UserError(
            f"--out is given {len(arguments.outs)} times for {len(inputs)} inputs; pass it once for each --input"
        )
    if inputs[0].dtype not in (torch.float16, torch.float32, torch.float64):
        raise UserError(
            f"{arguments.target} computes in {inputs[0].dtype}, which numpy's files do not hold; pass --dtype float32"
        )
    if arguments.per_sample and any(t.dim() == 0 for t in (output, *inputs)):
        raise UserError(
            "--per-sample needs a first axis of all inputs and of the output: that of the samples"
        )
    skip = int(arguments.per_sample)
    return [(*output.shape, *x.shape[skip:]) for x in inputs]


def _files(
    arguments, shapes, dtype: torch.dtype, ranks: Ranks, made: list[Path]
) -> list[np.memmap]:
    """The files, which the first process makes where there is nothing to go on from: ``made``."""
    kind = np.dtype(str(dtype).removeprefix("torch."))
    with ranks.together():
        if ranks.rank == 0:
            for path, shape in zip(arguments.outs, shapes, strict=True):
                if _make(path, shape, kind, arguments.restart):
                    made.append(path)
        ranks.agree({"shapes": (shapes, str(kind))})
        return [np.lib.format.open_memmap(path, mode="r+") for path in arguments.outs]


def _drop(made: list[Path]) -> None:
    """Remove files of this call in which there is nothing."""
    if not any(_left(path) for path in made):
        for path in made:
            path.unlink(missing_ok=True)


def _left(path: Path) -> dict[int, Path]:
    return left_by_ranks(path.with_name(path.name + ".progress"))


def _make(path: Path, shape: tuple[int, ...], kind: np.dtype, restart: bool) -> bool:
    """Whether a file was made. Raises UserError where it cannot be, or one is there."""
    left = _left(path)
    try:
        if left and path.exists() and not restart:
            there: Any = np.lib.format.open_memmap(path, mode="r+")
            if (there.shape, there.dtype) != (shape, kind):
                raise UserError(
                    f"--out {path}: holds {there.dtype} {there.shape}, and this Jacobian is {kind} {shape}; pass "
                    "another file, or --restart"
                )
            print(f"going on from {path}", file=sys.stderr)
            return False
        if path.exists() and not restart:
            raise UserError(f"--out {path}: is there already; pass another file, or --restart")
        for file in left.values():  # of a file that is gone
            file.unlink()
        np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape)
        return True
    except OSError as error:
        raise UserError(
            f"--out {path}: {error.strerror or error}; pass a file in a folder that can be written to"
        ) from error
    except ValueError as error:
        raise UserError(f"--out {path}: {error}; pass another file, or --restart") from error
