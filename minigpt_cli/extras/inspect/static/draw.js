// Colours and charts. One scale from nothing to much, and one from against to for, both told apart without colour vision.
const RAMPS = {
  light: [[250, 249, 246], [214, 229, 238], [126, 180, 211], [42, 120, 170], [9, 52, 84]],
  dark: [[24, 27, 33], [27, 56, 78], [40, 108, 150], [98, 170, 206], [232, 247, 252]],
};
function ramp(x) {
  const stops = dark.matches ? RAMPS.dark : RAMPS.light;
  const place = Math.max(0, Math.min(1, x)) * (stops.length - 1);
  const i = Math.min(stops.length - 2, Math.floor(place)), part = place - i;
  return stops[i].map((a, c) => Math.round(a + (stops[i + 1][c] - a) * part));
}
const css = (rgb) => `rgb(${rgb.join(",")})`;
// Small weights would vanish on a straight scale: colours follow the square root, and the legends say so.
const weightColour = (w) => ramp(Math.sqrt(w));
function divergingColour(x) {
  const end = dark.matches ? (x < 0 ? [255, 150, 85] : [90, 185, 245]) : (x < 0 ? [213, 94, 0] : [0, 114, 178]);
  const zero = dark.matches ? [24, 27, 33] : [250, 249, 246], part = Math.min(1, Math.abs(x));
  return zero.map((a, c) => Math.round(a + (end[c] - a) * part));
}

// A picture of one colour a cell; CSS makes it as large as it should be.
function paintCells(canvas, rows, columns, colour) {
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
  for (let r = 0, at = 0; r < rows; r++) {
    for (let c = 0; c < columns; c++, at += 4) {
      const rgb = colour(r, c);
      if (rgb) { image.data.set(rgb, at); image.data[at + 3] = 255; }
    }
  }
  context.putImageData(image, 0, 0);
}

function legend(node, colour, from, to) {
  const canvas = html("canvas", { class: "scale", "aria-hidden": "true" });
  node.replaceChildren(html("span", {}, from), canvas, html("span", {}, to));
  painters.push(() => paintCells(canvas, 1, 64, (r, c) => colour(c / 63)));
  painters.at(-1)();
}

function ticks(low, high, about) {
  const span = high - low || 1, raw = span / about, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-6; i++) found.push(i * step);
  return found;
}

// Lines over numbered axes. options() gives {series: [{points: [[x, y], ...], style, dots}], marks: [{x, name}], ...}.
function lineChart(node, options) {
  return paint(node, (width) => {
    const { series, xLabel, yLabel, height = 260, marks = [], zero = false, xTicks = null, describe } = options();
    const points = series.flatMap((s) => s.points);
    const xs = points.map((p) => p[0]), ys = points.map((p) => p[1]);
    const left = 56, right = 24, top = 10, bottom = 40;
    let [x0, x1] = [Math.min(...xs), Math.max(...xs)], [y0, y1] = [Math.min(...ys), Math.max(...ys)];
    if (zero) y0 = Math.min(0, y0);
    if (x0 === x1) { x0 -= 0.5; x1 += 0.5; }
    if (y0 === y1) { y0 -= Math.abs(y0) / 2 || 1; y1 += Math.abs(y1) / 2 || 1; }
    const x = (v) => left + (v - x0) / (x1 - x0) * (width - left - right);
    const y = (v) => height - bottom - (v - y0) / (y1 - y0) * (height - top - bottom);
    const picture = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": describe });
    for (const v of ticks(y0, y1, 5)) {
      picture.append(
        svg("line", { class: "grid", x1: left, x2: width - right, y1: y(v), y2: y(v) }),
        svg("text", { class: "tick", x: left - 7, y: y(v) + 4, "text-anchor": "end" }, short(v)));
    }
    for (const [v, name] of xTicks || ticks(x0, x1, Math.max(2, Math.floor(width / 110))).map((v) => [v, short(v)])) {
      picture.append(svg("text", { class: "tick", x: x(v), y: height - bottom + 17, "text-anchor": "middle" }, name));
    }
    picture.append(
      svg("text", { class: "axis", x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, xLabel),
      svg("text", { class: "axis", x: 0, y: 0, "text-anchor": "middle",
        transform: `translate(12 ${(height - bottom + top) / 2}) rotate(-90)` }, yLabel));
    for (const mark of marks) {
      if (mark.x < x0 || mark.x > x1) continue;
      const late = x(mark.x) > width - 130;
      picture.append(
        svg("line", { class: "mark", x1: x(mark.x), x2: x(mark.x), y1: top, y2: height - bottom }),
        svg("text", { class: "tick", x: x(mark.x) + (late ? -5 : 5), y: top + 10,
          "text-anchor": late ? "end" : "start" }, mark.name));
    }
    for (const s of series) {
      if (!s.points.length) continue;
      const d = s.points.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`).join("");
      picture.append(svg("path", { class: `line ${s.style}`, d }));
      if (s.dots) for (const p of s.points) picture.append(svg("circle", { class: `dot ${s.style}`, r: 3, cx: x(p[0]), cy: y(p[1]) }));
    }
    node.replaceChildren(picture);
  });
}

// Horizontal bars from a common zero, for tables of signed or positive numbers.
function bar(value, largest, kind = "") {
  const share = largest > 0 ? Math.min(1, Math.abs(value) / largest) : 0;
  const filled = html("span", { class: `fill ${kind} ${value < 0 ? "negative" : "positive"}` });
  filled.style.setProperty("--share", share.toFixed(4));
  return html("span", { class: `bar ${kind}`, "aria-hidden": "true" }, filled);
}
