"""Falling back to autograd: logged once, an error on request, and never a hiding place for bugs."""

import logging
import threading

import pytest
import torch
from common import MODES, Cube, make, x3, x23
from torch import nn

import jactri


def test_a_fallback_is_logged_once_with_op_and_cost(caplog):
    class OwnOp(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return g * 2

    with caplog.at_level(logging.INFO, logger="jactri"):
        for _ in range(3):
            jactri.jacobian(OwnOp.apply, x3())
    records = [r for r in caplog.records if r.name == "jactri" and "OwnOp" in r.getMessage()]
    assert len(records) == 1
    assert records[0].levelno == logging.INFO
    assert any(c.isdigit() for c in records[0].getMessage().replace("OwnOp", ""))


def test_no_log_without_a_fallback(caplog):
    net = make(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    with caplog.at_level(logging.INFO, logger="jactri"):
        jactri.jacobian(net, x23())
    assert not [r for r in caplog.records if r.name == "jactri"]


@pytest.mark.parametrize("mode", MODES)
def test_fallback_as_an_error(mode):
    with jactri.fallback("error"):
        with pytest.raises(jactri.FallbackError, match="Cube"):
            jactri.jacobian(lambda x: Cube.apply(x.sin()), x3(), strategy=mode)
        with jactri.fallback("allow"):
            jactri.jacobian(Cube.apply, x3(), strategy=mode)
        with pytest.raises(jactri.FallbackError):
            jactri.jacobian(Cube.apply, x3(), strategy=mode)
        jactri.jacobian(torch.tanh, x3(), strategy=mode)
    assert issubclass(jactri.FallbackError, RuntimeError)
    jactri.jacobian(Cube.apply, x3(), strategy=mode)


def test_fallback_mode_is_left_after_an_exception():
    with pytest.raises(ZeroDivisionError), jactri.fallback("error"):
        raise ZeroDivisionError
    jactri.jacobian(Cube.apply, x3())


def test_a_bug_in_a_custom_backward_is_not_hidden():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            raise KeyError("broken backward")

    for mode in MODES:
        with pytest.raises(KeyError, match="broken backward"):
            jactri.jacobian(lambda x: Broken.apply(x).sin(), x3(), strategy=mode)


def test_fallback_mode_belongs_to_its_thread():
    errors = []

    def work():
        try:
            jactri.jacobian(Cube.apply, x3())
        except RuntimeError as error:
            errors.append(error)

    with jactri.fallback("error"):
        t = threading.Thread(target=work)
        t.start()
        t.join()
    assert not errors
