"""Class tokens: equal on every mesh and after a kill, and stopped as the settings say."""

import numpy as np

from digzsl_jax import checkpoint, logs
from digzsl_jax import main as command
from digzsl_jax.runs import class_tokens


def learn(config, folder):
  """Runs the first two stages; the tokens of both tasks."""
  config.stages = ("cdm", "tokens")
  command.dig_zsl(config.to_dict(), folder, logs.Log(folder), False)
  return {task: checkpoint.read_arrays(folder / "tokens" / file) for task, file in class_tokens.TOKENS.items()}


def same(a, b):
  return all(np.array_equal(a[task][name], b[task][name]) for task in a for name in a[task])


def test_tokens_are_equal_on_every_mesh(tiny_config, tmp_path):
  found = {}
  for devices in (1, 2, 4, 8):
    tiny_config.mesh.devices = devices
    found[devices] = learn(tiny_config, tmp_path / str(devices))
  assert [devices for devices in found if not same(found[1], found[devices])] == []
  assert not same(found[1], {task: {name: np.zeros_like(v) for name, v in tokens.items()}
                             for task, tokens in found[1].items()})
