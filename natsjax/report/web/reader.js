/* The role reader: text colored by role, the role bias, and how long each key stays. */

const TOKEN_WIDTH = 12, SLOT_HEIGHT = 20, RULER_HEIGHT = 20;  // pixels of the spans

/** docs/method.md 1: the first query that cannot read each key any more, and the end (exclusive) of its document. */
function lifetimes(roles, windows, starts) {
  const firsts = new Set(starts), keyEnd = [], documentEnd = [];
  let end = roles.length, nextGlobal = Infinity;
  for (let s = roles.length - 1; s >= 0; s--) {
    const life = roles[s] === "0" ? Infinity : roles[s] === "1" ? nextGlobal + 1 : s + windows[roles[s] - 2] + 1;
    keyEnd[s] = Math.min(life, end);
    documentEnd[s] = end;
    if (roles[s] === "0") nextGlobal = s;
    if (firsts.has(s)) { end = s; nextGlobal = Infinity; }
  }
  return { keyEnd, documentEnd };
}

/** The first free slot for each key, as in a buffer that uses slots again; there are as many as keys live at once. */
function slotsOf(keyEnd) {
  const freeFrom = [];
  const slots = keyEnd.map((end, s) => {
    const free = freeFrom.findIndex((from) => from <= s), slot = free < 0 ? freeFrom.length : free;
    freeFrom[slot] = end;
    return slot;
  });
  return { slots, numSlots: freeFrom.length };
}

function visibleText(text) {
  if (text === "") return "∅";
  const picture = (c) => (c === "\t" ? "⇥" : String.fromCharCode(0x2400 + c.charCodeAt(0)));
  const marked = text.replace(/[\x00-\x09\x0b-\x1f]/g, picture);
  return (/^ +$/.test(marked) ? marked.replaceAll(" ", "·") : marked).replaceAll("\n", "↵\n");
}

let reader = { key: "" };  // the text on show: its tokens' elements, roles and lifetimes

/** With several windows a SLIDING role is named after its own. */
const roleNames = (windows) => ["GLOBAL", "LOCAL", ...windows.map((window) => (windows.length > 1 ? `SLIDING ${window}` : "SLIDING"))];
const roleClass = (role) => (role > 2 ? `role-2 wider-${Math.min(role - 2, 3)}` : `role-${role}`);

function untilWhen(s) {
  const { roles, keyEnd, documentEnd, windows } = reader, last = keyEnd[s] - 1;
  if (keyEnd[s] === documentEnd[s])
    return last === roles.length - 1 ? "to the end of this text" : `to the end of its document, token ${last}`;
  return `up to and including token ${last}, ${roles[s] === "1" ? "the next GLOBAL token" : `${windows[roles[s] - 2]} tokens on`}`;
}

const learnsRoles = (kind) => ["nats", "gated", "head_roles"].includes(kind);
const layerName = (kind, layer) => (run.layers.every(learnsRoles) ? `${layer}` : `${layer} (${kind})`);

function showReader({ sample: index, layer, head, token, role_bias }) {
  const key = [index, layer, head, role_bias].join("/");
  if (key !== reader.key) {
    const sample = samples[index], roles = sample.roles[role_bias][layer][head];
    // One number in files from before there could be several, a list for each head where heads differ; a sliding layer has one.
    const own = [sample.windows[layer]].flat(), ofHead = Array.isArray(own[0]) ? own[head] : own;
    const windows = ofHead.slice(0, run.layers[layer] === "sliding" ? 1 : undefined);
    const lives = lifetimes(roles, windows, sample.document_starts);
    reader = { key, sample, roles, windows, layer, head, ...lives, ...slotsOf(lives.keyEnd) };
    showOptions("sample", samples.map((s) => s.title), index);
    showOptions("layer", sample.roles[role_bias].map((_, l) => layerName(run.layers[l], l)), layer);
    showOptions("head", sample.roles[role_bias][layer].map((_, k) => k), head);
    showRoleBias(sample, role_bias);
    showRoleCounts();
    showTokens();
    showSpans();
  }
  highlight(token);
}

function showRoleBias(sample, role_bias) {
  const row = rowOfRoleBias(rows, sample.role_biases[role_bias]), interval = between(row, "perplexity");
  fill(byId("role-bias"), { max: sample.role_biases.length - 1 }, []);
  byId("role-bias").value = role_bias;
  const figures = [`role bias ${formatValue(sample.role_biases[role_bias])}`, `KV ${percent(row.kv_fraction)}`,
    PERCENT ? `accuracy ${percent(row.accuracy)}` : `perplexity ${significant(row.perplexity, 4)}`];
  byId("role-bias").setAttribute("aria-valuetext", figures.join(", "));
  const notes = [METRIC === "perplexity" && interval ? `95 %: ${interval}` : "", row === biased ? "set to the budget" : ""];
  byId("role-bias-figures").replaceChildren(...figures.map((figure) => el("strong", {}, figure)),
    el("span", { class: "muted small" }, notes.filter(Boolean).join(", ")));
}

function showRoleCounts() {
  const { roles, windows } = reader;
  const meanings = ["to the end of the document", "up to and including the next GLOBAL token",
    ...windows.map((window) => `for ${window} further token${window === 1 ? "" : "s"}`)];
  const body = el("tbody", {}, ...roleNames(windows).map((name, role) => {
    const total = roles.split(String(role)).length - 1;
    return el("tr", {}, el("th", { scope: "row" }, el("span", { class: `name ${roleClass(role)}` }, name)),
      el("td", { class: "muted" }, meanings[role]), numeric(count(total)), numeric(percent(total / roles.length)));
  }));
  const head = tableHead(["Role", "Key is kept", "Tokens", "Fraction"], ["Role", "Key is kept"]);
  document.querySelector("#reader table").replaceChildren(head, body);
}

function showTokens() {
  const starts = new Set(reader.sample.document_starts), hadFocus = byId("tokens").contains(document.activeElement);
  const parts = [], names = roleNames(reader.windows);
  reader.nodes = reader.sample.tokens.map((text, s) => {
    if (s > 0 && starts.has(s)) parts.push(el("span", { class: "boundary", role: "presentation" }, "next document"));
    const role = Number(reader.roles[s]);
    const node = el("span", { class: `token ${roleClass(role)}`, role: "option", tabindex: -1, "data-index": s,
      "data-end": reader.keyEnd[s], title: `token ${s}, ${names[role]}: its key is read ${untilWhen(s)}` },
      visibleText(text));
    parts.push(node);
    return node;
  });
  byId("tokens").replaceChildren(...parts);
  if (hadFocus) reader.nodes[selection().token ?? 0].focus();
}

function showSpans() {
  const { sample, roles, windows, keyEnd, slots, numSlots } = reader, length = roles.length, names = roleNames(windows);
  const place = (node, left, top, width, extent) => {
    Object.assign(node.style, { left: `${left}px`, top: `${top}px`, width: `${width}px`, height: `${extent}px` });
    return node;
  };
  const full = RULER_HEIGHT + numSlots * SLOT_HEIGHT;
  const field = byId("spans").firstElementChild, ruler = el("div", { class: "ruler" });
  for (let s = 0; s < length; s += 10) ruler.append(place(el("i", {}, s), s * TOKEN_WIDTH, 0, 10 * TOKEN_WIDTH, RULER_HEIGHT));
  reader.bars = sample.tokens.map((text, s) => place(
    el("div", { class: `span ${roleClass(Number(roles[s]))}`, "data-index": s, "data-slot": slots[s],
      title: `token ${s} “${visibleText(text).trim()}”, ${names[roles[s]]}: its key is read ${untilWhen(s)}` }, el("b", {}, visibleText(text))),
    s * TOKEN_WIDTH, RULER_HEIGHT + slots[s] * SLOT_HEIGHT + 1, (keyEnd[s] - s) * TOKEN_WIDTH - 1, SLOT_HEIGHT - 3));
  const edges = sample.document_starts.filter((s) => s > 0).map((s) =>
    place(el("div", { class: "edge" }), s * TOKEN_WIDTH - 1, 0, 0, full));
  reader.query = place(el("div", { class: "query-line" }), 0, 0, TOKEN_WIDTH, full);
  Object.assign(field.style, { width: `${length * TOKEN_WIDTH}px`, height: `${full}px` });
  field.replaceChildren(reader.query, ...edges, ...reader.bars, ruler);
}

/** Brightens the keys that the query of token `t` reads; null brightens all. */
function highlight(t) {
  const { nodes, bars, query, keyEnd, numSlots } = reader, tabStop = selection().token ?? 0;
  const reads = (s) => t !== null && s <= t && t < keyEnd[s];
  const readable = nodes.filter((_, s) => reads(s)).length;
  nodes.forEach((node, s) => {
    node.classList.toggle("readable", reads(s));
    node.classList.toggle("query", s === t);
    node.setAttribute("aria-selected", s === t);
    node.tabIndex = s === tabStop ? 0 : -1;
    bars[s].classList.toggle("readable", reads(s));
  });
  for (const box of ["tokens", "spans"]) byId(box).classList.toggle("active", t !== null);
  byId("detail").replaceChildren(...(t === null ? headText() : tokenText(t, readable)));
  const here = t === null ? "" : ` At token ${t} ${readable} of them hold${readable === 1 ? "s" : ""} a key that its query reads.`;
  byId("spans-note").textContent = `${numSlots} slots in this text, where full attention needs ${fullSlots()}.${here}`;
  query.hidden = t === null;
  if (t === null) return;
  query.style.left = `${t * TOKEN_WIDTH}px`;
}

/** Scrolls the spans, if need be, to where the query of token `t` is. */
function followQuery(t) {
  const box = byId("spans"), left = t * TOKEN_WIDTH;
  if (left < box.scrollLeft || left + TOKEN_WIDTH > box.scrollLeft + box.clientWidth)
    box.scrollLeft = left - box.clientWidth / 2;
}

const fullSlots = () => Math.max(...reader.documentEnd.map((end, s) => end - Math.max(0,
  ...reader.sample.document_starts.filter((first) => first <= s))));

function headText() {
  const { keyEnd, documentEnd, layer, head } = reader, lifetime = (sum, end, s) => sum + end - s;
  const fraction = keyEnd.reduce(lifetime, 0) / documentEnd.reduce(lifetime, 0);
  return [el("div", {}, `Layer ${layer}, head ${head}: in this text its KV fraction is ${percent(fraction)}, the readable `,
    "keys of all queries as a fraction of full attention's."), el("div", { class: "muted" }, "Point at a token, or select one.")];
}

function tokenText(t, readable) {
  const { roles, windows, sample, layer, head } = reader;
  const start = Math.max(0, ...sample.document_starts.filter((first) => first <= t));
  const forced = t === start && roles[t] === "0" ? " (always, as the first token of a document)" : "";
  const name = el("strong", {}, `Token ${t}: “${visibleText(sample.tokens[t]).trim()}”`);
  return [el("div", {}, name, ` is ${roleNames(windows)[roles[t]]}${forced}. Its key is read ${untilWhen(t)}.`),
    el("div", { class: "muted" }, `Layer ${layer}, head ${head}: its query reads ${readable} of the ${t - start + 1} keys ` +
      "so far in its document.")];
}

const indexOf = (event) => event.target.closest("[data-index]")?.dataset.index;

/** The token that an arrow key leads to from `now`; undefined for other keys. */
function moved(key, now) {
  const last = reader.nodes.length - 1;
  const next = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: last }[key];
  return next === undefined ? undefined : Math.min(Math.max(next, 0), last);
}

function listenToTokens() {
  const box = byId("tokens");
  box.onpointerover = (event) => indexOf(event) !== undefined && highlight(Number(indexOf(event)));
  box.onpointerleave = () => highlight(selection().token);
  box.onclick = (event) => event.target.closest("[data-index]")?.focus();
  box.addEventListener("focusin", (event) => { go({ token: Number(indexOf(event)) }); followQuery(Number(indexOf(event))); });
  box.onkeydown = (event) => {
    if (event.key === "Escape") { document.activeElement.blur(); return go({ token: null }); }
    const next = moved(event.key, Number(indexOf(event)));
    if (next === undefined) return;
    event.preventDefault();
    reader.nodes[next].focus();
  };
}

function listenToSpans() {
  const box = byId("spans");
  box.onclick = (event) => indexOf(event) !== undefined && go({ token: Number(indexOf(event)) });
  box.onpointermove = (event) => {
    const x = event.clientX - box.firstElementChild.getBoundingClientRect().left;
    highlight(Math.min(Math.max(Math.floor(x / TOKEN_WIDTH), 0), reader.nodes.length - 1));
  };
  box.onpointerleave = () => highlight(selection().token);
  box.onkeydown = (event) => {
    if (event.key === "Escape") return go({ token: null });
    const now = selection().token, next = now === null && event.key === "ArrowRight" ? 0 : moved(event.key, now ?? 0);
    if (next === undefined) return;
    event.preventDefault();
    go({ token: next });
    followQuery(next);
  };
}
