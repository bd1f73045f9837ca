// 2. Embeddings: the tokens in a plane, their neighbours, and what the model knows of positions.
const MARKS = ["M0-5A5 5 0 1 0 .01-5Z", "M-4.5-4.5h9v9h-9Z", "M0-6L5.5 4h-11Z", "M0-6L6 0L0 6L-6 0Z", "M-2-6h4v4h4v4h-4v4h-4v-4h-4v-4h4Z",
  "M0 6L5.5-4h-11Z", "M-6-2h12v4h-12Z", "M-5-3L-3-5L0-2L3-5L5-3L2 0L5 3L3 5L0 2L-3 5L-5 3L-2 0Z"];

function plane() {
  const e = report.embeddings, node = byId("plane"), written = e.ids.length <= 150;
  const xs = e.places.map((p) => p[0]), ys = e.places.map((p) => p[1]);
  let points = [];
  const place = (low, high, from, to) => (v) => (high > low ? from + (v - low) / (high - low) * (to - from) : (from + to) / 2);
  const draw = paint(node, (width) => {
    const height = Math.min(520, Math.max(320, width * 0.8)), edge = 30;
    const x = place(Math.min(...xs), Math.max(...xs), edge, width - edge);
    const y = place(Math.min(...ys), Math.max(...ys), height - edge - 14, edge);
    const picture = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "listbox", "aria-label": "Token embeddings in a plane. Arrow keys move from token to token." });
    picture.append(svg("text", { class: "axis", x: width / 2, y: height - 4, "text-anchor": "middle" }, `first component: ${percent(e.explained[0])} of the variance`),
      svg("text", { class: "axis", x: 0, y: 0, "text-anchor": "middle", transform: `translate(12 ${height / 2}) rotate(-90)` }, `second: ${percent(e.explained[1])}`));
    const lines = svg("g", { class: "ties" });
    picture.append(lines);
    const inText = new Set(ids);
    points = e.ids.map((id, i) => {
      const mark = written
        ? svg("text", { "text-anchor": "middle", dy: "0.35em" }, labelOf(id))
        : svg("path", { d: MARKS[e.kinds[i]] });
      const point = svg("g", {
        class: `point kind-${e.kinds[i]} ${inText.has(id) ? "" : "absent"}`, role: "option", tabindex: -1,
        transform: `translate(${x(xs[i]).toFixed(1)} ${y(ys[i]).toFixed(1)})`, "aria-label": `${quoted(id)}, ${e.kind_names[e.kinds[i]]}`,
        click: () => select({ point: i }), pointerenter: () => show(i),
      }, svg("circle", { class: "halo", r: 13 }), mark, svg("title", {}, `${labelOf(id)} (${e.kind_names[e.kinds[i]]})`));
      picture.append(point);
      return point;
    });
    picture.addEventListener("pointerleave", () => show(state.point));
    rove(picture, () => points.length, () => state.point, (i) => { select({ point: i }); points[i].focus(); });
    node.replaceChildren(picture);
    node.ties = (i) => lines.replaceChildren(...e.neighbours[i].map((id) => e.ids.indexOf(id)).filter((j) => j >= 0)
      .map((j) => svg("line", { x1: x(xs[i]), y1: y(ys[i]), x2: x(xs[j]), y2: y(ys[j]) })));
    mark();
  });
  const show = (i) => {
    if (node.ties) node.ties(i);
    const rows = e.neighbours[i].map((id, j) => html("li", {}, html("span", { class: "sign" }, labelOf(id)),
      bar(e.cosines[i][j], 1), html("span", { class: "number" }, fixed(e.cosines[i][j]))));
    byId("neighbours").replaceChildren(
      html("h3", {}, html("span", { class: "sign large" }, labelOf(e.ids[i])), html("span", { class: "muted" }, ` ${e.kind_names[e.kinds[i]]}`)),
      html("p", { class: "caption" }, "Nearest by cosine, in all dimensions:"), html("ol", { class: "likelihoods" }, ...rows),
      html("p", { class: "caption" }, `Length of its vector: ${fixed(e.norms[i])}`));
  };
  const mark = () => {
    points.forEach((point, i) => {
      point.setAttribute("tabindex", i === state.point ? 0 : -1);
      point.setAttribute("aria-selected", i === state.point);
    });
    show(state.point);
  };
  watch(["point"], mark);
  draw();
}

function positionMap() {
  const p = report.positions;
  if (p.kind === "learned") {
    const canvas = byId("positions"), n = p.similarity.length;
    const painter = () => paintCells(canvas, n, n, (r, c) => divergingColour(p.similarity[r][c]));
    painters.push(painter);
    painter();
    const mean = (d) => {
      let sum = 0;
      for (let r = d; r < n; r++) sum += p.similarity[r][r - d];
      return sum / (n - d);
    };
    const told = [1, 4, 16].filter((d) => d < n).map((d) => `${fixed(mean(d))} at a distance of ${d * p.step}`);
    byId("positions-told").textContent = told.length ? `Mean cosine: ${told.join(", ")}.` : "";
    legend(byId("positions-legend"), (x) => divergingColour(2 * x - 1), "cosine −1", "+1");
  } else if (p.kind === "rope") {
    const context = report.model.config.block_size, node = byId("positions");
    const powers = p.wavelengths.map((w, i) => [i + 1, Math.log10(w)]);
    const low = Math.floor(Math.min(...powers.map((q) => q[1]))), high = Math.ceil(Math.max(...powers.map((q) => q[1]), Math.log10(context)));
    lineChart(node, () => ({
      series: [{ points: powers, style: "first", dots: true },
        { points: [[1, Math.log10(context)], [powers.length, Math.log10(context)]], style: "reference" }, { points: [[1, low], [1, high]], style: "invisible" }],
      xLabel: "pair of numbers in a head", yLabel: "log₁₀ of the wavelength", height: 240,
      describe: `Wavelengths of the ${powers.length} rotated pairs, from ${short(p.wavelengths[0])} to ${short(p.wavelengths.at(-1))} tokens.`,
    }));
    const beyond = p.wavelengths.filter((w) => w > context).length;
    byId("positions-told").textContent = `From ${short(p.wavelengths[0])} to ${short(p.wavelengths.at(-1))} tokens a turn; the dashed line is the context of ${context} tokens, ${beyond} of ${powers.length} pairs turn more slowly than that.`;
  }
}

function embeddingSection() {
  const e = report.embeddings;
  if (e.ids.length > 1) {
    state.point = Math.max(0, e.ids.indexOf(ids[state.token]));
    plane();
    watch(["token"], () => select({ point: Math.max(0, e.ids.indexOf(ids[state.token])) }));
  }
  positionMap();
}
