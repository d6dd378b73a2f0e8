"""The report page: self-contained, complete, escaped, tolerant; t-SNE and chart arithmetic."""

import base64
import dataclasses
import html
import html.parser
import math
import re
import types

import numpy as np
import pytest

from digzsl_jax import checkpoint, files, report_page, report_parts, workspace
from digzsl_jax.data import images, scenes, splits
from digzsl_jax.runs import report

SETTINGS = report.Settings(images_per_class=8, thumbnail=96, published=())
TEST = ("plain crimson star", "plain orange star", "striped gold cross", "checked teal <ring> & \"co\"",
        "plain crimson triangle", "striped green ring")
VALIDATION = ("plain teal circle", "striped violet square", "checked gold star")
SECTIONS = ("accuracy", "pictures", "quality", "classes", "tokens", "losses", "lambda-curve",
            "images-curve", "times", "appendix")


def fake_results(rng) -> dict:
  def entry(t1, u, s, scale):
    h = 2 * u * s / (u + s)
    return {"czsl": {"T1": t1, "T1_per_image": t1 + 1, "per_class": {
                n: float(np.clip(t1 + 18 * rng.standard_normal(), 0, 100)) for n in TEST}},
            "gzsl": {"U": u, "S": s, "H": h, "lambda": scale, "lambda_chosen_on": "validation classes"}}

  def curve(shift):
    xs = np.linspace(0, 1, 21)
    us, ss = 60 / (1 + np.exp(-8 * (xs - shift))), 88 / (1 + np.exp(9 * (xs - shift - 0.2)))
    return [{"lambda": x, "U": u, "S": s, "H": 2 * u * s / (u + s)}
            for x, u, s in zip(xs.tolist(), us.tolist(), ss.tolist())]

  agreement = {"cdm_agreement": 57.0, "plain_sd_cdm_agreement": 26.0,
               "judge_agreement": 44.0, "plain_sd_judge_agreement": 27.0,
               "judge_pair_agreement": 94.0, "plain_sd_judge_pair_agreement": 93.0}
  per_class = {name: {key: float(np.clip(value + 15 * rng.standard_normal(), 0, 100))
                      for key, value in agreement.items()} for name in TEST}
  residual, plain = entry(82.4, 70.0, 80.0, 0.3), entry(33.1, 30.2, 70.1, 0.35)
  return {
    "dataset": "scenes", "classes": {"seen": 92, "unseen": len(TEST)}, "seed": 0, "gap_closed": 0.31,
    **entry(49.2, 46.0, 71.4, 0.42),
    "gzsl_oracle": {"U": 50.0, "S": 69.0, "H": 58.0, "lambda": 0.5, "lambda_chosen_on": "test (oracle)"},
    "baselines": {
      "clip_zero_shot": entry(60.2, 41.0, 60.0, 0.2),
      "cdm_prototype": residual, "cdm_prototype_residual": residual,
      "cdm_prototype_mlp": entry(80.5, 68.0, 80.0, 0.3),
      "plain_sd": plain, "real_images": entry(89.4, 84.0, 86.0, 0.1)},
    "generated": agreement | {"per_class": per_class}, "quality": fake_quality(),
    "validation": {"czsl": {"T1": 51.0}, "gzsl": {"U": 44.0, "S": 70.0, "H": 54.0}},
    "lambda_curve": {"learned": curve(0.3), "plain": curve(0.45)},
    "images_curve": {source: [{"images": n, "T1": t1 - 20 / n} for n in (3, 6, 12, 24)]
                     for source, t1 in (("learned", 49.2), ("plain", 33.1))},
    "seconds": {"cdm": 12.1, "tokens": 184.3, "generate": 61.0, "classifier": 9.4, "evaluate": 1.2},
    "devices": "1 x cpu"}


def fake_quality() -> dict:
  per_class = {name: {"images": {"real": 10 + k, "generated": 24}, "plain": {"kid": None, "cmmd": 0.5 * k},
                      "learned": {"kid": 0.01 * k - 0.02, "cmmd": 0.25 * k}} for k, name in enumerate(TEST)}
  return {"clip": "embedded:scenes/clip", "resize": "bilinear", "images": {"real": 75, "generated": 144},
          "learned": {"fid": 31.234, "kid": 0.0012, "kid_std": 0.00034, "cmmd": 0.4567},
          "plain": {"fid": 42.1, "kid": -0.0021, "kid_std": 0.00045, "cmmd": 0.789}, "per_class": per_class}


def fake_dataset() -> splits.Dataset:
  names = VALIDATION + ("striped teal cross", "plain gold ring") + TEST
  seen, unseen = tuple(range(5)), tuple(range(5, len(names)))

  def pictures(classes, count, seed):
    labels = np.repeat(np.array(classes, np.int32), count)
    pictured, _ = scenes.render(labels[:, None] % 6, labels[:, None] % 6, labels[:, None] % 3, seed=seed,
                                style="target")
    return splits.LabelledImages(pictured, labels)

  return splits.Dataset("scenes", names, seen, unseen, (0, 1, 2), pictures(seen, 4, 0), pictures(seen, 2, 1),
                        pictures(unseen, 10, 2))


def fake_run(workdir, rng):
  """A working directory as the stages before `report` leave it, and its workspace."""
  dataset = fake_dataset()
  files.write_json(workdir / "results.json", fake_results(rng))
  files.write_json(workdir / "versions.json", {"python": "3.11", "jax": "0.10.2", "flax": "0.12.8"})
  start = rng.standard_normal(16).astype(np.float32)
  for task, names in (("test", TEST), ("validation", VALIDATION)):
    tokens = {name: start + rng.standard_normal(16).astype(np.float32) for name in names}
    checkpoint.write_arrays(workdir / "tokens" / workspace.TOKENS[task], tokens)
    steps = np.arange(60)
    curves = {name: {"loss": (0.9 + np.exp(-steps / 20) + 0.1 * rng.standard_normal(60)).tolist(),
                     "accuracy": (1 - np.exp(-steps / 30)).tolist(), "stopped": stop, "best_step": 41}
              for name, stop in zip(names, ("accuracy", "patience", "cap", "nan") * 2)}
    curves[names[0]]["loss"][7] = math.nan
    files.write_json(workdir / "tokens" / f"{task}_curves.json", curves)
  folder, made = workdir / "generate" / "test", {"learned": {}, "plain": {}}
  for source, blur in (("learned", 0.1), ("plain", 0.3)):
    (folder / source).mkdir(parents=True)
    for k, name in enumerate(TEST):
      clean = dataset.test_unseen.images_nhwc[k * 10:(k + 1) * 10]
      noisy = np.clip(clean + 127.5 * blur * rng.standard_normal(clean.shape), 0, 255).astype(np.uint8)
      made[source][name] = [f"{source}/{k}_{i}.png" for i in range(10)]
      for path, picture in zip(made[source][name], noisy):
        images.write_png(folder / path, picture)
  files.write_json(folder / "manifest.json", {"classes": list(TEST), "images": 10, "files": made})
  config = {"seed": 0, "tokens": {"initial": "a", "guide": "cdm"}, "report": dataclasses.asdict(SETTINGS)}
  return types.SimpleNamespace(
    workdir=workdir, dataset=dataset, seed=0, config=config, folder=lambda name: workdir / name,
    initial_token=start,
    stages=dict.fromkeys(("cdm", "tokens", "generate", "classifier", "evaluate", "report")))


class Reader(html.parser.HTMLParser):
  """Collects tags and checks that they close."""

  def __init__(self, text: str):
    super().__init__()
    self.open, self.elements = [], []
    self.feed(text)
    assert self.open == []

  def handle_starttag(self, name, attributes):
    self.elements.append((name, dict(attributes)))
    if name not in ("meta", "img"):
      self.open.append(name)

  def handle_endtag(self, name):
    if name != "img":
      assert self.open.pop() == name


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  return fake_run(tmp_path_factory.mktemp("run"), np.random.default_rng(0))


def write_report(ws, settings=SETTINGS) -> str:
  report.run(settings, ws, ws.workdir / "report")
  return (ws.workdir / "report.html").read_text()


@pytest.fixture(scope="module")
def text(finished):
  return write_report(finished)


def with_results(ws, tmp_path, change) -> types.SimpleNamespace:
  """The same run with other results in a folder of its own."""
  results = files.read_json(ws.workdir / "results.json")
  change(results)
  files.write_json(tmp_path / "results.json", results)
  return types.SimpleNamespace(**vars(ws) | {"workdir": tmp_path})


def test_page_is_whole_and_loads_nothing(text):
  reader = Reader(text)
  assert text.isascii()
  assert [a["id"] for name, a in reader.elements if name == "section"] == list(SECTIONS)
  for name, attributes in reader.elements:
    assert name not in ("script", "link", "iframe", "object", "base")
    for key in ("src", "href", "srcset", "data", "action"):
      assert attributes.get(key, "data:").startswith("data:")
  assert not re.search(r"https?://|@import|url\(", text)
  assert "prefers-color-scheme" in text


def test_pictures_stand_in_pairs_of_the_same_noise(text):
  strips = re.findall(r'<div class="strip (\w+)"', text)
  assert strips == ["plain", "learned", "real"] * len(TEST)
  assert text.count("<img ") == len(TEST) * 8 * 3
  assert "for the eye only" in text


def test_names_are_escaped(text):
  assert "<ring>" not in text
  assert text.count("checked teal &lt;ring&gt; &amp; &quot;co&quot;") > 5


def table_rows(text: str, section: str) -> dict[str, list[str]]:
  """{first cell: other cells} of the first table of a section, tags removed."""
  table = text.split(f'id="{section}"')[1].split("</table>")[0]
  rows = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row) for row in re.findall(r"<tr.*?>(.*?)</tr>", table)]
  clean = [[html.unescape(re.sub("<.*?>", "", cell)) for cell in row] for row in rows]
  return {name: cells for name, *cells in clean}


def test_headline_numbers_and_differences(text):
  rows = table_rows(text, "accuracy")
  assert rows[report.OURS] == ["49.2", "46.0", "71.4", "56.0", "0.42", "57.0", "44.0", "94.0"]
  assert rows[report.PLAIN] == ["33.1", "30.2", "70.1", "42.2", "0.35", "26.0", "27.0", "93.0"]
  assert [c.replace("\u202f", "") for c in rows["Difference in points"]] == [
      "\u25b216.1", "\u25b215.8", "\u25b21.3", "\u25b213.7", "", "\u25b231.0", "\u25b217.0", "\u25b21.0"]
  assert list(rows)[4:] == ["CDM prototype, residual (guides the tokens)", "CDM prototype, MLP",
                            "CLIP zero-shot", "Real images (bound)", "DIG-ZSL, oracle \u03bb"]
  assert rows["CLIP zero-shot"][:5] == ["60.2", "41.0", "60.0", "48.7", "0.20"]
  assert rows["DIG-ZSL, oracle \u03bb"][:5] == ["49.2", "50.0", "69.0", "58.0", "0.50"]


def test_the_guide_is_named(finished, tmp_path):
  ws = with_results(finished, tmp_path, lambda results: None)
  ws.config = ws.config | {"tokens": {"initial": "a", "guide": "clip"}}
  ws.folder = lambda name: finished.workdir / name
  assert [name for name in table_rows(write_report(ws), "accuracy") if "guides" in name] == [
      "CLIP zero-shot (guides the tokens)"]


def test_image_quality(text):
  assert table_rows(text, "quality") == {
      "": ["FID, lower is better", "KID, lower is better", "CMMD, lower is better"],
      report.OURS: ["31.23", "0.00120 \u00b1 0.00034", "0.457"],
      report.PLAIN: ["42.10", "-0.00210 \u00b1 0.00045", "0.789"]}
  part = html.unescape(text.split('id="quality"')[1].split("</section>")[0])
  assert "144 generated pictures (24 of a class) with 75 real pictures (10 to 15 of a class)" in part
  assert "FID of so few pictures is far too high" in part and "own CLIP, embedded:scenes/clip: it compares" in part
  assert [name for name in re.findall(r'class="ink">(.*?)</text>', part)] == list(TEST)
  kid = re.findall(r"<td>(.*?)</td>", part.split("KID by class")[1])
  assert kid[:4] == ["\u2013", "-0.02000", "\u2013", "-0.01000"]


def test_image_quality_without_inception_or_with_many_images(finished, tmp_path):
  def without_inception(results):
    for values in (found := results["quality"])["learned"], found["plain"]:
      for metric in ("fid", "kid", "kid_std"):
        del values[metric]

  text = write_report(with_results(finished, tmp_path, without_inception))
  assert table_rows(text, "quality")[report.OURS] == ["0.457"] and "KID by class" not in text and "FID" not in text
  many = lambda results: results["quality"].update(images={"real": 10_000, "generated": 10_000})
  assert "so few pictures" not in write_report(with_results(finished, tmp_path, many))


def test_stages_and_classes_keep_their_order(text):
  charts = [text.split(f'id="{part}"')[1].split("</svg>")[0] for part in ("classes", "times")]
  bars = [re.findall(r'text-anchor="end" class="ink">(.*?)<', chart) for chart in charts]
  assert [html.unescape(name) for name in bars[0]] == list(TEST)
  assert bars[1] == ["cdm", "tokens", "generate", "classifier", "evaluate"]


def test_verdict_is_honest_both_ways(finished, text, tmp_path):
  assert "Learnt class tokens raise T1" in text and "31 % of the way" in text
  assert "fooling" not in text

  def worse(results):
    results["czsl"]["T1"] = 20.0
    results["gap_closed"] = -0.2
    results["generated"]["judge_pair_agreement"] = 80.0
  spoiled = write_report(with_results(finished, tmp_path, worse))
  assert "Learnt class tokens lower T1" in spoiled and "of the way" not in spoiled
  assert "may be fooling the CDM" in spoiled and "falls: Judge (pair) by 13.0" in spoiled
  assert "Without generating any image, CDM prototypes reach 82.4 % and those of CLIP reach 60.2 %" in spoiled


def test_published_rows(finished, tmp_path):
  published = (("Method <A>", 70.5, None, None, 81.7),)
  ws = with_results(finished, tmp_path, lambda results: None)
  text = write_report(ws, dataclasses.replace(SETTINGS, published=published))
  row = table_rows(text, "accuracy")["Method <A> (published)"]
  assert row[:5] == ["70.5", "\u2013", "\u2013", "81.7", "\u2013"]


def test_missing_optional_parts_are_left_out(finished, tmp_path):
  def bare(results):
    for key in set(results) - {"dataset", "czsl"}:
      del results[key]
    del results["czsl"]["per_class"]
  ws = with_results(finished, tmp_path, bare)
  ws.folder = lambda name: tmp_path / name if name == "tokens" else finished.workdir / name
  assert re.findall(r'<section id="(.*?)"', write_report(ws)) == ["accuracy", "pictures", "appendix"]


def test_large_pictures_are_reduced():
  uri = report_parts.data_uri(np.zeros((300, 200, 3), np.uint8), 96)
  header = base64.b64decode(uri.split(",")[1])
  assert int.from_bytes(header[16:20], "big") == 64 and int.from_bytes(header[20:24], "big") == 96


def test_results_are_required(finished, tmp_path):
  ws = types.SimpleNamespace(**vars(finished) | {"workdir": tmp_path})
  with pytest.raises(ValueError, match="results.json is missing; run the stage evaluate"):
    report.run(SETTINGS, ws, tmp_path)


@pytest.mark.parametrize("field, value", [
  ("images_per_class", 0), ("thumbnail", 2), ("published", (("A", 1.0),)), ("published", (3,)),
  ("published", (("A", "high", None, None, None),))])
def test_settings_refuse_nonsense(field, value):
  with pytest.raises(ValueError, match=field):
    dataclasses.replace(SETTINGS, **{field: value})


def test_affinities_reach_the_perplexity():
  points = np.random.default_rng(0).standard_normal((40, 8))
  squared = ((points[:, None] - points[None])**2).sum(-1)
  p = report_page.affinities(squared, 10.0)
  assert p.sum() == pytest.approx(1) and np.array_equal(p, p.T)
  # Two copies of one configuration far apart: within each, rows are the conditionals of 19 others.
  ring = np.exp(2j * np.pi * np.arange(20) / 20)
  squared = abs(ring[:, None] - ring[None])**2
  row = report_page.affinities(squared, 5.0)[0] * 20  # all rows alike, so joint = conditional / n
  assert math.exp(-(row[1:] * np.log(row[1:])).sum()) == pytest.approx(5, rel=1e-4)


@pytest.mark.parametrize("each", [3, 8, 20])
def test_tsne_keeps_clusters_apart(each):
  rng = np.random.default_rng(1)
  centres = 8 * rng.standard_normal((3, 32))
  points = np.repeat(centres, each, 0) + rng.standard_normal((3 * each, 32))
  placed = report_page.tsne(points, min(30, (3 * each - 1) / 3))
  assert np.array_equal(placed, report_page.tsne(points, min(30, (3 * each - 1) / 3)))
  labels, distance = np.repeat(np.arange(3), each), np.linalg.norm(placed[:, None] - placed[None], axis=-1)
  np.fill_diagonal(distance, np.inf)
  assert (labels[distance.argmin(1)] == labels).all()


def test_every_vector_of_a_token_is_a_point(tmp_path):
  ws = fake_run(tmp_path, np.random.default_rng(0))
  one = str(report.token_map(ws)).count("<circle")
  file = tmp_path / "tokens" / workspace.TOKENS["test"]
  checkpoint.write_arrays(file, {name: np.stack([vector_d, -vector_d, 2 * vector_d])
                                 for name, vector_d in checkpoint.read_arrays(file).items()})
  assert str(report.token_map(ws)).count("<circle") == one + 2 * len(TEST)


def test_tsne_of_equal_points_is_zero():
  assert not report_page.tsne(np.ones((6, 4)), 2.0).any()


def test_ticks_and_labels():
  assert report_page.ticks(0, 100) == [0, 20, 40, 60, 80, 100]
  assert report_page.ticks(0.0, 0.5, 5) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
  assert report_page.ticks(3, 3) == [3]
  assert report_page.spread([10, 50, 12], 13) == [10, 50, 23]
  assert report_page.number(None) == report_page.number(math.nan) == "\u2013"
