"""What filter.cpp needs: step.pt2, a learned time step with its Jacobian, and sightings.txt.

Usage: python export_step.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

import jactri
from jactri.examples import kalman


def write(folder: Path, steps: int = 6000, count: int = 300) -> tuple[kalman.Learned, Tensor]:
    """The learned step and the sightings (T, 2) that were written.

    Args:
        folder: where to write.
        steps: of the optimizer.
        count: time steps, T.
    """
    net = kalman.learn(steps)
    state = kalman.START.unsqueeze(0)
    jactri.export(net, state, path=folder / "step.pt2", per_sample=True, return_output=True)
    _, sightings = kalman.simulate(count)
    lines = [f"{right!r} {up!r}\n" for right, up in sightings.tolist()]
    (folder / "sightings.txt").write_text("".join(lines))
    return net, sightings


if __name__ == "__main__":
    torch.manual_seed(0)
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
