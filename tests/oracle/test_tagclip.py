"""TagCLIP at the size of CLIP ViT-B/16, all twelve layers and the published rules, stage by stage against the plain
derivation; random weights."""

import numpy as np
import pytest

from tests import plain_tagclip as plain
from tests import test_tagclip as small

VIT_B16 = {"text_config": small.TEXT, "projection_dim": 512, "vision_config": dict(patch_size=16)}
PIXELS = [(224, 224), (96, 160), (149, 77), (20, 380)]  # the model's own size, any, no whole patches, elongated
RULES = dict(first_layer=8, votes=4)


@pytest.fixture(scope="module")
def base():
  """Model, its plain twin, texts, and all stages of one padded batch."""
  model, text_kp = small.make_model(VIT_B16, 100), small.make_texts(512)
  images = [small.picture(*pixels, seed) for seed, pixels in enumerate(PIXELS)]
  out = small.run_all(model, images, 14, 24, text_kp, **RULES)
  return model, small.plain_model(model, VIT_B16), text_kp, out


@pytest.mark.parametrize("b", range(len(PIXELS)), ids=["x".join(map(str, pixels)) for pixels in PIXELS])
def test_every_stage(base, b):
  model, twin, text_kp, out = base
  own, (rows, columns) = small.part(out, b), out.grids[b]
  positions = small.positions_of(model, rows, columns)
  coarse, attention = plain.coarse_scores(twin, out.images[b], positions, text_kp)
  assert coarse.std(0).max() > 0.05  # patches differ
  small.close(own(out.coarse), coarse)
  for found, wanted in zip(small.attention_of(out, b), attention, strict=True):
    small.close(found, wanted)
  for compat in (False, True):
    refined = plain.refine(own(out.coarse), small.attention_of(out, b), rows, columns, compat=compat, **RULES)
    small.close(own(out.refined[compat]), refined)
    wanted = plain.candidates(own(out.refined[compat]), rows, columns, small.LABELS, small.THRESHOLD, compat)
    candidates = np.nonzero(out.proposals[compat].candidates_bf[b])[0]
    assert set(candidates) == set(wanted)
    for label, (mask, box) in wanted.items():
      assert tuple(out.proposals[compat].boxes_bf4[b, label]) == box
      probability = plain.reidentify(twin, out.images[b], mask, box, label, text_kp)
      small.close(out.looked[compat][b, label], probability)
