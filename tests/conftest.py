"""One thread, seeded generators, and property tests that are the same on every run."""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile("repeatable", deadline=None, max_examples=25, derandomize=True, database=None)
settings.load_profile("repeatable")


@pytest.fixture
def generator():
    """Random numbers of this test's own; no test depends on the global seed."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def _seeded():
    """Initial weights come from the global generator."""
    torch.manual_seed(0)
