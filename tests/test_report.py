"""The page of a run: what it holds, and that it needs no network."""

import json
import re

import numpy as np
import pytest
from etils import epath
from PIL import Image
from run_pages import a_run, data_of
from short_runs import rows

from flowgrpo_jax.monitors import verdicts
from flowgrpo_jax.report import __main__ as command
from flowgrpo_jax.report import about, page, pictures, run_data
from flowgrpo_jax.scoring.scores import Sample, Scores
from flowgrpo_jax.types import PromptBatch

LOADS = re.compile(r"""(?:src|href)\s*=\s*["'](?!\#)|@import|url\(["']?https?:|fetch\(["']http""")


def test_a_run_leaves_its_page(half, shown):
    (run,) = shown["runs"]
    series, metrics = run["series"], rows(half)
    assert series["epoch"] == [0, 1, 2] and run["epoch"] == run["epochs"] == 2
    for name in (
        "reward",
        "ratio_gap",
        "eval/shapes_strict",
        "monitor/sharpness",
        "seconds/update",
    ):
        logged = [row.get(name) for row in metrics]
        assert series[name] == [None if v is None else pytest.approx(v, 1e-4) for v in logged]
    assert run["judged"] == 2
    assert {v["level"] for v in run["verdicts"]} <= set(verdicts.LEVELS)
    assert {v["figure"] for v in run["verdicts"]} >= {"diversity", "eval/shapes_strict"}
    assert run["images_per_epoch"] == 8 and series["hours"] == sorted(series["hours"])


def test_the_page_has_the_pictures_with_their_scores(half, shown):
    (run,) = shown["runs"]
    first, last = run["sheets"]["evaluation"]
    assert (first["epoch"], last["epoch"]) == (0, 2)
    assert [p["prompt"] for p in first["pictures"]] == [p["prompt"] for p in last["pictures"]]
    scores = [p["scores"]["jpeg_incompressibility"] for p in last["pictures"]]
    logged = rows(half)[-1]["eval/jpeg_incompressibility"]
    assert np.mean(scores) == pytest.approx(logged, rel=1e-5)  # all 12 of them are there
    assert last["image"].startswith("data:image/webp;base64,")
    (extremes,) = run["sheets"]["extremes"]
    totals = [p["total"] for p in extremes["pictures"]]
    assert totals[:6] == sorted(totals[:6]) and max(totals[:6]) <= min(totals[6:])
    (training,) = run["sheets"]["training"]
    assert training["epoch"] == 0 and len(training["pictures"]) == 8
    advantages = np.array([p["advantage"] for p in training["pictures"]])
    np.testing.assert_allclose(advantages.reshape(2, 4).mean(axis=1), 0, atol=1e-4)


def test_the_page_says_what_differs_from_the_recipe(shown):
    said = shown["runs"][0]["about"]
    assert said["recipe"] == "tiny.py" and said["changed"] == {"epochs": ["4", "2"]}
    assert said["versions"]["jax"] and said["machine"]["processes"] == 1


def test_nothing_is_loaded_when_the_page_is_opened(half):
    text = (half / page.FILE).read_text()
    assert not LOADS.search(text.replace('href="#', "href=#")), LOADS.search(text)
    assert len(text) < 1_000_000


def test_a_prompt_cannot_end_the_script(tmp_path):
    run = run_data.read(a_run(tmp_path, prompt="</script><b>"))
    file = tmp_path / "page.html"
    file.write_text(page.html([run]))
    (sheet,) = data_of(file)["runs"][0]["sheets"]["evaluation"]
    assert sheet["pictures"][0]["prompt"] == "</script><b>"
    assert file.read_text().count("</script>") == 3


def test_pictures_of_epochs_that_were_undone_are_not_shown(tmp_path):
    workdir = a_run(tmp_path, (0, 2, 4))
    metrics = workdir / "metrics.jsonl"
    metrics.write_text("\n".join(metrics.read_text().splitlines()[:2]))
    sheets = run_data.read(workdir)["sheets"]["evaluation"]
    assert [sheet["epoch"] for sheet in sheets] == [0, 2]
    assert [p["scores"] for p in sheets[0]["pictures"]] == [{"own": 0.5}, {}]  # a failed one


def test_a_long_run_shows_some_of_its_evaluations(tmp_path):
    workdir = a_run(tmp_path, range(9))
    size = (workdir / "report" / "evaluation-00008.webp").stat().length
    sheets = run_data.read(workdir, bytes_of_pictures=5 * size)["sheets"]["evaluation"]
    assert [sheet["epoch"] for sheet in sheets] == [0, 2, 4, 6, 8]


def test_thinned_rows_keep_the_evaluations():
    many = [{"epoch": i} | ({"eval/own": 1.0} if i == 13 else {}) for i in range(100)]
    kept = [row["epoch"] for row in run_data.thinned(many, 10)]
    assert kept == [0, 10, 13, *range(20, 100, 10)]


def test_hours_count_the_epochs_that_are_left_out():
    kept = [{"epoch": 0, "seconds": 3600.0, "eval_seconds": 1800.0}, {"epoch": 4, "seconds": 900.0}]
    assert run_data.columns(kept)["hours"] == [1.5, 2.5]


def test_a_sheet_holds_the_pictures_at_their_places(tmp_path):
    """Small ones without loss, in rows of six."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 24, 3), np.uint8)
    pictures.save_sheet(epath.Path(tmp_path), "evaluation-00003", {}, pixels, [{}] * 8)
    sheet = np.asarray(Image.open(tmp_path / "evaluation-00003.webp").convert("RGB"))
    assert sheet.shape == (32, 6 * 24, 3)
    np.testing.assert_array_equal(sheet[16:, 24:48], pixels[7])
    assert pictures.shrink(np.zeros((1024, 512, 3), np.uint8)).size == (128, 256)


def test_training_pictures_have_the_prompt_and_advantage_of_their_row(tmp_path):
    scores = Scores(
        ("own",),
        np.arange(6.0)[None],
        np.full((1, 6), 2.0),
        np.ones(6, bool),
        Sample(np.array([0, 3]), np.zeros((2, 8, 8, 3), np.uint8)),
    )
    batch = PromptBatch(["a", "b"], [{"tag": "x"}, {"tag": "y"}], np.arange(2))
    by_step = np.stack([np.arange(6.0), np.arange(6.0) + 2])
    pictures.save_training(epath.Path(tmp_path), 0, batch, 3, scores, by_step)
    found = json.loads((tmp_path / "report" / "training-00000.json").read_text())["pictures"]
    assert [(p["prompt"], p["tag"]) for p in found] == [("a", "x"), ("b", "y")]
    assert [(p["total"], p["advantage"]) for p in found] == [(0, 1), (6, 4)]


def test_an_error_of_the_page_ends_no_run(tmp_path, caplog):
    (tmp_path / "file").write_text("")  # where a folder should be
    page.save(epath.Path(tmp_path) / "file", 0, {"eval/own": 0.5})
    about.save(epath.Path(tmp_path) / "file" / "below", {})
    assert "the run's page could not be written" in caplog.text


def test_the_command_compares_runs(half, tmp_path, capsys):
    out = tmp_path / "both.html"
    other = a_run(tmp_path / "other")
    command.main(["--workdir", str(half), "--compare", str(other), "--out", str(out)])
    assert capsys.readouterr().out.strip() == str(out)
    assert [run["name"] for run in data_of(out)["runs"]] == ["half", "other"]
    with pytest.raises(FileNotFoundError, match=r"holds no run.*--workdir"):
        command.main(["--workdir", str(tmp_path / "nothing")])
    assert not (tmp_path / "nothing").exists()


def test_runs_of_the_same_folder_name_are_told_apart():
    assert page.distinct(["a/run", "b/run", "/c/d/other"]) == ["a/run", "b/run", "d/other"]
    assert page.distinct(["a/run", "b/two"]) == ["run", "two"]
    assert page.distinct(["gs://x/1/run", "gs://x/2/run"]) == ["1/run", "2/run"]
    assert page.distinct(["run", "run"]) == ["run", "run"]  # the same one twice


def test_an_evaluation_is_shown_before_its_epoch_has_ended(tmp_path):
    """It may last for hours, when a human votes."""
    workdir = epath.Path(tmp_path)
    page.save(workdir, 0, {"eval/own": 0.5})
    assert data_of(tmp_path / page.FILE)["runs"][0]["series"]["eval/own"] == [0.5]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(json.dumps({"epoch": 0, "reward": 0.1, "eval/own": 0.5}) + "\n")
    assert run_data.read(workdir)["series"]["epoch"] == [0]  # once, when it has
    run_data.save_newest(workdir, 3, {"eval/own": 0.7})
    assert run_data.read(workdir)["series"]["epoch"] == [0]  # left from before it went back
