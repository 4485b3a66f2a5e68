// The stage as text, a line a node; in a diff with what was removed in its place. Only the lines in sight are made.
const ROW = 20;
const code = { lines: [], box: null, key: "" };

/** Lines of {id, letter, stage}, in the order of the schedule. */
function codeLines() {
  const after = stageAt(app.stage);
  if (!app.diff) return after.order.map((state) => ({ id: state.id, letter: null, stage: app.stage }));
  const before = stageAt(app.stage - 1), status = statusAt(app.stage);
  const moved = new Set(D.diffs[app.stage - 1].moved.map(([outer]) => outer));
  const gone = before.order.filter((s) => !after.node.has(s.id));
  const lines = [];
  let taken = 0;
  const take = (until) => {
    while (taken < gone.length && before.place.get(gone[taken].id) < until) {
      lines.push({ id: gone[taken].id, letter: moved.has(gone[taken].id) ? "m" : "r", stage: app.stage - 1 });
      taken += 1;
    }
  };
  const next = new Array(after.order.length); // where the next node that stayed was
  for (let i = after.order.length - 1, place = Infinity; i >= 0; i--) next[i] = place = before.place.get(after.order[i].id) ?? place;
  for (const [i, state] of after.order.entries()) {
    take(next[i]);
    const letter = status.get(state.id) || null;
    if (letter === "w" || letter === "t") lines.push({ id: state.id, letter, stage: app.stage - 1, old: true });
    lines.push({ id: state.id, letter, stage: app.stage });
  }
  take(Infinity);
  return lines;
}

function showCode() {
  const view = byId("view-code");
  const key = `${app.stage}${app.diff}`;
  if (code.key !== key) {
    code.key = key;
    code.lines = codeLines();
    code.box = el("div", { id: "code-rows", style: `height:${code.lines.length * ROW + 24}px` });
    view.replaceChildren(code.box);
    view.scrollTop = 0;
  }
  if (app.node !== null) {
    const place = code.lines.findIndex((line) => line.id === app.node && !line.old);
    const top = place * ROW;
    if (place >= 0 && (top < view.scrollTop + ROW || top > view.scrollTop + view.clientHeight - 3 * ROW)) view.scrollTop = top - view.clientHeight / 3;
  }
  fillCode();
}

function fillCode() {
  const view = byId("view-code");
  const first = Math.max(0, Math.floor(view.scrollTop / ROW) - 10);
  const last = Math.min(code.lines.length, first + Math.ceil(view.clientHeight / ROW) + 20);
  code.box.replaceChildren(...code.lines.slice(first, last).map((line, i) => codeLine(line, first + i)));
}
byId("view-code").addEventListener("scroll", fillCode, { passive: true });

function codeLine(line, place) {
  const state = stageAt(line.stage).node.get(line.id);
  const sign = { a: "+", r: "−", m: "›", w: line.old ? "−" : "+", t: line.old ? "−" : "+" }[line.letter] || "";
  const letter = line.old ? "r" : line.letter;
  const call = state.op === "placeholder" ? ["input"] : state.op === "get_attr" ? [state.weight ? state.weight.text : state.target] : [el("span", { class: "op" }, state.op === "call_module" ? state.target : state.op === "output" ? "return" : state.target), state.op === "output" ? ` ${state.args}` : `(${state.args})`];
  return el("div", { class: `code-line ${letter || ""} ${line.id === app.node ? "chosen" : ""}`, style: `top:${place * ROW + 8}px`, title: `${state.name}: ${state.type || ""}\n${state.args}`, "data-line": line.id, click: () => set({ node: line.id, group: null }) },
    el("span", { class: "n" }, String(stageAt(line.stage).place.get(line.id) + 1)), el("span", { class: "mark" }, sign), state.op === "output" ? "" : `${state.name} = `, call, el("span", { class: "ty" }, state.type ? `  ${shortType(state.type)}` : ""));
}
