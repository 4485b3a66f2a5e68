"""AutoSP's fixed rule on the joint graph, beside which the solver's choices are measured."""

from __future__ import annotations

from typing import Any

import torch


def autosp_rule(joint: Any, inputs: Any, **given: Any) -> Any:
    """AutoSP's choice: attention's results, and what a product of the backward reads unless it is [*, 4096 or more, …];
    all else is computed again."""
    from fuseline.compiler.compat_joint import split_by_tags, tag
    from fuseline.compiler.costs import is_attention
    from fuseline.compiler.joint import forward_nodes

    given.pop("compiler", None)
    forward = forward_nodes(joint)
    before = set(forward)
    for node in forward:
        value = node.meta.get("val")
        source = node.args[0] if node.target.__class__.__name__ == "builtin_function_or_method" else node
        kept = is_attention(node) or (getattr(source, "op", "") == "call_function" and is_attention(source))
        if isinstance(value, torch.Tensor):
            product = any(u not in before and "mm" in str(u.target) for u in node.users)
            long = value.dim() >= 2 and (isinstance(value.shape[1], torch.SymInt) or value.shape[1] >= 4096)
            kept = kept or (product and not long)
        elif not isinstance(value, (tuple, list)):
            continue
        tag(node, kept)
    return split_by_tags(joint, inputs, **given)


def partition_by_rule() -> None:
    """Inductor splits joint graphs by that rule from now on in this process."""
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomPartitionerFn

    class Rule(CustomPartitionerFn):
        def __call__(self, gm, joint_inputs, **given):
            return autosp_rule(gm, joint_inputs, **given)

        def uuid(self):
            return "autosp"

    config.custom_partitioner_fn = Rule()
