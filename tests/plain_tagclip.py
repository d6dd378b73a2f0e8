"""TagCLIP (arXiv 2312.12828) once more in numpy, one picture and one class at a time, to compare the library with.

Written from the algorithm's steps alone. `compat` as in `digzsl_jax.models.tagclip`. Shapes: i j pixels or patches,
l m positions, d width, h heads, p shared width, k classes.
"""

import numpy as np

OUTSIDE = -1000


class Clip:
  """CLIP's vision tower from its tensors by attribute path, with quick_gelu.

  Args:
    tensors: kernels as `[inputs, outputs]`.
  """

  def __init__(self, tensors, heads: int, layers: int, side: int):
    self.tensors, self.heads, self.layers, self.side = tensors, heads, layers, side
    self.patch = tensors["vision_model.embeddings.patch_embedding.kernel"].shape[0]

  def linear(self, name, x):
    out = x @ self.tensors[f"{name}.kernel"]
    return out + self.tensors[f"{name}.bias"] if f"{name}.bias" in self.tensors else out

  def norm(self, name, x):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * self.tensors[f"{name}.scale"] + self.tensors[f"{name}.bias"]

  def tokens(self, image_ijc, positions_ld):
    kernel = self.tensors["vision_model.embeddings.patch_embedding.kernel"]
    size, rows, columns = self.patch, *(side // self.patch for side in image_ijc.shape[:2])
    patches = image_ijc.reshape(rows, size, columns, size, 3).transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1)
    x_ld = np.concatenate([self.tensors["vision_model.embeddings.class_embedding"][None],
                           patches @ kernel.reshape(-1, kernel.shape[-1])])
    return self.norm("vision_model.pre_layrnorm", x_ld + positions_ld)

  def attend(self, name, x_ld, bias_lm, alone):
    """What attention adds, and its weights as a mean over heads; where `alone` by the values themselves."""
    q, k, v = (self.linear(f"{name}.{part}_proj", x_ld) for part in "qkv")
    width = q.shape[1] // self.heads
    out, weights = [], []
    for head in range(self.heads):
      own = slice(head * width, (head + 1) * width)
      logits = q[:, own] @ k[:, own].T / np.sqrt(width) + bias_lm
      weights.append(softmax(logits))
      out.append(v[:, own] if alone else weights[-1] @ v[:, own])
    return self.linear(f"{name}.out_proj", np.concatenate(out, axis=1)), np.mean(weights, axis=0)

  def encode(self, image_ijc, positions_ld, bias_lm=0, last_alone=False):
    """Embeddings of all positions, of length 1, and the weights of every layer."""
    x_ld, attention = self.tokens(image_ijc, positions_ld), []
    for layer in range(self.layers):
      name = f"vision_model.encoder.layers.{layer}"
      added, weights = self.attend(f"{name}.self_attn", self.norm(f"{name}.layer_norm1", x_ld), bias_lm,
                                   last_alone and layer == self.layers - 1)
      x_ld = x_ld + added
      inner = self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.layer_norm2", x_ld))
      x_ld = x_ld + self.linear(f"{name}.mlp.fc2", inner / (1 + np.exp(-1.702 * inner)))
      attention.append(weights)
    embeds_lp = self.linear("visual_projection", self.norm("vision_model.post_layernorm", x_ld))
    return embeds_lp / np.linalg.norm(embeds_lp, axis=-1, keepdims=True), attention

  def probabilities(self, embeds, text_kp):
    return softmax(np.exp(self.tensors["logit_scale"]) * embeds @ text_kp.T)

  def own_positions(self):
    return self.tensors["vision_model.embeddings.position_embedding.embedding"]

  def positions(self, rows, columns):
    """In float64, before they are rounded to half precision."""
    own_ld = self.own_positions().astype(np.float64)
    grid = resize(own_ld[1:].reshape(self.side, self.side, -1), rows, columns)
    return np.concatenate([own_ld[:1], grid.reshape(rows * columns, -1)])


def softmax(x):
  powers = np.exp(x - x.max(-1, keepdims=True))
  return powers / powers.sum(-1, keepdims=True)


def resize(image_ijc, rows, columns):
  """Bilinear, pixel centres at halves, no antialias, the border repeated."""
  def along(image, outputs):  # the first axis
    inputs = image.shape[0]
    out = []
    for output in range(outputs):
      place = min(max((output + 0.5) * inputs / outputs - 0.5, 0), inputs - 1)
      low = int(place)
      out.append(image[low] + (place - low) * (image[min(low + 1, inputs - 1)] - image[low]))
    return np.stack(out)
  return along(along(image_ijc, rows).swapaxes(0, 1), columns).swapaxes(0, 1)


def coarse_scores(model, image_ijc, positions_ld, text_kp):
  """`(scores_lk, attention)` from patch to patch."""
  embeds_lp, attention = model.encode(image_ijc, positions_ld, last_alone=True)
  return model.probabilities(embeds_lp[1:], text_kp), [weights[1:, 1:] for weights in attention]


def boxes(mask_ij):
  """Top, left, bottom and right, the last two exclusive, of each part connected by 8 neighbours."""
  left_over, found = {tuple(place) for place in np.argwhere(mask_ij)}, []
  while left_over:
    part = [left_over.pop()]
    for i, j in part:  # grows while it is walked
      near = {(i + di, j + dj) for di in (-1, 0, 1) for dj in (-1, 0, 1)} & left_over
      left_over -= near
      part += near
    i, j = np.array(part).T
    found.append((i.min(), j.min(), i.max() + 1, j.max() + 1))
  return found


def relative(scores):
  """0 to 1, or None where all are equal."""
  scores = scores - scores.min()
  return scores / scores.max() if scores.max() > 0 else None


def refine(scores_lk, attention, rows, columns, first_layer, votes, compat):
  counted = sum((weights > weights.mean()).astype(int) for weights in attention) >= votes
  affinity = np.mean(attention[first_layer:-1], axis=0) * counted
  spread = affinity @ scores_lk
  refined = np.zeros_like(scores_lk)
  for k in range(scores_lk.shape[1]):
    kept_ij = np.zeros((rows, columns), bool)
    shares = relative(spread[:, k])
    if shares is not None:
      bytes_ij = (shares * 255).astype(np.uint8).reshape(rows, columns)
      for top, left, bottom, right in boxes(bytes_ij > int(shares.mean() * 255)):
        if compat:
          bottom, right = min(bottom, rows - 1), min(right, columns - 1)
        kept_ij[top:bottom, left:right] = True
    elif not compat:
      kept_ij[:] = True
    refined[:, k] = (affinity * kept_ij.reshape(1, -1)) @ scores_lk[:, k]
  return refined


def image_scores(refined_lk, labels):
  return refined_lk[:, :labels].max(0)


def candidates(refined_lk, rows, columns, labels, threshold, compat):
  """`{label: (mask_ij, box)}` of the labels that are looked at again."""
  low, high = refined_lk.min(), refined_lk.max()
  found = {}
  for k, score in enumerate(image_scores(refined_lk, labels)):
    if not score > low + threshold * (high - low):
      continue
    shares = relative(refined_lk[:, k])
    if shares is None:
      mask_ij = np.full((rows, columns), not compat)
    else:
      mask_ij = (shares > 0.5).reshape(rows, columns)
    i, j = np.where(mask_ij)
    top, left, bottom, right = (i.min(), j.min(), i.max() + 1, j.max() + 1) if len(i) else (0, 0, 0, 0)
    if compat:
      bottom, right = min(bottom, rows - 1), min(right, columns - 1)
      if top == bottom or left == right:
        break
    found[k] = mask_ij, (top, left, bottom, right)
  return found


def reidentify(model, image_ijc, mask_ij, box, label, text_kp):
  top, left, bottom, right = box
  side, patch = model.side, model.patch
  part = image_ijc[top * patch:bottom * patch, left * patch:right * patch].astype(np.float64)
  crop = resize(part, side * patch, side * patch).astype(np.float32)
  near = lambda inputs: (np.arange(side, dtype=np.float32) * np.float32(inputs / side)).astype(int)
  small = mask_ij[top:bottom, left:right][near(bottom - top)][:, near(right - left)]
  bias_lm = np.zeros((side**2 + 1,) * 2, np.float32)
  bias_lm[0, 1:][~small.reshape(-1)] = OUTSIDE
  embeds_lp, _ = model.encode(crop, model.own_positions(), bias_lm)
  return model.probabilities(embeds_lp[0], text_kp)[label]


def tags(scores_f, threshold):
  bound = scores_f.min() + threshold * (scores_f.max() - scores_f.min())
  return {k for k, score in enumerate(scores_f) if score > bound} or {int(np.argmax(scores_f))}
