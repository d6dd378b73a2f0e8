"""TagCLIP's pictures a second: `python -m tests.oracle.bench_tagclip`.

ViT-B/16 with random weights, pictures of 480x640, COCO's 80 labels and 23 words of background, float32, rules as
published with their oversights. Three ways to the same scores, which must agree before they take turns:

  torch    one picture at a time, eager: weights of all heads, a loop over classes for the masks, one crop at a time
  single   one picture and one crop at a time by the functions of `models/tagclip.py`, compiled
  engine   `tagger.Tagger`

and `engine_bfloat16`, whose scores differ. CPU-seconds count all threads and bear with other work on the machine.
"""

import argparse
import json
import os
import time

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--images", type=int, default=6)
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch")
parser.add_argument("--pictures", type=int, default=1, help="of the engine at a time, for each device")
parser.add_argument("--crops", type=int, default=4, help="of the engine at a time, for each device")
parser.add_argument("--devices", type=int, default=2, help="into which the CPU is divided for the engine")
parser.add_argument("--keep_denormals", action="store_true", help="in PyTorch, as it comes")
options = parser.parse_args()

import jax

jax.config.update("jax_num_cpu_devices", options.devices)

import numpy as np
import scipy.ndimage
import torch
from flax import nnx
from torch.nn import functional as F

from digzsl_jax import tagger
from digzsl_jax.data import native
from digzsl_jax.models import cdm, clip, hub, tagclip
from tests import test_tagclip as small

CONFIG = {"text_config": small.TEXT, "projection_dim": 512, "vision_config": dict(patch_size=16)}
HEADS, LAYERS, SIDE, PATCH = 12, 12, 14, 16
LABELS, CLASSES, SIZE = 80, 103, (480, 640)
RULES = tagger.Rules(first_layer=8, votes=4, threshold=0.3, compat=True)  # two crops or so
PREPROCESS = cdm.Preprocess(224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class Eager:
  """The vision tower in PyTorch, positions `[l, d]` of one picture."""

  def __init__(self, model):
    tensors = {".".join(map(str, path)): torch.from_numpy(np.array(leaf[...]))
               for path, leaf in nnx.to_flat_state(nnx.state(model))}
    self.tensors = {name.removeprefix("vision_model."): value for name, value in tensors.items()}
    for name, value in self.tensors.items():
      if name.endswith("proj.kernel") or ".fc" in name and name.endswith("kernel") or "projection" in name:
        self.tensors[name] = value.T.contiguous()  # as `torch.nn.Linear` has it
    self.tensors["patch"] = self.tensors["embeddings.patch_embedding.kernel"].permute(3, 2, 0, 1).contiguous()
    for layer in range(LAYERS):
      for kind in ("kernel", "bias"):
        parts = [self.tensors[f"encoder.layers.{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
        self.tensors[f"{layer}.in.{kind}"] = torch.cat(parts)

  def linear(self, name, x):
    return F.linear(x, self.tensors[f"{name}.kernel"], self.tensors.get(f"{name}.bias"))

  def norm(self, name, x):
    return F.layer_norm(x, x.shape[-1:], self.tensors[f"{name}.scale"], self.tensors[f"{name}.bias"])

  def positions(self, rows, columns):
    own = self.tensors["embeddings.position_embedding.embedding"]
    grid = own[1:].reshape(1, SIDE, SIDE, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (rows, columns), mode="bilinear").half().float()
    return own if rows == columns == SIDE else torch.cat([own[:1], grid[0].flatten(1).T])

  def encode(self, image_1cij, bias_lm=None, last_alone=False):
    """Embeddings of all positions, of length 1, and the mean over heads of every layer's weights."""
    patches = F.conv2d(image_1cij, self.tensors["patch"], stride=PATCH)
    x_ld = torch.cat([self.tensors["embeddings.class_embedding"][None], patches[0].flatten(1).T])
    x_ld = self.norm("pre_layrnorm", x_ld + self.positions(*patches.shape[2:]))
    attention = []
    for layer in range(LAYERS):
      name = f"encoder.layers.{layer}"
      qkv = F.linear(self.norm(f"{name}.layer_norm1", x_ld), self.tensors[f"{layer}.in.kernel"],
                     self.tensors[f"{layer}.in.bias"])
      q, k, v = qkv.reshape(len(x_ld), 3, HEADS, -1).permute(1, 2, 0, 3)
      logits = (q * q.shape[-1]**-0.5) @ k.transpose(1, 2)
      weights = (logits if bias_lm is None else logits + bias_lm).softmax(-1)
      attention.append(weights.mean(0))
      if last_alone and layer == LAYERS - 1:
        weights = (logits - 100 * (1 - torch.eye(len(x_ld)))).softmax(-1)
      x_ld = x_ld + self.linear(f"{name}.self_attn.out_proj", (weights @ v).transpose(0, 1).flatten(1))
      inner = self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.layer_norm2", x_ld))
      x_ld = x_ld + self.linear(f"{name}.mlp.fc2", inner * torch.sigmoid(1.702 * inner))
    embeds = self.linear("visual_projection", self.norm("post_layernorm", x_ld))
    return embeds / embeds.norm(dim=-1, keepdim=True), attention

  def probabilities(self, embeds, text_kp):
    return (self.tensors["logit_scale"].exp() * embeds @ text_kp.T).softmax(-1)


def clipped_boxes(mask_ij, apart):
  """Boxes of connected parts, or one of all, without the last row and column; None where one is empty."""
  parts = scipy.ndimage.label(mask_ij, np.ones((3, 3)))[0] if apart else mask_ij.astype(int)
  found = [(part[0].start, part[1].start, *(min(side.stop, size - 1) for side, size in zip(part, mask_ij.shape)))
           for part in scipy.ndimage.find_objects(parts)]
  return None if not found or not apart and (found[0][0] == found[0][2] or found[0][1] == found[0][3]) else found


def unit(scores):
  scores = scores - scores.min()
  return scores / scores.max()


def refined_by_torch(coarse_lk, attention, rows, columns):
  """Scores of all classes, refined class by class."""
  patches = torch.stack([weights[1:, 1:] for weights in attention])
  counted = (patches > patches.mean((1, 2), keepdim=True)).sum(0) >= RULES.votes
  affinity = patches[RULES.first_layer:-1].mean(0) * counted
  spread, refined = affinity @ coarse_lk, []
  for k in range(CLASSES):
    shares = unit(spread[:, k].reshape(rows, columns)).numpy()
    mask = torch.zeros(rows, columns)
    for top, left, bottom, right in clipped_boxes(np.floor(shares * 255) > int(shares.mean() * 255), True) or []:
      mask[top:bottom, left:right] = 1
    refined.append((affinity * mask.reshape(1, -1)) @ coarse_lk[:, k])
  return torch.stack(refined, 1)


@torch.no_grad()
def by_torch(model, image_ijc, text_kp):
  """Scores of the labels of one picture, and how many crops were encoded."""
  mean_c, std_c = torch.tensor(PREPROCESS.mean), torch.tensor(PREPROCESS.std)
  image = ((torch.from_numpy(image_ijc) / 255 - mean_c) / std_c).permute(2, 0, 1)[None]
  rows, columns = (side // PATCH for side in image_ijc.shape[:2])
  embeds, attention = model.encode(image, last_alone=True)
  refined = refined_by_torch(model.probabilities(embeds[1:], text_kp), attention, rows, columns)
  scores = refined[:, :LABELS].max(0).values
  low, high = refined.min(), refined.max()
  looks = 0
  for label in torch.nonzero(scores > low + RULES.threshold * (high - low))[:, 0].tolist():
    mask = unit(refined[:, label].reshape(rows, columns)) > 0.5
    if not (found := clipped_boxes(mask.numpy(), False)):
      break
    top, left, bottom, right = found[0]
    part = image[..., top * PATCH:bottom * PATCH, left * PATCH:right * PATCH]
    crop = F.interpolate(part, (SIDE * PATCH,) * 2, mode="bilinear")
    seen = F.interpolate(mask[None, None, top:bottom, left:right].float(), (SIDE, SIDE), mode="nearest").flatten()
    bias_lm = torch.zeros(SIDE**2 + 1, SIDE**2 + 1)
    bias_lm[0, 1:] = tagclip.OUTSIDE * (1 - seen)
    again = model.probabilities(model.encode(crop, bias_lm)[0][0], text_kp)[label]
    scores[label] = (scores[label] + again) / 2
    looks += 1
  return scores.numpy(), looks


def one_by_one(model, text_kp):
  """`image_ijc -> scores_f` by compiled functions of `tagclip` on batches of one."""
  graphdef, state = nnx.split(model)

  @jax.jit
  def propose(state, image_ijc, grids_b2, text_kp):
    images_bijc = ((image_ijc / 255 - np.array(PREPROCESS.mean)) / np.array(PREPROCESS.std))[None].astype(np.float32)
    coarse, attention = tagclip.coarse_scores(nnx.merge(graphdef, state), images_bijc, grids_b2, text_kp)
    refined = tagclip.refine(coarse, attention, grids_b2, compat=True)
    return images_bijc, tagclip.propose(refined, grids_b2, LABELS, threshold=RULES.threshold, compat=True)

  look = jax.jit(lambda state, *inputs: tagclip.reidentify(nnx.merge(graphdef, state), *inputs))

  def run(image_ijc):
    grids_b2 = np.array([tagclip.grid(*image_ijc.shape[:2], PATCH)])
    images_bijc, proposals = propose(state, image_ijc, grids_b2, text_kp)
    scores_f = np.array(proposals.scores_bf[0])
    for label in np.nonzero(proposals.candidates_bf[0])[0]:
      again = look(state, images_bijc, proposals, np.zeros(1, int), np.array([label]), text_kp)
      scores_f[label] = (scores_f[label] + again[0]) / 2
    return scores_f
  return run


def engine_of(model, text_kp, read, buckets):
  engine = tagger.Tagger(model, PREPROCESS, text_kp, LABELS, RULES, pictures=options.pictures, crops=options.crops)

  def run():
    batches = list(engine.stream(read, buckets))
    return np.concatenate([batch.scores_bf for batch in batches])
  return run


def in_bfloat16(model):
  graphdef, state = nnx.split(hub.abstract(clip.CLIPModel, CONFIG, dtype="bfloat16"))
  return nnx.merge(graphdef, jax.tree.map(lambda leaf, wanted: leaf.astype(wanted.dtype), nnx.state(model), state))


def main():
  # Numbers of random weights' softmax, and of the mask of the last layer in any case, are too small for full precision,
  # which slows PyTorch down twofold; XLA takes them for 0.
  torch.set_flush_denormal(not options.keep_denormals)
  torch.set_num_threads(options.threads)
  model, rng = small.make_model(CONFIG, 100), np.random.default_rng(1)
  text_kp = rng.normal(size=(CLASSES, 512)).astype(np.float32)
  text_kp /= np.linalg.norm(text_kp, axis=1, keepdims=True)
  spots = rng.integers(0, 256, (options.images, SIZE[0] // 8, SIZE[1] // 8, 3), np.uint8)
  images = spots.repeat(8, axis=1).repeat(8, axis=2)
  read = native.ArrayPictures(images, PATCH)
  buckets = native.plan(read.grids_n2, 1)
  eager, text, single, looks = Eager(model), torch.from_numpy(text_kp), one_by_one(model, text_kp), []

  def by_eager():
    scores, counts = zip(*[by_torch(eager, image, text) for image in images])
    looks[:] = counts
    return np.stack(scores)

  ways = {"torch": by_eager, "single": lambda: np.stack([single(image) for image in images]),
          "engine": engine_of(model, text_kp, read, buckets),
          "engine_bfloat16": engine_of(in_bfloat16(model), text_kp, read, buckets)}
  found = {}
  for name, run in ways.items():
    before = time.perf_counter()
    found[name] = run()
    print(name, "first call", round(time.perf_counter() - before, 1), "s, largest difference",
          float(np.abs(found[name] - found["torch"]).max()), flush=True)
  assert all(np.abs(found[name] - found["torch"]).max() <= 1e-4 for name in ("single", "engine")), "scores differ"
  wall, cpu = ({name: [] for name in ways} for _ in range(2))
  for _ in range(options.rounds):
    for name, run in ways.items():
      before = time.perf_counter(), time.process_time()
      run()
      wall[name].append((time.perf_counter() - before[0]) / options.images)
      cpu[name].append((time.process_time() - before[1]) / options.images)
      print(name, f"{wall[name][-1]:.2f} s, {cpu[name][-1]:.2f} CPU-seconds a picture", flush=True)
  least = lambda times: {name: round(float(np.min(values)), 3) for name, values in times.items()}
  median = lambda times: {name: round(float(np.median(values)), 3) for name, values in times.items()}
  print(json.dumps({"images": options.images, "crops_per_image": float(np.mean(looks)), "threads": options.threads,
                    "keep_denormals": options.keep_denormals,
                    "devices": jax.device_count(), "pictures": options.pictures, "crops": options.crops,
                    "jax": jax.__version__, "torch": torch.__version__, "load": os.getloadavg()[0],
                    "seconds": median(wall), "least_seconds": least(wall), "cpu_seconds": median(cpu),
                    "least_cpu_seconds": least(cpu)}))


if __name__ == "__main__":
  main()
