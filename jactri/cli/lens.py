"""``python -m jactri lens``: the mean Jacobian between layers of a model over prompts, which can be interrupted."""

from __future__ import annotations

import argparse
import glob
import importlib.util
import inspect
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import jactri
from jactri._src.spread.agreement import Ranks

from .processes import processes, several
from .targets import UserCodeError, UserError, find, kind, refusal

DESCRIPTION = """\
The mean over prompts of the Jacobian of a target layer in source layers, tokens
reduced at both ends: by default the Jacobian lens of every source, summed over
the target's tokens and averaged over the source's. Goes on from the file of
--out where an interrupted call left it. Needs the extra 'lens': safetensors.
"""

EPILOG = """\
FACTORY is a function without arguments, or a torch.nn.Module. It returns the
model, or a pair: the model, and what makes its inputs of a line of --prompts. A
tokenizer of transformers will do, or a function from the line to a tensor, a
tuple of arguments or a dict of keyword arguments. Without one a line holds the
numbers of its tokens. The weights must be the same each time: a file is of one
model. The file is read by jactri.JacobianMean.load. Under torchrun each process
adds its part of the prompts, and interrupted, as many processes go on; or where
prompts are fewer than processes, its part of every prompt's rows.

examples:
  python -m jactri lens model.py:make --prompts prompts.txt \\
      --source "layers.*" --target norm --out lens.safetensors
  python -m jactri lens model.py:make --prompts prompts.txt \\
      --source "layers.*" --target norm --rows 64 --reduce -1 mean \\
      --out last.safetensors --picture last.png
  torchrun --standalone --nproc-per-node 4 -m jactri lens model.py:make \\
      --prompts prompts.txt --source "layers.*" --target norm \\
      --out lens.safetensors
"""


def add_parser(commands) -> None:
    """Add the command to a parser's ``commands``."""
    command = commands.add_parser(
        "lens",
        help="the mean Jacobian between layers of a model over prompts, written to a file as it goes",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "factory", metavar="MODULE:FACTORY", help="what makes the model, for example model.py:make"
    )
    command.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="a text file, a prompt a line"
    )
    command.add_argument(
        "--source",
        nargs="+",
        required=True,
        metavar="NAME",
        help='names of layers or patterns, as "layers.*" or "layers.3:input"',
    )
    command.add_argument(
        "--target", default="", metavar="NAME", help="the name of one layer (default: the model's output)"
    )  # fmt: skip
    command.add_argument(
        "--reduce",
        nargs=2,
        type=_how,
        default=("sum", "mean"),
        metavar=("AT_TARGET", "AT_SOURCE"),
        help="what is done with tokens at each end: sum, mean, or the number of one, -1 the last (default: sum mean)",
    )
    command.add_argument(
        "--rows", type=_positive, metavar="K", help="K random rows of the target (a sketch) in place of all"
    )  # fmt: skip
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of --rows (default: 0)")
    command.add_argument(
        "--memory-limit", metavar="SIZE", help="what may be allocated beside the model, as 2GB"
    )
    command.add_argument(
        "--every", type=float, default=60.0, metavar="SECONDS", help="between two writes (default: 60)"
    )  # fmt: skip
    command.add_argument(
        "--out", type=Path, required=True, metavar="FILE.safetensors", help="the file to write"
    )
    command.add_argument(
        "--picture", type=Path, metavar="FILE.png", help="draw singular values and errors (needs matplotlib)"
    )  # fmt: skip
    command.add_argument(
        "--split", choices=("prompts", "rows"),
        help="under torchrun: what is dealt out, whole prompts or the rows of each (default: prompts, unless there "
        "are fewer of them than processes)",
    )  # fmt: skip
    command.add_argument(
        "--timeout", type=float, default=24.0, metavar="HOURS",
        help="under torchrun: how long a process that is done waits for the others (default: 24)",
    )  # fmt: skip
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    _check_before(arguments)
    lines = _lines(arguments.prompts)
    model, encode = _make(arguments.factory)
    if not several():
        prompts, mean = Prompts(arguments, model, encode, lines), _mean(arguments, model)
        found = _add(arguments, mean, prompts, arguments.out, len(lines), _shown())
        if not found:
            _tell(arguments, mean)
        return found
    with processes(arguments.timeout, "lens") as ranks:
        try:
            return _together(arguments, model, encode, lines, ranks)
        except RuntimeError as error:
            if not refusal(error):
                raise
            raise UserError(f"process {ranks.rank}: {error}") from error


def _together(arguments, model, encode, lines, ranks: Ranks) -> int:
    """By the processes of torchrun: each adds its part of the prompts, and the first merges them in their order."""
    out = arguments.out
    parts = [out.with_name(f"{out.name}.{r}-of-{ranks.size}") for r in range(ranks.size)]
    mine = parts[ranks.rank]
    left_over = sorted(out.parent.glob(glob.escape(out.name) + ".*-of-*"))
    few = len(lines) < ranks.size and not left_over
    if arguments.split == "rows" or (arguments.split is None and few):
        return _by_rows(arguments, model, encode, lines, ranks, left_over)
    with ranks.together():
        before = jactri.JacobianMean.load(out).count if out.exists() else 0
        for other in left_over:
            if other not in parts:
                raise UserError(
                    f"--out {out}: {other} was left by {other.name.rpartition('-')[2]} processes, and these are "
                    f"{ranks.size}; go on with as many as before, or remove it"
                )
        ranks.agree({
            "file": (before, out.name), "inputs": [line for _, line in lines], "call": "prompts"
        })  # fmt: skip
    left = lines[before:]
    first, last = (len(left) * r // ranks.size for r in (ranks.rank, ranks.rank + 1))
    with ranks.together():
        if not left:  # they were merged
            mine.unlink(missing_ok=True)
        prompts = Prompts(arguments, model, encode, left[first:last])
        shown = _shown() and ranks.rank == 0
        found = _add(arguments, _mean(arguments, model), prompts, mine, last - first, shown)
        if found:
            return found
        ranks.agree({})
    with ranks.together():
        if ranks.rank == 0:
            whole = _mean(arguments, model)
            if before:  # of the same model, and of these prompts
                done = lines[:before] if left else lines
                _add(arguments, whole, Prompts(arguments, model, encode, done), out, before, False)
            for part in parts:
                if part.exists():
                    whole.merge(part)
            whole.save(out)
            for part in parts:
                part.unlink(missing_ok=True)
            _tell(arguments, whole)
        ranks.agree({})
    return 0


def _by_rows(arguments, model, encode, lines, ranks: Ranks, left_over: list[Path]) -> int:
    """By the processes of torchrun: all add every prompt, each its part of the rows; the first writes the file."""
    out = arguments.out
    with ranks.together():
        if left_over:
            raise UserError(
                f"--out {out}: {left_over[0]} was left by processes that each had their own prompts; go on with "
                "--split prompts and as many as before, or remove it"
            )
        ranks.agree({
            "file": out.name, "inputs": [line for _, line in lines], "call": "rows"
        })  # fmt: skip
    mean, prompts = _mean(arguments, model, ranks.mesh), Prompts(arguments, model, encode, lines)
    found = _add(arguments, mean, prompts, out, len(lines), _shown(), ranks.rank == 0)
    if not found and ranks.rank == 0:
        _tell(arguments, mean)
    return found


def _shown() -> bool:
    """Whether progress can be shown."""
    return any(map(importlib.util.find_spec, ("rich", "tqdm")))


def _mean(arguments, model, mesh=None) -> jactri.JacobianMean:
    return jactri.JacobianMean(
        model, arguments.source, arguments.target, arguments.reduce, rows=arguments.rows, seed=arguments.seed,
        memory_limit=arguments.memory_limit, mesh=mesh,
    )  # fmt: skip


def _tell(arguments, mean: jactri.JacobianMean) -> None:
    """What was found, and where it is."""
    for line in told(mean):
        print(line)
    print(f"wrote {arguments.out}")
    if arguments.picture is not None:
        print(f"wrote {draw(mean, arguments.picture)}")


def _add(
    arguments, mean, prompts: Prompts, out: Path, count: int, shown: bool, writes: bool = True
) -> int:
    """Add prompts to a mean and its file; the exit code. Of a file, who writes it tells."""
    try:
        if writes and out.exists():
            before = jactri.JacobianMean.load(out).count
            print(f"going on from {out}, prompts done: {before}", file=sys.stderr)
        mean.run(prompts, out, every=arguments.every, progress=shown)
    except KeyboardInterrupt:
        if not writes:
            return 130
        done = jactri.JacobianMean.load(out).count if out.exists() else 0
        print(
            f"\njactri: interrupted after {done} of {count} prompts"
            + (f", which {out} holds: the same command goes on from there" if done else ""),
            file=sys.stderr,
        )
        return 130
    except (UserError, UserCodeError):
        raise
    except Exception as error:
        where = prompts.where
        if refusal(error):
            raise UserError(
                f"{arguments.factory}: {error} (at {where})"
                if where
                else f"--out {out}: {error}. Pass another file, or what it is of"
            ) from error
        if where is None:
            raise
        raise UserCodeError(
            f"{arguments.factory}: {type(error).__name__} (above) at {where}"
        ) from error
    return 0


class Prompts:
    """What a model takes, prompt by prompt; ``where`` tells which one is at hand."""

    def __init__(self, arguments, model: torch.nn.Module, encode: Callable, lines):
        self._arguments, self._encode, self._lines = arguments, encode, lines
        tensors = [*model.parameters(), *model.buffers()]
        self._device = tensors[0].device if tensors else torch.device("cpu")
        self.where: str | None = None

    def __len__(self) -> int:
        return len(self._lines)

    def __iter__(self) -> Iterator[Any]:
        for number, line in self._lines:
            self.where = f"line {number} of {self._arguments.prompts}"
            try:
                inputs = self._encode(line)
            except UserError as error:
                raise UserError(f"{self.where}: {error}") from None
            except Exception as error:  # whatever it is, it is theirs to see
                raise UserCodeError(
                    f"{self._arguments.factory}: the tokenizer raised {type(error).__name__} (above) at {self.where}"
                ) from error
            yield _moved(inputs, self._device)
        self.where = None


def _moved(inputs: Any, device: torch.device) -> Any:
    """Inputs on the model's device; what they may be, `layer_jacobian` knows."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, tuple):
        return tuple(_moved(part, device) for part in inputs)
    if hasattr(inputs, "items"):
        return {name: _moved(part, device) for name, part in inputs.items()}
    return inputs


def told(mean: jactri.JacobianMean) -> Iterator[str]:
    """A table of a mean: for each layer its size, and how far it and its identity part can be trusted."""
    from jactri.examples.common import table
    from jactri.examples.lens import identity_share

    value = mean.value()
    errors = mean.standard_error() if mean.count > 1 else {}
    rows = []
    for name, J in value.items():
        sizes = torch.linalg.svdvals(J.double())
        error = f"{errors[name].norm() / J.norm():.1%}" if errors else "-"
        share = f"{identity_share(J):.1%}" if J.shape[0] == J.shape[1] else "-"
        shape = "x".join(map(str, J.shape))
        rows.append([name, shape, sizes[0].item(), sizes.median().item(), share, error])
    headings = ["layer", "shape", "largest singular value", "median", "identity", "standard error"]
    yield f"mean over {mean.count} prompts"
    yield from table(headings, rows)


def draw(mean: jactri.JacobianMean, path: Path) -> Path:
    """Save a picture of the singular values of a mean, layer by layer."""
    from jactri.demo.pictures import save
    from jactri.examples import common
    from jactri.examples.lens import draw_spectra

    figure = common.figure(
        f"Mean Jacobians of layers, {mean.count} prompts",
        "Directions of a layer with small singular values do not count at the target.",
        (10, 6.4),
    )
    draw_spectra(common.panels(figure, 1, 1, left=0.09, right=0.97, bottom=0.1), mean.value())
    return save(figure, path)


def _check_before(arguments: argparse.Namespace) -> None:
    """What would fail after minutes of work fails now."""
    asked = {"--out": (arguments.out, "safetensors", "safetensors")}
    if arguments.picture is not None:
        asked["--picture"] = (arguments.picture, "matplotlib", "matplotlib")
    for name, (path, module, package) in asked.items():
        if importlib.util.find_spec(module) is None:
            raise UserError(f"{name} needs {package}: run pip install {package}")
        try:
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            raise UserError(
                f"{name} {path}: {error.strerror or error}; pass a file in a folder that can be written to"
            ) from error
        if path.is_dir():
            raise UserError(f"{name} {path}: is a folder; pass the name of a file in it")


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a file that are not blank, with their numbers."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--prompts {path}: {error.strerror or error}; pass a text file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {path}: is no text in UTF-8 ({error.reason})") from error
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"--prompts {path}: holds no line of text; write a prompt a line")
    return lines


def _make(target: str) -> tuple[torch.nn.Module, Callable[[str], Any]]:
    """The model, in eval mode, and what makes inputs of a line."""
    found: Any = find(target)
    if not isinstance(found, torch.nn.Module):
        try:
            inspect.signature(found).bind()
        except TypeError as error:
            raise UserError(
                f"{target}: a factory is called without arguments ({error}); pass one that needs none"
            ) from None
        except ValueError:  # some C functions have no signature
            pass
        try:
            found = found()
        except Exception as error:  # whatever it is, it is theirs to see
            raise UserCodeError(f"{target} raised {type(error).__name__} (above)") from error
    model, encode = found if isinstance(found, tuple) and len(found) == 2 else (found, _numbers)
    if not isinstance(model, torch.nn.Module) or not callable(encode):
        got = kind(found)
        if isinstance(found, tuple):
            got = f"a tuple of {', '.join(map(kind, found)) or 'nothing'}"
        raise UserError(
            f"{target} returned {got}; return a torch.nn.Module, or a pair of one and a tokenizer or function from a "
            "line of text to the model's inputs"
        )
    if model.training:
        model.eval()
        print(f"{target} was put into eval mode", file=sys.stderr)
    return model, _by_tokenizer(encode)


def _by_tokenizer(encode: Callable) -> Callable[[str], Any]:
    """What makes inputs of a line: where it knows ``return_tensors``, as tokenizers do, torch's tensors."""
    try:
        named = inspect.signature(encode).parameters
    except ValueError:
        return encode
    if "return_tensors" not in named:
        return encode
    return lambda line: encode(line, return_tensors="pt")


def _numbers(line: str) -> Tensor:
    """The tokens of a line of numbers, ``(1, tokens)``."""
    try:
        return torch.tensor([[int(word) for word in line.split()]])
    except ValueError:
        raise UserError(
            f"{line.strip()[:40]!r} is no line of token numbers; for text, let FACTORY return (model, tokenizer)"
        ) from None


def _how(text: str) -> str | int:
    if text in ("sum", "mean"):
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected sum, mean or the number of a token, not {text!r}"
        ) from None


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a positive whole number, not {text!r}")
    return int(text)
