// The served page: it reloads when there is something new, and asks for votes.
let seen = null, asked = null;

async function look() {
  const now = await (await fetch("version")).text();
  if (seen !== null && now !== seen && !document.getElementById("large").open && !asked) {
    keepView();
    location.reload();
  }
  seen = now;
}

// What a reader has chosen stays as it is when the page reloads itself.
const CHOSEN = ["axis", "slider", "beside"].map((id) => document.getElementById(id));

function keepView() {
  const [axis, slider, beside] = CHOSEN;
  const at = slider.value === slider.max ? null : slider.value;  // the last one stays the last one
  sessionStorage.setItem("view", JSON.stringify([axis.value, at, beside.checked]));
}

function restoreView() {
  const [axis, slider, beside] = CHOSEN, kept = JSON.parse(sessionStorage.getItem("view") || "null");
  if (!kept) return;
  sessionStorage.removeItem("view");
  axis.value = kept[0];
  beside.checked = kept[2];
  if (kept[1] !== null) slider.value = kept[1];
  axis.dispatchEvent(new Event("change"));
  slider.dispatchEvent(new Event("input"));
}

async function askForVote() {
  const sheet = await (await fetch("votes")).json(), section = document.getElementById("votes");
  section.hidden = !sheet.name;
  if (!sheet.name || sheet.name === asked) {
    if (!sheet.name) asked = null;
    return;
  }
  asked = sheet.name;
  const chosen = new Set();
  const tiles = sheet.pictures.map((_, i) => {
    const made = tile(sheet, i, null, () => {
      chosen.has(i) ? chosen.delete(i) : chosen.add(i);
      made.classList.toggle("chosen", chosen.has(i));
      made.setAttribute("aria-pressed", chosen.has(i));
    });
    made.setAttribute("aria-pressed", "false");
    return made;
  });
  const send = element("button", {onclick: async () => {
    await fetch(`votes/${sheet.name}`, {method: "POST", headers: {"content-type": "application/json"},
      body: JSON.stringify({chosen: [...chosen]})});
    asked = null;
    askForVote();
  }}, "Vote");
  section.querySelector("div").replaceChildren(element("p", {}, `Choose the pictures that show “${sheet.pictures[0].prompt}” best.`),
    element("div", {class: "tiles"}, ...tiles), element("p", {}, send));
}

function follow(task, seconds) {  // a run or a server that is gone leaves the page as it is
  const again = () => task().catch(() => {}).finally(() => setTimeout(again, 1000 * seconds));
  again();
}
if (DATA.live) {
  restoreView();
  follow(look, 10);
  follow(askForVote, 2);
}
