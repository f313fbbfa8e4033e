"""SciPy's sparse arrays, which are imported where they are asked for, and NumPy's view of tensors."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
from torch import Tensor


def scipy_sparse(call: str) -> ModuleType:
    """``scipy.sparse``, for a call of this name. Raises ModuleNotFoundError."""
    try:
        import scipy.sparse
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "scipy":
            raise
        raise ModuleNotFoundError(
            f"{call} needs SciPy, which is not installed: pip install scipy", name="scipy"
        ) from None
    return scipy.sparse


def as_numpy(t: Tensor) -> np.ndarray:
    """The same memory where it is on the CPU and NumPy has the dtype; half precision becomes float32."""
    t = t.detach()
    if t.dtype in (torch.float16, torch.bfloat16):
        t = t.float()
    return t.resolve_conj().resolve_neg().cpu().numpy()
