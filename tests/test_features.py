"""Feature rows of picture files: read ahead, kept on disk, divided among hosts."""

import pathlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from digzsl_jax import features, logs
from digzsl_jax import main as command
from digzsl_jax.data import pictures
from digzsl_jax.models import cdm, vit

TOWER = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8,
             patch_size=4)
KEY = {"weights": "abc"}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  folder = tmp_path_factory.mktemp("pictures")
  names = [f"{i}.png" for i in range(11)]
  for i, name in enumerate(names):
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 12, 3), np.uint8)).save(folder / name)
  return pictures.Pictures(folder, pictures.scan(folder, names)[0], 8)


class Encoder:
  """A stand-in: the mean colour, in batches of three; remembers how many images it saw and may be interrupted."""

  def __init__(self, lasts=99):
    self.seen, self.lasts = 0, lasts

  def __call__(self, images_nhwc):
    for start in range(0, len(images_nhwc), 3):
      if self.seen >= self.lasts:
        raise KeyboardInterrupt
      rows = images_nhwc[start:start + 3]
      self.seen += len(rows)
      yield rows.mean((1, 2)).astype(np.float32)


def extract(images, encoder, cache, key=KEY):
  return features.Extractor(encoder, key, cache, logs.Log(None))(images)


def test_rows_are_kept_and_found_again(images, tmp_path, monkeypatch):
  monkeypatch.setattr(features, "SHARD", 5)
  wanted = images[:].mean((1, 2)).astype(np.float32)
  first, second = Encoder(), Encoder()
  for encoder, seen in ((first, 11), (second, 0)):
    np.testing.assert_array_equal(extract(images, encoder, tmp_path), wanted)
    assert encoder.seen == seen
  assert sorted(path.name for path in tmp_path.glob("*/*")) == ["00000000.safetensors", "00000006.safetensors"]
  elsewhere = [file._replace(path=str(images.folder / file.path)) for file in images.files]
  extract(pictures.Pictures("/", elsewhere, 8), third := Encoder(), tmp_path)
  assert third.seen == 0


def test_an_interrupted_extraction_goes_on(images, tmp_path, monkeypatch):
  monkeypatch.setattr(features, "SHARD", 3)
  with pytest.raises(KeyboardInterrupt):
    extract(images, Encoder(lasts=6), tmp_path)
  encoder = Encoder()
  np.testing.assert_array_equal(extract(images, encoder, tmp_path), images[:].mean((1, 2)).astype(np.float32))
  assert encoder.seen == 5


def test_rows_of_something_else_are_not_taken(images, tmp_path):
  extract(images, Encoder(), tmp_path)
  others = [(images, {"weights": "abd"}), (images.take(np.arange(11)[::-1]), KEY), (images.take(slice(10)), KEY),
            (pictures.Pictures(images.folder, images.files, 7), KEY),
            (pictures.Pictures(images.folder, images.files, 8, fit="squash"), KEY)]
  for chosen, key in others:
    encoder = Encoder()
    np.testing.assert_array_equal(extract(chosen, encoder, tmp_path, key), chosen[:].mean((1, 2)).astype(np.float32))
    assert encoder.seen == len(chosen)
  assert len(list(tmp_path.iterdir())) == 6


def test_without_a_cache_and_for_arrays_nothing_is_kept(images, tmp_path):
  extract(images, Encoder(), None)
  np.testing.assert_array_equal(extract(images[:], Encoder(), tmp_path), extract(images, Encoder(), None))
  assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_costs_no_run(images, tmp_path, capsys):
  (tmp_path / "file").write_text("in the way")
  assert extract(images, Encoder(), tmp_path / "file" / "cache").shape == (11, 3)
  said = capsys.readouterr().err
  assert "warning: features are not kept: " in said and "config.cdm.cache names another folder" in said


@pytest.mark.parametrize("n, hosts", [(11, 1), (11, 2), (12, 3), (2, 4), (1, 3)])
def test_shares_of_hosts(n, hosts):
  rows_nf = np.random.default_rng(0).normal(size=(n, 2))
  shares = [features.share(n, index, hosts) for index in range(hosts)]
  assert len({len(share) for share in shares}) == 1 and set(np.concatenate(shares)) == set(range(n))
  assert sum(map(len, shares)) < n + hosts
  np.testing.assert_array_equal(features.merge(np.stack([rows_nf[share] for share in shares]), n), rows_nf)


def test_hosts_encode_their_share(images, tmp_path, monkeypatch):
  """Each host in turn; what the others would send is computed by hand."""
  rows = images[:].mean((1, 2)).astype(np.float32)
  monkeypatch.setattr("jax.process_count", lambda: 2)
  for index in (0, 1):
    monkeypatch.setattr("jax.process_index", lambda index=index: index)

    def gather(own, index=index):
      np.testing.assert_array_equal(own, rows[features.share(11, index, 2)])
      return np.stack([rows[features.share(11, host, 2)] for host in (0, 1)])

    monkeypatch.setattr(features.multihost_utils, "process_allgather", gather)
    encoder = Encoder()
    np.testing.assert_array_equal(extract(images, encoder, tmp_path), rows)
    assert encoder.seen == 6


class Mean(nnx.Module):
  """Of each colour; counts how often it is traced."""

  traced = []

  def __init__(self):
    self.gain = nnx.Param(jnp.ones(()))

  def __call__(self, images_bijc):
    self.traced.append(images_bijc.shape)
    return self.gain[...] * images_bijc.mean((1, 2))


@pytest.fixture
def on_devices(monkeypatch):
  """Tells the encoder how many devices there are."""
  found = jax.local_devices()
  return lambda count: monkeypatch.setattr(jax, "local_devices", lambda: found[:count])


@pytest.mark.parametrize("devices", (1, 2))
def test_features_of_a_stream(devices, on_devices):
  images = np.random.default_rng(0).integers(0, 256, (23, 4, 5, 3), np.uint8)
  on_devices(devices)
  Mean.traced.clear()
  for _ in range(2):
    out = list(cdm.streamed(Mean(), batch=8 // devices)(images))
    assert [len(part) for part in out] == [8, 8, 7]
    np.testing.assert_allclose(np.concatenate(out), images.mean((1, 2)) / 127.5 - 1, atol=1e-6)
  assert Mean.traced == [(8 // devices, 4, 5, 3)]  # compiled once for all
  assert list(cdm.streamed(Mean())(images[:0])) == []
  with pytest.raises(ValueError, match="uint8"):
    list(cdm.streamed(Mean())(np.zeros((1, 4, 4, 3))))


def test_files_are_decoded_ahead_and_encoded_like_arrays(images, on_devices):
  encoder = cdm.Encoder(vit.ViT.from_json(TOWER, rngs=nnx.Rngs(0)), pathlib.Path("nowhere"))
  on_devices(1)
  stream = cdm.streamed(encoder, batch=4)
  threads = []

  class Watched(pictures.Pictures):
    def __getitem__(self, rows):
      threads.append(threading.current_thread())
      return super().__getitem__(rows)

  pieces = stream(Watched(images.folder, images.files, 8))
  first = next(pieces)
  assert len(threads) == 3  # of the last images too, before the second batch is asked for
  whole = np.concatenate([first, *pieces])
  assert threading.main_thread() not in threads and len(threads) == 3 and whole.shape == (11, 16)
  for devices in (1, 8):
    on_devices(devices)
    np.testing.assert_array_equal(whole, cdm.batched(encoder, batch=4)(images[:]))


def test_damage_reaches_the_caller(images, tmp_path):
  damaged = pictures.Pictures(images.folder, (*images.files, pictures.File("none.png", b"")), 8)
  encoder = cdm.Encoder(vit.ViT.from_json(TOWER, rngs=nnx.Rngs(0)), tmp_path)
  with pytest.raises(ValueError, match=r"none\.png cannot be read \(there is no such file\); replace or delete it"):
    extract(damaged, cdm.streamed(encoder, 4), tmp_path)


def test_runs_share_rows(tiny_config, tmp_path, monkeypatch):
  for k, name in enumerate(("ant", "bee", "cat", "dog", "emu")):
    (tmp_path / "zoo" / name).mkdir(parents=True)
    for i in range(4):
      pixels = np.random.default_rng((k, i)).integers(0, 256, (40, 33, 3), np.uint8)
      Image.fromarray(pixels).save(tmp_path / "zoo" / name / f"{i}.jpg")
  (tmp_path / "zoo" / "unseen.txt").write_text("emu")
  with tiny_config.unlocked():
    tiny_config.data = dict(name="folder", folder=str(tmp_path / "zoo"), size=32)
  tiny_config.stages, tiny_config.cdm.cache = ("cdm",), str(tmp_path / "cache")
  rows = lambda run: (tmp_path / run / "cdm" / "features.safetensors").read_bytes()

  def run(name):
    command.METHODS["dig_zsl"](tiny_config.to_dict(), tmp_path / name, logs.Log(tmp_path / name), False)
    return rows(name)

  first = run("first")
  monkeypatch.setattr(cdm, "streamed", lambda *arguments: lambda images: pytest.fail("encoded again"))
  assert run("second") == first
  tiny_config.cdm.cache = ""
  assert run("second") == first  # finished, wherever its rows came from
  with pytest.raises(pytest.fail.Exception, match="encoded again"):
    run("third")
