"""How much memory the system lets this process take: of the machine, of a container (its control groups), of limits."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")
_GROUPS = Path("/sys/fs/cgroup")

_LIMITS = {
    2: (("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")),
    1: (
        ("memory.limit_in_bytes",),
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
}
"""By version of control groups: the files of limits and of what is used, and what of that are files' caches, which give
way."""


def free_on_host() -> int:
    """Bytes that this process can take before it is refused more, killed, or made to swap."""
    return max(min([_of_machine(), *_of_groups(), *_of_process()]), 0)


def _of_machine() -> int:
    for name, amount in _table(_PROC / "meminfo"):
        if name == "MemAvailable:":
            return amount * 1024
    names = getattr(os, "sysconf_names", ())
    for pages in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
        if pages in names:
            return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    return sys.maxsize


def _of_groups() -> Iterator[int]:
    """What each control group that this process is in leaves of its limit, those around it included.

    In a container the path of a group may not be there: what is mounted then is that group itself.
    """
    for line in _text(_PROC / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            version, roots = 2, [_GROUPS, _GROUPS / "unified"]
        elif "memory" in controllers.split(","):
            version, roots = 1, [_GROUPS / "memory"]
        else:
            continue
        for root in roots:
            group = root / path.lstrip("/")
            for at in (group, *group.parents):
                if at.is_relative_to(root):
                    yield from _of_group(at, *_LIMITS[version])


def _of_group(
    at: Path, limits: tuple[str, ...], used: str, caches: tuple[str, ...]
) -> Iterator[int]:
    most = [int(m) for m in map(_text, (at / name for name in limits)) if m.strip().isdigit()]
    now = _text(at / used)
    if most and now:
        given_back = sum(amount for name, amount in _table(at / "memory.stat") if name in caches)
        yield min(most) - max(int(now) - given_back, 0)


def _of_process() -> Iterator[int]:
    """What is left of the limits of address space and of data (``ulimit -v``, ``ulimit -d``)."""
    pages = _text(_PROC / "self/statm").split()
    if pages:
        import resource

        for limit, taken in ((resource.RLIMIT_AS, pages[0]), (resource.RLIMIT_DATA, pages[5])):
            most, _ = resource.getrlimit(limit)
            if most != resource.RLIM_INFINITY:
                yield most - int(taken) * resource.getpagesize()


def _table(path: Path) -> Iterator[tuple[str, int]]:
    """Lines of a name and a number."""
    for line in _text(path).splitlines():
        name, amount, *_ = line.split()
        yield name, int(amount)


def _text(path: Path) -> str:
    """What a file of the system says, or nothing where it is not there or may not be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
