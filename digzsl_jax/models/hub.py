"""Reads, strictly loads and writes Hugging Face model folders, without PyTorch.

A model's attribute paths are the checkpoint's parameter names, so loading is a walk. Only the last
word of a Flax layer's parameter (`kernel`, `scale`, `embedding`) and the axes of its kernel differ.
A model class says what else is historical with two optional functions:

  canonical_name(checkpoint key) -> attribute path, or None for a buffer that is no parameter
  reference_name(attribute path) -> checkpoint key to write
"""

import concurrent.futures
import json
import math
import os
import pathlib
import threading
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from digzsl_jax.files import PICKLES, write_atomic, write_json

_STEMS = ("model", "diffusion_pytorch_model")
_LFS_POINTER = b"version https://git-lfs"
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "I64": np.int64,
           "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}
_FLAX_LAYERS = (nnx.Linear, nnx.Conv, nnx.Embed, nnx.LayerNorm, nnx.GroupNorm, nnx.BatchNorm)
_TORCH_LEAF = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias",
               "mean": "running_mean", "var": "running_var"}
_THREADS = 4  # that read and convert tensors


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


def weight_files(names: Collection[str], read_index: Callable[[str], Mapping], where: object) -> list[str]:
  """Which files of a model folder hold the weights that are read; an index of shards comes before them.

  Args:
    names: of the files in the folder.
    read_index: from the name of an index to its content.
    where: the folder, for the message of an error.

  Raises:
    CheckpointError: none are safetensors, or the index names files that are not there.
  """
  for variant in ("", ".fp16"):  # half precision only where full precision is absent
    for stem in _STEMS:
      if (single := f"{stem}{variant}.safetensors") in names:
        return [single]
      if (index := f"{stem}.safetensors.index{variant}.json") in names:
        shards = read_index(index).get("weight_map")
        if not isinstance(shards, dict):
          raise CheckpointError(f"{where}/{index} has no weight_map: download it again")
        shards = sorted(set(shards.values()))
        if absent := [shard for shard in shards if shard not in names]:
          raise CheckpointError(f"{where}/{index} names files that are not beside it: {', '.join(absent)}; download "
                                "them")
        return [index, *shards]
  pickles = sorted(name for name in names if pathlib.PurePath(name).suffix in PICKLES)
  if pickles:
    raise CheckpointError(f"{where} holds only pickled weights ({', '.join(pickles)}), which can run any code and are "
                          "never read: get the repository's safetensors, or convert a download of the whole "
                          "repository with `python -m digzsl_jax.convert FOLDER NEW_FOLDER` (needs the extra `oracle`)")
  raise CheckpointError(f"no weights in {where}: looked for {' or '.join(_STEMS)} as .safetensors, "
                        ".safetensors.index.json or .fp16.safetensors")


class Tensors(Mapping[str, np.ndarray]):
  """Tensors of safetensors files under the names in them, in their stored type.

  Each is mapped into memory when it is asked for, so shapes and types cost no reading, and what was read
  is given back when the array is dropped.

  Attributes:
    files: where they are.
    metadata: the files' own remarks, text by name.
  """

  def __init__(self, files: Iterable[pathlib.Path]):
    """Reads the headers.

    Raises:
      CheckpointError: a file is absent or damaged, or two hold the same tensor.
    """
    self._places, self.metadata, self.files = {}, {}, list(files)
    for file in self.files:
      places, metadata = _read_header(file)
      if twice := sorted(self._places.keys() & places.keys()):
        raise CheckpointError(f"{file} repeats tensors of another shard: {', '.join(twice)}")
      self._places |= places
      self.metadata |= metadata

  def __getitem__(self, key: str) -> np.ndarray:
    file, dtype, shape, start = self._places[key]
    return np.asarray(np.memmap(file, dtype, "r", start, shape))

  def __iter__(self) -> Iterator[str]:
    return iter(self._places)

  def __len__(self) -> int:
    return len(self._places)


def _read_header(file: pathlib.Path) -> tuple[dict[str, tuple], dict[str, str]]:
  """Where each tensor of a safetensors file is (file, type, shape, first byte), and the file's metadata."""
  if not file.is_file():
    raise CheckpointError(f"no file {file}: download it first")
  with file.open("rb") as stream:
    if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
      raise CheckpointError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder")
    try:
      with safetensors.safe_open(file, "np"):  # checks lengths and places
        pass
    except safetensors.SafetensorError as error:
      raise CheckpointError(f"{file} ({file.stat().st_size} bytes) is truncated or no safetensors file "
                            f"({error}): download it again") from error
    stream.seek(0)
    size = int.from_bytes(stream.read(8), "little")
    header = json.loads(stream.read(size))
  metadata = header.pop("__metadata__", {})
  if unknown := sorted({tensor["dtype"] for tensor in header.values()} - _DTYPES.keys()):
    raise CheckpointError(f"{file} holds tensors of type {', '.join(unknown)}; known are {', '.join(_DTYPES)}")
  return {name: (file, np.dtype(_DTYPES[tensor["dtype"]]), tuple(tensor["shape"]), 8 + size + tensor["data_offsets"][0])
          for name, tensor in header.items()}, metadata


def read_tensors(path: os.PathLike) -> Tensors:
  """The tensors of a model folder, or of one safetensors file.

  Raises:
    CheckpointError: no such folder, no safetensors in it, or a damaged or pickled file.
  """
  path = pathlib.Path(path)
  if path.suffix in PICKLES and path.is_file():
    raise CheckpointError(f"{path} is pickled, which can run any code and is never read: convert it with `python -m "
                          f"digzsl_jax.convert {path} {path.with_suffix('.safetensors')}` (needs the extra `oracle`)")
  if path.is_file():
    return Tensors([path])
  if not path.is_dir():
    raise CheckpointError(f"no folder {path} (looked for model weights in it): download it first")
  names = {file.name for file in path.iterdir() if file.is_file()}
  found = weight_files(names, lambda index: read_json(path / index), path)
  return Tensors(path / name for name in found if name.endswith(".safetensors"))


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


def _copy(source: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """A C-ordered copy that JAX takes over on a CPU without another one, for which it must start at 64 bytes.

  A transposed kernel is copied in tiles that stay in the processor's cache; numpy by itself takes three
  times as long, and `jax.device_put` of the view up to twice.
  """
  size = source.size * dtype.itemsize
  memory = np.empty(size + 64, np.uint8)
  start = -memory.ctypes.data % 64
  copy = memory[start:start + size].view(dtype).reshape(source.shape)
  if source.ndim < 2 or source.flags.c_contiguous:
    copy[...] = source
    return copy
  rows, columns = max(128 // math.prod(source.shape[:-2]), 1), 512
  for row in range(0, source.shape[-2], rows):
    for column in range(0, source.shape[-1], columns):
      tile = ..., slice(row, row + rows), slice(column, column + columns)
      copy[tile] = source[tile].astype(dtype, copy=False)  # types change faster in the order of the file
  return copy


def fill(model: nnx.Module, tensors: Mapping[str, np.ndarray], *, source: object) -> nnx.Module:
  """Puts checkpoint tensors into a (possibly abstract) model, in place: each is used, each fits.

  All names and shapes are checked before any data is read. Then every tensor is asked for again, converted
  to the type of its parameter and dropped, so there is never more than one copy of the weights.

  Args:
    model: from a constructor or `abstract`.
    tensors: checkpoint keys to tensors of any floating type; asked for tensors in several threads.
    source: where they came from, for the message of an error.

  Raises:
    CheckpointError: one message with every missing, unexpected, repeated or mis-shaped name.
  """
  variables = _variables(model)
  keys = _match(model, variables, tensors, source)

  def read(name: str) -> np.ndarray:
    _, variable, is_kernel = variables[name]
    tensor = tensors[keys[name]]
    return _copy(_to_flax(tensor) if is_kernel else tensor, np.dtype(variable.dtype))

  with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
    # Onto the device from this thread, whose default device it may have been told.
    flat = [(path, variable.replace(jax.device_put(value)))
            for (path, variable, _), value in zip(variables.values(), threads.map(read, variables))]
  nnx.update(model, nnx.from_flat_state(flat))
  return model


def _match(model: nnx.Module, variables: Mapping[str, tuple], tensors: Mapping[str, np.ndarray],
           source: object) -> dict[str, str]:
  """`{checkpoint-style name: key}` for every variable, or the error that `fill` describes."""
  canonical_name = getattr(model, "canonical_name", lambda key: key)
  keys, unexpected, unfit = {}, [], []
  for key in tensors:
    name = canonical_name(key)
    if name is None:
      continue
    if name not in variables:
      unexpected.append(key)
    elif name in keys:
      unfit.append(f"{key} and {keys[name]} are the same parameter")
    else:
      keys[name] = key
      _, variable, is_kernel = variables[name]
      if misfit := _misfit(tensors[key], variable.shape, is_kernel):
        unfit.append(f"{key} is {misfit}")
  missing = sorted(variables.keys() - keys.keys())
  problems = [f"{title} ({len(names)}): {', '.join(names)}" for title, names in
              (("missing", missing), ("unexpected", sorted(unexpected)), ("unfit", sorted(unfit))) if names]
  if problems:
    headline = (f"{source}: the weights are not those of {type(model).__name__} with this config; "
                "take config and weights from the same place")
    raise CheckpointError("\n  ".join([headline, *problems]))
  return keys


def _misfit(tensor: np.ndarray, shape: tuple[int, ...], is_kernel: bool) -> str | None:
  wanted = np.broadcast_to(False, shape)
  wanted = (_to_torch(wanted) if is_kernel else wanted).shape
  if tensor.shape != wanted:
    return f"{tensor.shape}, wanted {wanted}"
  if not jnp.issubdtype(tensor.dtype, jnp.floating):
    return f"of type {tensor.dtype}, wanted a floating type"
  return None


def abstract(model_type: type, config: Mapping, **switches) -> nnx.Module:
  """`model_type.from_json(config, **switches)` with shapes and types in place of weights.

  Its layers and parameters come from `layers`, which make nothing where there is no key.
  """
  return model_type.from_json(config, rngs=types.SimpleNamespace(params=lambda: None), **switches)


def load(model_type: type, folder: os.PathLike, *, dtype=jnp.float32, **switches) -> nnx.Module:
  """The model of a Hugging Face folder (`config.json` and safetensors), every parameter from the file.

  Args:
    model_type: class with `from_json(config, *, dtype, rngs)`.
    folder: local folder.
    dtype: type of the computation.
    **switches: further arguments of `from_json`.

  Raises:
    CheckpointError: the folder is absent, damaged, or does not fit `model_type`.
  """
  folder = pathlib.Path(folder)
  config = read_json(folder / "config.json")
  loaded = threading.Event()
  with concurrent.futures.ThreadPoolExecutor(1) as thread:
    tensors = thread.submit(read_tensors, folder)
    thread.submit(lambda: _read_ahead(tensors.result().files, loaded))  # while the model is built, too
    try:
      model = _abstract(model_type, config, folder, dtype=dtype, **switches)
      return fill(model, tensors.result(), source=folder)
    finally:
      loaded.set()


def _abstract(model_type: type, config: Mapping, folder: pathlib.Path, **switches) -> nnx.Module:
  """`abstract` with errors that name the file."""
  try:
    return abstract(model_type, config, **switches)
  except (KeyError, ValueError) as error:
    reason = f"no field {error}" if isinstance(error, KeyError) else error
    raise CheckpointError(f"{folder / 'config.json'} is no {model_type.__name__}: {reason}") from error


def _read_ahead(files: Iterable[pathlib.Path], enough: threading.Event) -> None:
  """Has the system fetch files from one end to the other: mapped pages alone get half of a disk's rate."""
  step = 2**23
  for file in files:
    with file.open("rb") as stream:
      for start in range(0, file.stat().st_size, step):
        if enough.is_set() or not hasattr(os, "posix_fadvise"):  # macOS has none
          return
        os.posix_fadvise(stream.fileno(), start, step, os.POSIX_FADV_WILLNEED)


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
