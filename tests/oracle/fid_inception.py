"""FID's Inception-v3 in PyTorch, block by block as pytorch-fid has it; needs no torchvision."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.random_weights import random_tensors


class BasicConv2d(nn.Module):
  def __init__(self, inputs, outputs, kernel_size, **options):
    super().__init__()
    self.conv = nn.Conv2d(inputs, outputs, kernel_size, bias=False, **options)
    self.bn = nn.BatchNorm2d(outputs, eps=0.001)

  def forward(self, x):
    return F.relu(self.bn(self.conv(x)))


def mean_3x3(x):
  return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_3x3(x):
  return F.max_pool2d(x, 3, stride=1, padding=1)


class A(nn.Module):
  def __init__(self, inputs, pool):
    super().__init__()
    self.branch1x1 = BasicConv2d(inputs, 64, 1)
    self.branch5x5_1 = BasicConv2d(inputs, 48, 1)
    self.branch5x5_2 = BasicConv2d(48, 64, 5, padding=2)
    self.branch3x3dbl_1 = BasicConv2d(inputs, 64, 1)
    self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
    self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, padding=1)
    self.branch_pool = BasicConv2d(inputs, pool, 1)

  def forward(self, x):
    double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
    return torch.cat([self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double,
                      self.branch_pool(mean_3x3(x))], 1)


class B(nn.Module):
  def __init__(self, inputs):
    super().__init__()
    self.branch3x3 = BasicConv2d(inputs, 384, 3, stride=2)
    self.branch3x3dbl_1 = BasicConv2d(inputs, 64, 1)
    self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
    self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, stride=2)

  def forward(self, x):
    double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
    return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class C(nn.Module):
  def __init__(self, inputs, width):
    super().__init__()
    row, column = dict(kernel_size=(1, 7), padding=(0, 3)), dict(kernel_size=(7, 1), padding=(3, 0))
    self.branch1x1 = BasicConv2d(inputs, 192, 1)
    self.branch7x7_1 = BasicConv2d(inputs, width, 1)
    self.branch7x7_2 = BasicConv2d(width, width, **row)
    self.branch7x7_3 = BasicConv2d(width, 192, **column)
    self.branch7x7dbl_1 = BasicConv2d(inputs, width, 1)
    self.branch7x7dbl_2 = BasicConv2d(width, width, **column)
    self.branch7x7dbl_3 = BasicConv2d(width, width, **row)
    self.branch7x7dbl_4 = BasicConv2d(width, width, **column)
    self.branch7x7dbl_5 = BasicConv2d(width, 192, **row)
    self.branch_pool = BasicConv2d(inputs, 192, 1)

  def forward(self, x):
    single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
    double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
    double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
    return torch.cat([self.branch1x1(x), single, double, self.branch_pool(mean_3x3(x))], 1)


class D(nn.Module):
  def __init__(self, inputs):
    super().__init__()
    self.branch3x3_1 = BasicConv2d(inputs, 192, 1)
    self.branch3x3_2 = BasicConv2d(192, 320, 3, stride=2)
    self.branch7x7x3_1 = BasicConv2d(inputs, 192, 1)
    self.branch7x7x3_2 = BasicConv2d(192, 192, (1, 7), padding=(0, 3))
    self.branch7x7x3_3 = BasicConv2d(192, 192, (7, 1), padding=(3, 0))
    self.branch7x7x3_4 = BasicConv2d(192, 192, 3, stride=2)

  def forward(self, x):
    seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
    return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(seven),
                      F.max_pool2d(x, 3, stride=2)], 1)


class E(nn.Module):
  def __init__(self, inputs, pool):
    super().__init__()
    self.pool = pool
    self.branch1x1 = BasicConv2d(inputs, 320, 1)
    self.branch3x3_1 = BasicConv2d(inputs, 384, 1)
    self.branch3x3_2a = BasicConv2d(384, 384, (1, 3), padding=(0, 1))
    self.branch3x3_2b = BasicConv2d(384, 384, (3, 1), padding=(1, 0))
    self.branch3x3dbl_1 = BasicConv2d(inputs, 448, 1)
    self.branch3x3dbl_2 = BasicConv2d(448, 384, 3, padding=1)
    self.branch3x3dbl_3a = BasicConv2d(384, 384, (1, 3), padding=(0, 1))
    self.branch3x3dbl_3b = BasicConv2d(384, 384, (3, 1), padding=(1, 0))
    self.branch_pool = BasicConv2d(inputs, 192, 1)

  def forward(self, x):
    single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
    return torch.cat([self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single),
                      self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double),
                      self.branch_pool(self.pool(x))], 1)


class Inception(nn.Module):
  """Images `[b, 3, 299, 299]` in the network's own range to features `[b, 2048]`."""

  def __init__(self):
    super().__init__()
    self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2)
    self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3)
    self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3, padding=1)
    self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
    self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3)
    self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = A(192, 32), A(256, 64), A(288, 64)
    self.Mixed_6a = B(288)
    self.Mixed_6b, self.Mixed_6c = C(768, 128), C(768, 160)
    self.Mixed_6d, self.Mixed_6e = C(768, 160), C(768, 192)
    self.Mixed_7a = D(768)
    self.Mixed_7b, self.Mixed_7c = E(1280, mean_3x3), E(2048, max_3x3)
    self.fc = nn.Linear(2048, 1008)

  def forward(self, x):
    x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
    x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
    x = F.max_pool2d(x, 3, stride=2)
    x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
    x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
    return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))


def random_inception():
  model = Inception().eval()
  shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
  tensors = {name: torch.from_numpy(tensor) for name, tensor in random_tensors(shapes).items()}
  model.load_state_dict(model.state_dict() | tensors)
  return model
