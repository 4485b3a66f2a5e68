"""How the weight of a linear lies in memory, and how its codes become numbers.

Codes are turned into float32 without a conversion instruction, which runs at a fraction of the rate of an addition:
the bits of a code q < 2^23, or-ed into those of 2^23 (0x4B000000), are the float 2^23 + q. Subtracting 2^23 + zero
leaves q − zero, exactly. High nibbles stay where they are, which gives 16·(q − zero); the activations or the scale
carry the factor 1/16. Source: the magic-number conversion of FasterTransformer (Kim et al., 2022, arXiv 2211.10017),
in float32.

Four-bit rows: a byte of a group of g holds channels j and j + g/2, so each half meets a contiguous run of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

MAGIC = 8388608  # 2^23
# A literal would cost a second logic operation for each code, because an instruction holds one immediate and the mask
# takes it: the bits have to come from a register. No compiler knows that M is never negative.
MAGIC_VARIABLE = ("magic = tl.where(M < 0, 0, 0x4B000000)  # the bits of 2^23, kept in a register",)


@dataclass(frozen=True)
class Weight:
    """A weight of k inputs: `tensor` holds floats (bits 0) or codes, which one scale a group of inputs stretches.

    tensor: [n, k], or uint8 [n, k/2] when bits is 4; scale, zero: [n, k/group]. `nodes` are the graph nodes that the
    kernel replaces (the dequantization, casts).
    """

    tensor: Node
    k: int
    nodes: frozenset[Node]
    bits: int = 0
    group: int = 0
    scale: Node | None = None
    zero: Node | None = None
    signed: bool = False

    @property
    def format(self) -> tuple[object, ...]:
        """Weights of one format can be read by one loop."""
        return (self.bits, self.group, self.zero is None, self.signed)

    @property
    def title(self) -> str:
        if not self.bits:
            return str(self.tensor.meta["val"].dtype).removeprefix("torch.")
        granularity = "channel" if self.group == self.k else f"g{self.group}"
        return f"int{self.bits}:{granularity}{'' if self.zero is None else ' with zero points'}"

    @property
    def halves(self) -> int:
        """Values in one stored element: two nibbles in a byte."""
        return 2 if self.bits == 4 else 1

    @property
    def stored(self) -> int:
        """Elements in a stored row."""
        return self.k // self.halves

    @property
    def run(self) -> int:
        """Stored elements that share a scale."""
        return self.group // self.halves if self.bits else self.k

    @property
    def groups(self) -> int:
        return self.k // self.group if self.bits else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one output column's weights, scales and zero points."""
        tensors = ((self.tensor, self.stored), (self.scale, self.groups), (self.zero, self.groups))
        return sum(node.meta["val"].dtype.itemsize * length for node, length in tensors if node is not None)

    def integer(self, loaded: str) -> str:
        """A loaded tile of codes as int32, each between 0 and 255."""
        if self.bits == 8 and self.signed:
            return f"({loaded}.to(tl.int32) & 255) ^ 128"
        return f"{loaded}.to(tl.int32)"

    def decode(self, codes: str, half: int, zero: str) -> str:
        """An int32 tile of codes → (q − zero) in the low half of a byte, 16·(q − zero) in the high one, as float32.

        zero: the float32 zero points' name, for weights that have them; others are centred by their format.
        """
        factor = 16 if half else 1
        offset = 128 if self.signed else 8 if self.bits == 4 and self.zero is None else 0
        centre = f"{MAGIC + factor * offset}.0"
        if self.zero is not None:
            centre = f"({centre} + {'16.0 * ' if half else ''}{zero})"
        nibble = f"({codes} & {240 if half else 15})" if self.bits == 4 else codes
        return f"({nibble} | magic).to(tl.float32, bitcast=True) - {centre}"


def power_of_two_divisor(n: int, limit: int) -> int:
    """The largest power of two, at most `limit`, that divides n."""
    return min(n & -n, limit)
