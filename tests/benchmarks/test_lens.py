"""`benchmarks.lens` at small sizes: all contenders are right, counted and compared; a wrong one is told. No times."""

import json

import pytest
import torch

from benchmarks import checks, lens

SMALL = [
    "--layers",
    "3",
    "--width",
    "24",
    "--heads",
    "2",
    "--tokens",
    "7",
    "--threads",
    "1",
    "--rounds",
    "1",
]
SMALL += ["--budget", "0.01", "--batch", "1", "3"]  # fmt: skip


def test_contenders_are_checked_timed_and_compared(tmp_path, capsys):
    path = tmp_path / "lens.json"
    assert lens.main([*SMALL, "--rows", "6", "--no-memory", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    ours, *others = found["results"]
    assert ours["contender"] == lens.OURS and len(others) == 2
    assert all(
        r["error"] <= checks.TOLERANCE and r["seconds"]["count"] == 1 for r in (ours, *others)
    )
    assert found["summary"]["against"].keys() == {r["contender"] for r in others}
    # a product for a row and layer: d (3d + d + 4d + 4d) and what attention does, in each of two blocks
    assert ours["flops"] > 6 * 7 * 2 * 2 * 12 * 24 * 24
    repeated = [r["flops"] for r in others]
    assert repeated[0] > repeated[1]  # three copies run forward thrice, and backward as often
    assert "times as fast as reference, 3 copies" in capsys.readouterr().out


def test_a_part_of_the_rows_is_that_of_the_whole_lens():
    sizes = lens.Sizes(2, 12, 2, 5, 9)
    model, prompt = lens.problem(sizes)
    whole = lens.ours(model, prompt, torch.arange(12))
    torch.testing.assert_close(lens.ours(model, prompt, torch.tensor([0, 1, 2])), whole[:, :3])
    for batch in (1, 5, 12):  # the last of five has two rows
        torch.testing.assert_close(lens.reference(model, prompt, torch.arange(12), batch), whole)
    assert not any(block._forward_hooks for block in model.h)


def test_a_wrong_answer_is_told(monkeypatch, capsys):
    right = lens.ours
    monkeypatch.setattr(lens, "ours", lambda *a, **k: 1.001 * right(*a, **k))
    assert lens.main([*SMALL, "--rows", "3", "--no-memory", "--no-times"]) == 1
    assert "FAILED jactri" in capsys.readouterr().out


def test_the_peak_of_a_fresh_process(capsys):
    assert lens.main([*SMALL, "--rows", "3", "--alone", lens.OURS]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["shape"] == [3, 3, 24]
    assert found["peak_bytes"] is None or found["peak_bytes"] >= 0


@pytest.mark.parametrize("option", ["--rows", "--batch", "--layers"])
def test_numbers_are_positive(option, capsys):
    with pytest.raises(SystemExit):
        lens.main([option, "0"])
    assert f"{option}: '0' is not a whole number above 0" in capsys.readouterr().err
