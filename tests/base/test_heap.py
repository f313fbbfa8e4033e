"""Memory that was freed is given back where a process grows by more than is alive at one time."""

import sys

import pytest
import torch

from jactri._src.base import heap
from jactri._src.base.memory import Budget

CPU = torch.device("cpu")


@pytest.fixture
def system(monkeypatch):
    """A process that holds ``held`` bytes, of which ``alive`` are not given back."""

    class System:
        held, alive, trims = 100, 0, 0

        def trim(self, _):
            self.trims, self.held = self.trims + 1, 100 + self.alive
            return 1

    made = System()
    monkeypatch.setattr(heap, "resident", lambda: made.held)
    monkeypatch.setattr(heap, "_trim", lambda: made.trim)
    monkeypatch.setattr(heap, "SMALL", 10)
    return made


def test_what_is_too_much_is_given_back(system):
    look = heap.Heap.of(CPU, 40)
    system.held = 149
    look()
    assert system.trims == 0
    system.held = 151
    look()
    assert (system.trims, system.held) == (1, 100)
    system.held = 151
    look()
    assert system.trims == 2


def test_what_is_in_use_is_not_looked_for_at_every_turn(system):
    look = heap.Heap.of(CPU, 40)
    system.held, system.alive = 180, 80
    look()
    look()
    assert system.trims == 1
    system.held = 201
    look()
    assert system.trims == 2


def test_steps_look_now_and_then(system):
    look = heap.Heap.of(CPU, 40)
    system.held = 151
    look.writes(20)
    assert system.trims == 0
    look.writes(1)
    assert system.trims == 1


def test_nobody_looks_where_there_is_little_or_another_allocator(system, monkeypatch):
    assert heap.Heap.of(CPU, 9) is None
    assert heap.Heap.of(torch.device("meta"), 40) is None
    monkeypatch.setattr(heap, "_trim", lambda: None)
    assert heap.Heap.of(CPU, 40) is None


def test_a_budget_looks_from_its_limit_on(system):
    budget = Budget(80, CPU).less(10)
    system.held = 151
    budget.tidy()
    assert system.trims == 1
    system.held = 151
    Budget(None, CPU).tidy()
    assert system.trims == 1


@pytest.mark.skipif(
    sys.platform != "linux" or heap._trim() is None, reason="of glibc on Linux alone"
)
def test_pieces_between_what_is_alive():
    size = 2 << 20
    torch.ones(16 << 20, dtype=torch.uint8)  # from now on blocks lie in the heap
    heap._trim()(0)  # which is to grow for them
    look = heap.Heap.of(CPU, 4 * size)
    blocks = [torch.ones(size, dtype=torch.uint8) for _ in range(16)]
    there = heap.resident()
    del blocks[::2]
    look()
    assert heap.resident() < there - 7 * size
