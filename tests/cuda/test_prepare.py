"""Kernels compiled and packed without a GPU are what a process elsewhere finds, and nothing else is."""

import json
import os
import sysconfig
import tarfile
from itertools import product
from unittest import mock

import pytest
import torch
import triton
from triton import knobs
from triton.runtime import build
from triton.runtime import cache as triton_cache

from benchmarks.gpu import cache, fake, prepare, suite, variants
from benchmarks.gpu.bench import own
from benchmarks.gpu.device import SETTINGS, precision
from benchmarks.gpu.sizes import sized
from jactri._src.base import backends
from jactri._src.device import chooser
from jactri.kernels import linear

WORKLOAD = "W9-ntk"
OWN = sysconfig.get_python_version()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """(archive, manifest, kernels) of one workload under backend="triton"."""
    folder = tmp_path_factory.mktemp("packed")
    (size,) = sized([WORKLOAD])
    device = fake.install()
    device.clear()
    for setting in SETTINGS:
        with device, precision(setting):
            net, x = device.problem(size.workload)
            own("triton").make(size.workload, net)(x)
    found = {(n.kernel, n.key): device.variants[n.kernel, n.key] for n in device.launches}
    kernels = [(name, v) for (name, _), v in found.items()]
    out = folder / "kernels.tar.xz"
    about = prepare.pack(kernels, out, folder=folder / "made", jobs=2, python=OWN)
    return out, about, kernels


def test_another_process_compiles_nothing(packed, libcuda, tmp_path):
    out, about, kernels = packed
    assert about["failed"] == [] and about["packed"] == about["asked"] == len(kernels)
    report = cache.unpack(out, tmp_path / "elsewhere", target="sm_90")
    counts = libcuda(WORKLOAD, WORKLOAD, TRITON_CACHE_DIR=report["folder"])
    assert counts["kernels"] == len(kernels)
    found = counts["cache"]
    assert (found["hits"], found["misses"], found["refused"]) == (len(kernels), 0, None)
    if about["launchers"]["why"] is None:
        assert report["notes"] == []
        assert about["launchers"]["count"] >= 2
        assert found["launchers_built"] == 0


def test_what_compiled_is_not_compiled_again(packed, tmp_path):
    out, _, kernels = packed
    folder = out.parent / "made"
    before = {f: f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()}
    again = tmp_path / "again.tar.xz"
    prepare.pack(kernels, again, folder=folder, jobs=1, python=OWN)
    assert again.read_bytes() == out.read_bytes()
    assert before == {f: f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()}


def test_other_sources_another_triton_and_another_card_are_refused(packed, tmp_path, monkeypatch):
    out, about, _ = packed
    with pytest.raises(cache.Mismatch, match=r"target: packed 'sm_90', here 'sm_80'"):
        cache.unpack(out, tmp_path / "x", target="sm_80")
    copy = tmp_path / "kernels"
    copy.mkdir()
    for file in (cache.ROOT / "kernels").glob("*.py"):
        text = file.read_text()
        (copy / file.name).write_text(text + "\n" if file.name == "linear.py" else text)
    edited, plain = cache.kernels_hash(copy), cache.kernels_hash
    assert edited != about["kernels"]
    with monkeypatch.context() as patch:
        patch.setattr(cache, "kernels_hash", lambda: edited)
        with pytest.raises(cache.Mismatch, match=rf"packed '{plain()}', here '{edited}'.* prepare"):
            cache.unpack(out, tmp_path / "x")
    with monkeypatch.context() as patch:
        patch.setattr(triton, "__version__", "3.7.0")
        with pytest.raises(cache.Mismatch, match=r"triton: packed '3.*', here '3\.7\.0'"):
            cache.unpack(out, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_unpacked_cache_of_other_sources_is_not_used(packed, tmp_path, monkeypatch):
    report = cache.unpack(packed[0], tmp_path / "old")
    monkeypatch.setenv("TRITON_CACHE_DIR", report["folder"])
    monkeypatch.setattr(cache, "_counts", None)
    for owner, name in (
        (knobs.compilation, "listener"),
        (build, "_build"),
        (triton_cache, "triton_key"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    key = triton_cache.triton_key
    monkeypatch.setattr(cache, "kernels_hash", lambda: "edited")
    assert not cache.begin()
    assert triton_cache.triton_key is key
    assert "'edited'" in cache.counted()["refused"]


def test_only_files_of_a_cache_are_unpacked(tmp_path):
    odd = tmp_path / "odd.tar.xz"
    inside = tmp_path / "manifest.json"
    inside.write_text(json.dumps(cache.here()))
    for names in (["other"], ["manifest.json", "../outside"], ["manifest.json", "a/b/c"]):
        with tarfile.open(odd, "w:xz") as pack:
            for name in names:
                pack.add(inside, name)
        with pytest.raises(cache.Mismatch):
            cache.unpack(odd, tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        cache.unpack(tmp_path / "none.tar.xz", tmp_path / "x")


def test_without_headers_kernels_alone_are_packed(packed, tmp_path):
    _, _, kernels = packed
    about = prepare.pack(
        kernels, tmp_path / "bare.tar.xz", folder=packed[0].parent / "made", jobs=1, headers=tmp_path
    )  # fmt: skip
    assert about["launchers"]["count"] == 0 and about["launchers"]["why"]
    (note,) = cache.unpack(tmp_path / "bare.tar.xz", tmp_path / "bare")["notes"]
    assert "compiled here" in note


def test_what_does_not_compile_or_takes_too_long_is_named(tmp_path, monkeypatch):
    class Broken:
        def source(self):
            raise ValueError("no such kernel")

    class Slow(Broken):
        def source(self):
            import time

            time.sleep(60)

    class Dead(Broken):
        def source(self):
            os._exit(1)

    monkeypatch.setattr(prepare, "LIMIT", 1)
    given = [("_broken", Broken()), ("_slow", Slow()), ("_dead", Dead())]
    about = prepare.pack(given, tmp_path / "none.tar.xz", folder=tmp_path / "made", jobs=1)
    assert (about["asked"], about["packed"]) == (3, 0)
    failed = dict(about["failed"])
    assert failed["_broken"] == "ValueError: no such kernel"
    assert failed["_slow"] == "TimeoutError: took longer than 1 s"
    assert "ended its process" in failed["_dead"]


def test_time_that_is_up_leaves_the_rest(tmp_path):
    about = prepare.pack(
        [("_never", None)], tmp_path / "none.tar.xz", folder=tmp_path / "made", deadline=1.0
    )
    assert (about["asked"], about["packed"], about["failed"]) == (1, 0, [])


def test_every_way_that_may_win_is_asked_for(device):
    t, m = torch.empty(4, 4096, 64, device="cuda"), torch.empty(64, 64, device="cuda")
    chain = chooser.Chain(t, (m.t(),), (None, None), lambda: [None, None])
    chooser.forget()
    with torch.no_grad(), backends.use("triton"), variants._all_ways():
        chooser.run(chain)
    made = [device.variants[n.kernel, n.key] for n in device.launches if n.kernel == "_step"]
    names = linear._step.arg_names

    def of(variant, name):
        return variant.constexprs[(names.index(name),)]

    asked = {(of(v, "BM"), of(v, "PRECISION"), v.options.num_warps) for v in made}
    dots = chooser.dots("fp32")
    assert len(dots) == 2
    assert asked == {(c.rows, d, c.warps) for c, d in product(linear.CONFIGS, dots)}


def test_kernels_of_smoke_tests_are_asked_for(device):
    device.clear()
    variants._tested(device, suite.smoke("elementwise"))
    assert {n.kernel for n in device.launches} == {"_scaled_sum"}
    assert torch.cuda.is_available.__name__ != "<lambda>"


def test_the_command_runs_under_the_triton_of_the_gpu_machine(
    packed, tmp_path, monkeypatch, capsys
):
    kernels, out = packed[2], tmp_path / "kernels.tar.xz"
    monkeypatch.setattr(variants, "asked", lambda names: kernels)
    monkeypatch.setattr(prepare, "FOLDER", packed[0].parent)
    given = ["--out", str(out), "--jobs", "2", "--python", OWN]
    assert prepare.main([*given, "--triton", triton.__version__]) == 0
    assert f"{len(kernels)} of {len(kernels)} kernels" in capsys.readouterr().out
    assert out.read_bytes() == packed[0].read_bytes()
    ran = []
    monkeypatch.setattr(prepare, "wheel", lambda version: tmp_path / version)
    monkeypatch.setattr(
        prepare.subprocess, "run", lambda *c, **o: ran.append((c, o)) or mock.Mock(returncode=7)
    )
    assert prepare.main([*given, "--triton", "3.7.1"]) == 7
    (((command,), options),) = ran
    assert command[1:] == ["-m", "benchmarks.gpu", "prepare", *given, "--triton", "3.7.1"]
    assert options["env"]["PYTHONPATH"].startswith(str(tmp_path / "3.7.1"))
    monkeypatch.setenv("JACTRI_PREPARING", "1")  # the wheel did not come up
    assert prepare.main([*given, "--triton", "3.7.1"]) == 1
