// What the tests ask the page; put into it after it has loaded.
window.probes = (() => {
  const D = JSON.parse(document.getElementById("data").textContent);
  const v = fuselineView;

  /** The middle of a box of the graph on the screen. */
  const middle = (box) => {
    const c = v.graph.camera, r = document.getElementById("canvas").getBoundingClientRect();
    return { x: r.x + c.x + (box.x + box.w / 2) * c.scale, y: r.y + c.y + (box.y + box.h / 2) * c.scale };
  };
  /** A node by its name in the stage that is shown, and where it is. */
  const node = (name) => {
    const state = D.stages[v.app.stage].nodes.map((i) => D.nodes[i]).find((n) => n.name === name);
    return { id: state.id, ...middle(v.boxOf(state.id)) };
  };
  const firstShut = () => {
    const box = v.graph.placed.boxes.find((b) => b.shut);
    return { title: box.title, ...middle(box) };
  };

  /** Elements that reach past the window, or whose text is cut without an ellipsis. */
  const overflow = () => [...document.querySelectorAll("#top *, #timeline *, #bar *, #legend *, #details *")].filter((e) => {
    const r = e.getBoundingClientRect();
    if (!r.width || e.closest("[hidden], svg")) return false;
    const style = getComputedStyle(e);
    if (r.right > innerWidth + 1 && !e.closest("#timeline")) return true; // the timeline scrolls
    if (style.display === "inline" || style.textOverflow === "ellipsis" || style.overflowX !== "hidden") return false;
    return e.scrollWidth > e.clientWidth + 1;
  }).map((e) => e.outerHTML.slice(0, 160));

  const overlaps = () => {
    const parts = "#title, #pipeline, #query, #theme, #keys, .stage, .pass, #tabs, #tools, #legend, #memory";
    const boxes = [...document.querySelectorAll(parts)].map((e) => [e.id || e.innerText, e.getBoundingClientRect()]);
    return boxes.flatMap(([a, r], i) => boxes.slice(i + 1).filter(([, s]) => {
      const width = Math.min(r.right, s.right) - Math.max(r.left, s.left);
      return width > 1 && Math.min(r.bottom, s.bottom) - Math.max(r.top, s.top) > 1;
    }).map(([b]) => `${a} over ${b}`));
  };

  /** Boxes of the graph that lie on one another, other than a group and what is in it. */
  const collisions = () => {
    const leaves = v.graph.placed.boxes.filter((b) => !b.open);
    return leaves.flatMap((a, i) => leaves.slice(i + 1).filter((b) => a.x < b.x + b.w && b.x < a.x + a.w && a.y < b.y + b.h && b.y < a.y + a.h).map((b) => `${a.title} over ${b.title}`));
  };

  /** Pairs of colours that are too near to read (WCAG 2: a ratio of 4.5). */
  const contrast = () => {
    const style = getComputedStyle(document.documentElement);
    const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const light = (name) => {
      context.fillStyle = style.getPropertyValue(`--${name}`);
      context.fillRect(0, 0, 1, 1);
      const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((value) => value / 255)
        .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ratio = (a, b) => {
      const [high, low] = [light(a), light(b)].sort((p, q) => q - p);
      return (high + 0.05) / (low + 0.05);
    };
    const changes = ["added", "removed", "rewired", "retyped", "moved"];
    const pairs = [
      ["text", "panel"], ["text", "back"], ["text", "accent-soft"], ["muted", "panel"], ["muted", "back"],
      ["muted", "raised"], ["muted", "accent-soft"], ["accent", "panel"], ["warn", "panel"], ["faint", "panel"], ["faint", "back"],
      ...changes.flatMap((name) => [[name, "panel"], ["text", `${name}-soft`], ["muted", `${name}-soft`]]),
    ];
    return pairs.map(([a, b]) => [a, b, ratio(a, b)]).filter(([, , found]) => found < 4.5);
  };

  /** Frames a second while the camera moves and zooms. */
  const frames = (ms) => new Promise((done) => {
    const start = performance.now();
    let count = 0;
    const next = () => {
      v.graph.camera.y -= 20;
      v.zoom(count++ % 60 < 30 ? 1.03 : 1 / 1.03);
      if (performance.now() - start < ms) requestAnimationFrame(next);
      else done((1000 * count) / (performance.now() - start));
    };
    requestAnimationFrame(next);
  });

  return { D, node, firstShut, overflow, overlaps, collisions, contrast, frames };
})();
0;
