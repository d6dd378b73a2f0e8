"""Finds, reads, strictly loads and writes Hugging Face model folders, without PyTorch.

A model's attribute paths are the checkpoint's parameter names, so loading is a walk. Only the last
word of a Flax layer's parameter (`kernel`, `scale`, `embedding`) and the axes of its kernel differ.
A model class says what else is historical with two optional functions:

  canonical_name(checkpoint key) -> attribute path, or None for a buffer that is no parameter
  reference_name(attribute path) -> checkpoint key to write
"""

import json
import os
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from digzsl_jax.files import write_atomic, write_json

_STEMS = ("model", "diffusion_pytorch_model")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_FLAX_LAYERS = (nnx.Linear, nnx.Conv, nnx.Embed, nnx.LayerNorm, nnx.GroupNorm, nnx.BatchNorm)
_TORCH_LEAF = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias",
               "mean": "running_mean", "var": "running_var"}


class CheckpointError(ValueError):
  """A model folder is absent, damaged, or does not fit the model."""


def read_json(path: os.PathLike) -> dict:
  """A JSON object from a file; a CheckpointError names the file if it is absent or damaged."""
  path = pathlib.Path(path)
  if not path.parent.is_dir():
    raise CheckpointError(f"no folder {path.parent} (looked for {path.name} in it): download it first")
  if not path.is_file():
    raise CheckpointError(f"no {path.name} in {path.parent}: the whole Hugging Face folder is needed")
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise CheckpointError(f"{path} is not valid JSON ({error}): download it again") from error
  if not isinstance(content, dict):
    raise CheckpointError(f"{path} holds a {type(content).__name__}, not a JSON object: download it again")
  return content


def _shards(index: pathlib.Path) -> list[pathlib.Path]:
  weight_map = read_json(index).get("weight_map")
  if not isinstance(weight_map, dict):
    raise CheckpointError(f"{index} has no weight_map: download it again")
  files = [index.parent / name for name in sorted(set(weight_map.values()))]
  absent = [file.name for file in files if not file.is_file()]
  if absent:
    raise CheckpointError(f"{index} names files that are not beside it: {', '.join(absent)}; download them")
  return files


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
  if not folder.is_dir():
    raise CheckpointError(f"no folder {folder} (looked for model weights in it): download it first")
  for variant in ("", ".fp16"):  # half precision only where full precision is absent
    for stem in _STEMS:
      single = folder / f"{stem}{variant}.safetensors"
      if single.is_file():
        return [single]
      index = folder / f"{stem}.safetensors.index{variant}.json"
      if index.is_file():
        return _shards(index)
  pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
  if pickles:
    raise CheckpointError(f"{folder} holds only pickled weights ({', '.join(pickles)}), which can run any "
                          "code and are never read: get the repository's safetensors, or convert them with "
                          "PyTorch's save_pretrained")
  raise CheckpointError(f"no weights in {folder}: looked for {' or '.join(_STEMS)} as .safetensors, "
                        ".safetensors.index.json or .fp16.safetensors")


def read_tensors(folder: os.PathLike) -> dict[str, np.ndarray]:
  """All tensors of a model folder under the names in its file, in their stored type.

  Raises:
    CheckpointError: no such folder, no safetensors in it, or a damaged file.
  """
  tensors = {}
  for file in _weight_files(pathlib.Path(folder)):
    try:
      stored = safetensors.numpy.load_file(file)
    except safetensors.SafetensorError as error:
      raise CheckpointError(f"{file} ({file.stat().st_size} bytes) is truncated or no safetensors file "
                            f"({error}): download it again; a Git LFS pointer needs git lfs pull") from error
    twice = sorted(tensors.keys() & stored.keys())
    if twice:
      raise CheckpointError(f"{file} repeats tensors of another shard: {', '.join(twice)}")
    tensors.update(stored)
  return tensors


def _variables(model: nnx.Module) -> dict[str, tuple[tuple, nnx.Variable, bool]]:
  """`{checkpoint-style name: (path, variable, whether its axes are a Flax kernel's)}`."""
  owners = dict(nnx.iter_modules(model))
  variables = {}
  for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))):
    is_flax = isinstance(owners.get(path[:-1]), _FLAX_LAYERS)
    leaf = _TORCH_LEAF[path[-1]] if is_flax else path[-1]
    name = ".".join(map(str, (*path[:-1], leaf)))
    variables[name] = path, variable, is_flax and path[-1] == "kernel"
  return variables


def _to_flax(kernel: np.ndarray) -> np.ndarray:
  return np.moveaxis(kernel, (0, 1), (-1, -2))  # [out, in, *space] -> [*space, in, out]


def _to_torch(kernel: np.ndarray) -> np.ndarray:
  return np.moveaxis(kernel, (-1, -2), (0, 1))


def fill(model: nnx.Module, tensors: Mapping[str, np.ndarray], *, source: object,
         param_dtype=jnp.float32) -> nnx.Module:
  """Puts checkpoint tensors into a (possibly abstract) model, in place: each is used, each fits.

  Args:
    model: from a constructor or `abstract`.
    tensors: checkpoint keys to tensors of any floating type.
    source: where they came from, for the message of an error.
    param_dtype: type of the parameters.

  Raises:
    CheckpointError: one message with every missing, unexpected, repeated or mis-shaped name.
  """
  canonical_name = getattr(model, "canonical_name", lambda key: key)
  variables = _variables(model)
  filled, keys, unexpected, unfit = {}, {}, [], []
  for key, tensor in tensors.items():
    name = canonical_name(key)
    if name is None:
      continue
    if name not in variables:
      unexpected.append(key)
    elif name in keys:
      unfit.append(f"{key} and {keys[name]} are the same parameter")
    else:
      keys[name] = key
      path, variable, is_kernel = variables[name]
      value = _to_flax(tensor) if is_kernel and tensor.ndim >= 2 else tensor
      if value.shape != variable.shape:
        wanted = np.broadcast_to(False, variable.shape)
        unfit.append(f"{key} is {tensor.shape}, wanted {(_to_torch(wanted) if is_kernel else wanted).shape}")
      elif not jnp.issubdtype(value.dtype, jnp.floating):
        unfit.append(f"{key} is of type {value.dtype}, wanted a floating type")
      else:
        filled[path] = jnp.asarray(value, param_dtype)
  missing = sorted(variables.keys() - keys.keys())
  problems = [f"{title} ({len(names)}): {', '.join(names)}" for title, names in
              (("missing", missing), ("unexpected", sorted(unexpected)), ("unfit", sorted(unfit))) if names]
  if problems:
    headline = (f"{source}: the weights are not those of {type(model).__name__} with this config; "
                "take config and weights from the same place")
    raise CheckpointError("\n  ".join([headline, *problems]))
  flat = [(path, variable.replace(filled[path])) for path, variable, _ in variables.values()]
  nnx.update(model, nnx.from_flat_state(flat))
  return model


class _OneKey:
  """In place of `nnx.Rngs` where no weights are made: tracing its counter takes time quadratic in the layers."""

  def params(self) -> jax.Array:
    return jax.random.key(0)


def abstract(model_type: type, config: Mapping, **switches) -> nnx.Module:
  """The model without weights, `jax.ShapeDtypeStruct` in their place; takes a second at any size.

  Args:
    model_type: class with `from_json(config, *, rngs)`.
    config: parsed `config.json`.
    **switches: further arguments of `from_json`.
  """
  return nnx.eval_shape(lambda: model_type.from_json(config, rngs=_OneKey(), **switches))


def load(model_type: type, folder: os.PathLike, *, dtype=jnp.float32, param_dtype=jnp.float32,
         **switches) -> nnx.Module:
  """The model of a Hugging Face folder (`config.json` and safetensors), every parameter from the file.

  Args:
    model_type: class with `from_json(config, *, dtype, rngs)`.
    folder: local folder.
    dtype: type of the computation.
    param_dtype: type of the parameters; float16 and bfloat16 files are widened to it.
    **switches: further arguments of `from_json`.

  Raises:
    CheckpointError: the folder is absent, damaged, or does not fit `model_type`.
  """
  folder = pathlib.Path(folder)
  config = read_json(folder / "config.json")
  try:
    model = abstract(model_type, config, dtype=dtype, **switches)
  except (KeyError, ValueError) as error:
    reason = f"no field {error}" if isinstance(error, KeyError) else error
    raise CheckpointError(f"{folder / 'config.json'} is no {model_type.__name__}: {reason}") from error
  return fill(model, read_tensors(folder), source=folder, param_dtype=param_dtype)


def save(model: nnx.Module, folder: os.PathLike, config: Mapping, *, dtype=np.float16,
         file_name: str = "model.safetensors") -> None:
  """Writes `config.json` and weights that transformers, diffusers and `load` open.

  Args:
    model: its parameters are written under the names of the reference.
    folder: made if absent.
    config: content of `config.json`.
    dtype: type of the stored weights.
    file_name: diffusers wants `diffusion_pytorch_model.safetensors`.
  """
  folder = pathlib.Path(folder)
  reference_name = getattr(model, "reference_name", lambda name: name)
  tensors = {}
  for name, (_, variable, is_kernel) in _variables(model).items():
    value = np.asarray(variable[...])
    # safetensors writes the memory as it lies, whatever the strides say.
    tensors[reference_name(name)] = np.array(_to_torch(value) if is_kernel else value, dtype, order="C")
  write_atomic(folder / file_name, lambda path: safetensors.numpy.save_file(tensors, path, {"format": "pt"}))
  write_json(folder / "config.json", config)
