// 3. Queries and keys, and 4. the wall of heads. Scores and weights are made here, of the model's own queries and keys.
const T = ids.length;

function unpack(packed) {
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
  const whole = new Int16Array(bytes(packed.values)), scales = new Float32Array(bytes(packed.scales));
  const [, heads, , D] = packed.shape;
  return { heads, D, at(layer, head, t) {
    const row = (layer * heads + head) * T + t, vector = new Float32Array(D);
    for (let d = 0; d < D; d++) vector[d] = whole[row * D + d] * scales[row];
    return vector;
  } };
}
const queries = layers ? unpack(report.attention.queries) : null, keys = layers ? unpack(report.attention.keys) : null;
const keyHead = (head) => Math.floor(head * keys.heads / headsPerLayer); // a group of heads shares one

const headCache = new Map();
function attentionOf(layer, head) { // raw scores and weights, T x T; 0 where nothing is seen
  const name = layer * headsPerLayer + head;
  if (headCache.has(name)) return headCache.get(name);
  const scores = new Float32Array(T * T), weights = new Float32Array(T * T);
  const k = Array.from({ length: T }, (_, s) => keys.at(layer, keyHead(head), s));
  for (let t = 0; t < T; t++) {
    const q = queries.at(layer, head, t), first = report.attention.first[layer][t];
    let most = -Infinity, sum = 0;
    for (let s = 0; s < T; s++) {
      let dot = 0;
      for (let d = 0; d < q.length; d++) dot += q[d] * k[s][d];
      scores[t * T + s] = dot;
      if (s >= first && s <= t) most = Math.max(most, dot);
    }
    for (let s = first; s <= t; s++) sum += weights[t * T + s] = Math.exp((scores[t * T + s] - most) * report.attention.scale);
    for (let s = first; s <= t; s++) weights[t * T + s] /= sum;
  }
  headCache.set(name, { scores, weights });
  return headCache.get(name);
}
const paintMap = (canvas, layer, head) => {
  const { weights } = attentionOf(layer, head), first = report.attention.first[layer];
  paintCells(canvas, T, T, (t, s) => (s <= t && s >= first[t] ? weightColour(weights[t * T + s]) : null));
};

const ROLE_SCORE = (h) => (h.role === "spread" ? h.spread : h.role === "other" ? h.at_distance : h.scores[h.role]);

let chosenKey = null; // the key whose product with the query is spelled out; null: the one with most weight
function querySection() {
  const layerChoice = byId("layer"), headChoice = byId("head");
  for (let l = 0; l < layers; l++) layerChoice.append(html("option", { value: l }, `${l + 1} of ${layers}`));
  for (let h = 0; h < headsPerLayer; h++) headChoice.append(html("option", { value: h }, `${h + 1} of ${headsPerLayer}`));
  layerChoice.addEventListener("change", () => select({ layer: Number(layerChoice.value) }));
  headChoice.addEventListener("change", () => select({ head: Number(headChoice.value) }));
  const weight = (s) => (s > state.token || s < report.attention.first[state.layer][state.token] ? null
    : attentionOf(state.layer, state.head).weights[state.token * T + s]);
  const refresh = tokenRow(byId("query-tokens"), {
    heat: (s) => (weight(s) === null ? null : Math.sqrt(weight(s))),
    describe: (s) => `${nameOf(s)}${s > state.token ? ", hidden by the mask" : weight(s) === null ? ", out of sight" : `, weight ${fixed(weight(s), 3)}`}`,
  });
  const map = byId("map");
  map.addEventListener("click", (event) => {
    const box = map.getBoundingClientRect();
    const cell = (at, size) => Math.max(0, Math.min(T - 1, Math.floor(at / size * T)));
    const s = cell(event.clientX - box.left, box.width);
    select({ token: cell(event.clientY - box.top, box.height) });
    if (weight(s) !== null) { chosenKey = s; drawFormula(); }
  });
  const drawMap = () => {
    paintMap(map, state.layer, state.head);
    byId("map-row").style.setProperty("--row", state.token / T);
    byId("map-row").style.setProperty("--size", 1 / T);
  };
  painters.push(drawMap);
  legend(byId("map-legend"), (x) => weightColour(x), "weight 0", "1");
  watch(["layer", "head"], () => {
    layerChoice.value = state.layer;
    headChoice.value = state.head;
    const h = headAt(state.layer, state.head);
    byId("head-role").textContent = `Its role: ${h.label} (${fixed(ROLE_SCORE(h))})${h.importance ? `; without it the validation loss rises by ${signed(h.importance.rise, 3)}` : ""}.`;
  });
  watch(["token", "layer", "head"], () => { chosenKey = null; refresh(); drawMap(); drawFormula(); });
}

const weightCell = (picture, text) => html("td", {}, html("div", { class: "weight" }, picture, html("span", { class: "number" }, text)));

function drawFormula() {
  const { scores, weights } = attentionOf(state.layer, state.head), t = state.token, scale = report.attention.scale;
  const row = (s) => ({ s, dot: scores[t * T + s], scaled: scores[t * T + s] * scale, weight: weights[t * T + s] });
  const seen = Array.from({ length: t + 1 }, (_, s) => row(s)).filter(({ s }) => s >= report.attention.first[state.layer][t]);
  const most = Math.max(...seen.map((r) => r.scaled)), sum = seen.reduce((total, r) => total + Math.exp(r.scaled - most), 0);
  const sorted = [...seen].sort((a, b) => b.weight - a.weight);
  const key = chosenKey ?? sorted[0].s, shown = sorted.slice(0, 6);
  if (!shown.some((r) => r.s === key)) shown.push(row(key));
  const rest = seen.length - shown.length, restWeight = 1 - shown.reduce((total, r) => total + r.weight, 0);
  const line = (r) => {
    const pick = html("button", { type: "button", class: "pick", "aria-pressed": String(r.s === key), "aria-label": `Spell out the product with ${nameOf(r.s)}`,
      click: () => { chosenKey = r.s; drawFormula(); byId("formula").querySelector(`[data-s="${r.s}"] button`).focus(); } },
    html("span", { class: "sign" }, labelOf(ids[r.s])), html("span", { class: "muted" }, ` ${r.s + 1}`));
    return html("tr", { "data-s": r.s, class: r.s === key ? "chosen" : null }, html("th", { scope: "row" }, pick), html("td", {}, fixed(r.dot)), html("td", {}, fixed(r.scaled)),
      html("td", {}, "0"), html("td", {}, fixed(Math.exp(r.scaled - most), 3)), weightCell(bar(r.weight, 1), fixed(r.weight, 3)));
  };
  const rows = shown.map(line);
  if (rest > 0) rows.push(html("tr", { class: "muted" }, html("th", { scope: "row" }, `${rest} more`), ...["", "", "0", ""].map((x) => html("td", {}, x)),
    weightCell(bar(restWeight, 1), fixed(Math.max(0, restWeight), 3))));
  if (t + 1 < T) {
    const r = row(t + 1);
    rows.push(html("tr", { class: "muted" }, html("th", { scope: "row" }, html("span", { class: "sign" }, labelOf(ids[t + 1])), ` ${t + 2}, later`),
      html("td", {}, fixed(r.dot)), html("td", {}, fixed(r.scaled)), html("td", {}, "−∞"), html("td", {}, "0"), weightCell(bar(0, 1), "0")));
  }
  rows.push(html("tr", { class: "sum" }, html("th", { scope: "row" }, "sum"), html("td", {}), html("td", {}), html("td", {}), html("td", {}, fixed(sum, 3)), weightCell(html("span"), "1")));
  byId("formula").replaceChildren(html("table", { class: "numbers" },
    html("caption", {}, `What token ${t + 1}, ${quoted(ids[t])}, asks of the tokens before it, in layer ${state.layer + 1}, head ${state.head + 1}`),
    html("thead", {}, html("tr", {}, ...["key", "q · k", `÷ ${fixed(1 / scale)}`, "+ mask", "exp(x − max)", "÷ sum = weight"].map((name) => html("th", { scope: "col" }, name)))),
    html("tbody", {}, ...rows)));
  drawProduct(key);
}

// q, k and their product, number by number: what q . k adds up.
function drawProduct(s) {
  const q = queries.at(state.layer, state.head, state.token), k = keys.at(state.layer, keyHead(state.head), s);
  const product = q.map((x, d) => x * k[d]), total = product.reduce((a, b) => a + b, 0);
  const strip = (name, vector, note) => {
    const largest = Math.max(...vector.map(Math.abs)) || 1;
    const canvas = html("canvas", { class: "vector", role: "img", "aria-label": `${name}: ${vector.length} numbers from ${fixed(Math.min(...vector))} to ${fixed(Math.max(...vector))}` });
    paintCells(canvas, 1, vector.length, (r, d) => divergingColour(vector[d] / largest));
    return html("div", { class: "strip" }, html("span", { class: "what" }, name), canvas, html("span", { class: "number" }, note));
  };
  const range = (vector) => `± ${fixed(Math.max(...vector.map(Math.abs)), 1)}`;
  byId("product").replaceChildren(
    strip(`q of ${quoted(ids[state.token])}`, [...q], range([...q])), strip(`k of ${quoted(ids[s])}`, [...k], range([...k])),
    strip("q × k", [...product], `Σ = ${fixed(total)}`));
}
painters.push(() => { if (layers && byId("product").firstChild) drawFormula(); });

function headSection() {
  const wall = byId("wall"), buttons = [], anyBelow = report.heads.some((h) => h.importance && h.importance.rise < 0);
  const largest = Math.max(...report.heads.map((h) => (h.importance ? Math.abs(h.importance.rise) : 0)));
  wall.style.setProperty("--heads", headsPerLayer);
  report.heads.forEach((h, i) => {
    const canvas = html("canvas", { "aria-hidden": "true" }), rise = h.importance && h.importance.rise;
    const told = `Layer ${h.layer + 1}, head ${h.head + 1}: ${h.label} ${fixed(ROLE_SCORE(h))}${h.importance ? `, loss ${signed(rise, 3)} without it` : ""}`;
    const button = html("button", { type: "button", class: "tile", "aria-label": told, title: told, tabindex: -1, click: () => select({ layer: h.layer, head: h.head }) },
      canvas, html("span", { class: "name" }, `${h.layer + 1}.${h.head + 1}`), html("span", { class: `role role-${h.role.split(" ")[0]}` }, h.label),
      h.importance ? html("span", { class: "worth" }, bar(Math.sign(rise) * Math.sqrt(Math.abs(rise)), Math.sqrt(largest), anyBelow ? "signed" : ""), html("span", { class: "number" }, signed(rise, 3))) : null);
    const painter = () => paintMap(canvas, h.layer, h.head);
    painters.push(painter);
    setTimeout(painter, i); // one after the other, so that the page stays alive meanwhile
    buttons.push(button);
    wall.append(button);
  });
  wall.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: headsPerLayer, ArrowUp: -headsPerLayer }[event.key];
    const to = state.layer * headsPerLayer + state.head + (step || 0);
    if (!step || to < 0 || to >= buttons.length) return;
    event.preventDefault();
    select({ layer: report.heads[to].layer, head: report.heads[to].head });
    buttons[to].focus();
  });
  legend(byId("wall-legend"), (x) => weightColour(x), "weight 0", "1");
  watch(["layer", "head"], () => buttons.forEach((button, i) => {
    const chosen = i === state.layer * headsPerLayer + state.head;
    button.setAttribute("aria-pressed", chosen);
    button.tabIndex = chosen ? 0 : -1;
    if (chosen) {
      const h = report.heads[i], scores = Object.entries(h.scores).map(([name, score]) => `${name} ${fixed(score)}`);
      byId("wall-told").replaceChildren(html("strong", {}, `Layer ${h.layer + 1}, head ${h.head + 1}: ${h.label}. `),
        `Scores: ${scores.join(", ")}, spread ${fixed(h.spread)}. Of its nearest places, most weight (${percent(h.at_distance)}) lies ${h.distance ? `${h.distance} back` : "on the token itself"}. `,
        html("a", { href: "#queries" }, "See its queries and keys"));
    }
  }));
}
