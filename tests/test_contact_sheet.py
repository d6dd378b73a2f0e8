"""Pages of thumbnails: what is on which, that they load nothing, and what becomes of odd names and absent pictures."""

import re

from PIL import Image

from digzsl_jax import contact_sheet, logs
from tests.random_weights import photographs


def shown(folder, count):
  folder.mkdir(exist_ok=True)
  for i in range(count):
    Image.fromarray(photographs(40, 200)[i % 2]).save(folder / f"{i} & 'one'.jpg")
  return [contact_sheet.Shown(f"{folder}/{i} & 'one'.jpg", ("<dog>",), {"<dog>": 0.5, "cat": i / count})
          for i in range(count)]


def sheet(folder, pictures, wrong=()):
  return contact_sheet.write(folder, pictures, dict(wrong), [("model", "tiny")],
                             lambda count: logs.Log(None).progress(count, "contact sheet"))


def test_contact_sheet_in_pages(tmp_path, monkeypatch):
  monkeypatch.setattr(contact_sheet, "PER_PAGE", 2)
  pictures = shown(tmp_path / "in", 5)
  assert sheet(tmp_path / "out", pictures) == tmp_path / "out" / "contact_sheet.html"
  names = ["contact_sheet.html", "contact_sheet_2.html", "contact_sheet_3.html"]
  assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
  for number, name in enumerate(names):
    page = (tmp_path / "out" / name).read_text("ascii")
    assert page.count("<img") == (2, 2, 1)[number] == page.count("src=") == page.count("src=\"data:image/jpeg;base64,")
    assert not re.search(r"https?:|@import|url\(|<script|<link", page)
    assert "&lt;dog&gt;" in page and "<dog>" not in page
    hrefs = re.findall(r'href="([^"]*)"', page)
    assert set(names) - set(hrefs) == {name}
    assert [href for href in hrefs if "in/" in href] == [f"../in/{i}%20%26%20%27one%27.jpg" for i in range(
        2 * number, min(2 * number + 2, 5))]
  first = (tmp_path / "out" / names[0]).read_text()
  assert "Tags of 5 pictures" in first and "How often: 1 label<" in first
  (tmp_path / "in" / "1 & 'one'.jpg").unlink()
  sheet(tmp_path / "out", pictures[:2])
  page = (tmp_path / "out" / names[0]).read_text()
  assert [path.name for path in (tmp_path / "out").iterdir()] == names[:1]
  assert page.count("<img") == 1 and "cannot be read now" in page and "--w: 100.0%" in page


def test_a_sheet_of_nothing_says_what_is_wrong(tmp_path):
  page = sheet(tmp_path, [], {"a<b.png": "a<b.png cannot be read"}).read_text()
  assert "Tags of 0 pictures" in page and "1 picture could not be read" in page and "a&lt;b.png cannot" in page
