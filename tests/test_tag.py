"""Pictures get the tags that the engine gives them one by one; a run goes on where it was; mistakes are named."""

import json
import re
import types

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from digzsl_jax import checkpoint, files, label_texts, logs, tag, tag_records
from digzsl_jax.data import label_lists, native, prompts, tokenizer
from digzsl_jax.models import cdm, clip, hub
from digzsl_jax.tagger import Rules, Tagger
from tests.conftest import random_model

LABELS = ("big dog", "cat", "small bicycle")
BACKGROUND = ("sky",)
TEMPLATE = "a photo of a {name}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """Folder of a tiny CLIP."""
  folder = tmp_path_factory.mktemp("clip")
  words = tokenizer.train_bpe(("a", "photo", "of", "dog", "cat", "bicycle", "big", "small", "sky"), folder, length=16)
  tower = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
  config = {"model_type": "clip", "projection_dim": 8, "vision_config": tower | {"image_size": 8, "patch_size": 4},
            "text_config": tower | {"vocab_size": words.vocab_size, "eos_token_id": words.eos_id,
                                    "max_position_embeddings": 16}}
  hub.save(random_model(clip.CLIPModel, config, seed=0), folder, config, dtype=np.float32)
  files.write_json(folder / "preprocessor_config.json", {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]})
  return folder


def spots(height, width, seed):
  rng = np.random.default_rng(seed)
  pixels = rng.integers(0, 256, (max(height // 6, 1), max(width // 6, 1), 3), np.uint8)
  return Image.fromarray(pixels).resize((width, height))


@pytest.fixture
def zoo(tmp_path):
  """A folder with six pictures of two sizes."""
  folder = tmp_path / "zoo"
  (folder / "deep").mkdir(parents=True)
  for i, name in enumerate(("a.png", "b.jpg", "c.png", "d.jpg", "deep/a.png", "e.png")):
    spots(*((24, 20) if i % 2 else (16, 28)), i).save(folder / name)
  return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


@pytest.fixture
def ask(model, cache, tmp_path, capsys, monkeypatch):
  """`ask(arguments...)`: exit status, what is printed, and the lines on stderr but for stages and bars."""
  monkeypatch.setattr(tag.jax, "local_devices", lambda: tag.jax.devices()[:2])
  monkeypatch.setattr(tag.jax, "local_device_count", lambda: 2)
  monkeypatch.setattr(tag, "BATCH", 1)

  def answer(*arguments):
    usual = {"--model": model, "--labels": ",".join(LABELS), "--background": ",".join(BACKGROUND),
             "--template": TEMPLATE, "--out": tmp_path / "out", "--cache": cache}
    given = {str(each).partition("=")[0] for each in arguments}
    given |= {"--labels"} if "--labels-file" in given else set()
    capsys.readouterr()
    status = tag.main([*map(str, arguments), *(f"{k}={v}" for k, v in usual.items() if k not in given)])
    out, err = capsys.readouterr()
    assert all(re.match(r"\[ *[0-9.]+s\] |error: |stopped", line) for line in plain(err)), err
    return status, out, [line for line in plain(err) if not line.startswith("[")]
  return answer


def plain(err):
  """Lines of stderr without progress bars."""
  return [line for line in re.split(r"[\n\r]", err) if line.strip() and not re.match(r"[a-z ]+: +\d+(%\||it)", line)]


@pytest.fixture
def refused(ask):
  """`refused(arguments...)`: the message that ends the program."""
  def answer(*arguments):
    with pytest.raises(SystemExit) as stop:
      ask(*arguments)
    return stop.value.code
  return answer


def engine(kind, model, rules, **how):
  """The engine `kind` with texts of one prompt each."""
  weights, words = hub.load(clip.CLIPModel, model), tokenizer.Tokenizer.from_folder(model)
  texts = [TEMPLATE.format(name=name) for name in (*LABELS, *BACKGROUND)]
  text_kp = label_texts.encode(weights, words, texts, lambda count: logs.Log(None).progress(count, "texts"))
  return kind(weights, cdm.Preprocess(8, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)), text_kp, len(LABELS), rules, pictures=1,
              devices=tag.jax.devices()[:2], **how)


def opened(paths):
  return native.NativePictures(paths[0].parent, [native.pictures.File(str(path), b"") for path in paths], 4)


def one_by_one(model, paths):
  """Scores by the engine of one picture at a time."""
  read, tagger = opened(paths), engine(Tagger, model, Rules(0, 1, 0.5), crops=4)
  [bucket] = native.plan(read.grids_n2, 1)
  alone = [native.Bucket(*bucket[:2], np.array([row])) for row in range(len(paths))]
  scored = {int(each.rows_b[0]): each.scores_bf[0] for each in tagger.stream(read, alone)}
  return np.stack([scored[row] for row in range(len(paths))])


def test_tags_are_those_of_the_engine(ask, zoo, model, tmp_path):
  paths = sorted(path for path in zoo.rglob("*.*"))
  status, out, wrong = ask(zoo, "--json", "--all")
  found = json.loads(out)
  assert status == 0 and not wrong and [each["file"] for each in found] == list(map(str, paths))
  scores_nf = one_by_one(model, paths)
  assert np.ptp(scores_nf, axis=0).min() > 1e-3  # pictures differ
  for each, scores_f in zip(found, scores_nf):
    np.testing.assert_allclose([each["scores"][label] for label in LABELS], scores_f, rtol=0, atol=1e-5)
    above = scores_f > scores_f.min() + 0.5 * np.ptp(scores_f)
    assert [entry["label"] for entry in each["tags"]] == [
        LABELS[f] for f in np.argsort(-scores_f) if above[f]]
    assert all(entry["score"] == each["scores"][entry["label"]] for entry in each["tags"])
  lines = [json.loads(line) for line in (tmp_path / "out" / "tags.jsonl").read_text().splitlines()]
  by_file = {line["file"]: {k: line[k] for k in ("file", "tags", "scores")} for line in lines}
  assert len(lines) == 6 and [by_file[each["file"]] for each in found] == found


def test_what_people_read(ask, zoo):
  names = [zoo / "d.jpg", zoo / "a.png", zoo / "d.jpg"]
  entries = json.loads(ask(*names, "--json")[1])
  assert [each["file"] for each in entries] == [str(name) for name in names[:2]]  # once each, in the order given
  assert all("scores" not in each for each in entries)
  lines = ask(*names)[1].splitlines()
  wanted = [line for each in entries for line in (
      each["file"], *(f"{entry['score']:9.4f}  {entry['label']}" for entry in each["tags"]))]
  assert lines == wanted
  lines = ask(*names, "--all")[1].splitlines()
  assert len(lines) == 2 * (1 + len(LABELS))
  starred = [line.split("* ")[1] for line in lines if "* " in line]
  assert starred == [entry["label"] for each in entries for entry in each["tags"]]
  for start in (1, 2 + len(LABELS)):
    scores = [float(line.split()[0]) for line in lines[start:start + len(LABELS)]]
    assert scores == sorted(scores, reverse=True)


def draw_odd(folder):
  """Pictures of all modes and shapes, and one that is turned with its upright twin."""
  folder.mkdir()
  for mode in ("L", "RGBA", "CMYK", "P", "1"):
    spots(24, 20, 1).convert(mode).save(folder / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
  Image.fromarray(np.asarray(spots(24, 20, 2).convert("L")).astype(np.uint16) << 8).save(folder / "deep.png")
  spots(1, 30, 3).save(folder / "low.png")
  spots(3, 12000, 4).save(folder / "wide.png")
  exif = Image.Exif()
  exif[0x0112] = 6
  spots(20, 24, 5).save(folder / "turned.png", exif=exif)
  spots(20, 24, 5).transpose(Image.Transpose.ROTATE_270).save(folder / "upright.png")


def test_pictures_of_all_kinds(ask, tmp_path):
  draw_odd(tmp_path / "odd")
  status, out, wrong = ask(tmp_path / "odd", "--json", "--all")
  found = {each["file"].rpartition("/")[2]: each["scores"] for each in json.loads(out)}
  assert status == 0 and not wrong and len(found) == 10
  assert all(np.isfinite(list(scores.values())).all() for scores in found.values())
  assert found["turned.png"] == pytest.approx(found["upright.png"], abs=1e-5)


def test_damaged_pictures_are_named_and_the_others_done(ask, zoo, tmp_path):
  whole = (zoo / "b.jpg").read_bytes()
  (zoo / "b.jpg").write_bytes(whole[:len(whole) // 2])  # found when it is decoded
  (zoo / "c.png").write_text("no picture")  # found when its size is looked up
  status, out, wrong = ask(zoo, "--json")
  assert status == 1
  assert [line.split(" cannot be read (")[0] for line in wrong] == [
      f"error: {zoo / name}" for name in ("b.jpg", "c.png")]
  assert [each["file"] for each in json.loads(out)] == [str(zoo / name) for name in
                                                        ("a.png", "d.jpg", "deep/a.png", "e.png")]
  page = (tmp_path / "out" / "contact_sheet.html").read_text()
  assert "2 pictures could not be read" in page and page.count("<img") == 4
  (zoo / "b.jpg").write_bytes(whole)
  status, out, wrong = ask(zoo, "--json")
  assert len(wrong) == 1 and len(json.loads(out)) == 5
  assert ask(zoo / "c.png") == (1, "", wrong) and ask(zoo / "c.png", "--json")[:2] == (1, "[]\n")


def computed(monkeypatch):
  """Names of the pictures of each call that computes."""
  calls, compute = [], tag.compute
  monkeypatch.setattr(tag, "compute", lambda work, todo, records: calls.append(
      [path.name for path in todo]) or compute(work, todo, records))
  return calls


def test_finished_pictures_are_not_computed_again(ask, zoo, tmp_path, monkeypatch):
  calls = computed(monkeypatch)
  first = ask(zoo)
  assert ask(zoo) == first and len(calls) == 1
  spots(24, 20, 77).save(zoo / "d.jpg")
  changed = ask(zoo)
  assert calls[1:] == [["d.jpg"]] and changed != first
  spots(16, 28, 78).save(zoo / "f.png")
  assert ask(zoo)[1].startswith(changed[1])
  assert calls[2:] == [["f.png"]]
  assert len((tmp_path / "out" / "tags.jsonl").read_text().splitlines()) == 7


@pytest.mark.parametrize("half_a_line", [False, True])
def test_a_killed_run_goes_on(half_a_line, ask, zoo, tmp_path, monkeypatch):
  whole = ask(zoo, f"--out={tmp_path / 'whole'}")
  add = tag_records.Records.add

  def killed(records, *arguments):
    add(records, *arguments)
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(tag_records.Records, "add", killed)
    assert ask(zoo) == (130, "", ["stopped; the same command goes on where it was"])
  path = tmp_path / "out" / "tags.jsonl"
  kept = path.read_text().splitlines()
  assert 0 < len(kept) < 6
  if half_a_line:
    path.write_text("\n".join(kept)[:-30])
    kept.pop()
  calls = computed(monkeypatch)
  assert ask(zoo) == whole
  assert [len(names) for names in calls] == [6 - len(kept)]
  records = [{json.loads(line)["file"]: line for line in (tmp_path / out / "tags.jsonl").read_text().splitlines()}
             for out in ("whole", "out")]
  assert records[0] == records[1]


def test_other_settings_want_another_folder(ask, refused, zoo, tmp_path, model):
  ask(zoo)
  path = tmp_path / "out" / "tags.jsonl"
  kept = path.read_bytes()
  for change, said in (
      ("--labels=big dog,cat,small bicycle,sky", "background: without 'sky'; labels: with 'sky'"),
      ("--labels=cat,big dog,small bicycle", "labels: in another order"), ("--threshold=0.4", "threshold: 0.5 -> 0.4"),
      ("--template=a {name}", "templates: without 'a photo of a {name}' and with 'a {name}'"),
      ("--compat", "compat: False -> True"), ("--dtype=bfloat16", "dtype: 'float32' -> 'bfloat16'")):
    assert f"error: {path} was made with other settings ({said}): choose another --out, or" in refused(zoo, change)
  assert path.read_bytes() == kept
  weights = checkpoint.read_arrays(model / "model.safetensors")
  other = tmp_path / "other"
  other.mkdir()
  for name in ("config.json", "tokenizer.json", "preprocessor_config.json", "tokenizer_config.json"):
    (other / name).write_bytes((model / name).read_bytes())
  checkpoint.write_arrays(other / "model.safetensors", weights)
  assert "model: " in refused(zoo, f"--model={other}")  # files of the tokenizer differ
  for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
    (other / name).write_bytes((model / name).read_bytes())
  assert ask(zoo, f"--model={other}")[0] == 0  # the same model elsewhere
  (tmp_path / "out" / "tags_settings.json").unlink()
  assert "was made with other settings" in refused(zoo)


def test_wrong_commands(refused, zoo, tmp_path):
  assert refused(tmp_path / "none.jpg").startswith(f"error: there is no file or folder {tmp_path}/none.jpg")
  (tmp_path / "empty").mkdir()
  assert f"the folder {tmp_path}/empty holds no pictures (.bmp, " in refused(tmp_path / "empty")
  assert "--labels is ' , '; give labels with commas between" in refused(zoo, "--labels= , ")
  assert "labels must differ, in more than capitals too, but these do not: 'Cat', 'cat'" in refused(
      zoo, "--labels=cat,Cat")
  assert re.search(r"label 'big big .*' is too long: .* tokens, and this CLIP reads 14", refused(
      zoo, f"--labels=cat,{'big ' * 20}"))
  assert "--threshold is 1.5; it must be at least 0 and below 1" in refused(zoo, "--threshold=1.5")
  assert '--template is "photos"; it must be a template with {name} or one of the sets' in refused(
      zoo, "--template=photos")
  assert f"--labels-file: there is no file {tmp_path}/l.txt" in refused(zoo, f"--labels-file={tmp_path}/l.txt")
  (tmp_path / "l.txt").write_text("\n \n")
  assert f"--labels-file: {tmp_path}/l.txt is empty" in refused(zoo, f"--labels-file={tmp_path}/l.txt")
  (tmp_path / "l.txt").write_bytes(b"caf\xe9\n")
  assert f"--labels-file: {tmp_path}/l.txt is not UTF-8" in refused(zoo, f"--labels-file={tmp_path}/l.txt")
  assert f"could not write {zoo}/a.png/out/" in refused(zoo, f"--out={zoo}/a.png/out")
  assert refused(zoo, f"--model={tmp_path}/none").startswith(
      f"error: --model is '{tmp_path}/none', but there is no folder {tmp_path}/none. A checkpoint is a local")
  files.write_json(tmp_path / "vit" / "config.json", {"model_type": "vit"})
  checkpoint.write_arrays(tmp_path / "vit" / "model.safetensors", {"weights": np.zeros(2, np.float32)})
  assert f"--model: {tmp_path}/vit/config.json is of model_type 'vit', not 'clip': give a CLIP" in refused(
      zoo, f"--model={tmp_path}/vit")
  assert not (tmp_path / "out").exists()


def test_a_file_of_labels(ask, zoo, tmp_path):
  (tmp_path / "labels.txt").write_text("\ufeff" + "\n\n".join(LABELS) + "\n", encoding="utf-8")
  expected = ask(zoo, "--json", f"--out={tmp_path / 'words'}")
  assert ask(zoo, "--json", f"--labels-file={tmp_path / 'labels.txt'}") == expected


def choice(**flags):
  return tag.choose(types.SimpleNamespace(**dict(labels=None, labels_file=None, background=None, template=None,
                                                 model="some/clip") | flags))


def test_labels_and_their_background():
  coco, voc = label_lists.LISTS["coco"], label_lists.LISTS["voc"]
  tagclip85 = prompts.TEMPLATES["tagclip85"]
  assert choice(labels="coco") == (*coco, tagclip85)
  assert choice(labels="voc", background="coco") == (voc.names, coco.background, tagclip85)
  assert choice(labels="voc", background="") == (voc.names, (), tagclip85)
  assert choice(labels="coco", background="sea, sky") == (coco.names, ("sea", "sky"), tagclip85)
  assert choice(labels="dog") == (("dog",), coco.background, tagclip85)
  own = choice(labels="dog, Sky ,traffic_light,", template="the {name}")
  assert own.labels == ("dog", "Sky", "traffic_light") and own.templates == ("the {name}",)
  assert own.background == tuple(name for name in coco.background if name != "sky")
  assert choice(labels="plain gold ring", model="scenes") == (("plain gold ring",), (), (TEMPLATE,))
  assert choice(labels="scenes").labels == label_lists.LISTS["scenes"].names


def test_published_rules_of_coco_stuff(ask, zoo, tmp_path, monkeypatch):
  made = []
  monkeypatch.setattr(tag, "Tagger", lambda *arguments, **how: made.append(arguments[4]) or Tagger(*arguments, **how))
  monkeypatch.setattr(Rules, "for_layers", lambda layers, threshold, compat: Rules(layers - 2, 1, threshold, compat))
  monkeypatch.setitem(label_lists.LISTS, "coco_stuff", label_lists.LabelList(LABELS, ()))
  monkeypatch.setattr(tag.hub, "load", lambda kind, path, load=hub.load, **how: deeper(load(kind, path, **how)))
  assert ask(zoo / "a.png")[0] == ask(zoo / "a.png", "--labels=coco_stuff", f"--out={tmp_path}/stuff")[0] == 0
  assert made == [Rules(1, 1, 0.5, False), Rules(0, 1, 0.1, False)]


def deeper(model):
  """With a third layer, as the first of the two."""
  layers = model.vision_model.encoder.layers
  model.vision_model.encoder.layers = nnx.List([layers[0], *layers])
  return model


def test_batches_by_size(monkeypatch):
  monkeypatch.setattr(tag.jax, "local_device_count", lambda: 2)
  size = lambda *shapes: tag.batch([native.Bucket(rows, columns, np.arange(n)) for rows, columns, n in shapes])
  assert size((40, 40, 100)) == size((40, 60, 100)) == 1 and size((8, 8, 100)) == 25 and size((4, 4, 100)) == 32
  assert size((8, 8, 5), (4, 4, 3)) == 3 and size((8, 8, 100), (20, 20, 1)) == 4
  monkeypatch.setattr(tag.jax, "default_backend", lambda: "gpu")
  assert size((40, 40, 100)) == 8 and size((40, 40, 1)) == 1
