"use strict";
// The page talks to /v1 of its own server. What the model writes becomes text nodes, never markup.
const byId = (id) => document.getElementById(id);
function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children); // a string becomes a text node
  return node;
}

// --- The request ---
const SHOWN = 6; // likely tokens to ask for at each place
const whole = () => byId("top-k").value === byId("top-k").max; // the slider's end: all tokens
function tellSettings() {
  byId("temperature-told").textContent = Number(byId("temperature").value).toFixed(2);
  byId("top-k-told").textContent = whole() ? "all" : byId("top-k").value;
  byId("tokens-told").textContent = byId("tokens").value;
}
for (const id of ["temperature", "top-k", "tokens"]) byId(id).addEventListener("input", tellSettings);

function headers() {
  const key = byId("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}
async function ask(path, options) {
  const response = await fetch(path, { ...options, headers: headers() });
  if (response.ok) return response;
  if (response.status === 401) { byId("key-part").open = true; byId("key").focus(); }
  const document = await response.json().catch(() => null);
  throw new Error(document?.error?.message ?? `the server answered ${response.status}`);
}
async function* events(response) { // the data of server-sent events, as they come
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let waiting = "";;) {
    const { done, value } = await reader.read();
    if (done) return;
    waiting += value;
    const parts = waiting.split("\n\n");
    waiting = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}

let running = null; // what ends the request that is on its way
async function write() {
  if (running) return;
  const control = running = new AbortController(), begin = performance.now();
  const state = (doing) => {
    const seconds = (performance.now() - begin) / 1000;
    byId("state").textContent = `${doing}${tokens.length} tokens, ${Math.round(tokens.length / Math.max(seconds, 0.001))} a second`;
  };
  byId("write").disabled = true;
  byId("stop").disabled = false;
  clear();
  try {
    const request = {
      prompt: byId("prompt").value, max_tokens: Number(byId("tokens").value), temperature: Number(byId("temperature").value),
      logprobs: SHOWN, stream: true, ...(whole() ? {} : { top_k: Number(byId("top-k").value) }),
    };
    const response = await ask("v1/completions", { method: "POST", body: JSON.stringify(request), signal: control.signal });
    for await (const data of events(response)) {
      if (data === "[DONE]") break;
      const document = JSON.parse(data);
      if (document.error) throw new Error(document.error.message);
      for (const choice of document.choices) add(choice.logprobs);
      state("writing: ");
    }
    state("");
  } catch (error) {
    if (error.name === "AbortError") state("stopped: ");
    else problem(error.message);
  }
  byId("write").disabled = false;
  byId("stop").disabled = true;
  running = null;
}
byId("form").addEventListener("submit", (event) => { event.preventDefault(); write(); });
byId("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); write(); }
});
function problem(message) {
  byId("problem").textContent = message;
  byId("problem").hidden = !message;
  if (message) byId("state").textContent = "";
}

// --- The text ---
let tokens = [], selected = -1, decoder = null; // token: { node, label, probability, likely: [[label, probability]] }
const HIDDEN = /[\p{C}\p{Zl}\p{Zp}]|(?! )\p{Zs}/u;
const spell = (c) => `\\u{${c.codePointAt(0).toString(16)}}`;
// What a token is, on one line, with nothing invisible: the server writes parts of characters as bytes:\xe6.
function label(token) {
  const signs = { " ": "␣", "\n": "↵", "\t": "⇥" };
  const text = token.startsWith("bytes:\\x") ? token.slice(6) : token;
  return [...text].map((c) => signs[c] ?? (HIDDEN.test(c) ? spell(c) : /^\p{M}/u.test(c) ? `◌${c}` : c)).join("") || "∅";
}
// What a token adds to the text. A character that takes several tokens comes with its last.
function shown(token) {
  const bytes = token.startsWith("bytes:\\x")
    ? Uint8Array.from(token.slice(6).split("\\x").slice(1), (hex) => parseInt(hex, 16)) : new TextEncoder().encode(token);
  return [...decoder.decode(bytes, { stream: true })].map((c) => (c !== "\n" && c !== "\t" && HIDDEN.test(c) ? spell(c) : c)).join("");
}
const percent = (p) => (p > 0 && p < 0.0001 ? "<0.01%" : `${(100 * p).toFixed(p < 0.0995 ? 2 : 1)}%`);

function clear() {
  tokens = [];
  selected = -1;
  decoder = new TextDecoder();
  problem("");
  byId("text").replaceChildren(make("span", { class: "given", "aria-hidden": "true" }, byId("prompt").value));
}
function add(logprobs) {
  logprobs.tokens.forEach((token, i) => {
    const probability = Math.exp(logprobs.token_logprobs[i]), at = tokens.length, text = shown(token);
    const likely = Object.entries(logprobs.top_logprobs[i]).map(([name, value]) => [label(name), Math.exp(value)]);
    const node = make("span", {
      role: "option", class: text.trim() ? "token" : "token blank", tabindex: at ? -1 : 0, "aria-selected": "false",
      "aria-label": `${label(token)}, probability ${percent(probability)}`,
    }, text === "\n" ? "↵\n" : text || "·");
    node.style.setProperty("--heat", Math.min(1, -Math.log2(probability) / 8).toFixed(3));
    node.addEventListener("pointerenter", () => show(at));
    node.addEventListener("focus", () => select(at));
    node.addEventListener("click", () => node.focus());
    tokens.push({ node, label: label(token), probability, likely: likely.sort((a, b) => b[1] - a[1]) });
    byId("text").append(node);
  });
}
function show(at) {
  const { label: name, probability, likely } = tokens[at];
  const rows = likely.map(([other, p]) => {
    const fill = make("span", { class: "fill" });
    fill.style.setProperty("--share", p.toFixed(4));
    return make("li", { class: other === name ? "chosen" : "" }, make("span", { class: "sign" }, other),
      make("span", { class: "bar" }, fill), make("span", { class: "number" }, percent(p)));
  });
  byId("detail").replaceChildren(
    make("h3", {}, make("span", { class: "sign large" }, name), ` token ${at + 1}`),
    make("p", { class: "caption" }, "The model gave it ", make("strong", { id: "probability" }, percent(probability)),
      `, ${(-Math.log2(probability)).toFixed(2)} bits of surprise; before temperature and top-k it thought of:`),
    make("ol", { class: "likelihoods" }, ...rows));
}
function select(at) {
  const before = tokens[selected] ?? tokens[0]; // one token is in the tab order: the chosen one
  before.node.tabIndex = -1;
  before.node.setAttribute("aria-selected", "false");
  tokens[at].node.tabIndex = 0;
  tokens[at].node.setAttribute("aria-selected", "true");
  selected = at;
  show(at);
}
byId("text").addEventListener("pointerleave", () => { if (selected >= 0) show(selected); });
byId("text").addEventListener("keydown", (event) => {
  const to = { ArrowRight: selected + 1, ArrowDown: selected + 1, ArrowLeft: selected - 1, ArrowUp: selected - 1,
    Home: 0, End: tokens.length - 1 }[event.key];
  if (to === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  tokens[Math.max(0, Math.min(tokens.length - 1, to))]?.node.focus();
});

// --- The model ---
async function introduce() {
  try {
    const model = (await (await ask("v1/models", {})).json()).data[0];
    byId("name").textContent = document.title = model.id;
    byId("figures").textContent = `${model.parameters.toLocaleString("en")} parameters, ${model.vocab_size.toLocaleString("en")} kinds of token, ${model.context_window.toLocaleString("en")} tokens of context`;
    const atEnd = whole();
    byId("top-k").max = Math.min(100, model.vocab_size);
    if (atEnd) byId("top-k").value = byId("top-k").max;
    problem("");
  } catch (error) { problem(error.message); }
  tellSettings();
}
byId("key").addEventListener("change", introduce);
tellSettings();
introduce().then(() => document.documentElement.classList.add("ready"));
