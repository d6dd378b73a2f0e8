"""Finds checkpoints: a local folder, or a repository of the Hugging Face hub, of which only what is read is fetched.

`huggingface_hub` does the work. Its cache (`HF_HOME`) and its offline mode (`HF_HUB_OFFLINE=1`) hold here too.
"""

import dataclasses
import errno
import functools
import glob
import os
import pathlib
from collections.abc import Callable, Collection, Mapping

from digzsl_jax.models import hub, single_file, taesd


@dataclasses.dataclass(frozen=True)
class Layout:
  """What is read of a checkpoint.

  Attributes:
    models: folders with a `config.json` and weights; "" is the checkpoint itself.
    extras: other files, each read if it is there.
    raw: files that are read in the place of all others where a checkpoint has them.
  """

  models: tuple[str, ...]
  extras: tuple[str, ...] = ()
  raw: tuple[str, ...] = ()


_TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")
STABLE_DIFFUSION = Layout(("text_encoder", "unet", "vae"),
                          ("scheduler/scheduler_config.json", *(f"tokenizer/{name}" for name in _TOKENIZER)))
CLIP = Layout(("",), (*_TOKENIZER, "preprocessor_config.json"))
ENCODER = Layout(("",), ("preprocessor_config.json",))  # an image model without a tokenizer
AUTOENCODER = Layout(("",), raw=taesd.RAW_FILES)
DENOISER = Layout(("",))


def _choose(names: Collection[str], layout: Layout, read_index: Callable[[str], Mapping], where: object) -> list[str]:
  """The files of a checkpoint that are read, among the `names` of all; `hub.weight_files` has the other arguments."""
  if layout.raw and set(layout.raw) <= set(names):
    return list(layout.raw)
  chosen = [name for name in layout.extras if name in names]
  for model in layout.models:
    prefix = f"{model}/" if model else ""
    inside = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    if "config.json" not in inside:
      raise hub.CheckpointError(f"{where} has no {prefix}config.json: the whole of a checkpoint is needed")
    weights = hub.weight_files([name for name in inside if "/" not in name],
                               lambda index, prefix=prefix: read_index(prefix + index), f"{where}/{model}".rstrip("/"))
    chosen += [prefix + name for name in ("config.json", *weights)]
  return chosen


def files(folder: os.PathLike, layout: Layout) -> list[str]:
  """The files of a local checkpoint that are read, by their names in the folder, a single file's in its own.

  Raises:
    CheckpointError: one that is needed is not there.
  """
  folder = pathlib.Path(folder)
  if folder.is_file():
    return [folder.name, *(name for name in layout.extras if (folder.parent / name).is_file())]
  parts = {*layout.models, *(os.path.dirname(name) for name in layout.extras)}
  names = {path.relative_to(folder).as_posix() for part in parts for path in (folder / part).glob("*")
           if path.is_file()}
  return _choose(names, layout, lambda index: hub.read_json(folder / index), folder)


def locate(name: str | os.PathLike, layout: Layout) -> pathlib.Path:
  """The local folder of a checkpoint, after fetching what lacks of one that is on the hub.

  Args:
    name: a local folder, which goes first, or `owner/name` or `owner/name@revision` of the hub, where a
      revision is a branch, tag or commit. For Stable Diffusion also a local `.safetensors` file.
    layout: what is needed of it.

  Raises:
    CheckpointError: there is none, it is not whole, or it could not be fetched; the message says what to do.
  """
  folder = pathlib.Path(name).expanduser()
  if folder.is_dir():
    files(folder, layout)
    return folder
  if layout is STABLE_DIFFUSION and single_file.is_single(folder):
    return folder
  repository, _, revision = os.fspath(name).partition("@")
  if repository.startswith((".", "~", "/")) or repository.count("/") != 1:
    raise hub.CheckpointError(f"there is no folder {folder}")
  return _fetch(repository, revision or "main", layout)


def _fetch(repository: str, revision: str, layout: Layout) -> pathlib.Path:
  import huggingface_hub  # its import takes a while that local folders need not wait for
  snapshot = functools.partial(huggingface_hub.snapshot_download, repository, revision=revision)

  def fetch(names: Collection[str]) -> pathlib.Path:
    try:
      return pathlib.Path(snapshot(allow_patterns=[glob.escape(name) for name in names]))
    except Exception as error:  # HTTP, sockets, disk: whatever it is, it ends the download
      raise hub.CheckpointError(_reason(error, repository, revision)) from error

  try:
    listing = huggingface_hub.HfApi().model_info(repository, revision=revision).siblings
  except Exception as error:  # whatever it is, a whole copy in the cache will do
    reason = _reason(error, repository, revision)
    try:
      cached = pathlib.Path(snapshot(local_files_only=True, allow_patterns=[]))
    except Exception:
      raise hub.CheckpointError(reason) from error
    try:
      files(cached, layout)
    except hub.CheckpointError as lacking:
      raise hub.CheckpointError(f"{reason}. What the cache has of it is not whole: {lacking}") from error
    return cached
  names = {file.rfilename for file in listing}
  wanted = _choose(names, layout, lambda index: hub.read_json(fetch([index]) / index), repository)
  folder = fetch(wanted)
  if absent := [name for name in wanted if not (folder / name).is_file()]:  # snapshot_download can pass over that
    raise hub.CheckpointError(f"could not fetch {', '.join(absent)} of {repository}: give the command again")
  return folder


def _reason(error: Exception, repository: str, revision: str) -> str:
  """What went wrong on the hub, and what to do."""
  from huggingface_hub import constants, errors
  if isinstance(error, errors.RepositoryNotFoundError):  # the hub says no more of private ones; or it is gated
    return (f"there is neither a local folder {repository} nor a repository {constants.ENDPOINT}/{repository} that you "
            "may read. Check the spelling; for a gated or private one accept its terms on that page, then run "
            "`hf auth login`")
  if isinstance(error, errors.RevisionNotFoundError):
    return f"repository {repository} has no revision {revision!r}: give one of its branches, tags or commits"
  if isinstance(error, errors.HFValidationError):
    return f"there is no folder {repository}, and that is no name of a repository on the hub ({error})"
  if isinstance(error, errors.OfflineModeIsEnabled):
    return (f"there is no local folder {repository}, and HF_HUB_OFFLINE forbids to fetch that repository, revision "
            f"{revision!r}: run once without it")
  full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
  if full or "no space left" in str(error).lower():
    return (f"no space left in {constants.HF_HUB_CACHE} for {repository}: free some, or set HF_HOME to a folder on "
            "another disk, and give the command again; files that are there whole are kept")
  said = (str(error).splitlines() or [""])[0]
  return (f"could not fetch {repository}, revision {revision!r}, from {constants.ENDPOINT} ({type(error).__name__}: "
          f"{said}). Check the network and give the command again; files that are there whole are kept")
