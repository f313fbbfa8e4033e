"""The command line: ``python -m jactri demo | check | explain | profile | lens | doctor``.

Exit codes: 0 all is well, 1 a result is wrong or something is missing, 2 the call was wrong or the user's own function
failed. A user's mistake is answered in one sentence; only an exception out of their own code shows a traceback.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

import jactri

from . import lens
from .targets import UserCodeError, UserError, find, kind, refusal, without_our_frames

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
        command.add_argument(
            "target",
            metavar="MODULE:FUNCTION",
            help="where your function is, for example model.py:net",
        )
        command.add_argument(
            "--input",
            dest="inputs",
            action="append",
            required=True,
            metavar="FILE.npy",
            help="an array saved by numpy.save; give it again for each further argument of the function",
        )
        command.add_argument(
            "--per-sample",
            action="store_true",
            help="axis 0 counts samples that do not mix; J is (N, *out, *in)",
        )
        command.add_argument(
            "--dtype",
            choices=("float32", "float64"),
            help="convert the arrays, and a module's parameters, to this (default: what the module has, else float32)",
        )
        command.add_argument(
            "--train", action="store_true", help="leave a module in the mode that it is in"
        )
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
    function, inputs = _load(arguments)
    check = functools.partial(jactri.check, finite_difference=arguments.finite_difference)
    report = _ask(check, function, inputs, arguments)
    print(report)
    return 0 if report.ok else 1


def _explain(arguments: argparse.Namespace) -> int:
    function, inputs = _load(arguments)
    print(_ask(jactri.explain, function, inputs, arguments))
    return 0


def _profile(arguments: argparse.Namespace) -> int:
    function, inputs = _load(arguments)
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


def _load(
    arguments: argparse.Namespace,
) -> tuple[Callable, torch.Tensor | tuple[torch.Tensor, ...]]:
    """The user's function and its inputs, after one call has shown that they fit each other."""
    target = arguments.target
    raw = [_read_array(path, arguments.dtype is not None) for path in arguments.inputs]
    function = find(target)
    dtype, device = getattr(torch, arguments.dtype or "float32"), torch.device("cpu")
    if isinstance(function, torch.nn.Module):
        if arguments.dtype:
            function.to(dtype)
        if (
            parameter := next((p for p in function.parameters() if p.is_floating_point()), None)
        ) is not None:
            dtype, device = parameter.dtype, parameter.device
        if function.training and not arguments.train:
            function.eval()
            print(f"{target} was put into eval mode; --train keeps it as it is", file=sys.stderr)
    inputs = tuple(tensor.to(device, dtype) for tensor in raw)
    _require_arity(target, function, len(inputs))
    try:
        # Leaves that require grad, as inside jactri: the function may itself differentiate.
        outputs = function(*(tensor.clone().requires_grad_() for tensor in inputs))
    except Exception as error:  # whatever it is, it is theirs to see
        shapes = ", ".join(
            f"{str(dtype).removeprefix('torch.')} {tuple(tensor.shape)}" for tensor in inputs
        )
        raise UserCodeError(
            f"{target} raised {type(error).__name__} (above) when called with {shapes}"
        ) from error
    _require_tensors(target, outputs)
    return function, inputs[0] if len(inputs) == 1 else inputs


def _require_arity(target: str, function: Callable, count: int) -> None:
    takes = function.forward if isinstance(function, torch.nn.Module) else function
    try:
        signature = inspect.signature(takes)
    except ValueError:  # some C functions have none
        return
    try:
        signature.bind(*range(count))
    except TypeError as error:
        raise UserError(
            f"{target}{signature} cannot take {count} argument{'s' * (count != 1)} ({error}); "
            "pass --input once for each tensor that it takes"
        ) from None


def _require_tensors(target: str, outputs: object) -> None:
    parts = outputs if isinstance(outputs, tuple) and outputs else (outputs,)
    for part in parts:
        if not isinstance(part, torch.Tensor):
            raise UserError(
                f"{target} returned {kind(part)}; it has to return a tensor or a tuple of tensors"
            )


def _read_array(path: str, convert: bool) -> torch.Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(
            f"--input {path}: there is no such file; pass one that numpy.save wrote"
        ) from None
    except OSError as error:
        raise UserError(
            f"--input {path}: {error.strerror or error}; pass a file that numpy.save wrote"
        ) from error
    except (
        ValueError,
        EOFError,
    ) as error:  # what numpy raises for other formats, truncated files and objects
        raise UserError(
            f"--input {path}: not an array of numbers in .npy format; pass what numpy.save wrote"
        ) from error
    if not isinstance(array, np.ndarray):  # an .npz archive, and numpy keeps its file open
        names = ", ".join(array.files)
        array.close()
        raise UserError(
            f"--input {path}: an archive of several arrays ({names}); save one of them with numpy.save"
        )
    if array.dtype.kind not in "fiub":
        raise UserError(f"--input {path}: holds {array.dtype}; pass an array of float32 or float64")
    if array.dtype.kind != "f" and not convert:
        raise UserError(
            f"--input {path}: holds {array.dtype}, and Jacobians are taken in floating-point inputs; "
            "save it as floats, or convert it here with --dtype float32"
        )
    return torch.from_numpy(np.array(array, dtype="float64"))  # wide enough; _load narrows it
