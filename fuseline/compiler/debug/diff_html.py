"""A difference side by side, as one HTML page that needs neither server nor network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from .diff import Difference, Row
from .diff_text import region_lines, short_line, summary
from .shown import Shown

AROUND = 3
_STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1f2328; --soft: #6e7781; --line: #d8dee4;
  --removed: #ffebe9; --added: #dafbe1; --changed: #fff8c5; --head: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --bg: #0d1117; --fg: #e6edf3; --soft: #8b949e; --line: #30363d;
  --removed: #4b1a1d; --added: #123820; --changed: #3d3207; --head: #161b22; } }
body { margin: 0; background: var(--bg); color: var(--fg); font: 13px/1.5 system-ui, sans-serif; }
header { position: sticky; top: 0; padding: 10px 16px; background: var(--head); border-bottom: 1px solid var(--line);
  z-index: 1; }
header p { margin: 4px 0 0; } h1 { margin: 0; font-size: 15px; }
header label { margin-right: 12px; } header input[type=search] { width: 22em; font: inherit; }
table { width: 100%; border-collapse: collapse; table-layout: fixed; font: 12px/1.5 ui-monospace, monospace; }
td { padding: 1px 8px; vertical-align: top; overflow-wrap: anywhere; width: 50%; }
td + td { border-left: 1px solid var(--line); }
td small { color: var(--soft); } .made { color: var(--soft); }
tr.removed td:first-child, tr.replaced td:first-child { background: var(--removed); }
tr.added td:last-child, tr.replaced td:last-child { background: var(--added); }
tr.changed td { background: var(--changed); }
tr.place td { background: var(--head); color: var(--soft); width: 100%; border-top: 1px solid var(--line); }
tr.fold td { color: var(--soft); text-align: center; cursor: pointer; width: 100%; }
tr.fold td:hover { text-decoration: underline; }
tr.current td { outline: 2px solid #0969da; outline-offset: -2px; }
.hidden, .filtered { display: none; }
"""
_SCRIPT = """
const rows = [...document.querySelectorAll('tr[data-kinds]')];
let current = -1;
function filter() {
  const off = new Set([...document.querySelectorAll('input[data-kind]')].filter(b => !b.checked)
    .map(b => b.dataset.kind));
  const words = document.getElementById('words').value.toLowerCase();
  for (const row of rows) {
    const shown = row.dataset.kinds.split(' ').some(k => !off.has(k)) && row.textContent.toLowerCase().includes(words);
    row.classList.toggle('filtered', !shown);
  }
  for (const place of document.querySelectorAll('tr.place')) {
    let next = place.nextElementSibling, any = false;
    while (next && !next.matches('.place') && !any) {
      any = next.matches('[data-kinds]') && !next.matches('.filtered');
      next = next.nextElementSibling;
    }
    place.classList.toggle('filtered', !any);
  }
}
function go(by) {
  const seen = rows.filter(r => !r.matches('.filtered'));
  if (!seen.length) return;
  current = (current + by + seen.length) % seen.length;
  document.querySelectorAll('.current').forEach(r => r.classList.remove('current'));
  seen[current].classList.add('current');
  seen[current].scrollIntoView({block: 'center'});
}
document.querySelectorAll('input').forEach(i => i.addEventListener('input', filter));
document.addEventListener('keydown', e => {
  if (e.target.matches?.('input[type=search]')) return;
  if (e.key === 'n' || e.key === 'j') go(1);
  if (e.key === 'p' || e.key === 'k') go(-1);
});
document.querySelectorAll('tr.fold').forEach(fold => fold.addEventListener('click', () => {
  document.querySelectorAll(`tr[data-fold="${fold.id}"]`).forEach(r => r.classList.remove('hidden'));
  fold.remove();
}));
"""


def page(difference: Difference, before: str, after: str) -> str:
    """The whole page; unchanged nodes are folded, `n` and `p` go from change to change."""
    boxes = "".join(
        f'<label><input type="checkbox" data-kind="{kind}" checked> {count} {kind}</label>'
        for kind, count in difference.counts().items()
    )
    regions = "".join(f"<p>{escape(line)}</p>" for line in region_lines(difference))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(before)} → {escape(after)}</title>
<style>{_STYLE}</style></head><body>
<header><h1>{escape(before)} → {escape(after)}</h1>
<p>{escape(summary(difference))}</p>{regions}
<p>{boxes}<input type="search" id="words" placeholder="op, module, name, line"> n, p: next, previous change</p></header>
<table><tbody>
{chr(10).join(_rows(difference.rows))}
</tbody></table>
<script>{_SCRIPT}</script>
</body></html>
"""


def _rows(rows: Sequence[Row]) -> Iterator[str]:
    near = {j for i, row in enumerate(rows) if row.change for j in range(i - AROUND, i + AROUND + 1)}
    fold, place = 0, None
    for position, row in enumerate(rows):
        if position not in near and (position == 0 or position - 1 in near):
            fold += 1
            end = next((i for i in range(position, len(rows)) if i in near), len(rows))
            yield f'<tr class="fold" id="fold{fold}"><td colspan="2">{end - position} unchanged nodes</td></tr>'
        if row.change is not None and (here := f"{row.change.module}  {short_line(row.change.line)}".strip()) != place:
            place = here
            yield f'<tr class="place"><td colspan="2">{escape(here) or "(no module)"}</td></tr>'
        hidden = "" if position in near else f' class="hidden" data-fold="fold{fold}"'
        yield _row(row, hidden)


def _row(row: Row, hidden: str) -> str:
    change = row.change
    if change is None:
        return f"<tr{hidden}>{_cell(row.before or row.after)}{_cell(row.after)}</tr>"
    first = change.kinds[0]
    look = first if first in ("removed", "added", "replaced") else "changed"
    note = "; ".join(change.details) if look == "changed" or len(change.kinds) > 1 else ""
    kinds = " ".join(change.kinds)
    return f'<tr class="{look}" data-kinds="{kinds}">{_cell(row.before, True)}{_cell(row.after, True, note)}</tr>'


def _cell(shown: Shown | None, whole: bool = False, note: str = "") -> str:
    if shown is None:
        return "<td></td>"
    where = escape(" · ".join(filter(None, (shown.module, shown.line))))
    text = f'<td title="{where}">{escape(f"{shown.name} = {shown.text}")}'
    if whole:
        made = f" by {', '.join(shown.made_by)}" if shown.made_by else ""
        text += f" <small>{escape(shown.value + made)}</small>"
    return text + (f"<br><small>{escape(note)}</small>" if note else "") + "</td>"
