"""A browser draws the page of a run, in the dark and on a phone, and does what its user asks."""

import json
import re

import chromium
import numpy as np
import pytest
from etils import epath
from PIL import Image
from run_pages import a_run

from flowgrpo_jax.report import __main__ as command
from flowgrpo_jax.report import page


def asked(file, folder, expression, *flags):
    """What a page's script says of an expression, once the page is drawn."""
    probe, script = folder / "probe.html", f"document.title = JSON.stringify({expression})"
    text = file.read_text().replace("</body>", f"<script>{script}</script></body>")
    probe.write_text(text)
    drawn = chromium.call(probe.as_uri(), *flags, "--dump-dom")
    return json.loads(re.search(r"<title>(.*?)</title>", drawn)[1])


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
