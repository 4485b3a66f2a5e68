"""The text of the sparse linear's two kernels; `sparse.py` says what they are for and launches them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from ..dependent import MARK
from ..kernel_text import call
from .anchor import Anchor, Linear, value
from .config import PIECE_MAX, next_power_of_two
from .epilogue import Epilogue
from .signature import DECORATOR, branches
from .text import Text, joined, load
from .weights import MAGIC_VARIABLE, Weight, power_of_two_divisor

RANKS = 16  # ranks of the branch that a program of the first kernel computes, and that the second reads at once


@dataclass(frozen=True)
class Sparse:
    """A region of sparse products of one input and one mask.

    threshold: [1] or [k]; down: [rank, k]; ups: each product's [rank, n]. dense_above: as `fuseline::sparse_linear`.
    """

    anchor: Anchor
    threshold: Node
    down: Node | None
    ups: dict[Node, Node]
    dense_above: int

    @property
    def rank(self) -> int:
        return int(value(self.down).shape[0]) if self.down is not None else 0

    def offset(self, linear: Linear) -> int:
        """Where a product's columns begin among those of all."""
        before = 0
        for other in self.anchor.linears:
            if other.node is linear.node:
                return before
            before += other.n
        raise KeyError(linear.node)


@dataclass(frozen=True)
class GatherConfig:
    """The first kernel: a program reads `chunk` channels, `block_k` of them at once, times `block_n` stored elements.

    compact: whether it lists the channels that are kept first, so that every row it reads is one; otherwise the loads
    of rows that are dropped are masked. chunk and both blocks are powers of two. finish_n: columns of a program of the
    second kernel.
    """

    chunk: int
    block_k: int
    block_n: int
    compact: bool
    num_warps: int = 4
    stages: int = 2
    finish_n: int = 128


def gather_arguments(sparse: Sparse, config: GatherConfig) -> dict[str, Node | str]:
    """Pointer → the placeholder that it is, or what it is of the memory that the two kernels share."""
    names = sparse.anchor.names
    found: dict[str, Node | str] = {"x_ptr": sparse.anchor.x, "threshold_ptr": sparse.threshold}
    for linear in sparse.anchor.linears:
        for node in (linear.plain.tensor, linear.plain.scale, linear.plain.zero):
            if node is not None:
                found[f"{names[node]}_ptr"] = node
    if sparse.down is not None:
        found["down_ptr"] = sparse.down
    if config.compact:
        found["index_ptr"] = "index"
    return found | {"parts_ptr": "parts"} | ({"z_ptr": "z"} if sparse.down is not None else {})


def column_blocks(sparse: Sparse, config: GatherConfig) -> int:
    """Programs of the first kernel along columns."""
    return sum(-(-linear.plain.stored // config.block_n) for linear in sparse.anchor.linears)


def blocks(sparse: Sparse, config: GatherConfig) -> int:
    """Programs of the first kernel along columns, and along the branch's ranks."""
    return column_blocks(sparse, config) + -(-sparse.rank // RANKS)


def gather_kernel(sparse: Sparse, name: str, config: GatherConfig) -> str:
    """Sums over one chunk of the channels, for one row and some columns. Grid: (rows · blocks, chunks).

    Writes parts [chunks, M, columns of all products] and z [chunks, M, rank], both float32.
    """
    text, anchor = Text(), sparse.anchor
    constants = ("CHUNK", "BLOCK_K", "BLOCK_N", "STAGES")
    parameters = [*gather_arguments(sparse, config), "M", *(f"{c}: tl.constexpr" for c in constants)]
    text.add(DECORATOR, *call(f"def {name}(", parameters, "):"))
    with text.indented():
        text.add(
            "row = tl.program_id(0) % M  # neighbours read the same weights",
            "block = tl.program_id(0) // M",
            "first_k = tl.program_id(1) * CHUNK",
            "slot = (tl.program_id(1) * M + row).to(tl.int64)",
            *(MAGIC_VARIABLE if any(linear.plain.bits for linear in anchor.linears) else ()),
            f"x_row = x_ptr + row.to(tl.int64) * {anchor.k}",
        )
        if config.compact:
            _list_kept(text, sparse)
        for linear, tag, head, first in _linear_branches(sparse, config):
            with text.block(head):
                if linear is None:
                    _branch(text, sparse, first, min(PIECE_MAX, config.chunk))
                else:
                    _columns(text, sparse, linear, tag, first, config)
    return str(text)


def _list_kept(text: Text, sparse: Sparse) -> None:
    """The kept channels of the chunk, in order. All programs of a row and chunk write the same list to one place."""
    text.add("j = first_k + tl.arange(0, CHUNK)", f"live = j < {sparse.anchor.k}")
    _keep(text, sparse, "j", "live", "_all")
    text.add(
        "place = tl.cumsum(keep_all.to(tl.int32), 0) - 1",
        "kept = tl.sum(keep_all.to(tl.int32), 0)",
        "index = index_ptr + slot * CHUNK",
        "tl.store(index + place, j, mask=keep_all)",
        "tl.debug_barrier()  # the list is read by other threads than wrote it",
    )


def _keep(text: Text, sparse: Sparse, k: str, live: str, tag: str) -> None:
    """Loads x at channels k, and says which of them the mask keeps: a NaN is kept."""
    each = value(sparse.threshold).numel() > 1
    threshold = load(f"threshold_ptr + {k}", (live,)) if each else "tl.load(threshold_ptr)"
    text.add(
        f"x{tag} = {load(f'x_row + {k}', (live,))}.to(tl.float32)",
        f"keep{tag} = {live} & ~(tl.abs(x{tag}) <= {threshold})",
    )


def _linear_branches(sparse: Sparse, config: GatherConfig) -> Iterator[tuple[Linear | None, str, str | None, str]]:
    """For each product, and last for the branch (None): a suffix, the branch's head, the block's number within it."""
    members: list[Linear | None] = [*sparse.anchor.linears, *([None] if sparse.down is not None else [])]
    before = 0
    for number, member in enumerate(members):
        first = f"(block - {before})" if before else "block"
        before += -(-(member.plain.stored if member else sparse.rank) // (config.block_n if member else RANKS))
        if len(members) == 1:
            yield member, "", None, first
        elif number == len(members) - 1:
            yield member, f"_{number}", "else:", first
        else:
            yield member, f"_{number}", f"{'elif' if number else 'if'} block < {before}:", first


def _columns(text: Text, sparse: Sparse, linear: Linear, tag: str, first: str, config: GatherConfig) -> None:
    """One product's columns. Codes are tiles of three dimensions [channels, pieces, a piece], as in `gemv.py`."""
    weight, names = linear.plain, sparse.anchor.names
    name, piece = names[linear.node], _piece(weight, config.block_n)
    pieces = f"BLOCK_N // {piece}"
    if weight.bits:
        text.add(f"piece{tag} = {first} * ({pieces}) + tl.arange(0, {pieces})")
        text.add(f"s{tag} = (piece{tag} * {piece})[:, None] + tl.arange(0, {piece})[None, :]")
        text.add(f"group{tag} = piece{tag}" + (f" // {weight.run // piece}" if weight.run > piece else ""))
        shape, row, tile = f"(BLOCK_K, {pieces}, {piece})", "[:, None, None]", f"s{tag}[None, :, :]"
    else:
        text.add(f"s{tag} = {first} * BLOCK_N + tl.arange(0, BLOCK_N)")
        shape, row, tile = "(BLOCK_K, BLOCK_N)", "[:, None]", f"s{tag}[None, :]"
    inside = f"inside{tag}" if weight.stored % config.block_n else None
    if inside:
        text.add(f"{inside} = s{tag} < {weight.stored}")
    for half in range(weight.halves):
        text.add(f"acc{half}_{name} = tl.zeros({shape}, tl.float32)")
    with _channels(text, sparse, tag, config):
        over = (
            f"(k{tag}.to(tl.int64) * {weight.stored}){row}"
            if _is_wide(linear, sparse)
            else f"(k{tag} * {weight.stored}){row}"
        )
        masks = (f"keep{tag}{row}", inside and (f"{inside}[None, :, :]" if weight.bits else f"{inside}[None, :]"))
        pointer = f"{names[weight.tensor]}_ptr + {over} + {tile}"
        if not weight.bits:
            text.add(f"w{tag} = {load(pointer, masks)}.to(tl.float32)", f"acc0_{name} += w{tag} * x{tag}{row}")
        else:
            _codes(text, weight, names, name, tag, pointer, masks, inside)
    text.add(MARK)
    columns = f"parts_ptr + slot * {sparse.anchor.columns_of_all} + {sparse.offset(linear)}"
    for half in range(weight.halves):
        at = f"s{tag}"
        if weight.bits == 4:  # low nibbles are a group's first half of the columns, high ones its second
            shift = f" + {weight.run}" if half else ""
            at = f"s{tag} + (group{tag} * {weight.run})[:, None]{shift}"
        text.add(f"tl.store({columns} + {at}, tl.sum(acc{half}_{name}, 0){joined((inside,))})")


def _codes(
    text: Text,
    weight: Weight,
    names: dict[Node, str],
    name: str,
    tag: str,
    pointer: str,
    masks: tuple[str | None, ...],
    inside: str | None,
) -> None:
    text.add(f"codes{tag} = {load(pointer, masks, '0')}", f"codes{tag} = {weight.integer(f'codes{tag}')}")
    ends = f"group{tag} < {weight.groups}" if inside else None
    where = f"(k{tag} * {weight.groups})[:, None] + group{tag}[None, :]"
    conditions = (f"keep{tag}[:, None]", ends and f"({ends})[None, :]")
    assert weight.scale is not None
    scale = load(f"{names[weight.scale]}_ptr + {where}", conditions)
    text.add(f"scaled{tag} = {scale}.to(tl.float32) * x{tag}[:, None]")
    if weight.zero is not None:
        zero = load(f"{names[weight.zero]}_ptr + {where}", conditions, "0")
        text.add(f"zero{tag} = {zero}.to(tl.float32)[:, :, None]")
    for half in range(weight.halves):
        factor = f"(scaled{tag} * 0.0625)" if half else f"scaled{tag}"
        decoded = weight.decode(f"codes{tag}", half, f"zero{tag}")
        text.add(f"acc{half}_{name} += ({decoded}) * {factor}[:, :, None]")


class _channels:
    """The loop over the channels of the chunk, `k`, `x` and `keep` of BLOCK_K of them at a time."""

    def __init__(self, text: Text, sparse: Sparse, tag: str, config: GatherConfig) -> None:
        self.text, self.sparse, self.tag, self.compact = text, sparse, tag, config.compact
        end = "kept" if config.compact else "CHUNK"
        self.block = text.block(f"for c{tag} in tl.range(0, {end}, BLOCK_K, num_stages=STAGES):")

    def __enter__(self) -> None:
        text, tag = self.text, self.tag
        self.block.__enter__()
        if self.compact:
            text.add(f"c{tag}_k = c{tag} + tl.arange(0, BLOCK_K)", f"keep{tag} = c{tag}_k < kept")
            text.add(f"k{tag} = {load(f'index + c{tag}_k', (f'keep{tag}',), '0')}")
            text.add(f"x{tag} = {load(f'x_row + k{tag}', (f'keep{tag}',))}.to(tl.float32)")
            return
        text.add(f"k{tag} = first_k + c{tag} + tl.arange(0, BLOCK_K)", f"live{tag} = k{tag} < {self.sparse.anchor.k}")
        _keep(text, self.sparse, f"k{tag}", f"live{tag}", tag)
        text.add(f"x{tag} = tl.where(keep{tag}, x{tag}, 0.0)  # a dropped infinity is no NaN")

    def __exit__(self, *error: object) -> None:
        self.block.__exit__(*error)  # type: ignore[arg-type]


def _branch(text: Text, sparse: Sparse, first: str, width: int) -> None:
    """down times what the mask drops, RANKS rows of it, `width` channels at a time."""
    k, rank = sparse.anchor.k, sparse.rank
    inside = "inside_r" if rank % RANKS else None
    text.add(f"r = {first} * {RANKS} + tl.arange(0, {RANKS})", *([f"inside_r = r < {rank}"] if inside else []))
    text.add(f"acc_z = tl.zeros(({RANKS}, {width}), tl.float32)")
    with text.block(f"for c_z in tl.range(0, CHUNK, {width}, num_stages=STAGES):"):
        text.add(f"k_z = first_k + c_z + tl.arange(0, {width})", f"live_z = k_z < {k}")
        _keep(text, sparse, "k_z", "live_z", "_z")
        pointer = f"down_ptr + (r * {k})[:, None] + k_z[None, :]"
        masks = ("(live_z & ~keep_z)[None, :]", inside and f"{inside}[:, None]")
        text.add(f"down_z = {load(pointer, masks)}.to(tl.float32)")
        text.add("acc_z += down_z * tl.where(keep_z, 0.0, x_z)[None, :]")
    text.add(MARK)
    text.add(f"tl.store(z_ptr + slot * {rank} + r, tl.sum(acc_z, 1){joined((inside,))})")


def finish_kernel(sparse: Sparse, name: str, pointers: list[str]) -> str:
    """Adds the chunks up, in order, and the branch's `up` to them; then the epilogue. Grid: rows · blocks of columns.

    RANKED: 0 where the products in `parts` are whole already.
    """
    text, anchor = Text(), sparse.anchor
    constants = ("CHUNKS", "BLOCK_C", "BLOCK_N", "RANKED")
    text.add(DECORATOR, *call(f"def {name}(", [*pointers, "M", *(f"{c}: tl.constexpr" for c in constants)], "):"))
    with text.indented():
        text.add(
            "row = tl.program_id(0) % M",
            "block = tl.program_id(0) // M",
            "part = tl.arange(0, BLOCK_C)",
            "live = part < CHUNKS",
            "slot = (part * M + row).to(tl.int64)",
        )
        for section, tag, head, first in branches(anchor):
            with text.block(head):
                text.add(f"n{tag} = {first} * BLOCK_N + tl.arange(0, BLOCK_N)", f"inside{tag} = n{tag} < {section.n}")
                results = {}
                for linear in section.linears:
                    results[linear] = _total(text, sparse, linear, tag)
                epilogue = Epilogue(
                    anchor, section, columns=f"n{tag}", inside=f"inside{tag}", rows="row", tile=False, tag=tag
                )
                epilogue.write(text, results)
    return str(text)


def _total(text: Text, sparse: Sparse, linear: Linear, tag: str) -> str:
    names = sparse.anchor.names
    total = f"total_{names[linear.node]}"
    over = f"(slot * {sparse.anchor.columns_of_all})[:, None] + (n{tag} + {sparse.offset(linear)})[None, :]"
    text.add(f"{total} = tl.sum({load(f'parts_ptr + {over}', ('live[:, None]', f'inside{tag}[None, :]'))}, 0)")
    up = sparse.ups.get(linear.node)
    if up is None:
        return total
    rank = sparse.rank
    with text.block("if RANKED:"), text.block(f"for r0 in tl.static_range(0, {rank}, {RANKS}):"):
        text.add(f"r{tag} = r0 + tl.arange(0, {RANKS})", f"inside_r{tag} = r{tag} < {rank}")
        z = load(f"z_ptr + (slot * {rank})[:, None] + r{tag}[None, :]", ("live[:, None]", f"inside_r{tag}[None, :]"))
        text.add(f"z{tag} = tl.sum({z}, 0)")
        pointer = f"{names[up]}_ptr + (r{tag} * {linear.n})[:, None] + n{tag}[None, :]"
        loaded = load(pointer, (f"inside_r{tag}[:, None]", f"inside{tag}[None, :]"))
        text.add(f"{total} += tl.sum({loaded}.to(tl.float32) * z{tag}[:, None], 0)")
    return total


def _piece(weight: Weight, block_n: int) -> int:
    """Stored elements that share a scale and are read together."""
    return power_of_two_divisor(weight.run, min(PIECE_MAX, block_n)) if weight.bits else 1


def _is_wide(linear: Linear, sparse: Sparse) -> bool:
    """Whether offsets into the weight need 64 bits."""
    return linear.plain.stored * sparse.anchor.k >= 2**31


def chunks(sparse: Sparse, config: GatherConfig) -> int:
    """Programs of the first kernel along the channels."""
    return -(-sparse.anchor.k // config.chunk)


def padded(count: int) -> int:
    """A power of two that holds `count`."""
    return next_power_of_two(count)
