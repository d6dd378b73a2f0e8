"""Stable Diffusion 1.5 and 2.1 at full size, random weights as PyTorch saves them: `verify`, and how loading goes.

Collected only with DIGZSL_FULL_SIZE=1: half an hour for each family on two cores, 5 GB of disk, 10 GiB of memory.

  DIGZSL_FULL_SIZE=1 python -m pytest tests/oracle/test_full_size.py -n 0 -s

A folder to keep: `python -c "from tests.oracle import test_full_size as t; t.write('sd15', 'FOLDER')"`.
"""

import json
import os
import pathlib
import threading
import time

import diffusers
import pytest
import torch
import transformers

from digzsl_jax.data import tokenizer
from digzsl_jax.models import hub, unet
from digzsl_jax.models.variants import VARIANTS
from digzsl_jax.verify import __main__ as verify

SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
FAMILIES = {  # names of the text tower and the denoiser in VARIANTS, and the shipped scheduler
  "sd15": ("sd15.text_encoder", "sd15.unet", diffusers.PNDMScheduler(**SCHEDULE, skip_prk_steps=True)),
  "sd21": ("sd21.text_encoder", "sd21-768.unet",
           diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False,
                                   prediction_type="v_prediction")),
}
WORDS = "a an of photo picture painting bird red blue small large with wings in the snow".split()


def write(family: str, folder: os.PathLike) -> None:
  """Random weights, perturbed so that no parameter is a neutral 0 or 1."""
  folder = pathlib.Path(folder)
  text, denoiser, scheduler = FAMILIES[family]
  config = lambda name: dict(VARIANTS[name].config)
  parts = {"unet": lambda: diffusers.UNet2DConditionModel(**config(denoiser)),
           "vae": lambda: diffusers.AutoencoderKL(**config("sd.vae")),
           "text_encoder": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**config(text)))}
  for name, make in parts.items():
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
      for parameter in model.parameters():
        parameter += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(folder / name, max_shard_size="20GB")
  scheduler.save_pretrained(folder / "scheduler")
  tokenizer.train_bpe(WORDS, folder / "tokenizer")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
  base = tmp_path_factory.mktemp(request.param)
  write(request.param, base)
  return base


def test_agrees_with_pytorch(folder, tmp_path):
  report = tmp_path / "report.json"
  # Latents of 64 x 64 for both, for time.
  verify.main(["--checkpoint", str(folder), "--size", "64", "--repeats", "0", "--report", str(report)])
  assert max(row[f"{side}_peak"] for row in json.loads(report.read_text()) for side in ("jax", "torch")) < 24


class Anonymous(threading.Thread):
  """Watches how much memory the process holds that is no file's, in GiB."""

  def __init__(self):
    super().__init__(daemon=True)
    self.first = self.peak = self.now()
    self.going = True

  def now(self) -> float:
    return int(pathlib.Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 2**20

  def run(self):
    while self.going:
      self.peak = max(self.peak, self.now())
      time.sleep(0.002)


def seconds_to_read(file: pathlib.Path) -> float:
  """Of all bytes into one buffer that is used again."""
  began, buffer = time.perf_counter(), memoryview(bytearray(2**24))
  with file.open("rb", buffering=0) as stream:
    while stream.readinto(buffer):
      pass
  return time.perf_counter() - began


def test_loads_quickly_and_once(folder):
  file = folder / "unet" / "diffusion_pytorch_model.safetensors"
  read = min(seconds_to_read(file) for _ in range(3))
  memory, began = Anonymous(), time.perf_counter()
  memory.start()
  model = hub.load(unet.UNet2DConditionModel, folder / "unet")
  seconds, memory.going = time.perf_counter() - began, False
  size = file.stat().st_size / 2**30
  print(f"read {read:.2f} s, load {seconds:.2f} s, {memory.peak - memory.first:.2f} GiB for {size:.2f} GiB")
  assert model.conv_in.kernel.shape == (3, 3, 4, 320)
  assert memory.peak - memory.first < 1.1 * size
