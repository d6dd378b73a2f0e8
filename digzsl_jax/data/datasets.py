"""The data sets, by name."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from digzsl_jax.data import fashion_mnist, feature_files, photographs, scenes, splits

T = TypeVar("T")
LOADERS = {"scenes": scenes.load, "fashion_mnist": fashion_mnist.load,
           **{name.lower(): functools.partial(photographs.benchmark, name) for name in photographs.BENCHMARKS},
           "folder": photographs.own, "features": feature_files.load}


def load(settings: Mapping) -> splits.Dataset:
  """The data set `settings["name"]`, a key of `LOADERS`; the other settings go to its loader.

  Raises:
    ValueError: an unknown name or setting.
  """
  return call(LOADERS, settings, counts=("train_per_class", "test_per_class", "seed"))


def call(loaders: Mapping[str, Callable[..., T]], settings: Mapping, counts: Iterable[str] = ()) -> T:
  """What `loaders[settings["name"]]` makes of the other settings.

  Args:
    loaders: by name.
    settings: section `data` of a config.
    counts: settings that are at least 1, or 0 where that is their default.

  Raises:
    ValueError: an unknown name or setting, one that is missing, or whatever the loader refuses.
  """
  arguments = dict(settings)
  name = arguments.pop("name", None)
  if name not in loaders:
    raise ValueError(f'config.data.name is "{name}": choose one of {", ".join(loaders)}')
  known = inspect.signature(loaders[name]).parameters
  unknown = [key for key in arguments if key not in known]
  if unknown:
    raise ValueError(f'config.data: {name} has no setting "{unknown[0]}"; it has {", ".join(known)}')
  needed = [key for key, setting in known.items() if setting.default is setting.empty and key not in arguments]
  if needed:
    raise ValueError(f'config.data: {name} needs the setting "{needed[0]}"')
  for field in arguments.keys() & set(counts):
    least = min(known[field].default, 1)  # where 0 means all, it is the default
    if arguments[field] < least:
      raise ValueError(f"config.data.{field} is {arguments[field]}; it must be at least {least}")
  try:
    return loaders[name](**arguments)
  except ValueError as error:
    raise ValueError(f"config.data: {error}") from error
