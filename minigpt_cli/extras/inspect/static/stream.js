// 5. The residual stream: how it grows, what it would say on the way, and who pushes the right token.
const rowName = (l) => (l === layers ? "output" : l === 0 ? "embedding" : `block ${l}`);

function normChart() {
  const { stream, attention, feed_forward: feedForward } = report.stream.norms;
  const mean = (row) => row.reduce((a, b) => a + b, 0) / row.length;
  const means = (rows, from) => rows.map((row, l) => [l + from, mean(row)]);
  const here = (rows, from) => rows.map((row, l) => [l + from, row[state.token]]);
  const repaint = lineChart(byId("norms"), () => ({
    series: [
      { points: means(stream, 0), style: "first wide", dots: true }, { points: here(stream, 0), style: "first thin" },
      { points: means(attention, 1), style: "second", dots: true }, { points: here(attention, 1), style: "second thin" },
      { points: means(feedForward, 1), style: "third", dots: true }, { points: here(feedForward, 1), style: "third thin" },
    ],
    xLabel: "after block", yLabel: "length (L2 norm)", zero: true, height: 250, xTicks: stream.map((_, l) => [l, l ? String(l) : "embed"]),
    describe: `Mean length of the stream: ${stream.map((row, l) => `${rowName(l)} ${fixed(mean(row), 1)}`).join(", ")}.`,
  }));
  watch(["token"], repaint);
}

function lens() {
  const { ids: top, probabilities, right, loss } = report.stream.lens, grid = byId("lens");
  grid.classList.toggle("wide", Object.values(report.labels).some((label) => label.length > 3));
  const columns = ids.map(() => []);
  const say = (t) => {
    const actual = t + 1 < T ? ids[t + 1] : null;
    const rows = top.map((row, l) => html("tr", {}, html("th", { scope: "row" }, rowName(l)),
      ...row[t].map((id, i) => html("td", { class: id === actual ? "actual" : null }, html("span", { class: "sign" }, labelOf(id)), " ", html("span", { class: "muted" }, percent(probabilities[l][t][i])))),
      html("td", {}, actual === null ? "–" : percent(right[l][t]))));
    const head = ["after", ...top[0][t].map((_, i) => ["likeliest", "second", "third"][i]), actual === null ? "(unknown)" : `P(${quoted(actual)})`];
    byId("lens-detail").replaceChildren(html("table", { class: "numbers lens-table" },
      html("caption", {}, `After token ${t + 1}, ${quoted(ids[t])}${actual === null ? "" : `; ${quoted(actual)} came next`}`),
      html("thead", {}, html("tr", {}, ...head.map((name) => html("th", { scope: "col" }, name)))), html("tbody", {}, ...rows)));
  };
  const line = (name, cells) => html("div", { class: "lens-row" }, html("span", { class: "lens-name" }, name), ...cells);
  const cell = (t, text, kind) => {
    const node = html("span", { class: `lens-cell ${kind}`, click: () => select({ token: t }), pointerenter: () => say(t) }, text);
    columns[t].push(node);
    return node;
  };
  grid.append(line("read", ids.map((id, t) => cell(t, labelOf(id), "read"))));
  top.forEach((row, l) => grid.append(line(rowName(l), row.map((choice, t) => {
    const node = cell(t, labelOf(choice[0]), t + 1 < T && choice[0] === ids[t + 1] ? "hit" : "");
    node.style.setProperty("--heat", Math.sqrt(probabilities[l][t][0]).toFixed(3));
    return node;
  }))));
  grid.append(line("came", ids.map((_, t) => cell(t, t + 1 < T ? labelOf(ids[t + 1]) : "", "read"))));
  grid.addEventListener("pointerleave", () => say(state.token));
  rove(grid, () => T, () => state.token, (t) => select({ token: t }));
  let before = state.token;
  watch(["token"], () => {
    columns[before].forEach((node) => node.classList.remove("chosen"));
    columns[state.token].forEach((node) => node.classList.add("chosen"));
    before = state.token;
    const node = columns[state.token][0];
    grid.scrollTo({ left: node.offsetLeft - grid.clientWidth / 2 });
    say(state.token);
  });
  byId("lens-loss").textContent = loss[0] === null ? ""
    : `Mean loss if it had to speak there: ${loss.map((x, l) => `${rowName(l)} ${fixed(x)}`).join(", ")} nats per token.`;
}

function pushes() {
  const { parts, values, total } = report.stream.push, node = byId("push");
  const means = values.map((row) => row.reduce((a, b) => a + b, 0) / row.length);
  watch(["token"], () => {
    const t = Math.min(state.token, T - 2); // the last token's successor is unknown
    const largest = Math.max(...values.map((row) => Math.abs(row[t])), ...means.map(Math.abs));
    const rows = parts.map((name, i) => html("tr", {}, html("th", { scope: "row" }, name), html("td", {}, bar(values[i][t], largest, "signed")),
      html("td", {}, signed(values[i][t])), html("td", { class: "muted" }, signed(means[i]))));
    rows.push(html("tr", { class: "sum" }, html("th", { scope: "row" }, "sum"), html("td", {}), html("td", {}, signed(total[t])), html("td", { class: "muted" }, signed(total.reduce((a, b) => a + b, 0) / total.length))));
    node.replaceChildren(html("table", { class: "numbers push-table" },
      html("caption", {}, `After token ${t + 1}, ${quoted(ids[t])}: who pushes ${quoted(ids[t + 1])}, which came next`),
      html("thead", {}, html("tr", {}, ...["part", "", "here", "mean"].map((name) => html("th", { scope: "col" }, name)))), html("tbody", {}, ...rows)));
  });
}

function streamSection() {
  if (layers) normChart();
  lens();
  if (report.stream.push && T > 1) pushes();
}
