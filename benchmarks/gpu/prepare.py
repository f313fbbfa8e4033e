"""Compile, without a GPU, every kernel that a session on one will ask for, and pack the result:

    python -m benchmarks.gpu prepare [WORKLOAD ...] [--out FILE] [--jobs N] [--seconds S]

The smoke tests of a lease, and the workloads at their GPU sizes, in every precision and by every backend, run on a
device that is not there (`fake`); wherever the chooser would time several ways, all of them are launched. What these
launches would compile is compiled for the target, the most valuable first, by the Triton that the GPU machine has: its
wheel goes into a folder of its own. A call that is ended goes on where it stopped when it is called again. `cache`
unpacks and uses the result.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from .cache import (
    ARCHIVE,
    FOLDER,
    ROOT,
    Mismatch,
    begin,
    check,
    counted,
    fix_key,
    here,
    runs,
    suffix,
    unpack,
    write,
)

__all__ = ["ARCHIVE", "Mismatch", "begin", "check", "counted", "main", "pack", "unpack"]

TRITON, PYTHON, TARGET = "3.6.0", "3.12", "sm_90"
"""What the GPU machine has."""

LIMIT = 120
"""Seconds that a kernel's compilation may take: quiet, the longest takes six."""


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "workloads", nargs="*", metavar="WORKLOAD", help="W1, ...; default: all, and smoke tests"
    )
    parser.add_argument(
        "--out", type=Path, default=ARCHIVE, help=f"default: {ARCHIVE.relative_to(ROOT)}"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes; default: one a core"
    )
    parser.add_argument("--seconds", type=float, help="compile no longer, and pack what there is")
    parser.add_argument("--triton", default=TRITON, help=f"the GPU machine's; default: {TRITON}")
    parser.add_argument("--python", default=PYTHON, help=f"the GPU machine's; default: {PYTHON}")
    parser.add_argument(
        "--headers", type=Path, help="the folder of that Python's Python.h, for the C launchers"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Run the command line; the exit code."""
    options = parse(arguments)
    import triton

    if triton.__version__ != options.triton:
        if os.environ.get("JACTRI_PREPARING"):
            print(
                f"triton {triton.__version__} came up instead of {options.triton}", file=sys.stderr
            )
            return 1
        path = os.pathsep.join([str(wheel(options.triton)), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "JACTRI_PREPARING": "1"}
        command = [sys.executable, "-m", "benchmarks.gpu", "prepare", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment).returncode
    from .variants import asked

    began = time.monotonic()
    found = asked(options.workloads)
    print(f"{len(found)} kernels are asked for ({time.monotonic() - began:.0f} s)", flush=True)
    deadline = None if options.seconds is None else began + options.seconds
    report = pack(
        found, options.out, jobs=options.jobs, deadline=deadline, python=options.python, headers=options.headers
    )  # fmt: skip
    for name, why in report["failed"]:
        print(f"FAILED {name}: {why}")
    launchers = report["launchers"]
    print(
        f"{report['packed']} of {report['asked']} kernels and {launchers['count']} launchers"
        f"{'' if launchers['count'] else ' (' + launchers['why'] + ')'} in {options.out}, "
        f"{report['bytes'] / 1e6:.1f} MB, {time.monotonic() - began:.0f} s"
    )
    return 1 if report["failed"] else 0


def wheel(version: str) -> Path:
    """A folder with this version of Triton, from pip if it is not there yet."""
    folder = FOLDER / f"triton-{version}"
    if not folder.exists():
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(part),
        ]
        subprocess.run([*pip, f"triton=={version}"], check=True)
        part.rename(folder)
    return folder


# ---- compile and pack

_jobs: list[tuple[str, Any]] = []
"""(name, variant): what the processes of the pool compile, by index; they are forked."""


def pack(
    found: list[tuple[str, Any]],
    out: Path = ARCHIVE,
    *,
    folder: Path | None = None,
    jobs: int = os.cpu_count() or 1,
    deadline: float | None = None,
    target: str = TARGET,
    python: str = PYTHON,
    headers: Path | None = None,
) -> dict[str, Any]:
    """Compile kernels, (name, `fake.Variant`) each, in this order, and pack them; the manifest, and ``bytes`` written.

    What ``folder`` holds from before, of the same sources, is not compiled again. ``deadline``, of
    `time.monotonic`: nothing is begun after it. What did not compile is under ``failed`` with the reason. Raises
    Mismatch if kernels/ was edited meanwhile.
    """
    import torch

    folder = folder or FOLDER / "made"
    folder.mkdir(parents=True, exist_ok=True)
    about = here() | {
        "target": target, "torch": torch.__version__, "packed_by_python": platform.python_version(),
    }  # fmt: skip
    _jobs[:] = found
    files: set[Path] = set()
    failed: list[tuple[str, str]] = []
    sources: dict[str, None] = {}
    names: collections.Counter[str] = collections.Counter()
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(folder.resolve())
    try:
        for i, made in _spread(_compiled, [(i, target) for i in range(len(found))], jobs, deadline):
            if isinstance(made, str):
                failed.append((found[i][0], made))
                continue
            files.update(made["files"])
            names[found[i][0]] += 1
            if made["launcher"]:
                sources[made["launcher"]] = None
        launchers: dict[str, Any] = {"count": 0, "suffix": suffix(python)}
        given = headers or _headers(python)
        launchers["why"] = _lacking(given, python, sources)
        if launchers["why"] is None:
            c = [_driver_source(), *(("__triton_launcher", s) for s in sources)]
            for _, made in _spread(_built, [(n, s, given, python) for n, s in c], jobs, None):
                if isinstance(made, str):
                    failed.append(("launcher", made))
                else:
                    files.add(made)
                    launchers["count"] += 1
    finally:
        if before is None:
            del os.environ["TRITON_CACHE_DIR"]
        else:
            os.environ["TRITON_CACHE_DIR"] = before
    check(about)  # the sources may have been edited meanwhile
    manifest = about | {
        "asked": len(found), "packed": names.total(), "variants": dict(sorted(names.items())), "failed": sorted(failed),
        "launchers": launchers,
    }  # fmt: skip
    return manifest | {"bytes": write(out, manifest, sorted(files), folder.resolve())}


def _spread(
    work: Any, given: list[tuple], jobs: int, deadline: float | None
) -> Iterator[tuple[int, Any]]:
    """(index, result) of a function on each of many arguments, in forked processes, as they end; an exception is text.

    A process that dies takes those down that run beside it: all of these are reported as failed.
    """
    todo = iter(enumerate(given))
    dead = "it, or what was compiled beside it, ended its process"
    while True:
        waiting: dict[Future, int] = {}
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"), fix_key) as pool:
            try:
                while True:
                    while len(waiting) < 2 * jobs and (not deadline or time.monotonic() < deadline):
                        i, arguments = next(todo, (None, None))
                        if i is None:
                            break
                        waiting[pool.submit(_limited, work, arguments)] = i
                    if not waiting:
                        return
                    for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                        made = done.result()
                        yield waiting.pop(done), made
            except BrokenProcessPool:
                yield from ((i, dead) for i in waiting.values())


def _limited(work: Any, given: tuple) -> Any:
    """The function's result within `LIMIT`, or what it raised, as text."""

    def end(*_: Any) -> None:
        raise TimeoutError(f"took longer than {LIMIT} s")

    signal.signal(signal.SIGALRM, end)
    signal.alarm(LIMIT)
    try:
        return work(*given)
    except Exception as error:  # a compiler fails in many ways: the other kernels go on
        return f"{type(error).__name__}: {error}"[:500]
    finally:
        signal.alarm(0)


def _compiled(index: int, target: str) -> dict[str, Any]:
    """Compile one kernel: its files that are needed to run it, and its launcher's C source."""
    import triton
    from triton.backends.nvidia import driver

    from .driver import TARGETS

    _, variant = _jobs[index]
    source = variant.source()
    kernel = triton.compile(source, target=TARGETS[target], options=variant.options.__dict__)
    files = [Path(p) for n, p in kernel.metadata_group.items() if runs(n)]
    lists = list(files[0].parent.glob("__grp__*"))
    launcher = None
    if hasattr(driver, "make_launcher"):  # later versions have one for all signatures
        about = getattr(kernel.metadata, "tensordesc_meta", None)
        launcher = driver.make_launcher(source.constants, source.signature, about)
    return {"files": [*files, *lists], "launcher": launcher}


# ---- C launchers: one for each signature


def _headers(python: str) -> Path | None:
    """The headers of a Python on this machine: this one, one beside it, one on the PATH."""
    if python == sysconfig.get_python_version():
        return Path(sysconfig.get_paths(sysconfig.get_default_scheme())["include"])
    beside = Path(sys.base_prefix).parent.glob(f"*{python}*/include/python{python}")
    if found := max((p for p in beside if (p / "Python.h").exists()), default=None):
        return found
    command = [f"python{python}", "-c", "import sysconfig; print(sysconfig.get_paths()['include'])"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return Path(done.stdout.strip())


def _lacking(headers: Path | None, python: str, sources: Iterable[str]) -> str | None:
    """Why no launchers can be built here, or None."""
    import triton

    if not sources:
        return f"triton {triton.__version__} has one for all kernels"
    if headers is None or not (headers / "Python.h").exists():
        return f"no headers of Python {python} here (--headers names their folder)"
    if _compiler() is None:
        return "no C compiler here"
    return None


def _compiler() -> str | None:
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def _driver_source() -> tuple[str, str]:
    """What Triton talks to the driver by: name and C source."""
    from triton.backends.nvidia import driver

    return "cuda_utils", (Path(driver.dirname) / "driver.c").read_text()


def _built(name: str, source: str, headers: Path, python: str) -> Path:
    """Build an extension module as Triton would on a GPU machine, and put it where that would look: its file."""
    from triton.backends.nvidia import driver
    from triton.runtime.build import platform_key
    from triton.runtime.cache import get_cache_manager

    cache = get_cache_manager(hashlib.sha256((source + platform_key()).encode()).hexdigest())
    file = name + suffix(python)
    there = cache.get_file(file)
    if there is not None:
        return Path(there)
    with tempfile.TemporaryDirectory() as scratch:
        c, so, stub = (Path(scratch) / n for n in ("main.c", file, "libcuda.so.1"))
        c.write_text(source)
        (stub.parent / "stub.c").write_text("")
        link = ["-shared", "-fPIC", "-o"]
        # linked with a library of the right name that has nothing in it: the real one is there at run time
        for command in (
            [*link, stub, stub.parent / "stub.c", "-Wl,-soname,libcuda.so.1"],
            [
                *link, so, c, "-O2", "-Wno-psabi", "-Wl,--no-as-needed", f"-L{scratch}", "-l:libcuda.so.1",
                *(f"-I{i}" for i in (*driver.include_dirs, headers)),
            ],
        ):  # fmt: skip
            done = subprocess.run([_compiler(), *map(str, command)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"the C compiler: {done.stderr[-300:]}")
        return Path(cache.put(so.read_bytes(), file, binary=True))
