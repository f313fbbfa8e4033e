"""Axes that ops without a rule are known to leave unmixed: autograd computes them, and still keeps samples apart."""

from __future__ import annotations

MATRIX_OPS = """
CholeskyInverse CholeskySolve LinalgCholeskyEx LinalgDet LinalgEig LinalgEigh LinalgInvEx LinalgLstsq LinalgLu
LinalgLuFactorEx LinalgLuSolve LinalgMatrixExp LinalgPinv LinalgQr LinalgSlogdet LinalgSolveEx LinalgSolveTriangular
LinalgSvd LuUnpack TriangularSolve CdistBackward EuclideanDist Cdist
""".split()
"""Ops on the last two axes of each operand, batched over the axes before."""

_NAMES = {f"{op}Backward0" for op in MATRIX_OPS}


def kept_by(op: str, in_shape, out_shape) -> tuple[tuple[int, int], ...]:
    """The (input axis, output axis) pairs that the autograd node ``op`` passes through unmixed."""
    if op not in _NAMES:
        return ()
    batch = min(len(in_shape) - 2, len(out_shape))
    # batches are aligned from the left only where both have all of them
    if tuple(in_shape[:batch]) != tuple(out_shape[:batch]):
        return ()
    return tuple((a, a) for a in range(batch))
