/* The page of one run. */
const { rows, budget_check, samples, run, training, changed } = data;
const weightNames = [...new Set(rows.map((row) => row.weights))];
const dashes = (weights) => DASHES[weightNames.indexOf(weights) % DASHES.length];
const ownLabel = methodLabel({ method: NATS });
const natsRows = rows.filter(isNats);
const natsWeights = new Set(natsRows.map((row) => row.weights));
// Full attention on weights that were trained with NAtS is off their distribution, hence no anchor.
const anchors = rows.filter((row) => isFull(row) && !natsWeights.has(row.weights));
const biased = budget_check && rowOfRoleBias(rows, budget_check.role_bias);

// --- Header, key figures, run --------------------------------------------------------------------

function showHeader() {
  byId("evaluation").textContent = run.evaluation;
  const kinds = [...new Set(run.layers)];
  const attention = kinds.length === 1 ? `${kinds[0]}, ${count(run.layers.length)} layers` : `by layer: ${run.layers.join(", ")}`;
  const facts = {
    Workdir: el("code", {}, run.workdir), Config: el("code", {}, run.config), Step: count(run.step),
    Parameters: count(run.num_parameters), Attention: attention, Corpus: run.corpus,
    "Context length": `${count(run.context_length)} tokens`, Window: run.window === null ? "none" : `${[run.window].flat().join(", ")} tokens`,
    Evaluated: run.created, "Versions then": run.versions, "On": run.device,
  };
  for (const [name, value] of Object.entries(facts)) byId("run").append(el("dt", {}, name), el("dd", {}, value));
  showCommands(data.commands);
  if (!changed.length) return byId("settings").remove();
  byId("settings").querySelector("table").append(tableHead(["Field", "Value", "Default"], ["Field", "Value", "Default"]),
    el("tbody", {}, ...changed.map(({ field, value, default: usual }) => el("tr", {}, el("th", { scope: "row" }, el("code", {}, field)),
      el("td", {}, formatValue(value)), el("td", { class: "muted" }, usual === null ? "–" : formatValue(usual))))));
}

function showSummary() {
  const tiles = [];
  const tile = (label, value, ...notes) =>
    tiles.push(el("div", { class: "tile" }, el("span", { class: "small" }, label), el("strong", {}, value),
      ...notes.filter(Boolean).map((note) => el("span", { class: "small muted" }, note))));
  const measured = (label, row) => {
    const interval = METRIC === "perplexity" && between(row, METRIC);
    tile(label, metricText(row), interval && `95 %: ${interval}`, `${percent(row.kv_fraction)} KV`, row.weights);
  };
  if (budget_check) tile("Budget check: KV fraction", percent(budget_check.biased),
    `budget ${percent(budget_check.kv_budget)}: ${budget_check.met ? "met" : "missed"}`);
  const name = capitalized(METRIC);
  for (const row of [biased, ...anchors].filter(Boolean)) measured(`${name}, ${methodLabel(row)}`, row);
  for (const row of budget_check ? rows : []) {
    const rival = !isNats(row) && !natsWeights.has(row.weights) && row.budget !== null;
    if (rival && Math.abs(row.budget - budget_check.kv_budget) < 1e-9) measured(`${name}, ${methodLabel(row)}`, row);
  }
  if (tiles.length) byId("summary").firstElementChild.append(...tiles);
  else byId("summary").remove();
}

// --- The curve -----------------------------------------------------------------------------------

const drawable = rows.filter(isDrawable);
const hasInterval = (row) => Number.isFinite(height(row[METRIC + "_low"]) + height(row[METRIC + "_high"]));

function seriesOf(list) {
  const series = new Map();
  for (const row of list) {
    const key = JSON.stringify([row.method, row.weights]);
    series.set(key, [...(series.get(key) ?? []), row]);
  }
  return [...series.values()].map((members) => members.sort((a, b) => a.kv_fraction - b.kv_fraction));
}

function drawCurve() {
  const series = seriesOf(drawable).map((members) => ({ color: methodColor(members[0]), dash: dashes(members[0].weights),
    marker: members[0].method, points: members.map((row) => ({ ...pointOf(row, pointText(row)), ring: row === biased })) }));
  drawChart(byId("curve"), { series, bars: true, ...rowAxes(), before: drawBeneath });
}

function drawBeneath(chart, x, y, box) {
  if (budget_check) drawBudget(chart, x, box);
  for (const row of anchors.filter(isDrawable)) {
    const at = y.at(height(row[METRIC])), style = `color: ${methodColor(row)}`;
    chart.append(svg("line", { class: "anchor", style, x1: box.left, x2: box.right, y1: at, y2: at }));
  }
}

function drawBudget(chart, x, { top, bottom }) {
  const at = (factor) => x.at(100 * budget_check.kv_budget * factor);
  const [low, high] = [at(1 - budget_check.tolerance), at(1 + budget_check.tolerance)];
  const line = (attributes, value) => svg("line", { ...attributes, x1: x.at(value), x2: x.at(value), y1: top, y2: bottom });
  chart.append(svg("rect", { class: "tolerance", x: low, width: high - low, y: top, height: bottom - top }),
    line({ class: "budget" }, 100 * budget_check.kv_budget),
    svg("text", { x: at(1), y: top - 6, "text-anchor": "middle" }, `budget ${percent(budget_check.kv_budget)}`));
  const dashed = { class: "line", style: `color: ${methodColor({ method: NATS })}`, "stroke-dasharray": "6 4" };
  if (!drawable.includes(biased)) chart.append(line(dashed, 100 * budget_check.biased));
}

function showCurve() {
  drawn(drawCurve);
  const entries = [...new Set(drawable.map((row) => row.method))].map((method) =>
    ({ color: methodColor({ method }), name: methodLabel({ method }), shape: method }));
  for (const weights of new Set(drawable.map((row) => row.weights)))
    entries.push({ name: weights, shape: "line", dash: dashes(weights) });
  if (drawable.includes(biased)) entries.push({ name: "the setting for the budget", shape: "ring" });
  else if (budget_check) entries.push({ color: methodColor({ method: NATS }), name: `set to ${percent(budget_check.biased)}`, shape: "line", dash: "6 4" });
  showLegend(byId("curve-legend"), entries);
  const notes = [], left = rows.length - drawable.length;
  if (drawable.some(hasInterval)) notes.push("Bars and bands are 95 % bootstrap intervals by document. ");
  if (anchors.length) notes.push(`The thin line across is full attention on weights trained without ${ownLabel}. `);
  if (budget_check) notes.push(`The gray stripe is the budget, ± ${significant(100 * budget_check.tolerance, 2)} %. `);
  if (left) notes.push(`${left} of ${rows.length} settings have no finite ${METRIC} and are not drawn. `);
  byId("curve-description").append(...notes, "The table below lists every setting.");
  if (PERCENT) byId("better").textContent = "higher";
}

// --- The table and the budget --------------------------------------------------------------------

function tableRow(row) {
  const [first, ...others] = COLUMNS;
  return el("tr", row === biased ? { class: "marked" } : {}, el("th", { scope: "row" }, ...columnCell(first, row).childNodes),
    ...others.map((column) => columnCell(column, row)));
}

function showTable() {
  const head = (column) => columnHead(column, rows);
  byId("rows").append(tableHead(COLUMNS.map(head), COLUMNS.filter(isText).map(head)));
  for (const weights of weightNames)
    byId("rows").append(el("tbody", {}, ...rows.filter((row) => row.weights === weights).map(tableRow)));
  const distinct = (text) => [...new Set(rows.map(text))].join(" or ");
  const sizes = distinct((row) => `${count(row.num_tokens)} tokens of ${count(row.num_documents)} documents`);
  const notes = [`Measured on ${sizes}, mean context ${distinct((row) => significant(row.mean_context, 4))} tokens.`];
  if (COLUMNS.some(({ name }) => name === "kv_allocated"))
    notes.push("Slots: what the KV buffer allocated for a head, at its largest, mean over layers.");
  if (biased) notes.push("The shaded row is the one set to the budget.");
  if (rows.some((row) => !isNats(row) && natsWeights.has(row.weights)))
    notes.push(`Other methods on weights trained with ${ownLabel} run off the distribution of those weights: no fair rivals.`);
  byId("table-note").textContent = notes.join(" ");
}

function showBudgetCheck() {
  if (!budget_check) return byId("budget-check").remove();
  const { kv_budget: budget, sampled, argmax, biased: withBias, met } = budget_check;
  byId("budget-check-text").append("The budget is ", el("strong", {}, percent(budget)),
    " of full attention's keys. With the role bias the fraction is ",
    el("strong", {}, percent(withBias)), ": ", el("span", { class: met ? "met" : "missed" }, met ? "✓ met" : "✗ missed"),
    ` (tolerance ± ${significant(100 * budget_check.tolerance, 2)} %).`);
  const largest = Math.max(sampled, argmax, withBias, budget) * 1.05;
  const line = (name, meaning, value) => {
    const bar = el("div", { class: "bar" }, el("i"), el("b"));
    bar.children[0].style.width = `${(100 * value) / largest}%`;
    bar.children[1].style.left = `${(100 * budget) / largest}%`;
    const excess = `${value < budget ? "" : "+"}${significant(100 * (value / budget - 1), 2)} %`;
    return el("tr", {}, el("th", { scope: "row" }, name, el("div", { class: "small muted" }, meaning)),
      numeric(percent(value)), numeric(excess), el("td", { class: "bars" }, bar));
  };
  document.querySelector("#budget-check table").append(
    tableHead(["Roles", "KV fraction", "vs. budget", "Line: the budget"], ["Roles", "Line: the budget"]),
    el("tbody", {}, ...(sampled === null ? [] : [line("sampled", "as in training, with noise", sampled)]),
      line("argmax", "most likely roles, without a role bias", argmax),
      line("argmax with role bias", `role bias ${formatValue(budget_check.role_bias)}`, withBias)));
  const shortest = Array.isArray(run.window) ? `, with the window of ${run.window[0]},` : "";
  const below = run.layers.includes("nats") ? " Below it the model must learn GLOBAL tokens, which end LOCAL keys." : "";
  byId("budget-check-note").textContent = `With every token SLIDING${shortest} but the first of each document, the ` +
    `KV fraction is ${percent(budget_check.smallest_possible)}.${below}`;
}

// --- Perplexity by position ----------------------------------------------------------------------

/** For each budget the methods that were set to it, beside full attention. */
function positionGroups() {
  const budgets = [...new Set(rows.map((row) => row.budget).filter((budget) => budget !== null))].sort((a, b) => a - b);
  const full = rows.filter(isFull), single = weightNames.length === 1;
  const markers = [...Object.keys(methods), "other"];
  const line = (row) => ({ row, full: full.find(({ weights }) => weights === row.weights), color: methodColor(row),
    dash: dashes(row.weights), marker: row.method,
    name: [[methodLabel(row), settingText(row)].filter(Boolean).join(": "), ...(single ? [] : [row.weights])].join(", ") });
  const groups = budgets.map((budget) => ({ budget, name: `KV budget ${percent(budget)}`,
    series: [...rows.filter((row) => row.budget === budget), ...full].map(line) }));
  const own = groups.findIndex(({ budget }) => budget_check && budget === budget_check.kv_budget);
  if (own > 0) groups.unshift(...groups.splice(own, 1));
  if (natsRows.length > 1) groups.push({ name: "every role bias", series: natsRows.map((row, i) =>
    ({ ...line(row), dash: "", marker: markers[i % markers.length],
      color: `color-mix(in srgb, ${methodColor({ method: NATS })} ${Math.round(100 * (i + 1) / natsRows.length)}%, var(--contrast))`,
      name: `${settingText(row)}: ${percent(row.kv_fraction)} KV` })) });
  return groups.length ? groups : [{ name: "all", series: rows.map(line) }];
}

// --- What is selected: in the page's address, so that a view can be shared -----------------------

let wanted = new URLSearchParams(location.hash.slice(1));
let addressUpdate;  // browsers refuse an address that changes with every key of a held-down arrow

function selection() {
  const pick = (name, count, otherwise = 0) => {
    const value = Number(wanted.get(name) ?? NaN);
    return Number.isInteger(value) && value >= 0 && value < count ? value : otherwise;
  };
  const sample = pick("sample", samples.length), role_biases = samples[sample]?.role_biases ?? [];
  const row = pick("row", natsRows.length, Math.max(natsRows.indexOf(biased), 0));
  const role_bias = Math.max(role_biases.findIndex((one) => natsRows[row] === rowOfRoleBias(rows, one)), 0);
  const layers = natsRows[row]?.kv_live_mean_per_head ?? [];
  const layer = pick("layer", layers.length, Math.max(run.layers.findIndex(learnsRoles), 0));
  const token = wanted.has("token") ? pick("token", samples[sample]?.tokens.length) : null;
  return { sample, role_bias, row, layer, head: pick("head", layers[layer]?.length), token };
}

function go(changes) {
  const { role_bias, ...chosen } = { ...selection(), ...changes };
  const entries = Object.entries(chosen).filter(([, value]) => value !== null);
  wanted = new URLSearchParams(entries);
  clearTimeout(addressUpdate);
  addressUpdate = setTimeout(() => history.replaceState(null, "", "#" + wanted), 200);
  showSelection();
}

function showSelection() {
  const chosen = selection();
  if (natsRows.length) showHeat(chosen);
  if (samples.length) showReader(chosen);
}

// --- The heat map --------------------------------------------------------------------------------

let heat = { row: null };  // the setting on show and its cells

function showHeat({ row, layer, head }) {
  if (row !== heat.row) buildHeat(row);
  if (!samples.length) return;
  heat.cells.forEach((cells, l) => cells.forEach((cell, k) => {
    const chosen = l === layer && k === head;
    cell.setAttribute("aria-pressed", chosen);
    cell.tabIndex = chosen ? 0 : -1;  // Tab comes to one cell, the arrow keys to the others
  }));
}

function moveInHeat(event, l, k) {
  const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [0, 0];
  const next = heat.cells[l + down]?.[k + right];
  if (!down && !right || !next) return;
  event.preventDefault();
  next.focus();
}

function buildHeat(row) {
  const { kv_live_mean_per_head: means, kv_live_max_per_head: maxima, mean_context: context } = natsRows[row];
  const most = Math.max(...means.flat());
  const names = natsRows.map((r) => `${settingText(r) || "no role bias"}: ${percent(r.kv_fraction)} KV, ${r.weights}`);
  showOptions("heat-row", names, row);
  const cell = (mean, l, k) => {
    const fraction = most > 0 ? mean / most : 0, text = significant(mean, 3);
    const name = `layer ${l}, head ${k}: mean ${text}, maximum ${formatValue(maxima[l][k])} live keys`;
    const box = el(samples.length ? "button" : "span", { style: `--fraction: ${fraction.toFixed(3)}`, title: name,
      "aria-label": samples.length ? name : null }, text);
    if (samples.length) {
      box.onclick = () => { go({ layer: l, head: k }); byId("reader").scrollIntoView(); };
      box.onkeydown = (event) => moveInHeat(event, l, k);
    }
    return box;
  };
  heat = { row, cells: means.map((heads, l) => heads.map((mean, k) => cell(mean, l, k))) };
  document.querySelector("#heat table").replaceChildren(
    el("thead", {}, el("tr", {}, el("td"), ...means[0].map((_, k) => el("th", { scope: "col" }, `head ${k}`)))),
    el("tbody", {}, ...heat.cells.map((cells, l) =>
      el("tr", {}, el("th", { scope: "row" }, `layer ${layerName(run.layers[l], l)}`), ...cells.map((box) => el("td", {}, box))))));
  byId("heat-note").textContent = `Full attention would read ${significant(context, 4)} keys in every cell. The stronger the blue ` +
    "the more keys, up to the largest cell of this setting.";
}

// --- Training ------------------------------------------------------------------------------------

function showMarks() {
  const marks = training?.marks ?? [];
  byId("training-marks")?.append(...marks.map(({ step, text }) => el("li", {}, el("strong", {}, `Step ${count(step)}: `), text)));
  if (byId("training-note") && training) byId("training-note").textContent = `From metrics.jsonl, ${count(training.steps.length)} ` +
    `lines of it; on the batches that were trained on, held-out curves on held-out text.${marks.length ? " Triangles mark the steps listed above." : ""}`;
}

// --- Start ---------------------------------------------------------------------------------------

showHeader();
showSummary();
showTable();
showBudgetCheck();
showCurve();
showPositions(positionGroups());
showSlices(positionGroups());
showTasks(data.tasks);
showTraining([{ name: "this run", color: "var(--contrast)", dash: "", training }]);
showMarks();
if (!natsRows.length) byId("heat").remove();
if (samples.length) {
  for (const id of ["sample", "layer", "head"]) byId(id).onchange = (event) => go({ [id]: Number(event.target.value) });
  byId("sample").parentElement.hidden = samples.length === 1;
  byId("role-bias").oninput = (event) =>
    go({ row: natsRows.indexOf(rowOfRoleBias(rows, samples[selection().sample].role_biases[event.target.value])) });
  for (const id of ["role-bias-control", "role-bias-note"]) byId(id).hidden = samples.every(({ role_biases }) => role_biases.length === 1);
  listenToTokens();
  listenToSpans();
} else {
  byId("reader").remove();
  document.querySelector(".with-reader")?.remove();
}
if (natsRows.length) byId("heat-row").onchange = (event) => go({ row: Number(event.target.value) });
showSelection();
addEventListener("hashchange", () => {
  wanted = new URLSearchParams(location.hash.slice(1));
  showSelection();
});
