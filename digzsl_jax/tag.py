"""Command line: `python -m digzsl_jax.tag PICTURE_OR_FOLDER... --labels "dog,cat,bicycle"` says what pictures show.

TagCLIP (`tagger.py`) with labels that are chosen now: nothing is trained. Pictures keep their size, as far as
`data.native` does. Scores and tags are those of `models.tagclip`; a tag's score is above `min + threshold (max - min)`
of all labels of its picture, so every picture has at least one.

Labels compete with names of background, in a softmax over both for every patch.

Shapes: b picture of a batch, f label.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from digzsl_jax import checkpoint, cli, contact_sheet, label_texts, logs, mask_folder, mesh, tag_records
from digzsl_jax.base_workspace import EMBEDDED, check, locate
from digzsl_jax.contact_sheet import counted
from digzsl_jax.data import label_lists, native, pictures, prompts
from digzsl_jax.data.tokenizer import Tokenizer
from digzsl_jax.models import cdm, clip, download, hub, layers, tagclip
from digzsl_jax.segmenter import Segmenter
from digzsl_jax.tag_records import Records
from digzsl_jax.tagger import Rules, Tagger

DEFAULT = "openai/clip-vit-base-patch16"  # that of the paper
ALIASES = {"scenes": f"{EMBEDDED}scenes_tags/clip"}
STUFF = "coco_stuff"  # the list whose published rules differ: a lower threshold, and attention of all layers
BACKGROUND = "coco"  # whose list competes with labels in a person's own words
SHAPES, PER_SHAPE = 8, 32  # most padded shapes; one more pays off, in time of compiling, with so many pictures
LARGEST = native.MOST_PATCHES * 3 // 2  # of a padded shape: what attention needs grows with the square
BATCH = 32  # pictures that a device takes at a time, if they are small
CROPS = 4  # for each of them
DIGITS = 6  # of a score in files and JSON


class Choice(NamedTuple):
  """What pictures are compared with."""

  labels: tuple[str, ...]
  background: tuple[str, ...]
  templates: tuple[str, ...]


class Readable(native.NativePictures):
  """Picture files of any size; one that cannot be read is black, and noted.

  Attributes:
    wrong: what is wrong, by file.
  """

  def __init__(self, paths: Sequence[pathlib.Path], patch: int):
    super().__init__(pathlib.Path(), [pictures.File(str(path), b"") for path in paths], patch)
    self.wrong = {}

  def _size(self, file: pictures.File) -> tuple[int, int]:
    try:
      return super()._size(file)
    except ValueError as error:
      self.wrong[file.path] = str(error)
      return 1, 1

  def pixels(self, row: int) -> np.ndarray:
    path, shape = self.files[row].path, tuple(self.patch * self.grids_n2[row])
    if path not in self.wrong:
      try:
        pixels_hwc = super().pixels(row)
        if pixels_hwc.shape[:2] == shape:
          return pixels_hwc
        self.wrong[path] = f"{path} changed while it was read; give the command again"
      except ValueError as error:
        self.wrong[path] = str(error)
    return np.zeros((*shape, 3), np.uint8)


def read_labels(path: pathlib.Path) -> tuple[str, ...]:
  """A label a line.

  Raises:
    ValueError: there is no such file, it is no text, or there are only empty lines in it.
  """
  try:
    lines = path.read_text(encoding="utf-8-sig").splitlines()
  except FileNotFoundError as error:
    raise ValueError(f"--labels-file: there is no file {path}") from error
  except UnicodeDecodeError as error:
    raise ValueError(f"--labels-file: {path} is not UTF-8 text: save it as such, a label a line") from error
  if not (found := tuple(line.strip() for line in lines if line.strip())):
    raise ValueError(f"--labels-file: {path} is empty; write a label a line")
  return found


def _split(text: str) -> tuple[str, ...]:
  return tuple(word.strip() for word in text.split(",") if word.strip())


def choose(args: argparse.Namespace) -> Choice:
  """Labels, background and prompts that the command line asks for.

  Raises:
    ValueError: no labels, or a template that is none.
  """
  lists, small = label_lists.LISTS, args.model in ALIASES
  labels = read_labels(pathlib.Path(args.labels_file)) if args.labels_file else (
      lists[args.labels].names if args.labels in lists else _split(args.labels))
  if not labels:
    raise ValueError(f"--labels is {args.labels!r}; give labels with commas between them, or one of the lists "
                     f"{', '.join(lists)}")
  rest = args.background
  if rest is None:
    rest = args.labels if args.labels in lists else "" if small else BACKGROUND
  background = lists[rest].background if rest in lists else _split(rest)
  template = args.template or ("a photo of a {name}" if small else "tagclip85")
  return Choice(labels, prompts.beside(background, labels), prompts.templates(template, field="--template"))


def find_model(name: str) -> pathlib.Path:
  """The folder of the CLIP that `--model` names; raises ValueError if there is none, or it is no CLIP."""
  path = locate(ALIASES.get(name, name), download.CLIP, "--model")
  kind = hub.read_json(path / "config.json").get("model_type")
  if kind != "clip":
    raise ValueError(f"--model: {path / 'config.json'} is of model_type {kind!r}, not 'clip': give a CLIP with both of "
                     "its towers")
  return path


@dataclasses.dataclass
class Work:
  """What is computed with; the model is loaded when there is something to do.

  Attributes:
    path: of the model.
  """

  args: argparse.Namespace
  choice: Choice
  path: pathlib.Path
  words: Tokenizer
  log: logs.Log

  @functools.cached_property
  def key(self) -> str:
    """Fingerprint of the model."""
    return checkpoint.fingerprint_files(self.path, download.files(self.path, download.CLIP))

  @functools.cached_property
  def model(self) -> clip.CLIPModel:
    self.log.say(f"loading {self.args.model}")
    return hub.load(clip.CLIPModel, self.path, dtype=self.args.dtype)

  @property
  def layers(self) -> int:
    return len(self.model.vision_model.encoder.layers)

  @property
  def preprocess(self) -> cdm.Preprocess:
    return cdm.Preprocess.from_folder(self.path, self.model.vision_model.image_size)

  def texts(self, names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
    """Embeddings `[k, p]` of labels and background."""
    cache = pathlib.Path(self.args.cache).expanduser() if self.args.cache else None
    return label_texts.of_labels(self.model, self.words, names, templates, key=self.key, cache=cache,
                                 progress=lambda count: self.log.progress(count, "texts"))

  def read(self, paths: Sequence[pathlib.Path]) -> tuple[Readable, list[native.Bucket]]:
    """Pictures, and the shapes that they are padded to."""
    read = Readable(paths, self.model.vision_model.embeddings.patch_size)
    return read, native.plan(read.grids_n2, min(SHAPES, 1 + len(paths) // PER_SHAPE), LARGEST)


def batch(buckets: Sequence[native.Bucket]) -> int:
  """Pictures that a device takes at a time: few if they are few or large, on a CPU one as large as may be."""
  patches = native.MOST_PATCHES * (1 if jax.default_backend() == "cpu" else 8)
  largest = max(bucket.rows * bucket.columns for bucket in buckets)
  needed = -(-max(len(bucket.members) for bucket in buckets) // jax.local_device_count())
  return max(1, min(BATCH, patches // largest, needed))


def compute(work: Work, todo: Sequence[pathlib.Path], records: Records) -> dict[str, str]:
  """Adds a record of every picture that can be read; returns what is wrong with the others."""
  states = [tag_records.state(path) for path in todo]
  choice, threshold = work.choice, work.args.threshold
  text_kp = work.texts((*choice.labels, *choice.background), choice.templates)
  rules = Rules.for_layers(work.layers, threshold, work.args.compat)
  if work.args.labels == STUFF:
    rules = rules._replace(first_layer=0)
  read, buckets = work.read(todo)
  size = batch(buckets)
  engine = Tagger(work.model, work.preprocess, text_kp, len(choice.labels), rules, pictures=size, crops=CROPS * size)
  work.log.say(f"tagging in {counted(len(buckets), 'padded shape')}, each compiled first, on "
               f"{logs.devices(jax.local_devices())}")
  with work.log.progress(len(todo), "pictures") as bar:
    for scored in engine.stream(read, buckets):
      said_bf = np.asarray(tagclip.tags(scored.scores_bf, threshold))
      records.add(record(todo[row], states[row], choice.labels, *results)
                  for row, *results in zip(scored.rows_b.tolist(), scored.scores_bf, said_bf)
                  if str(todo[row]) not in read.wrong)
      bar.update(len(scored.rows_b))
  return read.wrong


def mask_texts(work: Work) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """`(names, templates)` of labels and background for masks: published ones where those of the tags are."""
  args, choice = work.args, work.choice
  own = args.background is not None or args.labels not in label_lists.CLS_SEG
  names = mask_folder.names(args.labels, choice.labels, choice.background if own else None)
  published = choice.templates == prompts.TEMPLATES["tagclip85"]
  return names, prompts.TEMPLATES["origami"] if published else choice.templates


def masks_folder(work: Work, settings: Mapping, paths: Sequence[pathlib.Path]) -> mask_folder.Masks:
  """Takes the folder for masks; raises ValueError where it is of no use."""
  args, folder = work.args, pathlib.Path(work.args.masks).expanduser()
  for given in map(pathlib.Path, args.pictures):
    if given.is_dir() and folder.resolve().is_relative_to(given.resolve()):
      raise ValueError(f"--masks: {folder} is in {given}, where masks would be taken for pictures later: choose "
                       "a folder outside")
  told = dict(zip(("mask_names", "mask_templates"), mask_texts(work)))
  return mask_folder.Masks(folder, {**settings, **told, "crf": args.crf}, paths, work.choice.labels,
                           args.labels not in mask_folder.COVERED, args.crf)


def mask(work: Work, masks: mask_folder.Masks, found: Sequence[Mapping]) -> None:
  """Makes the masks of pictures with tags that are not there."""
  tags = {each["file"]: {entry["label"] for entry in each["tags"]} for each in found}
  if not (todo := masks.begin([pathlib.Path(file) for file in tags])):
    return
  labels = work.choice.labels
  rules = mask_folder.rules(work.args.labels, work.layers, work.args.compat)
  read, buckets = work.read(todo)
  engine = Segmenter(work.model, work.preprocess, work.texts(*mask_texts(work)), len(labels), rules,
                     pictures=batch(buckets))
  tags_nf = np.array([[label in tags[str(path)] for label in labels] for path in todo])
  work.log.say(f"masks of {counted(len(todo), 'picture')}")
  with work.log.progress(len(todo), "masks") as bar:
    masks.write(engine.stream(read, buckets, tags_nf), read, todo, bar.update)


def record(path: pathlib.Path, state: Sequence[int], labels: Sequence[str], scores_f: np.ndarray,
           said_f: np.ndarray) -> dict:
  """As `tags.jsonl` has it; tags by score, of equals the first label first."""
  scores = {label: round(float(score), DIGITS) for label, score in zip(labels, scores_f)}
  order_f = np.argsort(-scores_f, kind="stable")
  return {"file": str(path), "bytes": state[0], "modified": state[1],
          "tags": [{"label": labels[f], "score": scores[labels[f]]} for f in order_f if said_f[f]], "scores": scores}


def table(found: Sequence[Mapping], everything: bool) -> str:
  """For people: under each file its tags, best first; or all labels, of which tags have a star."""
  lines = []
  for each in found:
    lines.append(os.fsencode(each["file"]).decode(errors="backslashreplace"))
    tags = {entry["label"]: entry["score"] for entry in each["tags"]}
    if everything:
      others = sorted(each["scores"].items() - tags.items(), key=lambda pair: -pair[1])
      lines += [f"{score:9.4f} {'*' if label in tags else ' '} {label}" for label, score in [*tags.items(), *others]]
    else:
      lines += [f"{score:9.4f}  {label}" for label, score in tags.items()]
  return "\n".join(lines)


def as_json(found: Sequence[Mapping], everything: bool) -> str:
  """For programs: `[{"file", "tags", "mask" if there is one, "scores" if everything}, ...]`."""
  fields = ("file", "tags", "mask", *(["scores"] if everything else []))
  return json.dumps([{field: each[field] for field in fields if field in each} for each in found], indent=2)


def prepare(args: argparse.Namespace, log: logs.Log) -> Work:
  """Everything that is read before a model is loaded; raises ValueError for what cannot work."""
  if args.threshold is None:
    args.threshold = 0.1 if args.labels == STUFF else 0.5
  check(0 <= args.threshold < 1, "--threshold", args.threshold, "at least 0 and below 1")
  choice, path = choose(args), find_model(args.model)
  words = Tokenizer.from_folder(path)
  label_texts.check((*choice.labels, *choice.background), choice.templates, words)
  work = Work(args, choice, path, words, log)
  check(bool(args.masks) or not args.crf, "--crf", args.crf, "given with --masks alone")
  if args.masks:
    label_texts.check(*mask_texts(work), words)
  return work


def run(args: argparse.Namespace) -> int:
  """Tags what the command line asks for; returns the exit status, 1 if a picture could not be read."""
  log, out = logs.Log(None), pathlib.Path(args.out).expanduser()
  paths = list(dict.fromkeys(pictures.find(args.pictures)))
  work = prepare(args, log)
  choice = work.choice
  settings = choice._asdict() | {"model": {"name": args.model, "files": work.key}, "dtype": args.dtype,
                                 "threshold": args.threshold, "compat": args.compat, "all_layers": args.labels == STUFF}
  records = Records(out, settings, stem="tags", flag="--out")
  masks = args.masks and masks_folder(work, settings, paths)
  todo = records.begin(paths)
  log.say(f"{counted(len(paths), 'picture')}, {len(paths) - len(todo):,} of them done before; "
          f"{counted(len(choice.labels), 'label')}, {counted(len(choice.background), 'name')} of background, "
          f"{counted(len(choice.templates), 'prompt')} of each")
  wrong = compute(work, todo, records) if todo else {}
  found = [records.done[str(path)] for path in paths if str(path) in records.done]
  if masks:
    mask(work, masks, found)
    wrong |= masks.wrong
    found = [each | {"mask": str(masks.mask(masks.stem[each["file"]]))} if masks.shown(each["file"]) else each
             for each in found]
  wrong = {str(path): wrong[str(path)] for path in paths if str(path) in wrong}
  sheet = contact_sheet.write(
      out, [contact_sheet.Shown(each["file"], [entry["label"] for entry in each["tags"]], each["scores"],
                                masks and masks.shown(each["file"]) or None) for each in found],
      wrong, facts(args, choice), lambda count: log.progress(count, "contact sheet"))
  log.say(f"{counted(len(found), 'picture')} with tags in {records.path}; to look at: {sheet}")
  if found or args.json:
    print((as_json if args.json else table)(found, args.all))
  for said in wrong.values():
    print(f"error: {said}", file=sys.stderr)
  return 1 if wrong else 0


def facts(args: argparse.Namespace, choice: Choice) -> list[tuple[str, object]]:
  """What the contact sheet says of settings."""
  prompt = repr(choice.templates[0]) if len(choice.templates) == 1 else f"{len(choice.templates)} of each name"
  return [("model", args.model), ("labels", len(choice.labels)), ("names of background", len(choice.background)),
          ("prompts", prompt), ("threshold", args.threshold)]


def parser() -> argparse.ArgumentParser:
  """The flags."""
  new = argparse.ArgumentParser(
      prog="python -m digzsl_jax.tag", description="Tags pictures with labels in your own words, by TagCLIP.",
      epilog="The folder --out gets tags.jsonl and contact_sheet.html. The same command again does what is not done "
      "yet. Pictures that cannot be read are named on stderr, the others are done, and the exit status is 1.")
  add, lists = new.add_argument, ", ".join(label_lists.LISTS)
  add("pictures", nargs="+", metavar="PICTURE_OR_FOLDER", help="of a folder all pictures below it")
  which = new.add_mutually_exclusive_group(required=True)
  which.add_argument("--labels", help=f'labels with commas between them, as "dog,cat,bicycle", or a list: {lists}')
  which.add_argument("--labels-file", metavar="FILE", help="text file with a label in every line")
  add("--background", metavar="WORDS", help="what else pictures show: names with commas between them, those of a list "
      f'({lists}), or "" for none; default those of the list of --labels, of {BACKGROUND} for labels in your own words')
  add("--model", default=DEFAULT, help=f"a CLIP: local folder, owner/name of the hub, or {', '.join(ALIASES)}, a small "
      f"one that knows nothing but rendered scenes; default {DEFAULT}")
  add("--template", help='prompt with {name}, or one of the sets ' + ", ".join(prompts.TEMPLATES) + "; default "
      'tagclip85')
  add("--threshold", type=float, help="a tag's least place between lowest and highest score; default 0.5, and 0.1 with "
      f"--labels {STUFF}, as published")
  add("--compat", action="store_true", help="as the released code of the paper where that looks like an oversight")
  add("--dtype", choices=layers.DTYPES, default="float32", help="of the computation; default float32")
  add("--out", default="tags", help="folder for results; default tags")
  add("--masks", metavar="DIR", help="also write masks there: of every picture <name>.png, its numbers those of "
      "labels.txt, and <name>.overlay.png")
  add("--crf", action="store_true", help="refine masks by a CRF; needs pip install 'digzsl_jax[crf]'")
  add("--cache", default=label_texts.CACHE, help="folder that keeps embeddings of labels for other "
      f'calls, "" for none; default {label_texts.CACHE}')
  add("--all", action="store_true", help="print the scores of all labels")
  add("--json", action="store_true", help='print [{"file", "tags": [{"label", "score"}, ...]}, ...], with "mask" and '
      '"scores" where --masks and --all are given')
  return new


def main(arguments: Sequence[str]) -> int:
  """Runs the command line and returns its exit status."""
  args = parser().parse_args(arguments)
  warnings.filterwarnings("ignore", module=r"PIL\.")  # on large or odd pictures, which are read all the same
  mesh.divide_cpu()
  cli.start()
  try:
    with cli.answer_in_one_line("finished pictures are kept"):
      return run(args)
  except KeyboardInterrupt:
    print("stopped; the same command goes on where it was", file=sys.stderr)
    return 130


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
