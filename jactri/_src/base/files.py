"""Tensors with a description on disk, by safetensors: written as a whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

_KEY = "jactri"


def _safetensors(of: str) -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError(
            f"{of} needs safetensors: pip install safetensors, or pip install 'jactri[lens]'"
        ) from None
    return safetensors


def available() -> None:
    """Raise ImportError where no file can be written."""
    _safetensors("path=")


def write(path: str | os.PathLike, tensors: dict[str, Tensor], told: dict[str, Any]) -> None:
    """Write a file in one step: it is the old one, or whole, whatever happens in between."""
    library, path = _safetensors("save"), Path(path)
    beside = path.with_name(path.name + ".new")
    ready = {name: t.detach().contiguous() for name, t in tensors.items()}
    try:
        library.torch.save_file(ready, beside, {_KEY: json.dumps(told)})
        with open(beside, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write` wrote. Raises RuntimeError for another file."""
    library = _safetensors("load")
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {os.fspath(path)!r}")
    try:
        with library.safe_open(path, framework="pt") as opened:
            told = (opened.metadata() or {}).get(_KEY)
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except library.SafetensorError as error:
        raise RuntimeError(f"{os.fspath(path)!r} is no whole safetensors file: {error}") from None
    if told is None:
        raise RuntimeError(f"{os.fspath(path)!r} was not written by jactri")
    return tensors, json.loads(told)
