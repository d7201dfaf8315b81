/* Curves over positions and over training steps, of one run or of several. */

// --- By position ---------------------------------------------------------------------------------

/** A row by position; with `full`, a row of the same shape, as a ratio to it (accuracy: as a difference). */
function positionPoints(row, full) {
  const { edges, tokens, ...values } = row.by_position;
  return tokens.map((total, i) => {
    const [first, last] = [edges[i], edges[i + 1] - 1];
    const value = (name) => height(values[name]?.[i]), other = full && height(full.by_position[METRIC][i]);
    const y = value(METRIC), against = PERCENT ? y - other : y / other;
    return { x: Math.sqrt(first * last), y: full ? against : y, low: full ? NaN : value(METRIC + "_low"),
      high: full ? NaN : value(METRIC + "_high"), range: first === last ? `${first}` : `${first}–${last}`, total };
  });
}

const POSITION_SCALES = [AXES[METRIC], PERCENT ? "accuracy less that of full attention, points" : "perplexity over that of full attention"];

/** groups: { name, series: [{ name, color, dash, marker, row, full }] }; a list chooses between them. */
function showPositions(groups) {
  for (const node of document.querySelectorAll(".metric")) node.textContent = capitalized(METRIC);
  groups = groups.map(({ name, series }) => ({ name, series: series.filter(({ row }) => row.by_position) }))
    .filter(({ series }) => series.length);
  if (!groups.length) return byId("position").remove();
  showOptions("position-budget", groups.map(({ name }) => name), 0);
  byId("position-budget").parentElement.hidden = groups.length === 1;
  showOptions("position-scale", POSITION_SCALES, 0);
  byId("position-scale").parentElement.hidden = !groups.some(({ series }) => series.some(({ full }) => full));
  const draw = () => drawChart(byId("position-chart"), { series: positionSeries(groups), size: [380, 300],
    x: { title: "tokens of the document before the predicted one (log scale)", short: "tokens before (log scale)", log: true, room: 1.15 },
    y: { title: POSITION_SCALES[byId("position-scale").value], linear: PERCENT } });
  const show = () => {
    draw();
    const series = positionSeries(groups);
    showLegend(byId("position-legend"), series.flatMap(({ color, name, dash, marker }) =>
      [{ color, name, shape: dash ? "line" : marker, dash }]));
    showPositionTable(series);
    byId("position-description").textContent = (byId("position-scale").value === "0"
      ? series[0]?.points.some(({ low }) => Number.isFinite(low))
        ? `The band is the 95 % bootstrap interval by document of ${series[0].name}; those of the others are about as wide, and ` +
          "in the table: documents differ more than methods do. "
        : "There are no intervals: too few documents. "
      : "Full attention on the same weights; both predict the same tokens. ") +
      "The first positions have few predictions. The numbers are in the table below.";
  };
  for (const id of ["position-budget", "position-scale"]) byId(id).onchange = show;
  drawn(draw);
  show();
}

function positionSeries(groups) {
  const relative = byId("position-scale").value === "1";
  const chosen = groups[byId("position-budget").value].series.filter(({ full }) => !relative || full);
  return chosen.map((one, number) => {
    const all = positionPoints(one.row, relative ? one.full : undefined);
    for (const point of all) point.text = `${one.name}\n${point.range} tokens to look back at\n` +
      `${POSITION_SCALES[relative ? 1 : 0]}: ${significant(point.y, 4)} on ${count(point.total)} predictions`;
    const points = all.filter(({ y }) => Number.isFinite(y));
    return { ...one, all, points: number ? points.map((point) => ({ ...point, low: NaN, high: NaN })) : points };
  });
}

function showPositionTable(series) {
  const cell = ({ y, low, high }) => numeric(Number.isFinite(y) ? significant(y, 4) : "–",
    aside(Number.isFinite(low) ? `${significant(low, 4)}–${significant(high, 4)}` : ""));
  const longest = series.reduce((most, { all }) => (all.length > most.length ? all : most), []);
  byId("position-table").replaceChildren(tableHead(["Tokens before", "Predictions", ...series.map(({ name }) => name)], []),
    el("tbody", {}, ...longest.map(({ range, total }, i) => el("tr", {}, el("th", { scope: "row", class: "number" }, range),
      numeric(count(total)), ...series.map(({ all }) => (all[i]?.range === range ? cell(all[i]) : numeric("–")))))));
}

// --- Training ------------------------------------------------------------------------------------

/** runs: { name, color, dash, training }; a chart for each metric that any of them has. */
function showTraining(runs) {
  const section = byId("training"), trained = runs.filter(({ training }) => training);
  if (!trained.length) return section.remove();
  // Metrics are declared in natsjax/runs/metrics.py: { name, title, percent }.
  const charts = new Map(trained.flatMap(({ training }) => training.charts).map((one) => [one.name, one]));
  for (const { name, title, percent } of charts.values()) {
    const id = `training-${name}`, chart = svg("svg", { role: "img", "aria-label": trainingText(name, title, trained) });
    section.querySelector(".charts").append(el("figure", { class: "box", id }, chart));
    const scale = percent ? 100 : 1;
    const series = trained.filter(({ training }) => training.curves[name]).map(({ training, ...one }) => ({ ...one,
      points: training.steps.map((step, i) => ({ x: step, y: scale * (number(training.curves[name][i]) ?? NaN) }))
        .filter(({ y }) => Number.isFinite(y)) })).filter(({ points }) => points.length);
    drawn(() => drawChart(chart, { series, size: [260, 240], x: { title: "step", format: (tick) => count(tick) },
      y: { title, format: (tick) => (percent ? `${tick} %` : formatValue(tick)) },
      before: (chart, x, y, box) => drawMarks(chart, trained, x, box) }));
  }
}

/** Describes a chart to a screen reader: its first and last values. */
function trainingText(name, title, runs) {
  const parts = runs.filter(({ training }) => training.curves[name]).map(({ name: run, training: { steps, curves } }) =>
    `${run}: ${formatValue(number(curves[name][0]))} at step ${steps[0]}, ${formatValue(number(curves[name].at(-1)))} at step ${steps.at(-1)}`);
  return `${capitalized(title)} against steps. ${parts.join("; ")}.`;
}

function drawMarks(chart, runs, x, { top, bottom }) {
  for (const { color, training } of runs) for (const { step, kind, text } of training.marks) {
    const at = x.at(step);
    chart.append(svg("g", { class: `mark ${kind}`, style: `color: ${color}` }, svg("title", {}, `step ${step}: ${text}`),
      svg("line", { class: "mark-line", x1: at, x2: at, y1: top, y2: bottom }),
      svg("path", { class: "mark-foot", d: `M${at} ${bottom - 9}l5 9h-10z` })));
  }
}
