"""A file is written whole or not at all."""

import os

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from digzsl_jax import files


def test_others_may_read_what_the_umask_allows(tmp_path):
  old = os.umask(0o022)
  try:
    files.write_atomic(tmp_path / "a", lambda path: safetensors.numpy.save_file({"x": np.zeros(3)}, path))
  finally:
    os.umask(old)
  assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"),
                                   safetensors.SafetensorError("I/O error: No space left on device")])
def test_a_failed_write_names_the_file_and_leaves_the_old_one(tmp_path, error):
  (tmp_path / "a").write_text("old")

  def fail(path):
    path.write_text("half")
    raise error
  with pytest.raises(OSError, match=f"could not write {tmp_path}/a: .*No space left on device; finished files"):
    files.write_atomic(tmp_path / "a", fail)
  assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"
