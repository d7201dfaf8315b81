/* The page of several runs. */
const { runs, settings, notes } = data;
const CROWDED = runs.filter(({ rows }) => rows.length).length > data.many_runs;
const RUN_COLORS = data.num_run_colors;  // --run-0 … of style.css
const runColor = (i) => `var(--run-${i % RUN_COLORS})`;
const runDash = (i) => DASHES[Math.floor(i / RUN_COLORS) % DASHES.length];
const line = (i) => ({ color: runColor(i), dash: runDash(i) });
const biasedRow = ({ budget_check, rows }) => budget_check && rowOfRoleBias(rows, budget_check.role_bias);
const fullRow = ({ rows }) => rows.find(isFull);
/** The row that a run is compared by: set to its budget, or with full attention. */
const ownRow = (one) => biasedRow(one) ?? (one.rows.some(isNats) ? undefined : fullRow(one));

// --- The curve -----------------------------------------------------------------------------------

const CHOICES = {
  "what each run was trained for": ({ rows }) => {
    if (rows.some(isNats)) return rows.filter(isNats);
    const isTrainedIn = ({ method }) => TRAINED_IN.includes(method);
    return rows.some(isTrainedIn) ? rows.filter((row) => isTrainedIn(row) || isFull(row)) : rows;
  },
  "the setting that each run is compared by": (one) => [ownRow(one)].filter(Boolean),
  "every method on every run's weights": (one) => one.rows,
};

function curveSeries() {
  const choose = Object.values(CHOICES)[byId("curve-choice").value], series = [];
  runs.forEach((one, i) => {
    const rows = choose(one).filter(isDrawable).sort((a, b) => a.kv_fraction - b.kv_fraction);
    for (const method of new Set(rows.map((row) => row.method)))
      for (const weights of new Set(rows.map((row) => row.weights))) {
        const members = rows.filter((row) => row.method === method && row.weights === weights);
        if (members.length) series.push({ ...line(i), marker: method,
          points: members.map((row) => curvePoint(row, one)) });
      }
  });
  return series;
}

/** With many runs, intervals are drawn of the settings that they are compared by alone. */
function curvePoint(row, one) {
  const bare = CROWDED && row !== ownRow(one) ? { low: NaN, high: NaN } : {};
  return { ...pointOf(row, pointText(row, one.name)), ring: row === biasedRow(one), ...bare };
}

function drawCurve() {
  drawChart(byId("curve"), { series: curveSeries(), bars: true, ...rowAxes() });
}

function showCurve() {
  showOptions("curve-choice", Object.keys(CHOICES), 0);
  const show = () => {
    drawCurve();
    const series = curveSeries(), entries = runs.map(({ name }, i) => ({ ...line(i), name, shape: "line" }));
    for (const method of new Set(series.map(({ marker }) => marker))) entries.push({ name: methodLabel({ method }), shape: method });
    if (series.some(({ points }) => points.some(({ ring }) => ring)))
      entries.push({ name: "the setting set to the run's budget", shape: "ring" });
    showLegend(byId("curve-legend"), entries);
  };
  byId("curve-choice").onchange = show;
  drawn(drawCurve);
  show();
  byId("curve-description").textContent = (CROWDED ? "Bars are 95 % bootstrap intervals by document of the setting that each " +
    "run is compared by. " : "Bars and bands are 95 % bootstrap intervals by document. ") +
    "Each run's own report has the numbers of all settings.";
  if (PERCENT) byId("better").textContent = "higher";
}

// --- Tables --------------------------------------------------------------------------------------

const chip = (i) => svg("svg", { width: 28, height: 10, "aria-hidden": "true", style: `color: ${runColor(i)}` },
  svg("line", { class: "line", x1: 0, x2: 28, y1: 5, y2: 5, "stroke-dasharray": runDash(i) }));

function runRow(one, i) {
  const row = ownRow(one), full = fullRow(one);
  const budget = one.budget_check ? percent(one.budget_check.kv_budget) : "–";
  const met = one.budget_check && el("span", { class: one.budget_check.met ? "met" : "missed" }, one.budget_check.met ? " ✓" : " ✗");
  return el("tr", {}, el("th", { scope: "row" }, chip(i), ` ${one.name}`), el("td", {}, [...new Set(one.layers)].join(", ")),
    numeric(count(one.step)), numeric(count(one.num_parameters)), numeric(budget, met || ""),
    ...COLUMNS.map((column) => columnCell(column, row)), numeric(full ? metricText(full) : "–"));
}

function showRuns() {
  const rows = runs.flatMap(({ rows }) => rows), heads = COLUMNS.map((column) => columnHead(column, rows));
  const columns = ["Run", "Attention", "Step", "Parameters", "KV budget", ...heads, "With full attention"];
  byId("runs").append(tableHead(columns, ["Run", "Attention"]), el("tbody", {}, ...runs.map(runRow)));
  byId("runs-note").textContent = `KV, ${METRIC} and the like are those of the setting that a run is compared by: set to its budget, ` +
    "or full attention where there are no roles. ✓ and ✗: the budget was met or missed.";
  byId("notes").append(...notes.map((note) => el("li", {}, note)));
}

function showSettings() {
  byId("settings-text").textContent = settings.length
    ? "Fields of the configs that are not the same in all runs; what differs from the first run is marked."
    : "Their configs are the same.";
  const table = byId("settings").querySelector("table");
  if (!settings.length) return table.parentElement.remove();
  table.append(tableHead(["Field", ...runs.map(({ name }) => name)], ["Field", ...runs.map(({ name }) => name)]),
    el("tbody", {}, ...settings.map(({ field, values }) => el("tr", {}, el("th", { scope: "row" }, el("code", {}, field)),
      ...values.map((value) => {
        const same = JSON.stringify(value) === JSON.stringify(values[0]);
        return el("td", {}, same ? formatValue(value) : el("mark", {}, formatValue(value)));
      })))));
}

// --- Start ---------------------------------------------------------------------------------------

byId("evaluation").textContent = data.evaluation;
showCurve();
showRuns();
showSettings();
const series = (choose) => runs.map((one, i) =>
  ({ ...line(i), name: one.name, row: choose(one), full: fullRow(one), marker: choose(one)?.method }))
  .filter(({ row }) => row);
const compared = [{ name: "the setting that each run is compared by", series: series(ownRow) },
  { name: "full attention on each run's weights", series: series(fullRow) }];
showPositions(compared);
showSlices(compared);
showTraining(runs.map((one, i) => ({ ...line(i), name: one.name, training: one.training })));
if (byId("training")) {
  showLegend(byId("training-legend"), runs.map(({ name }, i) => ({ ...line(i), name, shape: "line" })));
  const marked = runs.some(({ training }) => training?.marks.length);
  byId("training-note").textContent = "From each run's metrics.jsonl; on the batches that were trained on, held-out curves on held-out text." +
    (marked ? " Triangles mark steps that were skipped and warnings; each run's own report lists them." : "");
}
showCommands(data.commands);
