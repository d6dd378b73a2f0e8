"""ML-Decoder in PyTorch: timm's, which newer versions of PyTorch do not run as it is, and the variant that it lacks."""

import torch
from timm.layers import ml_decoder


class Decoder(torch.nn.Module):
  """In place of `torch.nn.TransformerDecoder`, which asks timm's layer for self-attention; the names are the same."""

  def __init__(self, width):
    super().__init__()
    self.layers = torch.nn.ModuleList([ml_decoder.TransformerDecoderLayerOptimal(width)])

  def forward(self, queries_kbd, memory_tbd):
    return self.layers[0](queries_kbd, memory_tbd)


def fixed(classes, groups, *, inputs=2048, width=768):
  """Full or grouped."""
  model = ml_decoder.MLDecoder(classes, groups, decoder_embedding=width, initial_num_features=inputs)
  model.decoder = Decoder(width)
  return model


class ZeroShot(torch.nn.Module):
  """Linear and ReLU on each label's vector, the decoder, one projection for all labels."""

  def __init__(self, query_width, *, inputs=2048, width=768):
    super().__init__()
    self.embed_standart = torch.nn.Linear(inputs, width)
    self.decoder = Decoder(width)
    self.wordvec_proj = torch.nn.Linear(query_width, width) if query_width != width else torch.nn.Identity()
    self.duplicate_pooling = torch.nn.Parameter(torch.randn(width, 1) * width**-0.5)
    self.duplicate_pooling_bias = torch.nn.Parameter(torch.randn(1))

  def forward(self, tokens_btc, queries_kw):
    memory_btd = torch.relu(self.embed_standart(tokens_btc))
    queries_kd = torch.relu(self.wordvec_proj(queries_kw))
    states_kbd = self.decoder(queries_kd[:, None].repeat(1, len(tokens_btc), 1), memory_btd.transpose(0, 1))
    return (states_kbd @ self.duplicate_pooling + self.duplicate_pooling_bias)[..., 0].T
