// From rows to places: how large each group is with what is open in it, and where everything lies.
const PAD = 14, HEAD = 26, FOOT = 10, GAP_X = 16, GAP_Y = 20, LANE = 9, LEAF_H = 38, SHUT_H = 46;
const SWEEPS = 10;

const ruler = document.createElement("canvas").getContext("2d");
const FONTS = {
  title: '600 12px system-ui, -apple-system, "Segoe UI", Roboto, Arial, "Liberation Sans", sans-serif',
  small: '11px ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace',
};
const widths = new Map();
function textWidth(text, font) {
  const key = font + text;
  if (!widths.has(key)) {
    ruler.font = FONTS[font];
    widths.set(key, ruler.measureText(text).width);
  }
  return widths.get(key);
}

/** Cuts a text to a width, with an ellipsis. */
function fitted(text, font, width) {
  if (textWidth(text, font) <= width) return text;
  let low = 0, high = text.length;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (textWidth(`${text.slice(0, middle)}…`, font) <= width) low = middle;
    else high = middle - 1;
  }
  return `${text.slice(0, low)}…`;
}

/**
 * Where the boxes and lines of a layout are.
 *
 * layout: groups of `layout.py`; open: positions of open groups; describe(item, group): {title, text} of a box, where
 * item is a leaf's id or −position of a group. Gives boxes (parents before their kids), lines (ends: the items of their
 * group that they lead to, null for what is outside), width, height.
 */
function placed(layout, open, describe) {
  const made = new Map();

  const leafItem = (code, group) => {
    const { title, text } = describe(code, group);
    const w = Math.min(236, Math.max(64, Math.ceil(Math.max(textWidth(title, "title"), textWidth(text, "small"))) + 24));
    return { code, w, h: LEAF_H, title: fitted(title, "title", w - 22), text: fitted(text, "small", w - 20), port: () => w / 2 };
  };
  const shutItem = (code, group) => {
    const { title, text } = describe(code, group);
    const w = Math.min(260, Math.max(110, Math.ceil(Math.max(textWidth(title, "title"), textWidth(text, "small"))) + 44));
    return { code, w, h: SHUT_H, shut: true, title: fitted(title, "title", w - 42), text: fitted(text, "small", w - 24), port: () => w / 2 };
  };

  const openItem = (code, parent) => {
    const group = layout.groups[-code];
    const items = new Map(group.kids.map((kid) => [kid, kid > 0 ? leafItem(kid, group) : item(kid, group)]));
    const lane = (value, row) => ({ lane: value, row, w: LANE, h: 0, port: () => LANE / 2 });
    const rows = [group.ins.map((v) => lane(v, 0)), ...group.rows.map((row, r) => row.map((one) => (Array.isArray(one) ? lane(one[0], r + 1) : items.get(one)))), group.outs.map((v) => lane(v, group.rows.length + 1))];
    const rowOf = new Map();
    rows.forEach((row, r) => row.forEach((one) => { one.row = r; if (one.code !== undefined) rowOf.set(one.code, one); }));
    const lanes = rows.map((row) => new Map(row.filter((one) => one.lane !== undefined).map((one) => [one.lane, one])));
    const links = [];
    for (const [value, from, tos] of group.edges) {
      const source = from === null ? lanes[0].get(value) : rowOf.get(from);
      const ends = tos.map((to) => (to === null ? lanes[rows.length - 1].get(value) : rowOf.get(to)));
      let upper = source;
      for (let r = source.row + 1; r < rows.length; r++) {
        for (const end of ends) if (end.row === r) links.push({ value, upper, lower: end, ends: [end.code ?? null] });
        const through = lanes[r].get(value);
        if (!through) break;
        if (ends.includes(through)) continue;
        links.push({ value, upper, lower: through, ends: ends.filter((end) => end.row > r).map((end) => end.code ?? null) });
        upper = through;
      }
    }
    align(rows, links);
    const left = Math.min(...rows.flat().map((one) => one.x)), right = Math.max(...rows.flat().map((one) => one.x + one.w));
    const { title } = describe(code, parent);
    const head = code === 0 ? 0 : HEAD;
    const w = Math.max(right - left + 2 * PAD, code === 0 ? 0 : textWidth(title, "title") + 64);
    const shift = (w - (right - left)) / 2 - left;
    let y = head + 4;
    const bands = rows.map((row, r) => {
      const h = Math.max(0, ...row.map((one) => one.h));
      const band = { top: y, bottom: y + h };
      y += h + (r === rows.length - 1 ? FOOT : r === 0 || r === rows.length - 2 ? GAP_Y * 0.6 : GAP_Y);
      return band;
    });
    rows.forEach((row, r) => row.forEach((one) => {
      one.x += shift;
      one.y = bands[r].top + (bands[r].bottom - bands[r].top - one.h) / 2;
    }));
    const port = (value, out) => {
      const found = lanes[out ? rows.length - 1 : 0].get(value);
      return found ? found.x + LANE / 2 : w / 2;
    };
    return { code, w, h: y, title: fitted(title, "title", w - 48), text: "", open: true, items: [...items.values()], links, bands, last: rows.length - 1, port };
  };
  const item = (code, parent) => {
    const result = open.has(-code) ? openItem(code, parent) : shutItem(code, parent);
    made.set(code, result);
    return result;
  };

  const root = openItem(0, null);
  const boxes = [], lines = [];
  const walk = (one, x, y, depth, parent) => {
    const box = { code: one.code, x, y, w: one.w, h: one.h, depth, parent, title: one.title, text: one.text, shut: !!one.shut, open: !!one.open };
    boxes.push(box);
    if (!one.open) return;
    for (const { value, upper, lower, ends } of one.links) {
      const x0 = x + upper.x + upper.port(value, true), x1 = x + lower.x + lower.port(value, false);
      const y0 = y + (upper.lane === undefined ? upper.y + upper.h : upper.row === 0 ? 0 : one.bands[upper.row].top);
      const y1 = y + (lower.lane === undefined ? lower.y : lower.row === one.last ? one.h : one.bands[lower.row].top);
      lines.push({ value, ends, group: one.code, x0, y0, bend: y + one.bands[upper.row].bottom, x1, y1, enter: y + one.bands[lower.row].top });
    }
    for (const kid of one.items) walk(kid, x + kid.x, y + kid.y, depth + 1, box);
  };
  walk(root, 0, 0, 0, null);
  return { boxes, lines, width: root.w, height: root.h, byCode: new Map(boxes.map((box) => [box.code, box])) };
}

/** Sets x of every item: near what it is linked to, in its row's order and without overlap. */
function align(rows, links) {
  for (const row of rows) {
    let x = 0;
    for (const one of row) { one.x = x; x += one.w + gap(one); }
    const shift = x / 2;
    for (const one of row) one.x -= shift;
  }
  const up = new Map(), down = new Map();
  for (const link of links) {
    if (!up.has(link.lower)) up.set(link.lower, []);
    if (!down.has(link.upper)) down.set(link.upper, []);
    up.get(link.lower).push(link);
    down.get(link.upper).push(link);
  }
  const wanted = (one, linked, isUp) => {
    let sum = 0, weight = 0;
    for (const { value, upper, lower } of linked) {
      const other = isUp ? upper : lower;
      const pull = one.lane !== undefined && other.lane !== undefined ? 6 : 1; // lanes are to be straight
      // Large boxes stand centred above one another: ports would let a chain of layers drift to one side.
      const large = one.open && other.open;
      sum += pull * (large ? other.x + (other.w - one.w) / 2 : other.x + other.port(value, isUp) - one.port(value, !isUp));
      weight += pull;
    }
    return sum / weight;
  };
  for (let sweep = 0; sweep < SWEEPS; sweep++) {
    const downwards = sweep % 2 === 0;
    for (let i = 0; i < rows.length; i++) {
      const row = rows[downwards ? i : rows.length - 1 - i];
      const goals = row.map((one) => {
        const linked = (downwards ? up : down).get(one) || (sweep > 1 ? (downwards ? down : up).get(one) : null);
        if (!linked) return { x: one.x, weight: 0.1 };
        const isUp = linked === up.get(one);
        return { x: wanted(one, linked, isUp), weight: one.lane !== undefined ? 4 : 1 };
      });
      spread(row, goals);
    }
  }
}

const gap = (one) => (one.lane !== undefined ? 5 : GAP_X);

/** The places nearest to the wanted ones (least squares) that keep order and distance: pooled adjacent violators. */
function spread(row, goals) {
  const blocks = [];
  let offset = 0;
  row.forEach((one, i) => {
    blocks.push({ sum: (goals[i].x - offset) * goals[i].weight, weight: goals[i].weight, count: 1 });
    while (blocks.length > 1) {
      const last = blocks[blocks.length - 1], before = blocks[blocks.length - 2];
      if (before.sum / before.weight <= last.sum / last.weight) break;
      before.sum += last.sum;
      before.weight += last.weight;
      before.count += last.count;
      blocks.pop();
    }
    offset += one.w + gap(one);
  });
  let i = 0, x = 0;
  for (const block of blocks) {
    for (let k = 0; k < block.count; k++, i++) {
      row[i].x = block.sum / block.weight + x;
      x += row[i].w + gap(row[i]);
    }
  }
}
