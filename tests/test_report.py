"""The page of a run: what it holds, that it needs no network, and that a browser can draw it."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import chromium
import numpy as np
import pytest
from etils import epath
from PIL import Image
from short_runs import rows

from flowgrpo_jax.monitors import verdicts
from flowgrpo_jax.report import __main__ as command
from flowgrpo_jax.report import about, commands, page, pictures, run_data
from flowgrpo_jax.scoring.scores import Sample, Scores
from flowgrpo_jax.types import PromptBatch

ROOT = Path(__file__).parent.parent
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


SETTINGS = {
    "epochs": 2,
    "lora": {"rank": 4},
    "eval": {"steps": 40, "guidance_scale": 4.5},
    "model": {
        "path": "my models/one",
        "dtype": "bfloat16",
        "height": 64,
        "width": 32,
        "options": {"t5": False, "t5_length": 0},
    },
}
PARSED = """
import runpy, sys
from absl import flags
from flowgrpo_jax.command_line import cli, usage
cli.run = lambda main: usage.parse(sys.argv)
runpy.run_module(sys.argv.pop(1), run_name="__main__")
for name in NAMES.split(","):
    value = flags.FLAGS
    for part in name.split("."):
        value = getattr(value, part)
    print(repr(value))
"""


def read_by(module, arguments, *names):
    """The values of flags as a command reads them from its command line."""
    program = [sys.executable, "-c", PARSED.replace("NAMES", repr(",".join(names)))]
    done = subprocess.run([*program, module, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [ast.literal_eval(line) for line in done.stdout.splitlines()]


def test_the_printed_commands_are_understood_by_the_commands():
    """Also a text with a quote, a tuple and a folder whose name has a space."""
    changed = {
        "name": ["'shapes'", "'mine'"],
        "eval.rewards": ["('shapes',)", "('shapes', 'shapes_strict')"],
        "model.path": ["'shapes'", "'my models/one'"],
        "prompts.test": ["'shapes:test'", '"it\'s.txt"'],
        "train.learning_rate": ["0.0015", "0.001"],
        "model.options.t5": ["True", "False"],
    }
    about = {"recipe": "shapes", "changed": changed}
    shown = commands.lines("runs/a b", SETTINGS, about)
    calls = [shlex.split(line) for line in shown if not line.startswith("#")]
    assert [call[:2] for call in calls] == [["python", "-m"]] * 5
    given = {call[2].rpartition(".")[2]: call[2:] for call in calls}
    knobs = ["config.eval.rewards", "config.prompts.test", "config.train.learning_rate"]
    values = [("shapes", "shapes_strict"), "it's.txt", 0.001]
    for name, flag in (("train", "workdir"), ("evaluate", "checkpoint")):
        module, *arguments = given[name]
        assert read_by(module, arguments, flag, *knobs) == ["runs/a b", *values]
    assert read_by(given["export"][0], given["export"][1:], "workdir", "out") == [
        "runs/a b",
        "lora",
    ]
    flags = ["model", "lora", "guidance", "dtype", "height", "width", "option"]
    assert read_by(given["generate"][0], given["generate"][1:], *flags) == [
        "my models/one",
        "lora",
        4.5,
        "bfloat16",
        64,
        32,
        ["t5=false"],
    ]
    assert command.parse(given["report"][1:]).workdir == "runs/a b"


def test_the_commands_of_a_run_from_python_say_what_to_put():
    shown = commands.lines("runs/a", SETTINGS, {"recipe": "", "changed": {"epochs": ["1", "2"]}})
    assert shown[0].startswith("# RECIPE: a file") and "--config RECIPE --workdir" in shown[2]
    full = commands.lines("runs/a", SETTINGS | {"lora": {"rank": 0}}, {"recipe": "shapes"})
    assert not any("generate" in line for line in full)  # it draws with an adapter


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
    page.save(epath.Path(tmp_path), 0, {"eval/own": 0.5})
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
    page.save(epath.Path(tmp_path), 1, {"eval/a": 2.0})
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


@pytest.mark.skipif(not chromium.PROGRAM, reason="Debian's package chromium is not installed")
def test_dragging_enlarges_and_a_double_click_goes_back(half, tmp_path):
    """As uPlot does it: a drag sets the scale, a double click sets it to all of the data."""
    code = """(() => {
      const made = [], real = uPlot;
      uPlot = function (...given) {
        made.push(new real(...given));
        return made.at(-1);
      };
      Object.assign(uPlot, real);
      showCurves();
      const chart = made[0], at = () => [chart.scales.x.min, chart.scales.x.max];
      chart.batch(() => chart.setScale("x", {min: 0.25, max: 0.5}));
      const dragged = at();
      const all = chart.data[0];
      chart.batch(() => chart.setScale("x", {min: all[0], max: all.at(-1)}));
      return [dragged, at()];
    })()"""
    dragged, back = asked(half / page.FILE, tmp_path, code.replace("\n", " "))
    assert dragged == [0.25, 0.5] and back == [0, 2]


@pytest.mark.skipif(not chromium.PROGRAM, reason="Debian's package chromium is not installed")
def test_in_a_comparison_dashes_still_mean_held_out(half, tmp_path):
    other = a_run(tmp_path / "other")
    out = tmp_path / "both.html"
    command.main(["--workdir", str(half), "--compare", str(other), "--out", str(out)])
    code = """(() => {
      const seen = [], real = uPlot;
      uPlot = function (...given) { seen.push(given[0].series); return new real(...given); };
      Object.assign(uPlot, real);
      showCurves();
      return seen[0].slice(1).map((s) => [s.label, s.stroke, s.dash.length > 0]);
    })()"""
    lines = asked(out, tmp_path, code.replace("\n", " "))
    assert len({colour for _, colour, _ in lines}) == len(lines) >= 3
    assert {dashed == ("held out" in label) for label, _, dashed in lines} == {True}


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
