"""Other people's libraries, as their users call them: ``pytest -m clients``, or ``pytest tests/clients``.

Each file says what to install. No weights are loaded: all models are tiny and random.
"""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_ignore_collect(config):
    """Other runs do not even import these libraries."""
    asked = any(
        HERE.samefile(p) or HERE in p.parents for p in map(_path, config.args) if p.exists()
    )
    return None if asked or "clients" in config.option.markexpr else True


def _path(argument: str) -> Path:
    return Path(argument.split("::")[0]).resolve()


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.clients)
