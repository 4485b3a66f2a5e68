"""Which sites `quantize` takes, by its options and by what a site can have; and why not the others."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

from ..compiler.program import Program
from ..compiler.schemes import Scheme
from .quantize_sites import Site
from .quantize_training import needs_gradient, needs_training


def names(path: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns matches a module's path."""
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def left_out(path: str, only: Sequence[str], skip: Sequence[str]) -> bool:
    """Whether `only` and `skip` leave a module out."""
    return names(path, skip) or bool(only and not names(path, only))


def refuse(
    program: Program, site: Site, weights: Sequence[Scheme], activations: Scheme | None, head: bool
) -> str | None:
    """Why a site cannot be rounded so, or None.

    Args:
        weights: the schemes that its weight may take, one of which has to fit; none where it is left.
        head: it is over the vocabulary, and not named.
    """
    if head:
        return f"the model's head over its vocabulary: name it to quantize it, only={site.path}"
    if not site.node.meta["val"].dtype.is_floating_point:
        return f"its result is {site.node.meta['val'].dtype}, not a floating-point type"
    if activations and site.kernel:
        return "a convolution's input has no tokens to share a scale: leave the convolutions out, skip=…"
    reasons = [scheme.refuse(site.shape[1], site.shape[0]) for scheme in weights]
    reason = reasons[0] if reasons and all(reasons) else None
    inputs = site.shape[0] if site.is_sparse else site.shape[1]
    reason = reason or (activations.refuse_group(inputs) if activations else None)
    reason = reason or (needs_training(program) if activations else None)
    return reason or (needs_gradient(program, site.weight) if weights else None)
