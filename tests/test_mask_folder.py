"""Masks of tags: whose they are, how their files are called, what is done again, and what is refused."""

import json
import pathlib
import sys

import numpy as np
import pytest
from PIL import Image

from digzsl_jax import mask_files, mask_folder, tag
from digzsl_jax.data import label_lists
from digzsl_jax.segmenter import MaskRules, Segmenter
from tests import test_tag
from tests.test_tag import BACKGROUND, LABELS, TEMPLATE

ask, cache, model, refused, zoo = test_tag.ask, test_tag.cache, test_tag.model, test_tag.refused, test_tag.zoo
STEMS = ("a", "b", "c", "d", "deep/a", "e")


def values(path):
  return np.asarray(Image.open(path))


def test_masks(ask, zoo, tmp_path, monkeypatch):
  folder = tmp_path / "masks"
  answer = ask(zoo, f"--masks={folder}", "--json")
  found = json.loads(answer[1])
  assert answer[0] == 0 and (folder / "labels.txt").read_text() == "0 background\n1 big dog\n2 cat\n3 small bicycle\n"
  names = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.png"))
  assert names == sorted(name for stem in STEMS for name in (stem, f"{stem}.overlay"))
  shown = [values(each["mask"]) for each in found]
  for each, values_hw, stem in zip(found, shown, STEMS):
    picture, overlay = Image.open(each["file"]), Image.open(folder / f"{stem}.overlay.png")
    assert each["mask"] == f"{folder}/{stem}.png" and values_hw.shape == picture.size[::-1]
    assert set(np.unique(values_hw)) <= {0, *(LABELS.index(entry["label"]) + 1 for entry in each["tags"])}
    times = 256 // max(picture.size)
    assert overlay.width == times * picture.width and overlay.height >= times * picture.height
  assert sum(len(np.unique(values_hw)) > 1 for values_hw in shown) > 3
  with monkeypatch.context() as patch:
    patch.setattr(tag, "Segmenter", None)
    assert ask(zoo, f"--masks={folder}", "--json") == answer  # nothing is done again
  (folder / "d.png").unlink()
  before = (folder / "a.png").stat().st_mtime_ns
  assert ask(zoo, f"--masks={folder}", "--json") == answer
  np.testing.assert_array_equal(values(folder / "d.png"), shown[3])
  assert (folder / "a.png").stat().st_mtime_ns == before
  page = (tmp_path / "out" / "contact_sheet.html").read_text()
  assert 'class="key" style="--c: #' in page and page.count("<img") == 6


def test_masks_are_those_of_the_engine(ask, zoo, model, tmp_path):
  folder = tmp_path / "masks"
  found = json.loads(ask(zoo, f"--masks={folder}", "--json")[1])
  paths = [pathlib.Path(each["file"]) for each in found]
  tags_nf = np.array([[label in {entry["label"] for entry in each["tags"]} for label in LABELS] for each in found])
  read = test_tag.opened(paths)
  engine = test_tag.engine(Segmenter, model, MaskRules(1, 1, 0.7))
  for cams in engine.stream(read, test_tag.native.plan(read.grids_n2, 1), tags_nf):
    maps_khw = mask_files.class_maps(cams.cams_mij, tuple(read.sizes_n2[cams.row]), True)
    wanted_hw = mask_files.label_map(maps_khw, cams.labels_m) + 1
    assert (values(found[cams.row]["mask"]) == wanted_hw).mean() > 0.99  # equal but for rounding at borders


def test_large_pictures_keep_their_size(ask, zoo, tmp_path, monkeypatch):
  expected = values(json.loads(ask(zoo / "c.png", f"--masks={tmp_path / 'whole'}", "--json")[1])[0]["mask"])
  monkeypatch.setattr(mask_folder, "MOST_PIXELS", 16 * 28 // 4)
  monkeypatch.setattr(mask_folder, "OVERLAY", 10)
  monkeypatch.setattr(mask_files, "READABLE", 1)
  found = values(json.loads(ask(zoo / "c.png", f"--masks={tmp_path / 'masks'}", "--json")[1])[0]["mask"])
  assert found.shape == expected.shape == (16, 28) and (found == expected).mean() > 0.7
  assert (found[::2] == found[1::2]).all() and Image.open(tmp_path / "masks" / "c.overlay.png").width == 10


def test_masks_are_refined_on_request(ask, zoo, tmp_path, monkeypatch):
  asked = []

  def nothing(maps_khw, image_hwc):
    asked.append((maps_khw.shape[1:], image_hwc.shape))
    return np.stack([np.ones_like(maps_khw[0]), *np.zeros_like(maps_khw[1:])])

  monkeypatch.setattr(mask_files, "refine_crf", nothing)
  [each] = json.loads(ask(zoo / "a.png", f"--masks={tmp_path}/masks", "--crf", "--json")[1])
  assert not values(each["mask"]).any() and asked[1:] == [((16, 28), (16, 28, 3))]  # the first asks whether it is there


def test_what_stands_in_the_way_of_masks(ask, refused, zoo, tmp_path, monkeypatch):
  assert f"{zoo}/a.png is there, and is no mask of this command: choose another --masks" in refused(
      zoo / "a.png", f"--masks={zoo}")
  assert f"--masks: {zoo}/deep/m is in {zoo}, where masks would be taken for pictures later" in refused(
      zoo, f"--masks={zoo}/deep/m")
  (tmp_path / "others").mkdir()
  (tmp_path / "others" / "b.png").write_bytes(b"")
  assert f"{tmp_path}/others/b.png is there, and" in refused(zoo, f"--masks={tmp_path}/others")
  assert "--crf is True; it must be given with --masks alone" in refused(zoo, "--crf")
  monkeypatch.setitem(sys.modules, "pydensecrf", None)
  assert "pydensecrf2, which is not installed: pip install" in refused(zoo, f"--masks={tmp_path}/m", "--crf")
  assert not (tmp_path / "m").exists()
  ask(zoo / "a.png", f"--masks={tmp_path}/m")
  assert f"{tmp_path}/m/masks.jsonl was made with other settings (threshold: 0.5 -> 0.1): choose another --masks" in (
      refused(zoo / "a.png", f"--masks={tmp_path}/m", "--threshold=0.1", f"--out={tmp_path}/new"))


def test_a_picture_that_goes_before_its_mask(ask, zoo, tmp_path, monkeypatch):
  begin = mask_folder.Masks.begin
  monkeypatch.setattr(mask_folder.Masks, "begin", lambda *arguments: (begin(*arguments), (zoo / "c.png").unlink())[0])
  status, out, [wrong] = ask(zoo, f"--masks={tmp_path}/masks", "--json")
  assert status == 1 and wrong.startswith(f"error: {zoo}/c.png cannot be read (there is no such file)")
  assert ["mask" in each for each in json.loads(out)] == [True, True, False, True, True, True]


@pytest.mark.parametrize("paths, names", [
    (["x/a.jpg", "x/b.png"], ["a", "b"]), (["x/a.jpg", "x/y/a.jpg", "z/a.jpg"], ["x/a", "x/y/a", "z/a"]),
    (["x/a.jpg", "x/a.png", "x/b.c.png"], ["a.jpg", "a.png", "b.c"]),
    (["x/a.jpg", "x/a.overlay.jpg"], ["a.jpg", "a.overlay.jpg"]),
    (["x/a.jpg", "x/a.png", "x/a.jpg.gif"], ["a.jpg", "a.png", "a.jpg.gif"]), (["../q/a.jpg"], ["a"])])
def test_names_of_masks(paths, names):
  assert mask_folder.stems(list(map(pathlib.Path, paths))) == names


def test_names_and_rules_of_lists():
  voc, stuff = label_lists.CLS_SEG["voc"], label_lists.CLS_SEG["coco_stuff"]
  assert mask_folder.names("voc", label_lists.LISTS["voc"].names, None) == (*voc.names, *voc.background)
  assert mask_folder.names("coco_stuff", (), None) == (*stuff.names, "background")
  assert mask_folder.names("voc", (), ("sea", "sheep")) == (*voc.names, "sea")
  assert mask_folder.names("dog", ("dog",), ("sea",)) == ("dog", "sea")
  assert [mask_folder.rules(listed, 12, False) for listed in ("voc", "coco", None)] == [
      MaskRules(4, 10, 0.4), MaskRules(4, 11, 0.7), MaskRules(4, 11, 0.7)]
  assert [mask_folder.rules("coco", layers, True)[:2] for layers in (24, 4, 2, 1)] == [(8, 23), (1, 3), (1, 1), (0, 0)]


def test_prompts_are_published_ones_where_those_of_tags_are(zoo):
  flags = lambda **more: test_tag.types.SimpleNamespace(**dict(
      labels="coco", labels_file=None, background=None, template=None, model="some/clip") | more)
  told = lambda args: tag.mask_texts(tag.Work(args, tag.choose(args), None, None, None))
  coco = label_lists.CLS_SEG["coco"]
  assert told(flags()) == ((*coco.names, *coco.background), ("a clean origami {name}.",))
  assert told(flags(background="sea")) == ((*coco.names, "sea"), ("a clean origami {name}.",))
  assert told(flags(labels=",".join(LABELS), background=",".join(BACKGROUND), template=TEMPLATE)) == (
      (*LABELS, *BACKGROUND), (TEMPLATE,))
