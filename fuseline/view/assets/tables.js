// The tabs beside the graph: passes with their plots and rules, all rewrites, all kernels.
function cells(tag, values) {
  return values.map((value) => (Array.isArray(value) && value[0] === "r" ? el(tag, { class: "r" }, value[1]) : el(tag, {}, value)));
}
/** A table; widths of its columns in per cent, when given: then nothing wraps, and titles hold what is cut. */
function table(headings, rows, widths = null) {
  return el("table", { class: widths ? "fixed" : null }, widths ? el("colgroup", {}, widths.map((w) => el("col", { style: `width:${w}%` }))) : null, el("thead", {}, el("tr", {}, cells("th", headings))), rows instanceof Node ? rows : el("tbody", {}, rows));
}

/** `decoder.py:44, 46, 47`: places by file. */
function placesText(places) {
  const files = new Map();
  for (const place of places.map(shortPlace)) {
    const cut = place.lastIndexOf(":");
    files.set(place.slice(0, cut), [...(files.get(place.slice(0, cut)) || []), place.slice(cut + 1)]);
  }
  return [...files].map(([file, lines]) => `${file}:${lines.join(", ")}`).join("; ");
}
const opsText = (ops) => [...tally(ops.map((op) => op.replace(/^(aten|fuseline)\./, "").replace(/\.[^.]*$/, "")))].map(([op, n]) => (n > 1 ? `${n} ${op}` : op)).join(", ");
const cut = (text, attributes = {}) => el("span", { title: text, ...attributes }, text);

function showPasses() {
  const rules = new Map();
  for (const action of D.actions) {
    const key = `${action.pass}/${action.rule}`;
    const entry = rules.get(key) || { pass: action.pass, rule: action.rule, location: action.location, count: 0, skipped: 0, ms: 0, removed: 0, created: 0 };
    if (action.skipped) entry.skipped += 1;
    else {
      entry.count += 1;
      entry.ms += action.ms || 0;
      entry.removed += action.removed.length;
      entry.created += action.created.length;
    }
    rules.set(key, entry);
  }
  const passName = (position) => D.passes[position]?.name || D.failure?.pass || "";
  const ruleRows = [...rules.values()].sort((a, b) => a.pass - b.pass || b.count - a.count).map((r) => el("tr", {}, cells("td", [passName(r.pass), link(r.rule, { tab: "rewrites", action: null, filter: `${passName(r.pass)}/${r.rule}` }), ["r", number(r.count)], ["r", r.skipped ? number(r.skipped) : ""], ["r", number(r.removed)], ["r", number(r.created)], ["r", milliseconds(r.ms)], el("span", { class: "mono", title: r.location }, r.location ? shortPlace(r.location) : "")])));
  const refused = D.passes.flatMap((pass, position) => [...tally(pass.refusals.map((r) => r.reason))].map(([reason, count]) => {
    const first = pass.refusals.find((r) => r.reason === reason);
    return el("tr", {}, cells("td", [pass.name, ["r", number(count)], reason, first.node !== null ? nodeLink(first.node, position, first.site) : el("span", { class: "mono" }, first.site)]));
  }));
  byId("view-passes").replaceChildren(el("div", { class: "pad" },
    el("div", { class: "figures" }, timeFigure(), matchFigure(), errorFigure()),
    el("div", { class: "figures wide" }, memoryFigure(),
      el("figure", {}, el("figcaption", {}, "Rules"), table(["pass", "rule", ["r", "rewrites"], ["r", "skipped"], ["r", "removed"], ["r", "created"], ["r", "time"], "where"], ruleRows)),
      refused.length ? el("figure", {}, el("figcaption", {}, "Refused, by reason"), table(["pass", ["r", "sites"], "reason", "first site"], refused)) : null),
  ));
}

const SHOWN = 400; // rows of the table of rewrites before one asks for more

function showRewrites() {
  const box = byId("view-rewrites");
  const names = (ids, stage) => el("span", {}, ids.slice(0, 5).flatMap((id, i) => [i ? ", " : "", nodeLink(id, stage)]), ids.length > 5 ? ` +${ids.length - 5}` : "");
  const row = (a) => el("tr", { class: a.number === app.action ? "chosen" : null, "data-action": a.number, click: (event) => !event.target.closest("a") && set({ action: a.number }) }, cells("td", [["r", link(String(a.number), { action: a.number })], el("span", { title: a.location }, actionName(a)), cut(a.site, { class: "mono" }), a.skipped ? el("i", { class: "warn" }, "skipped") : names(a.removed, a.pass), names(a.created, Math.min(a.pass + 1, LAST)), ["r", a.ms === null ? "" : milliseconds(a.ms)]]));
  const input = el("input", { type: "search", class: "filter", value: app.filter, placeholder: "Filter by pass, rule or site", "aria-label": "Filter rewrites", input: (event) => { app.filter = event.target.value; fill(); } });
  const body = el("tbody"), count = el("span", { class: "muted" });
  const fill = () => {
    const words = app.filter.toLowerCase();
    const found = D.actions.filter((a) => `${actionName(a)} ${a.site}`.toLowerCase().includes(words));
    const from = Math.max(0, Math.min(found.length - SHOWN, found.findIndex((a) => a.number === app.action) - SHOWN / 2));
    body.replaceChildren(...found.slice(from, from + SHOWN).map(row));
    count.textContent = found.length > SHOWN ? `${number(SHOWN)} of ${number(found.length)} rewrites, from #${found[from].number}: filter to see others` : counted(found.length, "rewrite");
  };
  fill();
  const top = box.querySelector("tr.chosen") || !box.firstChild ? box.scrollTop : 0;
  box.replaceChildren(el("div", { class: "pad" }, el("p", { class: "above" }, input, count), table([["r", "#"], "pass/rule", "site", "removed", "created", ["r", "time"]], body, [6, 21, 28, 20, 16, 9])));
  box.scrollTop = top;
  box.querySelector("tr.chosen")?.scrollIntoView({ block: "nearest" });
}

function showKernels() {
  const box = byId("view-kernels");
  if (!D.kernels) {
    return box.replaceChildren(el("div", { class: "pad" }, el("p", { class: "muted" }, "No kernels were recorded: an observer Record alone doesn't lower the last stage, fuseline run and fuseline opt do.")));
  }
  const chosen = D.kernels.kernels.find((k) => k.name === app.kernel);
  const rows = D.kernels.kernels.map((k) => el("tr", { class: k === chosen ? "chosen" : null }, cells("td", [link(k.name, { kernel: k.name }, { class: "link mono", title: k.name, "data-kernel": k.name }), ["r", number(k.regions.length)], cut(opsText(k.ops)), cut(k.made_by.join(", ")), cut(placesText(k.lines), { class: "mono" })])));
  const eager = D.kernels.eager.length ? el("figure", { style: "margin-top:18px" }, el("figcaption", {}, `Regions that run through PyTorch: ${D.kernels.eager.length}`), table(["region", "reason"], D.kernels.eager.map((e) => el("tr", {}, cells("td", [el("span", { class: "mono" }, e.region), e.reason]))))) : null;
  const regions = chosen ? stageAt(LAST).order.filter((s) => s.op === "call_module" && chosen.regions.includes(s.target)) : [];
  box.replaceChildren(el("div", { class: "pad" },
    chosen ? el("div", { style: "margin-bottom:14px" }, el("b", { class: "mono" }, chosen.name), el("span", { class: "muted" }, `  ${counted(chosen.warps, "warp")}, ${counted(chosen.stages, "stage")}; launched by `), regions.slice(0, 8).flatMap((s, i) => [i ? ", " : "", nodeLink(s.id, LAST)]), regions.length > 8 ? ` and ${regions.length - 8} more` : "", el("pre", { class: "excerpt", style: "max-height:46vh;overflow:auto" }, chosen.source.replace(/\n+$/, "").split("\n").map((text, i) => el("span", {}, el("i", {}, String(i + 1)), text || " ")))) : null,
    table(["kernel", ["r", "regions"], "ops", "made by", "lines"], rows, [23, 9, 20, 24, 24]), eager));
}
