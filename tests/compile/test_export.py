"""`jactri.export`: packages that answer as the ordinary call does, in another process, and from C++."""

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import F64, seeded
from torch import nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils._pytree import tree_map

import jactri
from jactri._src.compile import engines
from jactri.examples import kalman

CPP = Path(__file__).parents[2] / "examples" / "cpp"
ROW = {"per_sample": True, "return_output": True}


def compiler():
    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler:
        return None


needs_compiler = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The C++ example's files, the network whose step they hold, and the sightings."""
    folder = tmp_path_factory.mktemp("made")
    spec = importlib.util.spec_from_file_location("export_step", CPP / "export_step.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net, sightings = script.write(folder, steps=20, count=40)
    assert sorted(p.name for p in folder.iterdir()) == ["sightings.txt", "step.pt2"]
    return folder, net, sightings


def run(command, **options):
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


LOAD = """
import sys, torch
folder = sys.argv[1]
step = torch._inductor.aoti_load_package(folder + "/step.pt2")
torch.save([step(x) for x in torch.load(folder + "/states.pt")], folder + "/found.pt")
assert "jactri" not in sys.modules
try:
    step(torch.zeros(3, 2, dtype=torch.float64))
except RuntimeError:  # as the environment asks
    print("checked")
"""


@needs_compiler
def test_a_fresh_process_loads_it_without_jactri(made):
    folder, net, _ = made
    states = torch.randn(5, 1, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    torch.save(states, folder / "states.pt")
    checking = {**os.environ, "AOTI_RUNTIME_CHECK_INPUTS": "1"}
    assert run([sys.executable, "-c", LOAD, str(folder)], env=checking) == "checked\n"
    for x, (value, J) in zip(states, torch.load(folder / "found.pt"), strict=True):
        torch.testing.assert_close(value, net(x), rtol=1e-12, atol=1e-13)
        want = torch.autograd.functional.jacobian(net, x)[:, :, 0]
        torch.testing.assert_close(J, want, rtol=1e-12, atol=1e-13)


@needs_compiler
def test_weights_are_inside_and_answers_belong_to_the_caller(made):
    folder, net, _ = made
    state = torch.randn(1, 2, dtype=F64)
    step = torch._inductor.aoti_load_package(str(folder / "step.pt2"))
    before = tree_map(torch.clone, step(state))
    kept = net.state_dict()
    changed = {name: t + 1 for name, t in kept.items()}
    net.load_state_dict(changed, assign=True)
    try:
        again = step(state)
        torch.testing.assert_close(again, before, rtol=0, atol=0)
        assert not any(t.requires_grad for t in again)
    finally:
        net.load_state_dict(kept, assign=True)
        net.requires_grad_(False)
    for t in again:
        t.zero_()
    torch.testing.assert_close(step(state), before, rtol=0, atol=0)


def configured(source, build):
    """What cmake did to prepare the build of a project that needs torch."""
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    command = ["cmake", "-S", str(source), "-B", str(build), prefix]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@needs_compiler
@needs_cmake
def test_the_cpp_example_filters_as_python_does(made):
    folder, net, sightings = made
    build = folder / "build"
    done = configured(CPP, build)
    if done.returncode:  # a torch for CUDA is not found without CUDA's toolkit
        project = "cmake_minimum_required(VERSION 3.18)\nproject(torch_alone LANGUAGES CXX)\n"
        (folder / "CMakeLists.txt").write_text(f"{project}find_package(Torch REQUIRED)\n")
        alone = configured(folder, folder / "alone")
        if alone.returncode:
            why = " ".join(alone.stderr.partition("CMake Error")[2].split()[:40])
            pytest.skip(f"cmake does not find this torch: {why}")
    assert done.returncode == 0, done.stdout + done.stderr
    run(["cmake", "--build", str(build)])
    program = build / "filter"
    lines = run([program, folder / "step.pt2"], input=(folder / "sightings.txt").read_text())
    found = torch.tensor(
        [[float(v) for v in line.split()] for line in lines.splitlines()], dtype=F64
    )
    want, _ = kalman.extended_kalman(
        lambda x: (net(x), torch.autograd.functional.jacobian(net, x)[:, :, 0]),
        lambda x: (kalman.tip(x), torch.autograd.functional.jacobian(kalman.tip, x)[:, :, 0]),
        sightings,
        kalman.START,
    )
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)
    failed = subprocess.run(
        [program, "none.pt2"], capture_output=True, text=True, check=False, input=""
    )
    assert failed.returncode == 1
    assert failed.stderr.startswith("none.pt2: ") and "file open failed" in failed.stderr


class Dynamics(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = seeded(3, 5, 2, dtype=torch.float32)
        self.register_buffer("mean", torch.tensor([0.5, -1.0]))

    def forward(self, given):
        with torch.autocast("cpu", enabled=False):
            moved = self.net(torch.cat([given["x"], given["u"]], -1)) + self.mean
        return {"next": moved, "more": (given["x"].square().sum(-1),), "mean": self.mean}


@needs_compiler
def test_nested_inputs_and_answers(tmp_path):
    """Dictionaries in and out, views, a constant answer; autocast at the time of the export, but not for the net."""
    net = Dynamics()

    def draw():
        return {"x": torch.randn(2, 4).t(), "u": torch.randn(4, 1)}

    def both(given):
        return jactri.func.jacrev(net)(given), net(given)

    path = tmp_path / "both.pt2"
    with torch.autocast("cpu", torch.bfloat16):
        assert jactri.export(both, draw(), of=None, path=path) == str(path)
    assert [p.name for p in tmp_path.iterdir()] == ["both.pt2"]
    step = torch._inductor.aoti_load_package(str(path))
    given = draw()
    J, y = step(given)
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    close(y, tree_map(torch.Tensor.detach, net(given)))
    for name in given:

        def alone(t, name=name):
            out = net({**given, name: t})
            return out["next"], out["more"][0]

        moved, more = torch.autograd.functional.jacobian(alone, given[name])
        close(J["next"][name], moved)
        close(J["more"][0][name], more)
        assert not J["mean"][name].any()
    net.mean.zero_()
    assert step(given)[1]["mean"].any()


X = torch.randn(3, 4, dtype=F64)


def export(func, *xs, path="never.pt2", **options):
    return jactri.export(func, *xs, path=path, **options)


def test_what_is_no_export_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = seeded(4, 3)
    with pytest.raises(ValueError, match=r"must end in '.pt2', got 'step.so'"):
        export(net, X, path="step.so")
    with pytest.raises(FileNotFoundError, match="no folder 'nowhere'"):
        export(net, X, path="nowhere/step.pt2")
    with pytest.raises(ValueError, match=r"no create_graph=True; jactri\.compile does"):
        export(net, X, create_graph=True)
    with pytest.raises(TypeError, match="export of jacobian takes no 'static'"):
        export(net, X, static=True)
    with pytest.raises(TypeError, match=r"of must be one of jactri.jacobian"):
        export(net, X, of=torch.sum)
    with pytest.raises(TypeError, match="jvp takes inputs and a vector, got 1"):
        export(net, X, of=jactri.jvp)
    with pytest.raises(IndexError, match="example_inputs is empty"):
        export(net)
    with pytest.raises(TypeError, match="inputs of an exported jacobian must be tensors"):
        export(lambda x, k: x * k, X, 2)
    with pytest.raises(RuntimeError, match=r"inside of a torch.func transform"):
        torch.func.vmap(lambda x: export(net, x))(X)
    assert not list(tmp_path.iterdir())


@needs_compiler
@pytest.mark.parametrize(
    "func, error, words",
    [
        (lambda x: x * x.sum().item(), RuntimeError, "cannot be one graph: .*torch.where"),
        (lambda x: x * torch.rand_like(x), RuntimeError, "draws random numbers, .*as an input"),
        (lambda x: torch.nonzero(x > 0).double() * x.sum(), RuntimeError, "cannot be one graph"),
        (lambda x: (x.sin(), 2), TypeError, "Tensor"),
        (lambda x: x @ x, RuntimeError, "shapes cannot be multiplied"),
    ],
    ids=["item", "random", "nonzero", "number", "shapes"],
)
def test_what_cannot_be_one_graph_is_refused(func, error, words, tmp_path):
    with pytest.raises(error, match=words):
        export(func, X, path=tmp_path / "step.pt2")
    assert not list(tmp_path.iterdir())


@needs_compiler
def test_a_container_without_a_name_is_refused(tmp_path):
    found = torch.return_types.topk  # a structure of torch's own that its packages do not know
    with pytest.raises(TypeError, match="use tuples, lists and dicts"):
        export(lambda x: found((x, x.sin())), X, of=None, path=tmp_path / "step.pt2")


def test_without_a_compiler(tmp_path, monkeypatch):
    def none(*_):
        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none)
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler, .*install g\+\+ or clang"):
        export(seeded(4, 3), X, path=tmp_path / "step.pt2")
    assert not list(tmp_path.iterdir())


def test_a_package_that_answers_otherwise_is_not_kept(tmp_path, monkeypatch):
    def other(module, examples, path):
        Path(path).touch()
        return path

    monkeypatch.setattr(engines, "has_compiler", lambda: True)
    monkeypatch.setattr(engines, "package", other)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: lambda x: x)
    kept = tmp_path / "step.pt2"
    kept.write_text("an earlier one")
    with pytest.raises(RuntimeError, match="does not answer as the ordinary call does: tensor 0"):
        export(seeded(4, 3), X, path=kept)
    assert [p.name for p in tmp_path.iterdir()] == ["step.pt2"]
    assert kept.read_text() == "an earlier one"
