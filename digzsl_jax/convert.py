"""Pickled weights to safetensors: `python -m digzsl_jax.convert SOURCE OUT`.

SOURCE is a model folder (`pytorch_model.bin` or `diffusion_pytorch_model.bin`, in shards too), a folder of such
folders, or one `.ckpt`, `.pt`, `.pth` or `.bin` file. OUT gets the same layout. Needs PyTorch, whose restricted
reader makes tensors and plain containers and runs nothing that the file asks for.
"""

import argparse
import os
import pathlib
import pickle
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Mapping

from digzsl_jax.files import PICKLES, read_json, write_atomic, write_json

_WEIGHTS = re.compile(r"((?:diffusion_)?pytorch_model)((?:\.[\w-]+|-\d+-of-\d+)*)\.bin(\.index(?:\.\w+)?\.json)?")
_STEMS = {"pytorch_model": "model", "diffusion_pytorch_model": "diffusion_pytorch_model"}
# What PyTorch Lightning left beside the weights of the first releases; read as empty things and dropped.
_LIGHTNING = ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", "numpy.core.multiarray.scalar",
              "numpy._core.multiarray.scalar", "numpy.dtype")


class _Dropped:
  """Stands for an object of `_LIGHTNING`."""

  def __new__(cls, *_):
    return super().__new__(cls)

  def __setstate__(self, state):
    pass


def read_pickle(path: os.PathLike, say: Callable[[str], object] = print) -> dict:
  """The tensors of a pickled file, none of which shares its memory with another.

  Args:
    path: what `torch.save` wrote: tensors by name, or a dictionary with these as `state_dict` or `model`.
    say: gets a line about entries that are no tensors.

  Raises:
    ValueError: the file is damaged, asks for more than tensors, or holds none.
    ImportError: PyTorch is not installed.
  """
  try:
    import torch
  except ImportError as error:
    raise ImportError("pickled weights are read with PyTorch, which is not installed: pip install "
                      "'digzsl_jax[oracle]', here or on another machine") from error
  path = pathlib.Path(path)
  try:
    with torch.serialization.safe_globals([(_Dropped, name) for name in _LIGHTNING]):
      stored = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
  except pickle.UnpicklingError as error:
    asked = re.search(r"GLOBAL (\S+)", str(error))
    what = f"{asked[1]}, which could run any code" if asked else "more than tensors"
    raise ValueError(f"{path} asks for {what}, or is damaged: nothing of it was run. Get safetensors from where it "
                     "came from") from error
  except Exception as error:  # of any kind, where a damaged file sends its reader astray
    if "TorchScript" in str(error):
      raise ValueError(f"{path} is a TorchScript archive, a program and not weights: take the model's Hugging Face "
                       "folder") from error
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise ValueError(f"{path} is damaged or no file of torch.save ({reason}): download it again; a Git LFS pointer "
                     "needs git lfs pull") from error
  for inner in "state_dict", "model":
    if isinstance(stored, Mapping) and isinstance(stored.get(inner), Mapping):
      stored = stored[inner]
  entries = stored if isinstance(stored, Mapping) else {}
  tensors = {key: value for key, value in entries.items() if isinstance(key, str) and torch.is_tensor(value)}
  if not tensors:
    raise ValueError(f"{path} holds no tensors by name, but a {type(stored).__name__}")
  if dropped := [str(key) for key in entries if key not in tensors]:
    say(f"{path.name}: left out, being no tensors: {', '.join(dropped)}")
  seen = set()
  for key, tensor in tensors.items():
    memory = tensor.untyped_storage().data_ptr()
    if memory in seen or not tensor.is_contiguous():
      tensors[key] = tensor.clone(memory_format=torch.contiguous_format)
    seen.add(memory)
  return tensors


def convert_file(source: pathlib.Path, out: pathlib.Path, say: Callable[[str], object] = print) -> None:
  """Writes the tensors of a pickled file as safetensors; errors as `read_pickle`."""
  tensors = read_pickle(source, say)
  from safetensors.torch import save_file  # needs PyTorch too
  write_atomic(out, lambda path: save_file(tensors, path, {"format": "pt"}))
  say(f"{out}: {len(tensors)} tensors")


def safe_name(name: str) -> str | None:
  """What `transformers` and `diffusers` call the safetensors twin of `pytorch_model.bin` and the like."""
  found = _WEIGHTS.fullmatch(name)
  return found and f"{_STEMS[found[1]]}{found[2]}.safetensors{found[3] or ''}"


def convert_folder(source: pathlib.Path, out: pathlib.Path, say: Callable[[str], object] = print) -> None:
  """Converts the weights of a folder and of those in it; copies the json, txt and safetensors files beside them.

  Raises:
    ValueError: there are no pickled weights, or as `read_pickle`.
  """
  files = sorted(path for path in source.rglob("*") if path.is_file())
  pickles = [path for path in files if path.suffix in PICKLES and safe_name(path.name)]
  if not pickles:
    raise ValueError(f"no pickled weights in {source}: looked for {' and '.join(f'{stem}.bin' for stem in _STEMS)}")
  for path in files:
    target = out / path.relative_to(source)
    safe = safe_name(path.name)
    if safe and (path.parent / safe).is_file():
      say(f"{path}: left out, {safe} is beside it")
    elif path in pickles:
      convert_file(path, target.with_name(safe), say)
    elif safe:  # the index of shards
      index = read_json(path)
      index["weight_map"] = {key: safe_name(name) or name for key, name in index.get("weight_map", {}).items()}
      write_json(target.with_name(safe), index)
    elif path.suffix in (".json", ".txt", ".safetensors"):
      write_atomic(target, lambda temporary, path=path: shutil.copyfile(path, temporary))
    elif path.suffix in PICKLES:
      say(f"{path}: left out, no weights go by that name")


def convert(source: os.PathLike, out: os.PathLike, say: Callable[[str], object] = print) -> None:
  """Converts a folder or a file; `out` is made whole or not at all.

  Raises:
    ValueError: `out` is there already, `source` is not, or as `read_pickle`.
    ImportError: PyTorch is not installed.
    OSError: `out` cannot be written.
  """
  source, out = pathlib.Path(source), pathlib.Path(out)
  if out.exists():
    raise ValueError(f"{out} is there already: name a new one")
  if source.is_file():
    if source.suffix not in PICKLES or out.suffix != ".safetensors":
      raise ValueError(f"{source} to {out}: a single file is one of {', '.join(PICKLES)} and becomes one .safetensors")
    return convert_file(source, out, say)
  if not source.is_dir():
    raise ValueError(f"no file or folder {source}")
  if out.resolve().is_relative_to(source.resolve()):
    raise ValueError(f"{out} is inside {source}: name a folder elsewhere")
  unfinished = out.with_name(f".{out.name}.{os.getpid()}")
  try:
    convert_folder(source, unfinished, say)
    unfinished.rename(out)
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)


def main(arguments: list[str] | None = None) -> None:
  """The command line; a mistake ends it with one message."""
  parser = argparse.ArgumentParser(prog="python -m digzsl_jax.convert", description="Pickled weights to safetensors.")
  parser.add_argument("source", help="model folder, folder of model folders, or one pickled file")
  parser.add_argument("out", help="new folder, or new .safetensors file for a file")
  given = parser.parse_args(arguments)
  try:
    convert(given.source, given.out)
  except (ValueError, ImportError, OSError) as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  main()
