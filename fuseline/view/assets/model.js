// The data, and what is looked up in it. `D` is the page's data; a node is a state: what it is in one stage.
const D = JSON.parse(document.getElementById("data").textContent);
const LAST = D.stages.length - 1;

const byId = (id) => document.getElementById(id);

/** An element: el("p", {class: "muted"}, "text", child). Functions become listeners; null children are left out. */
function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.flat(Infinity).filter((c) => c !== null && c !== undefined && c !== false));
  return made;
}

const number = (value) => value.toLocaleString("en-US");
const counted = (count, one, many = `${one}s`) => `${number(count)} ${count === 1 ? one : many}`;

function bytes(value) {
  if (value === null || value === undefined) return "–";
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (Math.abs(value) >= size) return `${(value / size).toPrecision(3)} ${unit}`;
  }
  return `${value} B`;
}

const milliseconds = (ms) => (ms >= 1000 ? `${(ms / 1000).toPrecision(3)} s` : ms >= 10 ? `${ms.toFixed(0)} ms` : `${ms.toPrecision(2)} ms`);

/** 3.1e-7; "nan" and "inf" are written as words in the data. */
function error(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "string") return value;
  return value === 0 ? "0" : value.toExponential(1);
}

const SHORT = { float64: "f64", float32: "f32", float16: "f16", bfloat16: "bf16", int64: "i64", int32: "i32", int16: "i16", int8: "i8", uint8: "u8" };
const shortType = (type) => (type || "").replace(/\b(?:b?float|u?int)\d+\b/g, (t) => SHORT[t] || t).replace(/, /g, ",");

/** `modeling.py:174` for a place, by the shortest name that tells the file from the others. */
function shortPlace(place) {
  const cut = place.lastIndexOf(":");
  const file = place.slice(0, cut);
  return `${D.files[file] || file.split(/[/\\]/).pop()}${place.slice(cut)}`;
}

const opName = (state) => (state.op === "call_module" ? state.target : state.target.replace(/^(aten|fuseline)\./, "").replace(/\.[^.]*$/, ""));

const KINDS = [
  ["attention", /attention|sdpa/],
  ["quantize", /quantize|choose_qparams/],
  ["matmul", /linear|matmul|\bmm|bmm|addmm|einsum|convolution|conv\d/],
  ["norm", /norm|softmax|mean|sum|amax|amin|var|cumsum|argmax|logsumexp|max_pool|avg_pool/],
  ["shape", /view|reshape|transpose|permute|expand|unsqueeze|squeeze|slice|select|split|chunk|cat\b|stack|flatten|unflatten|clone|contiguous|repeat|alias|_to_copy|\bto\b|narrow|index|gather|scatter|copy_|movedim|roll|flip|pad/],
  ["create", /arange|zeros|ones|full|empty|scalar_tensor|rand|eye|tril|triu|embedding|lift/],
];
/** What sort of op a node is, for its colour. */
function kindOf(state) {
  if (state.kind) return state.kind;
  let kind = "pointwise";
  if (state.op === "call_module") kind = "region";
  else if (state.op !== "call_function") kind = "io";
  else kind = (KINDS.find(([, pattern]) => pattern.test(state.target)) || ["pointwise"])[0];
  return (state.kind = kind);
}
const KIND_NAMES = { matmul: "matmul", attention: "attention", norm: "norm, reduction", pointwise: "pointwise", shape: "shape, index", create: "creation", quantize: "quantize", region: "fused region", io: "input, output" };

/** One stage: its nodes in order (those of regions behind their call, too), and who reads whom. */
class Stage {
  constructor(position) {
    this.position = position;
    this.order = D.stages[position].nodes.map((i) => D.nodes[i]);
    this.node = new Map();
    this.place = new Map();
    this.users = new Map();
    this.order.forEach((state, place) => {
      this._add(state, place);
      for (const i of state.region ? state.region.nodes : []) this._add(D.nodes[i], place);
    });
  }

  _add(state, place) {
    this.node.set(state.id, state);
    this.place.set(state.id, place);
    for (const input of new Set(state.inputs)) {
      if (!this.users.has(input)) this.users.set(input, []);
      this.users.get(input).push(state.id);
    }
  }

  usersOf(id) {
    return this.users.get(id) || [];
  }
}
const stages = [];
const stageAt = (position) => (stages[position] ||= new Stage(position));

const actionOf = new Map(D.actions.map((a) => [a.number, a]));
const anyState = new Map(D.nodes.map((state) => [state.id, state]));
const kernelsOfRegion = new Map();
const eagerReason = new Map();
for (const kernel of D.kernels ? D.kernels.kernels : []) {
  for (const region of kernel.regions) kernelsOfRegion.set(region, [...(kernelsOfRegion.get(region) || []), kernel]);
}
for (const { region, reason } of D.kernels ? D.kernels.eager : []) eagerReason.set(region, reason);

const refusalsOf = new Map();
D.passes.forEach((pass, position) => {
  for (const refusal of pass.refusals) {
    if (refusal.node === null) continue;
    const entry = { pass, position, reason: refusal.reason };
    refusalsOf.set(refusal.node, [...(refusalsOf.get(refusal.node) || []), entry]);
  }
});

/** What stands for a node after the rewrite that took it away; null where nothing does. */
function successor(id) {
  const action = actionOf.get(D.gone[id]);
  if (!action) return null;
  const pair = action.replaced.find(([old]) => old === id);
  const region = action.created.find((made) => anyState.get(made)?.region);
  const copy = region !== undefined && anyState.get(region).region.nodes.map((i) => D.nodes[i]).find((n) => n.name === anyState.get(id)?.name);
  const root = action.replaced.find(([old]) => old === action.root) || action.replaced[0];
  const to = copy ? copy.id : pair ? pair[1] : region !== undefined ? region : root ? root[1] : null;
  return { action, to };
}

/** The rewrites that lead from a node to what is left of it in the last stage: [{action, to}], and that node's id. */
function fate(id) {
  const steps = [];
  let at = id;
  while (at !== null && !stageAt(LAST).node.has(at) && steps.length < 50) {
    const next = successor(at);
    if (!next) return { steps, end: null };
    steps.push(next);
    at = next.to;
  }
  return { steps, end: at };
}

/** What runs a node of the last stage: {region, kernels, reason}, region null where it is PyTorch's op by itself. */
function runner(id) {
  let state = stageAt(LAST).node.get(id);
  if (state && state.target === "getitem") state = stageAt(LAST).node.get(state.inputs[0]);
  if (state && state.inside !== undefined) state = stageAt(LAST).node.get(state.inside);
  if (!state || !state.region) return { region: null, kernels: [], reason: null };
  return { region: state, kernels: kernelsOfRegion.get(state.target) || [], reason: eagerReason.get(state.target) || null };
}

/** Letters of what changed from stage `position - 1`: a added, r removed, w rewired, t retyped, m moved into a region. */
const statuses = [];
function statusAt(position) {
  if (statuses[position]) return statuses[position];
  const found = new Map();
  const diff = D.diffs[position - 1];
  if (diff) {
    diff.rewired.forEach((id) => found.set(id, "w"));
    diff.retyped.forEach((id) => found.set(id, "t"));
    diff.added.forEach((id) => found.set(id, "a"));
    diff.removed.forEach((id) => found.set(id, "r"));
    diff.moved.forEach(([, inner]) => found.set(inner, "m"));
  }
  return (statuses[position] = found);
}
const CHANGES = { a: ["added", "added"], r: ["removed", "removed"], w: ["rewired", "rewired"], t: ["retyped", "retyped"], m: ["moved", "moved into a region"] };
