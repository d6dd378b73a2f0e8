"""Checkpoints of the hub, from a server on this machine; nothing goes over the network."""

import errno
import hashlib
import json
import pathlib
import time

import jax
import numpy as np
import pytest
import safetensors.numpy

from digzsl_jax import checkpoint, workspace
from digzsl_jax.models import download, hub
from tests.fake_hub import FakeHub

huggingface_hub = pytest.importorskip("huggingface_hub")
NAME = "somebody/model"


def weights(*values):
  return safetensors.numpy.save({f"w{value}": np.full(8, value, np.float32) for value in values})


def stable_diffusion():
  files = {name: f"{{{name!r}: 0}}".replace("'", '"').encode() for name in (
      "README.md", "model_index.json", "v1-5-pruned.safetensors", "scheduler/scheduler_config.json",
      "safety_checker/config.json", "safety_checker/model.safetensors", "text_encoder/pytorch_model.bin",
      "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json")}
  for value, (model, stem) in enumerate((("text_encoder", "model"), ("unet", "diffusion_pytorch_model"),
                                         ("vae", "diffusion_pytorch_model"))):
    files |= {f"{model}/config.json": b'{"part": %d}' % value, f"{model}/{stem}.safetensors": weights(value),
              f"{model}/{stem}.fp16.safetensors": b"half", f"{model}/{stem}.non_ema.safetensors": b"other"}
  return files


WANTED = ["scheduler/scheduler_config.json", "text_encoder/config.json", "text_encoder/model.safetensors",
          "tokenizer/merges.txt", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json", "unet/config.json",
          "unet/diffusion_pytorch_model.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"]


@pytest.fixture
def server(tmp_path, monkeypatch):
  """A hub with an empty cache of its own."""
  from huggingface_hub import constants, utils
  server = FakeHub()
  server.repositories[NAME] = {"main": {"config.json": b'{"a": 1}', "model.safetensors": weights(1), "README.md": b"#"}}
  for name, value in {"ENDPOINT": server.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": False,
                      "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
                      "HF_HUB_DISABLE_XET": True, "HF_TOKEN_PATH": str(tmp_path / "no token")}.items():
    monkeypatch.setattr(constants, name, value)
  monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")
  utils.disable_progress_bars()
  yield server
  server.close()


@pytest.fixture
def offline(monkeypatch):
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def fetched(server):
  names = sorted(name for name, _ in server.contents)
  server.contents.clear()
  return names


def found(folder):
  return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_only_what_is_read_is_fetched_and_only_once(server):
  server.repositories[NAME]["main"] = stable_diffusion()
  folder = download.locate(NAME, download.STABLE_DIFFUSION)
  assert found(folder) == fetched(server) == sorted(download.files(folder, download.STABLE_DIFFUSION)) == WANTED
  assert (folder / WANTED[-1]).read_bytes() == weights(2)
  assert download.locate(NAME, download.STABLE_DIFFUSION) == folder
  assert fetched(server) == []


def test_half_precision_where_there_is_no_other(server):
  files = server.repositories[NAME]["main"]
  files["model.fp16.safetensors"] = files.pop("model.safetensors")
  folder = download.locate(NAME, download.ENCODER)
  assert found(folder) == ["config.json", "model.fp16.safetensors"]


def test_shards(server):
  index = {"weight_map": {"w1": "model-1-of-2.safetensors", "w2": "model-2-of-2.safetensors"}}
  server.repositories[NAME]["main"] = files = {
      "config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode(), "other.safetensors": b"big",
      "model-1-of-2.safetensors": weights(1), "model-2-of-2.safetensors": weights(2)}
  folder = download.locate(NAME, download.ENCODER)
  assert "other.safetensors" not in fetched(server)
  assert {key: tensor[0] for key, tensor in hub.read_tensors(folder).items()} == {"w1": 1, "w2": 2}
  server.repositories["somebody/partial"] = {"main": {name: files[name] for name in files if "-2-of" not in name}}
  with pytest.raises(hub.CheckpointError, match="names files that are not beside it: model-2-of-2.safetensors"):
    download.locate("somebody/partial", download.ENCODER)
  assert fetched(server) == ["model.safetensors.index.json"]


def test_revisions(server):
  revisions = server.repositories[NAME]
  revisions["refs/pr/7"] = revisions["main"] | {"model.safetensors": weights(2)}
  for revision, value in (("main", 1), ("refs/pr/7", 2), (server.commit(revisions["refs/pr/7"]), 2)):
    tensors = hub.read_tensors(download.locate(f"{NAME}@{revision}", download.ENCODER))
    assert list(tensors) == [f"w{value}"]
  assert fetched(server).count("model.safetensors") == 2  # the commit is the pull request's
  with pytest.raises(hub.CheckpointError, match="somebody/model has no revision 'v9'"):
    download.locate(f"{NAME}@v9", download.ENCODER)
  revisions["main"] = revisions["main"] | {"model.safetensors": weights(3)}
  assert list(hub.read_tensors(download.locate(NAME, download.ENCODER))) == ["w3"]


def test_offline_the_cache_is_enough(server, monkeypatch):
  server.repositories[NAME]["main"] = stable_diffusion()
  folder = download.locate(NAME, download.STABLE_DIFFUSION)
  with monkeypatch.context() as patch:
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert download.locate(NAME, download.STABLE_DIFFUSION) == folder
    assert download.locate(f"{NAME}@{folder.name}", download.STABLE_DIFFUSION) == folder
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(hub.CheckpointError, match="HF_HUB_OFFLINE forbids.*not whole: no weights in .*/unet"):
      download.locate(NAME, download.STABLE_DIFFUSION)
  server.status = 503
  with pytest.raises(hub.CheckpointError, match="could not fetch somebody/model.*503.*not whole: no weights in"):
    download.locate(NAME, download.STABLE_DIFFUSION)
  server.status = None
  download.locate(NAME, download.STABLE_DIFFUSION)
  server.close()
  assert download.locate(NAME, download.STABLE_DIFFUSION) == folder


def test_offline_without_a_cache(server, offline):
  with pytest.raises(hub.CheckpointError, match="no local folder somebody/model, and HF_HUB_OFFLINE forbids"):
    download.locate(NAME, download.ENCODER)
  assert not server.contents


def test_server_that_is_down(server):
  server.close()
  with pytest.raises(hub.CheckpointError, match="could not fetch somebody/model, revision 'main', from http:.*network"):
    download.locate(NAME, download.ENCODER)


@pytest.mark.parametrize("name, message", [
    ("somebody/typo", "neither a local folder somebody/typo nor a repository http.*/somebody/typo that you may read"),
    ("somebody/ gap", "no folder somebody/ gap, and that is no name of a repository"),
    ("./somebody/model", "there is no folder somebody/model"), ("~/model", "there is no folder /.*/model"),
    ("/model", "there is no folder /model"),
    ("a/b/c", "there is no folder a/b/c"), ("model", "there is no folder model"),
])
def test_names_of_nothing(server, name, message):
  with pytest.raises(hub.CheckpointError, match=message):
    download.locate(name, download.ENCODER)


def test_gated_repository(server):
  server.gated.add(NAME)
  with pytest.raises(hub.CheckpointError, match="accept its terms on that page, then run `hf auth login`"):
    download.locate(NAME, download.ENCODER)


def test_pickles_are_refused_before_anything_is_fetched(server, tmp_path):
  server.repositories[NAME]["main"] = {"config.json": b"{}", "pytorch_model.bin": b"big"}
  for part in ("config.json", "pytorch_model.bin"):
    (tmp_path / part).write_bytes(server.repositories[NAME]["main"][part])
  for name in (NAME, tmp_path):
    with pytest.raises(hub.CheckpointError, match=r"only pickled weights \(pytorch_model.bin\).*"
                                                  r"`python -m digzsl_jax.convert FOLDER NEW_FOLDER`"):
      download.locate(name, download.ENCODER)
  assert not server.contents


def test_a_local_folder_goes_first(server, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  folder = pathlib.Path(NAME)
  folder.mkdir(parents=True)
  with pytest.raises(hub.CheckpointError, match="somebody/model has no config.json"):
    download.locate(NAME, download.ENCODER)
  (folder / "config.json").write_text("{}")
  with pytest.raises(hub.CheckpointError, match="no weights in somebody/model"):
    download.locate(NAME, download.ENCODER)
  (folder / "model.safetensors").write_bytes(weights(1))
  assert download.locate(NAME, download.ENCODER) == folder
  with pytest.raises(hub.CheckpointError, match="somebody/model has no text_encoder/config.json"):
    download.locate(NAME, download.STABLE_DIFFUSION)
  assert not server.contents


def test_a_connection_that_breaks_is_taken_up_again(server, monkeypatch):
  monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
  data = np.random.default_rng(0).bytes(1 << 20)
  server.repositories[NAME]["main"]["model.safetensors"] = data
  server.cut["model.safetensors"] = 300_000
  folder = download.locate(NAME, download.ENCODER)
  assert (folder / "model.safetensors").read_bytes() == data
  asked = [start for name, start in server.contents if name == "model.safetensors"]
  assert asked == [None, "bytes=300000-"]


def test_a_download_that_was_killed_leaves_the_cache_whole(server, tmp_path, monkeypatch):
  server.repositories[NAME]["main"]["model.safetensors"] = data = np.random.default_rng(0).bytes(1 << 20)
  server.cut["model.safetensors"] = 300_000
  with monkeypatch.context() as patch:
    def killed(seconds):
      raise KeyboardInterrupt
    patch.setattr(time, "sleep", killed)
    with pytest.raises(KeyboardInterrupt):
      download.locate(NAME, download.ENCODER)
  assert not [path for path in (tmp_path / "cache").rglob("model.safetensors")]
  folder = download.locate(NAME, download.ENCODER)
  assert (folder / "model.safetensors").read_bytes() == data
  assert not list((tmp_path / "cache").rglob("*.incomplete"))


def test_a_full_disk_is_named(server, tmp_path, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")
  with monkeypatch.context() as patch:
    patch.setattr("huggingface_hub.file_download._chmod_and_move", full)
    with pytest.raises(hub.CheckpointError, match=f"no space left in {tmp_path}/cache for somebody/model.*HF_HOME"):
      download.locate(NAME, download.ENCODER)
  assert list(hub.read_tensors(download.locate(NAME, download.ENCODER))) == ["w1"]


def test_a_disk_that_fills_while_it_is_written(server, tmp_path, capfd):
  import resource
  server.repositories[NAME]["main"]["model.safetensors"] = bytes(1 << 20)
  huggingface_hub.utils.enable_progress_bars()
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
  try:
    with pytest.raises(hub.CheckpointError, match=f"no space left in {tmp_path}/cache for somebody/model"):
      download.locate(NAME, download.ENCODER)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert "Fetching 2 files" in capfd.readouterr().err
  assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > 50_000]


def test_config_fields_name_repositories(server, tiny_world, tiny_config, tmp_path):
  from digzsl_jax import logs
  for name in ("clip", "sd", "judge"):
    files = [path for path in (tiny_world / name).rglob("*") if path.is_file()]
    server.repositories[f"tiny/{name}"] = {"v1": {path.relative_to(tiny_world / name).as_posix(): path.read_bytes()
                                                  for path in files}}
  local = workspace.Workspace(tiny_config.to_dict(), tmp_path, logs.Log(tmp_path))
  tiny_config.models.update(clip="tiny/clip@v1", sd="tiny/sd@v1", judge="tiny/judge@v1")
  ws = workspace.Workspace(tiny_config.to_dict(), tmp_path, logs.Log(tmp_path))
  assert ws.model_fingerprints == local.model_fingerprints
  assert ws.clip_tokenizer.vocab_size == ws.sd_tokenizer.vocab_size and ws.judge[1] == local.judge[1]
  (ws.model_paths["sd"] / "README.md").write_text("not read")
  assert workspace.Workspace(tiny_config.to_dict(), tmp_path, ws.log).model_fingerprints == local.model_fingerprints
  tiny_config.models.judge = "tiny/judge@v2"
  with pytest.raises(ValueError, match=r"config.models.judge is 'tiny/judge@v2', but repository tiny/judge has no "
                                       r"revision 'v2'.*owner/name@revision of the hub, or one of \['embedded:"):
    _ = workspace.Workspace(tiny_config.to_dict(), tmp_path, ws.log).model_paths


@pytest.fixture
def cache(tmp_path):
  """In place of the folder of compiled code."""
  before = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
  yield tmp_path / "cache"
  jax.config.update("jax_compilation_cache_dir", before)


def test_digests_of_large_files_are_remembered(cache, tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint, "LARGE", 4)
  folder, hashed, digest = tmp_path / "model", [], hashlib.file_digest
  folder.mkdir()
  (folder / "a").write_text("large")
  (folder / "b").write_text("b")
  monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: hashed.append(file.name[-1]) or digest(file, kind))
  first = checkpoint.fingerprint_files(folder, ["a", "b"])
  assert checkpoint.fingerprint_files(folder, ["b", "a"]) == first
  assert hashed == ["a", "b", "b"]
  (folder / "a").write_text("LARGE")
  second = checkpoint.fingerprint_files(folder, ["a", "b"])
  assert second != first
  (cache / "digests.json").write_text("{")
  assert checkpoint.fingerprint_files(folder, ["a", "b"]) == second == checkpoint.fingerprint_folder(folder)
  assert hashed[3:] == ["a", "b", "a", "b", "b"]
