/* Perplexity on slices of the tokens, of one run or of several. */
const SLICE_SCALES = { perplexity: "perplexity",
  perplexity_ratio: `perplexity ratio ${COLUMNS.find(({ name }) => name === "perplexity_ratio")?.column ?? "to dense"}`,
  window_ratio: "perplexity ratio to the trained window" };

/** groups: { name, series: [{ name, row }] }; a list chooses between them, another between perplexity and ratios. */
function showSlices(groups) {
  groups = groups.map(({ name, series }) => ({ name, series: series.filter(({ row }) => row.by_slice) }))
    .filter(({ series }) => series.length);
  if (!groups.length) return byId("slices").remove();
  const all = groups.flatMap(({ series }) => series.map(({ row }) => row.by_slice));
  const scales = Object.keys(SLICE_SCALES).filter((name) => all.some((values) => values[name]?.some((one) => one !== null)));
  showOptions("slices-group", groups.map(({ name }) => name), 0);
  byId("slices-group").parentElement.hidden = groups.length === 1;
  showOptions("slices-scale", scales.map((name) => SLICE_SCALES[name]), scales.includes("perplexity_ratio") ? 1 : 0);
  byId("slices-scale").parentElement.hidden = scales.length === 1;
  const show = () => showSliceTable(groups[byId("slices-group").value].series, scales[byId("slices-scale").value]);
  for (const id of ["slices-group", "slices-scale"]) byId(id).onchange = show;
  show();
}

function showSliceTable(series, scale) {
  const names = [...new Set(series.flatMap(({ row }) => row.by_slice.slices))];
  const cell = ({ row: { by_slice: values } }, name) => {
    const at = values.slices.indexOf(name), low = values[scale + "_low"]?.[at] ?? null;
    if (at < 0) return numeric("–");
    const range = low === null ? "" : `${significant(low, 4)}–${significant(values[scale + "_high"][at], 4)}`;
    return numeric(significant(values[scale]?.[at], 4), aside(range));
  };
  const total = (name) => {
    const totals = series.filter(({ row }) => row.by_slice.slices.includes(name))
      .map(({ row: { by_slice: values } }) => values.tokens[values.slices.indexOf(name)]);
    return [...new Set(totals)].map(count).join(" or ");
  };
  byId("slices-table").replaceChildren(tableHead(["Slice", "Tokens", ...series.map((one) => one.name)], ["Slice"]),
    el("tbody", {}, ...names.map((name) => el("tr", {}, el("th", { scope: "row" }, name), numeric(total(name)),
      ...series.map((one) => cell(one, name))))));
  byId("slices-note").textContent = `${capitalized(SLICE_SCALES[scale])}; in parentheses the 95 % interval by document` +
    (scale === "perplexity" ? "." : ", each document compared with itself.");
}
