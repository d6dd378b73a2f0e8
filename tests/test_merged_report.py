"""The merged report: which runs count as one, mean and spread, what is left out, and the page."""

import re

import numpy as np
import pytest

from configs import quickstart, quickstart_clip_decoder, quickstart_tagclip
from digzsl_jax import files, merged_runs, report, report_page


def write_config(folder, config, seed, changes):
  config = config.to_dict() | {"seed": seed}
  for field, value in changes:
    section, _, name = field.partition(".")
    config[section][name] = value
  files.write_json(folder / "config.json", config)


def write_run(folder, t1, *, seed=0, dataset="scenes", changes=(), **extra):
  """A finished run with little in it; `changes` are `(dotted field, value)` of the quickstart's config."""
  write_config(folder, quickstart.get_config(), seed, changes)
  results = {"dataset": dataset, "czsl": {"T1": t1}, "gzsl": {"H": t1 + 10, "lambda": 0.4},
             "gzsl_oracle": {"H": t1 + 11}, "baselines": {"plain_sd": {"czsl": {"T1": t1 - 10}}},
             "images_curve": {source: [{"images": images, "T1": t1 - less / images} for images in (3, 6, 12)]
                              for source, less in (("learned", 6), ("plain", 12))},
             "lambda_curve": {"learned": [{"lambda": x / 4, "U": t1 * x / 4, "S": 80 - 15 * x, "H": t1 / 2}
                                          for x in range(5)]}}
  files.write_json(folder / "results.json", results | extra)


def write_decoder(folder, zsl, *, seed=0, dataset="labels", changes=(), parts=("zsl", "gzsl", "seen")):
  """A finished run of CLIP-Decoder: GZSL is 10 below ZSL, seen labels are 20 above."""
  write_config(folder, quickstart_clip_decoder.get_config(), seed, changes)

  def lists(zsl):
    found = {"zsl": zsl, "gzsl": zsl - 10, "seen": zsl + 20}
    return {part: {"mAP": found[part], "F1@3": found[part] / 2, "F1@5": found[part] / 4} for part in parts}
  files.write_json(folder / "results.json", lists(zsl) | {
      "method": "clip_decoder", "dataset": dataset, "warnings": [],
      "baselines": {"clip_zero_shot": lists(30.0), "random_scores": lists(12.0), "last_weights": lists(zsl - 1)}})


def run(*arguments, capsys):
  status = report.main([str(argument) for argument in arguments])
  captured = capsys.readouterr()
  return status, captured.out, captured.err


def rows(text):
  """{settings: {column: cell}} of the first Markdown table."""
  cells = [line.strip("| ").split(" | ") for line in text.split("\n\n")[1].splitlines()]
  return {row[0]: dict(zip(cells[0][1:], row[1:])) for row in cells[2:]}


def test_seeds_are_averaged_and_the_rest_grouped(tmp_path, capsys):
  accuracies = {"x0": (50.0, 61.0, 73.0), "last": (40.0,)}
  for gradient, values in accuracies.items():
    for seed, t1 in enumerate(values):
      write_run(tmp_path / f"{gradient}{seed}", t1, seed=seed, changes=[("tokens.gradient", gradient)])
  status, out, err = run(tmp_path, capsys=capsys)
  assert status == 0 and not err
  expected = f"{np.mean(accuracies['x0']):.1f} \u00b1 {np.std(accuracies['x0'], ddof=1):.1f}"
  found = rows(out)
  assert list(found) == ["gradient=last", "gradient=x0"]
  assert found["gradient=x0"]["runs"] == "3" and found["gradient=x0"]["T1"] == expected == "61.3 \u00b1 11.5"
  assert found["gradient=x0"]["oracle H"] == "72.3 \u00b1 11.5" and found["gradient=last"]["T1"] == "40.0"
  assert found["gradient=last"] == {"runs": "1", "T1": "40.0", "H": "50.0", "oracle H": "51.0", "plain SD T1": "30.0"}
  assert "Rows are of different seeds" in out
  assert "Rows are of different seeds" in (tmp_path / "merged_report.html").read_text()


def test_what_no_result_depends_on_makes_no_group(tmp_path, capsys):
  write_run(tmp_path / "a", 50.0, seed=0)
  write_run(tmp_path / "b", 60.0, seed=1, changes=[("cdm.cache", "elsewhere"), ("report.thumbnail", 20),
                                                   ("mesh.devices", 2)])
  assert rows(run(tmp_path, capsys=capsys)[1]) == {"as configured": {
      "runs": "2", "T1": "55.0 \u00b1 7.1", "H": "65.0 \u00b1 7.1", "oracle H": "66.0 \u00b1 7.1",
      "plain SD T1": "45.0 \u00b1 7.1"}}


def test_labels_name_what_is_unusual_in_as_few_words_as_tell_fields_apart(tmp_path, capsys):
  for name, changes in {"0": [], "1": [("tokens.guide", "clip")], "2": [("tokens.images", 6)],
                        "3": [("tokens.images", 1), ("cdm.steps", 5)]}.items():
    write_run(tmp_path / name, 50.0, changes=changes)
  _, out, _ = run(tmp_path, capsys=capsys)
  # tokens.images=3 is that of half the groups, not of more.
  assert list(rows(out)) == ["tokens.images=3", "guide=clip, tokens.images=3", "tokens.images=6",
                             "cdm.steps=5, tokens.images=1"]
  assert "Where a row does not say otherwise: cdm.steps=600, guide=cdm.\n" in out
  assert "different seeds" not in out


def test_data_sets_have_tables_of_their_own(tmp_path, capsys):
  write_run(tmp_path / "a", 50.0)
  write_run(tmp_path / "b", 70.0, dataset="CUB <b>")
  _, out, _ = run(tmp_path / "a", tmp_path / "b", capsys=capsys)
  assert re.findall(r"^(\S.*)\n\n\| settings", out, re.M) == ["DIG-ZSL on scenes", "DIG-ZSL on CUB <b>"]
  text = (tmp_path / "a" / "merged_report.html").read_text()
  assert re.findall("<h1>(.*?)</h1>", text) == ["DIG-ZSL on scenes", "DIG-ZSL on CUB &lt;b&gt;"]


def test_quality_has_its_columns(tmp_path, capsys):
  for seed, cmmd in enumerate((0.52, 0.56)):
    write_run(tmp_path / str(seed), 50.0, seed=seed,
              quality={"learned": {"cmmd": cmmd, "fid": 40.0 + seed}, "plain": {"cmmd": 1.0}})
  found = rows(run(tmp_path, capsys=capsys)[1])["as configured"]
  assert (found["CMMD"], found["plain SD CMMD"], found["FID"]) == ("0.54 \u00b1 0.03", "1.00 \u00b1 0.00",
                                                                 "40.5 \u00b1 0.7")
  assert "plain SD FID" not in found


def test_methods_are_not_mixed(tmp_path, capsys):
  for method in ("dig_zsl", "gaussian_features"):
    write_run(tmp_path / method, 50.0, method=method)
  _, out, _ = run(tmp_path, capsys=capsys)
  assert list(rows(out)) == ["method=dig_zsl", "method=gaussian_features"]
  assert out.startswith("DIG-ZSL and Gaussian features on scenes\n")


def test_warnings_of_runs_stand_below_the_table(tmp_path, capsys):
  for seed in (0, 1):
    write_run(tmp_path / str(seed), 50.0, seed=seed, warnings=["numbers mean <nothing>"])
  assert run(tmp_path, capsys=capsys)[1].count("numbers mean <nothing>") == 1
  assert (tmp_path / "merged_report.html").read_text().count("numbers mean &lt;nothing&gt;") == 1


def damage(folder):
  (folder / "results.json").write_text('{"czsl": ')


def lack_t1(folder):
  results = files.read_json(folder / "results.json")
  del results["czsl"]["T1"]
  files.write_json(folder / "results.json", results)


def lack_seen(folder):
  results = files.read_json(folder / "results.json")
  results["seen"]["mAP"] = None
  files.write_json(folder / "results.json", results)


def lack_seed(folder):
  config = files.read_json(folder / "config.json")
  del config["seed"]
  files.write_json(folder / "config.json", config)


def not_finish(folder):
  (folder / "results.json").unlink()
  files.write_json(folder / "versions.json", {})


@pytest.mark.parametrize("spoil, said", [
  (damage, r"bad/results.json is not valid JSON"),
  (lack_t1, r"bad/results.json: czsl.T1 is None, so it is damaged"),
  (lack_seed, r"bad/config.json: seed is None"),
  (lambda folder: (folder / "config.json").unlink(), "bad has no config.json"),
  (lambda folder: (folder / "results.json").write_text("[]"), "bad/results.json: czsl.T1 is None"),
  (not_finish, "bad has no results.json: the run has not finished"),
  (lambda folder: write_run(folder, 90.0, seed=0), "bad has config and seed of .*/a, and counts once")])
def test_what_cannot_count_is_named_and_left_out(tmp_path, capsys, spoil, said):
  write_run(tmp_path / "a", 50.0, seed=0)
  write_run(tmp_path / "bad", 90.0, seed=1)
  spoil(tmp_path / "bad")
  status, out, err = run(tmp_path, capsys=capsys)
  assert status == 1 and rows(out)["as configured"]["T1"] == "50.0"
  [line] = err.splitlines()
  assert line.startswith("left out: ") and re.search(said, line)


@pytest.mark.parametrize("spoil, said", [
  (damage, "bad/results.json is not valid JSON"),
  (lack_seen, "bad/results.json: seen.mAP is None, so it is damaged"),
  (not_finish, "bad has no results.json: the run has not finished")])
def test_a_decoder_that_cannot_count_is_named_too(tmp_path, capsys, spoil, said):
  write_decoder(tmp_path / "a", 50.0)
  write_decoder(tmp_path / "bad", 90.0, seed=1)
  spoil(tmp_path / "bad")
  status, out, err = run(tmp_path, capsys=capsys)
  assert status == 1 and rows(out)["as configured"]["ZSL mAP"] == "50.0"
  assert err.startswith("left out: ") and said in err and err.count("\n") == 1


def test_decoders_are_averaged_and_grouped(tmp_path, capsys):
  for queries, values in {"text": (40.0, 44.0), "random": (15.0,)}.items():
    for seed, zsl in enumerate(values):
      write_decoder(tmp_path / f"{queries}{seed}", zsl, seed=seed, changes=[("models.queries", queries)])
  write_decoder(tmp_path / "closed", 45.0, changes=[("train.groups", 10)], parts=("seen",))
  _, out, _ = run(tmp_path, capsys=capsys)
  found = rows(out)
  assert list(found) == ["groups=10", "queries=random", "as configured"]
  mean = found["as configured"]
  assert [mean[name] for name in ("ZSL mAP", "GZSL mAP", "seen mAP", "GZSL F1@3", "seen F1@5", "last ZSL mAP")] == [
      f"{value} \u00b1 {deviation}" for value, deviation in (
          (42.0, 2.8), (32.0, 2.8), (62.0, 2.8), (16.0, 1.4), (15.5, 0.7), (41.0, 2.8))]
  assert mean["CLIP GZSL mAP"] == "20.0 \u00b1 0.0" and mean["random seen mAP"] == "32.0 \u00b1 0.0"
  closed = {name: cell for name, cell in found["groups=10"].items() if cell != "\u2013"}
  assert set(closed) == {"runs", *(f"{name} mAP" for name in ("seen", "CLIP seen", "last seen", "random seen")),
                         "seen F1@3", "seen F1@5"}


def test_methods_have_tables_and_curves_of_their_own(tmp_path, capsys):
  write_run(tmp_path / "a", 50.0, dataset="same")
  for alpha, zsl in ((0.0, 41.0), (0.1, 43.0), (10.0, 42.0)):
    write_decoder(tmp_path / f"b{alpha}", zsl, dataset="same", changes=[("train.alpha", alpha)])
  status, out, err = run(tmp_path, capsys=capsys)
  text = (tmp_path / "merged_report.html").read_text()
  assert status == 0 and not err and list(rows(out)) == ["as configured"]
  first, second = text.split("<h1>")[1:]
  assert first.startswith("DIG-ZSL on same<") and second.startswith("CLIP-Decoder on same<")
  assert re.findall('<section id="(.*?)"', first) == ["tables", "images-curve", "lambda-curve"]
  assert re.findall('<section id="(.*?)"', second) == ["tables", "sensitivity"]
  assert second.count("<svg") == 1 and "train.alpha (logarithmic but for 0)" in second
  for line in ("ZSL mAP: 43.0", "GZSL mAP: 33.0", "seen mAP: 63.0", "ZSL mAP, CLIP alone: 30.0"):
    assert f"<title>{line}</title>" in second
  assert "mAP" not in first and "T1" not in second


def test_curves_of_seen_labels_alone(tmp_path, capsys):
  for groups in (10, 20):
    write_decoder(tmp_path / str(groups), 40.0, changes=[("train.groups", groups)], parts=("seen",))
  assert run(tmp_path, capsys=capsys)[0] == 0
  sensitivity = (tmp_path / "merged_report.html").read_text().split('<section id="sensitivity"')[1]
  assert sensitivity.count("<title>seen mAP: 60.0</title>") == 2 and "ZSL" not in sensitivity


@pytest.mark.parametrize("values, places, said", [
    ([0, 1, 5], [0, 1, 5], ""),
    ([-1, 1, 100], [-1, 1, 100], ""),
    ([0, 0.0], [0, 0], ""),
    ([1, 100], np.log([1, 100]), " (logarithmic)"),
    ([0, 0.1, 1, 10], np.log([0.01, 0.1, 1, 10]), " (logarithmic but for 0)")])
def test_places_on_an_axis(values, places, said):
  found, scale = report.places(values)
  np.testing.assert_allclose(found, places)
  assert scale == said


def test_no_run_at_all(tmp_path, capsys):
  status, out, err = run(tmp_path, capsys=capsys)
  assert (status, out, err) == (1, "", f"left out: there is no run in {tmp_path}\n")
  assert not list(tmp_path.iterdir())


def test_a_folder_counts_once_and_other_methods_not_at_all(tmp_path, capsys):
  write_run(tmp_path / "a", 50.0)
  (tmp_path / "a" / "generate").mkdir()
  write_run(tmp_path / "a" / "generate", 99.0)  # below a run is no other
  files.write_json(tmp_path / "models" / "config.json", {"method": "pretrain", "seed": 0})
  files.write_json(tmp_path / "models" / "versions.json", {})
  status, out, err = run(tmp_path, tmp_path / "a", capsys=capsys)
  assert status == 0 and not err and rows(out)["as configured"]["T1"] == "50.0"


@pytest.fixture
def study(tmp_path):
  """Five settings, two seeds each: the config, another guide, and gamma and a learning rate varied."""
  varied = {"base": [], "guide": [("tokens.guide", "clip")], "g3": [("tokens.stop_accuracy", 0.3)],
            "g5": [("tokens.stop_accuracy", 0.5)], "rate": [("tokens.learning_rate", 1.5)]}
  for number, (name, changes) in enumerate(varied.items()):
    for seed in (0, 1):
      write_run(tmp_path / f"{number}{name}{seed}", 40.0 + 5 * number + 2 * seed, seed=seed, changes=changes)
  return tmp_path


def test_sensitivity_holds_the_groups_that_differ_in_one_number(study):
  runs, problems = merged_runs.collect([study])
  [(groups, _)] = merged_runs.group(runs)
  assert not problems and len(groups) == 5
  found = {field: [one.fields[field] for one in ones] for field, ones in report.sensitivities(groups)}
  assert found == {"tokens.stop_accuracy": [0.3, 0.5, 1.0], "tokens.learning_rate": [0.015, 1.5]}


def test_page(study, capsys):
  status, out, _ = run(study, "--out", study / "page.html", capsys=capsys)
  text = (study / "page.html").read_text()
  assert status == 0 and text.isascii() and "with curves: " in out
  assert not re.search(r"https?://|@import|url\(|<script|<link|NaN|nan", text)
  assert re.findall(r'<section id="(.*?)"', text) == ["tables", "sensitivity", "images-curve", "lambda-curve"]
  assert "<td>41.0 &#177; 1.4</td>" in text and "guide=cdm" in text
  for seed, t1 in ((0, "45.0"), (1, "47.0")):
    assert re.search(rf"guide=clip, seed {seed}</th><td>{t1}</td>.*?{study}/1guide{seed}</td>", text)
  sensitivity, images, calibration = text.split("<section ")[2:]
  assert sensitivity.count("<svg") == 2 and sensitivity.count("(logarithmic)") == 1
  assert "<title>T1: 51.0 &#177; 1.4</title>" in sensitivity
  assert images.count("<svg") == calibration.count("<svg") == 5
  assert images.count('class="band learned"') == images.count('class="band plain"') == 5
  assert calibration.count('class="mark other dash"') == 10 and ">U 41.0<" in calibration
  assert images.count('class="curve thin faint other"') == 5 * 4


def test_curves_are_means_and_deviations_of_what_is_there(study):
  runs, _ = merged_runs.collect([study / "0base0", study / "0base1"])
  runs[1].results["images_curve"]["learned"][0]["T1"] = None
  curve = report.gathered(runs, "images_curve.learned", "images", "T1")
  assert curve == {3: [38.0], 6: [39.0, 41.0], 12: [39.5, 41.5]}
  np.testing.assert_allclose(report.means(curve), [38, 40, 40.5])
  np.testing.assert_allclose(report.deviations(curve), [0, np.std([39, 41], ddof=1), np.std([39.5, 41.5], ddof=1)])


def test_a_run_without_curves_has_a_table_alone(tmp_path, capsys):
  write_run(tmp_path, 50.0, images_curve={}, lambda_curve=None)
  assert run(tmp_path, capsys=capsys)[0] == 0
  assert re.findall(r'<section id="(.*?)"', (tmp_path / "merged_report.html").read_text()) == ["tables"]


def test_spread_is_that_of_numpy():
  values = [3.0, 4.5, 9.25, 1.0]
  assert merged_runs.spread(values, 3) == f"{np.mean(values):.3f} \u00b1 {np.std(values, ddof=1):.3f}"
  assert merged_runs.spread([2.0]) == "2.0" and merged_runs.spread([]) == "\u2013"


def test_short_names():
  assert merged_runs.short_names(["seed", "a.seed", "a.b", "c.d.b"]) == {
      "seed": "seed", "a.seed": "a.seed", "a.b": "a.b", "c.d.b": "d.b"}


def test_bands_and_strokes_stay_in_the_plot():
  axes = report_page.Axes(100, 100, (0, 1), (0, 100), (0, 0, 0, 0))
  assert 'points="0,10 100,0 100,50 0,30"' in axes.band([0, 1], [70, 50], [90, 120], "learned")
  assert 'y1="100.0" y2="70.0"' in axes.measurement(0.5, 10, 20, "learned", "T1")


def test_axes_reach_the_tens_around_what_is_drawn():
  assert report.percent_range([{1: [42.0, 48.0]}, {2: [71.0]}]) == (40, 80)
  assert report.percent_range([{1: [0.0, 8.0], 2: [99.5]}]) == (0, 100)


def test_tagclip_has_its_own_table(tmp_path, capsys):
  for threshold, value in ((0.3, 40.0), (0.5, 60.0)):
    folder = tmp_path / str(threshold)
    write_config(folder, quickstart_tagclip.get_config(), 0, [("tags.threshold", threshold)])
    entry = lambda less, value=value: {"mAP": value - less, "F1": value / 2 - less}
    files.write_json(folder / "results.json", entry(0) | {
        "method": "tagclip", "dataset": "labels", "warnings": [], "mIoU": 20.0,
        "masks": {"best_tag": {"mIoU": 3.0}, "all_background": {"mIoU": 1.0}},
        "baselines": {name: entry(less) for name, less in (("global", 9), ("patch", 6), ("dmar", 3))}})
  status, out, err = run(tmp_path, capsys=capsys)
  assert status == 0 and not err and "TagCLIP on labels" in out
  assert rows(out)["tags.threshold=0.5"] == {
      "runs": "1", "CLIP mAP": "51.0", "patches mAP": "54.0", "+ DMAR mAP": "57.0", "mAP": "60.0", "CLIP F1": "21.0",
      "patches F1": "24.0", "+ DMAR F1": "27.0", "F1": "30.0", "mIoU": "20.0", "best tag everywhere mIoU": "3.0",
      "all background mIoU": "1.0"}
  assert "mAP, whole pictures" in (tmp_path / "merged_report.html").read_text()
