"""``python -m jactri jacobian``: a file written by one process or several, gone on with, and every wrong call."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from jactri._src.spread import dealt
from jactri._src.spread.dealt import Dealt
from jactri.cli import commands as cli

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without torch.distributed"
)

MODEL = """
import torch

torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Dropout(), torch.nn.Linear(8, 3)).double()
half = torch.nn.Linear(4, 2).bfloat16()


def product(x, t):
    return (x.sin() * t).cumsum(0)


def two(x):
    return x, x.sin()


def mixes(x):
    return x - x.mean(0)


def total(x):
    return x.sum()


def raises(x):
    raise KeyError("mine")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "model.py").write_text(MODEL)
    x = np.linspace(-1, 1, 20).reshape(5, 4)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "whole.npy", np.arange(20).reshape(5, 4))
    np.save(tmp_path / "complex.npy", np.ones(3) * 1j)
    torch.save(torch.from_numpy(x), tmp_path / "x.pt")
    torch.save({"a": 1}, tmp_path / "dict.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(before)
    sys.modules.pop("model", None)


def net():
    scope = {}
    exec(MODEL, scope)
    return scope["net"].eval()


def points():
    return torch.from_numpy(np.load("x.npy"))


def run(*arguments, target="model.py:net", given=("x.npy",), out=("J.npy",)):
    inputs = [w for name in given for w in ("--input", name)]
    outs = [w for name in out for w in ("--out", name)]
    return cli.main(["jacobian", target, *inputs, *outs, *arguments])


def check(name="J.npy", want=None):
    want = torch.autograd.functional.jacobian(net(), points()) if want is None else want
    assert torch.allclose(torch.from_numpy(np.load(name)), want, rtol=1e-12, atol=1e-12)
    assert not [n for n in os.listdir() if "progress" in n]


def interrupt(monkeypatch, after):
    """Ctrl-C in the middle of a part."""
    done = []

    def noted(self, span, number, parts, real=Dealt.done):
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(span)
        real(self, span, number, parts)

    monkeypatch.setattr(Dealt, "done", noted)
    return done


def test_a_file(capsys):
    assert run() == 0
    told = capsys.readouterr()
    assert told.out == "wrote J.npy, float64 (5, 3, 5, 4), 2.4 kB\n"
    assert "was put into eval mode" in told.err
    check()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--per-sample",),
        ("--per-sample", "--strategy", "forward", "--chunk-size", "1"),
        ("--memory-limit", "2KB"),
    ],
    ids=" ".join,
)
def test_options(arguments):
    assert run(*arguments) == 0
    want = torch.autograd.functional.jacobian(net(), points())
    each = torch.arange(5)
    check(want=want[each, :, each] if "--per-sample" in arguments else want)


def test_several_inputs_one_number_and_dtypes(capsys):
    assert run(target="model.py:product", given=("x.npy", "x.npy"), out=("a.npy", "b.npy")) == 0
    x = points().float()
    want = torch.autograd.functional.jacobian(lambda x, t: (x.sin() * t).cumsum(0), (x, x))
    for name, block in zip(("a.npy", "b.npy"), want, strict=True):
        assert torch.allclose(torch.from_numpy(np.load(name)), block, atol=1e-6)
    assert run("--dtype", "float64", target="model.py:total", given=("whole.npy",)) == 0
    check(want=torch.ones(5, 4, dtype=torch.float64))


def test_files_of_torch_and_safetensors():
    library = pytest.importorskip("safetensors.torch")
    library.save_file({"x": points()}, "one.safetensors")
    library.save_file({"x": points(), "y": points()}, "two.safetensors")
    for k, given in enumerate(("x.pt", "one.safetensors", "two.safetensors:y")):
        assert run(given=(given,), out=(f"{k}.npy",)) == 0
        check(f"{k}.npy")


def test_interrupted_it_goes_on_by_the_processes_of_torchrun(monkeypatch, capsys):
    monkeypatch.setattr(dealt, "EVERY", 0.0)
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        assert run() == 130
    assert "interrupted: the same command goes on from there" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        done = interrupt(patch, 1)
        assert run() == 130
        assert "going on from J.npy" in capsys.readouterr().err and len(done) == 1
    whole = np.load("J.npy")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "jactri",
         "jacobian", "model.py:net", "--input", "x.npy", "--out", "J.npy"],
        capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "going on from J.npy" in done.stderr
    assert done.stdout == "wrote J.npy, float64 (5, 3, 5, 4), 2.4 kB\n"
    assert not np.array_equal(whole, np.load("J.npy"))
    check()


def test_it_may_begin_anew(monkeypatch, capsys):
    assert run() == 0
    assert run() == 2
    assert (
        "--out J.npy: is there already; pass another file, or --restart" in capsys.readouterr().err
    )
    assert run("--restart") == 0
    check()
    with monkeypatch.context() as patch:
        interrupt(patch, 1)
        assert run("--restart") == 130
    assert run("--per-sample") == 2
    assert (
        "--out J.npy: holds float64 (5, 3, 5, 4), and this Jacobian is float64 (5, 3, 4)"
        in capsys.readouterr().err
    )
    np.save("x.npy", np.ones((5, 4)))
    assert run() == 2
    told = capsys.readouterr().err
    assert "of an interrupted call for another computation (its inputs differs)" in told
    assert "pass --restart to start over" in told and "resume=" not in told
    assert run("--restart") == 0
    check()


WRONG = {
    "few files": ({"target": "model.py:product", "given": ("x.npy", "x.npy")}, "--out is given 1 times for 2 inputs"),
    "two outputs": ({"target": "model.py:two"}, "returned a tuple of 2 tensors"),
    "no function": ({"target": "model.py:nett"}, "model.py has no 'nett'"),
    "its own error": ({"target": "model.py:raises"}, "raised KeyError (above) when called with float32 (5, 4)"),
    "no file": ({"given": ("y.npy",)}, "--input y.npy: there is no such file; pass one that numpy.save wrote"),
    "no torch file": ({"given": ("y.pt",)}, "--input y.pt: there is no such file; pass one that torch.save wrote"),
    "integers": ({"given": ("whole.npy",)}, "--input whole.npy: holds int64"),
    "complex": ({"given": ("complex.npy",)}, "--input complex.npy: holds complex128"),
    "a dict": ({"given": ("dict.pt",)}, "--input dict.pt: holds a dict; pass what torch.save wrote of one tensor"),
    "text": ({"given": ("text.pt",)}, "--input text.pt: not an array of numbers in .pt format"),
    "safetensors": ({"given": ("text.safetensors",)}, "not an array of numbers in safetensors format"),
    "bfloat16": ({"target": "model.py:half"}, "computes in torch.bfloat16, which numpy's files do not hold"),
    "another format": ({"out": ("J.pt",)}, "--out J.pt: is written as numpy.save does; name it J.npy"),
    "no folder": ({"out": ("no/J.npy",)}, "--out no/J.npy: No such file or directory"),
    "limit": (("--memory-limit", "many"), "memory_limit must be bytes above 0"),
    "too small": (("--memory-limit", "100"), "memory_limit is 100 B"),
    "chunk": (("--chunk-size", "0"), "chunk_size must be a positive integer"),
    "device": (("--device", "quantum"), "--device quantum: "),
    "samples that mix": (("--per-sample",), "per_sample=True, but samples mix"),
    "no samples": (("--per-sample",), "--per-sample needs a first axis"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_are_answered_in_a_sentence(name, capsys):
    how, told = WRONG[name]
    where = {"samples that mix": "model.py:mixes", "no samples": "model.py:total"}.get(name)
    options = how if isinstance(how, dict) else {"target": where} if where else {}
    assert run(*(() if isinstance(how, dict) else how), **options) == 2
    error = capsys.readouterr().err
    assert told in error.splitlines()[-1]
    assert ("Traceback" in error) == (name == "its own error")
    assert not torch.distributed.is_initialized()


def test_two_of_one_safetensors_file(capsys):
    library = pytest.importorskip("safetensors.torch")
    library.save_file({"x": points(), "y": points()}, "two.safetensors")
    for given in ("two.safetensors", "two.safetensors:z"):
        assert run(given=(given,)) == 2
        assert "holds 2 tensors (x, y)" in (error := capsys.readouterr().err)
        assert "say which one, as two.safetensors:NAME" in error


def test_files_of_torch_are_inputs_of_other_commands_too():
    assert cli.main(["check", "model.py:net", "--input", "x.pt"]) == 0
