/* Retrieval tasks: a table, and maps of needles by depth and length. */
function showTasks(tasks) {
  if (!tasks) return byId("tasks").remove();
  const head = (column) => columnHead(column, tasks.rows);
  const [first, ...others] = tasks.columns;
  byId("task-rows").append(tableHead(tasks.columns.map(head), tasks.columns.filter(isText).map(head)),
    el("tbody", {}, ...tasks.rows.map((row) =>
      el("tr", {}, el("th", { scope: "row" }, ...columnCell(first, row).childNodes), ...others.map((column) => columnCell(column, row))))));
  if (!tasks.maps.length) return byId("needles").remove();
  const show = () => showNeedles(tasks.maps[byId("needle-map").selectedIndex], byId("needle-metric").value);
  showOptions("needle-map", tasks.maps.map(({ title }) => title), 0);
  for (const id of ["needle-map", "needle-metric"]) byId(id).onchange = show;
  show();
}

function showNeedles(map, metric) {
  const cell = (value, depth, length) => el("td", {}, el("span", { style: `--fraction: ${(number(value) ?? 0).toFixed(3)}`,
    title: `depth ${formatValue(depth)}, ${count(length)} tokens: ${percent(value)}` }, percent(value)));
  document.querySelector("#needles table").replaceChildren(
    el("thead", {}, el("tr", {}, el("td"), ...map.lengths.map((length) => el("th", { scope: "col" }, `${count(length)} tokens`)))),
    el("tbody", {}, ...map.depths.map((depth, y) => el("tr", {}, el("th", { scope: "row" }, `depth ${formatValue(depth)}`),
      ...map.lengths.map((length, x) => cell(map[metric][y][x], depth, length))))));
}
