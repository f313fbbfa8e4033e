"""The command line: ``python -m jactri demo | check | explain | profile | jacobian | lens | doctor``.

Exit codes: 0 all is well, 1 a result is wrong or something is missing, 2 the call was wrong or the user's own function
failed. A user's mistake is answered in one sentence; only an exception out of their own code shows a traceback.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import jactri

from . import jacobian, lens
from .inputs import add_inputs, load
from .targets import UserCodeError, UserError, refusal, without_our_frames

EPILOG = """\
examples:
  python -m jactri demo
      the main job, on real images, in about a minute
  python -m jactri check model.py:net --input x.npy
      is jactri right on my model?
  python -m jactri explain model.py:net --input x.npy --per-sample
      what would jactri do, and at what cost?
  python -m jactri profile model.py:net --input x.npy --trace trace.json
      where does the time go, layer by layer?
  python -m jactri jacobian model.py:net --input x.npy --out J.npy
      the whole Jacobian into a file, interrupted when you like; by several
      processes under torchrun --nproc-per-node 4 -m jactri jacobian ...
  python -m jactri lens model.py:make --prompts prompts.txt \\
      --source "layers.*" --target norm --out lens.safetensors
      the Jacobian lens of a language model, interrupted when you like
  python -m jactri doctor
      what will run where, and what is missing?

python -m jactri COMMAND --help tells more about each.
"""

MODEL_EPILOG = """\
MODULE is a dotted module name or a path to a .py file; the current folder is
importable. FUNCTION is a name in it (dots reach attributes): a function of
tensors or an nn.Module instance, which is put into eval mode unless --train
is given.

examples:
  python -m jactri {command} model.py:net --input x.npy
  python -m jactri {command} project.nets:policy.actor --input s.npy --per-sample
  python -m jactri {command} physics.py:residual --input x.npy --input t.npy
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command; each sets ``run``, a function of the parsed arguments to an exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m jactri",
        description="Exact Jacobians of neural networks in PyTorch.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"jactri {jactri.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo",
        help="train three networks on handwritten digits, compute, check, time and draw their Jacobians",
        description="Train a denoiser, an autoencoder and a classifier on scikit-learn's handwritten digits, "
        "compute the Jacobian of every test image and the decoder's pullback metric, check them against float64 "
        "autograd, time them beside torch.autograd.functional and torch.func, and draw them. "
        "Needs the extra 'demo': scikit-learn, matplotlib, rich.",
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("jactri-demo"),
        metavar="DIR",
        help="folder for the PNGs (default: %(default)s)",
    )
    demo.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="split, weights and noise (default: 0)"
    )
    demo.add_argument(
        "--quick", action="store_true", help="a few seconds: little training, timings of no weight"
    )
    demo.set_defaults(run=_demo)

    for name, run, summary in (
        (
            "check",
            _check,
            "compare jactri with torch on your own function; exits with 1 where they differ",
        ),
        (
            "explain",
            _explain,
            "show the plan for your own function: steps, structure, cost, fallbacks",
        ),
        (
            "profile",
            _profile,
            "measure the steps of that plan beside what was predicted, and write a trace",
        ),
    ):
        command = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=MODEL_EPILOG.format(command=name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_inputs(command)
        if name == "check":
            command.add_argument(
                "--finite-difference",
                action="store_true",
                help="compare with central differences too, which share no derivative rule with torch",
            )
        if name == "profile":
            command.add_argument(
                "--trace",
                metavar="FILE.json",
                help="write a Chrome trace to this file (.json or .json.gz)",
            )
        command.set_defaults(run=run)

    jacobian.add_parser(commands)
    lens.add_parser(commands)

    doctor = commands.add_parser(
        "doctor",
        help="report versions, devices, what will run where, and what is missing",
        description="Report versions, devices, what will run where and what is missing, and test one Jacobian. "
        "Exits with 1 if jactri cannot work here.",
    )
    doctor.set_defaults(run=_doctor)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; argparse's own errors leave by ``SystemExit(2)``."""
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except UserError as error:
        print(f"jactri: error: {error}", file=sys.stderr)
    except UserCodeError as error:
        traceback.print_exception(without_our_frames(error.__cause__))
        print(f"jactri: error: {error}", file=sys.stderr)
    except BrokenPipeError:  # the reader of our output left, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    gc.collect()  # frames of an error hold process groups, whose threads end before the interpreter does
    return 2


def _seed(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 0 to {2**32 - 1}, not {text!r}"
        )
    return int(text)


def _demo(arguments: argparse.Namespace) -> int:
    from jactri.demo import DemoFailure, MissingExtra, run

    out = arguments.out
    try:  # before a minute of work, not after it
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UserError(
            f"--out {out}: {error.strerror or error}; pass a folder that can be written to"
        ) from error
    try:
        run(out, seed=arguments.seed, quick=arguments.quick)
    except MissingExtra as error:
        raise UserError(str(error)) from error
    except DemoFailure as error:
        print(f"jactri: wrong result: {error}", file=sys.stderr)
        return 1
    return 0


def _check(arguments: argparse.Namespace) -> int:
    function, inputs = load(arguments)
    check = functools.partial(jactri.check, finite_difference=arguments.finite_difference)
    report = _ask(check, function, inputs, arguments)
    print(report)
    return 0 if report.ok else 1


def _explain(arguments: argparse.Namespace) -> int:
    function, inputs = load(arguments)
    print(_ask(jactri.explain, function, inputs, arguments))
    return 0


def _profile(arguments: argparse.Namespace) -> int:
    function, inputs = load(arguments)
    profile = functools.partial(jactri.profile, path=arguments.trace)
    try:
        print(_ask(profile, function, inputs, arguments))
    except OSError as error:
        if not refusal(error):
            raise
        raise UserError(f"--trace {arguments.trace}: {error.strerror}") from error
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from jactri.cli.doctor import examine

    report = examine()
    print(report)
    return 0 if report.ok else 1


def _ask(command: Callable, function: Callable, inputs, arguments: argparse.Namespace):
    try:
        return command(function, inputs, per_sample=arguments.per_sample)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if not refusal(error):
            raise
        raise UserError(f"{arguments.target}: {error}") from error
