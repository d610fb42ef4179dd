"use strict";
// Curves with a shared cursor, by uPlot. A line is {label, x, y, error?, run, dashed?}; `dashed` is true or false
// where dashes have a meaning.
const COLOURS = ["#3b7ddd", "#e0742b", "#2a9d5c", "#c44569", "#8e62d6", "#8a7a1f", "#169aa8", "#7f8793"];

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const shown = (value) => value == null || !isFinite(value) ? "–"
  : value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5) ? value.toExponential(2)
  : String(+value.toPrecision(4));

function element(kind, attributes = {}, ...children) {
  const made = document.createElement(kind);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// The x of a run's rows on an axis: epochs, images or hours.
function axisOf(run, axis) {
  if (axis === "hours") return run.series.hours;
  return run.series.epoch.map((e) => axis === "images" ? e * run.images_per_epoch : e);
}

// A line of a figure of a run, without the rows that lack it; null where the run has none.
function line(run, figure, label, axis, number) {
  const y = run.series[figure], error = run.series[figure.replace(/^eval\//, "eval_error/")];
  if (!y) return null;
  const rows = y.map((v, i) => v == null ? -1 : i).filter((i) => i >= 0);
  if (!rows.length) return null;
  const x = axisOf(run, axis), withError = figure.startsWith("eval/") && error;
  return {label, run: number, x: rows.map((i) => x[i]), y: rows.map((i) => y[i]),
    error: withError ? rows.map((i) => error[i] ?? 0) : null};
}

// The least and the largest y of a chart. By itself uPlot ends the axis of a figure that is always 0 at 100.
function heights(low, high) {
  return low == null || (low === 0 && high === 0) ? [0, 1] : uPlot.rangeNum(low, high, 0.1, true);
}

function drawChart(parent, title, note, lines, axis, range) {
  const box = element("div", {class: "chart"}, element("h4", {}, title));
  if (note) box.append(element("p", {}, note));
  parent.append(box);
  const tables = [], series = [{label: axis, value: (u, v) => shown(v)}], bands = [];
  const labels = [...new Set(lines.map((l) => l.label))], runs = new Set(lines.map((l) => l.run));
  for (const l of lines) {
    // Dashes tell runs apart, unless they mean something else: then each run has its own colours.
    const meant = l.dashed != null, place = meant ? labels.indexOf(l.label) + labels.length * l.run : labels.indexOf(l.label);
    const colour = COLOURS[(labels.length > 1 ? place : l.run) % COLOURS.length];
    const dash = meant ? (l.dashed ? [6, 4] : []) : labels.length > 1 && l.run ? [6, 3 + 3 * l.run] : [];
    const label = runs.size > 1 ? [l.label, RUNS[l.run].name].filter(Boolean).join(" · ") : l.label;
    tables.push([l.x, l.y]);
    series.push({label, stroke: colour, width: 1.5, dash, spanGaps: true, value: (u, v) => shown(v),
      points: {show: l.x.length < 60, size: 4}});
    if (l.error) {
      const at = series.length;
      for (const sign of [1, -1]) {
        tables.push([l.x, l.y.map((v, i) => v + sign * l.error[i])]);
        series.push({label: "", stroke: "transparent", spanGaps: true, points: {show: false}, class: "edge"});
      }
      bands.push({series: [at, at + 1], fill: colour + "2e"});
    }
  }
  const ink = css("--soft"), grid = {stroke: css("--line"), width: 1};
  const axes = [{stroke: ink, grid, ticks: grid, size: 30, values: (u, v) => v.map(shown)},
    {stroke: ink, grid, ticks: grid, size: 72, values: (u, v) => v.map((x) => x && Math.abs(x) < 1e-3 ? x.toExponential(1) : shown(x))}];
  const size = () => ({width: Math.max(240, box.clientWidth - 16), height: parent.classList.contains("wide") ? 260 : 180});
  // uPlot asks for a range with all of the data's, or with the part that was dragged over.
  const whole = (u, low, high) => low == null || (low <= u.data[0][0] && high >= u.data[0].at(-1));
  const widths = (u, low, high) => whole(u, low, high) ? range : [low, high];
  const scales = {x: {time: false, range: widths}, y: {range: (u, low, high) => heights(low, high)}};
  const chart = new uPlot({...size(), series, bands, axes, scales,
    cursor: {sync: {key: "run", scales: ["x", null]}}, legend: {live: true}}, uPlot.join(tables), box);
  box.querySelectorAll(".u-series.edge").forEach((row) => row.remove());
  new ResizeObserver(() => chart.width !== size().width && chart.setSize(size())).observe(box);
  return box;
}
