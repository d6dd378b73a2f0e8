"""Small archives of the Proposed Splits, as version 5 and 7.3 of MATLAB write them."""

import numpy as np
import pytest
import scipy.io

from digzsl_jax.data import benchmarks

# Six of CUB's classes; as in the archive, their order is not that of their numbers, and lists have orders of their own.
NAMES = ("002.Laysan_Albatross", "005.Crested_Auklet", "007.Parakeet_Auklet", "001.Black_footed_Albatross",
         "004.Groove_billed_Ani", "006.Least_Auklet")
UNSEEN = (NAMES[4], NAMES[1])
SEEN = tuple(sorted(set(NAMES) - set(UNSEEN), key=lambda name: name[4:]))
EACH = 5  # images of a class; the first is held out


def cells(texts, deeper=False):
  array = np.empty((len(texts), 1), object)
  for i, text in enumerate(texts):
    array[i, 0] = np.array([[text]], object) if deeper else text
  return array


def save_hdf5(path, variables):
  """As MATLAB does: text as 16-bit numbers, cells as references, dimensions turned round, 512 bytes before it all."""
  h5py = pytest.importorskip("h5py")
  with h5py.File(path, "w", userblock_size=512) as file:
    def text(where, name, value):
      stored = where.create_dataset(name, data=np.array([[ord(letter)] for letter in value], np.uint16))
      stored.attrs["MATLAB_class"] = np.bytes_("char")
      return stored

    for name, value in variables.items():
      if value.dtype != object:
        file[name] = value.T
        continue
      places = file.require_group("#refs#")
      references = np.array([[text(places, f"{name}{i}", str(one)).ref for i, one in enumerate(value.ravel())]],
                            h5py.ref_dtype)
      file.create_dataset(name, data=references).attrs["MATLAB_class"] = np.bytes_("cell")
  with path.open("r+b") as file:
    file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64")


def contents():
  """Variables of both files of a small archive, and its text lists; images go class by class."""
  labels_n = np.repeat(np.arange(len(NAMES)), EACH)
  images_n = np.arange(1, len(labels_n) + 1)
  unseen_n = np.isin(labels_n, [NAMES.index(name) for name in UNSEEN])
  held_n = images_n % EACH == 1
  column = lambda rows: rows[::-1, None].astype(np.uint16)  # in no order, as published
  splits = {"att": np.arange(18.0).reshape(3, 6), "allclasses_names": cells(NAMES),
            "trainval_loc": column(images_n[~unseen_n & ~held_n]),
            "test_seen_loc": column(images_n[~unseen_n & held_n]), "test_unseen_loc": column(images_n[unseen_n]),
            "train_loc": column(images_n[~unseen_n & (labels_n != 0)]), "val_loc": column(images_n[labels_n == 0])}
  files = [f"/BS/work/CUB_200_2011/CUB_200_2011/images/{NAMES[label]}/picture_{image}.jpg  "
           for label, image in zip(labels_n, images_n)]
  res101 = {"labels": labels_n[:, None] + 1.0, "image_files": cells(files), "features": np.zeros((4, len(files)))}
  lists = {"allclasses.txt": NAMES, "trainvalclasses.txt": SEEN, "testclasses.txt": UNSEEN}
  for i in (1, 2, 3):
    lists[f"valclasses{i}.txt"] = SEEN[i - 1:i]
  return splits, res101, lists


def write(folder, splits, res101=None, lists=(), save=scipy.io.savemat):
  folder.mkdir(exist_ok=True, parents=True)
  save(folder / "att_splits.mat", splits)
  if res101:
    save(folder / "res101.mat", res101)
  for file, names in dict(lists).items():
    (folder / file).write_text("".join(f"{name} \n" for name in names) + "\n")
  return folder


def published_archive(folder, name):
  """An archive with the published classes and counts, its rows drawn at random."""
  classes, numbers = benchmarks.published_classes(name), benchmarks.PUBLISHED[name]
  rows, parts = np.random.default_rng(0).permutation(numbers["images"]) + 1, {}
  for part in ("trainval", "test_seen", "test_unseen"):
    parts[f"{part}_loc"], rows = rows[:numbers[part], None], rows[numbers[part]:]
  lists = {"allclasses.txt": classes} if name != "FLO" else {}
  return write(folder / name, {"att": np.ones((3, len(classes))), **parts}, None, lists)
