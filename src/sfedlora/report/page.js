"use strict";
(() => {
  const root = document.documentElement;
  const PALETTE = {
    light: ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B87F00", "#2F9BD6", "#000000", "#808020"],
    dark: ["#4DA6E0", "#F08A3C", "#2CC79A", "#E39CC6", "#F0B93A", "#8FD0F7", "#F2F2F2", "#C9C95A"],
  };
  const DASHES = ["solid", "dash", "dashdot", "dot"];
  const MARKERS = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x"];
  const PLOT = 270, TOP = 10, BOTTOM = 48;
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

  function layout(plot, x, y, more) {
    return {
      height: TOP + plot + BOTTOM, xaxis: x, yaxis: y, margin: { l: 60, r: 12, t: TOP, b: BOTTOM }, showlegend: false,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: css("--ink"), size: 12, family: getComputedStyle(document.body).fontFamily },
      hoverlabel: { bgcolor: css("--paper"), bordercolor: css("--line"), font: { color: css("--ink") }, namelength: -1, align: "left" },
      hovermode: "closest", dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", ...more,
    };
  }

  const esc = (text) => text.replace(/[&<>]/g, (letter) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[letter]);
  const tick = (text, width) => {
    const longest = Math.max(14, Math.floor(width * 0.06));
    return esc(text.length <= longest ? text : text.slice(0, longest - 1) + "\u2026");
  };
  const short = (value) => value === null ? "unknown" : String(Number(value.toPrecision(4)));

  function logTicks(values) {
    const low = Math.min(...values) / 1.1, high = Math.max(...values) * 1.1;
    const fine = Array.from({ length: 90 }, (_, i) => (10 + i) / 10);
    let ticks = [];
    for (const steps of [[1], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 6, 8], fine]) {
      ticks = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) {
        ticks.push(...steps.map((step) => step * 10 ** power).filter((at) => at >= low && at <= high));
      }
      if (ticks.length >= 3) { break; }
    }
    const every = Math.ceil(ticks.length / 8);
    return ticks.filter((_, i) => i % every === 0);
  }

  function lines(chart) {
    const colours = PALETTE[isDark() ? "dark" : "light"];
    const bands = [], traces = [];
    for (const line of chart.lines) {
      const [x, mean, low, high] = [0, 1, 2, 3].map((at) => line.points.map((point) => point[at]));
      const colour = colours[line.colour], group = traces.length;
      if (low.some((value, at) => value !== high[at])) {
        bands.push({
          x: [...x, ...x.slice().reverse()], y: [...high, ...low.slice().reverse()], fill: "toself", fillcolor: faint(colour),
          mode: "lines", line: { width: 0 }, hoverinfo: "skip", meta: { group },
        });
      }
      traces.push({
        x, y: mean, mode: "lines+markers", meta: { group, name: line.name, colour, dash: line.form % DASHES.length },
        line: { color: colour, width: 2, dash: DASHES[line.form % DASHES.length] },
        marker: { color: colour, size: 6, symbol: MARKERS[line.form % MARKERS.length] },
        text: x.map((at, i) => `${esc(line.name)}<br>${esc(chart.xLabel)} ${at}: ${short(mean[i])}`
          + (low[i] === high[i] ? "" : ` (${short(low[i])} to ${short(high[i])})`)),
        hovertemplate: "%{text}<extra></extra>",
      });
    }
    const xs = [...new Set(chart.lines.flatMap((line) => line.points.map((point) => point[0])))].sort((a, b) => a - b);
    const ys = chart.lines.flatMap((line) => line.points.flatMap((point) => [point[2], point[3]]));
    const x = chart.logX ? { type: "log", tickvals: xs, ticktext: xs.map(String) }
      : { tickformat: "d", ...(xs.length <= 12 ? { dtick: 1 } : {}) };
    const marks = chart.logY ? logTicks(ys) : [];
    const y = chart.logY ? { type: "log", tickvals: marks, ticktext: marks.map(short) } : { exponentformat: "power" };
    return [[...bands, ...traces], layout(PLOT, axis(esc(chart.xLabel), x), axis(esc(chart.yLabel), y))];
  }

  function bars(chart, width) {
    const colours = PALETTE[isDark() ? "dark" : "light"];
    const at = chart.names.map((_, i) => i), few = chart.names.length <= 60, sideways = chart.sideways && few;
    const traces = chart.series.map((part, index) => ({
      type: "bar", orientation: sideways ? "h" : "v", meta: { group: index, name: part.name, colour: colours[index], dash: -1 },
      x: sideways ? part.values : at, y: sideways ? at : part.values,
      marker: { color: chart.signed ? part.values.map((value) => colours[value > 0 ? 1 : 0]) : colours[index] },
      text: part.values.map((value, i) =>
        `${esc(chart.names[i])}<br>${chart.series.length > 1 ? esc(part.name) + ": " : ""}${short(value)}`),
      textposition: "none", hovertemplate: "%{text}<extra></extra>",
    }));
    const step = sideways ? 1 : Math.ceil(at.length / Math.max(4, Math.floor(width / 40)));
    const ticks = at.filter((i) => i % step === 0);
    const names = few || !chart.sideways ? { tickvals: ticks, ticktext: ticks.map((i) => tick(chart.names[i], width)) }
      : { showticklabels: false };
    const title = sideways ? "" : (chart.sideways ? `${at.length} clients` : "round");
    const nameAxis = axis(title, { ...names, ...(sideways ? { autorange: "reversed" } : {}) });
    const valueAxis = axis(esc(chart.valueLabel), { exponentformat: "power", rangemode: "tozero" });
    const [x, y] = sideways ? [valueAxis, nameAxis] : [nameAxis, valueAxis];
    return [traces, layout(sideways ? Math.max(110, 22 * at.length + 20) : PLOT, x, y, { barmode: "relative", bargap: 0.25 })];
  }

  function dots(chart, width) {
    const colours = PALETTE[isDark() ? "dark" : "light"];
    const traces = chart.groups.map((group, row) => ({
      x: group.dots.map((dot) => dot[1]), y: group.dots.map((_, i) => row + ((i * 7) % 5 - 2) * 0.07), mode: "markers",
      marker: { size: 7, opacity: 0.75, color: group.dots.map((dot) => colours[dot[1] > 0 ? 1 : 0]) }, meta: { group: row },
      text: group.dots.map((dot) => `${esc(group.name)}<br>client ${esc(dot[0])}: ${short(dot[1])}`),
      hovertemplate: "%{text}<extra></extra>",
    }));
    const count = chart.groups.length;
    const names = { tickvals: chart.groups.map((_, i) => i), ticktext: chart.groups.map((group) => tick(group.name, width)) };
    const rows = axis("", { ...names, range: [count - 0.4, -0.6], zeroline: false });
    return [traces, layout(Math.max(140, 24 * count + 20), axis(esc(chart.valueLabel), { exponentformat: "power" }), rows)];
  }

  const SVG = "http://www.w3.org/2000/svg";

  function swatch(meta) {
    const picture = document.createElementNS(SVG, "svg");
    const mark = document.createElementNS(SVG, meta.dash < 0 ? "rect" : "line");
    const line = { x1: 0, y1: 6, x2: 26, y2: 6, stroke: meta.colour, "stroke-width": 2.5 };
    const shape = meta.dash < 0 ? { x: 7, y: 1, width: 12, height: 10, fill: meta.colour }
      : { ...line, "stroke-dasharray": ["none", "7 4", "7 3 2 3", "2 3"][meta.dash] };
    Object.entries({ width: 26, height: 12, "aria-hidden": "true" }).forEach(([name, value]) => picture.setAttribute(name, value));
    Object.entries(shape).forEach(([name, value]) => mark.setAttribute(name, value));
    picture.append(mark);
    return picture;
  }

  function legend(place, traces) {
    const named = traces.filter((trace) => trace.meta.name !== undefined);
    const before = place.parentElement.querySelector(".legend");
    if (before !== null) { before.remove(); }
    if (named.length < 2) { return; }
    const list = document.createElement("div");
    list.className = "legend";
    for (const trace of named) {
      const entry = document.createElement("button");
      entry.type = "button";
      entry.setAttribute("aria-pressed", "true");
      entry.append(swatch(trace.meta), trace.meta.name);
      entry.addEventListener("click", () => {
        const visible = entry.getAttribute("aria-pressed") !== "true";
        entry.setAttribute("aria-pressed", String(visible));
        const members = traces.map((_, i) => i).filter((i) => traces[i].meta.group === trace.meta.group);
        Plotly.restyle(place, { visible }, members);
      });
      list.append(entry);
    }
    place.after(list);
  }

  function draw(place) {
    const chart = charts[Number(place.dataset.chart)];
    if (chart === undefined) { return; }
    const [traces, shown] = { lines, bars, dots }[chart.kind](chart, place.clientWidth);
    Plotly.react(place, traces, shown, { displayModeBar: false });
    legend(place, traces);
    place.style.minHeight = "0";
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
