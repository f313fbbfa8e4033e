"""The report of what ``python -m benchmarks.gpu`` left, on files that are made here."""

import json

from test_gpu_command import CARD

from benchmarks import plots, report


def test_the_report_takes_all_files_by_default(capsys, tmp_path):
    assert report.main(["--plot", str(tmp_path / "all.png")]) == 0
    assert '| workload | answer | jactri | `compile` | `"aot"` |' in capsys.readouterr().out
    assert (tmp_path / "all.png").exists()


MACHINE = {
    "device": "A Card", "torch": "2.1", "triton": "3.1", "date": "2030-01-02", "commit": "c0ffee0123456",
    "uncommitted_changes": False,
}  # fmt: skip


def row(setting, best, **contenders):
    return {
        "workload": "W1", "title": "a network", "shape": [2, 3], "setting": setting, "least_ms": 1.0, "least_flops": 10,
        "least_bytes": 5, "contenders": contenders, "best": best,
    }  # fmt: skip


def best(own, peer, ms):
    return {"own_ms": own, "peer": peer, "peer_ms": ms, "ratio": ms / own, "share": 1 / own}


def ms(value, kind="jactri", **more):
    return {"kind": kind, "ms": {"median": value}, **more}


def leased():
    own = {
        "jactri auto": ms(2.0, kernel_ms=1.25, graph={"median": 1.5}), "jactri compile": ms(1.75),
        "vmap(jacrev)": ms(8.0, "torch"),
    }  # fmt: skip
    slow = {"jactri auto": ms(2.0, graph={"failed": "no"}), "vmap(jacrev)": ms(6.0, "torch")}
    made = {"jactri auto": ms(2.5), "compile vmap(jacrev)": ms(5.0, "compiled")}
    counts = {"passed": 5, "failed": 0, "skipped": 1}
    items = [
        {"name": "card", "state": "done"},
        {"name": "smoke:chain", "state": "done", "results": [counts]},
        {"name": "smoke:conv", "state": "failed", "results": [{"passed": 1, "failed": 2, "skipped": 0}]},
        {"name": "accuracy:W1", "state": "done", "results": []},
        {"name": "accuracy:W2", "state": "timeout", "results": []},
        {"name": "capture:W1", "state": "done", "results": [{"call": "auto", "captured": True, "how": ""}]},
        {"name": "bench:W1", "state": "done", "results": [
            row("ieee", best(2.0, "vmap(jacrev)", 8.0), **own), row("tf32", best(2.0, "vmap(jacrev)", 6.0), **slow)
        ]},
        {"name": "suite:1of2", "state": "not run", "line": "no time"},
        {"name": "compiled:W1", "state": "done", "results": [
            row("ieee", best(2.5, "compile vmap(jacrev)", 5.0), **made)
        ]},
    ]  # fmt: skip
    items = [{"commit": "c0ffee0123456", "line": "", "seconds": 1.0} | i for i in items]
    return {
        "kind": "gpu",
        "kernels": "k",
        "seconds": 9.0,
        "machine": MACHINE,
        "card": CARD,
        "items": items,
    }


def test_the_section_of_a_card_comes_from_its_file(tmp_path, capsys):
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(leased()))
    assert report.main(["--gpu", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "GPU: A Card, torch 2.1, triton 3.1, 2030-01-02, commit c0ffee012, kernels k. It copies 3 TB/s"
    )
    assert "ieee 50, tf32 400, bf16 800" in lines[0]
    # the ratio is the smaller of two, each of what was timed side by side
    assert (
        "| a network | 2 x 3 | ieee | 1 | 1.25 (80%) | 2 | 1.75 | 1.5 | 5 (compile vmap(jacrev)) | 2 |"
        in lines
    )
    assert "| a network | 2 x 3 | tf32 | 1 | - | 2 | - | - | 6 (vmap(jacrev)) | 3 |" in lines
    assert lines[-8:] == [
        "",
        "- a peer under torch.compile was run in 1 of the 2 rows",
        "- a few tests of each kernel: 6 passed, 2 failed",
        "- as accurate as torch.func at full size: W1",
        "- the plain call runs as a CUDA graph: 1 of 1 workloads",
        "- failed: smoke:conv",
        "- cut off: accuracy:W2",
        "- not run: suite:1of2",
    ]


def test_a_section_names_all_commits_and_uncommitted_changes():
    data = leased()
    data["items"][-1]["commit"] = "beef" * 10
    data["machine"] = MACHINE | {"uncommitted_changes": True}
    assert "commit c0ffee012 and beefbeefb with changes," in report.table(data)


def test_a_lease_that_found_nothing_has_a_section():
    data = leased() | {"items": []}
    assert "in 0 of the 0 rows" in report.table(data) and "commit unknown," in report.table(data)


def test_a_lease_has_a_roof_for_each_precision(tmp_path):
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(leased()))
    ieee, tf32 = plots.rooflines(report.load(file))
    assert (ieee.flops, tf32.flops, ieee.copied) == (50e12, 400e12, 3e12)
    assert ieee.points[0][2:] == (1e3 * 10 / 2.5, 1e3 * 10 / 5)
