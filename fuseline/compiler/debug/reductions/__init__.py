"""Ways to make a failing case smaller, one a file; each proposes cases to a `Search` until none is taken."""

from .bypass import bypass
from .inputs import merge_inputs, weights_to_inputs
from .neighbourhood import neighbourhood
from .nodes import cut_nodes, cut_outputs
from .numbers import plain_numbers, single_precision
from .passes import drop_passes, localise, reset_options
from .sizes import fix_sizes, shrink_sizes
from .tensors import drop_values

FIRST = (drop_values, localise, drop_passes, neighbourhood)
"""Once, and in this order: what cuts a model down to a neighbourhood."""

REPEATED = (
    cut_nodes,
    cut_outputs,
    bypass,
    drop_passes,
    reset_options,
    weights_to_inputs,
    merge_inputs,
    fix_sizes,
    shrink_sizes,
    single_precision,
    plain_numbers,
)
"""Again and again, until a round changes nothing."""

__all__ = ["FIRST", "REPEATED"]
