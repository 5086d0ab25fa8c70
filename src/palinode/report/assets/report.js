// What a page does: draw the figures in the colours of the style sheet, show what was clicked, search answers.
// Texts from the data are only ever put in as textContent.
"use strict";

const figures = JSON.parse(document.getElementById("figures").textContent);
const NARROW = 560; // pixels, below which legends and margins shrink
const STEP = 5; // answers of each set shown at first
const MORE = 25; // and added on request
const SAMPLES = 3; // answers of each set shown for a model that was clicked

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// Replace names of style variables ("--target") by their colours, everywhere in a figure.
function painted(part) {
  if (typeof part === "string") return part.startsWith("--") ? colour(part) : part;
  if (Array.isArray(part)) return part.map(painted);
  if (part === null || typeof part !== "object") return part;
  return Object.fromEntries(Object.entries(part).map(([key, value]) => [key, painted(value)]));
}

function styled(layout, width, legend) {
  const axis = { gridcolor: colour("--grid"), linecolor: colour("--line"), zeroline: false, zerolinecolor: colour("--other") };
  const label = { bgcolor: colour("--panel"), bordercolor: colour("--line"), align: "left" };
  const small = width < NARROW;
  return {
    ...layout,
    width,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: small ? 12 : 13.5, color: colour("--ink") },
    margin: { l: small ? 46 : 64, r: small ? 10 : 24, t: legend ? 48 : 12, b: 56 },
    hovermode: "closest",
    hoverlabel: { ...label, font: { color: colour("--ink"), size: 13.5 } },
    legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", ...layout.legend },
    xaxis: { ...axis, ...layout.xaxis },
    yaxis: { ...axis, ...layout.yaxis },
  };
}

function draw(place, width) {
  const figure = painted(figures[place.dataset.figure]);
  const named = figure.data.length > 1 && figure.data.some((trace) => trace.showlegend !== false);
  const layout = styled(figure.layout, width || place.clientWidth, named);
  return Plotly.react(place, figure.data, layout, { displayModeBar: false });
}

const places = [...document.querySelectorAll(".plot")];
const drawAll = (width) => Promise.all(places.map((place) => draw(place, width)));

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
  const mark = event.points[0].customdata;
  const panel = document.getElementById("picked");
  const said = mark.model ? samples(mark.model) : [];
  panel.replaceChildren(element("h3", mark.title), ...mark.lines.map((line) => element("p", line)));
  if (said.length) panel.append(element("h3", "Sample answers"), ...said);
  panel.hidden = false;
}

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

if (places.length) {
  let waiting = 0;
  const PAPER = 680; // pixels, about the width of a printed page
  drawAll().then(() => {
    for (const place of document.querySelectorAll("#plot-tradeoff")) {
      place.on("plotly_click", showPicked);
    }
    document.documentElement.dataset.drawn = "yes";
  });
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(drawAll, 150);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawAll());
  matchMedia("print").addEventListener("change", (media) => drawAll(media.matches ? PAPER : undefined));
}
