"""Finding a client, and a Jacobian beside some of its rows by `torch.autograd.grad`."""

import importlib
import warnings

import pytest
import torch
from tolerances import assert_close

import jactri

MODES = ("auto", "forward-mode", "reverse-mode")


def client(name, install):
    """A module; where it cannot be had, the file is skipped with the reason and what to install."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except (
        ImportError,
        RuntimeError,
    ) as error:  # one that was made for another torch raises the latter
        pytest.skip(f"{error}; {install}", allow_module_level=True)


def assert_rows(func, x, *, inner=None, factor=1.0, most=12):
    """In every strategy and per sample. ``inner``: a dtype inside of func that bounds what can be had.

    Returns the plan of the samples.
    """
    leaf = x.clone().requires_grad_()
    y = func(leaf)
    at = torch.randperm(y.numel(), generator=torch.Generator().manual_seed(0))[:most]
    truth = torch.stack(
        [torch.autograd.grad(y.reshape(-1)[k], leaf, retain_graph=True)[0] for k in at.tolist()]
    )
    narrow = max(x.dtype, inner or x.dtype, key=lambda d: torch.finfo(d).eps)
    options = {"dtype": narrow, "length": x.numel(), "factor": factor}
    for mode in MODES:
        J = jactri.jacobian(func, x, strategy=mode)
        assert_close(J.reshape(-1, *x.shape)[at], truth, what=mode, **options)
    t = torch.randn(2, *x.shape, dtype=x.dtype)
    along = jactri.jvp(func, x, t, differentiate=None)[1].flatten(1)[:, at]
    assert_close(
        along, torch.tensordot(t.flatten(1), truth.flatten(1).t(), 1), what="jvp", **options
    )
    J = jactri.jacobian(func, x, per_sample=True)
    whole = torch.zeros(*y.shape, *x.shape, dtype=x.dtype)
    for n in range(len(x)):
        whole[n].reshape(-1, *x.shape)[:, n] = J[n].reshape(-1, *x.shape[1:])
    assert_close(whole.reshape(-1, *x.shape)[at], truth, what="per_sample", **options)
    return jactri.explain(func, x, per_sample=True)
