// Plots: plain SVG. Bytes alive over the schedule, time, matches and error of each pass.
const SVG = "http://www.w3.org/2000/svg";
function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.flat(Infinity).filter((c) => c !== null && c !== undefined));
  return made;
}

/** Round numbers that divide 0 … top in about `count` parts. */
function ticks(top, count) {
  const raw = top / count;
  const size = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * size).find((s) => s >= raw) || raw;
  return Array.from({ length: Math.floor(top / step + 1e-9) + 1 }, (_, i) => i * step);
}

/** A step line as a path: one level for each value. At most two points a pixel, the highest of what they stand for. */
function steps(values, x, y, width) {
  const size = Math.max(1, Math.ceil(values.length / (width * 2)));
  let path = "";
  for (let i = 0; i < values.length; i += size) {
    const level = y(Math.max(...values.slice(i, i + size)));
    path += `${i ? "L" : "M"}${x(i).toFixed(1)} ${level.toFixed(1)}H${x(Math.min(i + size, values.length)).toFixed(1)}`;
  }
  return path;
}

/** The schedule without weights, which are there before it begins: [{state, live}]. */
function schedule(position) {
  const { live } = D.stages[position].memory;
  return stageAt(position).order.map((state, i) => ({ state, live: live[i] })).filter(({ state }) => state.op !== "get_attr");
}

/** The strip below the graph: bytes alive while each node runs; a click chooses the node. */
function showMemory() {
  const box = byId("memory");
  const memory = D.stages[app.stage].memory;
  if (!memory) return box.replaceChildren(el("p", { class: "faint", style: "padding:8px 12px;margin:0" }, "memory is not known: this graph could not be analysed"));
  const width = box.clientWidth || 600, height = 84, left = 62, right = 12, top = 24, bottom = 8;
  const points = schedule(app.stage);
  const live = points.map((point) => point.live);
  const peak = Math.max(memory.peak, 1);
  const x = (i) => left + ((width - left - right) * i) / live.length;
  const y = (value) => height - bottom - ((height - top - bottom) * value) / peak;
  const line = steps(live, x, y, width - left - right);
  const chosen = points.findIndex(({ state }) => state.id === app.node);
  const mark = svg("line", { y1: top, y2: height - bottom, stroke: "var(--accent)", "stroke-width": 1.5, visibility: chosen < 0 ? "hidden" : null, x1: x(chosen + 0.5), x2: x(chosen + 0.5) });
  const where = svg("text", { x: width - right, y: 15, "text-anchor": "end" });
  const say = (i) => where.replaceChildren(points[i] ? `${points[i].state.name}: ${bytes(live[i])}` : "");
  say(chosen);
  const placeOf = (event) => {
    const rect = drawing.getBoundingClientRect();
    return Math.min(live.length - 1, Math.max(0, Math.floor(((event.clientX - rect.left - left) / (width - left - right)) * live.length)));
  };
  const drawing = svg(
    "svg",
    { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Bytes alive over the schedule, ${bytes(memory.peak)} at most`, style: "cursor:pointer", pointermove: (event) => say(placeOf(event)), pointerleave: () => say(chosen), click: (event) => set({ node: points[placeOf(event)].state.id, group: null }) },
    svg("text", { x: 12, y: 15, class: "strong" }, "Live bytes over the schedule"),
    svg("text", { x: 188, y: 15 }, `${Object.keys(D.symbols).length ? `at ${symbolText()}; ` : ""}weights ${bytes(memory.weights)} apart`),
    [0, peak].map((value) => [svg("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), stroke: "var(--line)" }), svg("text", { x: left - 6, y: y(value) + (value ? 9 : 1), "text-anchor": "end" }, value ? bytes(value) : "0")]),
    svg("path", { d: `${line}V${y(0)}H${left}Z`, fill: "var(--accent-soft)" }),
    svg("path", { d: line, fill: "none", stroke: "var(--accent)", "stroke-width": 1 }),
    mark,
    where,
  );
  box.replaceChildren(drawing);
}

function figure(title, note, drawing) {
  return el("figure", {}, el("figcaption", {}, title, note ? el("small", {}, "  ", note) : null), drawing);
}

/** Bars, one a row: rows of {name, parts: [{value, colour, title}], text, click}. */
function barRows(rows, labelWidth = 130) {
  const width = 520, row = 24, most = Math.max(1e-9, ...rows.map((r) => r.parts.reduce((sum, p) => sum + p.value, 0)));
  const room = width - labelWidth - 130;
  return svg("svg", { viewBox: `0 0 ${width} ${rows.length * row + 4}`, width, height: rows.length * row + 4, role: "img" }, rows.map((one, i) => {
    let x = labelWidth;
    const bars = one.parts.map((part) => {
      const w = (room * part.value) / most;
      const rect = svg("rect", { x, y: i * row + 5, width: Math.max(w, part.value > 0 ? 1 : 0), height: row - 10, fill: part.colour, rx: 2 }, svg("title", {}, part.title));
      x += w;
      return rect;
    });
    const name = one.name.length > 22 ? `${one.name.slice(0, 21)}…` : one.name;
    return svg("g", one.click ? { click: one.click, style: "cursor:pointer" } : {}, svg("text", { x: labelWidth - 8, y: i * row + 16, "text-anchor": "end", class: "strong" }, name, svg("title", {}, one.name)), bars, svg("text", { x: x + 8, y: i * row + 16 }, one.text));
  }));
}

function timeFigure() {
  const rewriting = (position) => D.actions.filter((a) => a.pass === position).reduce((sum, a) => sum + (a.ms || 0), 0);
  const rows = D.passes.map((pass, position) => {
    const spent = Math.min(rewriting(position), pass.ms);
    const text = milliseconds(pass.ms) + (pass.verify_ms >= 0.1 ? ` + ${milliseconds(pass.verify_ms)}` : "");
    return { name: pass.name, text, click: () => set({ stage: position + 1, diff: true, tab: "graph" }), parts: [{ value: pass.ms - spent, colour: "var(--accent)", title: `matching ${milliseconds(pass.ms - spent)}` }, { value: spent, colour: "var(--op-norm)", title: `rewriting ${milliseconds(spent)}` }, { value: pass.verify_ms, colour: "var(--strong)", title: `verifying ${milliseconds(pass.verify_ms)}` }] };
  });
  return figure("Time", el("span", {}, swatch("var(--accent)"), "matching ", swatch("var(--op-norm)"), "rewriting ", swatch("var(--strong)"), "verifying"), barRows(rows));
}

const swatch = (colour) => el("i", { style: `display:inline-block;width:9px;height:9px;border-radius:2px;margin:0 4px 0 8px;background:${colour}` });

function matchFigure() {
  const rows = D.passes.map((pass, position) => ({
    name: pass.name,
    text: `${number(pass.matched)}${pass.refusals.length ? `, ${number(pass.refusals.length)} refused` : ""}`,
    click: () => set({ stage: position + 1, diff: true, tab: "graph" }),
    parts: [{ value: pass.matched, colour: "var(--op-norm)", title: `${pass.matched} rewritten` }, { value: pass.refusals.length, colour: "var(--warn)", title: `${pass.refusals.length} refused` }],
  }));
  return figure("Sites", el("span", {}, swatch("var(--op-norm)"), "rewritten ", swatch("var(--warn)"), "refused"), barRows(rows));
}

/** Errors on a scale of powers of ten; the line is the rounding of the captured graph. */
function errorFigure() {
  const points = [{ name: "captured", value: D.captured_error }, ...D.passes.map((p) => ({ name: p.name, value: p.error }))];
  const known = points.filter((p) => typeof p.value === "number" && p.value > 0);
  if (!known.length) return figure("Error", "not measured in this run", el("p", { class: "faint" }, "fuseline run measures it; an Observer Numerics does, in front of Record."));
  const low = Math.floor(Math.log10(Math.min(...known.map((p) => p.value)))), high = Math.max(low + 1, Math.ceil(Math.log10(Math.max(...known.map((p) => p.value)))));
  const width = 520, height = 190, left = 56, right = 16, top = 12, bottom = 30;
  const y = (value) => height - bottom - ((height - top - bottom) * (Math.log10(value) - low)) / (high - low);
  const x = (i) => left + ((width - left - right) * (i + 0.5)) / points.length;
  const step = Math.ceil((high - low) / 6);
  const levels = Array.from({ length: Math.floor((high - low) / step) + 1 }, (_, i) => low + i * step);
  const text = (value) => error(value);
  return figure("Error after each pass", el("span", { title: "of the outputs, against the captured graph in the next higher precision" }, "max|Δ| / max|reference|"), svg(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, width, height, role: "img" },
    levels.map((power) => [svg("line", { x1: left, x2: width - right, y1: y(10 ** power), y2: y(10 ** power), stroke: "var(--line)" }), svg("text", { x: left - 6, y: y(10 ** power) + 4, "text-anchor": "end" }, `1e${power}`)]),
    typeof D.captured_error === "number" && D.captured_error > 0 ? svg("line", { x1: left, x2: width - right, y1: y(D.captured_error), y2: y(D.captured_error), stroke: "var(--strong)", "stroke-dasharray": "4 3" }) : null,
    points.map((p, i) => {
      const fine = typeof p.value === "number" && p.value > 0;
      const dot = fine ? [svg("circle", { cx: x(i), cy: y(p.value), r: 4, fill: i ? "var(--accent)" : "var(--strong)" }), svg("text", { x: x(i), y: y(p.value) > 30 ? y(p.value) - 9 : y(p.value) + 18, "text-anchor": "middle", class: "strong" }, text(p.value))] : svg("text", { x: x(i), y: height - bottom - 6, "text-anchor": "middle" }, text(p.value));
      return [dot, svg("text", { x: x(i), y: height - 10, "text-anchor": "middle" }, p.name.length > 14 ? `${p.name.slice(0, 13)}…` : p.name)];
    }),
  ));
}

const SERIES = ["var(--op-shape)", "var(--op-create)", "var(--op-norm)", "var(--op-quantize)", "var(--op-region)", "var(--accent)"];

/** All stages' bytes over the schedule, each from its start to its end. */
function memoryFigure() {
  const known = D.stages.map((stage, position) => ({ stage, position })).filter(({ stage }) => stage.memory);
  if (!known.length) return null;
  const width = Math.max(600, Math.min(1500, byId("view-passes").clientWidth - 40)), height = 250, left = 64, right = 16, top = 12, bottom = 26;
  const most = Math.max(1, ...known.map(({ stage }) => stage.memory.peak));
  const y = (value) => height - bottom - ((height - top - bottom) * value) / most;
  const levels = (position) => schedule(position).map((point) => point.live);
  const colour = (position) => (position === LAST ? "var(--accent)" : SERIES[position % (SERIES.length - 1)]);
  const note = el("span", {}, known.map(({ stage, position }) => [swatch(colour(position)), `${position} ${stage.name} ${bytes(stage.memory.peak)}`]));
  return figure("Live bytes over the schedule", note, svg(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, width, height, role: "img" },
    ticks(most, 4).map((value) => [svg("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), stroke: "var(--line)" }), svg("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, value ? bytes(value) : "0")]),
    known.map(({ position }) => svg("path", { d: steps(levels(position), (i) => left + ((width - left - right) * i) / levels(position).length, y, width - left - right), fill: "none", stroke: colour(position), "stroke-width": position === LAST ? 1.6 : 1.1 })),
    svg("text", { x: left, y: height - 8 }, "first node"),
    svg("text", { x: width - right, y: height - 8, "text-anchor": "end" }, "last node"),
  ));
}
