// What every part of the page uses: the report, small DOM builders that write text and never markup, and the selection.
const report = JSON.parse(document.getElementById("report").textContent);
const byId = (id) => document.getElementById(id);

function make(space, tag, attributes, children) {
  const node = space ? document.createElementNS(space, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children) if (child !== null) node.append(child); // a string becomes a text node
  return node;
}
const html = (tag, attributes, ...children) => make(null, tag, attributes, children);
const svg = (tag, attributes, ...children) => make("http://www.w3.org/2000/svg", tag, attributes, children);

// Numbers for people, with a true minus sign.
function fixed(x, digits = 2) {
  if (x === null || x === undefined) return "–";
  const text = x.toFixed(digits);
  return (Number(text) === 0 ? text.replace("-", "") : text).replace("-", "−");
}
const signed = (x, digits = 2) => fixed(x, digits).replace(/^(?!−)/, "+");
function percent(p) {
  if (p > 0 && p < 0.0001) return "<0.01%";
  return (100 * p).toFixed(p < 0.0095 ? 2 : p < 0.0995 ? 1 : 0) + "%";
}
const short = (x) => {
  const size = Math.abs(x);
  if (size >= 1e6 || (size > 0 && size < 1e-2)) return String(Number(x.toPrecision(2)).toExponential()).replace(/-/g, "−").replace("e+", "e");
  return Number(x.toPrecision(3)).toLocaleString("en").replace("-", "−");
};

const ids = report.text.ids;
const labelOf = (id) => report.labels[id];
const quoted = (id) => `“${labelOf(id)}”`;
const nameOf = (t) => `token ${t + 1}, ${quoted(ids[t])}`;
const layers = report.model.config.n_layer, headsPerLayer = report.model.config.n_head;
const headAt = (layer, head) => report.heads[layer * headsPerLayer + head];

// To begin with, the token that surprised the model most in the second half of the text, where there is much to look back on.
function firstToken() {
  let best = ids.length - 1;
  const bits = (t) => (report.text.at[t] ? report.text.at[t].bits : 0);
  for (let t = ids.length - 2; t >= ids.length / 2; t--) if (bits(t) > bits(best)) best = t;
  return best;
}

// The one selection that all parts share. Each part registers what it redraws for which change.
const state = { token: firstToken(), layer: 0, head: 0, point: null };
const watchers = [];
function watch(keys, redraw) {
  watchers.push([keys, redraw]);
  redraw();
}
function select(change) {
  const changed = Object.keys(change).filter((key) => state[key] !== change[key]);
  Object.assign(state, change);
  for (const [keys, redraw] of watchers) if (changed.some((key) => keys.includes(key))) redraw();
}

// Redraw what depends on the width of the page or on its colours.
const painters = [];
function paint(node, draw) {
  let width = 0;
  const painter = () => { if (node.clientWidth) draw(node.clientWidth); };
  painters.push(painter);
  new ResizeObserver(() => {
    if (node.clientWidth !== width) { width = node.clientWidth; painter(); }
  }).observe(node);
  return painter;
}
const dark = matchMedia("(prefers-color-scheme: dark)");
dark.addEventListener("change", () => painters.forEach((painter) => painter()));

// Keys within a list of choices: arrows, Home and End move; one of them is in the tab order (roving tabindex).
function rove(list, count, current, go) {
  list.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    let to = null;
    if (event.key in steps) to = current() + steps[event.key];
    if (event.key === "Home") to = 0;
    if (event.key === "End") to = count() - 1;
    if (to === null || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    go(Math.max(0, Math.min(count() - 1, to)));
  });
}
