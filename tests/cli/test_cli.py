"""The command line: every command, and every way to call it wrongly."""

import configparser
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import jactri
from jactri import demo
from jactri.cli import commands as cli
from jactri.cli import doctor
from jactri.demo import digits, measure
from jactri.demo import main as demo_main

COMMANDS = ("demo", "check", "explain", "profile", "jacobian", "lens", "doctor")

MODEL = """
import torch

torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Dropout(), torch.nn.Linear(8, 3))
wide = torch.nn.Linear(4, 2).double()
constant = 3
calls = 0


class Net(torch.nn.Module):
    pass


class holder:
    inner = net


def product(x, t):
    return x.sin() * t, x.sum(-1)


def differentiates(x):
    (slope,) = torch.autograd.grad(x.pow(3).sum(), x, create_graph=True)
    return slope


def fickle(x):
    global calls
    calls += 1
    return calls * x


def mixes(x):
    return x - x.mean(0)


class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 2 * g


wrong = Wrong.apply


def raises(x):
    raise KeyError("mine")


def gives_list(x):
    return [x]


def gives_none(x):
    return None
"""


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Work this small is slower on several threads, and much slower on a busy machine."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for the commands that are run from a shell
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder, current for the test: a model, a module that fails, and arrays good and bad."""
    (tmp_path / "cli_model.py").write_text(MODEL)
    (tmp_path / "cli_broken.py").write_text("import cli_model\nimport no_such_dependency\n")
    (tmp_path / "cli_syntax.py").write_text("def f(:\n")
    np.save(tmp_path / "x.npy", np.linspace(-1, 1, 20).reshape(5, 4))
    np.save(tmp_path / "scalar.npy", np.float32(0.5))
    np.save(tmp_path / "whole.npy", np.arange(8).reshape(2, 4))
    np.save(tmp_path / "complex.npy", np.ones(3) * 1j)
    np.save(tmp_path / "objects.npy", np.array([1, None], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "several.npz", first=np.ones(3), second=np.ones(3))
    (tmp_path / "text.npy").write_text("hello")
    (tmp_path / "empty.npy").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("cli_model", "cli_broken", "cli_syntax"):
        sys.modules.pop(name, None)


def run_process(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "jactri", *arguments],
        capture_output=True, text=True, timeout=300, env={**os.environ, **environment}, check=False,
    )  # fmt: skip


# help


def test_help_from_a_shell_shows_every_command():
    done = run_process("--help", COLUMNS="80")
    assert (done.returncode, done.stderr) == (0, "")
    for word in (*COMMANDS, "examples:", "--version"):
        assert word in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.split() == ["jactri", jactri.__version__]


def test_no_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


# check and explain

GOOD = [
    "cli_model:net --input x.npy",
    "cli_model.py:net --input x.npy --per-sample",
    "cli_model:holder.inner --input x.npy --dtype float64",
    "cli_model:product --input x.npy --input x.npy --dtype float64",
    "cli_model:wide --input x.npy",  # takes the module's float64 up
    "cli_model:differentiates --input x.npy",
    "cli_model:differentiates --input scalar.npy",
    "cli_model:net --input whole.npy --dtype float32",
]


@pytest.mark.parametrize("line", GOOD)
def test_check_is_content(line, folder, capsys):
    assert cli.main(["check", *line.split()]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("line", GOOD)
def test_explain_prints_a_plan(line, folder, capsys):
    assert cli.main(["explain", *line.split()]) == 0
    assert capsys.readouterr().out.strip()


def test_profile_prints_a_table_and_writes_a_trace(folder, capsys):
    line = "profile cli_model:net --input x.npy --per-sample --trace trace.json"
    assert cli.main(line.split()) == 0
    captured = capsys.readouterr()
    assert "measured ms" in captured.out and "trace: trace.json" in captured.out
    assert "jactri #0 " in Path("trace.json").read_text()
    assert cli.main(line.replace("trace.json", "no/such/trace.json").split()) == 2
    captured = capsys.readouterr()
    assert "error: --trace no/such/trace.json: the trace cannot be written" in captured.err
    assert captured.out == "" and "Traceback" not in captured.err


def test_check_reports_a_mismatch_by_its_exit_code(folder, capsys):
    assert cli.main(["check", "cli_model:fickle", "--input", "x.npy"]) == 1
    assert capsys.readouterr().out.strip()


def test_check_by_finite_differences(folder, capsys):
    """What torch itself has wrong is found by them alone."""
    line = ["check", "cli_model:wrong", "--input", "x.npy"]
    assert cli.main(line) == 0
    assert "finite" not in capsys.readouterr().out
    assert cli.main([*line, "--finite-difference"]) == 1
    assert "off from finite differences" in capsys.readouterr().out
    assert cli.main(["check", "cli_model:net", *line[2:], "--finite-difference"]) == 0
    assert "finite differences in float64" in capsys.readouterr().out


def test_from_a_shell_the_current_folder_is_importable(folder):
    done = run_process("check", "cli_model:net", "--input", "x.npy")
    assert done.returncode == 0, done.stderr


def test_a_module_is_put_into_eval_mode_unless_told_otherwise(folder, capsys):
    assert cli.main(["explain", "cli_model:net", "--input", "x.npy"]) == 0
    assert "eval mode" in capsys.readouterr().err
    assert not sys.modules["cli_model"].net.training
    sys.modules["cli_model"].net.train()
    assert cli.main(["explain", "cli_model:net", "--input", "x.npy", "--train"]) == 0
    assert "eval mode" not in capsys.readouterr().err
    assert sys.modules["cli_model"].net.training


@pytest.mark.parametrize(
    "line, told",
    [
        ("cli_model --input x.npy", "'cli_model' is not MODULE:FUNCTION"),
        (":net --input x.npy", "is not MODULE:FUNCTION"),
        ("no_such_module:net --input x.npy", "there is no module 'no_such_module'"),
        ("cli_model.inner:net --input x.npy", "there is no module 'cli_model.inner'"),
        ("no_such_file.py:net --input x.npy", "no_such_file.py: there is no such file"),
        ("cli_model:nett --input x.npy", "no 'nett'; it offers differentiates, fickle"),
        ("cli_model:holder.outer --input x.npy", "has no 'holder.outer'"),
        ("cli_model:Net --input x.npy", "Net is a class; pass an instance"),
        ("cli_model:constant --input x.npy", "constant is an int, which cannot be called"),
        ("cli_model:gives_list --input x.npy", "returned a list; it has to return a tensor"),
        ("cli_model:gives_none --input x.npy", "returned None; it has to return a tensor"),
        ("cli_model:product --input x.npy", "cannot take 1 argument (missing a required"),
        ("cli_model:net --input x.npy --input x.npy", "cannot take 2 arguments (too many"),
        ("cli_model:mixes --input x.npy --per-sample", "per_sample=True"),
        ("cli_model:differentiates --input scalar.npy --per-sample", "cli_model:differentiates: "),
        ("cli_model:net --input none.npy", "--input none.npy: there is no such file"),
        ("cli_model:net --input .", "--input .: "),
        ("cli_model:net --input text.npy", "--input text.npy: not an array of numbers"),
        ("cli_model:net --input empty.npy", "--input empty.npy: not an array of numbers"),
        ("cli_model:net --input objects.npy", "--input objects.npy: not an array of numbers"),
        ("cli_model:net --input several.npz", "several arrays (first, second)"),
        ("cli_model:net --input complex.npy", "holds complex128; pass an array of float32"),
        ("cli_model:net --input whole.npy", "holds int64, and Jacobians are taken in floating"),
    ],
)
@pytest.mark.parametrize("command", ["check", "explain", "profile"])
def test_a_wrong_call_is_answered_in_a_sentence(command, line, told, folder, capsys):
    assert cli.main([command, *line.split()]) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    "line, told",
    [
        ("check cli_model:net", "--input"),
        ("check --input x.npy", "MODULE:FUNCTION"),
        ("check cli_model:net --input x.npy --dtype float16", "--dtype"),
        ("demo --seed -1", "expected a whole number from 0"),
        ("demo --seed 4294967296", "expected a whole number from 0"),
        ("demo --seed two", "expected a whole number from 0"),
        ("dance", "dance"),
    ],
)
def test_wrong_arguments(line, told, folder, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(line.split())
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "target, theirs, told",
    [
        ("cli_model:raises", 'raise KeyError("mine")', "raised KeyError (above)"),
        ("cli_broken:f", "import no_such_dependency", "raised ModuleNotFoundError while"),
        ("cli_broken.py:f", "import no_such_dependency", "raised ModuleNotFoundError while"),
        ("cli_syntax.py:f", "def f(:", "raised SyntaxError while"),
    ],
)
def test_an_error_in_the_users_code_shows_where(target, theirs, told, folder, capsys):
    assert cli.main(["check", target, "--input", "x.npy"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert theirs in error
    assert told in error.splitlines()[-1]
    assert "jactri/cli.py" not in error


def test_inputs_that_do_not_fit_a_module_show_torchs_own_error(folder, capsys):
    assert cli.main(["check", "cli_model:net", "--input", "scalar.npy"]) == 2
    assert "called with float32 ()" in capsys.readouterr().err


def test_an_accident_inside_of_jactri_keeps_its_traceback(folder, monkeypatch):
    def slips(function, inputs, *, per_sample):
        return [][0]

    monkeypatch.setattr(jactri, "explain", slips)
    with pytest.raises(IndexError):
        cli.main(["explain", "cli_model:net", "--input", "x.npy"])


# doctor


def test_doctor_reports_this_machine(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in (torch.__version__, np.__version__, "triton", "threads", "oneDNN", "CUDA tensors"):
        assert word in text
    assert text.rstrip().endswith("jactri works here.")


@pytest.mark.parametrize(
    "source, told",
    [
        ("raise RuntimeError('no driver')", "does not import: RuntimeError: no driver"),
        ("import os; os._exit(11)", "does not import: exit code 11"),
    ],
)
def test_doctor_survives_a_broken_triton(source, told, tmp_path, monkeypatch):
    (tmp_path / "triton.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert doctor._triton() == (None, f"installed, but {told}")


def test_doctor_says_how_to_get_what_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    text = str(doctor.examine())
    assert "pip install triton" in text
    assert "pip install scikit-learn matplotlib rich" in text


def test_doctor_fails_for_an_old_torch(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "OLDEST_TORCH", (99, 0))
    assert cli.main(["doctor"]) == 1
    assert "run pip install 'torch>=99.0'" in capsys.readouterr().out


def test_doctor_knows_what_setup_cfg_asks_for():
    setup = Path(__file__).parents[2] / "setup.cfg"
    parser = configparser.ConfigParser()
    parser.read(setup)
    extras = parser["options.extras_require"]
    for extra, packages in doctor.EXTRAS.items():
        assert set(packages.values()) <= set(extras[extra].split())
    wanted = ".".join(map(str, doctor.OLDEST_TORCH))
    assert f"torch>={wanted}" in parser["options"]["install_requires"].split()


def test_doctor_refuses_an_old_triton(tmp_path, monkeypatch):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text("__version__ = '3.1.0'")
    (tmp_path / "triton/language.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    version, note = doctor._triton()
    assert version is None and note.startswith("3.1.0 is too old for the kernels")


@pytest.mark.parametrize(
    "triton, note, told",
    [
        ("3.9.0", "3.9.0", "Triton kernels for Linear chains"),
        (None, "missing", "torch ops, for triton is not there"),
    ],
)
def test_doctor_says_what_runs_on_a_gpu(triton, note, told, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert told in dict(doctor._placement(triton, note))["CUDA tensors"]


# demo


def test_demo_draws_and_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    out = tmp_path / "made" / "by the demo"
    assert cli.main(["demo", "--quick", "--seed", "3", "--out", str(out)]) == 0
    for name in ("saliency.png", "spectrum.png", "metric.png", "comparison.png"):
        png = (out / name).read_bytes()
        assert png.startswith(b"\x89PNG")
        assert len(png) > 20_000
    text = capsys.readouterr().out
    for word in ("autoencoder", "(120, 10, 1, 8, 8)", "(120, 64, 2)", "peak"):
        assert word in text
    assert text.index("denoiser: page to page") < text.index("classifier: image to scores")
    noise, left = re.search(r"denoiser: (\S+) RMS noise a pixel made (\S+)", text).groups()
    assert float(left) < 0.75 * float(noise)


def test_demo_pages_hold_the_digits():
    images = torch.arange(11 * 64.0).view(11, 1, 8, 8)
    pages = digits.pages(images, 3)
    assert pages.shape == (1, 1, 24, 24)
    for k in range(9):
        row, column = 8 * (k // 3), 8 * (k % 3)
        assert torch.equal(pages[0, 0, row : row + 8, column : column + 8], images[k, 0])


def test_demo_refuses_a_folder_it_cannot_write_to(tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.write_text("")
    assert cli.main(["demo", "--out", str(taken)]) == 2
    assert f"--out {taken}: " in capsys.readouterr().err


def test_demo_names_the_packages_it_misses(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_main.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    assert "run pip install scikit-learn matplotlib rich" in capsys.readouterr().err


def test_demo_times_no_wrong_result(tmp_path, monkeypatch, capsys):
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh())
    work = measure.Workload("small", net.requires_grad_(False), torch.randn(6, 3))
    right = jactri.jacobian
    picks = torch.arange(2)

    row, jacobian = measure.measure(work, picks, 0.0, (2, 2), lambda: None)
    assert row.shape == tuple(jacobian.shape) == (6, 4, 3)
    assert row.error < 1e-6
    assert set(row.ms) == set(row.mib) == set(measure.PACKAGES)
    assert (
        row.speedup
        == min(row.ms["torch.func"], row.ms["torch.autograd.functional"]) / row.ms["jactri"]
    )

    def timed(*arguments):
        pytest.fail("a wrong result was timed")

    monkeypatch.setattr(measure, "interleaved_medians", timed)
    for spoil in (lambda J: 1.001 * J, lambda J: J * float("nan")):
        monkeypatch.setattr(jactri, "jacobian", lambda *a, s=spoil, **k: s(right(*a, **k)))
        with pytest.raises(demo.DemoFailure, match=r"small: jactri is .* from float64"):
            measure.measure(work, picks, 0.0, (2, 2), lambda: None)

    def fails(*arguments, **options):
        raise demo.DemoFailure("small: wrong")

    monkeypatch.setattr(demo, "run", fails)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1
    assert "wrong result: small: wrong" in capsys.readouterr().err


@pytest.mark.clean_memory
def test_demo_measures_the_peak_and_not_the_sum(monkeypatch):
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")

    def way():
        for _ in range(3):
            block = torch.ones(1 << 18)  # 1 MiB
            del block
        kept = torch.ones(1 << 19)
        return kept + torch.ones(1 << 19)

    assert measure.peak_mib(way) == pytest.approx(6, abs=0.1)


def test_demo_interleaves_its_timings():
    order, ticks = [], []
    ways = {name: lambda n=name: order.append(n) for name in ("jactri", "torch.func jacrev")}
    medians = measure.interleaved_medians(ways, 0.0, (2, 5), lambda: ticks.append(len(order)))
    assert order == ["jactri", "torch.func jacrev"] * 2
    assert ticks == [2, 4]
    assert set(medians) == {"jactri", "torch.func jacrev"}


def test_demo_spends_no_time_on_hopeless_ways(monkeypatch):
    now, turns = [0.0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def way(name, seconds):
        def call():
            now[0] += seconds
            turns.append(name)

        return call

    lengths = {"jactri": 1, "torch.func jacrev": 2, "torch.func jacfwd": 20}
    ways = {name: way(name, seconds) for name, seconds in lengths.items()}
    medians = measure.interleaved_medians(ways, 0.0, (5, 5), lambda: None)
    assert [turns.count(name) for name in lengths] == [5, 5, 2]
    assert medians == {name: 1e3 * seconds for name, seconds in lengths.items()}
