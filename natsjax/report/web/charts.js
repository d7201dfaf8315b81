/* Elements, numbers and charts: what both pages draw with. */
const data = JSON.parse(document.getElementById("report-data").textContent);
const { methods, axes: AXES, columns: COLUMNS, metric: METRIC, own_roles: NATS, full_attention: FULL, trained_in: TRAINED_IN } = data;
const PERCENT = METRIC === "accuracy";  // the metric is shown in percent, and more of it is better
const byId = (id) => document.getElementById(id);
const SVG = byId("curve").namespaceURI;
const DASHES = ["", "7 5", "2 4", "9 4 2 4"];

// --- Elements and numbers ------------------------------------------------------------------------

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes))
    if (value !== null && value !== undefined) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const numeric = (...children) => el("td", { class: "number" }, ...children);
const aside = (text) => el("span", { class: "muted" }, text && ` (${text})`);
/** A table's head; the columns named in `texts` are aligned to the left, the numbers to the right. */
const tableHead = (names, texts) => el("thead", {}, el("tr", {}, ...names.map((name) =>
  el("th", { scope: "col", class: texts.includes(name) ? "" : "number" }, name))));

// What JSON has no number for (NaN, Infinity) arrives as a string that Number() reads.
const number = (value) => (value === null || value === undefined ? null : Number(value));
function significant(value, digits) {
  if (number(value) === null) return "–";
  const x = number(value);
  if (!Number.isFinite(x)) return String(x).replace("Infinity", "∞").replace("-", "−");
  if (x !== 0 && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e6)) return x.toExponential(digits - 1).replace("-", "−");
  const decimals = digits - 1 - (x ? Math.floor(Math.log10(Math.abs(x))) : 0);
  return x.toFixed(Math.max(decimals, 0)).replace("-", "−");
}
const percent = (value) => (number(value) === null ? "–" : significant(100 * number(value), 3) + " %");
const count = (value) => (number(value) === null ? "–" : value.toLocaleString("en"));
/** A number with at most four significant digits, or whatever else it is. */
function formatValue(value) {
  if (typeof value === "number") return String(Number(value.toPrecision(4))).replace("-", "−");
  if (Array.isArray(value)) return value.length ? value.map(formatValue).join(", ") : "none";
  return value === "" ? "empty" : String(value);
}
function between(row, name, format = (value) => significant(value, 4)) {
  const low = row[name + "_low"], high = row[name + "_high"];
  return number(low) === null ? "" : `${format(low)}–${format(high)}`;
}
const capitalized = (text) => text[0].toUpperCase() + text.slice(1);

// --- Rows ----------------------------------------------------------------------------------------

const isNats = (row) => row.method === NATS, isFull = (row) => row.method === FULL;
const rowOfRoleBias = (rows, roleBias) => rows.find((row) => isNats(row) && Math.abs(row.setting.role_bias - roleBias) < 1e-9);
/** A row of a comparison has its own: runs differ in how they learned their roles. */
const methodLabel = (row) => row.label ?? methods[row.method]?.label ?? row.method;
const methodColor = (row) => `var(--${row.method in methods ? row.method : "other"})`;
const settingText = (row) =>
  Object.entries(row.setting).map(([name, value]) => `${name.replaceAll("_", " ")} ${formatValue(value)}`).join(", ");
const metricText = (row) => (PERCENT ? percent(row.accuracy) : significant(row.perplexity, 4));
/** On the y axis: perplexity, or accuracy in percent. */
const height = (value) => (number(value) === null ? NaN : number(value) * (PERCENT ? 100 : 1));
const isDrawable = (row) => Number.isFinite(height(row[METRIC])) && row.kv_fraction > 0;

function pointText(row, ...more) {
  const interval = METRIC === "perplexity" && between(row, METRIC);
  return [...more, `${methodLabel(row)} ${settingText(row)}`, row.weights,
    `${METRIC} ${metricText(row)}${interval ? ` (95 %: ${interval})` : ""}`,
    `KV ${percent(row.kv_fraction)}: ${significant(row.kv_live_mean, 3)} live keys, at most ${formatValue(row.kv_live_max)}`,
  ].join("\n");
}

/** A row as a point of the curve. */
const pointOf = (row, text) => ({ x: 100 * row.kv_fraction, y: height(row[METRIC]), low: height(row[METRIC + "_low"]),
  high: height(row[METRIC + "_high"]), text });

/** The axes of a chart of rows. */
const rowAxes = () => ({
  x: { title: `${AXES.kv_fraction} (log scale)`, short: `${AXES.kv_fraction.split(":")[0]} (log scale)`, log: true, room: 1.2,
    format: (tick) => `${tick} %` },
  y: { title: AXES[METRIC], linear: PERCENT },
});

// Columns are declared in natsjax/report/fields.py: { name, column, format, interval, aside }.
const WORDS = { method: (row) => methodLabel(row), setting: (row) => settingText(row) || "–" };
const isText = ({ format }) => format === "text" || format in WORDS;
function formatted({ format }, value) {
  if (typeof format === "number") return significant(value, format);
  return format === "percent" ? percent(value) : number(value) === null ? "–" : formatValue(value);
}
const columnHead = ({ name, column, interval }, rows) =>
  capitalized(column) + (interval === "shown" && rows.some((row) => between(row, name)) ? " (95 %)" : "");

/** The cell of a row, or an empty one where there is no row. */
function columnCell(column, row) {
  if (!row) return numeric("–");
  if (isText(column)) return el("td", { class: column.format }, WORDS[column.format]?.(row) ?? row[column.name]);
  const range = column.interval && between(row, column.name, (value) => formatted(column, value));
  const cell = numeric(formatted(column, row[column.name]), aside(column.interval === "shown" ? range : ""),
    aside(column.aside && formatValue(row[column.aside])));
  if (range && column.interval === "stored") cell.title = `95 %: ${range}`;
  return cell;
}

// --- Axes ----------------------------------------------------------------------------------------

function logTicks(low, high, most) {
  const ticks = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++)
    for (const digit of [1, 2, 5]) ticks.push(Number((digit * 10 ** e).toPrecision(6)));
  const inside = ticks.filter((tick) => tick >= low && tick <= high);
  return inside.length > most ? inside.filter((tick) => tick.toExponential()[0] === "1") : inside;
}

function linearTicks(low, high, most) {
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const ticks = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) ticks.push(Number((i * step).toPrecision(6)));
  return ticks;
}

/** Maps values in [low, high], on a log or linear scale, to [from, to] pixels. */
function axis(low, high, from, to, log) {
  if (log) { const widen = Math.max(1, Math.sqrt((4 * low) / high)); low /= widen; high *= widen; }
  const f = log ? Math.log : (value) => value;
  const at = (value) => from + ((f(value) - f(low)) / (f(high) - f(low))) * (to - from);
  const most = Math.max(2, Math.min(8, from > to ? (from - to) / 36 : (to - from) / 60));  // upright ones stand closer
  return { at, ticks: log ? logTicks(low, high, 1.5 * most) : linearTicks(low, high, most), log };
}

/** A y axis with room around the values; logarithmic where they are far apart, unless it is to be linear. */
function yAxis(values, from, to, linear) {
  const low = Math.min(...values), high = Math.max(...values);
  if (!linear && low > 0 && high / low > data.log_ratio) return axis(low / 1.1, high * 1.1, from, to, true);
  const room = (high - low) * 0.06 || Math.abs(high) * 0.05 || 1;
  return axis(low - room, high + room, from, to, false);
}

// --- Charts --------------------------------------------------------------------------------------

/** The marker of a method; shapes have the names that Matplotlib gives them. */
function markerShape(method, x, y, r = 5) {
  const paths = {
    o: `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`,
    s: `M${x - r} ${y - r}h${2 * r}v${2 * r}h${-2 * r}z`,
    "^": `M${x} ${y - r * 1.2}L${x + r * 1.2} ${y + r}H${x - r * 1.2}z`,
    D: `M${x} ${y - r * 1.35}L${x + r * 1.35} ${y}L${x} ${y + r * 1.35}L${x - r * 1.35} ${y}z`,
    ">": `M${x + r * 1.2} ${y}L${x - r} ${y + r * 1.2}V${y - r * 1.2}z`,
    P: `M${x - r * 1.2} ${y - r * 0.5}h${r * 0.7}v${-r * 0.7}h${r}v${r * 0.7}h${r * 0.7}v${r}h${-r * 0.7}v${r * 0.7}h${-r}v${-r * 0.7}h${-r * 0.7}z`,
    "<": `M${x - r * 1.2} ${y}L${x + r} ${y + r * 1.2}V${y - r * 1.2}z`,
    v: `M${x} ${y + r * 1.2}L${x + r * 1.2} ${y - r}H${x - r * 1.2}z`,
    X: `M${x - r * 0.5} ${y - r * 1.2}l${r * 0.5} ${r * 0.5}l${r * 0.5} ${-r * 0.5}l${r * 0.7} ${r * 0.7}l${-r * 0.5} ${r * 0.5}l${r * 0.5} ${r * 0.5}l${-r * 0.7} ${r * 0.7}l${-r * 0.5} ${-r * 0.5}l${-r * 0.5} ${r * 0.5}l${-r * 0.7} ${-r * 0.7}l${r * 0.5} ${-r * 0.5}l${-r * 0.5} ${-r * 0.5}z`,
    d: `M${x} ${y - r * 1.4}L${x + r * 0.85} ${y}L${x} ${y + r * 1.4}L${x - r * 0.85} ${y}z`,
    p: `M${x} ${y - r * 1.2}l${r * 1.14} ${r * 0.83}l${-r * 0.435} ${r * 1.34}h${-r * 1.41}l${-r * 0.435} ${-r * 1.34}z`,
    h: `M${x} ${y - r * 1.2}l${r * 1.04} ${r * 0.6}v${r * 1.2}l${-r * 1.04} ${r * 0.6}l${-r * 1.04} ${-r * 0.6}v${-r * 1.2}z`,
  };
  return svg("path", { class: "marker", d: paths[methods[method]?.marker] ?? paths.v });
}

const redraws = [];  // what is drawn to fit the width of the page
/** Draws now and whenever the page gets another width. */
function drawn(draw) { redraws.push(draw); draw(); }
addEventListener("resize", () => redraws.forEach((draw) => draw()));
addEventListener("beforeprint", () => redraws.forEach((draw) => draw()));

/**
 * Draws lines into an svg element that is as wide as its parent.
 * series: { color, dash, marker, points: { x, y, low, high, text, ring } }, where low and high may be NaN
 * x: { title, log, format, room (a factor) }, y: { title, format, linear }
 * bars: also draws each interval as a bar; before: (chart, x, y, box) draws what lies beneath
 */
function drawChart(chart, { series, x: across, y: up, bars = false, size = [430, 320], before = () => {} }) {
  const width = Math.max(chart.parentElement.clientWidth - 26, 200), total = width < 560 ? size[1] : size[0];
  const points = series.flatMap((one) => one.points);
  chart.replaceChildren();
  fill(chart, { viewBox: `0 0 ${width} ${total}`, height: total }, []);
  if (!points.length) {
    chart.append(svg("text", { class: "title", x: 2, y: 20 }, "Nothing here has a finite value."));
    return;
  }
  const box = { left: 54, right: width - 14, top: 44, bottom: total - 48 };
  const room = across.room ?? 1, format = { x: across.format ?? String, y: up.format ?? String };
  const xs = points.map((point) => point.x), [first, last] = [Math.min(...xs), Math.max(...xs)];
  const x = axis(first / room, last > first || room > 1 ? last * room : last + 1, box.left, box.right, across.log);
  const y = yAxis(points.flatMap((point) => [point.y, point.low, point.high].filter(Number.isFinite)), box.bottom, box.top, up.linear);
  for (const tick of x.ticks) chart.append(
    svg("line", { class: "grid", x1: x.at(tick), x2: x.at(tick), y1: box.top, y2: box.bottom }),
    svg("text", { x: x.at(tick), y: box.bottom + 18, "text-anchor": "middle" }, format.x(tick)));
  for (const tick of y.ticks) chart.append(
    svg("line", { class: "grid", x1: box.left, x2: box.right, y1: y.at(tick), y2: y.at(tick) }),
    svg("text", { x: box.left - 8, y: y.at(tick) + 4, "text-anchor": "end" }, format.y(tick)));
  const xTitle = width < 560 ? across.short ?? across.title : across.title;
  chart.append(svg("text", { class: "title", x: 2, y: 14 }, up.title + (y.log ? " (log scale)" : "")),
    svg("text", { class: "title", x: (box.left + box.right) / 2, y: total - 8, "text-anchor": "middle" }, xTitle));
  before(chart, x, y, box);
  for (const one of series) drawSeries(chart, one, x, y, bars);
}

function drawSeries(chart, { color, dash = "", marker, points }, x, y, bars) {
  const group = svg("g", { style: `color: ${color}` });
  const at = (point, value) => `${x.at(point.x).toFixed(1)},${y.at(value).toFixed(1)}`;
  const certain = points.filter((point) => Number.isFinite(point.low) && Number.isFinite(point.high));
  const lows = certain.map((point) => at(point, point.low)), highs = certain.map((point) => at(point, point.high));
  if (certain.length) group.append(svg("polygon", { class: "band", points: [...lows, ...highs.reverse()].join(" ") }));
  group.append(svg("polyline", { class: "line", "stroke-dasharray": dash,
    points: points.map((point) => at(point, point.y)).join(" ") }));
  for (const point of marker ? points : []) {
    const px = x.at(point.x), py = y.at(point.y), parts = [svg("title", {}, point.text)];
    if (bars && certain.includes(point))
      parts.push(svg("line", { class: "whisker", x1: px, x2: px, y1: y.at(point.low), y2: y.at(point.high) }));
    if (point.ring) parts.push(svg("circle", { class: "ring", cx: px, cy: py, r: 10 }));
    parts.push(markerShape(marker, px, py, bars ? 5 : 3.5), svg("circle", { class: "hit", cx: px, cy: py, r: 12 }));
    group.append(svg("g", {}, ...parts));
  }
  chart.append(group);
}

/** Entries of a legend: { color, name, shape } with shape "line", "ring" or a marker. */
function showLegend(list, entries) {
  list.replaceChildren(...entries.map(({ color = "var(--ink)", name, shape, dash = "" }) => {
    const mark = shape === "line" ? svg("line", { class: "line", x1: 0, x2: 40, y1: 8, y2: 8, "stroke-dasharray": dash })
      : shape === "ring" ? svg("circle", { class: "ring", cx: 20, cy: 8, r: 7 }) : markerShape(shape, 20, 8);
    const icon = svg("svg", { width: 40, height: 16, "aria-hidden": "true", style: `color: ${color}` }, mark);
    return el("li", {}, icon, el("span", {}, name));
  }));
}

function showOptions(id, names, chosen) {
  byId(id).replaceChildren(...names.map((name, i) => el("option", { value: i }, name)));
  byId(id).value = chosen;
}

/** Commands and what they are for: { title, command, note }. */
function showCommands(commands) {
  for (const { title, command, note } of commands)
    byId("commands").append(el("dt", {}, title), el("dd", {}, command ? el("code", { class: "command" }, command) : "",
      ...(note ? [el("div", { class: "small muted" }, note)] : [])));
}
