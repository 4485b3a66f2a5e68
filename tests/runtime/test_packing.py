"""Packing: what is in use at the same time never overlaps, and no memory is lost without a reason."""

from __future__ import annotations

from hypothesis import given, strategies as st

from fuseline.runtime.packing import ALIGNMENT, Lifetime, aligned, pack, peak

LIFETIMES = st.lists(
    st.builds(
        lambda size, first, length: Lifetime(size, first, first + length),
        st.integers(0, 5000),
        st.integers(0, 30),
        st.integers(0, 12),
    ),
    max_size=40,
)


@given(LIFETIMES)
def test_buffers_in_use_together_lie_apart(buffers):
    offsets, total = pack(buffers)
    places = [(o, o + b.size) for o, b in zip(offsets, buffers, strict=True)]
    for i, (start, end) in enumerate(places):
        assert start % ALIGNMENT == 0 and end <= total
        for j in range(i):
            if buffers[i].meets(buffers[j]) and buffers[i].size and buffers[j].size:
                assert end <= places[j][0] or places[j][1] <= start


@given(LIFETIMES)
def test_the_total_is_between_the_peak_and_the_sum(buffers):
    _, total = pack(buffers)
    rounded = [Lifetime(aligned(b.size), b.first, b.last) for b in buffers]
    assert peak(buffers) <= peak(rounded) <= total <= sum(b.size for b in rounded)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=20))
def test_what_is_used_one_after_another_shares_one_place(sizes):
    buffers = [Lifetime(size, 2 * i, 2 * i + 1) for i, size in enumerate(sizes)]
    assert pack(buffers) == ([0] * len(sizes), aligned(max(sizes)))


def test_a_buffer_takes_the_smallest_gap_that_it_fits():
    kib = 1024
    long = [Lifetime(9 * kib, 0, 1), Lifetime(8 * kib, 0, 9), Lifetime(7 * kib, 0, 1), Lifetime(6 * kib, 0, 9)]
    offsets, total = pack([*long, Lifetime(5 * kib, 2, 9)])
    assert offsets == [0, 9 * kib, 17 * kib, 24 * kib, 17 * kib] and total == 30 * kib  # 7 KiB of room, not 9


def test_nothing_needs_nothing():
    assert pack([]) == ([], 0) and peak([]) == 0
