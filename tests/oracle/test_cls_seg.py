"""CLS-SEG against PyTorch's autograd and SciPy's connected parts, at ViT-B/16's width."""

import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax
import scipy.ndimage
from flax import nnx

from digzsl_jax.models import clip, clip_patches, cls_seg, hub

TEXT = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            max_position_embeddings=4, bos_token_id=6, eos_token_id=7)
VISION = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=4, num_attention_heads=12, image_size=224,
              patch_size=16)
CLASSES, LABELS, LAYERS = 8, 4, (1, 3)
GRIDS = np.array([[14, 14], [6, 10], [3, 12]])  # of the batch: 14 x 14
PAIRS = [(0, 1), (0, 2), (1, 0), (2, 3), (2, 1)]
ALLOWED = np.array([[k >= LABELS or (b, k) in PAIRS for k in range(CLASSES)] for b in range(len(GRIDS))])


def random_clip():
  """Attends sharply, as trained models do, and its patches differ."""
  config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION | {"attn_implementation": "eager"},
                                   projection_dim=512)
  model = transformers.CLIPModel(config).eval()
  model.set_attn_implementation("eager")
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if parameter.ndim > 1:
        spread = 0.3 if "position" in name else parameter[0].numel()**-0.5 * (4 if "q_proj" in name else 1)
        parameter.normal_(0, spread)
      elif parameter.ndim:
        parameter.normal_(float("norm" in name and "weight" in name), 0.2)
    model.logit_scale.fill_(float(np.log(100)))
  return model


def their_hidden(model, image_ijc, positions_ld):
  """Hidden states before the last layer and every layer's weights from patch to patch."""
  tower = model.vision_model
  patches = tower.embeddings.patch_embedding(torch.from_numpy(image_ijc).permute(2, 0, 1)[None]).flatten(2)
  x = torch.cat([tower.embeddings.class_embedding.reshape(1, 1, -1), patches.transpose(1, 2)], 1)
  x = tower.pre_layrnorm(x + torch.from_numpy(positions_ld))
  attention = []
  for layer in tower.encoder.layers:
    hidden = x
    weights = layer.self_attn(layer.layer_norm1(x), attention_mask=None)[1]
    attention.append(weights[0].mean(0)[1:, 1:])
    x = layer(x, attention_mask=None)
    x = x[0] if isinstance(x, tuple) else x
  return hidden, attention


def their_cam(model, hidden, text, allowed, label):
  """Gradients by a hook on the first norm's output, as Grad-CAM's libraries take them."""
  tower, kept = model.vision_model, {}
  layer = tower.encoder.layers[-1]

  def keep(_, __, output):
    output.retain_grad()
    kept["activations"] = output

  handle = layer.layer_norm1.register_forward_hook(keep)
  x = layer(hidden.detach().requires_grad_(), attention_mask=None)
  handle.remove()
  x = x[0] if isinstance(x, tuple) else x
  embedding = model.visual_projection(tower.post_layernorm(x)[:, 1:].mean(1))
  cosines = torch.nn.functional.normalize(embedding, dim=-1) @ text[allowed].T
  probabilities = (model.logit_scale.exp() * cosines).softmax(-1)[0]
  probabilities[int(allowed[:label].sum())].backward()
  activations = kept["activations"]
  weights = activations.grad[:, 1:].mean(1, keepdim=True)
  return relative(torch.relu((weights * activations[:, 1:]).sum(-1))[0].detach().numpy())


def relative(x):
  return (x - x.min()) / (x.max() - x.min())


def their_refined(cam, attention, rows, columns, threshold, compat):
  weights = torch.stack(attention[LAYERS[0]:LAYERS[1] + 1]).mean(0).detach()
  for _ in range(3):
    weights = weights / weights.sum(0, keepdim=True)
    weights = weights / weights.sum(1, keepdim=True)
  weights = (weights + weights.T) / 2
  weights = weights @ weights
  mask, image = np.zeros((rows, columns), np.float32), (cam.reshape(rows, columns) * 254.9999).astype(np.uint8)
  parts, _ = scipy.ndimage.label(image > int(threshold * image.max()), np.ones((3, 3)))
  for i, j in scipy.ndimage.find_objects(parts):
    ends = (min(i.stop, rows - 1), min(j.stop, columns - 1)) if compat else (i.stop, j.stop)
    mask[i.start:ends[0], j.start:ends[1]] = 1
  return relative((weights.numpy() * mask.reshape(1, -1)) @ cam)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
  """The model in PyTorch, in float64, its texts and pictures, and what ours makes of them."""
  torch.manual_seed(0)
  theirs, folder, rng = random_clip(), tmp_path_factory.mktemp("clip"), np.random.default_rng(0)
  text = rng.normal(size=(CLASSES, 512)).astype(np.float32)
  text /= np.linalg.norm(text, axis=1, keepdims=True)
  images = rng.normal(size=(3, 224, 224, 3)).astype(np.float32)
  theirs.save_pretrained(folder)
  graphdef, state = nnx.split(hub.load(clip.CLIPModel, folder))
  picture_n, label_n = np.array(PAIRS).T

  @jax.jit
  def run(state):
    model = nnx.merge(graphdef, state)
    hidden, attention = clip_patches.features(model, images, GRIDS)
    grids = GRIDS[picture_n]
    cams = cls_seg.cams(model, hidden[picture_n], grids, 14, 14, text, ALLOWED[picture_n])(label_n)
    affinity = cls_seg.affinity(attention, GRIDS, 14, 14, first_layer=LAYERS[0], last_layer=LAYERS[1])
    refined = {compat: cls_seg.refine(cams, affinity[picture_n], grids, threshold=0.4, compat=compat)
               for compat in (False, True)}
    places = clip_patches.positions(model.vision_model.embeddings, GRIDS, 14, 14)
    return dict(positions=places, hidden=hidden, attention=attention, cams=cams, refined=refined)

  out = jax.tree.map(np.asarray, run(state))
  return types.SimpleNamespace(theirs=theirs.double(), text=torch.from_numpy(text).double(), images=images, **out)


def patches_of(b):
  rows, columns = GRIDS[b]
  return (np.arange(rows)[:, None] * 14 + np.arange(columns)).reshape(-1)


def same_in_half(found_ld, table, rows, columns):
  """Positions between those of the table; one in the middle of two of half precision may go either way.

  A place of up to 14 in float32 is off by 1e-6, and a value between neighbours by that much of their difference.
  """
  if (rows, columns) == (14, 14):
    return (found_ld == table[1:].detach().numpy()).all()
  grid = table[1:].reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
  grid = torch.nn.functional.interpolate(grid, (rows, columns), mode="bilinear", align_corners=False)
  wanted_ld = grid.flatten(2)[0].T.detach().numpy()
  halfway = np.spacing(np.abs(wanted_ld).astype(np.float16)).astype(float) / 2
  return (np.abs(found_ld - wanted_ld) <= halfway * 1.01 + 4e-6).all()


@pytest.mark.parametrize("b", range(len(GRIDS)))
def test_features(both, b):
  (rows, columns), own = GRIDS[b].tolist(), patches_of(b)
  image = both.images[b, :16 * rows, :16 * columns].astype(np.float64)
  positions = both.positions[b][np.append(0, own + 1)].astype(np.float64)
  assert same_in_half(positions[1:], both.theirs.vision_model.embeddings.position_embedding.weight, rows, columns)
  hidden, attention = their_hidden(both.theirs, image, positions)
  wanted = hidden[0].detach().numpy()
  error = np.abs(both.hidden[b][np.append(0, own + 1)] - wanted).max() / np.abs(wanted).max()
  errors = [np.abs(ours[b][own][:, own] - theirs.detach().numpy()).max()
            for ours, theirs in zip(both.attention, attention, strict=True)]
  print(error, *errors)
  assert max(error, *errors) <= 1e-5


@pytest.mark.parametrize("n", range(len(PAIRS)))
def test_maps(both, n):
  """From our states and attention on."""
  b, label = PAIRS[n]
  (rows, columns), own = GRIDS[b].tolist(), patches_of(b)
  hidden = torch.from_numpy(both.hidden[b][np.append(0, own + 1)]).double()[None]
  cam = their_cam(both.theirs, hidden, both.text, ALLOWED[b], label)
  assert cam.std() > 0.05
  attention = [torch.from_numpy(weights[b][own][:, own]).double() for weights in both.attention]
  errors = [np.abs(both.cams[n].reshape(-1)[own] - cam).max()]
  for compat in (False, True):
    wanted = their_refined(cam, attention, rows, columns, 0.4, compat)
    errors.append(np.abs(both.refined[compat][n].reshape(-1)[own] - wanted).max())
  print(*errors)
  assert max(errors) <= 1e-5
