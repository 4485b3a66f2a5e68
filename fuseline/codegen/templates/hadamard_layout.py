"""How rows are cut for the Hadamard kernel, and what a program of it takes at once."""

from __future__ import annotations

from dataclasses import dataclass

from ..values import Blocks

LONGEST = 32768  # elements of a row, padded: 128 registers in each of 256 threads
LEAST = 16  # the least that tl.dot takes
GROUP = 64  # rows of the product that a group of four warps takes at once
HALF = 32  # the same of float32: Hopper's own products of TF32 would want their operands the other way round
WIDE = 16384  # elements of a row, padded, from which on a program has two such groups
PARTED = 4096  # elements of a row from which on a program takes it as tiles
SECOND = 64  # columns that the second product takes at once
SINGLE = 8192  # elements of a row of float32, padded: its three parts take 96 KB of shared memory
BUSY = 2048  # the same where the kernel does more than the transform
MULTIPROCESSORS = 132  # of a large GPU; as many programs as it holds at once walk over all rows
PROGRAMS = 2 * MULTIPROCESSORS  # each makes H_A once


@dataclass(frozen=True)
class Layout:
    """How a row of n channels is cut: A = order·2^log2 rows of C = n / A columns.

    piece, inner: rows and summands of one product; the padded A is a multiple of both.
    parted: a program takes one row as tiles [piece, columns]. busy: other operations stand in the kernel.
    """

    n: int
    order: int
    log2: int
    piece: int
    inner: int
    elements: int = WIDE  # of a program, where rows are shorter
    parted: bool = False
    busy: bool = False

    @property
    def rows(self) -> int:
        return self.order << self.log2

    @property
    def columns(self) -> int:
        return self.n // self.rows

    @property
    def padded(self) -> int:
        return power_of_two(self.rows)

    def scale(self, exact: bool) -> float:
        """What the products with signs are multiplied by; exact: the core holds signs, too."""
        return float(((self.columns << self.log2) * (self.order if exact else 1)) ** -0.5)

    @property
    def block(self) -> int:
        return self.padded * self.columns

    @property
    def least_rows(self) -> int:
        """Rows of a program: a product has at least 16 columns."""
        return max(1, LEAST // self.columns)

    @property
    def blocks(self) -> Blocks:
        """2048 to 16384 elements a program, at most 128 sums in a thread; rows by fours where they are short."""
        if self.parted:
            warps = self.piece // 16
            sums = -(-self.rows // self.piece) * self.piece * self.columns // (32 * warps)
            resident = 5 if sums <= 32 else 3 if sums <= 64 and warps == 4 else 2 if warps == 4 or sums <= 64 else 1
            return Blocks(1, 1, warps, resident * MULTIPROCESSORS, ahead=not self.busy)
        rows = min(4, self.elements // self.block) if self.block >= 512 else 2048 // self.block
        return Blocks(max(1, self.least_rows, rows), self.least_rows, 4 * max(1, self.piece // GROUP), PROGRAMS)


def layout(n: int, order: int, busy: bool = False, single: bool = False) -> Layout:
    """The cut of n = order·2^m: the largest A that one product takes, else A = order in several.

    busy: other operations stand in the kernel and want registers, so that a thread gets fewer elements.
    single: the input is float32, of which three parts are multiplied, all of them in shared memory.
    """
    if not single and n >= PARTED and (found := _parted(n, order, busy)):
        return found
    padded = power_of_two(n)
    wide = padded >= (BUSY if busy else WIDE)
    piece = HALF if single else 2 * GROUP if wide else GROUP
    elements = SINGLE // 2 if single else WIDE
    fits = [a for a in range((n // order).bit_length()) if order << a <= piece]
    if fits:
        whole = power_of_two(order << fits[-1])
        return Layout(n, order, fits[-1], whole, whole, elements)
    if not single:
        piece = GROUP if padded <= WIDE and not busy else 2 * GROUP
    return Layout(n, order, 0, piece, GROUP, elements)


def _parted(n: int, order: int, busy: bool) -> Layout | None:
    """The cut into tiles of 64 rows for four warps or of 128 for eight, at most 128 sums in a thread."""
    for piece in (GROUP, 2 * GROUP):
        log2 = max(0, (piece // order).bit_length() - 1)
        log2 += n // (order << log2) > (2 if busy else 4) * SECOND
        if (n // order) % (1 << log2):
            continue
        cut = Layout(n, order, log2, piece, piece, parted=True, busy=busy)
        count = -(-cut.rows // piece)
        if LEAST <= cut.columns <= 4 * SECOND and count * cut.columns <= 4 * SECOND and count <= 3:
            return cut
    return None


def power_of_two(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()
