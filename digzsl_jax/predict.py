"""Command line: `python -m digzsl_jax.predict --workdir=RUN PICTURE_OR_FOLDER...` names what pictures show.

It uses the test task's classifier of a finished run of DIG-ZSL and the frozen encoder whose features that was trained
on. The data set is not needed. Pictures are read as those of `data.pictures`, at the size of the run's own.

With `--among=all` seen and unseen classes compete, as in `results.json` under "gzsl": a class's score is its
probability, less lambda if it is seen (calibrated stacking, `metrics.py`), and lambda is the one that the run chose on
its validation classes. With `unseen` or `seen` only those classes are there, as under "czsl", and the score is the
probability. Probabilities are the softmax over the classes that compete; scores decide the order.

Shapes: n picture, i j c height, width and colour, b batch, f feature row, k class (seen, then unseen), t best class.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tqdm

from digzsl_jax import checkpoint, cli, files, metrics
from digzsl_jax.base_workspace import BATCH, LAYOUTS, check, resolve
from digzsl_jax.data import pictures
from digzsl_jax.models import cdm, clip, download, hub
from digzsl_jax.models.classifier import Classifier
from digzsl_jax.runs import evaluate


class Recogniser(NamedTuple):
  """What a finished run leaves for new pictures."""

  encoder: cdm.Encoder
  classifier: Classifier
  names_k: np.ndarray
  is_seen_k: np.ndarray
  size: int  # height and width of the run's own pictures
  lam: float  # chosen on validation classes


class Readable:
  """Picture files as `cdm.streamed` takes them, by slices; one that cannot be read is black, and noted.

  Attributes:
    wrong: what is wrong, by row.
  """

  def __init__(self, paths: Sequence[pathlib.Path], size: int):
    self.paths, self.size, self.wrong = paths, size, {}
    self._threads = concurrent.futures.ThreadPoolExecutor(os.cpu_count())

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, rows: slice) -> np.ndarray:
    return np.stack(list(self._threads.map(self._decode, range(len(self))[rows])))

  def _decode(self, row: int) -> np.ndarray:
    try:
      return pictures.decode(self.paths[row], self.size)
    except ValueError as error:
      self.wrong[row] = str(error)
      return np.zeros((self.size, self.size, 3), np.uint8)


def load(workdir: pathlib.Path, source: str = "learned") -> Recogniser:
  """Reads a finished run.

  Args:
    source: of the images of unseen classes that the classifier was trained on, one of `evaluate.METHODS`.

  Raises:
    ValueError: no finished run of this method, no such classifier in it, files that do not belong together, or an
      encoder that is absent or another than in training.
  """
  if not (workdir / "config.json").is_file():
    raise ValueError(f"{workdir} holds no run: it has no config.json; give the --workdir of digzsl_jax.main")
  checkpoint.check_method(workdir, "dig_zsl")
  if not files.read_json(workdir / "config.json")["cdm"]["encoder"]:
    raise ValueError(f"{workdir} was trained on features in place of images, and what made them is not known here")
  classifier = _finished(workdir, "classifier")
  measured = _finished(workdir, "evaluate", workdir / "results.json")
  if measured.inputs["stages"]["classifier"] != classifier.fingerprint:
    raise ValueError(f"{workdir}/results.json was measured with another classifier than {classifier.folder}; delete "
                     f"{measured.folder} and run stage evaluate again")
  folder = classifier.folder / f"test_{source}"
  if not folder.exists():
    there = sorted(path.name.removeprefix("test_") for path in classifier.folder.glob("test_*[a-z]"))
    raise ValueError(f"{workdir} has no classifier {source!r}; its data set allows --source={', '.join(there)}")
  stored, results = hub.read_json(folder / "config.json"), files.read_json(workdir / "results.json")
  if lacking := sorted({"seen", "size"} - set(stored)):
    raise ValueError(f"{folder}/config.json lacks {lacking}, which older versions did not write; delete "
                     f"{classifier.folder} and run that stage again")
  found = results if source == "learned" else results["baselines"][evaluate.METHODS[source]]
  names_k = np.array(stored["classes"])
  return Recogniser(_encoder(workdir, classifier.inputs), hub.load(Classifier, folder), names_k,
                    np.arange(len(names_k)) < stored["seen"], stored["size"], found["gzsl"]["lambda"])


def _finished(workdir: pathlib.Path, name: str, *more: pathlib.Path) -> checkpoint.Stage:
  """The stage `name` of a run; raises ValueError if it has not finished, or lacks one of the files `more`."""
  folder = workdir / name
  if not all(path.exists() for path in (folder / "done.json", *more)):
    raise ValueError(f"the run in {workdir} has not finished stage {name}; give its command of digzsl_jax.main again")
  return checkpoint.Stage(folder, files.read_json(folder / "inputs.json"))


def _encoder(workdir: pathlib.Path, inputs: dict) -> cdm.Encoder:
  """The encoder of the CDM; raises ValueError if it is not the one in the classifier's `inputs`."""
  config = files.read_json(workdir / "config.json")
  own = config["cdm"]["encoder"] == cdm.CLIP
  field, name = ("models.clip", config["models"]["clip"]) if own else ("cdm.encoder", config["cdm"]["encoder"])
  try:
    path = resolve(name, field)
  except ValueError as error:
    raise ValueError(f"{workdir}/config.json: {error}") from error
  known = inputs["models"]["clip"]["files"] if own else inputs["models"]["encoder"]
  if checkpoint.fingerprint_files(path, download.files(path, LAYOUTS[field.rpartition(".")[2]])) != known:
    raise ValueError(f"{path}, config.{field} of {workdir}/config.json, is not what the run's classifier was trained "
                     "with; put the old files back, or run anew in another --workdir")
  model = hub.load(clip.CLIPModel, path, dtype=inputs["dtype"]) if own else None
  return cdm.load_encoder(cdm.CLIP if own else path, model, path, dtype=inputs["dtype"])


def encode(encoder: cdm.Encoder, read: Readable) -> np.ndarray:
  """Feature rows `[n, f]`; a few pictures go in a batch of the next power of two."""
  batch = min(BATCH, 1 << (len(read) - 1).bit_length())
  found = []
  with tqdm.tqdm(total=len(read), desc="pictures", leave=False, dynamic_ncols=True, disable=None) as bar:
    for rows_bf in cdm.streamed(encoder, batch)(read):
      found.append(rows_bf)
      bar.update(len(rows_bf))
  return np.concatenate(found)


def best(logits_nk: np.ndarray, run: Recogniser, among: str, lam: float, top: int) -> list[list[dict]]:
  """For every picture the `top` classes by score, as the JSON has them; the module's docstring says what they are."""
  space_k = {"all": np.ones_like(run.is_seen_k), "seen": run.is_seen_k, "unseen": ~run.is_seen_k}[among]
  names_k, is_seen_k = run.names_k[space_k], run.is_seen_k[space_k]
  probabilities_nk = metrics.softmax(logits_nk[:, space_k])
  scores_nk = probabilities_nk - (lam * is_seen_k if among == "all" else 0)
  order_nt = np.argsort(-scores_nk, axis=1, kind="stable")[:, :top]  # of equals the first, as `argmax`
  return [[{"class": str(names_k[k]), "probability": float(probabilities_k[k]), "score": float(scores_k[k]),
            "seen": bool(is_seen_k[k])} for k in order_t]
          for probabilities_k, scores_k, order_t in zip(probabilities_nk, scores_nk, order_nt)]


def table(found: Sequence[dict]) -> str:
  """For people: under each file its best classes."""
  lines = ["probability    score  class"]
  for entry in found:
    lines.append(entry["file"])
    lines += [f"{each['probability']:11.4f} {each['score']:8.4f}  {each['class']}{'' if each['seen'] else ' (unseen)'}"
              for each in entry["top"]]
  return "\n".join(lines)


def predict(args: argparse.Namespace) -> int:
  """Prints what the command line asks for; returns the exit status, 1 if a picture could not be read."""
  if args.lam is not None:
    check(0 <= args.lam <= 1, "--lam", args.lam, "from 0 to 1")
    check(args.among == "all", "--among", args.among, "all with --lam, which weighs seen against unseen classes")
  paths = pictures.find(args.pictures)
  run = load(pathlib.Path(args.workdir).expanduser(), args.source)
  read = Readable(paths, run.size)
  logits_nk = run.classifier(encode(run.encoder, read))
  tops = best(np.asarray(logits_nk), run, args.among, run.lam if args.lam is None else args.lam, args.top)
  found = [{"file": str(path), "top": top} for row, (path, top) in enumerate(zip(paths, tops)) if row not in read.wrong]
  if found or args.json:
    print(json.dumps(found, indent=2) if args.json else table(found))
  for row in sorted(read.wrong):
    print(f"error: {read.wrong[row]}", file=sys.stderr)
  return 1 if read.wrong else 0


def parser() -> argparse.ArgumentParser:
  """The flags."""
  new = argparse.ArgumentParser(
      prog="python -m digzsl_jax.predict", description="Classifies pictures with a finished run of DIG-ZSL.",
      epilog="Printed are probability (softmax over the classes that compete) and score (the same, less lambda for "
      "seen classes where all compete), best score first. Pictures that cannot be read are named on stderr, the others "
      "are done, and the exit status is 1.")
  add = new.add_argument
  add("pictures", nargs="+", metavar="PICTURE_OR_FOLDER", help="of a folder all pictures below it")
  add("--workdir", required=True, help="of the run, as digzsl_jax.main had it")
  add("--source", choices=evaluate.METHODS, default="learned",
      help="which classifier: unseen classes from learnt tokens (default), plain names, drawn features or real images")
  add("--among", choices=("all", "unseen", "seen"), default="all", help="which classes compete; default all")
  add("--lam", type=float, help="lambda; by default what the run chose on its validation classes")
  add("--top", type=cli.at_least(1), default=5, help="classes to print for a picture; default 5")
  add("--json", action="store_true",
      help='print [{"file", "top": [{"class", "probability", "score", "seen"}, ...]}, ...]')
  return new


def main(arguments: Sequence[str]) -> int:
  """Runs the command line and returns its exit status."""
  args = parser().parse_args(arguments)
  cli.start()
  with cli.answer_in_one_line("nothing was classified"):
    return predict(args)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
