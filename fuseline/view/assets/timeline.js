// The pipeline along the top: stages, and between them the passes with what they took and did.
function showTimeline() {
  const most = Math.max(1e-9, ...D.passes.map((p) => p.ms + p.verify_ms));
  const parts = [];
  D.stages.forEach((stage, position) => {
    if (position > 0) parts.push(passBlock(position, most));
    const failed = (D.failure || !D.ended) && position === LAST;
    parts.push(el("button", { class: `stage${failed ? " failed" : ""}`, "data-stage": position, "aria-current": String(position === app.stage && !app.diff), title: stage.title, click: () => set({ stage: position, diff: false }) }, el("b", {}, `${position} ${stage.name}`), el("span", { class: "muted num" }, counted(stage.nodes.length, "node"))));
  });
  byId("timeline").replaceChildren(...parts);
  byId("timeline").querySelector('[aria-current="true"], [aria-pressed="true"]')?.scrollIntoView({ block: "nearest", inline: "center" });
}

function passBlock(position, most) {
  const pass = D.passes[position - 1];
  const attributes = { class: "pass", "data-pass": position, "aria-pressed": String(app.diff && position === app.stage), title: "What this pass changed", click: () => set({ stage: position, diff: true }) };
  if (!pass) {
    return el("button", attributes, el("span", {}, el("b", { class: "bad" }, D.failure.pass), el("span", { class: "options" }, "failed")), el("span", { class: "track" }), el("span", { class: "facts num" }, `after ${counted(D.failure.rewrites, "rewrite")}`));
  }
  const options = pass.text.slice(pass.name.length).replace(/^\{|\}$/g, "");
  const share = (ms) => `${(100 * ms) / most}%`;
  return el(
    "button",
    attributes,
    el("span", {}, el("b", {}, pass.name), el("span", { class: `tag ${pass.tier}` }, pass.tier), el("span", { class: "options", title: options }, options)),
    el("span", { class: "track", title: `${milliseconds(pass.ms)}, verified in ${milliseconds(pass.verify_ms)}` }, el("i", { style: `width:${share(pass.ms)}` }), el("i", { style: `left:${share(pass.ms)};width:${share(pass.verify_ms)}` })),
    el("span", { class: "facts num" }, milliseconds(pass.ms), el("span", {}, counted(pass.matched, "site")), pass.refusals.length ? el("span", { class: "warn" }, `${number(pass.refusals.length)} refused`) : null, pass.error !== null ? el("span", { title: "max|Δ| / max|reference| of the outputs after this pass" }, `error ${error(pass.error)}`) : null),
  );
}
