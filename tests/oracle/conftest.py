"""Parity tests draw the same weights in whatever order they run."""

import pytest


@pytest.fixture(autouse=True)
def seeded():
  pytest.importorskip("torch").manual_seed(0)
