"""Which experts become one: pairs, random groups, clusters, bases with what they absorb, and those that stay.

Groups are tuples of experts' numbers, shares what each member counts for; groups are in the order of their first
member, so that a router's rows can be kept in their order.
"""

from __future__ import annotations

import random

import networkx
import torch

Groups = tuple[tuple[int, ...], ...]
Shares = tuple[tuple[float, ...], ...]


def random_pairs(experts: int, pairs: int, seed: int) -> Groups:
    """`pairs` pairs of different experts; the others alone, after them."""
    order = list(range(experts))
    random.Random(seed).shuffle(order)
    return _with_rest([(order[2 * i], order[2 * i + 1]) for i in range(pairs)], experts)


def searched_pairs(cost: torch.Tensor, pairs: int) -> Groups:
    """The pairs of least total cost, [E, E] symmetric: a minimum-weight matching (Edmonds, 1965).

    With fewer pairs than fit, experts that stay alone are matched with stand-ins, which cost nothing.
    """
    experts = len(cost)
    graph, alone = networkx.Graph(), experts - 2 * pairs
    values = cost.double().tolist()
    top = 1 + max(max(row) for row in values)
    for i in range(experts):
        graph.add_weighted_edges_from((i, j, top - values[i][j]) for j in range(i))
        graph.add_weighted_edges_from((i, experts + k, top) for k in range(alone))
    matching = networkx.max_weight_matching(graph, maxcardinality=True)
    found = sorted(tuple(sorted(pair)) for pair in matching if max(pair) < experts)
    return _with_rest(found, experts)


def _with_rest(pairs: list[tuple[int, ...]], experts: int) -> Groups:
    taken = {e for pair in pairs for e in pair}
    return (*pairs, *((e,) for e in range(experts) if e not in taken))


def random_groups(experts: int, count: int, seed: int) -> Groups:
    """`count` groups of sizes that differ by one at most."""
    order = list(range(experts))
    random.Random(seed).shuffle(order)
    return tuple(sorted(tuple(sorted(order[i::count])) for i in range(count)))


def clusters(points: torch.Tensor, count: int) -> Groups:
    """`count` clusters of points [E, n] by average linkage of Euclidean distances (HC-SMoE, Chen et al., 2025)."""
    far = torch.cdist(points.double(), points.double())
    far.fill_diagonal_(float("inf"))
    members = [[e] for e in range(len(points))]
    sizes = torch.ones(len(points), dtype=torch.float64)
    for _ in range(len(points) - count):
        i, j = sorted(divmod(int(far.argmin()), len(far)))
        mean = (far[i] * sizes[i] + far[j] * sizes[j]) / (sizes[i] + sizes[j])
        far[i], far[:, i] = mean, mean
        far[i, i] = far[j] = far[:, j] = float("inf")
        far[j, :] = float("inf")
        members[i] += members[j]
        members[j] = []
        sizes[i] += sizes[j]
    return tuple(sorted(tuple(sorted(one)) for one in members if one))


def weighted(groups: Groups, importance: torch.Tensor) -> Shares:
    """Each member's share in proportion to its importance; equal ones where a group has none."""
    shares = []
    for group in groups:
        parts = [max(0.0, float(importance[e])) for e in group]
        total = sum(parts)
        shares.append(tuple(p / total for p in parts) if total > 0 else (1.0 / len(group),) * len(group))
    return tuple(shares)


def most_important(importance: torch.Tensor, count: int, blocks: int = 1) -> list[int]:
    """The `count` most important experts in order of their numbers; of `blocks` router groups as many from each."""
    each = len(importance) // blocks
    found: list[int] = []
    for block in range(blocks):
        part = importance[block * each : (block + 1) * each]
        found += [block * each + e for e in torch.topk(part, count // blocks).indices.tolist()]
    return sorted(found)


def absorbed(importance: torch.Tensor, alike: torch.Tensor, count: int, blocks: int = 1) -> Groups:
    """Partial preservation (arXiv 2605.08738): of the `count` most important experts the first half stays as it is, and
    each expert that goes joins the one of the second half that it is most alike; alike: [E, E]."""
    each, groups = len(importance) // blocks, []
    for block in range(blocks):
        own = range(block * each, (block + 1) * each)
        order = sorted(own, key=lambda e: -float(importance[e]))
        kept = order[: count // blocks]
        bases = kept[len(kept) // 2 :]
        joined: dict[int, list[int]] = {base: [base] for base in bases}
        for e in order[len(kept) :]:
            joined[max(bases, key=lambda base: float(alike[e, base]))].append(e)
        groups += [(e,) for e in kept[: len(kept) // 2]] + [tuple(joined[base]) for base in bases]
    return tuple(sorted(groups))


def cosines(points: torch.Tensor) -> torch.Tensor:
    """How alike points [E, n] are: [E, E]."""
    unit = torch.nn.functional.normalize(points.double(), dim=-1)
    return unit @ unit.t()
