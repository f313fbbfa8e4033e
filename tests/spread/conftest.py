"""The processes of a session."""

import pytest
import torch

if not torch.distributed.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def ranks():
    from ranks import Ranks

    made = Ranks()
    yield made
    made.close()
