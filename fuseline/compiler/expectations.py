"""Expectations: how often a pass has to apply, so that a rewrite that stops applying is an error and no slower model.

raise{expect=181}                        181 rewrites or more in each program, by whichever rules
raise{expect=RMSNorm:61|Attention:30}    by each of these rules
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .errors import ExpectationError, UserError, nearest

TOTAL = ""
"""The rule that stands for all of them."""


def parse_expectations(texts: Sequence[str]) -> dict[str, int]:
    """Rule → the least number of its rewrites; `TOTAL` for all rules together.

    Raises:
        UserError: an item that is neither a whole number nor `RULE:NUMBER`.
    """
    found = {}
    for text in texts:
        rule, _, count = text.rpartition(":")
        if not count.isascii() or not count.isdigit():
            raise UserError(
                f"option 'expect' is a whole number or RULE:NUMBER, not '{text}'",
                remedy="raise{expect=181}, or raise{expect=RMSNorm:61|Attention:30}",
            )
        found[rule.strip()] = int(count)
    return found


def check_expectations(step: str, texts: Sequence[str], matched: Mapping[str, int], reasons: Sequence[str]) -> None:
    """Holds a pass to what it was expected to do.

    Args:
        step: the pass's name.
        matched: rule → its rewrites.
        reasons: why sites were refused, for the error.

    Raises:
        ExpectationError: fewer rewrites than expected, with the counts.
    """
    expected = parse_expectations(texts)
    counts = {TOTAL: sum(matched.values()), **matched}
    short = {rule: least for rule, least in expected.items() if counts.get(rule, 0) < least}
    if not short:
        return
    rule, least = next(iter(short.items()))
    told = f"rule '{rule}' of pass '{step}'" if rule else f"pass '{step}'"
    raise ExpectationError(
        f"{told} made {counts.get(rule, 0)} rewrites, where {least} are expected",
        [*(_missing(name, least, counts) for name, least in short.items()), *reasons],
        f"fuseline why {step}{'/' + rule if rule in matched else ''} GRAPH    lists the places that came closest",
    )


def _missing(rule: str, least: int, counts: Mapping[str, int]) -> str:
    others = [name for name in counts if name != TOTAL]
    hint = nearest(rule, others) if rule not in counts and others else ""
    return f"{rule or 'all rules'}: {counts.get(rule, 0)}, expected {least} or more{hint}"
