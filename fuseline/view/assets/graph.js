// The graph of a stage, or of two at once: what is open, where the camera is, and what the mouse does.
const canvas = byId("canvas"), tip = byId("tip");
const graph = { layout: null, placed: null, key: "", camera: { x: 0, y: 0, scale: 1 }, over: null, dirty: true };
const toggled = new Map(); // path → open or not, as the user left it; kept from stage to stage

const layoutOf = (state) => (state.diff ? D.diffs[state.stage - 1].layout : D.stages[state.stage].layout);

/** A node of what is drawn: in a diff also one that only the stage before has. */
function drawnState(id, state = app) {
  return stageAt(state.stage).node.get(id) || (state.diff ? stageAt(state.stage - 1).node.get(id) : undefined);
}

const groupKey = (group) => `${group.kind}:${group.kind === "region" ? D.nodes.length + group.node : group.path}`;

function openGroups(layout) {
  const first = new Set(layout.open);
  const open = new Set([0]);
  layout.groups.forEach((group, position) => {
    const wish = toggled.get(groupKey(group));
    if (wish === undefined ? first.has(position) : wish) open.add(position);
  });
  return open;
}

/** Which groups hold a leaf or a group, innermost first. */
function holders(layout) {
  if (!layout.holders) {
    layout.holders = new Map();
    layout.groups.forEach((group, position) => group.kids.forEach((kid) => layout.holders.set(kid, position)));
    layout.nodeGroup = new Map(layout.groups.flatMap((group, position) => (group.node === undefined ? [] : [[group.node, -position]])));
  }
  return layout.holders;
}

function describeItem(code, inside) {
  const layout = graph.layout;
  if (code < 0) {
    const group = layout.groups[-code];
    if (group.kind === "region") {
      const call = drawnState(group.node);
      return { title: call.target, text: regionText(call) };
    }
    if (group.kind === "equal") {
      return { title: group.label, text: `${group.kids.length} equal × ${layout.groups[-group.kids[0]].count} nodes` };
    }
    return { title: group.label, text: group.count <= 4 ? leavesOf(layout, code).map((id) => opName(drawnState(id))).join(", ") : counted(group.count, "node") };
  }
  if (code === 0 && inside === null) return { title: "", text: "" };
  const state = drawnState(code);
  if (state.op === "placeholder") return { title: state.name, text: shortType(state.type) };
  const path = state.module || "";
  const rest = path.startsWith(`${inside.path}.`) ? path.slice(inside.path.length + 1) : inside.path === "" ? path : "";
  const name = opName(state);
  const text = state.op === "call_module" ? regionText(state) : state.op === "output" ? counted(state.inputs.length, "result") : shortType(state.type);
  return { title: rest ? `${rest} · ${name}` : name, text };
}

const regionText = (call) => (call.makers ? call.makers[call.makers.length - 1].replace(/^[^/]*\//, "") : call.region.kind);

const infos = new Map();
/** What the painter needs of a box; kept while the layout stays. */
function infoOf(code) {
  if (infos.has(code)) return infos.get(code);
  let info;
  if (code < 0) {
    const group = graph.layout.groups[-code];
    info = { node: group.node, region: group.kind === "region", equal: group.kind === "equal", kind: "region", parts: partsOf(code) };
  } else {
    const state = drawnState(code);
    info = { node: code, kind: kindOf(state), refused: refusalsOf.has(code) && refusalsOf.get(code).some((r) => r.position === app.stage - 1 || r.position === app.stage) };
  }
  infos.set(code, info);
  return info;
}

/** The leaves below a group. */
function leavesOf(layout, code) {
  return code > 0 ? [code] : layout.groups[-code].kids.flatMap((kid) => leavesOf(layout, kid));
}

function partsOf(code) {
  const counts = new Map();
  const status = app.diff ? statusAt(app.stage) : null;
  for (const id of leavesOf(graph.layout, code)) {
    const letter = status && status.get(id);
    const colour = status ? (letter ? CHANGES[letter][0] : "line") : `op-${kindOf(drawnState(id))}`;
    counts.set(colour, (counts.get(colour) || 0) + 1);
  }
  return [...counts].map(([colour, count]) => ({ colour, count })).sort((a, b) => b.count - a.count);
}

/** Lays out again what is to be seen; `keep` is a box that stays where it is on the screen. */
function layOut(keep = null) {
  const layout = layoutOf(app);
  const changed = layout !== graph.layout;
  const anchor = keep !== null && !changed ? graph.placed?.byCode.get(keep) : null;
  graph.layout = layout;
  infos.clear();
  graph.placed = placed(layout, openGroups(layout), describeItem);
  if (anchor) {
    const now = graph.placed.byCode.get(keep);
    graph.camera.x += (anchor.x + anchor.w / 2 - now.x - now.w / 2) * graph.camera.scale;
    graph.camera.y += (anchor.y - now.y) * graph.camera.scale;
  } else if (changed) fit();
  graph.dirty = true;
}

/** All of the graph where it stays readable; otherwise its upper part. */
function fit(whole = false) {
  const { width, height } = graph.placed;
  const w = canvas.clientWidth, h = canvas.clientHeight;
  const all = Math.min((w - 32) / width, (h - 40) / height, 1);
  const scale = whole ? all : Math.max(all, Math.min(1, (w - 32) / width, 0.8));
  graph.camera = { scale, x: (w - width * scale) / 2, y: height * scale + 32 < h ? (h - height * scale) / 2 : 16 };
  graph.dirty = true;
}

function zoom(factor, px = canvas.clientWidth / 2, py = canvas.clientHeight / 2) {
  const camera = graph.camera;
  const scale = Math.min(3, Math.max(0.004, camera.scale * factor));
  camera.x = px - ((px - camera.x) * scale) / camera.scale;
  camera.y = py - ((py - camera.y) * scale) / camera.scale;
  camera.scale = scale;
  graph.dirty = true;
}

/** The box that stands for a node: its own, what reads or gives it where it is not drawn, or the shut group around it. */
function boxOf(id) {
  if (id === null || !graph.layout) return null;
  const up = holders(graph.layout);
  let code = graph.layout.nodeGroup.get(id) ?? id;
  if (!up.has(code)) {
    const state = drawnState(id);
    if (!state) return null;
    const next = state.target === "getitem" ? state.inputs[0] : stageAt(app.stage).usersOf(id)[0];
    if (next === undefined || next === id) return null;
    return boxOf(next);
  }
  while (!graph.placed.byCode.has(code)) code = -up.get(code);
  return graph.placed.byCode.get(code);
}

/** Opens the groups around a node and brings it into sight. */
function reveal(id) {
  const up = holders(graph.layout);
  let code = graph.layout.nodeGroup.get(id) ?? id;
  if (!up.has(code)) {
    const box = boxOf(id);
    if (!box) return;
    code = box.code;
  }
  let opened = false;
  const open = openGroups(graph.layout);
  for (let at = up.get(code); at; at = up.get(-at)) {
    if (open.has(at)) continue;
    toggled.set(groupKey(graph.layout.groups[at]), true);
    opened = true;
  }
  if (opened) layOut();
  const box = graph.placed.byCode.get(code);
  if (box) show(box);
}

/** Moves the camera so that a box is in sight; it stays where it is when the box is in sight already. */
function show(box) {
  const camera = graph.camera, w = canvas.clientWidth, h = canvas.clientHeight;
  if (camera.scale < 0.55) zoom(0.8 / camera.scale);
  const x = box.x * camera.scale + camera.x, y = box.y * camera.scale + camera.y;
  const bw = box.w * camera.scale, bh = Math.min(box.h * camera.scale, h / 2);
  if (x < 20 || x + bw > w - 20) camera.x += w / 2 - (x + bw / 2);
  if (y < 24 || y + bh > h - 40) camera.y += h / 2 - (y + bh / 2);
  graph.dirty = true;
}

function toggleGroup(code) {
  const group = graph.layout.groups[-code];
  if (!group || code === 0) return;
  toggled.set(groupKey(group), !openGroups(graph.layout).has(-code));
  layOut(code);
}

function openAll(open) {
  for (const group of graph.layout.groups) if (group.kind !== "root") toggled.set(groupKey(group), open);
  layOut();
  fit();
}

function boxAt(px, py) {
  const { x, y, scale } = graph.camera;
  const gx = (px - x) / scale, gy = (py - y) / scale;
  for (let i = graph.placed.boxes.length - 1; i > 0; i--) {
    const box = graph.placed.boxes[i];
    if (gx >= box.x && gx <= box.x + box.w && gy >= box.y && gy <= box.y + box.h) return { box, gx, gy };
  }
  return null;
}

/** What a click on a box chooses: a node, or a module. */
function choose(code) {
  if (code > 0) set({ node: code, group: null });
  else {
    const group = graph.layout.groups[-code];
    if (group.kind === "region") set({ node: group.node, group: null });
    else set({ node: null, group: group.path });
  }
}
