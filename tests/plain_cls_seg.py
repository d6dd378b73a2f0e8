"""CLS-SEG once more in numpy, one picture and one label at a time, to compare the library with.

Written from the algorithm's steps alone, gradients by hand in float64. `model` is `plain_tagclip.Clip`; `compat` as in
`digzsl_jax.models.cls_seg`. Shapes: i j patches, l m positions, d width, p shared width, k classes.
"""

import numpy as np

from tests import plain_tagclip as plain

LAST = "vision_model.encoder.layers.{}"


def features(model, image_ijc, positions_ld):
  """`(hidden_ld, attention)`: what enters the last layer, and the weights of every layer from patch to patch."""
  x_ld, attention = model.tokens(image_ijc, positions_ld), []
  for layer in range(model.layers):
    hidden_ld, name = x_ld, LAST.format(layer)
    added_ld, weights_lm = model.attend(f"{name}.self_attn", model.norm(f"{name}.layer_norm1", x_ld), 0, False)
    x_ld = x_ld + added_ld
    inner = model.linear(f"{name}.mlp.fc1", model.norm(f"{name}.layer_norm2", x_ld))
    x_ld = x_ld + model.linear(f"{name}.mlp.fc2", inner / (1 + np.exp(-1.702 * inner)))
    attention.append(weights_lm[1:, 1:])
  return hidden_ld, attention


class LastLayer:
  """From the first norm's output to the probability of a class, and the way back."""

  def __init__(self, model, hidden_ld, text_kp, allowed_k):
    self.model, self.name = model, LAST.format(model.layers - 1)
    self.hidden_ld, self.allowed_k = hidden_ld.astype(np.float64), np.asarray(allowed_k)
    self.text_kp = text_kp.astype(np.float64)[self.allowed_k]
    self.scale = np.exp(float(model.tensors["logit_scale"]))

  def activations(self):
    return self.model.norm(f"{self.name}.layer_norm1", self.hidden_ld)

  def kernel(self, name):
    return self.model.tensors[f"{name}.kernel"].astype(np.float64)

  def forward(self, a_ld):
    model, name = self.model, self.name
    self.q, self.k, self.v = (model.linear(f"{name}.self_attn.{part}_proj", a_ld) for part in "qkv")
    size = a_ld.shape[1] // model.heads
    self.heads = [slice(head * size, (head + 1) * size) for head in range(model.heads)]
    self.weights = [plain.softmax(self.q[:, own] @ self.k[:, own].T / np.sqrt(size)) for own in self.heads]
    mixed = np.concatenate([w @ self.v[:, own] for w, own in zip(self.weights, self.heads)], axis=1)
    self.y = self.hidden_ld + model.linear(f"{name}.self_attn.out_proj", mixed)
    self.u = model.linear(f"{name}.mlp.fc1", model.norm(f"{name}.layer_norm2", self.y))
    self.gate = 1 / (1 + np.exp(-1.702 * self.u))
    self.r = self.y + model.linear(f"{name}.mlp.fc2", self.u * self.gate)
    mean_d = model.norm("vision_model.post_layernorm", self.r)[1:].mean(0)
    f_p = model.linear("visual_projection", mean_d)
    self.length = np.sqrt((f_p**2).sum())
    self.unit_p = f_p / self.length
    self.probabilities = plain.softmax(self.scale * self.text_kp @ self.unit_p)
    return self.probabilities

  def norm_back(self, name, x, grad):
    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    unit, grad = centred / deviation, grad * self.model.tensors[f"{name}.scale"]
    return (grad - grad.mean(-1, keepdims=True) - unit * (grad * unit).mean(-1, keepdims=True)) / deviation

  def backward(self, label):
    """The gradient `[l, d]` of the label's probability; `forward` comes first."""
    name, own_k = self.name, self.allowed_k == label
    grad_k = self.probabilities[own_k] * (own_k - self.probabilities)
    grad_p = self.scale * grad_k @ self.text_kp
    grad_p = (grad_p - self.unit_p * (self.unit_p @ grad_p)) / self.length
    grad_d = self.kernel("visual_projection") @ grad_p
    grad = np.zeros_like(self.r)
    grad[1:] = grad_d / (len(grad) - 1)
    grad = self.norm_back("vision_model.post_layernorm", self.r, grad)
    inner = grad @ self.kernel(f"{name}.mlp.fc2").T * self.gate * (1 + 1.702 * self.u * (1 - self.gate))
    grad = grad + self.norm_back(f"{name}.layer_norm2", self.y, inner @ self.kernel(f"{name}.mlp.fc1").T)
    mixed = grad @ self.kernel(f"{name}.self_attn.out_proj").T
    grads = {part: np.zeros_like(mixed) for part in "qkv"}
    for weights, own in zip(self.weights, self.heads):
      from_weights = mixed[:, own] @ self.v[:, own].T
      logits = weights * (from_weights - (from_weights * weights).sum(1, keepdims=True))
      logits /= np.sqrt(own.stop - own.start)
      grads["q"][:, own], grads["k"][:, own] = logits @ self.k[:, own], logits.T @ self.q[:, own]
      grads["v"][:, own] = weights.T @ mixed[:, own]
    return sum(grad @ self.kernel(f"{name}.self_attn.{part}_proj").T for part, grad in grads.items())


def relative(x):
  low, high = x.min(), x.max()
  return (x - low) / (high - low) if high > low else np.zeros_like(x)


def cam(model, hidden_ld, text_kp, allowed_k, label):
  """`[l]` of the patches, 0 to 1."""
  last = LastLayer(model, hidden_ld, text_kp, allowed_k)
  a_ld = last.activations()
  last.forward(a_ld)
  weights_d = last.backward(label)[1:].mean(0)
  return relative(np.maximum(a_ld[1:] @ weights_d, 0))


def affinity(attention, first_layer, last_layer):
  weights_lm = np.mean(attention[first_layer:last_layer + 1], axis=0, dtype=np.float64)
  for _ in range(3):
    weights_lm = weights_lm / weights_lm.sum(0)
    weights_lm = weights_lm / weights_lm.sum(1)[:, None]
  return (weights_lm + weights_lm.T) / 2


def refine(*inputs):
  return relative(spread(*inputs))


def spread(cam_l, affinity_lm, rows, columns, threshold, compat):
  kept_ij = np.zeros((rows, columns), bool)
  # As OpenCV's functions are called: bytes of a map that ends just short of 1.
  bytes_ij = (np.float32(cam_l).reshape(rows, columns) * np.float32(1 - 1.2e-7) * 255).astype(np.uint8)
  for top, left, bottom, right in plain.boxes(bytes_ij > int(threshold * bytes_ij.max())):
    if compat:
      bottom, right = min(bottom, rows - 1), min(right, columns - 1)
    kept_ij[top:bottom, left:right] = True
  return affinity_lm.astype(np.float64) @ affinity_lm * kept_ij.reshape(1, -1) @ cam_l
