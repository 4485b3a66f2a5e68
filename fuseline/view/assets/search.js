// Search: every word must occur in the node's name, op, type, module, line or makers.
const query = byId("query"), results = byId("results");
const FOUND = 60;
let hits = [], pick = 0;

function haystack(state) {
  state.hay ||= [state.name, state.target, state.type, state.module, state.line && shortPlace(state.line), state.weight && state.weight.text, ...(state.makers || [])].join(" ").toLowerCase();
  return state.hay;
}

function search(text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return [];
  const scored = [];
  for (const state of stageAt(app.stage).node.values()) {
    const hay = haystack(state);
    if (!words.every((word) => hay.includes(word))) continue;
    const name = state.name.toLowerCase();
    const rank = name === words[0] ? 0 : name.startsWith(words[0]) ? 1 : name.includes(words[0]) ? 2 : 3;
    scored.push({ state, rank: rank + (state.op === "get_attr" ? 0.5 : 0) });
  }
  return scored.sort((a, b) => a.rank - b.rank).map((one) => one.state);
}

function showResults() {
  results.hidden = !query.value.trim();
  query.setAttribute("aria-expanded", String(!results.hidden));
  if (results.hidden) return;
  const rows = hits.slice(0, FOUND).map((state, i) => el("li", { role: "option", id: `hit-${i}`, "aria-selected": String(i === pick), pointerdown: (event) => { event.preventDefault(); take(i); } }, el("span", { class: "mono" }, state.name, el("span", { class: "faint" }, `  ${opName(state) === state.name ? "" : opName(state)}  ${shortType(state.type)}`)), el("span", { class: "muted" }, state.module || (state.op === "get_attr" ? "weight" : ""))));
  if (!hits.length) rows.push(el("li", { class: "none" }, `nothing in stage ${stageName(app.stage)}`));
  else if (hits.length > FOUND) rows.push(el("li", { class: "none" }, `and ${number(hits.length - FOUND)} more: add a word`));
  results.replaceChildren(...rows);
  if (hits.length) query.setAttribute("aria-activedescendant", `hit-${pick}`);
  results.children[pick]?.scrollIntoView({ block: "nearest" });
}

function take(i) {
  const state = hits[i];
  closeSearch();
  if (state) set({ node: state.id, group: null, tab: app.tab === "code" ? "code" : "graph" });
}

function closeSearch() {
  query.value = "";
  hits = [];
  showResults();
  query.blur();
}

query.addEventListener("input", () => {
  hits = search(query.value);
  pick = 0;
  showResults();
});
query.addEventListener("keydown", (event) => {
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    const count = Math.min(hits.length, FOUND);
    if (count) pick = (pick + (event.key === "ArrowDown" ? 1 : count - 1)) % count;
    showResults();
  } else if (event.key === "Enter") take(pick);
  else if (event.key === "Escape") closeSearch();
  else return;
  event.preventDefault();
  event.stopPropagation();
});
query.addEventListener("blur", () => { results.hidden = true; });
query.addEventListener("focus", () => { if (query.value.trim()) showResults(); });
