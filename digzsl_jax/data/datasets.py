"""The data sets, by name."""

import inspect
from collections.abc import Mapping

from digzsl_jax.data import fashion_mnist, scenes, splits

LOADERS = {"scenes": scenes.load, "fashion_mnist": fashion_mnist.load}


def load(settings: Mapping) -> splits.Dataset:
  """The data set `settings["name"]`, "scenes" or "fashion_mnist"; the other settings go to its `load`.

  Raises:
    ValueError: an unknown name or setting.
  """
  arguments = dict(settings)
  name = arguments.pop("name", None)
  if name not in LOADERS:
    raise ValueError(f'config.data.name is "{name}": choose one of {", ".join(LOADERS)}')
  known = inspect.signature(LOADERS[name]).parameters
  unknown = [key for key in arguments if key not in known]
  if unknown:
    raise ValueError(f'config.data: {name} has no setting "{unknown[0]}"; it has {", ".join(known)}')
  for field, least in (("train_per_class", 1), ("test_per_class", 1), ("seed", 0)):
    if arguments.get(field, least) < least:
      raise ValueError(f"config.data.{field} is {arguments[field]}; it must be at least {least}")
  try:
    return LOADERS[name](**arguments)
  except ValueError as error:
    raise ValueError(f"config.data: {error}") from error
