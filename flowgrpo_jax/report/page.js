// The page from its data: {runs, live}.
const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const inside = (id) => document.querySelector(`#${id} > div`);
const level = (name) => element("span", {class: `level ${name}`}, name);

function table(head, rows) {
  const cell = (kind, value) => element(kind, kind === "td" && typeof value === "number" ? {class: "number"} : {},
    value instanceof Node ? value : typeof value === "number" ? shown(value) : String(value));
  return element("div", {class: "scroll"}, element("table", {},
    element("thead", {}, element("tr", {}, ...head.map((h) => cell("th", h)))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map((v) => cell("td", v)))))));
}

function showHead() {
  document.getElementById("title").textContent = RUNS.map((run) => run.name).join(", ");
  const parts = RUNS.map((run) => `${RUNS.length > 1 ? run.name + ": " : ""}epoch ${run.epoch} of ${run.epochs}`);
  const written = new Date(1000 * Math.max(...RUNS.map((run) => run.written)));
  document.getElementById("status").append(parts.join("; "), `, written ${written.toLocaleString()} `,
    ...RUNS.filter((run) => run.judged != null).flatMap((run) => [level(run.worst[run.judged]), " "]));
}

function showMonitors() {
  const place = inside("monitors"), serious = ["alarm", "watch", "fine"];
  for (const run of RUNS) {
    if (RUNS.length > 1) place.append(element("h3", {}, run.name));
    if (run.judged == null) {
      place.append(element("p", {}, "They compare evaluations with the first one, and need a second."));
      continue;
    }
    place.append(element("p", {}, `The evaluation at epoch ${run.judged} against the first one.`));
    const sorted = [...run.verdicts].sort((a, b) => serious.indexOf(a.level) - serious.indexOf(b.level));
    place.append(table(["", "", "first", "now", ""],
      sorted.map((v) => [level(v.level), v.label, v.first, v.now, v.says])));
  }
}

// Trained and held-out rewards in one chart: changes in standard errors of the difference.
function changes(run, number, axis) {
  return figures("eval/", 1).map((figure) => line(run, figure, figure.slice(5), axis, number)).filter(Boolean).map((l) => {
    const weight = run.weights[l.label] || 0;
    const sign = (weight || (DATA.lower.includes(l.label) ? -1 : 1)) < 0 ? -1 : 1, first = l.y[0], error = l.error || [];
    const of = (v, size) => v === first ? 0 : size ? sign * (v - first) / size : null;  // null: not known
    const y = l.y.map((v, i) => of(v, Math.hypot(error[0], error[i])));
    return {...l, y, error: null, dashed: !weight, label: `${l.label} (${weight ? "trained" : "held out"})`};
  });
}

// Names of figures in any run that begin with a prefix and have so many slashes.
function figures(prefix, slashes) {
  const names = new Set(RUNS.flatMap((run) => Object.keys(run.series)));
  return [...names].filter((n) => n.startsWith(prefix) && n.split("/").length - 1 === slashes);
}

const last = (name) => name.split("/").pop();
const CHARTS = () => {  // [heading, [[title, note, [[figure, label], ...]], ...]]
  const rewards = [["reward", "what is trained on", [["reward", "reward"]]],
    ...figures("reward/", 1).map((f) => [f, "", [[f, last(f)]]]), ["reward_std", "spread within groups", [["reward_std", "spread"]]]];
  const means = figures("eval/", 1);
  const byTag = means.map((f) => [`${f} by tag`, "", figures("eval/", 2).filter((t) => last(t) === last(f))
    .map((t) => [t, t.split("/")[1]])]);
  const one = (f, note = "") => [f, note, [[f, f]]];
  const listed = new Set(["epoch", "hours", "reward", "reward_std", "seconds", 
    "eval_seconds", "images_per_second"]);
  const update = ["ratio_gap", "kl", "approx_kl", "clip_fraction", "grad_norm", "dead_groups", "failed", "broken", "skipped"];
  const others = figures("", 0).filter((f) => !listed.has(f) && !update.includes(f));
  return [
    ["Held-out evaluation, with its standard error", means.map((f) => [f, "", [[f, last(f)]]])],
    ["By tag", byTag.filter((c) => c[2].length)],
    ["Training reward", rewards],
    ["Monitors of the evaluated pictures", figures("monitor/", 1).map((f) => [last(f).replaceAll("_", " "), "", [[f, last(f)]]])],
    ["Update", [...update.map((f) => one(f)),
      ["log_prob_change by step", "of the images that the epoch drew", figures("log_prob_change/", 1).sort().map((f) => [f, last(f)])],
      ...others.map((f) => one(f))]],
    ["Speed", [["seconds by stage", "", [...figures("seconds/", 1).map((f) => [f, last(f)]), ["eval_seconds", "evaluate"]]],
      one("images_per_second", "")]],
  ];
};

function showCurves() {
  const axis = document.getElementById("axis").value, place = document.getElementById("groups");
  const xs = RUNS.flatMap((run) => axisOf(run, axis)), range = [Math.min(...xs, 0), Math.max(...xs, 1e-6)];
  const open = new Set([...place.querySelectorAll("details[open]")].map((d) => d.dataset.name));
  const both = document.querySelector("#both .charts");
  both.replaceChildren();
  const lines = RUNS.flatMap((run, i) => changes(run, i, axis));
  if (lines.length) drawChart(both, "change in standard errors", "", lines, axis, range);
  const firstTime = !place.children.length;
  place.replaceChildren();
  for (const [heading, charts] of CHARTS()) {
    const drawn = charts.map(([title, note, wanted]) => [title, note,
      RUNS.flatMap((run, i) => wanted.map(([f, label]) => line(run, f, label, axis, i)).filter(Boolean))]).filter((c) => c[2].length);
    if (!drawn.length) continue;
    const grid = element("div", {class: "charts"});
    const box = element("details", {"data-name": heading}, element("summary", {}, element("h3", {style: "display:inline"}, heading)), grid);
    box.addEventListener("toggle", () => {
      if (box.open && !grid.children.length) drawn.forEach(([title, note, l]) => drawChart(grid, title, note, l, axis, range));
    });
    place.append(box);
    box.open = firstTime ? heading !== "By tag" : open.has(heading);
  }
}

function showAbout() {
  const place = inside("about");
  for (const run of RUNS) {
    const about = run.about;
    if (RUNS.length > 1) place.append(element("h3", {}, run.name));
    const changed = Object.entries(about.changed || {});
    if (changed.length) {
      place.append(element("h3", {}, `Settings that differ from ${about.recipe || "the base of all recipes"}`),
        table(["setting", about.recipe || "base", "this run"], changed.map(([knob, [a, b]]) => [knob, a, b])));
    } else if (about.recipe) place.append(element("p", {}, `All settings are those of the recipe ${about.recipe}.`));
    const made = [["commit", about.commit || "–"], ["started", about.started ? new Date(1000 * about.started).toLocaleString() : "–"],
      ...Object.entries(about.machine || {}), ...Object.entries(about.versions || {}).filter(([k]) => k !== "devices")];
    place.append(element("h3", {}, "Made with"), table(["", ""], made.map(([k, v]) => [k, String(v)])));
    place.append(element("h3", {}, "How to go on"), element("pre", {}, run.commands.join("\n")));
  }
}

function begin() {
  showHead();
  showMonitors();
  showCurves();
  showAbout();
  const pick = document.getElementById("pick"), select = pick.querySelector("select");
  pick.hidden = RUNS.length < 2;
  select.append(...RUNS.map((run, i) => element("option", {value: i}, run.name)));
  select.onchange = () => showPictures(RUNS[select.value]);
  showPictures(RUNS[0]);
  document.getElementById("axis").onchange = showCurves;
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showCurves);
  document.body.dataset.ready = "yes";
}
begin();
