"""A run that is killed again and again ends as one that was left alone; stages are made once."""

import json
import os

import pytest

from digzsl_jax import logs
from digzsl_jax import main as command

pytestmark = pytest.mark.slow


class Killed(BaseException):
  """As sudden as a signal: nothing in the package catches it."""


def run(config, folder):
  command.METHODS["dig_zsl"](config.to_dict(), folder, logs.Log(folder), False)


def run_until(config, folder, writes, monkeypatch):
  """Runs until `writes` files have been written, then dies before the next one is in place."""
  left, replace = [writes], os.replace

  def replace_or_die(source, target):
    if left[0] == 0:
      raise Killed
    left[0] -= 1
    replace(source, target)

  with monkeypatch.context() as patch:
    patch.setattr(os, "replace", replace_or_die)
    with pytest.raises(Killed):
      run(config, folder)


def products(folder):
  """What has to be equal: tokens, images and results without times."""
  files = {path.relative_to(folder): path.read_bytes()
           for pattern in ("tokens/*_embeds.safetensors", "generate/**/*.png") for path in folder.glob(pattern)}
  results = json.loads((folder / "results.json").read_text())
  results.pop("seconds")
  return files, results


def last_stage(folder):
  """The stage that wrote last, "" where none has made anything."""
  made = [path for path in folder.glob("*/**/*") if path.is_file() and path.name != "inputs.json"]
  return max(made, key=lambda path: path.stat().st_mtime_ns).relative_to(folder).parts[0] if made else ""


def test_killed_at_six_moments(tiny_config, steps_once, tmp_path, monkeypatch):
  # Three rounds of classes, so refills are among the moments.
  tiny_config.tokens.update(images=1, slots=4, slots_per_body=4, learning_rate=0.03)
  tiny_config.mesh.devices = 1
  run(tiny_config, tmp_path / "whole")
  files, results = products(tmp_path / "whole")
  assert len(files) == 2 + 2 * 2 * 12 * 2 and results["czsl"]["T1"] >= 0
  last = []  # where each attempt died: before anything, in cdm, in both tasks' tokens, among images, in classifier
  for writes in (3, 11, 20, 14, 56, 85):
    run_until(tiny_config, tmp_path / "cut", writes, monkeypatch)
    last.append(last_stage(tmp_path / "cut"))
  assert last == ["", "cdm", "tokens", "tokens", "generate", "classifier"]
  run(tiny_config, tmp_path / "cut")
  assert products(tmp_path / "cut") == (files, results)
  before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").rglob("*")
            if path.suffix not in (".json", ".jsonl") and path.is_file()}
  run(tiny_config, tmp_path / "cut")
  assert before == {path: path.stat().st_mtime_ns for path in before}
  tiny_config.tokens.learning_rate = 0.5
  with pytest.raises(ValueError, match=r"tokens was made from other settings \(tokens.learning_rate: 0.03 -> 0.5\)"):
    run(tiny_config, tmp_path / "cut")
