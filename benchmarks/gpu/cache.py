"""A cache of compiled kernels that travels: packed on one machine, unpacked and used on another.

Triton's cache on disk answers by a key of the kernel's source, its arguments' types and values, its options, and of
Triton itself: that last part hashes the wheel's own files, which differ from one build for Python to another. Here it
is the version alone, on both sides. What this key no longer tells apart, and what Triton's key never did (functions in
tuples are hashed by name), the manifest does: a hash of kernels/ and versions, all of which have to be equal.

A process uses a cache by `begin`, if ``TRITON_CACHE_DIR`` names a folder that `unpack` made; under pytest by ``-p
benchmarks.gpu.cache``. `counted` tells what the cache answered in this process, and what was compiled all the same.
"""

from __future__ import annotations

import collections
import hashlib
import json
import lzma
import os
import shutil
import sysconfig
import tarfile
from pathlib import Path
from typing import Any

FORMAT = 1
MANIFEST = "manifest.json"
GROUP = "__grp__"
"""What Triton's lists of the files of one kernel are called before the kernel's name."""

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "gpu"
ARCHIVE = FOLDER / "kernels.tar.xz"
"""Where `prepare` writes, and `unpack` reads, if not told otherwise."""


class Mismatch(RuntimeError):
    """A packed cache is not for this checkout, this Triton or this card; the message says what differs."""


def kernels_hash(folder: Path = ROOT / "kernels") -> str:
    """Of the names and the text of all kernel sources."""
    found = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        found.update(f"{file.name} {file.stat().st_size}\n".encode())
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def here() -> dict[str, Any]:
    """What a manifest must agree with in this process."""
    import triton

    return {
        "format": FORMAT,
        "kernels": kernels_hash(),
        "triton": triton.__version__,
        "settings": _settings(),
    }


def _settings() -> dict[str, str]:
    """Triton's environment variables that change what is compiled: they are in its keys."""
    from triton._C.libtriton import get_cache_invalidating_env_vars

    return dict(sorted(get_cache_invalidating_env_vars().items()))


def check(manifest: dict[str, Any], target: str | None = None) -> None:
    """Raise `Mismatch` where a manifest is for another checkout, another Triton or another ``target`` ("sm_90")."""
    wanted = here() | ({"target": target} if target else {})
    names = {"kernels": "the sources in kernels/ (their hash)", "settings": "Triton's settings"}
    differ = [
        f"{names.get(k, k)}: packed {manifest.get(k)!r}, here {v!r}"
        for k, v in wanted.items()
        if manifest.get(k) != v
    ]
    if differ:
        raise Mismatch(
            f"the packed kernels are not those that would run here; {'; '.join(differ)}. "
            "Pack them anew: python -m benchmarks.gpu prepare"
        )


def fix_key() -> None:
    """Let Triton's keys hold its version instead of a hash of the wheel's files, in this process."""
    import triton
    from triton.runtime import cache

    key = f"{triton.__version__}, packed by jactri"
    cache.triton_key = lambda: key


def suffix(python: str | None = None) -> str:
    """How extension modules of a Python ("3.12") are called on a machine like this one."""
    own = sysconfig.get_config_var("EXT_SUFFIX")
    if python is None:
        return own
    return own.replace(
        f"-{sysconfig.get_config_var('py_version_nodot')}-", f"-{python.replace('.', '')}-"
    )


def write(archive: Path, manifest: dict[str, Any], files: list[Path], folder: Path) -> int:
    """Pack a manifest and files of a cache folder, of kernels all but their intermediate code; bytes written.

    Lists of files become lists of names: `unpack` makes paths of them.
    """
    import io

    def add(pack: tarfile.TarFile, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)  # no owner, mode or date: equal caches give equal archives
        info.size = len(data)
        pack.addfile(info, io.BytesIO(data))

    archive.parent.mkdir(parents=True, exist_ok=True)
    part = archive.with_name(archive.name + ".part")
    with lzma.open(part, "wb", preset=9) as packed, tarfile.open(fileobj=packed, mode="w") as pack:
        add(pack, MANIFEST, json.dumps(manifest, indent=1).encode())
        for file in sorted(files):
            data = file.read_bytes()
            if file.name.startswith(GROUP):
                group = json.loads(data)["child_paths"]
                kept = [n for n in group if runs(n)]
                data = json.dumps({"child_paths": {n: n for n in kept}}).encode()
            add(pack, file.relative_to(folder).as_posix(), data)
    os.replace(part, archive)
    return archive.stat().st_size


def runs(name: str) -> bool:
    """Whether a file of a kernel is needed to run it."""
    return name.endswith((".json", ".cubin", ".hsaco"))


def unpack(
    archive: Path = ARCHIVE, folder: Path = FOLDER / "kernels", target: str | None = None
) -> dict[str, Any]:
    """Unpack a cache into a folder and report: the manifest, ``folder``, and ``notes`` on what is not as it was packed.

    What the folder held is replaced. Processes started with ``TRITON_CACHE_DIR`` set to the folder use it by
    `begin`. Raises `Mismatch` where the archive is for another checkout, another Triton or another ``target``, and
    FileNotFoundError where there is none.
    """
    with tarfile.open(archive, "r:xz") as pack:
        first = pack.next()
        if first is None or first.name != MANIFEST:
            raise Mismatch(f"{archive} does not begin with {MANIFEST}: it was not made by prepare")
        manifest = json.load(pack.extractfile(first))
        check(manifest, target)
        shutil.rmtree(folder, ignore_errors=True)
        while (member := pack.next()) is not None:
            where, _, name = member.name.partition("/")
            if not member.isfile() or not name or "/" in name or ".." in (where, name):
                raise Mismatch(f"{archive} holds {member.name!r}, which is no file of a cache")
            into = folder / where
            into.mkdir(parents=True, exist_ok=True)
            data = pack.extractfile(member).read()
            if name.startswith(GROUP):
                names = json.loads(data)["child_paths"]
                paths = {n: str(into.resolve() / n) for n in names}
                data = json.dumps({"child_paths": paths}).encode()
            (into / name).write_bytes(data)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    return manifest | {"folder": str(folder.resolve()), "notes": notes(manifest)}


def notes(manifest: dict[str, Any]) -> list[str]:
    """What is not as it was where the cache was packed, and does no harm."""
    import torch

    found = []
    if manifest["torch"] != torch.__version__:
        found.append(
            f"packed under torch {manifest['torch']}, here {torch.__version__}: kernels do not depend on it, "
            "which of them are asked for may"
        )
    launchers = manifest["launchers"]
    if not launchers["count"]:
        found.append(f"no launchers: {launchers['why']}; they are compiled here")
    elif launchers["suffix"] != suffix():
        found.append(f"launchers for {launchers['suffix']}, not {suffix()}: they are compiled here")
    return found


class _Counts:
    """What the cache of this process answered."""

    def __init__(self) -> None:
        self.hits: collections.Counter[str] = collections.Counter()
        self.missed: collections.Counter[str] = collections.Counter()
        self.seconds = 0.0
        self.built = 0
        self.refused: str | None = None


_counts: _Counts | None = None


def begin() -> bool:
    """Use the unpacked cache that ``TRITON_CACHE_DIR`` names, and count, from here on in this process.

    False where it names none, or one that is not for this checkout: then Triton's own key is left as it is, and every
    kernel is compiled. Call it before the first launch.
    """
    global _counts

    folder = os.environ.get("TRITON_CACHE_DIR")
    if folder is None or not (Path(folder) / MANIFEST).exists():
        return False
    if _counts is not None:
        return _counts.refused is None
    from triton import knobs
    from triton.runtime import build

    counts = _counts = _Counts()
    try:
        check(json.loads((Path(folder) / MANIFEST).read_text()))
        fix_key()
    except Mismatch as error:
        counts.refused = str(error)

    def listen(*, src, times, cache_hit, **rest) -> None:
        (counts.hits if cache_hit else counts.missed)[src.name] += 1
        if not cache_hit:
            counts.seconds += times.total / 1e6

    plain = build._build

    def building(*given, **named) -> str:
        counts.built += 1
        return plain(*given, **named)

    knobs.compilation.listener = listen
    build._build = building
    return counts.refused is None


def counted() -> dict[str, Any] | None:
    """Since `begin`: kernels that the cache had, those that were compiled (by name, and the seconds), launchers that a
    C compiler built, and why the cache was refused, if it was. None without a cache."""
    if _counts is None:
        return None
    return {
        "hits": _counts.hits.total(),
        "misses": _counts.missed.total(),
        "missed": dict(_counts.missed),
        "compile_seconds": round(_counts.seconds, 3),
        "launchers_built": _counts.built,
        "refused": _counts.refused,
    }


def pytest_configure(config) -> None:
    """Under ``pytest -p benchmarks.gpu.cache``."""
    begin()


def pytest_terminal_summary(terminalreporter) -> None:
    if _counts is not None:
        terminalreporter.write_line(f"kernel cache: {json.dumps(counted())}")
