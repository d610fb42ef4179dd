// Pictures of a run: sheets of small pictures, shown by their place in the sheet.
const urls = new Map();  // sheet -> address of its picture, made once
function urlOf(sheet) {
  if (!urls.has(sheet)) {
    const [head, body] = sheet.image.split(",");
    const bytes = Uint8Array.from(atob(body), (c) => c.charCodeAt(0));
    urls.set(sheet, URL.createObjectURL(new Blob([bytes], {type: head.slice(5).split(";")[0]})));
  }
  return urls.get(sheet);
}

function picture(sheet, i) {
  const rows = Math.ceil(sheet.pictures.length / sheet.columns);
  const part = (k, n) => n > 1 ? 100 * k / (n - 1) : 0;
  const made = element("div", {class: "picture" + (sheet.width < 200 ? " sharp" : ""), role: "img",
    "aria-label": sheet.pictures[i].prompt});
  made.style.aspectRatio = `${sheet.width} / ${sheet.height}`;
  made.style.backgroundImage = `url(${urlOf(sheet)})`;
  made.style.backgroundSize = `${100 * sheet.columns}% ${100 * rows}%`;
  made.style.backgroundPosition = `${part(i % sheet.columns, sheet.columns)}% ${part(Math.floor(i / sheet.columns), rows)}%`;
  return made;
}

function scoresOf(one) {
  const parts = Object.entries(one.scores).map(([name, score]) => `${name} ${shown(score)}`);
  if (one.advantage != null) parts.push(`advantage ${shown(one.advantage)}`);
  return parts.join(", ");
}

// A picture with its prompt and scores; `before` is the same one of another sheet.
function tile(sheet, i, before, open) {
  const one = sheet.pictures[i];
  const pair = element("div", {class: "pair"}, ...(before ? [picture(before, i)] : []), picture(sheet, i));
  const caption = element("div", {class: "caption"}, one.prompt, element("small", {}, scoresOf(one)));
  return element("button", {class: "tile", onclick: open}, pair, caption);
}

function enlarge(sheet, i, before) {
  const dialog = document.getElementById("large"), place = dialog.querySelector("div");
  const one = sheet.pictures[i], old = before && before !== sheet ? before.pictures[i] : null;
  const figures = [];
  if (old) figures.push(element("figure", {}, picture(before, i), element("figcaption", {}, `epoch ${before.epoch}`)));
  figures.push(element("figure", {}, picture(sheet, i), element("figcaption", {}, `epoch ${sheet.epoch}`)));
  const names = [...new Set([...Object.keys(one.scores), ...Object.keys(old ? old.scores : {})])];
  const head = ["", ...(old ? [`epoch ${before.epoch}`] : []), `epoch ${sheet.epoch}`];
  const rows = names.map((name) => [name, ...(old ? [shown(old.scores[name])] : []), shown(one.scores[name])]);
  if (one.advantage != null) rows.push(["advantage", shown(one.advantage)]);
  place.replaceChildren(element("div", {class: "large"}, ...figures), element("h3", {}, one.prompt), table(head, rows));
  if (!dialog.open) dialog.showModal();
}

function showPictures(run) {
  const sheets = run.sheets.evaluation, slider = document.getElementById("slider");
  const grid = document.getElementById("grid"), beside = document.getElementById("beside");
  const draw = () => {
    const sheet = sheets[slider.value], first = sheets[0], at = document.getElementById("at");
    if (!sheet) return grid.replaceChildren(element("p", {}, "There are none yet: they come with the first evaluation."));
    at.replaceChildren(`epoch ${sheet.epoch} `);
    if (run.worst[sheet.epoch]) at.append(level(run.worst[sheet.epoch]));
    const before = beside.checked && sheet !== first ? first : null;
    grid.classList.toggle("beside", beside.checked);
    grid.replaceChildren(...sheet.pictures.map((_, i) => tile(sheet, i, before, () => enlarge(sheet, i, first))));
  };
  slider.max = Math.max(0, sheets.length - 1);
  slider.value = slider.max;
  slider.oninput = beside.onchange = draw;
  draw();
  showExtremes(run, document.getElementById("worst-best"));
  showTraining(run, document.getElementById("training"));
}

function showExtremes(run, place) {
  place.replaceChildren();
  for (const sheet of run.sheets.extremes) {
    const half = sheet.pictures.length / 2, all = sheet.pictures.map((_, i) => tile(sheet, i, null, () => enlarge(sheet, i)));
    place.append(element("h3", {}, `Worst of the evaluation at epoch ${sheet.epoch}`), element("div", {class: "tiles"}, ...all.slice(0, half)),
      element("h3", {}, "Best"), element("div", {class: "tiles"}, ...all.slice(half)));
  }
}

function showTraining(run, place) {
  place.replaceChildren();
  for (const sheet of run.sheets.training) {
    place.append(element("h3", {}, `Training pictures of epoch ${sheet.epoch}, by the rollouts' sampler`),
      element("div", {class: "tiles"}, ...sheet.pictures.map((_, i) => tile(sheet, i, null, () => enlarge(sheet, i)))));
  }
}
