// The panel at the side: the chosen node, the chosen module, or the stage.
const details = byId("details");

function showDetails() {
  const action = app.tab === "rewrites" && actionOf.get(app.action);
  const parts = action ? actionDetails(action) : app.node !== null ? nodeDetails(app.node) : app.group !== null ? groupDetails(app.group) : stageDetails();
  details.replaceChildren(...parts.flat(2).filter(Boolean));
  const shown = `${app.tab === "rewrites" ? app.action : ""} ${app.node} ${app.group} ${app.stage} ${app.diff}`;
  if (details.dataset.shown !== shown) details.scrollTop = 0;
  details.dataset.shown = shown;
}

/** A button that chooses a node, in another stage if so said. */
function nodeLink(id, stage = app.stage, text = null) {
  const state = stageAt(stage).node.get(id) || drawnState(id) || anyState.get(id);
  if (!state) return el("span", { class: "faint" }, "a node that was dropped at once");
  const known = stageAt(stage).node.has(id) || (stage === app.stage && drawnState(id));
  const label = text || state.name;
  if (!known) return el("span", { class: "muted", title: "made and replaced by the same pass" }, label);
  return link(label, { stage, node: id, group: null, diff: stage === app.stage && app.diff, tab: app.tab === "code" ? "code" : "graph" }, { class: "link mono", "data-node": id });
}

/** A link to another view of the page; its address can be opened in another tab. */
function link(text, changes, attributes = {}) {
  const follow = (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    set(changes);
  };
  return el("a", { class: "link", href: address({ ...app, ...changes }), click: follow, ...attributes }, text);
}

const actionName = (action) => `${D.passes[action.pass]?.name || D.failure?.pass || "?"}/${action.rule}`;
const actionLink = (action) => link(`#${action.number} ${actionName(action)}`, { tab: "rewrites", action: action.number, filter: "" }, { class: "link num" });
const stageName = (position) => `${position} ${D.stages[position].name}`;

function facts(...pairs) {
  return el("dl", { class: "facts" }, pairs.filter(Boolean).map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}

function excerpt(place, caption = null) {
  const found = D.excerpts[place];
  const line = Number(place.slice(place.lastIndexOf(":") + 1));
  const head = el("p", { class: "mono", title: place }, shortPlace(place), caption ? el("span", { class: "muted" }, `  ${caption}`) : null);
  if (!found) return [head, el("p", { class: "faint" }, "the file could not be read")];
  const indent = Math.min(...found.text.filter((t) => t.trim()).map((t) => t.length - t.trimStart().length));
  const rows = found.text.map((text, i) => el("span", { class: found.start + i === line ? "here" : null }, el("i", {}, String(found.start + i)), text.slice(indent) || " "));
  return [head, el("pre", { class: "excerpt" }, rows)];
}

function nodeDetails(id) {
  const state = drawnState(id);
  if (!state) {
    const known = anyState.get(id);
    return [el("h2", {}, known ? known.name : `node ${id}`), el("p", { class: "muted" }, `not in stage ${stageName(app.stage)}`), neighbours(id)];
  }
  const here = stageAt(app.stage).node.has(id) ? app.stage : app.stage - 1;
  const change = app.diff ? statusAt(app.stage).get(id) : null;
  return [
    el("h2", { class: "mono" }, state.name),
    el("p", {}, el("span", { class: "mono" }, state.op === "call_module" ? "fused region" : state.op === "get_attr" ? "weight" : state.target), change ? el("span", { class: `tag ${change}`, style: `color:var(--${CHANGES[change][0]})` }, CHANGES[change][1]) : null),
    state.type ? el("p", { class: "type" }, state.type) : null,
    facts(
      state.bytes ? ["size", `${bytes(state.bytes)}${Object.keys(D.symbols).length && /s\d/.test(state.type) ? ` at ${symbolText()}` : ""}`] : null,
      state.module ? ["module", link(state.module, { node: null, group: state.module, tab: "graph" }, { class: "link mono" })] : null,
      ["schedule", `${stageAt(here).place.get(id) + 1} of ${stageAt(here).order.length}${liveText(here, id)}`],
      state.inside !== undefined ? ["in region", nodeLink(state.inside, here)] : null,
      state.weight ? ["value", el("span", { class: "mono" }, state.weight.text)] : null,
      state.args && state.op === "call_function" ? ["arguments", el("span", { class: "mono" }, state.args)] : null,
    ),
    refusalsOf.has(id) ? [el("h3", {}, "Refused"), el("ul", { class: "rows" }, refusalsOf.get(id).map((r) => el("li", {}, el("span", {}, el("b", { class: "warn" }, r.pass.name), ` ${r.reason}`))))] : null,
    el("h3", {}, "Runs in"),
    runsIn(id),
    el("h3", {}, "Provenance"),
    provenance(id, state),
    el("h3", {}, "Source"),
    state.line ? excerpt(state.line) : el("p", { class: "faint" }, "no line of code"),
    (state.lines || []).filter((place) => place !== state.line).slice(0, 6).map((place) => el("p", { class: "mono muted", title: place }, shortPlace(place), el("span", { class: "faint" }, `  ${lineText(place)}`))),
    state.stack !== undefined && D.stacks[state.stack].length > 1 ? callers(D.stacks[state.stack]) : null,
    state.region ? [el("h3", {}, `Inside: ${counted(state.region.nodes.length, "node")}`), list(state.region.nodes.map((i) => D.nodes[i].id), here)] : null,
    el("h3", {}, `Inputs: ${state.inputs.length}`),
    list(state.inputs, here),
    el("h3", {}, `Users: ${stageAt(here).usersOf(id).length}`),
    list(stageAt(here).usersOf(id), here),
  ];
}

const symbolText = () => Object.entries(D.symbols).map(([name, value]) => `${name} = ${value}`).join(", ");
const lineText = (place) => {
  const found = D.excerpts[place];
  return found ? (found.text[Number(place.slice(place.lastIndexOf(":") + 1)) - found.start] || "").trim() : "";
};

function liveText(stage, id) {
  const memory = D.stages[stage].memory;
  return memory ? `, ${bytes(memory.live[stageAt(stage).place.get(id)])} alive` : "";
}

function callers(frames) {
  return el("details", {}, el("summary", { class: "muted" }, `called from ${counted(frames.length - 1, "line")}`), frames.slice(0, -1).reverse().map((frame) => {
    const [place, name] = frame.split(" in ");
    return el("p", { class: "mono", title: place }, shortPlace(place), el("span", { class: "muted" }, ` ${name}`));
  }));
}

function list(ids, stage, limit = 14) {
  const rows = (some) => some.map((id) => {
    const state = stageAt(stage).node.get(id) || drawnState(id);
    const size = state ? (state.weight ? `${shortType(state.type)} ${state.weight.text}` : shortType(state.type)) : "";
    return el("li", {}, nodeLink(id, stage), el("span", { class: "mono" }, size));
  });
  const box = el("ul", { class: "rows" }, rows(ids.slice(0, limit)));
  if (ids.length > limit) {
    const more = el("button", { class: "link", click: () => more.parentElement.replaceWith(...rows(ids.slice(limit))) }, `${ids.length - limit} more`);
    box.append(el("li", {}, more));
  }
  return ids.length ? box : el("p", { class: "faint" }, "none");
}

function runsIn(id) {
  const { end } = fate(id);
  if (end === null) return el("p", { class: "muted" }, "nothing: its value is not needed after the last pass");
  const last = stageAt(LAST).node.get(end);
  if (["placeholder", "get_attr", "output"].includes(last.op)) return el("p", { class: "muted" }, last.op === "output" ? "the graph's result" : "an input, no kernel");
  const { region, kernels, reason } = runner(end);
  if (!region) return el("p", {}, `PyTorch: ${last.target}`, el("span", { class: "muted" }, " (in no region)"));
  const where = el("span", {}, "region ", nodeLink(region.id, LAST), el("span", { class: "muted" }, `  ${regionText(region)}`));
  if (kernels.length) {
    return el("ul", { class: "rows" }, el("li", {}, where), kernels.map((k) => el("li", {}, link(k.name, { tab: "kernels", kernel: k.name }, { class: "link mono", "data-kernel": k.name }), el("span", {}, counted(k.regions.length, "region")))));
  }
  if (reason) return [el("p", {}, where), el("p", { class: "warn" }, `through PyTorch: ${reason}`)];
  return [el("p", {}, where), el("p", { class: "faint" }, "kernels were not recorded")];
}

/** Where the node came from, and what became of it, stage by stage. */
function provenance(id, state) {
  const made = actionOf.get(D.made[id]);
  const steps = [];
  if (made) {
    const from = [...new Set(made.match)];
    const origin = made.pass;
    steps.push(el("li", {}, el("span", { class: "muted" }, state.makers ? state.makers.slice(0, -1).join(" → ") || "captured" : "captured"), el("div", { class: "faint" }, "from ", from.slice(0, 8).flatMap((one, i) => [i ? ", " : "", nodeLink(one, origin)]), from.length > 8 ? ` and ${from.length - 8} more` : "")));
    steps.push(el("li", { class: "here" }, "made by ", actionLink(made), el("div", { class: "faint mono", title: made.location }, made.location ? shortPlace(made.location) : "")));
  } else steps.push(el("li", { class: "here" }, "captured with the model"));
  for (const { action, to } of fate(id).steps) {
    steps.push(el("li", {}, "replaced by ", actionLink(action), to !== null ? el("div", { class: "faint" }, "became ", nodeLink(to, Math.min(action.pass + 1, LAST))) : null));
  }
  return [el("ol", { class: "chain" }, steps), neighbours(id)];
}

function neighbours(id) {
  const rows = [];
  for (const [stage, arrow] of [[app.stage - 1, "←"], [app.stage + 1, "→"]]) {
    if (stage < 0 || stage > LAST) continue;
    const other = stageAt(stage).node.get(id);
    const mine = stageAt(app.stage).node.get(id);
    const what = !other ? "not there" : !mine || other === mine ? "the same" : other.type !== mine.type ? "another type" : "other arguments";
    rows.push(el("li", {}, el("span", {}, `${arrow} ${stageName(stage)}`), other ? nodeLink(id, stage, what) : el("span", {}, what)));
  }
  return rows.length ? el("ul", { class: "rows" }, rows) : null;
}

function actionDetails(action) {
  const after = Math.min(action.pass + 1, LAST);
  return [
    el("h2", {}, `#${action.number} ${actionName(action)}`),
    el("p", { class: "mono" }, action.site),
    facts(["time", action.ms === null ? "–" : milliseconds(action.ms)], ["in graph", link(`diff with ${stageName(action.pass)}`, { stage: after, diff: true, node: action.created.find((id) => stageAt(after).node.has(id)) ?? null, group: null, tab: "graph" })], action.skipped ? ["skipped", "an observer skipped it"] : null),
    action.replaced.length ? [el("h3", {}, "Replaced"), el("ul", { class: "rows" }, action.replaced.map(([old, now]) => el("li", {}, el("span", {}, nodeLink(old, action.pass), " → ", nodeLink(now, after)))))] : null,
    el("h3", {}, `Match: ${counted(action.match.length, "node")}, ${action.removed.length} removed`),
    el("ul", { class: "rows" }, action.match.map((id) => el("li", {}, nodeLink(id, action.pass), el("span", { class: "mono" }, anyState.has(id) ? shortType(anyState.get(id).type) : "")))),
    el("h3", {}, `Created: ${action.created.length}`),
    el("ul", { class: "rows" }, action.created.map((id) => el("li", {}, nodeLink(id, after), el("span", { class: "mono" }, anyState.has(id) ? shortType(anyState.get(id).type) : "")))),
    el("h3", {}, "Rule"),
    action.location ? excerpt(action.location) : el("p", { class: "faint" }, "its place is not known"),
  ];
}

function bars(counts, total, limit = 14) {
  const sorted = [...counts].sort((a, b) => b[1] - a[1]);
  const most = sorted.length ? sorted[0][1] : 1;
  const rows = sorted.slice(0, limit).map(([name, count]) => el("li", {}, el("span", { class: "mono" }, name), el("span", { class: "num" }, el("i", { class: "meter", style: `width:${Math.max(2, (90 * count) / most)}px` }), ` ${number(count)}`)));
  const rest = sorted.slice(limit).reduce((sum, [, count]) => sum + count, 0);
  return el("ul", { class: "rows" }, rows, rest ? el("li", {}, el("span", { class: "muted" }, `${sorted.length - limit} others`), el("span", { class: "num" }, number(rest))) : null);
}

const tally = (items) => items.reduce((counts, item) => counts.set(item, (counts.get(item) || 0) + 1), new Map());
const computing = (states) => states.filter((s) => s.op === "call_function" || s.op === "call_module");
const opLabel = (state) => (state.op === "call_module" ? `region: ${regionText(state)}` : state.target);

function groupDetails(path) {
  const inside = stageAt(app.stage).order.filter((s) => s.module && (s.module === path || s.module.startsWith(`${path}.`)));
  const position = graph.layout.groups.findIndex((g) => g.path === path && g.kind !== "region");
  const equal = position > 0 && graph.layout.groups[position].kind === "equal" ? graph.layout.groups[position] : null;
  const ops = equal ? leavesOf(graph.layout, -position).map((id) => drawnState(id)) : computing(inside);
  const weights = [...new Set(ops.flatMap((s) => s.inputs))].map((id) => drawnState(id)).filter((s) => s && s.weight);
  return [
    el("h2", { class: "mono" }, path),
    el("p", { class: "muted" }, equal ? `${equal.kids.length} equal modules` : "module", `, ${counted(ops.length, "node")}`),
    facts(["weights", `${counted(weights.length, "weight")}, ${bytes(weights.reduce((sum, s) => sum + (s.bytes || 0), 0))}`]),
    app.tab === "graph" && position > 0 ? el("p", {}, el("button", { class: "link", click: () => { toggleGroup(-position); } }, "open or close it")) : null,
    el("h3", {}, "Ops"),
    bars(tally(ops.map(opLabel)), ops.length),
  ];
}

function stageDetails() {
  const stage = D.stages[app.stage];
  const states = stageAt(app.stage).order;
  const memory = stage.memory;
  const pass = app.stage > 0 ? D.passes[app.stage - 1] : null;
  const diff = app.diff ? D.diffs[app.stage - 1] : null;
  const failed = D.failure && app.stage === LAST;
  const weights = states.filter((s) => s.weight);
  return [
    failed ? el("p", { class: "notice" }, D.failure.error) : !D.ended && app.stage === LAST ? el("p", { class: "notice" }, D.stopped || "The run did not end: what came after this stage failed, its verification for example.") : null,
    el("h2", {}, diff ? `What ${pass ? pass.text : D.failure.text} changed` : `Stage ${stageName(app.stage)}`),
    el("p", { class: "muted" }, stage.title),
    diff ? changeCounts(diff) : null,
    facts(
      ["nodes", `${number(states.length)}: ${number(computing(states).length)} ops, ${number(weights.length)} weights`],
      memory ? ["weights", bytes(memory.weights)] : null,
      memory ? ["peak", `${bytes(memory.peak)} alive${Object.keys(D.symbols).length ? ` at ${symbolText()}` : ""}`] : null,
      pass ? ["error", `${error(pass.error)}${D.captured_error !== null ? `, captured ${error(D.captured_error)}` : ""}`] : app.stage === 0 && D.captured_error !== null ? ["error", `${error(D.captured_error)} (rounding of the captured graph)`] : null,
      pass ? ["time", `${milliseconds(pass.ms)}${pass.verify_ms ? `, verified in ${milliseconds(pass.verify_ms)}` : ""}`] : null,
      D.directory ? ["run it", el("code", {}, `python ${D.directory}/${stage.file}`)] : null,
    ),
    pass ? passFacts(pass) : null,
    diff ? diffLists(diff) : [el("h3", {}, "Ops"), bars(tally(computing(states).map(opLabel)), states.length, 18)],
  ];
}

const changeCounts = (diff) => el("p", {}, [["a", diff.added], ["r", diff.removed], ["m", diff.moved], ["w", diff.rewired], ["t", diff.retyped]].filter(([, some]) => some.length).map(([letter, some]) => el("span", { style: `color:var(--${CHANGES[letter][0]});margin-right:10px` }, `${number(some.length)} ${CHANGES[letter][1]}`)));

function passFacts(pass) {
  const reasons = tally(pass.refusals.map((r) => r.reason));
  return [
    el("h3", {}, `Rewrites: ${number(pass.matched)}`),
    bars(new Map(Object.entries(pass.rules)), pass.matched, 10),
    reasons.size ? [el("h3", {}, `Refused: ${number(pass.refusals.length)}`), el("ul", { class: "rows" }, [...reasons].sort((a, b) => b[1] - a[1]).slice(0, 6).map(([reason, count]) => {
      const first = pass.refusals.find((r) => r.reason === reason);
      return el("li", {}, el("span", {}, `${reason} `, first.node !== null ? nodeLink(first.node, D.passes.indexOf(pass), first.site) : el("span", { class: "mono faint" }, first.site)), el("span", { class: "num" }, `×${count}`));
    }))] : null,
  ];
}

function diffLists(diff) {
  const rows = [["a", diff.added, app.stage], ["r", diff.removed, app.stage - 1], ["w", diff.rewired, app.stage], ["t", diff.retyped, app.stage]];
  return rows.filter(([, some]) => some.length).map(([letter, some, stage]) => {
    const ops = tally(some.map((id) => { const s = stageAt(stage).node.get(id); return s.op === "get_attr" ? "weight" : opLabel(s); }));
    return [el("h3", { style: `color:var(--${CHANGES[letter][0]})` }, `${CHANGES[letter][1]}: ${number(some.length)}`), bars(ops, some.length, 8)];
  });
}
