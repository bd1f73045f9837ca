// 1. The text as the model sees it; and the rows of tokens that other parts use to choose one.

// A row of tokens to choose from. heat(t) in 0..1 colours each, or null; describe(t) is what a screen reader says.
function tokenRow(node, { heat, describe, preview, end }) {
  const options = ids.map((id, t) => {
    const label = labelOf(id);
    const breaks = label.endsWith("↵");
    const shown = label.replaceAll("␣", "\u00a0"); // a space looks like one here; its own colour shows where it is
    const option = html("span", {
      role: "option", class: "token", tabindex: -1,
      click: () => select({ token: t }), focus: () => preview && preview(t), pointerenter: () => preview && preview(t),
    }, shown);
    node.append(option);
    if (breaks) node.append(html("br", {}));
    else if (label.endsWith("␣")) node.append(html("wbr", {}));
    return option;
  });
  if (end) node.append(end);
  if (preview) node.addEventListener("pointerleave", () => preview(state.token));
  node.addEventListener("keydown", (event) => { // up and down: the token nearest in the next line
    const direction = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!direction) return;
    const here = options[state.token].getBoundingClientRect();
    let best = null, least = Infinity;
    options.forEach((option, t) => {
      const there = option.getBoundingClientRect();
      const lines = (there.top - here.top) * direction;
      const cost = lines > 2 ? lines * 1000 + Math.abs(there.left - here.left) : Infinity;
      if (cost < least) { least = cost; best = t; }
    });
    event.preventDefault();
    event.stopImmediatePropagation();
    if (best !== null) { select({ token: best }); options[best].focus(); }
  });
  rove(node, () => options.length, () => state.token, (t) => { select({ token: t }); options[t].focus(); });
  let before = null;
  return () => {
    options.forEach((option, t) => {
      const h = heat(t);
      option.style.setProperty("--heat", h === null ? 0 : h.toFixed(3));
      option.classList.toggle("unseen", h === null);
      option.setAttribute("aria-label", describe(t));
    });
    if (before !== null) { options[before].tabIndex = -1; options[before].setAttribute("aria-selected", "false"); }
    options[state.token].tabIndex = 0;
    options[state.token].setAttribute("aria-selected", "true");
    before = state.token;
    const here = options[before].offsetTop - node.offsetTop; // where the row scrolls, the chosen one stays in sight
    if (here < node.scrollTop || here > node.scrollTop + node.clientHeight - 40) node.scrollTop = here - node.clientHeight / 2;
  };
}

// Tokens with their probabilities, as bars; the one that did come is marked.
function likelihoods(entry, actual = null) {
  const rows = entry.ids.map((id, i) => html("li", { class: id === actual ? "actual" : null },
    html("span", { class: "sign" }, labelOf(id)), bar(entry.probabilities[i], 1),
    html("span", { class: "number" }, percent(entry.probabilities[i])),
    id === actual ? html("span", { class: "hidden" }, " (this one came)") : null));
  return html("ol", { class: "likelihoods" }, ...rows);
}

function textSection() {
  const at = report.text.at, detail = byId("text-detail"), MOST_BITS = 8;
  const show = (t) => {
    const entry = at[t];
    const title = html("h3", {}, html("span", { class: "sign large" }, labelOf(ids[t])),
      html("span", { class: "muted" }, ` token ${t + 1} of ${ids.length}`));
    if (!entry) {
      detail.replaceChildren(title, html("p", {}, "The first token: nothing stands before it, so the model expects nothing here."));
      return;
    }
    const facts = [["probability", percent(entry.probability)], ["rank", `${entry.rank} of ${report.model.vocabulary.toLocaleString("en")}`],
      ["surprise", `${fixed(entry.bits)} bits`]];
    detail.replaceChildren(title,
      html("dl", { class: "facts" }, ...facts.map(([name, value]) => html("div", {}, html("dt", {}, name), html("dd", {}, value)))),
      html("p", { class: "caption" }, "What the model expected here:"), likelihoods(entry, ids[t]));
  };
  const refresh = tokenRow(byId("text-tokens"), {
    heat: (t) => (at[t] ? Math.min(1, at[t].bits / MOST_BITS) : null),
    describe: (t) => `${nameOf(t)}${at[t] ? `, surprise ${fixed(at[t].bits, 1)} bits` : ""}`,
    preview: show,
  });
  watch(["token"], () => { refresh(); show(state.token); });
  byId("text-next").replaceChildren(likelihoods(report.text.next));
}
