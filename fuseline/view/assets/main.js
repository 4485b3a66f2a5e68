// What is shown, and the keys. `set` is the only way to change it; the address keeps it, so a view can be passed on.
const TABS = [["graph", "Graph"], ["code", "Code"], ["passes", "Passes"], ["rewrites", "Rewrites"], ["kernels", "Kernels"]];
const app = { stage: 0, diff: false, node: null, group: null, tab: "graph", action: null, filter: "", kernel: null };

function set(changes) {
  const was = { ...app };
  Object.assign(app, changes);
  app.stage = Math.min(LAST, Math.max(0, app.stage));
  if (app.stage === 0) app.diff = false;
  const moved = was.stage !== app.stage || was.diff !== app.diff;
  if (app.tab !== was.tab || moved) showFrame();
  if (moved || (app.tab === "graph" && graph.key !== `${app.stage}${app.diff}`)) {
    graph.key = `${app.stage}${app.diff}`;
    layOut();
  }
  if (app.tab === "graph") {
    if (app.node !== null && (app.node !== was.node || moved || was.tab !== "graph")) reveal(app.node);
    if (app.group !== null && app.group !== was.group) revealGroup(app.group);
    showMemory();
  } else if (app.tab === "code") showCode();
  else if (app.tab === "passes" && was.tab !== "passes") showPasses();
  else if (app.tab === "rewrites") showRewrites();
  else if (app.tab === "kernels") showKernels();
  showDetails();
  graph.dirty = true;
  try { history.replaceState(null, "", address(app)); } catch { /* a page without an address */ }
}

function address(view) {
  const parts = { stage: view.stage, diff: view.diff ? 1 : "", node: view.node ?? "", module: view.group ?? "", tab: view.tab === "graph" ? "" : view.tab, rewrite: view.action ?? "", kernel: view.kernel ?? "" };
  return `#${new URLSearchParams(Object.entries(parts).filter(([, value]) => value !== ""))}`;
}

function revealGroup(path) {
  const position = graph.layout.groups.findIndex((group) => group.path === path && group.kind !== "region");
  if (position <= 0) return;
  const up = holders(graph.layout);
  let changed = false;
  for (let at = up.get(-position); at; at = up.get(-at)) {
    toggled.set(groupKey(graph.layout.groups[at]), true);
    changed = true;
  }
  if (changed) layOut();
  const box = graph.placed.byCode.get(-position);
  if (box) show(box);
}

/** What stays the same while one looks about in a stage: timeline, tabs, tools, legend. */
function showFrame() {
  showTimeline();
  byId("tabs").replaceChildren(...TABS.map(([name, title], i) => el("button", { role: "tab", id: `tab-${name}`, "aria-selected": String(app.tab === name), title: `${title} (${i + 1})`, click: () => set({ tab: name }) }, title)));
  for (const [name] of TABS) {
    byId(`view-${name}`).classList.toggle("shown", app.tab === name);
    byId(`view-${name}`).setAttribute("aria-labelledby", `tab-${name}`);
  }
  const onGraph = app.tab === "graph", inStage = onGraph || app.tab === "code";
  byId("tools").replaceChildren(...[
    inStage && app.stage > 0 ? el("button", { class: "plain", id: "diff", "aria-pressed": String(app.diff), title: "What the pass before this stage changed (d)", click: () => set({ diff: !app.diff }) }, `Diff with ${stageName(app.stage - 1)}`) : null,
    onGraph ? el("button", { class: "plain", id: "fit", title: "All in sight (f)", click: () => fit(true) }, "Fit") : null,
    onGraph ? el("button", { class: "plain", id: "open-all", title: "Open all groups (o)", click: () => openAll(true) }, "Open all") : null,
    onGraph ? el("button", { class: "plain", id: "close-all", title: "Close all groups (c)", click: () => openAll(false) }, "Close all") : null,
  ].filter(Boolean));
  const kinds = app.diff ? Object.values(CHANGES).map(([colour, text]) => [colour, text]) : Object.entries(KIND_NAMES).map(([kind, text]) => [`op-${kind}`, text]);
  byId("legend").replaceChildren(...kinds.map(([colour, text]) => el("span", {}, el("i", { style: `background:var(--${colour})` }), text)));
}

/** The next or the one before in the schedule, of what can be chosen. */
function walk(step) {
  const order = stageAt(app.stage).order.filter((s) => s.op !== "get_attr");
  const now = order.findIndex((s) => s.id === app.node);
  const next = now < 0 ? (step > 0 ? 0 : order.length - 1) : Math.min(order.length - 1, Math.max(0, now + step));
  set({ node: order[next].id, group: null });
}

const KEYS = [
  ["/", "search", () => query.focus()],
  ["← →", "the stage before, the next one", null],
  ["↑ ↓", "the node before, the next one in the schedule", null],
  ["d", "diff with the stage before", () => app.stage > 0 && set({ diff: !app.diff })],
  ["Enter", "open or close the group that is chosen", () => toggleChosen()],
  ["f", "the whole graph in sight", () => fit(true)],
  ["+ −", "larger, smaller", null],
  ["o c", "open all groups, close all", null],
  ["1 … 5", TABS.map(([, title]) => title).join(", "), null],
  ["t", "light or dark", () => theme(true)],
  ["Esc", "close, then choose nothing", null],
  ["?", "these keys", () => help()],
];

function toggleChosen() {
  const { chosen } = selection();
  if (chosen !== null && chosen < 0) toggleGroup(chosen);
}

function help() {
  const box = byId("help");
  box.replaceChildren(el("b", {}, "Keys"), el("dl", {}, KEYS.map(([key, text]) => [el("dt", {}, key.split(" ").map((k) => (k === "…" ? " … " : el("kbd", { style: "margin-right:3px" }, k)))), el("dd", {}, text)])), el("p", { class: "muted", style: "margin-bottom:0" }, "Drag to move, turn the wheel to zoom; a double click opens a group."));
  box.showModal();
}

function escape() {
  if (app.node !== null || app.group !== null) set({ node: null, group: null });
  else if (app.diff) set({ diff: false });
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
  if (event.target.matches("input, textarea")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const scrolls = event.target.matches(".view:not(#view-code), #details");
  const actions = {
    ArrowLeft: () => set({ stage: app.stage - 1 }),
    ArrowRight: () => set({ stage: app.stage + 1 }),
    ArrowUp: scrolls ? null : () => walk(-1),
    ArrowDown: scrolls ? null : () => walk(1),
    "+": () => zoom(1.25),
    "=": () => zoom(1.25),
    "-": () => zoom(0.8),
    o: () => openAll(true),
    c: () => openAll(false),
    Escape: escape,
    ...Object.fromEntries(TABS.map(([name], i) => [String(i + 1), () => set({ tab: name })])),
    ...Object.fromEntries(KEYS.filter(([, , action]) => action).map(([key, , action]) => [key, action])),
  };
  if (event.key === "Enter" && event.target.matches("button, summary, a")) return;
  const action = actions[event.key];
  if (!action) return;
  event.preventDefault();
  action();
});

function theme(turn) {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  let chosen = null;
  try { chosen = localStorage.getItem("fuseline-theme"); } catch { /* storage is off */ }
  let now = document.documentElement.dataset.theme || chosen || (dark ? "dark" : "light");
  if (turn) {
    now = now === "dark" ? "light" : "dark";
    try { localStorage.setItem("fuseline-theme", now); } catch { /* storage is off */ }
  }
  document.documentElement.dataset.theme = now;
  readColours();
  graph.dirty = true;
}

byId("theme").addEventListener("click", () => theme(true));
byId("keys").addEventListener("click", help);
byId("help").addEventListener("click", (event) => { if (event.target === byId("help")) byId("help").close(); });
addEventListener("resize", () => { if (app.tab === "graph") showMemory(); else if (app.tab === "code") showCode(); });

byId("title").textContent = D.title;
byId("pipeline").textContent = D.pipeline;
byId("pipeline").title = D.pipeline;
const given = new URLSearchParams(location.hash.slice(1));
const place = (name) => (given.has(name) && Number.isInteger(Number(given.get(name))) ? Number(given.get(name)) : null);
theme(false);
showFrame();
set({ stage: place("stage") ?? LAST, diff: given.has("diff"), node: place("node"), group: given.get("module"), tab: TABS.some(([name]) => name === given.get("tab")) ? given.get("tab") : "graph", action: place("rewrite"), kernel: given.get("kernel") });
requestAnimationFrame(frame);
// For tests and for the curious: where a node is on the screen, and how many frames were drawn.
window.fuselineView = { app, graph, frames, boxOf, set, zoom, fit, openAll };
