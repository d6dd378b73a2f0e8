"""Variables of MATLAB files: version 5 through scipy, version 7.3, which is HDF5, through h5py."""

import importlib
import pathlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

_HDF5 = (b"MATLAB 7.3", b"\x89HDF\r\n\x1a\n")  # with and without MATLAB's block of 512 bytes before it
_NO_TEXT = "a cell holds numbers where text is due"


def read(path: pathlib.Path, names: Sequence[str]) -> dict[str, np.ndarray | list[str]]:
  """Those of the variables `names` that the file holds.

  Returns:
    Numbers as arrays of MATLAB's shape; text and cells of text, however nested, as lists of strings without the
    blanks at their ends.

  Raises:
    ValueError: the file is damaged or of another kind, or the package that reads it is not installed.
    OSError: the file is absent or cannot be read.
  """
  with path.open("rb") as file:
    start = file.read(16)
  needed = "h5py" if start.startswith(_HDF5) else "scipy.io"
  try:
    module = importlib.import_module(needed)
  except ImportError as error:
    raise ValueError(f"{path} is read with {needed.partition('.')[0]}, which is not installed: pip install "
                     "'digzsl_jax[data]'") from error
  try:
    return (_read_hdf5 if needed == "h5py" else _read_version5)(module, path, names)
  except Exception as error:  # either package raises a dozen kinds for damaged files
    raise ValueError(f"{path} is truncated or no MATLAB file ({error}); get it again") from error


def _read_version5(scipy_io: ModuleType, path: pathlib.Path, names: Sequence[str]) -> dict:
  found = scipy_io.loadmat(path, variable_names=list(names))
  return {name: _strings(found[name]) if found[name].dtype.kind in "OU" else found[name]
          for name in names if name in found}


def _strings(value: np.ndarray) -> list[str]:
  """Text of cells in MATLAB's order, columns first; a cell that holds a cell counts as what is inside."""
  if value.dtype.kind == "U":
    return [str(text).rstrip() for text in value.ravel()] or [""]
  if value.dtype.kind != "O":
    raise ValueError(_NO_TEXT)
  return [text for cell in value.ravel(order="F") for text in _strings(np.asarray(cell))]


def _read_hdf5(h5py: ModuleType, path: pathlib.Path, names: Sequence[str]) -> dict:
  def value(stored: Any) -> np.ndarray | list[str]:
    if h5py.check_ref_dtype(stored.dtype):
      # HDF5 counts dimensions the other way round, so rows here are MATLAB's columns.
      inside = [value(file[reference]) for reference in stored[()].ravel()]
      if not all(isinstance(texts, list) for texts in inside):
        raise ValueError(_NO_TEXT)
      return [text for texts in inside for text in texts]
    if stored.attrs.get("MATLAB_class") == b"char":
      return [""] if stored.attrs.get("MATLAB_empty") else ["".join(map(chr, stored[()].ravel())).rstrip()]
    return stored[()].T

  with h5py.File(path) as file:
    return {name: value(file[name]) for name in names if name in file}
