"""The user's function and its inputs, from files."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .targets import UserCodeError, UserError, find, kind


def add_inputs(command: argparse.ArgumentParser) -> None:
    """The function, its inputs, and how they are taken."""
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
        metavar="FILE",
        help="an array of numpy.save, or a tensor in a .pt or .safetensors file (FILE.safetensors:NAME); give it again "
        "for each further argument of the function",
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


def load(
    arguments: argparse.Namespace,
) -> tuple[Callable, torch.Tensor | tuple[torch.Tensor, ...]]:
    """The user's function and its inputs, after one call has shown that they fit each other."""
    function, inputs, _ = called(arguments)
    return function, inputs[0] if len(inputs) == 1 else inputs


def called(
    arguments: argparse.Namespace, device: torch.device | None = None
) -> tuple[Callable, tuple[torch.Tensor, ...], Any]:
    """The user's function, its inputs and what it made of them; ``device``: one to move both to."""
    target = arguments.target
    raw = [read(path, arguments.dtype is not None) for path in arguments.inputs]
    function = find(target)
    dtype, here = getattr(torch, arguments.dtype or "float32"), device or torch.device("cpu")
    if isinstance(function, torch.nn.Module):
        if arguments.dtype:
            function.to(dtype)
        if device is not None:
            function.to(device)
        if (
            parameter := next((p for p in function.parameters() if p.is_floating_point()), None)
        ) is not None:
            dtype, here = parameter.dtype, parameter.device
        if function.training and not arguments.train:
            function.eval()
            print(f"{target} was put into eval mode; --train keeps it as it is", file=sys.stderr)
    inputs = tuple(tensor.to(here, dtype) for tensor in raw)
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
    return function, inputs, outputs


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


def read(path: str, convert: bool) -> torch.Tensor:
    """The array or tensor in a file, in float64: what numpy.save wrote, torch.save (.pt) or safetensors (FILE:NAME)."""
    where, _, name = path.rpartition(":")
    value: np.ndarray | torch.Tensor
    if where.endswith(".safetensors"):
        value = _of_safetensors(where, name)
    elif path.endswith(".safetensors"):
        value = _of_safetensors(path, None)
    elif path.endswith((".pt", ".pth")):
        value = _of_torch(path)
    else:
        value = _of_numpy(path)
    dtype = str(value.dtype).removeprefix("torch.")
    if not dtype.startswith(("float", "bfloat", "int", "uint", "bool")):
        raise UserError(f"--input {path}: holds {dtype}; pass an array of float32 or float64")
    if not dtype.startswith(("float", "bfloat")) and not convert:
        raise UserError(
            f"--input {path}: holds {dtype}, and Jacobians are taken in floating-point inputs; "
            "save it as floats, or convert it here with --dtype float32"
        )
    # wide enough; `load` narrows it
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value, dtype="float64"))
    return value.to(torch.float64)


def _opened(
    path: str, of: str, read: Callable[[], Any], failures: tuple[type[Exception], ...]
) -> Any:
    """What ``read`` gives of a file that ``of`` wrote. Raises UserError where there is none, or another."""
    try:
        return read()
    except FileNotFoundError:
        raise UserError(
            f"--input {path}: there is no such file; pass one that {of} wrote"
        ) from None
    except OSError as error:
        raise UserError(
            f"--input {path}: {error.strerror or error}; pass a file that {of} wrote"
        ) from error
    except failures as error:
        raise UserError(
            f"--input {path}: not an array of numbers in {_FORMATS[of]} format; pass what {of} wrote"
        ) from error


_FORMATS = {"numpy.save": ".npy", "torch.save": ".pt", "safetensors": "safetensors"}


def _of_numpy(path: str) -> np.ndarray:
    # what numpy raises for other formats, truncated files and objects
    array = _opened(
        path, "numpy.save", lambda: np.load(path, allow_pickle=False), (ValueError, EOFError)
    )
    if not isinstance(array, np.ndarray):  # an .npz archive, and numpy keeps its file open
        names = ", ".join(array.files)
        array.close()
        raise UserError(
            f"--input {path}: an archive of several arrays ({names}); save one of them with numpy.save"
        )
    return array


def _of_torch(path: str) -> torch.Tensor:
    def read() -> Any:
        return torch.load(path, map_location="cpu", weights_only=True)

    # a file of something else is read as pickled, and what is found there has errors of its own
    other = pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, TypeError
    value = _opened(path, "torch.save", read, other)
    if not isinstance(value, torch.Tensor):
        raise UserError(
            f"--input {path}: holds {kind(value)}; pass what torch.save wrote of one tensor"
        )
    return value.detach().to_dense() if value.layout is not torch.strided else value.detach()


def _of_safetensors(path: str, name: str | None) -> torch.Tensor:
    if importlib.util.find_spec("safetensors") is None:
        raise UserError(f"--input {path} needs safetensors: run pip install safetensors")
    import safetensors.torch

    def read() -> dict[str, torch.Tensor]:
        if not Path(path).exists():  # whose own error has no such type
            raise FileNotFoundError
        return safetensors.torch.load_file(path)

    tensors = _opened(path, "safetensors", read, (safetensors.SafetensorError,))
    if name is None and len(tensors) == 1:
        (name,) = tensors
    if name not in tensors:
        names = ", ".join(sorted(tensors)[:12])
        raise UserError(
            f"--input {path}: holds {len(tensors)} tensors ({names}){'' if name is None else f', and no {name!r}'}; "
            f"say which one, as {path}:NAME"
        )
    return tensors[name]
