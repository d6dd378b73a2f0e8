"""Sampling with reused deep features and guidance switched off, against the same rule walked in PyTorch.

`diffusers` has no such walk: here its UNet's layers are called one by one, as arXiv 2312.00858, section 3.3, describes,
and its schedulers make the steps.
"""

import jax
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from digzsl_jax import diffusion, shortcuts  # noqa: E402
from digzsl_jax.models import hub, unet  # noqa: E402
from tests.oracle.parity import to_numpy, to_torch  # noqa: E402
from tests.oracle.test_unet import CONFIGS, REFERENCE  # noqa: E402, F401, for the fixture `reference`

SCALE = 4.0
SCHEDULERS = {"ddim": diffusers.DDIMScheduler, "dpm++": diffusers.DPMSolverMultistepScheduler,
              "euler": diffusers.EulerDiscreteScheduler}
SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
                set_alpha_to_one=False, prediction_type="v_prediction")


def layers_of(net):
  """Functions `(x, temb, text)` of the way down, each of which puts out a skip, and `(x, skip, ...)` of the way up."""
  def attend(block, n, x, text):
    return block.attentions[n](x, encoder_hidden_states=text).sample if hasattr(block, "attentions") else x

  downs, ups = [], []
  for block in net.down_blocks:
    for n, resnet in enumerate(block.resnets):
      downs.append(lambda x, temb, text, block=block, n=n, resnet=resnet: attend(block, n, resnet(x, temb), text))
    for down in block.downsamplers or ():
      downs.append(lambda x, temb, text, down=down: down(x))
  for block in net.up_blocks:
    for n, resnet in enumerate(block.resnets):
      def up(x, skip, temb, text, block=block, n=n, resnet=resnet):
        x = attend(block, n, resnet(torch.cat([x, skip], 1), temb), text)
        for upsampler in block.upsamplers or () if n + 1 == len(block.resnets) else ():
          x = upsampler(x)
        return x
      ups.append(up)
  return downs, ups


def call(net, x, t, text, branch, kept):
  """The network's output; `kept`, a dictionary, gets the deep features or has them."""
  downs, ups = layers_of(net)
  temb = net.time_embedding(net.time_proj(torch.full((len(x),), float(t))))
  skips = [net.conv_in(x)]
  for down in downs[:branch]:
    skips.append(down(skips[-1], temb, text))
  if "deep" not in kept:
    own = list(skips)
    for down in downs[branch:]:
      own.append(down(own[-1], temb, text))
    x = net.mid_block(own[-1], temb, encoder_hidden_states=text)
    for up in ups[:len(ups) - branch - 1]:
      x = up(x, own.pop(), temb, text)
    kept["deep"] = x
  x = kept["deep"]
  for up in ups[len(ups) - branch - 1:]:
    x = up(x, skips.pop(), temb, text)
  return net.conv_out(net.conv_act(net.conv_norm_out(x)))


def walk(net, kind, noise, text, null, steps, cut, interval, branch):
  """Latents after `steps` calls; from call `cut` on without guidance."""
  scheduler = SCHEDULERS[kind].from_config(SCHEDULE)
  scheduler.set_timesteps(steps)
  x, wholes = noise * scheduler.init_noise_sigma, []
  for number, t in enumerate(scheduler.timesteps):
    since = number if number < cut else number - cut
    if since % interval == 0:
      kept = {}
      wholes.append(number)
    seen = scheduler.scale_model_input(x, t)
    if number < cut:
      without, with_text = call(net, torch.cat([seen, seen]), t, torch.cat([null, text]), branch, kept).chunk(2)
      output = without + SCALE * (with_text - without)
    else:
      output = call(net, seen, t, text, branch, kept)
    x = scheduler.step(output, t, x).prev_sample
  return x, wholes


def test_the_walk_is_the_network(reference):
  """Of `call`, with features of its own: what `diffusers` itself answers."""
  for name in ("sd15", "deep15"):
    theirs, _ = reference(name)
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 24)
    with torch.no_grad():
      whole = theirs(x, 17, text).sample
      for branch in (0, 1, len(layers_of(theirs)[0])):
        kept = {}
        for _ in range(2):  # the second time from what the first kept
          torch.testing.assert_close(call(theirs, x, 17, text, branch, kept), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, kind, steps, until, interval, branch, wholes", [
  ("sd15", "ddim", 5, 1.0, 2, 0, [0, 2, 4]),
  ("sd21", "dpm++", 7, 1.0, 3, 2, [0, 3, 6]),
  ("sd15", "euler", 6, 0.5, 2, 1, [0, 2, 3, 5]),
  ("deep15", "ddim", 4, 1.0, 4, 5, [0])])
def test_latents(reference, name, kind, steps, until, interval, branch, wholes):
  theirs, folder = reference(name)
  rng = np.random.default_rng(3)
  noise_bhwz, text_bld, null_bld = (rng.normal(size=shape).astype(np.float32)
                                    for shape in ((2, 8, 8, 4), (2, 7, 24), (2, 7, 24)))
  given = to_torch(noise_bhwz), torch.from_numpy(text_bld), torch.from_numpy(null_bld)
  with torch.no_grad():
    want, counted = walk(theirs, kind, *given, steps, round(until * steps), interval, branch)
    exact = walk(theirs, kind, *given, steps, steps, 1, 0)[0]
  assert counted == wholes
  schedule = diffusion.Schedule.from_config({"_class_name": SCHEDULERS[kind].__name__, **SCHEDULE})
  sampler, left_out = diffusion.make_sampler(schedule, steps), shortcuts.Shortcuts(until, interval, branch)
  graphdef, state = nnx.split(hub.load(unet.UNet2DConditionModel, folder))
  latents = jax.jit(lambda state, *given: shortcuts.sample(
    nnx.merge(graphdef, state), *given, SCALE, noise_bhwz, sampler, shortcuts=left_out))
  found_bhwz, want_bhwz = latents(state, text_bld, null_bld), to_numpy(want)
  scale, apart = np.abs(want_bhwz).max(), np.abs(to_numpy(exact) - want_bhwz).max()
  print(f"{name} {kind}: {np.abs(found_bhwz - want_bhwz).max():.1e} of {scale:.1f}; the exact lane is {apart:.1e} away")
  assert np.abs(found_bhwz - want_bhwz).max() <= 1e-5 * max(scale, 1) < 0.01 * apart
