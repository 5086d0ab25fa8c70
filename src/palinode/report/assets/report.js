// What a page does: show what was clicked, mark wide tables, search answers.
// Texts from the data are only ever put in as textContent.
"use strict";

const STEP = 5; // answers of each set shown at first
const MORE = 25; // and added on request
const SAMPLES = 3; // answers of each set shown for a model that was clicked

// The trade-offs: a click shows the point's figures, and sample answers where there are some.

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

function samples(model) {
  return [...document.querySelectorAll(".cases")].flatMap((cases) =>
    [...cases.querySelectorAll(".case")].slice(0, SAMPLES).map((found) => {
      const answer = found.querySelector(`[data-model="${CSS.escape(model)}"] dd`);
      const quote = document.createElement("blockquote");
      quote.append(element("strong", found.querySelector(".prompt").textContent), document.createElement("br"));
      quote.append(answer ? answer.textContent : "");
      quote.dir = "auto";
      return quote;
    }),
  );
}

function showPicked(event) {
  const mark = event.target.closest(".mark");
  if (!mark || !mark.textContent) return;
  const [title, ...lines] = mark.textContent.split("\n");
  const panel = document.getElementById("picked");
  const said = mark.dataset.shown ? samples(mark.dataset.shown) : [];
  panel.replaceChildren(element("h3", title), ...lines.map((line) => element("p", line)));
  if (said.length) panel.append(element("h3", "Sample answers"), ...said);
  panel.hidden = false;
}

for (const place of document.querySelectorAll("#plot-tradeoff")) place.addEventListener("click", showPicked);

// A table that is wider than its place says so.

function markWide(place) {
  const wide = place.querySelector("table").offsetWidth > place.clientWidth;
  place.classList.toggle("wide", wide);
  place.querySelector(".hint").hidden = !wide;
}

const watching = new ResizeObserver((seen) => seen.forEach((entry) => markWide(entry.target)));
for (const place of document.querySelectorAll(".scroll")) watching.observe(place);

// Search: a case stays when every word is somewhere in it. Of each set the first cases are shown, the rest on
// request.

const shownOf = new Map([...document.querySelectorAll(".cases")].map((group) => [group, STEP]));

function search() {
  const words = document.getElementById("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const sets = new Set([...document.querySelectorAll("input.set:checked")].map((box) => box.value));
  let found = 0;
  for (const [group, most] of shownOf) {
    let here = 0;
    for (const one of group.querySelectorAll(".case")) {
      const text = words.length ? one.textContent.toLowerCase() : "";
      const fits = words.every((word) => text.includes(word));
      here += fits;
      one.hidden = !fits || here > most;
    }
    const more = group.querySelector(".more");
    more.hidden = here <= most;
    more.textContent = `Show more (${Math.min(here, most)} of ${here})`;
    group.hidden = !sets.has(group.dataset.set);
    found += group.hidden ? 0 : here;
  }
  document.getElementById("count").textContent = `${found} of ${document.querySelectorAll(".case").length} rows`;
}

function showMore(group) {
  shownOf.set(group, shownOf.get(group) + MORE);
  search();
}

if (shownOf.size) {
  document.getElementById("search").addEventListener("input", search);
  for (const box of document.querySelectorAll("input.set")) box.addEventListener("change", search);
  for (const group of shownOf.keys()) {
    group.querySelector(".more").addEventListener("click", () => showMore(group));
  }
  search();
}
