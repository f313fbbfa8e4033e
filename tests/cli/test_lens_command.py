"""``python -m jactri lens``: a mean over a file of prompts, interrupted and gone on with, and every wrong call."""

import importlib.util
import sys

import pytest
import torch

import jactri
from jactri.cli import commands as cli
from jactri.examples import common, lens

MODEL = """
import torch
from torch import nn

stop = None


class Mix(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = x + x.cumsum(1).sin()
        return x + self.b(self.a(x).tanh())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.layers = nn.ModuleList(Mix() for _ in range(3))
        self.drop, self.head = nn.Dropout(), nn.Linear(4, 5)

    def forward(self, ids, scale=1.0):
        if ids.shape[1] > 7:
            raise KeyError("too long")
        x = self.embed(ids) * scale
        for layer in self.layers:
            x = layer(x)
        return self.head(self.drop(x))


def make(seed=0):
    torch.manual_seed(seed)
    return Net().double()


net = make()


def other():
    return make(1)


def encode(line):
    if line == stop:
        raise KeyboardInterrupt
    return {"ids": torch.tensor([[ord(c) - ord("a") for c in line.strip()]])}


def words():
    return make(), encode


def tokenizer(line, return_tensors=None):
    assert return_tensors == "pt"
    return tuple(encode(line).values())


def tokenized():
    return make(), tokenizer


def needs(size):
    return make()


def gives_number():
    return 3


def gives_two_models():
    return make(), 3


def gives_lists():
    return make(), lambda line: [1, 2]


def raises():
    raise ZeroDivisionError("mine")


def picky():
    def of(line):
        return {"ids": torch.tensor([[{"abc": 1}[line]]])}

    return make(), of
"""
LINES = ["abc", "aabbi", "hgf", "e", "cacc"]
CALL = ["--source", "layers.0", "layers.1", "--target", "layers.2", "--out", "lens.safetensors"]


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A user's module, in the current folder beside a file of prompts."""
    (tmp_path / "lens_model.py").write_text(MODEL)
    (tmp_path / "prompts.txt").write_text("abc\naabbi\n\nhgf\ne\n  \ncacc\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield importlib.import_module("lens_model")
    sys.modules.pop("lens_model")


def call(factory="words", *more, prompts="prompts.txt", before=CALL):
    return cli.main(["lens", f"lens_model:{factory}", "--prompts", prompts, *before, *more])


def by_hand(net, line, at):
    """d sum over tokens of layer 2 / d layer ``at``, the mean over tokens of it, row by row of autograd."""
    ids = torch.tensor([[ord(c) - ord("a") for c in line]])
    x = net.embed(ids)
    for layer in net.layers[: at + 1]:
        x = layer(x)
    x = y = x.detach().requires_grad_()
    for layer in net.layers[at + 1 :]:
        y = layer(y)
    rows = [torch.autograd.grad(e, x, retain_graph=True)[0] for e in y.sum((0, 1)).unbind()]
    return torch.stack(rows).mean((1, 2))


def test_the_mean_over_the_lines_of_a_file(theirs, tmp_path, capsys):
    assert call("words", "--picture", "lens.png") == 0
    captured = capsys.readouterr()
    assert "lens_model:words was put into eval mode" in captured.err
    for told in (
        "mean over 5 prompts",
        "layers.0",
        "4x4",
        "wrote lens.safetensors",
        "wrote lens.png",
    ):
        assert told in captured.out
    assert (tmp_path / "lens.png").read_bytes().startswith(b"\x89PNG")
    mean = jactri.JacobianMean.load("lens.safetensors")
    net = theirs.make()
    for at, (name, J) in enumerate(mean.value().items()):
        assert name == f"layers.{at}"
        each = torch.stack([by_hand(net, line, at) for line in LINES])
        torch.testing.assert_close(J, each.mean(0), rtol=1e-12, atol=1e-13)
        error = each.std(0) / len(LINES) ** 0.5
        torch.testing.assert_close(mean.standard_error()[name], error, rtol=1e-10, atol=1e-12)
    # the table: what is printed is of these
    J = mean.value()["layers.0"]
    (line,) = [row for row in captured.out.splitlines() if row.startswith("layers.0")]
    assert f"{torch.linalg.matrix_norm(J, 2):.3g}" in line.split()
    eye = torch.eye(4, dtype=J.dtype)
    part = (J * eye).sum() / 4 * eye
    assert f"{1 - ((J - part).norm() / J.norm()) ** 2:.1%}" in line.split()


def test_an_interrupted_run_goes_on_to_the_same_mean(theirs, capsys):
    assert call() == 0
    whole = jactri.JacobianMean.load("lens.safetensors")
    part = [*CALL[:-1], "part.safetensors"]
    theirs.stop = "hgf"
    assert call(before=part) == 130
    told = (
        "interrupted after 2 of 5 prompts, which part.safetensors holds: the same command goes on"
    )
    assert told in capsys.readouterr().err
    assert jactri.JacobianMean.load("part.safetensors").count == 2
    theirs.stop = None
    assert call(before=part) == 0
    assert "going on from part.safetensors, prompts done: 2" in capsys.readouterr().err
    resumed = jactri.JacobianMean.load("part.safetensors")
    assert resumed.count == 5
    for one, other in zip(
        (whole.value(), whole.standard_error()),
        (resumed.value(), resumed.standard_error()),
        strict=True,
    ):
        assert all(torch.equal(one[name], other[name]) for name in one)
    # a finished one has nothing left to do, and more prompts may follow
    assert call(before=part) == 0
    with open("prompts.txt", "a") as file:
        file.write("bb\n")
    assert call(before=part) == 0
    assert jactri.JacobianMean.load("part.safetensors").count == 6


def test_an_interrupt_before_the_first_prompt_leaves_nothing(theirs, tmp_path, capsys):
    theirs.stop = "abc"
    assert call() == 130
    error = capsys.readouterr().err
    assert "interrupted after 0 of 5 prompts\n" in error
    assert not (tmp_path / "lens.safetensors").exists()


def test_a_file_of_something_else_is_refused_and_kept(theirs, tmp_path, capsys):
    assert call() == 0
    before = (tmp_path / "lens.safetensors").read_bytes()
    (tmp_path / "others.txt").write_text("abc\ncab\nhgf\n")
    (tmp_path / "fewer.txt").write_text("abc\n")
    (tmp_path / "text.safetensors").write_text("hello")
    for told, arguments in {
        "lens.safetensors is of another model": {"factory": "other", "prompts": "numbers.txt"},
        "lens.safetensors is of another reduction: its rows": {"more": ["--rows", "2"]},
        "is of another reduction: its reduce": {"more": ["--reduce", "-1", "mean"]},
        "prompts[1] is not the one that was added before in its place": {"prompts": "others.txt"},
        "prompts end after 1, but 5 were added before": {"prompts": "fewer.txt"},
        "is no whole safetensors file": {"more": ["--out", "text.safetensors"]},
    }.items():
        (tmp_path / "numbers.txt").write_text("0 1 2\n")
        given = {"factory": "words", "prompts": "prompts.txt", "more": [], **arguments}
        capsys.readouterr()
        assert call(given["factory"], *given["more"], prompts=given["prompts"]) == 2, told
        error = capsys.readouterr().err
        assert told in error and "Traceback" not in error
    assert (tmp_path / "lens.safetensors").read_bytes() == before


def test_models_with_tokenizers_numbers_and_none(theirs, tmp_path):
    (tmp_path / "numbers.txt").write_text("0 1 2\n 0 0 1 1 8 \n")
    (tmp_path / "letters.txt").write_text("abc\naabbi\n")
    values = []
    for name, factory, prompts in (
        ("a", "words", "letters"), ("b", "tokenized", "letters"), ("c", "make", "numbers"), ("d", "net", "numbers"),
    ):  # fmt: skip
        before = [*CALL[:-1], f"{name}.safetensors"]
        assert call(factory, prompts=f"{prompts}.txt", before=before) == 0
        values.append(jactri.JacobianMean.load(f"{name}.safetensors").value()["layers.0"])
    assert all(torch.equal(value, values[0]) for value in values)


def test_rows_and_tokens(theirs):
    more = ["--rows", "3", "--seed", "7", "--reduce", "-1", "0"]
    before = ["--source", "layers.*", "--out", "lens.safetensors", "--memory-limit", "10MB"]
    assert call("words", *more, before=before) == 0
    found = jactri.JacobianMean.load("lens.safetensors").value()
    net = theirs.make().eval()
    for name, J in found.items():
        asked = {"reduce": (-1, 0), "rows": 3, "seed": 7}
        each = [
            jactri.layer_jacobian(net, theirs.encode(line), name, **asked)[name] for line in LINES
        ]
        torch.testing.assert_close(J, torch.stack(each).mean(0))
    assert [*found] == ["layers.0", "layers.1", "layers.2"]


def test_pictures_of_one_row_of_many_layers_and_of_zeros(theirs, tmp_path):
    assert call("words", "--rows", "1", "--picture", "one.png") == 0
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    many = {f"layers.{k}": k * torch.randn(5, 5) for k in range(30)}
    figure = common.figure("title", "subtitle", (6, 4))
    axes = common.panels(figure, 1, 1)
    lens.draw_spectra(axes, many)
    assert len(axes.lines) == 30
    named = [text.get_text().partition(":")[0] for text in axes.get_legend().get_texts()]
    assert named == [f"layers.{k}" for k in range(0, 30, 3)]
    for line, J in zip(axes.lines[1:], [*many.values()][1:], strict=True):
        seen = torch.as_tensor(line.get_ydata())
        sizes = torch.linalg.svdvals(J.double())
        torch.testing.assert_close(seen[sizes > 0.1], sizes[sizes > 0.1])


@pytest.mark.parametrize(
    "factory, more, told",
    [
        ("words", ["--prompts", "absent.txt"], "--prompts absent.txt: No such file"),
        ("words", ["--prompts", "blank.txt"], "--prompts blank.txt: holds no line of text"),
        ("words", ["--prompts", "bytes.txt"], "--prompts bytes.txt: is no text in UTF-8"),
        ("words", ["--out", "no/lens.safetensors"], "--out no/lens.safetensors: No such file"),
        ("words", ["--picture", "no/lens.png"], "--picture no/lens.png: No such file"),
        ("words", ["--out", "."], "--out .: is a folder"),
        ("words", ["--source", "blocks.*"], "'blocks.*'"),
        ("words", ["--source", "head"], "source 'head' comes after its target 'layers.2'"),
        ("words", ["--memory-limit", "1 pint"], "memory_limit"),
        (
            "needs",
            [],
            "a factory is called without arguments (missing a required argument: 'size')",
        ),
        ("gives_number", [], "returned an int; return a torch.nn.Module, or a pair"),
        ("gives_two_models", [], "returned a tuple of a Net, an int; return"),
        ("gives_lists", [], "inputs must be a tensor, a tuple of arguments or a dict"),
        ("make", [], "line 1 of prompts.txt: 'abc' is no line of token numbers; for text"),
        ("absent", [], "lens_model has no 'absent'"),
    ],
)
def test_a_wrong_call_is_answered_in_a_sentence(factory, more, told, theirs, tmp_path, capsys):
    (tmp_path / "blank.txt").write_text("\n  \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    assert call(factory, *more) == 2
    error = capsys.readouterr().err
    assert told in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not (tmp_path / "lens.safetensors").exists()


@pytest.mark.parametrize(
    "factory, lines, theirs_too, told",
    [
        (
            "raises",
            "abc",
            'ZeroDivisionError("mine")',
            "lens_model:raises raised ZeroDivisionError",
        ),
        (
            "picky",
            "abc\nab",
            '{"abc": 1}[line]',
            "the tokenizer raised KeyError (above) at line 2 of",
        ),
        ("words", "abc\n\nabcabcab", "too long", "KeyError (above) at line 3 of some.txt"),
        ("words", "abc\nxyz", "index out of range", "IndexError (above) at line 2 of some.txt"),
    ],
)
def test_what_their_code_raises_shows_where(
    factory, lines, theirs_too, told, theirs, tmp_path, capsys
):
    (tmp_path / "some.txt").write_text(lines)
    assert call(factory, prompts="some.txt") == 2
    error = capsys.readouterr().err
    assert "Traceback" in error and theirs_too in error
    assert told in error.splitlines()[-1]
    if "\n" in lines:  # what was done before is kept
        assert jactri.JacobianMean.load("lens.safetensors").count == 1


@pytest.mark.parametrize(
    "more, told",
    [
        (["--reduce", "max", "mean"], "expected sum, mean or the number of a token, not 'max'"),
        (["--reduce", "sum"], "expected 2 arguments"),
        (["--rows", "0"], "expected a positive whole number, not '0'"),
        (["--every", "soon"], "--every"),
    ],
)
def test_wrong_arguments(more, told, theirs, capsys):
    with pytest.raises(SystemExit, match="2"):
        call("words", *more)
    assert told in capsys.readouterr().err


def test_what_is_missing_is_named_before_the_work(theirs, monkeypatch, capsys):
    find = importlib.util.find_spec
    for package, more in {"safetensors": [], "matplotlib": ["--picture", "lens.png"]}.items():
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda n, p=package: None if n == p else find(n)
        )
        assert call("raises", *more) == 2
        assert f"needs {package}: run pip install {package}" in capsys.readouterr().err
