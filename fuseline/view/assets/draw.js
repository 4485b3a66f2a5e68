// Paints placed boxes and lines on the canvas: only what is in sight, and texts only where they can be read.
const READABLE = 5.2; // pixels of height below which no text is drawn

let colours = {};
function readColours() {
  const style = getComputedStyle(document.documentElement);
  colours = new Proxy({}, { get: (known, name) => (known[name] ||= style.getPropertyValue(`--${name}`).trim()) });
}

/**
 * scene: {placed, camera: {x, y, scale}, status: id → letter, chosen, sources: Set of values read by what is chosen,
 * own: Set of values that it gives, leads(line), near: Set of boxes, over, change(line), info(code) → {kind, parts}}.
 */
function paint(canvas, scene) {
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const ctx = canvas.getContext("2d", { alpha: false });
  ctx.setTransform(1, 0, 0, 1, 0, 0);
  ctx.fillStyle = colours.back;
  ctx.fillRect(0, 0, canvas.width, canvas.height);
  const { x, y, scale } = scene.camera;
  ctx.setTransform(ratio * scale, 0, 0, ratio * scale, ratio * x, ratio * y);
  const sight = { left: -x / scale, top: -y / scale, right: (width - x) / scale, bottom: (height - y) / scale };
  const seen = scene.placed.boxes.filter((b) => b.x < sight.right && b.x + b.w > sight.left && b.y < sight.bottom && b.y + b.h > sight.top);
  for (const box of seen) if (box.open && box.code !== 0) paintOpen(ctx, box, scene);
  paintLines(ctx, scene, sight);
  const text = 12 * scale >= READABLE;
  const leaves = seen.filter((box) => !box.open);
  if (text) for (const box of leaves) paintBox(ctx, box, scene);
  else paintSmall(ctx, leaves, scene);
  if (text) for (const box of seen) if (box.open && box.code !== 0) paintTitle(ctx, box, scene);
}

function paintOpen(ctx, box, scene) {
  const info = scene.info(box.code);
  const status = scene.status.get(info.node);
  ctx.beginPath();
  ctx.roundRect(box.x, box.y, box.w, box.h, 8);
  ctx.fillStyle = status ? colours[`${CHANGES[status][0]}-soft`] : box.depth % 2 ? colours.raised : colours.back;
  ctx.fill();
  ctx.lineWidth = scene.chosen === box.code ? 2 : 1;
  ctx.strokeStyle = scene.chosen === box.code ? colours.accent : info.region ? colours["op-region"] : scene.over === box.code ? colours.strong : colours.line;
  ctx.stroke();
}

function paintTitle(ctx, box, scene) {
  const info = scene.info(box.code);
  ctx.font = FONTS.title;
  ctx.textBaseline = "middle";
  const status = scene.status.get(info.node);
  ctx.fillStyle = status ? colours[`${CHANGES[status][0]}-soft`] : box.depth % 2 ? colours.raised : colours.back;
  ctx.fillRect(box.x + 22, box.y + 4, textWidth(box.title, "title") + 8, 18);
  toggle(ctx, box.x + 14, box.y + 13, true);
  ctx.fillStyle = info.region ? colours["op-region"] : colours.muted;
  ctx.fillText(box.title, box.x + 25, box.y + 13);
}

function toggle(ctx, x, y, open) {
  ctx.beginPath();
  if (open) { ctx.moveTo(x - 4, y - 2.5); ctx.lineTo(x + 4, y - 2.5); ctx.lineTo(x, y + 3.5); }
  else { ctx.moveTo(x - 2.5, y - 4); ctx.lineTo(x + 3.5, y); ctx.lineTo(x - 2.5, y + 4); }
  ctx.closePath();
  ctx.fillStyle = colours.muted;
  ctx.fill();
}

function paintBox(ctx, box, scene) {
  const info = scene.info(box.code);
  const status = info.node === undefined ? null : scene.status.get(info.node);
  const change = status ? CHANGES[status][0] : null;
  const chosen = scene.chosen === box.code;
  if (info.equal) {
    for (const shift of [6, 3]) {
      ctx.beginPath();
      ctx.roundRect(box.x + shift, box.y + shift, box.w, box.h, 6);
      ctx.fillStyle = colours.panel;
      ctx.fill();
      ctx.lineWidth = 1;
      ctx.strokeStyle = colours.line;
      ctx.stroke();
    }
  }
  ctx.beginPath();
  ctx.roundRect(box.x, box.y, box.w, box.h, 6);
  ctx.fillStyle = change ? colours[`${change}-soft`] : chosen ? colours["accent-soft"] : colours.panel;
  ctx.fill();
  ctx.lineWidth = chosen ? 2 : 1;
  ctx.strokeStyle = chosen ? colours.accent : scene.near.has(box.code) ? colours.accent : change ? colours[change] : scene.over === box.code ? colours.strong : colours.line;
  ctx.setLineDash(status === "r" ? [4, 3] : []);
  ctx.stroke();
  ctx.setLineDash([]);
  ctx.textBaseline = "middle";
  if (box.shut) {
    toggle(ctx, box.x + 13, box.y + 15, false);
    ctx.font = FONTS.title;
    ctx.fillStyle = colours.text;
    ctx.fillText(box.title, box.x + 24, box.y + 15);
    ctx.font = FONTS.small;
    ctx.fillStyle = colours.muted;
    ctx.fillText(box.text, box.x + 10, box.y + 31);
    paintParts(ctx, box, info.parts);
  } else {
    ctx.fillStyle = change ? colours[change] : colours[`op-${info.kind}`];
    ctx.beginPath();
    ctx.roundRect(box.x + 4, box.y + 5, 4, box.h - 10, 2);
    ctx.fill();
    ctx.font = FONTS.title;
    ctx.fillStyle = colours.text;
    ctx.fillText(box.title, box.x + 14, box.y + 13.5);
    ctx.font = FONTS.small;
    ctx.fillStyle = colours.muted;
    ctx.fillText(box.text, box.x + 14, box.y + 27.5);
  }
  if (info.refused) {
    ctx.beginPath();
    ctx.arc(box.x + box.w - 7, box.y + 7, 3, 0, 7);
    ctx.fillStyle = colours.warn;
    ctx.fill();
  }
}

/** What a shut group holds: a strip with a share for each sort of op, or for each change in a diff. */
function paintParts(ctx, box, parts) {
  let x = box.x + 8;
  const whole = box.w - 16, sum = parts.reduce((total, part) => total + part.count, 0) || 1;
  for (const { colour, count } of parts) {
    const w = (whole * count) / sum;
    ctx.fillStyle = colours[colour];
    ctx.fillRect(x, box.y + box.h - 6, Math.max(w - 0.75, 0.5), 3);
    x += w;
  }
}

/** Far away: boxes as plain rectangles, one path a colour. */
function paintSmall(ctx, boxes, scene) {
  const byColour = new Map();
  for (const box of boxes) {
    const info = scene.info(box.code);
    const status = info.node === undefined ? null : scene.status.get(info.node);
    const name = scene.chosen === box.code || scene.near.has(box.code) ? "accent" : status ? CHANGES[status][0] : box.shut ? "strong" : `op-${info.kind}`;
    if (!byColour.has(name)) byColour.set(name, []);
    byColour.get(name).push(box);
  }
  for (const [name, some] of byColour) {
    ctx.beginPath();
    for (const box of some) ctx.rect(box.x, box.y, box.w, box.h);
    ctx.globalAlpha = name === "accent" ? 1 : 0.75;
    ctx.fillStyle = colours[name];
    ctx.fill();
  }
  ctx.globalAlpha = 1;
}

function paintLines(ctx, scene, sight) {
  const sets = { plain: [], in: [], out: [], a: [], r: [], w: [] };
  for (const line of scene.placed.lines) {
    if (Math.max(line.x0, line.x1) < sight.left || Math.min(line.x0, line.x1) > sight.right || line.y1 < sight.top || line.y0 > sight.bottom) continue;
    const kind = scene.own.has(line.value) ? "out" : scene.sources.has(line.value) && scene.leads(line) ? "in" : scene.change(line);
    sets[kind].push(line);
  }
  const thin = Math.max(1, 0.7 / scene.camera.scale);
  const styles = { plain: [colours.strong, thin, []], a: [colours.added, thin * 1.2, []], w: [colours.rewired, thin * 1.2, []], r: [colours.removed, thin, [4, 3]], in: [colours.accent, thin * 1.8, []], out: [colours["op-quantize"], thin * 1.8, []] };
  const straight = scene.camera.scale < 0.3;
  for (const kind of Object.keys(sets)) {
    if (!sets[kind].length) continue;
    const [colour, lineWidth, dash] = styles[kind];
    ctx.beginPath();
    for (const { x0, y0, bend, enter, x1, y1 } of sets[kind]) {
      ctx.moveTo(x0, y0);
      if (Math.abs(x0 - x1) < 0.5) { ctx.lineTo(x1, y1); continue; }
      if (bend > y0) ctx.lineTo(x0, bend);
      const middle = (bend + enter) / 2;
      if (straight) ctx.lineTo(x1, enter);
      else ctx.bezierCurveTo(x0, middle, x1, middle, x1, enter);
      if (y1 > enter) ctx.lineTo(x1, y1);
    }
    ctx.strokeStyle = colour;
    ctx.lineWidth = lineWidth;
    ctx.setLineDash(dash);
    ctx.stroke();
  }
  ctx.setLineDash([]);
}
