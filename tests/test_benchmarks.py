"""The four benchmarks: class names, counts, fingerprints, and the command that compares them with what is published."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.io

from digzsl_jax.data import archives, benchmarks, prompts
from tests.small_archive import NAMES, contents, published_archive, write


def test_fingerprint(tmp_path):
  split = dataclasses.replace(archives.load(write(tmp_path / "CUB", *contents())), train_loc=None)
  changes = {"name": "SUN", "seen": split.seen[::-1], "validation": split.validation * 2,
             "labels_n": np.append(split.labels_n, np.int32(1)), "trainval_loc": split.trainval_loc[:-1],
             "test_unseen_loc": split.test_unseen_loc[1:], "val_loc": None,
             "raw_names_k": tuple(name.replace("Auklet", "Auk") for name in NAMES)}
  changed = [dataclasses.replace(split, **{field: value}) for field, value in changes.items()]
  assert len({benchmarks.fingerprint(one) for one in (split, *changed)}) == len(changes) + 1
  moved = dataclasses.replace(split, paths_n=None, attributes_ka=None)
  assert benchmarks.fingerprint(moved) == benchmarks.fingerprint(split)


def run(capsys, *arguments):
  with pytest.raises(SystemExit) as stopped:
    archives.main(["--check", *map(str, arguments)])
  return stopped.value.code, capsys.readouterr().out


@pytest.mark.parametrize("name", benchmarks.PUBLISHED)
def test_published_counts_pass(tmp_path, monkeypatch, capsys, name):
  folder = published_archive(tmp_path, name)
  status, said = run(capsys, tmp_path)
  assert status == 1 and "rows: their numbers are as published, but they are other images" in said
  monkeypatch.setitem(benchmarks.PUBLISHED_ROWS, name, benchmarks.rows_digest(archives.load(folder)))
  status, said = run(capsys, tmp_path)
  assert status == 0 and said.count(" ok\n") == 7 and "DIFFERS" not in said and "fingerprint" in said
  assert "not there: " in said and run(capsys, folder)[0] == run(capsys, folder, "--name", name)[0] == 0


def test_other_counts_fail(tmp_path, capsys):
  folder = published_archive(tmp_path, "AWA2")
  found = scipy.io.loadmat(folder / "att_splits.mat")
  rows = {field: found[field] for field in benchmarks.LOCS}
  write(folder, rows | {"trainval_loc": rows["trainval_loc"][1:]})
  status, said = run(capsys, folder)
  assert status == 1 and "DIFFERS  trainval: 23526, published 23527" in said
  # Two classes change places: all numbers are right.
  names = list(benchmarks.published_classes("AWA2"))
  names[0], names[6] = names[6], names[0]
  write(folder, rows, None, {"allclasses.txt": names})
  status, said = run(capsys, folder)
  assert status == 1 and "class names: not in the published order" in said


def other_rows(folder, held_out=1764, **changes):
  """An archive with labels whose rows fit them, but are not the published ones."""
  classes, numbers = list(benchmarks.published_classes("CUB")), benchmarks.PUBLISHED["CUB"]
  unseen_k = np.array([benchmarks.published_classes("CUB")[raw] == "unseen" for raw in classes])
  labels_n = np.concatenate([np.resize(np.flatnonzero(unseen_k), numbers["test_unseen"]),
                             np.resize(np.flatnonzero(~unseen_k), numbers["images"] - numbers["test_unseen"])])
  unseen_r, test_r, train_r = np.split(np.arange(len(labels_n)) + 1, np.cumsum([numbers["test_unseen"], held_out]))
  rows = {"trainval_loc": train_r[:, None], "test_seen_loc": test_r[:, None], "test_unseen_loc": unseen_r[:, None]}
  return write(folder / "CUB", {"att": np.ones((3, len(classes))), **rows, **changes},
               {"labels": labels_n[:, None] + 1}, {"allclasses.txt": classes})


@pytest.mark.parametrize("held_out", [1764, 1500])
def test_archives_of_another_release(tmp_path, capsys, held_out):
  """Without train_loc and val_loc, as release 2.0, what can be checked is; with them the rows must be release 1.0's."""
  folder = other_rows(tmp_path, held_out)
  status, said = run(capsys, folder)
  assert status == 0 and said.count(" not release 1.0\n") == 2 and said.count(" ok\n") == 5 and "DIFFERS" not in said
  assert "rows: not release 1.0 (other images, no train_loc, no val_loc); the counts of 2.0 are not known" in said
  everything = np.arange(1, 11789)[:, None]
  other_rows(tmp_path, held_out, train_loc=everything[4000:], val_loc=everything[:4000])
  status, said = run(capsys, folder)
  assert status == 1 and "not release 1.0" not in said
  assert ("rows: their numbers are as published, but" if held_out == 1764 else "DIFFERS  test_seen: 1500") in said


def test_other_releases_that_are_damaged_fail(tmp_path, capsys):
  folder = other_rows(tmp_path)
  rows = scipy.io.loadmat(folder / "att_splits.mat")
  other_rows(tmp_path, trainval_loc=rows["trainval_loc"][1:])
  status, said = run(capsys, folder)
  assert status == 1 and "DIFFERS  trainval + test_seen: 8820, published 8821" in said
  other_rows(tmp_path, test_unseen_loc=rows["test_unseen_loc"][1:])
  status, said = run(capsys, folder)
  assert status == 1 and "DIFFERS  test_unseen: 2966, published 2967" in said
  other_rows(tmp_path)
  (folder / "valclasses1.txt").write_text("002.Laysan_Albatross\n")
  status, said = run(capsys, folder)
  assert status == 1 and "DIFFERS  validation: 1, published 50" in said


def test_module_runs(tmp_path):
  """In a process of its own, a wrong folder ends it with status 1 and a message."""
  done = subprocess.run([sys.executable, "-m", "digzsl_jax.data.archives", "--check", tmp_path / "none"],
                        capture_output=True, text=True)
  assert done.returncode == 1 and "there is no folder" in done.stdout and not done.stderr


# Class names.

@pytest.mark.parametrize("raw, name", [
  ("grizzly+bear", "grizzly bear"), ("001.Black_footed_Albatross", "black footed albatross"),
  ("141.Artic_Tern", "arctic tern"), ("athletic_field_outdoor", "outdoor athletic field"), ("lean-to", "lean-to"),
  ("train_station_station", "train station"), ("bus_interior", "bus interior"),
  ("pink-yellow dahlia?", "pink-yellow dahlia"), ("cyclamen ", "cyclamen"),
  ("lotus lotus", "lotus"), ("balcony_exterior", "balcony exterior"),
])
def test_clean(raw, name):
  assert benchmarks.clean(raw) == name


@pytest.mark.parametrize("name", benchmarks.PUBLISHED)
def test_class_names(name):
  """The files that are shipped follow the rule and have the published numbers of classes."""
  folder = pathlib.Path(benchmarks.__file__).parent / "class_names"
  rows = [line.split("\t") for line in (folder / f"{name.lower()}.txt").read_text().splitlines()[1:]]
  assert [clean for _, clean, _ in rows] == [benchmarks.clean(raw) for raw, _, _ in rows]
  assert len({clean for _, clean, _ in rows}) == len(rows)
  parts, numbers = [part for _, _, part in rows], benchmarks.PUBLISHED[name]
  assert parts.count("unseen") == numbers["unseen"] and parts.count("validation") == numbers["validation"]
  assert parts.count("train") == numbers["seen"] - numbers["validation"]
  # No other words than the raw name's, but for spelling.
  assert all(len(clean) <= len(raw) + 2 for raw, clean, _ in rows)


def test_templates():
  assert len(prompts.TEMPLATES["imagenet80"]) == len(set(prompts.TEMPLATES["imagenet80"])) == 80
  assert len(set(prompts.TEMPLATES["tagclip85"])) == 85
  assert prompts.TEMPLATES["tagclip85"][:80] == prompts.TEMPLATES["imagenet80"]
  for templates in prompts.TEMPLATES.values():
    for template in templates:
      prompts.check_template(template)
  assert {name.lower() for name in benchmarks.PUBLISHED} < set(prompts.TEMPLATES)
  assert prompts.expand(prompts.TEMPLATES["sun"], ["zoo", "home_office"]) == [
    ["a photo of a zoo.", "a photo of the zoo."], ["a photo of a home office.", "a photo of the home office."]]


# The real lists.

def test_real_archives(real_data, capsys):
  status, said = run(capsys, real_data / "zsl")
  assert status == 0 and said.count(" ok\n") == 28 and said.count("fingerprint") == 4


@pytest.mark.parametrize("name", benchmarks.PUBLISHED)
def test_real_names_and_attributes(real_data, name):
  folder = real_data / "zsl" / name
  split = archives.load(folder)
  if name == "FLO":
    names = json.loads((folder / "cat_to_name.json").read_text())
    assert split.names_k == tuple(benchmarks.clean(names[str(k + 1)]) for k in range(102))
    assert split.unseen == tuple(range(20)) and split.validation == tuple(range(20, 40))
    unseen, validation = split.test_unseen_loc, split.val_loc
    # Whole classes are unseen, in each of Oxford's three parts.
    assert np.sum(unseen < 1020) == np.sum((1020 <= unseen) & (unseen < 2040)) == 200
    assert not np.intersect1d(unseen, validation).size
    return
  lines = lambda file: {line.strip() for line in (folder / file).read_text().splitlines() if line.strip()}
  assert {split.raw_names_k[k] for k in split.seen} == lines("trainvalclasses.txt")
  assert {split.raw_names_k[k] for k in split.unseen} == lines("testclasses.txt")
  np.testing.assert_allclose(np.linalg.norm(split.attributes_ka, axis=1), 1, rtol=1e-6)
  for i in (2, 3):
    assert {split.raw_names_k[k] for k in archives.load(folder, validation=i).validation} == lines(
      f"valclasses{i}.txt")


def test_real_cub_in_numbers(real_data):
  """Labels are no folder numbers: the archive's order of classes is one of its own."""
  split = archives.load(real_data / "zsl" / "CUB")
  assert [int(raw[:3]) for raw in split.raw_names_k[:4]] == [2, 3, 5, 7]
  assert sorted(int(split.raw_names_k[k][:3]) for k in split.unseen)[:5] == [4, 12, 23, 26, 28]


def damage(folder, how):
  path = folder / "att_splits.mat"
  if how == "truncated":
    path.write_bytes(path.read_bytes()[:-20000])
  elif how == "class removed":
    lines = (folder / "testclasses.txt").read_text().split("\n")
    (folder / "testclasses.txt").write_text("\n".join(lines[1:]))
  else:
    found = {name: value for name, value in scipy.io.loadmat(path).items() if not name.startswith("__")}
    if how == "from 0":
      found |= {name: value.astype(int) - 1 for name, value in found.items() if name.endswith("_loc")}
    else:
      found["trainval_loc"], found["test_seen_loc"] = found["test_seen_loc"], found["trainval_loc"]
    scipy.io.savemat(path, found)


@pytest.mark.parametrize("how, message", [
  ("from 0", "images are counted from 0"), ("truncated", "truncated or no MATLAB file"),
  ("class removed", "are neither seen nor unseen"), ("swapped", "DIFFERS  trainval: "),
])
@pytest.mark.parametrize("name", ["AWA2", "CUB", "SUN"])
def test_damaged_copies_of_real_archives(real_data, tmp_path, capsys, name, how, message):
  shutil.copytree(real_data / "zsl" / name, tmp_path / name, copy_function=shutil.copyfile)
  (tmp_path / name).chmod(0o755)
  damage(tmp_path / name, how)
  status, said = run(capsys, tmp_path)
  assert status == 1 and message in said
