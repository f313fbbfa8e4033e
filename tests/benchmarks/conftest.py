"""What tests of the benchmarks' own code share."""

import functools

import pytest

import jactri


@pytest.fixture
def traced_only(monkeypatch):
    """`jactri.compile` traces, and hands nothing to a compiler: tests/compile does, and `test_bench` here."""
    compile = jactri.compile

    @functools.wraps(compile)
    def traced(*given, **options):
        return compile(*given, **{**options, "engine": "fx"})

    monkeypatch.setattr(jactri, "compile", traced)
