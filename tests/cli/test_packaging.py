"""What gets installed: the wheel holds everything, and works away from the checkout."""

import configparser
import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import jactri

ROOT = Path(__file__).parents[2]
SOURCES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "jactri", "kernels")


def pip(*arguments, cwd):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel's path; built from a copy, so that the checkout keeps no build folder."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
            )
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), ".", cwd=copy)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_one_version():
    """In the package, the citation and the changelog's newest section; its release is dated alike."""
    citation = dict(
        line.split(": ", 1)
        for line in (ROOT / "CITATION.cff").read_text().splitlines()
        if re.match(r"(version|date-released): ", line)
    )
    newest = re.search(r"^## (\S+) \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest.groups() == (citation["version"], citation["date-released"])
    assert newest[1] == jactri.__version__


@pytest.mark.parametrize("name", jactri._DEPRECATED)
def test_what_is_deprecated_warns_and_works(name):
    value, instead, end = jactri._DEPRECATED[name]
    with pytest.warns(DeprecationWarning, match=rf"ends in jactri {end}: write {instead}") as told:
        assert getattr(jactri, name) is value
    assert told[0].filename == __file__
    assert instead.removeprefix("jactri.") in jactri.__all__
    assert [int(n) for n in end.split(".")] > [int(n) for n in jactri.__version__.split(".")]


def modules_of(folder, under):
    return {f"{under}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.py")}


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = modules_of(ROOT / "jactri", "jactri") | modules_of(ROOT / "kernels", "jactri/kernels")
    assert names == wanted | {"jactri/py.typed"}


def test_the_wheels_metadata(unpacked):
    (info,) = unpacked.glob("*.dist-info")
    metadata = email.message_from_string((info / "METADATA").read_text(encoding="utf-8"))
    assert metadata["Name"] == "jactri"
    assert metadata["Version"] == jactri.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    extras = set("demo test lens language check docs bench".split())
    assert set(metadata.get_all("Provides-Extra")) == extras
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert {re.match(r"[\w-]+", line)[0] for line in required} == {"torch", "numpy", "triton"}
    assert any("Linux" in line for line in required if line.startswith("triton"))
    assert list(info.rglob("LICENSE"))


def python(code, *arguments, cwd, path, flags=()):
    """Run code by this interpreter, with ``path`` before what is installed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *flags, "-c", code, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_wheel_works_away_from_the_checkout(unpacked, tmp_path):
    code = (
        "import sys\n"
        "import jactri, jactri.cli.commands, jactri.demo, jactri.cli.doctor, jactri.kernels, jactri._src.rules\n"
        "import torch\n"
        "for module in (jactri, jactri.kernels):\n"
        "    assert module.__file__.startswith(sys.argv[1]), module.__file__\n"
        "J = jactri.jacobian(torch.tanh, torch.zeros(3))\n"
        "assert torch.equal(J, torch.eye(3)), J\n"
    )
    done = python(code, str(unpacked), cwd=tmp_path, path=[str(unpacked)])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("flags", [["-S"], []], ids=["nothing is installed", "another is"])
def test_a_clone_works_where_it_was_not_installed(flags, tmp_path):
    """``-S``: no editable install is there; without, the kernels are the clone's all the same."""
    for name in ("jactri", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import jactri, torch\n"
        "from jactri.kernels import support\n"
        "print(jactri.__file__, jactri.kernels.__file__, support.__file__)\n"
        "assert torch.equal(jactri.jacobian(torch.tanh, torch.zeros(3)), torch.eye(3))\n"
    )
    done = python(code, cwd=tmp_path, path=["", *filter(os.path.isdir, sys.path)], flags=flags)
    assert done.returncode == 0, done.stderr
    assert [str(tmp_path) in file for file in done.stdout.split()] == [True] * 3
    shutil.rmtree(tmp_path / "kernels")
    done = python("import jactri", cwd=tmp_path, path=[], flags=flags)
    assert (
        "ImportError: jactri.kernels is neither in" in done.stderr
        and "pip install -e" in done.stderr
    )


def test_the_kernels_import_as_a_part_of_the_package():
    """Under the editable install that the README asks for, too."""
    import jactri.kernels

    assert jactri.kernels.__name__ == "jactri.kernels"


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert os.access(ROOT / ".ci" / "run", os.X_OK) or os.name == "nt"
    assert "pip install --quiet -e '.[test]'" in script
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = script.rstrip().splitlines()[-1]
    assert command.startswith("pytest") and f"pip install -e '.[test]' && {command} " in readme


def test_the_test_extra_holds_what_the_demo_needs():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    extras = parser["options.extras_require"]
    assert set(extras["demo"].split()) <= set(extras["test"].split())
