"use strict";
(() => {
  const root = document.documentElement;
  const PALETTE = {
    light: ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B87F00", "#2F9BD6", "#000000", "#808020"],
    dark: ["#4DA6E0", "#F08A3C", "#2CC79A", "#E39CC6", "#F0B93A", "#8FD0F7", "#F2F2F2", "#C9C95A"],
  };
  const DASHES = ["solid", "dash", "dashdot", "dot"];
  const MARKERS = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x"];
  const PLOT = 270, ROW = 20, TOP = 10;
  let charts = [];

  const isDark = () => root.dataset.theme
    ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const faint = (hex) => hex + "26";

  function axis(title, more) {
    return {
      title: { text: title, standoff: 8 }, gridcolor: css("--line"), linecolor: css("--line"), zerolinecolor: css("--line"),
      automargin: true, ...more,
    };
  }

  function layout(height, bottom, x, y, more) {
    return {
      height, xaxis: x, yaxis: y, margin: { l: 60, r: 12, t: TOP, b: bottom },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: css("--ink"), size: 12, family: getComputedStyle(document.body).fontFamily },
      hoverlabel: { bgcolor: css("--paper"), bordercolor: css("--line"), font: { color: css("--ink") }, namelength: -1, align: "left" },
      hovermode: "closest", dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", ...more,
    };
  }

  function legend(names, width) {
    const longest = Math.max(...names.map((name) => name.length)) * 6.6 + 48;
    const columns = Math.max(1, Math.min(3, Math.floor((width - 20) / longest)));
    const rows = names.length > 1 ? Math.ceil(names.length / columns) : 0;
    return {
      height: rows * ROW,
      place: {
        orientation: "h", x: 0, xanchor: "left", xref: "container", y: -58 / PLOT, yanchor: "top",
        entrywidth: Math.floor((width - 20) / columns) - 44, entrywidthmode: "pixels", font: { size: 11 },
      },
    };
  }

  const decades = (values) => Math.log10(Math.max(...values) / Math.min(...values));

  function lines(chart, width) {
    const colours = PALETTE[isDark() ? "dark" : "light"];
    const bands = [], traces = [];
    for (const line of chart.lines) {
      const [x, mean, low, high] = [0, 1, 2, 3].map((at) => line.points.map((point) => point[at]));
      const colour = colours[line.colour];
      if (low.some((value, at) => value !== high[at])) {
        bands.push({
          x: [...x, ...x.slice().reverse()], y: [...high, ...low.slice().reverse()], fill: "toself", fillcolor: faint(colour),
          mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false, legendgroup: line.name,
        });
      }
      traces.push({
        x, y: mean, name: line.name, legendgroup: line.name, mode: "lines+markers",
        line: { color: colour, width: 2, dash: DASHES[line.form % DASHES.length] },
        marker: { color: colour, size: 6, symbol: MARKERS[line.form % MARKERS.length] },
        text: x.map((at, i) => `${line.name}<br>${chart.xLabel} ${at}: ${short(mean[i])}`
          + (low[i] === high[i] ? "" : ` (${short(low[i])} to ${short(high[i])})`)),
        hovertemplate: "%{text}<extra></extra>",
      });
    }
    const xs = [...new Set(chart.lines.flatMap((line) => line.points.map((point) => point[0])))].sort((a, b) => a - b);
    const ys = chart.lines.flatMap((line) => line.points.flatMap((point) => [point[2], point[3]]));
    const x = chart.logX ? { type: "log", tickvals: xs, ticktext: xs.map(String) }
      : { tickformat: "d", ...(xs.length <= 12 ? { dtick: 1 } : {}) };
    const y = chart.logY ? { type: "log", dtick: decades(ys) < 2 ? "D2" : 1, exponentformat: "power" } : { exponentformat: "power" };
    const below = legend(traces.map((trace) => trace.name), width);
    return [[...bands, ...traces], layout(TOP + PLOT + 62 + below.height, 62 + below.height,
      axis(chart.xLabel, x), axis(chart.yLabel, y), { showlegend: traces.length > 1, legend: below.place })];
  }

  function bars(chart, width) {
    const colours = PALETTE[isDark() ? "dark" : "light"];
    const at = chart.names.map((_, i) => i), few = chart.names.length <= 60, sideways = chart.sideways && few;
    const traces = chart.series.map((part, index) => ({
      type: "bar", orientation: sideways ? "h" : "v", name: part.name,
      x: sideways ? part.values : at, y: sideways ? at : part.values,
      marker: { color: chart.signed ? part.values.map((value) => colours[value > 0 ? 1 : 0]) : colours[index] },
      text: part.values.map((value, i) => `${chart.names[i]}<br>${chart.series.length > 1 ? part.name + ": " : ""}${short(value)}`),
      textposition: "none", hovertemplate: "%{text}<extra></extra>",
    }));
    const step = sideways ? 1 : Math.ceil(chart.names.length / Math.max(4, Math.floor(width / 34)));
    const ticks = at.filter((i) => i % step === 0);
    const names = few || !chart.sideways ? { tickvals: ticks, ticktext: ticks.map((i) => chart.ticks[i]) } : { showticklabels: false };
    const below = legend(traces.map((trace) => trace.name), width);
    const plot = sideways ? Math.max(120, 22 * at.length + 20) : PLOT;
    below.place.y = -58 / plot;
    const nameAxis = axis(sideways ? "" : (chart.sideways ? `${at.length} clients` : "round"), { ...names, ...(sideways ? { autorange: "reversed" } : {}) });
    const valueAxis = axis(chart.valueLabel, { exponentformat: "power", rangemode: "tozero" });
    return [traces, layout(TOP + plot + 62 + below.height, 62 + below.height, sideways ? valueAxis : nameAxis, sideways ? nameAxis : valueAxis,
      { barmode: "stack", bargap: 0.25, showlegend: traces.length > 1, legend: below.place })];
  }

  function dots(chart) {
    const colours = PALETTE[isDark() ? "dark" : "light"];
    const traces = chart.groups.map((group, row) => ({
      x: group.dots.map((dot) => dot[1]), y: group.dots.map((_, i) => row + ((i * 7) % 5 - 2) * 0.07), mode: "markers",
      marker: { size: 7, opacity: 0.75, color: group.dots.map((dot) => colours[dot[1] > 0 ? 1 : 0]) }, showlegend: false,
      text: group.dots.map((dot) => `${group.name}<br>client ${dot[0]}: ${short(dot[1])}`), hovertemplate: "%{text}<extra></extra>",
    }));
    const plot = Math.max(140, 24 * chart.groups.length + 20);
    const rows = { tickvals: chart.groups.map((_, i) => i), ticktext: chart.groups.map((group) => group.tick), range: [chart.groups.length - 0.4, -0.6], zeroline: false };
    return [traces, layout(TOP + plot + 62, 62, axis(chart.valueLabel, { exponentformat: "power" }), axis("", rows))];
  }

  const short = (value) => value === null ? "unknown" : String(Number(value.toPrecision(5)));

  function draw(place) {
    const chart = charts[Number(place.dataset.chart)];
    if (chart === undefined) { return; }
    const [traces, shown] = { lines, bars, dots }[chart.kind](chart, place.clientWidth);
    Plotly.react(place, traces, shown, { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] });
    place.dataset.drawn = String(place.clientWidth);
  }

  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting && entry.target.dataset.drawn === undefined && entry.target.clientWidth > 0) { draw(entry.target); }
    }
  }, { rootMargin: "600px" });

  function redraw() {
    document.querySelectorAll("[data-chart][data-drawn]").forEach(draw);
  }

  function sort(table, column, ascending) {
    const body = table.tBodies[0], sign = ascending ? 1 : -1;
    const key = (row) => {
      const cell = row.cells[column];
      if (cell.classList.contains("none")) { return null; }
      return cell.dataset.sort === undefined ? cell.textContent : Number(cell.dataset.sort.replace("inf", "Infinity"));
    };
    const order = (a, b) => {
      const [left, right] = [key(a), key(b)];
      if (left === null || right === null) { return (left === null) - (right === null); }
      if (typeof left === "number" && typeof right === "number") { return sign * (left - right); }
      return sign * String(left).localeCompare(String(right), undefined, { numeric: true });
    };
    body.append(...[...body.rows].sort(order));
    [...table.tHead.rows[0].cells].forEach((cell) => cell.removeAttribute("aria-sort"));
    table.tHead.rows[0].cells[column].setAttribute("aria-sort", ascending ? "ascending" : "descending");
  }

  function start() {
    charts = JSON.parse(document.getElementById("charts").textContent);
    document.querySelectorAll("[data-chart]").forEach((place) => seen.observe(place));
    document.querySelectorAll("table").forEach((table) => {
      [...table.tHead.rows[0].cells].forEach((cell, column) => cell.firstChild.addEventListener("click", () =>
        sort(table, column, cell.getAttribute("aria-sort") !== "ascending")));
    });
  }

  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  let timer = 0;
  addEventListener("resize", () => { clearTimeout(timer); timer = setTimeout(() => {
    document.querySelectorAll("[data-chart][data-drawn]").forEach((place) => {
      if (place.dataset.drawn !== String(place.clientWidth)) { draw(place); }
    });
  }, 150); });
  addEventListener("beforeprint", () => document.querySelectorAll("[data-chart]").forEach(draw));

  async function refresh() {
    const fresh = new DOMParser().parseFromString(await (await fetch("./")).text(), "text/html");
    const sorted = [...document.querySelectorAll("table")].map((table) => {
      const cells = [...table.tHead.rows[0].cells], column = cells.findIndex((cell) => cell.hasAttribute("aria-sort"));
      return [column, column >= 0 && cells[column].getAttribute("aria-sort") === "ascending"];
    });
    const open = [...document.querySelectorAll("details")].map((part) => part.open);
    const at = scrollY;
    seen.disconnect();
    document.querySelectorAll("[data-chart][data-drawn]").forEach((place) => Plotly.purge(place));
    const next = document.importNode(fresh.getElementById("content"), true);
    document.getElementById("content").replaceWith(next);
    const parts = [...next.querySelectorAll("details")];
    if (parts.length === open.length) { parts.forEach((part, i) => { part.open = open[i]; }); }
    start();
    const tables = [...next.querySelectorAll("table")];
    if (tables.length === sorted.length) {
      tables.forEach((table, i) => { if (sorted[i][0] >= 0) { sort(table, ...sorted[i]); } });
    }
    scrollTo(0, at);
  }

  async function watch(known) {
    let version = known;
    try {
      version = await (await fetch("version")).text();
      if (known !== null && version !== known) { await refresh(); }
    } catch { /* the server has ended: the page stays as it is */ }
    setTimeout(() => watch(version), 2000);
  }

  start();
  if (root.dataset.live === "yes") { watch(null); }
})();
