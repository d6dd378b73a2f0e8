"""FID's Inception-v3 and its two preprocessings against PyTorch and Pillow, from a file of the published layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

torch = pytest.importorskip("torch")

from digzsl_jax import convert
from digzsl_jax.models import hub, inception
from tests.oracle.fid_inception import mean_3x3, random_inception
from tests.oracle.parity import to_numpy, to_torch
from tests.random_weights import photographs

SIZES = [(64, 48), (299, 299), (311, 420), (512, 640)]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  """`(the model in PyTorch, its weights as safetensors)`, by way of a pickle as it is published."""
  model, folder = random_inception(), tmp_path_factory.mktemp("inception")
  torch.save(model.state_dict(), folder / "inception.pth")
  convert.convert(folder / "inception.pth", folder / "inception.safetensors", say=lambda line: None)
  return model, folder / "inception.safetensors"


def bilinear(images_bijc):
  """pytorch-fid's steps from uint8 pixels to what the network takes, NCHW."""
  x = to_torch(images_bijc.astype(np.float32) / 255)
  return 2 * torch.nn.functional.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1


def bicubic_antialias(images_bijc):
  """clean-fid's steps: each colour by Pillow in floating point, neither rounded nor clipped."""
  resized = [[Image.fromarray(np.ascontiguousarray(image_ijc[..., c], np.float32)).resize((299, 299), Image.BICUBIC)
              for c in range(3)] for image_ijc in images_bijc]
  return (torch.from_numpy(np.array([[np.asarray(colour) for colour in image] for image in resized])) - 128) / 128


REFERENCES = {"bilinear": bilinear, "bicubic_antialias": bicubic_antialias}


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("resize", inception.RESIZES)
def test_preprocessing(resize, height, width):
  images_bijc = photographs(height, width)
  want_bijc = to_numpy(REFERENCES[resize](images_bijc))
  got_bijc = inception.RESIZES[resize](jnp.asarray(images_bijc, jnp.float32) / 127.5 - 1)
  assert want_bijc.std() > 0.3
  print(f"{np.abs(got_bijc - want_bijc).max():.1e}")
  np.testing.assert_allclose(got_bijc, want_bijc, rtol=0, atol=1e-5)


@pytest.mark.parametrize("resize", inception.RESIZES)
def test_features(published, resize):
  theirs, path = published
  graphdef, params = nnx.split(inception.load(path, resize=resize))
  images_bijc = photographs(120, 160)
  with torch.no_grad():
    want_bd = theirs(REFERENCES[resize](images_bijc)).numpy()
  pixels = images_bijc.astype(np.float32) / 127.5 - 1
  got_bd = np.asarray(jax.jit(lambda params, images: nnx.merge(graphdef, params)(images))(params, pixels))
  assert got_bd.shape == want_bd.shape == (2, inception.WIDTH)
  assert 0.2 < want_bd.std() < 2 and np.abs(want_bd[0] - want_bd[1]).max() > 0.1
  print(f"{np.abs(got_bd - want_bd).max():.1e} of {want_bd.max():.1f}")
  assert np.abs(got_bd - want_bd).max() <= 1e-5


@pytest.mark.parametrize("size", [(8, 8), (17, 12)])
def test_pools(size):
  x_bijd = np.random.default_rng(0).normal(size=(2, *size, 5)).astype(np.float32) - 3  # padding with 0 would show
  x = to_torch(x_bijd)
  for ours, theirs in [(inception.average_pool, mean_3x3),
                       (inception.max_pool, lambda x: torch.nn.functional.max_pool2d(x, 3, stride=1, padding=1)),
                       (inception.halving_max_pool, lambda x: torch.nn.functional.max_pool2d(x, 3, stride=2))]:
    np.testing.assert_allclose(ours(jnp.asarray(x_bijd)), to_numpy(theirs(x)), rtol=0, atol=1e-6)


def test_every_tensor_of_the_file_has_its_place(published):
  """All but the classifier's, and the counters of PyTorch's batch norm."""
  tensors = {name: tuple(value.shape) for name, value in published[0].state_dict().items()}
  left_out = {name for name in tensors if inception.InceptionV3.canonical_name(name) is None}
  assert {name for name in left_out if not name.endswith("num_batches_tracked")} == {"fc.weight", "fc.bias"}
  variables = hub._variables(hub.abstract(inception.InceptionV3, {}))
  shapes = {name: hub._to_torch(np.broadcast_to(0, variable.shape)).shape if is_kernel else variable.shape
            for name, (_, variable, is_kernel) in variables.items()}
  assert shapes == {name: shape for name, shape in tensors.items() if name not in left_out}
  # With the classifier 91.1 MiB of float32, as the published file has it.
  assert sum(np.prod(shape, dtype=int) for shape in shapes.values()) == 21_820_000
