"""One token: its K experts need no sorting, and nothing but the bytes of their matrices counts.

    up      grid (K, blocks): some gates and ups of one expert for the token → act [K, I]
    down    grid (blocks): some output columns, all K experts at once, weighted and added up → out [1, H]

A program keeps partial sums in registers, [experts, columns, channels], and reduces them once at the end. Where each
expert's words lie, `up` writes down for `down`: places [K], row·4 + slot, one load to wait for where there were two.
"""

from __future__ import annotations

from ...dependent import MARK
from ...dtypes import triton_type
from ..config import next_power_of_two
from ..text import Text, joined, load
from . import words
from .config import RowConfig
from .gate import gated
from .read import Experts, Matrices

CONSTANTS = ("BLOCK_N", "ELEMENTS", "STAGES")


def up_body(experts: Experts, config: RowConfig) -> str:
    text, matrices, width = Text(), experts.gate_up, experts.hidden
    between, other = experts.gate_step
    inside = "inside_n" if experts.inner % config.block_n else None
    with text.indented():
        text.add(
            "choice = tl.program_id(0)",
            "n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)",
            *([f"inside_n = n < {experts.inner}"] if inside else []),
            "expert = tl.load(indices_ptr + choice)",
        )
        if experts.pairs:
            text.add("row = tl.load(rows_ptr + expert)", "slot = tl.load(slots_ptr + expert)")
            with text.block("if tl.program_id(1) == 0:"):
                text.add("tl.store(places_ptr + choice, row * 4 + slot)")
            text.add("row = row.to(tl.int64)")
            words.masks(text, "slot")
        else:
            text.add("row = expert.to(tl.int64)")
        text.add(f"gate_n = n * {between}", f"up_n = gate_n + {other}")
        for name in ("gate", "up"):
            text.add(f"{name}_rows = gate_up_ptr + {_offset(matrices, 'row', f'{name}_n')}[:, None]")
            text.add(f"{name} = tl.zeros((BLOCK_N, ELEMENTS), tl.float32)")
        with _channels(text, matrices, config) as (live, step):
            _token(text, experts, "hidden_ptr", width, live, "[None, :]")
            for name in ("gate", "up"):
                mask = (inside and f"{inside}[:, None]", live and f"{live}[None, :]")
                loaded = load(f"{name}_rows + j[None, :]{step}", mask, "0" if experts.pairs else "0.0")
                _multiply(text, experts, name, loaded)
        text.add(MARK)
        for name in ("gate", "up"):
            text.add(f"{name} = tl.sum({name}, 1)" + (" * scale" if experts.pairs else ""))
        if "gate_up_bias" in experts.tensors:
            for name in ("gate", "up"):
                at = f"gate_up_bias_ptr + expert * {2 * experts.inner} + {name}_n"
                text.add(f"{name} += {load(at, (inside,))}.to(tl.float32)")
        gated(text, experts)
        at = f"act_ptr + choice * {experts.inner} + n"
        text.add(f"tl.store({at}, inner.to({triton_type(experts.dtype)}){joined((inside,))})")
    return str(text)


def down_body(experts: Experts, config: RowConfig) -> str:
    text, matrices, width = Text(), experts.down, experts.inner
    slots = next_power_of_two(experts.top)
    inside = "inside_n" if experts.hidden % config.block_n else None
    chosen = "chosen" if slots != experts.top else None
    with text.indented():
        text.add(
            "n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)",
            *([f"inside_n = n < {experts.hidden}"] if inside else []),
            f"choice = tl.arange(0, {slots})",
            *([f"chosen = choice < {experts.top}"] if chosen else []),
            f"weight = {load('weights_ptr + choice', (chosen,))}.to(tl.float32)",
        )
        if not experts.pairs or "down_bias" in experts.tensors:
            text.add(f"expert = {load('indices_ptr + choice', (chosen,), '0')}")
        if not experts.pairs:
            text.add("row = expert.to(tl.int64)")
        else:
            text.add(f"place = {load('places_ptr + choice', (chosen,), '0')}")
            text.add("row = (place >> 2).to(tl.int64)", "slot = place & 3")
            words.masks(text, "slot")
            text.add("keep = keep[:, None, None]", "sign = sign[:, None, None]", "factor = weight * scale")
        first, last = _offset(matrices, "row", None), _offset(matrices, None, "n")
        text.add(f"down_rows = down_ptr + {first}[:, None, None] + {last}[None, :, None]")
        text.add(f"down = tl.zeros(({slots}, BLOCK_N, ELEMENTS), tl.float32)")
        with _channels(text, matrices, config) as (live, step):
            _token(text, experts, "act_ptr", width, live, "[None, :]", chosen)
            mask = (
                inside and f"{inside}[None, :, None]", live and f"{live}[None, None, :]",
                chosen and f"{chosen}[:, None, None]",
            )  # fmt: skip
            loaded = load(f"down_rows + j[None, None, :]{step}", mask, "0" if experts.pairs else "0.0")
            _multiply(text, experts, "down", loaded, "[:, None, :]")
        text.add(MARK, "down = tl.sum(down, 2)")
        factor = "factor" if experts.pairs else "weight"
        if "down_bias" in experts.tensors:
            at = f"down_bias_ptr + (expert * {experts.hidden})[:, None] + n[None, :]"
            known = (chosen and f"{chosen}[:, None]", inside and f"{inside}[None, :]")
            if experts.pairs:
                text.add("down = down * scale[:, None]")
                factor = "weight"
            text.add(f"down += {load(at, known)}.to(tl.float32)")
        text.add(f"total = tl.sum(down * {factor}[:, None], 0).to({triton_type(experts.dtype)})")
        text.add(f"tl.store(out_ptr + n, total{joined((inside,))})")
    return str(text)


def _offset(matrices: Matrices, row: str | None, n: str | None) -> str:
    """Elements from the start of all matrices to those of `row`, and to their rows n."""
    first, step, _ = (s // 2 for s in matrices.strides) if matrices.words else matrices.strides
    wide = ".to(tl.int64)" if matrices.height * matrices.width >= 2**31 else ""
    parts = [f"{row} * {first}"] if row else []
    parts += [f"{n}{wide} * {step}"] if n else []
    return f"({' + '.join(parts)})"


class _channels:
    """The loop over a row; gives the mask of what lies in it, if one is needed, and the text of a step's stride."""

    def __init__(self, text: Text, matrices: Matrices, config: RowConfig):
        self.text, self.length = text, matrices.width // (2 if matrices.words else 1)
        self.live = "live" if self.length % config.elements else None
        self.step = f" * {matrices.strides[2]}" if matrices.strides[2] != 1 else ""

    def __enter__(self) -> tuple[str | None, str]:
        self.block = self.text.block(f"for j0 in tl.range(0, {self.length}, ELEMENTS, num_stages=STAGES):")
        self.block.__enter__()
        self.text.add("j = j0 + tl.arange(0, ELEMENTS)", *([f"live = j < {self.length}"] if self.live else []))
        return self.live, self.step

    def __exit__(self, *error: object) -> None:
        self.block.__exit__(*error)  # type: ignore[arg-type]


def _token(
    text: Text, experts: Experts, pointer: str, width: int, live: str | None, around: str, chosen: str | None = None
) -> None:
    """Defines x, float32 [1 or experts, ELEMENTS]; with pairs x_left and x_right, of both words of an int32."""
    several = pointer == "act_ptr"
    length = width // 2 if experts.pairs else width
    at = f"{pointer} + (choice * {length})[:, None] + j[None, :]" if several else f"{pointer} + j"
    mask = (live and f"{live}[None, :]", chosen and f"{chosen}[:, None]") if several else (live,)
    shape = "[:, None, :]" if several else around
    if not experts.pairs:
        text.add(f"x = {load(at, mask)}.to(tl.float32){shape}")
        return
    text.add(f"x = {load(at, mask, '0')}")
    left, right = words.halves("x")
    text.add(f"x_left = ({left}){shape}", f"x_right = ({right}){shape}")


def _multiply(text: Text, experts: Experts, name: str, loaded: str, around: str = "") -> None:
    if not experts.pairs:
        text.add(f"{name} += {loaded}.to(tl.float32) * x")
        return
    w = f"w_{name}"
    text.add(f"{w} = {loaded}", f"{w} = {words.numbers(w)}")
    left, right = words.halves(w)
    text.add(f"{name} += {left} * x_left", f"{name} += {right} * x_right")  # two instructions, not three
