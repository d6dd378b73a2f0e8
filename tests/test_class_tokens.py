"""Class tokens: equal on every mesh."""

import numpy as np
import pytest

from digzsl_jax import checkpoint, logs
from digzsl_jax import main as command
from digzsl_jax.runs import class_tokens


def learn(config, folder):
  """Runs the first two stages; the tokens of both tasks."""
  config.stages = ("cdm", "tokens")
  command.dig_zsl(config.to_dict(), folder, logs.Log(folder), False)
  return {(task, name): vector for task, file in class_tokens.TOKENS.items()
          for name, vector in checkpoint.read_arrays(folder / "tokens" / file).items()}


@pytest.mark.slow
def test_tokens_on_meshes(tiny_config, tmp_path):
  found = {}
  for devices in (1, 2, 8):
    tiny_config.mesh.devices = devices
    found[devices] = learn(tiny_config, tmp_path / str(devices))
  assert len(found[2]) == 24 and all(np.abs(vector).max() > 0 for vector in found[2].values())
  for key, vector in found[2].items():
    np.testing.assert_array_equal(vector, found[8][key])
    # Open: XLA compiles a mesh of one without partitioning and rounds otherwise; this must become equality too.
    np.testing.assert_allclose(vector, found[1][key], rtol=0, atol=1e-5)
