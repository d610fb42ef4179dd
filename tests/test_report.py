"""The page of a run: what it holds, that it needs no network, and that a browser can draw it."""

import json
import re

import chromium
import numpy as np
import pytest
from etils import epath
from PIL import Image
from short_runs import rows

from flowgrpo_jax.monitors import verdicts
from flowgrpo_jax.report import __main__ as command
from flowgrpo_jax.report import about, page, pictures, run_data
from flowgrpo_jax.scoring.scores import Sample, Scores
from flowgrpo_jax.types import PromptBatch

LOADS = re.compile(r"""(?:src|href)\s*=\s*["'](?!\#)|@import|url\(["']?https?:|fetch\(["']http""")


def data_of(file):
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', file.read_text())
    return json.loads(found[1])


def asked(file, folder, expression, *flags):
    """What a page's script says of an expression, once the page is drawn."""
    probe, script = folder / "probe.html", f"document.title = JSON.stringify({expression})"
    text = file.read_text().replace("</body>", f"<script>{script}</script></body>")
    probe.write_text(text)
    drawn = chromium.call(probe.as_uri(), *flags, "--dump-dom")
    return json.loads(re.search(r"<title>(.*?)</title>", drawn)[1])


@pytest.fixture(scope="module")
def shown(half):
    """The data of the page that `train` wrote by itself."""
    return data_of(half / page.FILE)


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


def a_run(folder, epochs=(0,), prompt="a cat", side=8):
    """A work directory of evaluations of two grey pictures."""
    workdir = epath.Path(folder)
    batch = PromptBatch([prompt] * 2, [{}, {}], np.arange(2))
    lines = []
    for epoch in epochs:
        pixels = np.full((2, side, side, 3), 10 * epoch, np.uint8)
        scores = Scores(("own",), np.array([[0.5, np.nan]]), np.ones((1, 2)), np.ones(2, bool))
        pictures.save_evaluation(workdir, epoch, pixels, batch, scores, 2)
        lines.append(json.dumps({"epoch": epoch, "eval/own": 0.5, "reward": 0.5}))
    (workdir / "metrics.jsonl").write_text("\n".join(lines))
    return workdir


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
    page.save(epath.Path(tmp_path), {"eval/own": 0.5})  # where no run is
    about.save(epath.Path(tmp_path) / "file" / "below", {})
    assert "the run's page could not be written" in caplog.text


def test_the_command_compares_runs(half, tmp_path, capsys):
    out = tmp_path / "both.html"
    other = a_run(tmp_path / "other")
    command.main(["--workdir", str(half), "--compare", str(other), "--out", str(out)])
    assert capsys.readouterr().out.strip() == str(out)
    assert [run["name"] for run in data_of(out)["runs"]] == ["half", "other"]
    with pytest.raises(FileNotFoundError, match=r"holds no run.*--workdir"):
        command.main(["--workdir", str(tmp_path / "nothing"), "--out", str(out)])


@pytest.mark.skipif(not chromium.PROGRAM, reason="Debian's package chromium is not installed")
def test_a_browser_draws_the_page(half):
    drawn = chromium.call((half / page.FILE).as_uri(), "--dump-dom")
    assert 'data-ready="yes"' in drawn
    assert drawn.count('class="tile"') == 12 + 12 + 8
    assert drawn.count("<canvas") >= 15
    assert re.search(r'class="level (fine|watch|alarm)"', drawn) and "Edge density" in drawn


@pytest.mark.skipif(not chromium.PROGRAM, reason="Debian's package chromium is not installed")
def test_the_page_is_dark_in_the_dark_and_fits_a_phone(half, tmp_path):
    """No light page in the dark, and nothing wider than the screen, which would scroll sideways.
    What a verdict says is below its figures, for beside them it would be out of sight."""
    address, file = (half / page.FILE).as_uri(), tmp_path / "shot.png"
    size = "--window-size=500,900"  # the narrowest that headless Chromium draws
    chromium.call(address, size, f"--screenshot={file}", "--blink-settings=preferredColorScheme=0")
    assert np.asarray(Image.open(file).convert("L")).mean() < 80
    wide = "document.documentElement.scrollWidth"
    rows = "[...document.querySelectorAll('#monitors tbody tr')]"
    below = f"{rows}.every((r) => r.lastChild.offsetTop > r.firstChild.offsetTop)"
    width, said_below = asked(half / page.FILE, tmp_path, f"[{wide}, {below}]", size)
    assert width <= 500 and said_below


@pytest.mark.skipif(not chromium.PROGRAM, reason="Debian's package chromium is not installed")
def test_a_run_without_an_epoch_has_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    page.save(epath.Path(tmp_path), {"eval/own": 0.5})
    drawn = chromium.call((tmp_path / page.FILE).as_uri(), "--dump-dom")
    assert 'data-ready="yes"' in drawn and "come with the first evaluation" in drawn


@pytest.mark.skipif(not chromium.PROGRAM, reason="Debian's package chromium is not installed")
def test_a_change_is_drawn_in_standard_errors_where_there_are_any(tmp_path):
    """3-4-5: errors of 0.3 and 0.4 make one of 0.5. One picture has none, and says nothing."""
    evaluations = [
        {"eval/a": 1.0, "eval_error/a": 0.3, "eval/b": 1.0, "eval/c": 1.0},
        {"eval/a": 2.0, "eval_error/a": 0.4, "eval/b": 2.0, "eval/c": 1.0},
    ]
    lines = [json.dumps({"epoch": i, **row}) + "\n" for i, row in enumerate(evaluations)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    page.save(epath.Path(tmp_path), {"eval/a": 2.0})
    changes = "changes(RUNS[0], 0, 'epochs').map((l) => l.y)"
    assert asked(tmp_path / page.FILE, tmp_path, changes) == [[0, 2], [0, None], [0, 0]]


@pytest.mark.skipif(not chromium.PROGRAM, reason="Debian's package chromium is not installed")
def test_the_axis_of_a_figure_that_is_always_zero_ends_near_it(half, tmp_path):
    ranges = asked(
        half / page.FILE, tmp_path, "[heights(0, 0), heights(null, null), heights(2, 4)]"
    )
    assert ranges[:2] == [[0, 1], [0, 1]]
    low, high = ranges[2]
    assert 0 <= low < 2 and 4 < high < 6


PROBE = """<script>
const find = (id) => document.getElementById(id), large = find("large"), said = {};
document.querySelector("#grid .tile").click();
said.open = large.open;
said.pictures = large.querySelectorAll(".picture").length;
said.prompt = large.querySelector("h3").textContent;
large.close();
find("slider").value = 0;
find("slider").dispatchEvent(new Event("input"));
said.at = find("at").textContent;
find("axis").value = "hours";
find("axis").dispatchEvent(new Event("change"));
setTimeout(() => {
  said.charts = document.querySelectorAll("canvas").length;
  document.title = JSON.stringify(said);
}, 500);
</script>"""


@pytest.mark.skipif(not chromium.PROGRAM, reason="Debian's package chromium is not installed")
def test_a_click_enlarges_and_the_slider_goes_back(half, shown, tmp_path):
    probe = tmp_path / "probe.html"
    probe.write_text((half / page.FILE).read_text().replace("</body>", PROBE + "</body>"))
    title = re.search(r"<title>(.*?)</title>", chromium.call(probe.as_uri(), "--dump-dom"))[1]
    found = json.loads(title.replace("&amp;", "&"))
    first = shown["runs"][0]["sheets"]["evaluation"][0]["pictures"][0]
    assert found["open"] and found["pictures"] == 2 and found["prompt"] == first["prompt"]
    assert found["at"].startswith("epoch 0") and found["charts"] >= 15
