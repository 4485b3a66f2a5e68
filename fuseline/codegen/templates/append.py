"""The template of what a step adds to a cache: one kernel that turns queries and keys, and puts keys and values away.

    program (sequence and token, i): the i-th ROWS heads of queries; behind those, of keys and values

A row beyond the cache's capacity is not written, and the queries of its token become NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from ...compiler.ops import rotary
from ...compiler.traits import arguments
from ..about import about
from ..dtypes import compute_dtype, is_supported, pointer_type, triton_type
from ..kernel import BufferUse, Kernel, Launcher, Out, Refusal
from ..kernel_text import call
from ..sizes import shape
from .cached_update import launch
from .config import next_power_of_two
from .text import Names, Text, load

WARPS = 4
ROWS = 8
aten = torch.ops.aten


@dataclass(frozen=True)
class _Append:
    """keys, values: the writes; turned: the rotation of the keys, or None; queries: that of the queries, or None;
    at: the positions or, where `counted`, how many tokens were there."""

    keys: Node
    values: Node
    turned: Node | None
    queries: Node | None
    at: Node
    counted: bool

    @property
    def tensors(self) -> dict[str, Node]:
        """What the kernel reads and writes, apart from the result."""
        k, v = arguments(self.keys), arguments(self.values)
        found = {"k": k["source"] if self.turned is None else self.turned.args[0], "v": v["source"]}
        if self.turned is not None:
            found |= dict(zip(("cos", "sin"), self.turned.args[1:]))  # type: ignore[arg-type]
        if self.queries is not None:
            found["q"] = self.queries.args[0]
        return found | {"keys": k["self"], "values": v["self"], "at": self.at}  # type: ignore[dict-item]


def emit_append(region: GraphModule, name: str) -> Launcher | Refusal:
    """The kernel of a region of two `index_copy_` and what is computed for them, and its host function `name`."""
    found = _analyse(region)
    if isinstance(found, Refusal):
        return found
    source, parameters = _kernel(f"{name}_kernel", found)
    tensors = found.tensors
    dtype = tensors["k"].meta["val"].dtype
    types = {f"{a}_ptr": pointer_type(n.meta["val"].dtype) for a, n in tensors.items()} | {
        "out_ptr": pointer_type(dtype)
    }
    written = ("keys", "values")
    uses = [BufferUse(f"{a}_ptr", n.name, "write" if a in written else "read") for a, n in tensors.items()]
    if found.queries is not None:
        uses.append(BufferUse("out_ptr", found.queries.name, "write"))
    nodes = [n for n in region.graph.nodes if n.op == "call_function"]
    kernel = Kernel(
        f"{name}_kernel",
        source,
        {p: "constexpr" if p == "ROWS" else types.get(p, "i32") for p in parameters},
        {"ROWS": ROWS},
        *about(nodes),
        WARPS,
        1,
        tuple(uses),
    )
    results = list(region.graph.output_node().all_input_nodes)
    outs: tuple[Out, ...] = ()
    if found.queries is not None:
        outs = (Out("out", results.index(found.queries), shape(found.queries), None, dtype),)
    return Launcher(name, _host(region, found, name, kernel), (kernel,), outs=outs)


def _analyse(region: GraphModule) -> _Append | Refusal:
    calls = [n for n in region.graph.nodes if n.op == "call_function"]
    writes = [n for n in calls if n.target is aten.index_copy_.default]
    turns = [n for n in calls if n.target is rotary.overload]
    if len(writes) != 2 or len(turns) > 2:
        return Refusal("the region is not what a step adds to the keys and values of one cache")
    keys, values = writes
    turned = next((n for n in turns if arguments(keys)["source"] is n), None)
    queries = next((n for n in turns if n is not turned), None)
    at = arguments(values)["index"]
    rest = [n for n in calls if n not in (*writes, *turns)]
    counted = at in rest
    if counted:
        at = next(n for n in at.all_input_nodes if n.target is not aten.arange.default)
    found = _Append(keys, values, turned, queries, at, counted)
    for name, node in found.tensors.items():
        value = node.meta["val"]
        if not is_supported(value.dtype):
            return Refusal(f"{name} of {value.dtype}")
        if name != "at" and not isinstance(value.shape[-1], int):
            return Refusal(f"{name} has a symbolic size of heads")
    return found


def _kernel(name: str, found: _Append) -> tuple[str, list[str]]:
    """The source and its parameters. Grid: (sequences times tokens, groups of heads)."""
    tensors = found.tensors
    strided = [a for a in (*tensors, *(["out"] if found.queries else [])) if a != "at"]
    parameters = [*(f"{a}_ptr" for a in tensors), *(["out_ptr"] if found.queries else [])]
    parameters += [f"{a}_s{i}" for a in strided for i in range(4) if not (a in ("cos", "sin") and i == 1)]
    parameters += ["at_s", "S", "T", "heads", *(["query_heads", "groups"] if found.queries else []), "ROWS"]
    head, head_v = (tensors[a].meta["val"].shape[-1] for a in "kv")
    text = Text()
    text.add("@triton.jit", *call(f"def {name}(", [*parameters[:-1], "ROWS: tl.constexpr"], "):"))
    with text.indented():
        text.add(
            "pid = tl.program_id(0).to(tl.int64)",
            "batch = pid // S",
            "s = pid % S",
            "part = tl.program_id(1)",
            "row = tl.load(at_ptr).to(tl.int64) + s"
            if found.counted
            else "row = tl.load(at_ptr + s * at_s).to(tl.int64)",
            "fits = (row >= 0) & (row < T)",
            f"d = tl.arange(0, {next_power_of_two(head // 2)})",
        )
        if found.turned is not None:
            for name_ in ("cos", "sin"):
                text.add(f"{name_}_row = {name_}_ptr + batch * {name_}_s0 + s * {name_}_s2")
                for which, place in enumerate(_halves(head)):
                    loaded = load(f"{name_}_row + {place} * {name_}_s3", _inside(head // 2))
                    text.add(f"{name_}_{which} = {loaded}.to({_compute(found)})[None, :]")
        if found.queries is None:
            _put(text, found, "part", head, head_v)
        else:
            with text.block("if part < groups:"):
                text.add(
                    "h = (part * ROWS + tl.arange(0, ROWS)).to(tl.int64)",
                    "x_rows = q_ptr + batch * q_s0 + h * q_s1 + s * q_s2",
                )
                _turn(text, found, "q", head, "(h < query_heads)[:, None]", True)
                text.add('first = tl.where(fits, first, float("nan"))', 'second = tl.where(fits, second, float("nan"))')
                text.add("y_rows = out_ptr + batch * out_s0 + h * out_s1 + s * out_s2")
                _store_halves(text, "out", head, "(h < query_heads)[:, None]")
            with text.block("else:"):
                _put(text, found, "(part - groups)", head, head_v)
    return str(text), parameters


def _put(text: Text, found: _Append, part: str, head: int, head_v: int) -> None:
    inside = "((h < heads) & fits)[:, None]"
    text.add(
        f"h = ({part} * ROWS + tl.arange(0, ROWS)).to(tl.int64)", "x_rows = k_ptr + batch * k_s0 + h * k_s1 + s * k_s2"
    )
    _turn(text, found, "k", head, inside, found.turned is not None)
    text.add("y_rows = keys_ptr + batch * keys_s0 + h * keys_s1 + row * keys_s2")
    _store_halves(text, "keys", head, inside)
    more = [inside, *([f"(e < {head_v})[None, :]"] if next_power_of_two(head_v) != head_v else [])]
    mask = " & ".join(more)
    text.add(
        f"e = tl.arange(0, {next_power_of_two(head_v)})",
        "v_rows = v_ptr + batch * v_s0 + h * v_s1 + s * v_s2",
        f"v = tl.load(v_rows[:, None] + e[None, :] * v_s3, mask={mask})",
        "put = values_ptr + batch * values_s0 + h * values_s1 + row * values_s2",
        f"tl.store(put[:, None] + e[None, :] * values_s3, v, mask={mask})",
    )


def _turn(text: Text, found: _Append, x: str, head: int, inside: str, rotated: bool) -> None:
    """first, second: the halves of the rows at `x_rows`, turned where that is asked for."""
    half = head // 2
    mask = [inside, *(f"({c})[None, :]" for c in _inside(half))]
    for name, place in zip(("first", "second"), _halves(head)):
        text.add(f"{name} = {load(f'x_rows[:, None] + {place}[None, :] * {x}_s3', mask)}")
    if rotated:
        text.add(
            f"first, second = first.to({_compute(found)}), second.to({_compute(found)})",
            "first, second = first * cos_0 - second * sin_0, second * cos_1 + first * sin_1",
        )


def _store_halves(text: Text, y: str, head: int, inside: str) -> None:
    half = head // 2
    mask = " & ".join([inside, *(f"({c})[None, :]" for c in _inside(half))])
    for name, place in zip(("first", "second"), _halves(head)):
        pointer = f"y_rows[:, None] + {place}[None, :] * {y}_s3"
        text.add(f"tl.store({pointer}, {name}.to({y}_ptr.dtype.element_ty), mask={mask})")


def _halves(head: int) -> tuple[str, str]:
    """Where the channels of the two halves are."""
    return "d", f"(d + {head // 2})"


def _compute(found: _Append) -> str:
    """The type in which is turned."""
    return triton_type(compute_dtype(found.tensors["k"].meta["val"].dtype))


def _inside(half: int) -> list[str]:
    """The condition that lanes of a half that is no power of two need."""
    return [f"d < {half}"] if next_power_of_two(half) != half else []


def _host(region: GraphModule, found: _Append, name: str, kernel: Kernel) -> str:
    placeholders = [n for n in region.graph.nodes if n.op == "placeholder"]
    names = Names(["torch", "triton", name, kernel.name, "b", "s", "heads", "groups", "out", "turn", "slope", "rows"])
    wishes = {n: a for a, n in found.tensors.items()}
    text_of = {n: names.new(wishes.get(n, n.name)) for n in placeholders}
    value = {a: text_of[n] for a, n in found.tensors.items()}
    text = Text()
    text.add(
        *call(f"def {name}(", [*(text_of[n] for n in placeholders), *(["out=None"] if found.queries else [])], "):")
    )
    with text.indented():
        text.add(f"b, heads, s, _ = {value['k']}.shape")
        known = {f"{a}_ptr": x for a, x in value.items()} | {"out_ptr": "out"}
        if found.turned is not None:
            for a in ("cos", "sin"):
                text.add(f"{a}_rows = {value[a]}.expand(b, 1, s, {value[a]}.shape[3])")
                value[a] = f"{a}_rows"
        if found.queries is not None:
            with text.block("if out is None:"):
                text.add(f"out = torch.empty({value['q']}.shape, dtype={value['q']}.dtype, device={value['q']}.device)")
            value["out"] = "out"
        known |= {f"{a}_s{i}": f"{x}.stride({i})" for a, x in value.items() if a != "at" for i in range(4)}
        known |= {
            "at_s": "0" if found.counted else f"{value['at']}.stride(0)", "S": "s", "T": f"{value['keys']}.shape[2]",
            "heads": "heads",
        }  # fmt: skip
        grid = f"b * s, triton.cdiv(heads, {ROWS})"
        if found.queries is not None:
            known |= {"query_heads": f"{value['q']}.shape[1]", "groups": "groups"}
            text.add(f"groups = triton.cdiv({value['q']}.shape[1], {ROWS})")
            grid = f"b * s, groups + triton.cdiv(heads, {ROWS})"
        with text.block(f"if {value['k']}.numel():"), text.block(f"with torch.cuda.device_of({value['k']}):"):
            launch(text, kernel, grid, known)
        output = region.graph.output_node()
        said = {found.keys: value["keys"], found.values: value["values"], found.queries: "out"}
        results = [said[n] for n in output.all_input_nodes]
        text.add(f"return {results[0]}" if isinstance(output.args[0], Node) else f"return ({', '.join(results)},)")
    return str(text)
