import threading

import numpy as np
import pytest

from digzsl_jax import batches


def test_every_epoch_sees_the_images_in_another_order():
  epochs = [np.concatenate([batches.rows(11, 3, 7, epoch * 3 + place) for place in range(3)]) for epoch in range(3)]
  for rows_n in epochs:
    assert len(set(rows_n.tolist())) == 9 and set(rows_n.tolist()) <= set(range(11))
  assert not np.array_equal(epochs[0], epochs[1]) and len(set(np.concatenate(epochs).tolist())) == 11
  np.testing.assert_array_equal(batches.rows(11, 3, 7, 5), batches.rows(11, 3, 7, 5))
  assert not np.array_equal(batches.rows(11, 3, 8, 0), batches.rows(11, 3, 7, 0))


def test_batches_are_made_ahead_in_their_order():
  made, threads = [], set()

  def make(step):
    made.append(step)
    threads.add(threading.current_thread())
    return step * 10

  found = batches.ahead(make, range(4, 9))
  assert next(found) == 40
  assert [40, *found] == [step * 10 for step in range(4, 9)] and made == list(range(4, 9))
  assert threading.main_thread() not in threads
  assert list(batches.ahead(make, range(3, 3))) == []


def test_an_error_reaches_who_waits_and_nothing_more_is_made():
  made = []

  def make(step):
    made.append(step)
    if step == 1:
      raise ValueError("picture 7 is damaged")

  with pytest.raises(ValueError, match="picture 7 is damaged"):
    list(batches.ahead(make, range(100)))
  assert len(made) < 8


def test_processes_share_a_batch(monkeypatch):
  rows_b = np.arange(12)
  monkeypatch.setattr(batches.jax, "process_count", lambda: 3)
  parts = []
  for index in range(3):
    monkeypatch.setattr(batches.jax, "process_index", lambda index=index: index)
    parts.append(batches.mine(rows_b))
  np.testing.assert_array_equal(np.concatenate(parts), rows_b)


def test_a_result_is_read_once_the_next_is_asked_for():
  asked = []
  found = batches.behind(asked.append(n) or n for n in range(4))
  assert [(n, len(asked)) for n in found] == [(0, 2), (1, 3), (2, 4), (3, 4)]
  assert list(batches.behind([])) == [] and list(batches.behind("a")) == ["a"]
