"""A plan run into the blocks of an answer, all of them or parts."""

from __future__ import annotations

from ..plan.patches import window
from ..plan.planning import Ends
from ..prologue.arguments import Options
from ..run.answers import Answer
from ..run.entries import Entries
from ..run.executor import run


def run_piece(graph, plan, ends: Ends | None, ys, xs, asked: Options, dests, watch):
    """Run a plan for all outputs and inputs, or for the part of them that ``graph`` computes."""
    per_sample, forward = asked.per_sample, asked.strategy == "forward-mode"
    answers: dict[tuple[int, int], Answer] = {}
    for sweep in plan.sweeps:
        for k, target in enumerate(sweep.targets):
            if target is None:
                continue
            j, i = (sweep.index, k) if plan.reverse else (k, sweep.index)
            y, x, dest = ys[j], xs[i], dests[j][i] if dests else None
            out, into = y.shape, x.shape
            if ends is not None:
                out, into = ends.shapes(j, i, y, x)
                dest = ends.of(dest, j, i, y.dim(), per_sample)
            given = (
                sweep, sweep.layouts[target], out, into, per_sample, y if forward else x, dest,
            )  # fmt: skip
            pattern = sweep.patterns.get(target)
            if pattern is None:
                answers[j, i] = Answer(*given)
            else:
                patch = window(sweep, target)
                size = asked.block(j, i)
                answers[j, i] = Entries(
                    *given, pattern=pattern, form=asked.form, patch=patch, size=size
                )
    run(graph, plan, answers, watch)
    return answers
