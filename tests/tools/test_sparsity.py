"""`Sparsity` as an object: counts, pictures, files, and other people's matrices."""

import builtins
import copy
import io
import pickle

import matplotlib as mpl
import numpy
import pytest
import scipy.sparse
import torch
from matplotlib.figure import Figure

import jactri

F64 = torch.float64


def arrow(x):
    return torch.cat([x.sum()[None], x[1:] * x[0]])


def of(mask):
    mask = torch.as_tensor(mask)
    return jactri.Sparsity.of(mask, mask.shape[:1], mask.shape[1:])


def dots(text):
    """The dots of a picture as a matrix, without its frame."""
    lines = text.split("\n")
    assert lines[0] == "┌" + "─" * (len(lines[0]) - 2) + "┐"
    assert lines[-1] == "└" + "─" * (len(lines[0]) - 2) + "┘"
    rows = []
    for line in lines[1:-1]:
        assert line[0] == line[-1] == "│" and len(line) == len(lines[0])
        found = numpy.zeros((4, 2 * (len(line) - 2)), bool)
        for k, letter in enumerate(line[1:-1]):
            bits = ord(letter) - 0x2800
            for bit, (i, j) in enumerate([(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (3, 0), (3, 1)]):  # fmt: skip
                found[i, 2 * k + j] = bits >> bit & 1
        rows.append(found)
    return numpy.concatenate(rows)


@pytest.mark.parametrize("shape", [(1, 1), (4, 2), (5, 3), (7, 9), (1, 13), (13, 1), (36, 36)])
def test_each_entry_is_a_dot_where_they_fit(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.4
    found = dots(of(mask).spy())
    m, n = shape
    assert (found[:m, :n] == mask.numpy()).all()
    assert not found[m:].any() and not found[:, n:].any()
    assert m <= len(found) < m + 4 and n <= found.shape[1] < n + 2


@pytest.mark.parametrize("width", [3, 8, 41, 72])
@pytest.mark.parametrize("shape", [(500, 500), (3, 1000), (1000, 3), (301, 97)])
def test_larger_matrices_fit_the_width(shape, width):
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[0, 0] = mask[-1, -1] = True
    text = of(mask).spy(width)
    assert max(map(len, text.split("\n"))) <= width
    assert len(text.split("\n")) <= max(width // 2, 3)
    found = dots(text)
    assert found[0, 0] and 1 <= found.sum() <= 2
    full = dots(of(torch.ones(shape).bool()).spy(width))
    rows, columns = full.any(1), full.any(0)
    assert full[rows][:, columns].all() and rows[: rows.sum()].all()  # no gaps


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (2, 2)])
def test_nothing(shape):
    pattern = of(torch.zeros(shape, dtype=torch.bool))
    assert pattern.nnz == 0 and pattern.colours == (0, 0) and pattern.colours.products == 0
    assert not dots(pattern.spy()).any()
    assert pattern.to_scipy().shape == shape
    pattern.plot(Figure().subplots())
    assert "0 of" in repr(pattern) and "<svg" in pattern._repr_html_()


@pytest.mark.parametrize("width", [2, 0, 7.5, "wide"])
def test_widths_that_are_none(width):
    with pytest.raises(ValueError, match="width must be an integer of at least 3"):
        of(torch.eye(3).bool()).spy(width)


def test_colours():
    n = 50
    assert of(torch.eye(n).bool()).colours.products == 1
    pattern = jactri.sparsity(arrow, torch.randn(n))
    assert pattern.colours == (2, 1) and pattern.colours.columns == 2 and pattern.colours.rows == 1
    tall = torch.zeros(n, 3, dtype=torch.bool)
    tall[:, 1] = True
    assert of(tall).colours == (1, 0) and of(tall.t()).colours == (0, 1)
    assert of(torch.ones(4, 6).bool()).colours.products == 4
    conv = torch.nn.Conv2d(1, 1, 3, padding=1)
    image = torch.randn(2, 1, 6, 6)
    assert jactri.sparsity(conv, image).colours.products == 9
    assert jactri.sparsity(conv, image, per_sample=True).colours.products == 9


def samples():
    return jactri.sparsity(torch.nn.Conv1d(1, 2, 3), torch.randn(3, 1, 7), per_sample=True)


@pytest.mark.parametrize("made", [lambda: jactri.sparsity(arrow, torch.randn(9)), samples])
def test_saved_and_loaded(made, tmp_path, monkeypatch):
    pattern = made()
    path = tmp_path / "pattern"  # no suffix is added
    for _ in range(2):  # the second time over the first
        pattern.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["pattern"]
    found = jactri.Sparsity.load(str(path))
    assert isinstance(found, jactri.Sparsity) and found.is_coalesced()
    assert (found.rows, found.per_sample, found.shape) == (pattern.rows, pattern.per_sample, pattern.shape)  # fmt: skip
    assert torch.equal(found._indices(), pattern._indices()) and found.colours == pattern.colours

    def broken(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(numpy, "savez_compressed", broken)
    with pytest.raises(OSError, match="no space"):
        pattern.save(path)
    monkeypatch.undo()
    assert torch.equal(jactri.Sparsity.load(path)._indices(), pattern._indices())
    assert [p.name for p in tmp_path.iterdir()] == ["pattern"]


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        jactri.Sparsity.load(tmp_path / "none")
    path = tmp_path / "other"
    array, plain = numpy.ones(3), io.BytesIO()
    torch.save(torch.ones(2), plain)
    evil = pickle.dumps(of(torch.eye(2).bool()).to_dense())
    writes = [
        lambda f: f.write(b""),
        lambda f: f.write(b"not an archive"),
        lambda f: numpy.save(f, array),
        lambda f: numpy.savez(f, a=array),
        lambda f: f.write(plain.getvalue()),
        lambda f: f.write(evil),
        lambda f: numpy.savez(f, **{"jactri.Sparsity": numpy.array([print]), "start": array}),
    ]
    for write in writes:
        with open(path, "wb") as file:
            write(file)
        with pytest.raises(RuntimeError, match="was not written by"):
            jactri.Sparsity.load(path)
    good = {"jactri.Sparsity": [1, 0, 3, 4], "start": [0, 2, 4, 5], "column": [0, 1, 1, 2, 3]}
    others = {
        "jactri.Sparsity": ([1], [-1, 0, 3, 4], [3, 0, 3, 4], [0, 1, 3, 4], [1, 2, 3, 4], [1, 0, -3, -4], [[1, 0]]),
        "start": ([], [0, 1, 2], [1, 2, 4, 5], [0, 4, 2, 5], [0, 2, 4, 6], [0.0, 2, 4, 5]),
        "column": ([0], [1, 0, 1, 2, 3], [1, 1, 1, 2, 3], [0, 1, 1, 2, 4], [0, 1, 1, 2, -1], [0.0, 1, 1, 2, 3]),
    }  # fmt: skip
    for name, values in [("start", good["start"]), *((n, v) for n in others for v in others[n])]:
        with open(path, "wb") as file:
            numpy.savez(file, **good | {name: numpy.array(values, None if values else numpy.int64)})
        if values is good[name]:
            assert jactri.Sparsity.load(path).nnz == 5
            continue
        with pytest.raises(RuntimeError, match="does not hold together"):
            jactri.Sparsity.load(path)
    of(torch.eye(30).bool()).save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(RuntimeError, match="was not written by"):
        jactri.Sparsity.load(path)


def test_scipy_matrices_there_and_back():
    pattern = jactri.sparsity(arrow, torch.randn(9))
    matrix = pattern.to_scipy()
    assert isinstance(matrix, scipy.sparse.csr_array) and matrix.dtype == bool
    assert (matrix.toarray() == pattern.to_dense().numpy()).all()
    again = jactri.Sparsity.of(matrix, (9,), (9,))
    flat = jactri.Sparsity.of(matrix[:4])  # the shapes are those of the matrix
    assert flat.shape == (4, 9) and flat.rows == 1
    assert torch.equal(flat.to_dense(), again.to_dense()[:4])
    assert torch.equal(again._indices(), pattern._indices())
    grid = jactri.Sparsity.of(matrix, (3, 3), (9, 1))
    assert grid.shape == (3, 3, 9, 1) and grid.rows == 2
    assert torch.equal(grid.to_dense().view(9, 9), pattern.to_dense())
    with pytest.raises(RuntimeError, match=r"pattern has shape \(9, 9\); expected \(9, 8\)"):
        jactri.Sparsity.of(matrix, (9,), (8,))
    with pytest.raises(TypeError, match=r"into must be a shape, as \(3,\), got 9"):
        jactri.Sparsity.of(matrix, (9,), 9)
    with pytest.raises(TypeError, match=r"into must be a shape, as \(3,\), got None"):
        jactri.Sparsity.of(matrix, (9,))
    with pytest.raises(TypeError, match=r"shape \(3, 3, 9\); pass the shapes of the output and"):
        jactri.Sparsity.of(grid.to_dense()[..., 0])
    assert jactri.Sparsity.of(grid) is grid
    for given in ((), (matrix,), (pattern.to_dense(),)):
        with pytest.raises(TypeError, match=r"jactri\.Sparsity\.of\(pattern\) makes one"):
            jactri.Sparsity(*given)
    assert samples().to_scipy().shape == (30, 7)


def test_copies_keep_what_they_are():
    pattern = jactri.sparsity(arrow, torch.randn(9))
    copied = copy.deepcopy(pattern)
    assert (copied.rows, copied.colours) == (pattern.rows, pattern.colours)
    buffer = io.BytesIO()
    torch.save(pattern, buffer)
    buffer.seek(0)
    assert type(torch.load(buffer, weights_only=True)) is torch.Tensor
    assert type(pattern.to_dense()) is torch.Tensor


@pytest.mark.parametrize("shape", [(5, 8), (3, 400), (700, 600)])
def test_plots(shape):
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[0, 0] = mask[1, -1] = True
    axes = Figure().subplots()
    assert of(mask).plot(axes) is axes
    (image,) = axes.get_images()
    shown = image.get_array()
    assert (shown > 0).sum() == 2 and shown[0, 0] > 0
    assert image.get_extent() == [-0.5, shape[1] - 0.5, shape[0] - 0.5, -0.5]
    assert axes.get_title() == f"2 of {shape[0] * shape[1]} entries"


def test_plots_on_a_figure_of_its_own():
    from matplotlib import pyplot

    with mpl.rc_context({"backend": "agg"}):
        axes = of(torch.eye(3).bool()).plot()
        assert axes.figure.number in pyplot.get_fignums()
        pyplot.close(axes.figure)


def test_what_is_not_installed_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] in ("matplotlib", "scipy"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    pattern = of(torch.eye(3).bool())
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        pattern.plot()
    with pytest.raises(ModuleNotFoundError, match="pip install scipy"):
        pattern.to_scipy()


def test_a_pattern_that_was_written_to():
    x = torch.randn(5, dtype=F64)
    found = jactri.sparsity(torch.sin, x)
    assert found.colours.products == 1 and found.to_scipy().nnz == 5
    found.indices()[0] = 0  # a row of its own has all entries now
    assert (found.to_scipy().toarray() == [[True] * 5, *[[False] * 5] * 4]).all()
    assert found.colours == (0, 1) and found.spy() == of(found.to_dense()).spy()
    func = lambda x: torch.cat([x.sin().sum()[None], torch.zeros(4, dtype=F64)])  # noqa: E731
    J = jactri.jacobian(func, x, pattern=found, layout=torch.sparse_csr)
    assert J.values().numel() == 5
    torch.testing.assert_close(J.to_dense(), torch.autograd.functional.jacobian(func, x))
    found.zero_()
    assert found.nnz == found.to_scipy().nnz == found.colours.products == 0
    with torch.inference_mode():
        of(torch.eye(3, dtype=torch.bool)).spy()
