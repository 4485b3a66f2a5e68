"""Which rank computes which attention heads, for any number of query and key heads and any degree.

Query heads go to the ranks in runs of ⌈H / degree⌉; where that leaves no whole number, the last head is computed again
and dropped. A rank is sent the key heads that its queries read and no more: with more ranks than key heads a head goes
to several ranks, whose gradients add up. Source: DeepSpeed-Ulysses (Jacobs et al., 2023), which needs both numbers to
divide; key heads for several ranks as in LoongTrain (Gu et al., 2024), section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Heads:
    """`queries` heads over `keys` heads (query head h reads key head h // (queries / keys)) on `degree` ranks."""

    queries: int
    keys: int
    degree: int

    @property
    def local(self) -> int:
        """Query heads of a rank."""
        return -(-self.queries // self.degree)

    @property
    def local_keys(self) -> int:
        """Key heads of a rank: the most that any rank needs."""
        spans = [self._of(rank) for rank in range(self.degree)]
        return max(self._key(heads[-1]) - self._key(heads[0]) + 1 for heads in spans)

    @property
    def grouped(self) -> bool:
        """Whether on all ranks equal runs of query heads read one key head each, which attention takes as it is."""
        run, rest = divmod(self.local, self.local_keys)
        return not rest and all(
            [self._key(h) - self.first(rank) for h in self._of(rank)] == [i // run for i in range(self.local)]
            for rank in range(self.degree)
        )

    def first(self, rank: int) -> int:
        """The first key head that a rank is sent."""
        return min(self._key(self._of(rank)[0]), self.keys - self.local_keys)

    def query_order(self, device: torch.device) -> torch.Tensor | None:
        """Query heads rank by rank, [degree · local]; None where that is their own order."""
        if self.degree * self.local == self.queries:
            return None
        return torch.arange(self.degree * self.local, device=device).clamp(max=self.queries - 1)

    def key_order(self, device: torch.device) -> torch.Tensor | None:
        """Key heads rank by rank, [degree · local_keys]; None where that is their own order."""
        count = self.local_keys
        if [self.first(r) + j for r in range(self.degree) for j in range(count)] == list(range(self.keys)):
            return None
        firsts = (torch.arange(self.degree, device=device) * self.local).clamp(max=self.queries - 1)
        firsts = (firsts // (self.queries // self.keys)).clamp(max=self.keys - count)
        return (firsts[:, None] + torch.arange(count, device=device)).flatten()

    def queries_of(self, rank: int, device: torch.device) -> torch.Tensor:
        """The query heads of a rank, [local]."""
        return torch.arange(rank * self.local, (rank + 1) * self.local, device=device).clamp(max=self.queries - 1)

    def read_by(self, rank: int, device: torch.device) -> torch.Tensor | None:
        """For each query head of a rank, the place of its key head among those that the rank was sent; None where
        `grouped`. It is None on all ranks or on none, so all compile one graph."""
        if self.grouped:
            return None
        return self.queries_of(rank, device) // (self.queries // self.keys) - self.first(rank)

    def _of(self, rank: int) -> list[int]:
        return [min(rank * self.local + i, self.queries - 1) for i in range(self.local)]

    def _key(self, head: int) -> int:
        return head // (self.queries // self.keys)
