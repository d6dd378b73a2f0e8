"""One training step of CLIP-Decoder, ours and the same in PyTorch: `python -m tests.oracle.bench_clip_decoder`.

TResNet-M at 224 pixels, the zero-shot decoder of width 768 with 925 queries, asymmetric and CLIP loss, Adam and an
average of all weights, float32, dropout off in both. First the losses of equal weights must agree, then
steps alternate.
"""

import argparse
import json
import os
import time
import types

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--batch", type=int, default=56)
parser.add_argument("--labels", type=int, default=925)
parser.add_argument("--size", type=int, default=224)
parser.add_argument("--steps", type=int, default=3)
parser.add_argument("--threads", type=int, default=os.cpu_count())
options = parser.parse_args()

from tests.oracle import conftest  # before timm

# isort: split
import jax
import numpy as np
import timm.models.tresnet
import torch
from flax import nnx

from configs import nus_wide
from digzsl_jax import mesh
from digzsl_jax.models import clip_decoder as model
from digzsl_jax.models import hub, tresnet
from digzsl_jax.runs import clip_decoder
from tests.oracle import torch_ml_decoder
from tests.oracle.test_losses import reference

QUERY = 512
assert conftest.OPERATORS is not None or torch.version.cuda


class Theirs(torch.nn.Module):
  """The modules of timm and the losses, as PyTorch would have them."""

  def __init__(self):
    super().__init__()
    self.trunk = timm.models.tresnet.tresnet_m(num_classes=0)
    self.head = torch_ml_decoder.ZeroShot(QUERY)
    self.image_projection = torch.nn.Parameter(torch.randn(768, 512))
    self.text_projection = torch.nn.Parameter(torch.randn(QUERY, 512))
    self.temperature = torch.nn.Parameter(torch.tensor(0.1))

  def forward(self, images, queries, targets, captions):
    tokens = self.trunk.forward_features(images).flatten(2).transpose(1, 2)
    logits = self.head(tokens, queries)
    mean = torch.relu(self.head.embed_standart(tokens)).mean(1)
    unit = torch.nn.functional.normalize
    cosines = self.temperature.exp() * unit(mean @ self.image_projection) @ unit(captions @ self.text_projection).T
    own, loss = torch.arange(len(images)), torch.nn.functional.cross_entropy
    return reference(logits, targets, 4, 0, 0.05) + 0.1 * (loss(cosines, own) + loss(cosines.T, own)) / 2


def their_step(theirs, arrays):
  """`() -> loss`, an update with Adam, its schedule and the average."""
  decayed = [p for p in theirs.parameters() if p.ndim > 1]
  plain = [p for p in theirs.parameters() if p.ndim <= 1]
  adam = torch.optim.Adam([{"params": decayed, "weight_decay": 1e-2}, {"params": plain}], lr=1e-4)
  cycle = torch.optim.lr_scheduler.OneCycleLR(adam, 1e-4, total_steps=100, pct_start=0.2)
  average = {name: value.detach().clone() for name, value in theirs.state_dict().items()}

  def step():
    adam.zero_grad()
    loss = theirs(*arrays)
    loss.backward()
    adam.step()
    cycle.step()
    with torch.no_grad():
      for name, value in theirs.state_dict().items():
        average[name].copy_(0.9997 * average[name] + 0.0003 * value)
    return loss.item()
  return step


def our_step(theirs, batch, queries_kw):
  """The production update on the same weights."""
  section = dict(nus_wide.get_config().train.to_dict(), dropout=0.0, batch=options.batch)
  settings = clip_decoder.Settings(**section)
  tensors = {name: value.detach().numpy() for name, value in theirs.state_dict().items()}
  part = lambda prefix: {name[len(prefix):]: value for name, value in tensors.items() if name.startswith(prefix)}
  trunk = hub.fill(hub.abstract(tresnet.TResNet, tresnet.VARIANTS["M"]), part("trunk."), source="timm")
  head = {"inputs": 2048, "query_width": QUERY, "dropout": 0.0}
  ours = model.CLIPDecoder(None, head, QUERY, 512, 0.1, rngs=nnx.Rngs(0))
  ours.encoder = model.Tokens(trunk)
  hub.fill(ours.head, part("head."), source="torch")
  for name in ("image_projection", "text_projection"):
    getattr(ours, name)[...] = tensors[name]
  devices = mesh.make(0)
  ws = types.SimpleNamespace(seed=0, mesh=devices, trained=lambda path, value: isinstance(value, nnx.Param))
  trainer = clip_decoder.Trainer(settings, ours, 100, ws)
  state, place = trainer.start(), lambda x: jax.device_put(x, mesh.by_class(devices))
  batch, queries = jax.tree.map(place, batch), jax.device_put(queries_kw, mesh.replicated(devices))
  frozen = jax.device_put(trainer.frozen, mesh.replicated(devices))

  def step():
    nonlocal state
    state, found = trainer.update(state, frozen, batch, queries)
    return float(found["loss"])
  return step


def main():
  torch.set_num_threads(options.threads)
  torch.manual_seed(0)
  rng, b, k = np.random.default_rng(0), options.batch, options.labels
  images_bijc = rng.integers(0, 256, (b, options.size, options.size, 3), dtype=np.uint8)
  targets_bk = (rng.random((b, k)) < 0.01).astype(np.int8)
  queries_kw, captions_bx = (rng.normal(size=(n, QUERY)).astype(np.float32) for n in (k, b))
  theirs = Theirs().train()
  for module in theirs.modules():
    if isinstance(module, torch.nn.Dropout):
      module.p = 0.0
    if isinstance(module, torch.nn.MultiheadAttention):
      module.dropout = 0.0
  ours = our_step(theirs, clip_decoder.Batch(images_bijc, targets_bk, captions_bx), queries_kw)
  images = torch.from_numpy(np.moveaxis(images_bijc, -1, 1).astype(np.float32) / 255)
  steps = {"ours": ours, "torch": their_step(theirs, (images, *map(torch.from_numpy, (queries_kw, targets_bk,
                                                                                      captions_bx))))}
  begun = {name: time.perf_counter() for name in steps}
  losses = {}
  for name, step in steps.items():
    begun[name] = time.perf_counter()
    losses[name] = step()
    print(name, "first step", round(time.perf_counter() - begun[name], 1), "s, loss", losses[name], flush=True)
  assert abs(losses["ours"] / losses["torch"] - 1) < 1e-4, "the losses of equal weights differ"
  wall, cpu = ({name: [] for name in steps} for _ in range(2))
  for _ in range(options.steps):
    for name, step in steps.items():
      before = time.perf_counter(), time.process_time()
      step()
      wall[name].append(time.perf_counter() - before[0])
      cpu[name].append(time.process_time() - before[1])
  median = lambda times: {name: round(float(np.median(values)), 2) for name, values in times.items()}
  print(json.dumps({"batch": b, "labels": k, "size": options.size, "threads": options.threads, "jax": jax.__version__,
                    "torch": torch.__version__, "devices": jax.device_count(), "seconds": median(wall),
                    "cpu_seconds": median(cpu), "ratio": round(median(wall)["torch"] / median(wall)["ours"], 2)}))


if __name__ == "__main__":
  main()
