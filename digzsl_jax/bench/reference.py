"""The benches in PyTorch: `diffusers` and `transformers`, and the loops that people write around them.

A process of its own, which imports nothing of JAX's side: it computes once, leaves the answer, and then computes again
whenever a line comes in. `tokens` is a port of the loop of Discriminative Class Tokens (arXiv 2303.17155,
github.com/idansc/discriminative_class_tokens): one class after another, one picture at a time, both halves of the
guidance differentiated; but the gradient is clipped when it is there, as ours. Batched, it is what a PyTorch user would
write for speed: all classes and pictures at once, without gradient where none is needed.

Shapes: b row, c learnt class, k class, u one of some, l prompt position, d width, i j height and width, f feature,
n row of features.
"""

import contextlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator

# transformers and diffusers take it where it is installed, and PyPI's build does not load beside PyTorch for the CPU.
sys.modules["torchvision"] = None

import diffusers
import numpy as np
import torch
import torch._inductor.config
import transformers
from torch.nn import functional as F

from digzsl_jax import checkpoint, files
from digzsl_jax.bench.peers import MARK
from digzsl_jax.verify.parts import Memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCHEDULERS = {"ddim": diffusers.DDIMScheduler, "dpm++": diffusers.DPMSolverMultistepScheduler}
Call = Callable[[], dict[str, torch.Tensor | np.ndarray]]


class Given:
  """What the other side handed over."""

  def __init__(self, folder: pathlib.Path):
    self.folder, self.facts = folder, files.read_json(folder / "facts.json")
    self.arrays = checkpoint.read_arrays(folder / "inputs.safetensors")
    self.dtype = getattr(torch, self.facts["dtype"])

  def __getitem__(self, name: str) -> torch.Tensor:
    array = torch.from_numpy(self.arrays[name]).to(DEVICE)
    return array if array.dtype in (torch.int32, torch.int64, torch.uint8) else array.to(self.dtype)

  def channels_first(self, name: str) -> torch.Tensor:
    return self[name].movedim(-1, 1).contiguous()

  def model(self, kind: type, part: str):
    new = kind.from_pretrained(self.folder / part, torch_dtype=self.dtype, local_files_only=True)
    return new.eval().requires_grad_(False).to(DEVICE)

  def unet(self):
    unet = self.model(diffusers.UNet2DConditionModel, "unet")
    if self.facts.get("remat"):
      unet.enable_gradient_checkpointing()
      unet.train()  # else the switch has no effect; there is no dropout
    if not self.facts["compiled"]:
      return unet
    if DEVICE == "cpu":
      # In channels last, gradients that PyTorch 2.13.0 compiles for CPUs are wrong by 0.4 of their norm.
      torch._inductor.config.layout_optimization = False
    else:
      unet = unet.to(memory_format=torch.channels_last)
    return torch.compile(unet, mode="max-autotune")

  def vae(self):
    vae = self.model(diffusers.AutoencoderKL, "vae")
    return vae.to(memory_format=torch.channels_last) if self.facts["compiled"] else vae

  def scheduler(self):
    scheduler = SCHEDULERS[self.facts["sampler"]].from_config(self.facts["schedule"])
    scheduler.set_timesteps(self.facts["steps"], device=DEVICE)
    return scheduler


class Texts:
  """The text tower, with learnt vectors in prompts at ids beyond the vocabulary."""

  def __init__(self, given: Given):
    self.model = given.model(transformers.CLIPTextModel, "text_encoder")
    self.known = self.model.get_input_embeddings().num_embeddings

  def __call__(self, ids_bl: torch.Tensor, tokens_bnd: torch.Tensor | None = None) -> torch.Tensor:
    learnt_bl = ids_bl >= self.known
    with contextlib.ExitStack() as stack:
      if tokens_bnd is not None:
        put_in = lambda table, ids, embeds_bld: torch.where(learnt_bl[..., None], tokens_bnd, embeds_bld)
        stack.callback(self.model.get_input_embeddings().register_forward_hook(put_in).remove)
      return self.model(torch.where(learnt_bl, 0, ids_bl).long())[0]


def guided(unet, x, t, both_bld, scale: float) -> torch.Tensor:
  """Both halves of the guidance as one batch."""
  null, text = unet(torch.cat([x, x]), t, both_bld).sample.chunk(2)
  return null + scale * (text - null)


def denoiser(given: Given) -> Call:
  unet, x, text_bld = given.unet(), given.channels_first("latents"), given["text"]
  return torch.no_grad()(lambda: {"output": unet(x, given.facts["timestep"], text_bld).sample.movedim(1, -1)})


def generated(given: Given) -> Call:
  texts, unet, vae = Texts(given), given.unet(), given.vae()
  ids_bl, null_l, noise = given["ids"], given["null"], given.channels_first("noise")

  @torch.no_grad()
  def call():
    scheduler = given.scheduler()
    null_bld = texts(null_l[None]).expand(len(ids_bl), -1, -1)
    both_bld, x = torch.cat([null_bld, texts(ids_bl, given["tokens"])]), noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
      x = scheduler.step(guided(unet, x, t, both_bld, given.facts["guidance"]), t, x).prev_sample
    images = vae.decode(x / vae.config.scaling_factor).sample.clamp(-1, 1)
    return {"pixels": ((images.float() + 1) * 127.5).round().to(torch.uint8).movedim(1, -1).cpu()}
  return call


class Encoder:
  """CLIP's pooled state and unit embedding side by side, of images in [-1, 1]."""

  def __init__(self, given: Given):
    self.clip = given.model(transformers.CLIPModel, "clip")
    self.side = self.clip.config.vision_config.image_size

  def __call__(self, images: torch.Tensor) -> torch.Tensor:
    if images.shape[-1] != self.side:
      images = F.interpolate(images, (self.side, self.side), mode="bicubic", antialias=True)
    pooled_bd = self.clip.vision_model(images).pooler_output
    return torch.cat([pooled_bd, F.normalize(self.clip.visual_projection(pooled_bd).float(), dim=-1)], -1).float()


def features(given: Given) -> Call:
  encoder, images = Encoder(given), torch.from_numpy(given.arrays["images"])

  @torch.no_grad()
  def call():
    rows = [encoder(part.to(DEVICE).movedim(-1, 1).to(given.dtype) / 127.5 - 1).cpu()
            for part in images.split(given.facts["batch"])]
    return {"features": torch.cat(rows)}
  return call


class Head(torch.nn.Module):
  """The head of the category discrimination model."""

  def __init__(self, given: Given):
    super().__init__()
    self.residual = given.facts["head"] == "residual"
    for name in ("fc1", "fc2"):
      weight = torch.from_numpy(given.arrays[f"{name}.weight"].copy())
      layer = torch.nn.Linear(*weight.shape[::-1])
      layer.weight.data, layer.bias.data = weight, torch.from_numpy(given.arrays[f"{name}.bias"].copy())
      setattr(self, name, layer)
    self.to(DEVICE)

  def forward(self, features_bf: torch.Tensor) -> torch.Tensor:
    taken = self.fc2.out_features if self.residual else self.fc1.in_features
    x = features_bf[:, -taken:] if self.residual else features_bf[:, :taken]
    out = self.fc2(F.relu(self.fc1(x)))
    return x + out if self.residual else out


def cosine_loss(embeds_bp: torch.Tensor, prototypes_kp: torch.Tensor, labels_b: torch.Tensor,
                temperature: float, reduction: str = "mean") -> torch.Tensor:
  return F.cross_entropy(F.normalize(embeds_bp, dim=-1) @ prototypes_kp.T / temperature, labels_b, reduction=reduction)


def trained(parameters, objective: Callable[[int], torch.Tensor], facts: dict) -> list[torch.Tensor]:
  """AdamW with cosine decay to zero; the losses of all steps."""
  optimiser = torch.optim.AdamW(parameters, lr=facts["learning_rate"], weight_decay=facts["weight_decay"])
  decay = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: (1 + math.cos(math.pi * step / facts["steps"])) / 2)
  losses = []
  for step in range(facts["steps"]):
    loss = objective(step)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
    decay.step()
    losses.append(loss.detach())
  return losses


def head(given: Given) -> Call:
  """Rows come from a `DataLoader`, as loops are mostly written; batched, they are taken from tensors on the device."""
  features_nf, labels_n, prototypes_kp, rows_sb = (
      torch.from_numpy(given.arrays[name]) for name in ("features", "labels", "prototypes", "rows"))
  known, prototypes_kp = torch.utils.data.TensorDataset(features_nf, labels_n.long()), prototypes_kp.to(DEVICE)
  if given.facts["batched"]:
    tensors, rows_sb = [tensor.to(DEVICE) for tensor in known.tensors], rows_sb.long().to(DEVICE)
    batches = lambda: ([tensor[rows_b] for tensor in tensors] for rows_b in rows_sb)
  else:
    loader = torch.utils.data.DataLoader(known, batch_sampler=rows_sb.tolist())
    batches = lambda: ([tensor.to(DEVICE) for tensor in batch] for batch in loader)

  def call():
    model, rows = Head(given), batches()

    def objective(_):
      features_bf, labels_b = next(rows)
      return cosine_loss(model(features_bf), prototypes_kp, labels_b, given.facts["temperature"])
    return {"losses": torch.stack(trained(model.parameters(), objective, given.facts))}
  return call


def classifier(given: Given) -> Call:
  seen_nf, labels_n, unseen_srf, weight = (torch.from_numpy(given.arrays[name]).to(DEVICE)
                                           for name in ("seen", "labels", "unseen", "weight"))
  labels_n, facts = labels_n.long(), given.facts
  counts_k = torch.bincount(labels_n)
  weights_n, classes = 1 / counts_k[labels_n], len(counts_k) + facts["classes"]
  labels_r = len(counts_k) + torch.arange(facts["classes"], device=DEVICE).repeat_interleave(facts["images"])

  def one(unseen_rf: torch.Tensor) -> torch.Tensor:
    mean_f, std_f = seen_nf.mean(0), seen_nf.std(0, correction=0).clamp(min=1e-6)
    standard_nf, standard_rf = (seen_nf - mean_f) / std_f, (unseen_rf - mean_f) / std_f
    layer = torch.nn.Linear(*weight.shape[::-1], device=DEVICE)
    layer.weight.data, layer.bias.data = weight.clone(), torch.zeros(len(weight), device=DEVICE)

    def objective(step):
      seen = (weights_n * F.cross_entropy(layer(standard_nf), labels_n, reduction="none")).sum()
      return (seen + F.cross_entropy(layer(standard_rf), labels_r, reduction="sum") / facts["images"]) / classes
    return trained(layer.parameters(), objective, facts)[-1]

  return lambda: {"loss": torch.stack([one(unseen_rf) for unseen_rf in unseen_srf])}


def tokens(given: Given) -> Call:
  """The reference's loop, or where the other side asks for it all classes and pictures in one batch."""
  texts, unet, vae, encoder, facts = Texts(given), given.unet(), given.vae(), Encoder(given), given.facts
  judge, images = Head(given).requires_grad_(False), facts["images"]
  prototypes_kp = torch.from_numpy(given.arrays["prototypes"]).to(DEVICE)
  ids_kl, null_l, noise = given["ids"], given["null"], given.channels_first("noise")
  starts_knd = torch.from_numpy(given.arrays["tokens"]).to(DEVICE)
  classes_c = given["classes"].long()

  def pictures(x: torch.Tensor, text_bld: torch.Tensor) -> torch.Tensor:
    both_bld = torch.cat([texts(null_l[None]).expand(len(x), -1, -1), text_bld])
    x = sampled(unet, x, both_bld, facts, given.scheduler)
    return vae.decode(x / vae.config.scaling_factor).sample.clamp(-1, 1)

  def update(class_c: torch.Tensor, noises: torch.Tensor, at_once: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and gradients of classes, `at_once` pictures at a time."""
    token_cnd = torch.nn.Parameter(starts_knd[class_c].clone())
    optimiser, losses = torch.optim.AdamW([token_cnd], lr=facts["learning_rate"], weight_decay=0), []
    rows_b = torch.arange(len(class_c), device=DEVICE).repeat_interleave(images)
    for x, row_b in zip(noises.split(at_once), rows_b.split(at_once)):
      used_u, text_b = row_b.unique(return_inverse=True)  # a prompt is encoded once for its pictures
      text_bld = texts(ids_kl[class_c[used_u]], token_cnd[used_u].to(given.dtype))[text_b]
      embeds_bp = judge(encoder(pictures(x, text_bld)))
      loss_b = cosine_loss(embeds_bp, prototypes_kp, class_c[row_b], facts["temperature"], reduction="none")
      (loss_b.sum() / images).backward()
      losses.append(loss_b.detach())
    norm_c11 = token_cnd.grad.norm(dim=(1, 2), keepdim=True)
    token_cnd.grad *= (facts["clip_norm"] / (norm_c11 + 1e-6)).clamp(max=1)
    optimiser.step()
    return torch.cat(losses).view(-1, images).mean(1), token_cnd.grad

  def call():
    if facts["batched"]:
      loss_c, gradient_cnd = update(classes_c, noise, len(noise))
    else:
      made = [update(class_c, noises, 1) for class_c, noises in zip(classes_c.split(1), noise.split(images))]
      loss_c, gradient_cnd = map(torch.cat, zip(*made))
    return {"loss": loss_c, "gradient": gradient_cnd}
  return call


def apart(unet, x, t, both_bld, scale: float) -> torch.Tensor:
  """`guided`, with gradient through the prompt's half alone: exact through one call."""
  null_bld, text_bld = both_bld.chunk(2)
  with torch.no_grad():
    null = unet(x, t, null_bld).sample
  return null + scale * (unet(x, t, text_bld).sample - null)


def sampled(unet, x: torch.Tensor, both_bld: torch.Tensor, facts: dict, scheduler: Callable) -> torch.Tensor:
  """Latents, with gradient through the last calls alone."""
  scheduler = scheduler()
  walks = facts["gradient"] == "x0"  # by DDIM along a list of its own, then the direct prediction
  times = facts["timesteps"] if walks else scheduler.timesteps
  alphas = scheduler.alphas_cumprod.tolist()
  for call, t in enumerate(times):
    with torch.set_grad_enabled(call >= facts["cut"]):
      output = (apart if facts["batched"] and call >= facts["cut"] else guided)(unet, x, t, both_bld, facts["guidance"])
      if not walks:
        x = scheduler.step(output, t, x).prev_sample
        continue
      signal, spread = math.sqrt(alphas[t]), math.sqrt(1 - alphas[t])
      if scheduler.config.prediction_type == "v_prediction":
        clean, noise = signal * x - spread * output, spread * x + signal * output
      else:
        clean, noise = (x - spread * output) / signal, output
      if call == facts["cut"]:
        return clean
      after = alphas[times[call + 1]]
      x = math.sqrt(after) * clean + math.sqrt(1 - after) * noise
  return x


def fid(given: Given) -> Call:
  """As pytorch-fid and clean-fid do it."""
  import scipy.linalg
  sides = [given.arrays[name] for name in ("real", "made")]

  def call():
    (mean_a, cov_a), (mean_b, cov_b) = ((rows.mean(0, dtype=np.float64), np.cov(rows, rowvar=False)) for rows in sides)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    return {"distance": np.array([np.sum((mean_a - mean_b)**2) + np.trace(cov_a + cov_b - 2 * root)])}
  return call


BENCHES = {"tokens": tokens, "generate": generated, "features": features, "head": head, "classifier": classifier,
           "fid": fid, "unet": denoiser}


def to_numpy(value: torch.Tensor | np.ndarray) -> np.ndarray:
  return value if isinstance(value, np.ndarray) else value.detach().float().cpu().numpy()


def say(**said) -> None:
  print(MARK + json.dumps(said), flush=True)


def timed(call: Call) -> tuple[dict, float, float]:
  """`(answer, wall-clock seconds, CPU seconds)`."""
  wall, cpu = time.perf_counter(), time.process_time()
  answer = call()
  if DEVICE == "cuda":
    torch.cuda.synchronize()
  return answer, time.perf_counter() - wall, time.process_time() - cpu


def turns() -> Iterator[None]:
  for _ in sys.stdin:
    yield


def main() -> None:
  """`reference FOLDER`"""
  folder, memory = pathlib.Path(sys.argv[1]), Memory()
  given = Given(folder)
  torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = given.facts["compiled"]
  memory.reset()
  call = BENCHES[given.facts["bench"]](given)
  answer, first, _ = timed(call)
  checkpoint.write_arrays(folder / "answer.safetensors", {name: to_numpy(value) for name, value in answer.items()})
  on_device = DEVICE == "cuda"
  versions = {module.__name__: module.__version__ for module in (torch, diffusers, transformers, np)}
  say(versions=versions, first_call_seconds=first, threads=torch.get_num_threads(), cores=os.cpu_count(),
      peak_memory_gib=torch.cuda.max_memory_allocated() / 2**30 if on_device else None,
      peak_memory_source="torch.cuda.max_memory_allocated" if on_device else None, peak_rss_gib=memory.peak())
  for _ in turns():
    _, wall, cpu = timed(call)
    say(seconds=wall, cpu_seconds=cpu, peak_rss_gib=memory.peak())


if __name__ == "__main__":
  main()
