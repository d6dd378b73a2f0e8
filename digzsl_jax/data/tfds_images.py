"""Images of CUB and FLO as TensorFlow Datasets (TFDS) prepares them: `caltech_birds2011` and `oxford_flowers102`.

`tfds.data_source` reads array_record files without TensorFlow. TFDS shuffles what it stores and divides it in its own
way; here all its parts are one list, in the order of the benchmark's folder or else of the file names.

Shapes: n image.
"""

import dataclasses
import io
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from digzsl_jax.data import benchmarks, image_folders, pictures


class _Prepared(NamedTuple):
  name: str
  file: str  # the feature that holds the original file's name
  unused: tuple[str, ...]  # features that would be decoded for nothing


_PREPARED = {"CUB": _Prepared("caltech_birds2011", "image/filename", ("segmentation_mask",)),
             "FLO": _Prepared("oxford_flowers102", "file_name", ())}
NAMES = tuple(_PREPARED)


@dataclasses.dataclass(frozen=True)
class Records:
  """Stored image files in place of a folder: `(records / path).open()`, as `pathlib.Path` has it.

  Attributes:
    place: what holds them, for messages.
    row_of: by path, a data source of TFDS and a row of it.
    path: the image that is opened.
  """
  place: str
  row_of: Mapping[str, tuple[Any, int]]
  path: str = ""

  def __truediv__(self, path: str) -> "Records":
    return dataclasses.replace(self, path=path)

  def __str__(self) -> str:
    return f"{self.place}: {self.path}"

  def open(self, mode: str = "rb") -> io.BytesIO:
    """The bytes of the original file.

    Raises:
      ValueError: its record is damaged.
    """
    return io.BytesIO(_record(self.place, *self.row_of[self.path])["image"])


def read(name: str, folder: pathlib.Path, data_dir: str = "") -> tuple[image_folders.Images, Records]:
  """The images of a benchmark, and their files.

  Args:
    name: one of `NAMES`.
    folder: the benchmark's. If it lists images as `image_folders.read` knows it (`images.txt` of CUB, `imagelabels.mat`
      and `setid.mat` of FLO), their order is that of the list.
    data_dir: where TFDS keeps its data, "" for its own default.

  Raises:
    ValueError: TFDS is not installed, has not prepared the data or holds others than the folder lists; FLO's archive is
      there without Oxford's files, whose order its rows count in.
  """
  prepared = _PREPARED[name]
  place = f"{prepared.name} of TFDS in {data_dir or 'its default data_dir'}"
  rows = [(source, row) for source in _sources(prepared, place, data_dir) for row in range(len(source))]
  raw_of = {benchmarks.clean(raw): raw for raw in benchmarks.published_classes(name)}

  def look(row: tuple[Any, int]) -> tuple[str, str]:
    record = _record(place, *row)
    file = record[prepared.file].decode()
    if name == "FLO":
      path, spelt = f"/jpg/{file}", row[0].dataset_info.features["label"].names[record["label"]]
    else:
      path, spelt = f"/{file}", pathlib.PurePosixPath(file).parent.name
    if benchmarks.clean(spelt) not in raw_of:
      raise ValueError(f"{place}: {file} is of class {spelt}, which {name} does not have; prepare the data again")
    return image_folders.adopt(name, folder, path), raw_of[benchmarks.clean(spelt)]

  found = pictures.in_threads(look, rows, f"reading {prepared.name}")
  records = Records(place, {path: row for (path, _), row in zip(found, rows)})
  return _in_order(name, folder, place, dict(sorted(found))), records


def _in_order(name: str, folder: pathlib.Path, place: str, class_of: Mapping[str, str]) -> image_folders.Images:
  listed = image_folders.read(name, folder)
  if listed is None:
    if name == "FLO" and (folder / "att_splits.mat").is_file():
      raise ValueError(f"{folder}: the rows of att_splits.mat count in the order of Oxford's setid.mat, which TFDS "
                       "does not keep; put imagelabels.mat and setid.mat beside it")
    return image_folders.Images(tuple(class_of), tuple(class_of.values()))
  different = sorted(set(zip(*listed)) ^ set(class_of.items()))
  if different:
    raise ValueError(f"{folder} lists {len(listed.paths_n)} images and {place} has {len(class_of)}; these are in one "
                     f"alone or of another class: {benchmarks.some(path for path, _ in different)}. Prepare the data "
                     "again, or take lists and images out of the folder")
  return listed


def _sources(prepared: _Prepared, place: str, data_dir: str) -> list[Any]:
  """TFDS's parts of a data set."""
  try:
    import tensorflow_datasets as tfds  # an optional extra, slow to import
  except ImportError as error:
    raise ValueError("source=tfds needs tensorflow_datasets: pip install 'digzsl_jax[data]', or set "
                     "source=files") from error
  where = str(pathlib.Path(data_dir).expanduser()) if data_dir else None
  undecoded = dict.fromkeys(("image", *prepared.unused), tfds.decode.SkipDecoding())
  try:
    # `download` would begin to prepare, which is long and needs TensorFlow.
    parts = tfds.data_source(prepared.name, data_dir=where, download=False, decoders=undecoded)
  except Exception as error:  # whatever TFDS raises for data that is not prepared, or in files of another format
    option = f" --data_dir={data_dir}" if data_dir else ""
    said = str(error).partition("\n")[0]
    raise ValueError(f"there is no {place} in array_record files ({said}). Where TensorFlow is installed run "
                     f"`tfds build {prepared.name} --file_format=array_record{option}`, or set source=files") from error
  return list(parts.values())


def _record(place: str, source: Any, row: int) -> dict[str, Any]:
  try:
    return source[row]
  except Exception as error:  # array_record raises several kinds for damaged files
    raise ValueError(f"{place}: a record cannot be read ({error}); prepare the data again") from error
