// What the mouse does on the canvas, and the frames that are drawn.
let drag = null;
const at = (event) => {
  const rect = canvas.getBoundingClientRect();
  return [event.clientX - rect.left, event.clientY - rect.top];
};

canvas.addEventListener("pointerdown", (event) => {
  if (event.button > 1) return;
  const [px, py] = at(event);
  drag = { px, py, x: graph.camera.x, y: graph.camera.y, moved: false };
  canvas.setPointerCapture(event.pointerId);
});
canvas.addEventListener("pointermove", (event) => {
  const [px, py] = at(event);
  if (drag) {
    if (Math.hypot(px - drag.px, py - drag.py) > 3) drag.moved = true;
    if (drag.moved) {
      canvas.classList.add("dragging");
      tip.hidden = true;
      graph.camera.x = drag.x + px - drag.px;
      graph.camera.y = drag.y + py - drag.py;
      graph.dirty = true;
    }
    return;
  }
  hover(boxAt(px, py), px, py);
});
canvas.addEventListener("pointerup", (event) => {
  canvas.classList.remove("dragging");
  const still = drag && !drag.moved;
  drag = null;
  if (!still) return;
  const hit = boxAt(...at(event));
  if (!hit) return set({ node: null, group: null });
  const onToggle = hit.box.code < 0 && hit.gx < hit.box.x + 24 && hit.gy < hit.box.y + 26;
  if (onToggle) toggleGroup(hit.box.code);
  else choose(hit.box.code);
});
canvas.addEventListener("dblclick", (event) => {
  const hit = boxAt(...at(event));
  if (hit && hit.box.code < 0) toggleGroup(hit.box.code);
});
canvas.addEventListener("pointerleave", () => hover(null));
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  const [px, py] = at(event);
  const lines = event.deltaMode === 1 ? 16 : 1;
  if (event.shiftKey) graph.camera.x -= (event.deltaX || event.deltaY) * lines;
  else zoom(Math.exp(-event.deltaY * lines * 0.0016), px, py);
  tip.hidden = true;
  graph.dirty = true;
}, { passive: false });

function hover(hit, px, py) {
  const code = hit ? hit.box.code : null;
  canvas.classList.toggle("over", code !== null);
  if (code !== graph.over) {
    graph.over = code;
    graph.dirty = true;
    tip.hidden = code === null || (code < 0 && hit.box.open);
    if (!tip.hidden) tip.replaceChildren(...tipText(code));
  }
  if (!tip.hidden && hit) {
    const width = canvas.clientWidth;
    tip.style.left = px > width / 2 ? "" : `${px + 14}px`;
    tip.style.right = px > width / 2 ? `${width - px + 14}px` : "";
    tip.style.top = py > canvas.clientHeight / 2 ? "" : `${py + 14}px`;
    tip.style.bottom = py > canvas.clientHeight / 2 ? `${canvas.clientHeight - py + 14}px` : "";
  }
}

function tipText(code) {
  if (code < 0) {
    const group = graph.layout.groups[-code];
    if (group.kind !== "region") return [el("b", {}, group.path), el("div", {}, describeItem(code, null).text), el("div", {}, "double click opens it")];
    code = group.node;
  }
  const state = drawnState(code);
  const change = app.diff ? statusAt(app.stage).get(code) : null;
  return [
    el("b", {}, state.name),
    el("div", {}, state.op === "call_module" ? regionText(state) : state.target),
    state.type ? el("div", {}, `${state.type}${state.bytes ? `  ${bytes(state.bytes)}` : ""}`) : null,
    state.line ? el("div", {}, shortPlace(state.line)) : null,
    change ? el("div", {}, CHANGES[change][1]) : null,
  ].filter(Boolean);
}

/** What is highlighted: the chosen box, the values that it reads and gives, and the boxes of those. */
function selection() {
  const near = new Set(), sources = new Set(), own = new Set();
  let chosen = null;
  if (app.node !== null) {
    const box = boxOf(app.node);
    chosen = box ? box.code : null;
    const state = drawnState(app.node);
    const valueOf = (id) => {
      const read = drawnState(id);
      return read && read.target === "getitem" ? read.inputs[0] : id;
    };
    const add = (set, id) => {
      const read = drawnState(id);
      set.add(id);
      for (const output of read?.region ? read.region.outputs : []) set.add(output);
    };
    if (state) {
      state.inputs.forEach((id) => add(sources, valueOf(id)));
      add(own, valueOf(app.node));
      const users = stageAt(app.stage).usersOf(app.node).flatMap((id) => (drawnState(id).target === "getitem" ? stageAt(app.stage).usersOf(id) : [id]));
      for (const id of [...state.inputs, ...users]) {
        const other = boxOf(id);
        if (other && other.code !== chosen && !other.open) near.add(other.code);
      }
    }
  } else if (app.group !== null) {
    const position = graph.layout.groups.findIndex((group) => group.path === app.group && group.kind !== "region");
    if (graph.placed.byCode.has(-position)) chosen = -position;
  }
  return { near, sources, own, chosen, leads: leadsTo(chosen) };
}

/** Whether a line leads to a box: to the box itself, to a group around it, or out of a group that it is not in. */
function leadsTo(code) {
  const around = new Set();
  for (let box = graph.placed.byCode.get(code); box; box = box.parent) around.add(box.code);
  return (line) => line.ends.some((end) => (end === null ? !around.has(line.group) : around.has(end)));
}

/** The colour of a line in a diff: that of the newer of its ends, where all its ends agree. */
function lineChange(status) {
  if (!status.size) return () => "plain";
  const before = stageAt(app.stage - 1).node;
  const one = (value, end) => {
    const letter = end === null || end < 0 ? null : status.get(end);
    if (letter === "r" || letter === "a") return letter;
    return letter === "w" && before.has(end) && !before.get(end).inputs.includes(value) ? "w" : "plain";
  };
  return ({ value, ends }) => {
    const own = status.get(value);
    if (own === "r" || own === "a") return own;
    const first = one(value, ends[0]);
    return ends.every((end) => one(value, end) === first) ? first : "plain";
  };
}

const frames = { drawn: 0 };
function frame() {
  if (graph.dirty && app.tab === "graph" && graph.placed && canvas.clientWidth > 0) {
    graph.dirty = false;
    frames.drawn += 1;
    const status = app.diff ? statusAt(app.stage) : new Map();
    paint(canvas, { placed: graph.placed, camera: graph.camera, status, over: graph.over, info: infoOf, change: lineChange(status), ...selection() });
  }
  requestAnimationFrame(frame);
}
new ResizeObserver(() => { graph.dirty = true; }).observe(canvas);
