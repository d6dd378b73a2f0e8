"""The data sets, by name."""

import functools
import inspect
from collections.abc import Mapping

from digzsl_jax.data import fashion_mnist, feature_files, photographs, scenes, splits

LOADERS = {"scenes": scenes.load, "fashion_mnist": fashion_mnist.load,
           **{name.lower(): functools.partial(photographs.benchmark, name) for name in photographs.BENCHMARKS},
           "folder": photographs.own, "features": feature_files.load}


def load(settings: Mapping) -> splits.Dataset:
  """The data set `settings["name"]`, a key of `LOADERS`; the other settings go to its loader.

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
  needed = [key for key, setting in known.items() if setting.default is setting.empty and key not in arguments]
  if needed:
    raise ValueError(f'config.data: {name} needs the setting "{needed[0]}"')
  for field in arguments.keys() & {"train_per_class", "test_per_class", "seed"}:
    least = min(known[field].default, 1)  # where 0 means all, it is the default
    if arguments[field] < least:
      raise ValueError(f"config.data.{field} is {arguments[field]}; it must be at least {least}")
  try:
    return LOADERS[name](**arguments)
  except ValueError as error:
    raise ValueError(f"config.data: {error}") from error
