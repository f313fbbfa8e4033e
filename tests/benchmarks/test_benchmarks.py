"""The benchmarks' own code at tiny sizes: every point is checked, files are reported, bad words refused. No times."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import (
    checks,
    compare,
    machine,
    peers,
    peers_jax,
    penalty,
    plots,
    report,
    scaling,
    workloads,
)
from benchmarks.gpu import device as devices

SIZES = {"batch": (1, 3), "width": (4, 8), "depth": (1, 2)}
BASE = {"batch": 3, "width": 8, "depth": 2}
QUICK = ["--rounds", "1", "--no-compile"]


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Run benchmarks.scaling at tiny sizes: (exit status, its file)."""
    monkeypatch.setattr(scaling, "AXES", SIZES)
    monkeypatch.setattr(scaling, "BASE", BASE)
    monkeypatch.setattr(machine.Peak, "SIZE", 32)
    monkeypatch.setattr(machine, "COPIED", 1 << 12)
    path = tmp_path / "results" / "scaling.json"

    def call(*arguments):
        code = scaling.main([*QUICK, *arguments, "--json", str(path)])
        return code, json.loads(path.read_text())

    return call


def sizes(row):
    return row["batch"], row["width"], row["depth"]


def test_scaling_checks_and_times_every_point(tiny, capsys):
    code, found = tiny()
    assert code == 0 and found["kind"] == "scaling" and not found["not_run"]
    assert {sizes(r) for r in found["results"]} == {(3, 8, 2), (1, 8, 2), (3, 4, 2), (3, 8, 1)}
    for row in found["results"]:
        assert row["shape"] == [row["batch"], 32, 32] and not row["rejected"]
        assert {"jactri", *(p.name for p in peers.TORCH)} <= set(row["contenders"])
        for fact in row["contenders"].values():
            assert 0 <= fact["error"] <= checks.TOLERANCE and fact["seconds"]["count"] == 1
    flops = [r["least_flops"] for r in found["results"]]
    assert flops == sorted(flops)
    assert report.table(found).count("\n| batch ") == report.table(found).count("\n| depth ") == 2
    assert "best torch peer" in capsys.readouterr().out


def test_a_penalty_is_checked_and_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(penalty, "OF", {"W1-tanh": 2})
    path = tmp_path / "penalty.json"
    assert penalty.main(["--rounds", "1", "--no-compile", "--json", str(path)]) == 0
    (found,) = json.loads(path.read_text())["results"]
    assert (
        set(found["errors"]) == {"jactri", "vmap(jacrev)"} and max(found["errors"].values()) < 1e-4
    )
    assert found["ratios"]["vmap(jacrev) / jactri"]["count"] == 1
    assert "vmap(jacrev)" in capsys.readouterr().out
    assert report.main([str(path), "--plots", str(tmp_path)]) == 0
    assert "32, Tanh, N=2 | " in capsys.readouterr().out
    monkeypatch.setattr(penalty, "_ours", lambda net, x: 2 * penalty._func(net, x))
    assert penalty.main(["--rounds", "1", "--no-compile"]) == 1


def test_scaling_along_one_axis(tiny):
    code, found = tiny("--axis", "width")
    assert code == 0 and [sizes(r) for r in found["results"]] == [(3, 4, 2), (3, 8, 2)]
    assert plots.panels(found) == ["width"]


def test_the_sizes_of_scaling_hold_w1_and_what_the_issue_names():
    assert scaling.workload(**scaling.BASE).shape == workloads.select(["W1-tanh"])[0].shape
    assert all(scaling.BASE[a] in s and s == tuple(sorted(s)) for a, s in scaling.AXES.items())
    ends = {a: (s[0], s[-1]) for a, s in scaling.AXES.items()}
    assert ends == {"batch": (1, 4096), "width": (32, 1024), "depth": (1, 16)}
    assert len(scaling.points(list(scaling.AXES))) == 16  # W1 lies on every axis, and is timed once


def test_what_the_budget_has_no_time_for_is_named(tiny):
    code, found = tiny("--budget", "1e-6")
    assert code == 0 and not found["results"]
    assert found["not_run"] == ["N1-w8-d2", "N3-w4-d2", "N3-w8-d1", "N3-w8-d2"]


def test_a_contender_for_which_time_does_not_suffice_is_left_out():
    entered = compare.Field(scaling.workload(**BASE), {}, until=0.0)
    for peer in (peers.JACTRI, *peers.TORCH[:2]):
        entered.add(peer, traceback=True)
    assert list(entered.calls) == ["jactri"]
    assert entered.left_out == {p.name: "no time left" for p in peers.TORCH[:2]}


def test_a_run_that_is_cut_short_keeps_what_it_has(tiny, monkeypatch, tmp_path):
    contend, calls = compare.contend, itertools.count()

    def stop(*arguments):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return contend(*arguments)

    monkeypatch.setattr(compare, "contend", stop)
    with pytest.raises(KeyboardInterrupt):
        tiny()
    kept = json.loads((tmp_path / "results" / "scaling.json").read_text())
    assert [sizes(r) for r in kept["results"]] == [(1, 8, 2)]


def wrong(w, net):
    jacobian = torch.func.vmap(torch.func.jacrev(net))
    return lambda x: jacobian(x) * 1.001


def test_a_wrong_peer_is_named_and_not_timed(tiny, monkeypatch):
    monkeypatch.setattr(peers, "TORCH", (peers.Peer("planted", "torch", wrong), *peers.TORCH[:1]))
    code, found = tiny("--axis", "depth")
    assert code == 0
    for row in found["results"]:
        assert "WrongResult" in row["rejected"]["planted"] and "planted" not in row["contenders"]
        assert row["ratios"]["best torch peer"]["peer"] == "functional loop"


def test_a_wrong_jactri_fails_the_run(tiny, monkeypatch):
    monkeypatch.setattr(peers, "JACTRI", peers.Peer("jactri", "jactri", wrong))
    code, found = tiny("--axis", "depth")
    assert code == 1
    assert {f["what"] for f in found["failures"]} == {"N3-w8-d1 jactri", "N3-w8-d2 jactri"}
    assert "ratios" not in found["results"][0] and "\n| depth" not in report.table(found)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--axis", "height"], "invalid choice: 'height'"),
        (["--rounds", "0"], "'0' is not a whole number above 0"),
        (["--rounds", "few"], "'few' is not a whole number above 0"),
        (["--budget", "-1"], "'-1' is not a number of seconds above 0"),
        (["--budget", "inf"], "'inf' is not a number of seconds above 0"),
        (["--json", "."], ". is a folder"),
    ],
)
@pytest.mark.parametrize("command", [scaling.main, compare.main])
def test_bad_arguments_are_refused(command, arguments, message, capsys):
    if command is compare.main and "--axis" in arguments:
        message = "unrecognized arguments: --axis"
    with pytest.raises(SystemExit, match="2"):
        command(arguments)
    assert message in capsys.readouterr().err


# ---- the report


MACHINE = {"cpu": "a processor", "threads": 2, "torch": "2.0", "date": "2030-01-01"}


def fact(ms, kind="torch"):
    return {"kind": kind, "seconds": {"median": 1e-3 * ms}}


def row(name, flops, size, own, peer, **more):
    return {
        "workload": name, "title": f"{name} title", "shape": [2, 3], "least_flops": flops, "least_bytes": size,
        "gemm_peak": {"by": "torch.mm", "gflops_per_s": 100.0}, "copy_peak": {"gbytes_per_s": 10.0},
        "contenders": {
            "jactri": fact(own, "jactri"), "grad loop": fact(peer), "compile jacrev": fact(2 * peer, "compiled"),
            "forward pass": fact(own / 9, "reference"),
        },
        "ratios": {"best torch peer": {"peer": "grad loop", "by": "jactri", "median": peer / own}}, **more,
    }  # fmt: skip


COMPARED = {
    "machine": MACHINE,
    "results": [
        row("first", 10**9, 10**6, 12, 30),
        row("second", 10**9, 10**6, 12.1, 30),
        row("third", 10**6, 10**7, 3, 1),
    ],
}
SCALED = {
    "kind": "scaling", "machine": MACHINE, "base": BASE, "axes": SIZES,
    "results": [
        row("point", 10**6, 10**6, n + w + d, 3 * (n + w), batch=n, width=w, depth=d)
        for n, w, d in ((1, 8, 2), (3, 8, 2), (3, 4, 2))
    ],
}  # fmt: skip


@pytest.fixture
def reported(tmp_path, capsys):
    """Run benchmarks.report on files with this content: (exit status, folder of plots, stdout, stderr)."""

    def call(*contents):
        paths = []
        for k, content in enumerate(contents):
            paths.append(tmp_path / f"{k}.json")
            paths[-1].write_text(json.dumps(content))
        code = report.main([*map(str, paths), "--plots", str(tmp_path / "a" / "plots")])
        return code, tmp_path / "a" / "plots", *capsys.readouterr()

    return call


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_the_table_has_the_ways_to_call_jactri(reported):
    first = row("first", 10**9, 10**6, 12, 30)
    ways = {"out=": ("into out=", 10), "compile": ("compiled", 5), "aot": ("aot", 3)}
    for name, (how, ms) in ways.items():
        name = f"jactri {name}"
        first["contenders"][name] = fact(ms, "jactri")
        first["ratios"][f"best torch peer, {how}"] = {
            "peer": "grad loop",
            "by": name,
            "median": 30 / ms,
        }
    _, _, out, _ = reported({**COMPARED, "results": [first]})
    row_of = "| first title | 2 x 3 | 12 (o 10) | 5 | 3 | 30 (grad loop) | 2.5 | 6 | 10 |"
    assert row_of in out


def test_the_report_draws_both_plots(reported):
    code, folder, out, err = reported(COMPARED, SCALED)
    assert code == 0 and is_png(folder / "scaling.png") and is_png(folder / "roofline.png")
    assert err.count("wrote ") == 2
    assert "| first title | 2 x 3 | 12 | - | - | 30 (grad loop) | 2.5 | - | - |" in out
    assert "| batch 3 | 13 | 33 (grad loop) | 2.5 |" in out and "| width 4 |" in out


def test_several_files_of_a_kind_are_drawn_in_one_picture(reported):
    code, folder, _, _ = reported(COMPARED, SCALED, COMPARED, SCALED)
    assert code == 0 and is_png(folder / "scaling.png") and is_png(folder / "roofline.png")


def test_a_file_without_copy_bandwidth_is_reported_and_has_no_roofline(reported):
    old = {
        **COMPARED,
        "results": [{k: v for k, v in r.items() if k != "copy_peak"} for r in COMPARED["results"]],
    }
    code, folder, out, err = reported(old)
    assert code == 0 and "| third title |" in out and not list(folder.iterdir())
    assert "no copy bandwidth in it: a processor" in err and "no roofline.png" in err
    assert "no scaling.png" in err and "benchmarks.scaling" in err


def test_a_gpu_file_has_a_roof_for_each_precision():
    best = {"own_ms": 1.0, "peer": "grad loop", "peer_ms": 4.0}
    measured = {
        "kind": "gpu", "machine": {**MACHINE, "device": "a card"},
        "card": {"copy_bytes_per_s": 1e12, "ieee_flops_per_s": 5e13, "tf32_flops_per_s": 4e14},
        "results": [
            {"workload": "W1", "setting": s, "least_flops": 10**9, "least_bytes": 10**7, "best": best}
            for s in ("ieee", "tf32")
        ],
    }  # fmt: skip
    ieee, tf32 = plots.rooflines(measured)
    assert (ieee.flops, tf32.flops, ieee.copied) == (5e13, 4e14, 1e12)
    assert ieee.points == tf32.points == [("W1", 100.0, 1e12, 2.5e11)]
    assert "a card" in ieee.title and ieee.title.endswith("ieee")
    assert plots.rooflines({**measured, "card": {}}) == []


def test_lines_are_the_contenders_and_what_is_compiled_is_one_line():
    found = plots.lines(SCALED, "batch")
    assert found["jactri"] == [(1, pytest.approx(11)), (3, pytest.approx(13))]
    assert plots.COMPILE in found and "compile jacrev" not in found


def test_the_roofline_is_of_the_best_peer():
    (roof,) = plots.rooflines(COMPARED)
    assert (roof.flops, roof.copied, roof.by) == (1e11, 1e10, "torch.mm")
    name, intensity, own, peer = roof.points[0]
    assert (name, intensity) == ("first", 1000)
    assert own == pytest.approx(1e9 / 12e-3) and peer == pytest.approx(1e9 / 30e-3)


def test_labels_of_a_crowded_roofline_do_not_overlap():
    crowd = [(f"workload-{k}", 20 + 4 * k, 1e9 * (1 + k % 3), 5e8) for k in range(12)]
    twins = [("twin-b", 3.0, 1e9, None), ("twin-a", 3.0, 1.01e9, None)]
    figure = plots._pyplot().figure(figsize=(10, 6))
    try:
        ax = figure.add_subplot()
        roof = plots.Roofline("machine", 1e11, "torch.mm", 1e10, crowd + twins)
        plots._roof(ax, roof)
        plots._labels(ax, roof)
        figure.draw_without_rendering()
        shown = {t.get_text(): t for t in ax.texts}
        assert {"twin-a, twin-b", *(n for n, *_ in crowd)} <= set(shown)
        from matplotlib.text import Text

        boxes = [Text.get_window_extent(t) for t in shown.values()]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    finally:
        plots._pyplot().close(figure)


@pytest.mark.parametrize(
    "content, message",
    [(None, "No such file"), ("times", "not JSON"), ("[1]", "not a file of benchmarks")],
)
def test_files_that_cannot_be_reported_are_named(tmp_path, capsys, content, message):
    path = tmp_path / "given.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match="2"):
        report.main([str(path)])
    assert f"{path}: {message}" in capsys.readouterr().err


def test_a_file_is_no_folder_for_plots(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    with pytest.raises(SystemExit, match="2"):
        report.main(["--plots", str(tmp_path / "taken")])
    assert "not a folder" in capsys.readouterr().err


# ---- contenders and devices


def test_all_peers_of_the_list_are_there():
    (w,) = workloads.select(["W1-tanh"])
    found = {p.name for p in peers.peers_of(w)[0]}
    assert found >= {
        "jactri", "functional loop", "functional vectorize", "functional forward", "grad loop", "vmap(jacrev)",
        "vmap(jacfwd)",
    }  # fmt: skip
    by_hand = {p.name for w in workloads.ALL for p in peers.peers_of(w)[0] if p.kind == "expert"}
    assert by_hand >= {"hand-split", "hand-coloured", "grad loop channels_last", "2*x"}
    assert "grad loop" in {p.name for p in peers.peers_of(workloads.select(["dropin"])[0])[0]}


@pytest.mark.parametrize("name", [p.name for p in peers.TORCH_FULL])
def test_peers_in_the_drop_in_shape(name):
    from dataclasses import replace

    w = replace(scaling.workload(**BASE), full=True)
    (peer,) = (p for p in peers.TORCH_FULL if p.name == name)
    assert checks.error_of(w, peers.contender(w, peer)()) <= checks.TOLERANCE


def test_a_contender_returns_after_the_device_is_done():
    happened = []
    peer = peers.Peer("planted", "torch", lambda w, net: lambda x: happened.append("call") or x)
    w = scaling.workload(**BASE)
    call = peers.contender(w, peer, torch.device("cpu"), lambda: happened.append("wait"))
    assert torch.equal(call(), workloads.problem(w)[1])
    assert happened == ["call", "wait"]


def test_the_device_of_a_word(monkeypatch):
    monkeypatch.setattr(devices, "Cuda", lambda: "a card")
    for there, auto in ((True, "a card"), (False, None)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert isinstance(devices.chosen("cpu"), devices.Cpu)
        assert devices.chosen("auto") == auto or isinstance(devices.chosen("auto"), devices.Cpu)
    with pytest.raises(ValueError, match="no CUDA device"):
        devices.chosen("cuda")
    with pytest.raises(ValueError, match="choose auto, cpu or cuda"):
        devices.chosen("moon")


def test_jax_is_a_peer_only_where_it_computes(monkeypatch):
    w = scaling.workload(**{**BASE, "batch": 2 * peers.PIECE})

    def kinds():
        return [p.name for p in peers.peers_of(w)[0] if p.name.startswith("jax")]

    monkeypatch.setattr(peers_jax, "installed", lambda: False)
    assert not kinds()
    monkeypatch.setattr(peers_jax, "installed", lambda: True)
    assert kinds() == [p.name for p in (*peers.JAX, *peers.JAX_MAP)]

    def no_backend(_):
        raise RuntimeError("no such backend")

    monkeypatch.setattr(peers_jax, "_devices", no_backend)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    assert not peers_jax.available(torch.device("cuda"))


@pytest.mark.skipif(not peers_jax.installed(), reason="needs jax")
@pytest.mark.parametrize("peer", [*peers.JAX, *peers.JAX_MAP], ids=lambda p: p.name)
def test_jax_peers_are_right(peer):
    w = scaling.workload(**{**BASE, "batch": peers.PIECE + 3})
    assert checks.error_of(w, peers.contender(w, peer)()) <= checks.TOLERANCE


def run_pytest(*arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    # a worker's variables would switch benchmarks off
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    env["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run(
        command, cwd=machine.ROOT, env=env, capture_output=True, text=True, timeout=300
    )


def test_pytest_benchmarks(tmp_path):
    pytest.importorskip("pytest_benchmark")
    path = tmp_path / "out.json"
    done = run_pytest(
        "benchmarks", "--benchmark-only", "--no-compile", "--device", "cpu", "-k", "W1-batch1 and jactri",
        "--benchmark-min-rounds=1", "--benchmark-max-time=0.001", f"--benchmark-json={path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    measured = json.loads(path.read_text())
    assert "node" not in measured["machine_info"]
    infos = [b["extra_info"] for b in measured["benchmarks"]]
    assert len(infos) == 2  # jactri and out=
    for info in infos:
        assert info["device"] == "cpu" and info["error"] <= checks.TOLERANCE
        assert {
            "least_flops", "least_bytes", "share_of_gemm_peak", "share_of_roof", "copy_peak_gbytes_per_s",
            "extra_peak_bytes",
        } <= set(info)  # fmt: skip


def test_pytest_benchmarks_refuses_a_device_that_is_not_there():
    pytest.importorskip("pytest_benchmark")
    done = run_pytest("benchmarks", "--collect-only", "--device", "cuda")
    assert done.returncode == 4 and "no CUDA device" in done.stderr


@pytest.mark.parametrize(
    "order",
    [
        ("benchmarks", "tests/benchmarks/test_counts.py"),
        ("tests/benchmarks/test_counts.py", "benchmarks"),
    ],
)
def test_tests_and_benchmarks_share_the_device_option(order):
    pytest.importorskip("pytest_benchmark")
    done = run_pytest(*order, "--collect-only", "--device", "cpu", "--no-compile")
    assert (
        done.returncode == 0 and "bench_mlp.py" in done.stdout and "test_counts.py" in done.stdout
    )
