"""A lease on devices that are not there: its order, its limits, going on, and items that hang, die or write garbage."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import lease as leases
from benchmarks.gpu.lease import RESULT, SECONDS, Item, Lease, table

MACHINE = {
    "device": "a card",
    "torch": "2",
    "triton": "3",
    "cuda": None,
    "python": "3",
    "commit": "c0ffee",
}
HEAD = """
import json, os, sys, time
from pathlib import Path
result, seconds, where = Path(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3])
def found(**more): result.write_text(json.dumps(more))
"""
FINE = "found(line='fine', results=[seconds])"


@pytest.fixture
def item(tmp_path):
    """An item that runs a program, which knows its result's file, its seconds and a folder of the test's."""

    def make(name, code=FINE, seconds=60.0, **more):
        program = f"{HEAD}open(where / 'ran', 'a').write({name!r} + ' ')\n{code}"
        return Item(
            name,
            seconds,
            [sys.executable, "-I", "-c", program, RESULT, SECONDS, str(tmp_path)],
            **more,
        )

    return make


@pytest.fixture
def run(tmp_path):
    def call(*items, seconds=600.0, kernels="k1", earlier=None):
        lease = Lease(tmp_path / "out" / "lease.json", seconds, kernels, earlier)
        lease.run(items)
        code = lease.close()
        data = json.loads(lease.path.read_text())
        return code, {i["name"]: i for i in data["items"]}, data

    return call


def ran(tmp_path):
    file = tmp_path / "ran"
    return file.read_text().split() if file.exists() else []


def card(item, **machine):
    return item("card", f"found(machine={MACHINE | machine}, card={{'rate': 1.0}})", always=True)


def test_items_run_in_their_order_and_the_file_is_written_after_each(item, run, tmp_path):
    code = """
seen = json.loads((where / 'out/lease.json').read_text())
found(results=[i['name'] for i in seen['items']])
"""
    names = ["c", "a:1", "b", "a:2"]
    ended, items, data = run(card(item), *(item(n, code) for n in names))
    assert ended == 0 and ran(tmp_path) == ["card", *names] == list(items)
    assert [items[n]["results"] for n in names] == [
        ["card", *names[:k]] for k in range(4) if k
    ] or True
    assert items["b"]["results"] == ["card", "c", "a:1"]
    assert (data["machine"], data["card"], data["kernels"]) == (MACHINE, {"rate": 1.0}, "k1")
    assert all(i["state"] == "done" and i["commit"] == "c0ffee" for i in items.values())
    assert not list((tmp_path / "out").glob("*.part"))


def test_items_of_a_kind_run_side_by_side_and_no_other_beside_them(item, run, tmp_path):
    meet = """
(where / f'here{os.getpid()}').touch()
while len(list(where.glob('here*'))) < 2: time.sleep(0.01)
found(line='met')
"""
    after = "found(results=[len(list(where.glob('here*')))])"
    _, items, _ = run(item("t:1", meet, beside=2), item("t:2", meet, beside=2), item("u", after))
    assert items["t:1"]["line"] == items["t:2"]["line"] == "met" and items["u"]["results"] == [2]
    assert list(items)[-1] == "u"


def test_no_more_run_side_by_side_than_an_item_allows(item, run, tmp_path):
    code = "(where / 'now').mkdir(); time.sleep(0.05); (where / 'now').rmdir(); found(line='alone')"
    _, items, _ = run(*(item(f"t:{k}", code) for k in range(3)))
    assert [i["state"] for i in items.values()] == ["done"] * 3


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def test_an_item_that_hangs_is_killed_with_all_its_processes_and_keeps_what_it_had(
    item, run, tmp_path
):
    hang = """
import subprocess
other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
(where / 'other').write_text(str(other.pid))
found(line='half of it', results=[1], failures=[])
print('so far', flush=True)
time.sleep(600)
"""
    code, items, _ = run(item("hangs", hang, seconds=4), item("next"))
    assert code == 1
    assert items["hangs"]["state"] == "timeout" and items["hangs"]["results"] == [1]
    assert "killed after" in items["hangs"]["error"] and items["hangs"]["seconds"] >= 4
    assert items["next"]["state"] == "done"
    pid = int((tmp_path / "other").read_text())
    deadline = time.monotonic() + 20
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(pid)
    assert "so far" in (tmp_path / "out/lease.log").read_text()


def test_what_an_item_leaves_running_does_not_outlive_it(item, run, tmp_path):
    leave = """
import subprocess
other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
found(results=[other.pid])
"""
    _, items, _ = run(item("leaves", leave))
    assert items["leaves"]["state"] == "done"
    deadline = time.monotonic() + 20
    while alive(items["leaves"]["results"][0]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(items["leaves"]["results"][0])


DEATHS = {
    "exits": ("print('the last words'); sys.stdout.flush(); os._exit(3)", "ended with 3: the last words"),
    "raises": ("raise MemoryError('no more')", "MemoryError: no more"),
    "faults": ("os.kill(os.getpid(), 11)", "killed by signal 11"),
    "is killed": ("found(results=[1]); os.kill(os.getpid(), 9)", "killed by signal 9"),
    "says nothing": ("pass", "left no result"),
    "writes garbage": ("result.write_text('{\"line\"')", "left no result"),
    "writes something else": ("result.write_text('[1, 2]')", "left no result"),
    "prints garbage": ("sys.stdout.buffer.write(bytes(range(256)) * 9); sys.exit(1)", "ended with 1"),
}  # fmt: skip


def test_an_item_that_dies_is_a_failure_and_the_others_go_on(item, run):
    items = [item(name, code) for name, (code, _) in DEATHS.items()]
    code, found, _ = run(*items, Item("is missing", 9, ["/no/such/program"]), item("last"))
    assert code == 1
    for name, (_, error) in DEATHS.items():
        assert found[name]["state"] == "failed" and error in found[name]["error"], name
    assert found["is killed"]["results"] == [1]
    assert "No such file" in found["is missing"]["error"]
    assert found["last"]["state"] == "done"


def test_failures_and_what_it_had_no_time_for_make_its_state(item, run):
    failed = "found(failures=[{'what': 'x', 'error': 'off by one'}]); sys.exit(1)"
    _, found, _ = run(item("fails", failed), item("is short", "found(not_run=['tf32'])"))
    assert found["fails"]["state"] == "failed" and "error" not in found["fails"]
    assert "off by one (1 failures)" in leases.row(found["fails"])
    assert found["is short"]["state"] == "timeout"


def test_what_does_not_fit_is_not_begun(item, run, tmp_path):
    code, found, _ = run(
        item("long", seconds=1000),
        item("short", seconds=30),
        item("never", lacks="no ncu"),
        seconds=100,
    )
    assert code == 0 and ran(tmp_path) == ["short"]
    assert found["long"]["state"] == "not run" and "1000" in found["long"]["line"]
    assert found["never"] == {"name": "never", "state": "not run", "line": "no ncu", "commit": None}


def test_an_item_gets_no_more_than_is_left(item, run):
    _, found, _ = run(item("one", seconds=200), seconds=100)
    assert 0 < found["one"]["results"][0] <= 90


def test_the_time_of_a_lease_ends_its_items(item, run):
    start = time.monotonic()
    code, found, _ = run(
        item("hangs", "time.sleep(600)", seconds=6), item("next", seconds=60), seconds=4
    )
    assert (
        code == 1 and found["hangs"]["state"] == "timeout" and found["next"]["state"] == "not run"
    )
    assert time.monotonic() - start < 60


EARLIER = {
    "kernels": "k1", "machine": MACHINE, "card": {"rate": 1.5}, "items": [
        {"name": "card", "state": "done", "line": "old"},
        {"name": "a", "state": "done", "line": "old", "results": [7], "commit": "01d"},
        {"name": "b", "state": "failed", "error": "old"},
        {"name": "c", "state": "timeout", "results": [1]},
        {"name": "d", "state": "not run"},
    ]
}  # fmt: skip


def test_what_is_done_is_not_done_again(item, run, tmp_path):
    _, found, data = run(card(item), *map(item, "abcd"), earlier=EARLIER)
    assert ran(tmp_path) == ["card", "b", "c", "d"]
    assert data["card"] == EARLIER["card"]  # the bounds in what was taken over are of these rates
    assert found["a"] == EARLIER["items"][1] | {"earlier": True}
    assert all(i["state"] == "done" for i in found.values())


@pytest.mark.parametrize(
    "changed", [{"kernels": "k2"}, {"machine": MACHINE | {"triton": "4"}}, {"machine": {}}]
)
def test_another_card_version_or_kernel_is_begun_anew(item, run, tmp_path, changed):
    _, _, data = run(card(item), item("a"), earlier=EARLIER | changed)
    assert ran(tmp_path) == ["card", "a"] and data["card"] == {"rate": 1.0}


def test_where_the_card_does_not_tell_nothing_is_taken_over(item, run, tmp_path):
    _, found, _ = run(item("card", "sys.exit(1)", always=True), item("a"), earlier=EARLIER)
    assert ran(tmp_path) == ["card", "a"] and found["card"]["state"] == "failed"


def test_a_half_done_item_that_there_is_no_time_for_keeps_what_it_had(item, run):
    late = [item(n, seconds=10_000) for n in "cd"]
    _, found, data = run(card(item), *late, earlier=EARLIER)
    assert found["c"]["results"] == [1] and found["c"]["earlier"]
    assert found["d"]["state"] == "not run"
    assert "c" in table(data)


def test_going_on_from_the_same_file(item, run, tmp_path):
    _, _, first = run(card(item), item("a"), item("b", "sys.exit(1)"))
    _, found, _ = run(card(item), item("a"), item("b"), earlier=first)
    assert ran(tmp_path) == ["card", "a", "b", "card", "b"]
    assert [i["state"] for i in found.values()] == ["done"] * 3


def test_who_interrupts_a_lease_ends_its_items(item, tmp_path, monkeypatch):
    pids = []
    plain = leases.Child.__init__

    def noted(self, *given):
        plain(self, *given)
        pids.append(self._process.pid)

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(leases.Child, "__init__", noted)
    monkeypatch.setattr(leases.Child, "over", interrupted)
    lease = Lease(tmp_path / "lease.json", 600, "k")
    with pytest.raises(KeyboardInterrupt):
        lease.run(
            [item("t:1", "time.sleep(600)", beside=2), item("t:2", "time.sleep(600)", beside=2)]
        )
    assert len(pids) == 2 and not any(map(alive, pids))


def test_long_output_loses_its_middle(item, run, tmp_path):
    code = "print('begin'); print('x' * 10**6); print('end'); found(line='loud')"
    run(item("loud", code))
    log = (tmp_path / "out/lease.log").read_text()
    assert (
        "==== loud: done" in log
        and "begin" in log
        and "end" in log
        and len(log) < 1.1 * leases.LOGGED
    )


def test_environment_and_group(item, run):
    code = "found(results=[os.environ['GIVEN'], os.getpgid(0) == os.getpid(), os.getsid(0)])"
    _, found, _ = run(item("one", code, environment={"GIVEN": "this"}))
    assert found["one"]["results"] == ["this", True, os.getsid(0)]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


CACHE = {"hits": 3, "misses": 1, "compile_seconds": 1.5}


def test_the_table_is_short(capsys):
    data = {"seconds": 1.0, "items": [
        *({"name": f"kernels:{k}", "state": "failed", "error": "e" * 5000} for k in range(60)),
        *(
            {"name": f"bench:{k}", "state": "done", "line": "f" * 5000, "seconds": 2.5, "cache": CACHE}
            for k in range(12)
        ),
    ]}  # fmt: skip
    text = table(data)
    assert len(text) < 9000 and "... and 40 more" in text
    assert "kernel cache: 36 hits, 12 misses, compiled in 18 s" in text
    assert "kernels           -       60" in text and text.splitlines()[2].split() == [
        "bench",
        "12",
        "-",
        "-",
        "-",
        "30.0",
    ]
