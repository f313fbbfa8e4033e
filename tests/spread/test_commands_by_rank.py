"""Commands of several processes: one file, the same as of one."""

import importlib
import os
import sys

import numpy as np
import pytest
import torch

import jactri
from jactri.cli import commands as cli

MODEL = """
import torch
from torch import nn

stop = None


def make():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)]
    net = nn.Sequential(nn.Embedding(9, 4), *layers).double()

    def encode(line):
        if line == stop:
            raise KeyboardInterrupt
        if line == "wrong":
            raise KeyError("mine")
        return torch.tensor([[ord(c) - ord("a") for c in line]])

    return net, encode


torch.manual_seed(0)
net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
"""
LINES = ["abc", "aabbi", "hgf", "e", "cacc"]
CALL = ["--source", "1", "2", "--target", "3", "--out", "lens.safetensors"]


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("safetensors")
    (tmp_path / "of_ranks.py").write_text(MODEL)
    (tmp_path / "prompts.txt").write_text("\n".join(LINES))
    np.save(tmp_path / "x.npy", np.linspace(-1, 1, 20).reshape(5, 4))
    return tmp_path


def called(folder, *arguments, stop=None):
    """The exit code of a command in a folder, and its last line of errors, on this rank."""
    import contextlib
    import io

    before, said = os.getcwd(), io.StringIO()
    os.chdir(folder)
    try:
        sys.modules.pop("of_ranks", None)
        sys.path.insert(0, folder)
        importlib.import_module("of_ranks").stop = stop
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = cli.main(list(arguments))
    finally:
        os.chdir(before)
        sys.path.remove(folder)
    return code, (said.getvalue().strip().splitlines() or [""])[-1]


def lens(folder, stop=None, *more):
    call = "lens", "of_ranks:make", "--prompts", "prompts.txt", *CALL, *more
    return called(folder, *call, stop=stop)


def check(folder, monkeypatch):
    """The file is that of one process, whose command goes on from it."""
    monkeypatch.chdir(folder)
    (folder / "of_ranks.py").write_text(MODEL)
    assert sorted(n for n in os.listdir() if "lens" in n) == ["lens.safetensors"]
    mine = jactri.JacobianMean.load("lens.safetensors")
    scope = {}
    exec(MODEL, scope)
    net, encode = scope["make"]()
    want = jactri.JacobianMean(net, ["1", "2"], "3").run(
        map(encode, (folder / "prompts.txt").read_text().split())
    )
    for one, other in (
        (mine.value(), want.value()),
        (mine.standard_error(), want.standard_error()),
    ):
        for name in other:
            torch.testing.assert_close(one[name], other[name], rtol=1e-12, atol=1e-12)
    assert lens(str(folder))[0] == 0


@pytest.mark.parametrize("count", [2, 4])
def test_prompts_are_dealt_out_and_merged(ranks, folder, monkeypatch, count):
    assert [code for code, _ in ranks(count, lens, str(folder))] == [0] * count
    check(folder, monkeypatch)
    with open(folder / "prompts.txt", "a") as prompts:
        prompts.write("\nfeed\nbad")
    assert [code for code, _ in ranks(2, lens, str(folder))] == [0, 0]
    check(folder, monkeypatch)


def test_an_interrupted_lens_goes_on_with_as_many(ranks, folder, monkeypatch):
    found = ranks(2, lens, str(folder), "cacc", timeout=20)
    assert found[1][0] == 130 and "interrupted after 2 of 3 prompts" in found[1][1]
    assert found[0][0] == 2 and "a rank of the mesh has ended" in found[0][1]
    for code, error in ranks(3, lens, str(folder)):
        assert code == 2 and "was left by 2 processes, and these are 3; go on with as many" in error
    assert [code for code, _ in ranks(2, lens, str(folder))] == [0, 0]
    check(folder, monkeypatch)


def test_a_prompt_that_fails_is_told(ranks, folder):
    (folder / "prompts.txt").write_text("abc\nwrong\nhgf\ne")
    (zero, one) = ranks(2, lens, str(folder), timeout=20)
    assert (
        zero[0] == 2 and "the tokenizer raised KeyError (above) at line 2 of prompts.txt" in zero[1]
    )
    assert one[0] == 2 and "process 1: lens: rank 0 failed" in one[1]


def test_rows_are_dealt_out(ranks, folder, monkeypatch):
    """By word, interrupted and gone on by other numbers of processes; and where there are fewer prompts than these."""
    by_rows = None, "--split", "rows"
    found = ranks(2, lens, str(folder), "cacc", "--split", "rows")
    assert [code for code, _ in found] == [130] * 2 and "after 4 of 5 prompts" in found[0][1]
    assert jactri.JacobianMean.load(folder / "lens.safetensors").count == 4
    assert [code for code, _ in ranks(3, lens, str(folder), *by_rows)] == [0] * 3
    check(folder, monkeypatch)
    os.remove(folder / "lens.safetensors")
    (folder / "prompts.txt").write_text("abc\nhgf")
    found = ranks(3, lens, str(folder), "hgf")
    assert [code for code, _ in found] == [130] * 3 and "after 1 of 2 prompts" in found[0][1]
    assert [code for code, _ in ranks(3, lens, str(folder))] == [0] * 3
    check(folder, monkeypatch)
    left = folder / "lens.safetensors.1-of-2"
    left.touch()
    for code, error in ranks(2, lens, str(folder), *by_rows):
        assert code == 2 and "go on with --split prompts and as many as before" in error


def jacobian(folder, *more):
    return called(folder, "jacobian", "of_ranks:net", "--input", "x.npy", "--out", "J.npy", *more)


def test_a_jacobian(ranks, folder):
    for code, error in ranks(2, jacobian, str(folder), "--chunk-size", "0"):
        assert code == 2 and "chunk_size must be a positive integer" in error
    assert not (folder / "J.npy").exists()  # it held nothing
    (folder / "J.npy.progress.1").write_text("{}")  # of a file that is gone
    assert [code for code, _ in ranks(3, jacobian, str(folder))] == [0] * 3
    scope = {}
    exec(MODEL, scope)
    x = torch.from_numpy(np.load(folder / "x.npy"))
    want = torch.autograd.functional.jacobian(scope["net"], x)
    assert torch.allclose(torch.from_numpy(np.load(folder / "J.npy")), want, rtol=1e-12, atol=1e-12)
