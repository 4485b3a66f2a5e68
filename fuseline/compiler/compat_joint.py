"""What the joint level needs of PyTorch's private APIs: AOTAutograd's partition, its tags, and who takes them.

Checked with the versions that `compat.py` names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from .compat_distributed import place_in

Partition = Callable[..., tuple[GraphModule, GraphModule]]
"""(joint graph, its inputs, keyword arguments of AOTAutograd's) → forward and backward."""


Around = Callable[[str], Callable[[GraphModule, Callable[..., Any]], Callable[..., Any]]]
""""forward" or "backward" → (graph, its callable) → what is called in its place."""


def boxed(
    compiler: Callable[..., Any], around: Callable[[GraphModule, Callable[..., Any]], Callable[..., Any]] | None = None
) -> Callable[..., Any]:
    """A compiler of AOTAutograd's whose callable takes its arguments in a list, and empties it: what the caller holds
    no longer can then be freed in the middle of the graph. `compiler` gives a graph module back as it is, or anything
    that is called with the arguments."""
    from torch._functorch.aot_autograd import make_boxed_func
    from torch.fx.graph import _BoxedCodeGen

    def compile(graph_module: GraphModule, fakes: Sequence[Any]) -> Callable[..., Any]:
        compiled = compiler(graph_module, fakes)
        if compiled is not graph_module:
            return make_boxed_func(compiled)
        graph_module.graph.set_codegen(_BoxedCodeGen())
        graph_module.recompile()
        forward = graph_module.forward
        plain = lambda arguments: forward(arguments)  # a bound method takes no attributes
        run = plain if around is None else around(graph_module, plain)
        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    return compile


def is_backward(node: Node) -> bool:
    """Whether AOTAutograd recorded a node while it ran the backward."""
    return node.meta.get("partitioner_tag") in ("is_backward", "must_be_in_backward")


def is_tangent(node: Node) -> bool:
    """Whether a placeholder of a joint graph is the gradient of an output."""
    return node.op == "placeholder" and "tangents" in str(node.target)


def tag(node: Node, save: bool) -> None:
    """Says what the partition does with the value of a forward node."""
    node.meta["recompute"] = CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.MUST_RECOMPUTE
    node.meta["ac_graph_id"] = 0  # one region: between two, the partition would save what we did not choose


def user_tag(node: Node) -> bool | None:
    """What a region of `torch.utils.checkpoint` says of a node: saved (True), computed again (False), or nothing."""
    policy = node.meta.get("recompute")
    if policy in (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE):
        return True
    return False if policy in (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE) else None


def saves(policy: Any) -> bool:
    """Whether a `CheckpointPolicy` keeps a value."""
    return policy in (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE)


def split_by_tags(joint: GraphModule, inputs: Sequence[Any], **given: Any) -> tuple[GraphModule, GraphModule]:
    """Forward and backward by the tags on the nodes: PyTorch's min-cut partition, which they leave no choice."""
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    return min_cut_rematerialization_partition(joint, inputs, **given)


def merge_equal(joint: GraphModule) -> None:
    """Merges equal calls, as `split_by_tags` would behind the passes' backs: a call of the backward then reads a value
    of the forward that it had made for itself, which a plan has to know."""
    from torch._functorch import config
    from torch._functorch.compile_utils import fx_graph_cse

    if config.cse:
        joint.graph.eliminate_dead_code()
        joint.graph = fx_graph_cse(joint.graph)
        joint.recompile()


def split_as_written(joint: GraphModule, inputs: Sequence[Any], **given: Any) -> tuple[GraphModule, GraphModule]:
    """Forward and backward as eager would run them; tags of regions of `torch.utils.checkpoint` are kept."""
    from torch._functorch.partitioners import default_partition

    return default_partition(joint, inputs, **given)


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's, but for the gradient of a 16-bit embedding."""
    from torch._inductor.decomposition import select_decomp_table

    target = torch.ops.aten.embedding_dense_backward.default
    table = dict(select_decomp_table())
    theirs = table[target]

    def without_a_second_table(grad, indices, rows, padding_idx, by_frequency):  # type: ignore[no-untyped-def]
        if by_frequency or grad.dtype.itemsize != 2:
            return theirs(grad, indices, rows, padding_idx, by_frequency)
        return torch.ops.fuseline.embedding_gradient.default(grad, indices, rows, padding_idx)

    table[target] = without_a_second_table
    return table


IN_ORDER = {"allow_buffer_reuse": False, "reorder_for_peak_memory": False}
"""Inductor's settings for a graph whose memory is planned."""


def inductor_through(module: GraphModule, inputs: Sequence[Any], partition: Partition, key: str) -> Callable[..., Any]:
    """A training graph compiled by Inductor, its joint graph split by `partition`; key: what tells this partition from
    others in Inductor's cache. AOTAutograd's own cache is left out: a hit would skip the partition, and with it what it
    refuses, guards and agrees on with other ranks. Inductor's kernels are cached as ever.

    The order of the graph is kept, and what a value leaves free goes back to the allocator at once. Inductor's own
    choices were seen to hold three times a plan's bytes: it keeps memory for a later value of the same size while
    attention runs, whose workspace it does not know of, and it makes what is ready long before it is read."""
    from torch._functorch import config as functorch
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.custom_graph_pass import CustomPartitionerFn

    class Ours(CustomPartitionerFn):  # type: ignore[misc]
        def __call__(self, gm: GraphModule, joint_inputs: Sequence[object], **given: Any) -> Any:
            given.pop("compiler", None)
            return partition(gm, joint_inputs, **given)

        def uuid(self) -> str:
            return key

        def __reduce__(self) -> Any:  # Inductor's cache hashes what its settings pickle to
            return str, (key,)

    with config.patch(custom_partitioner_fn=Ours()), functorch.patch(enable_autograd_cache=False):
        return compile_fx(module, list(inputs), config_patches=IN_ORDER, decompositions=_decompositions())


def checkpoint_policy(body: GraphModule) -> Callable[..., Any] | None:
    """The policy of a region of `torch.utils.checkpoint` with a `context_fn`; None where it has none.

    Raises:
        ValueError: a `context_fn` that is not made of `create_selective_checkpoint_contexts`.
    """
    context_fn = body.meta.get("_checkpoint_context_fn")
    if context_fn is None:
        return None
    forward, _ = context_fn()
    policy = getattr(forward, "policy_fn", None)
    if policy is None:
        raise ValueError("its context_fn does not come from create_selective_checkpoint_contexts")
    context = SimpleNamespace(is_recompute=False, op_output=None)  # the class behind it differs among versions
    return lambda target, *args, **kwargs: policy(context, target, *args, **kwargs)


def is_random(node: Node) -> bool:
    """Whether an op draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def group_size(name: Any) -> int:
    """How many devices take part in a process group of this name; 1 where it is not known."""
    return place_in(name)[0]


def joint_graph(function: Callable[..., Any], inputs: Sequence[Any]) -> GraphModule:
    """Forward and backward of a function of tensors in one graph, as a backend is given it; fake inputs will do.

    Its placeholders are the inputs, then a gradient for each result; its results those of the function, then the
    inputs' gradients.
    """
    from torch._functorch.aot_autograd import aot_module_simplified

    class Module(torch.nn.Module):
        def forward(self, *values: Any) -> Any:
            return function(*values)

    class Found(Exception):
        pass

    found: list[GraphModule] = []

    def take(joint: GraphModule, *_: Any, **__: Any) -> Any:
        found.append(joint)
        raise Found

    unused = boxed(lambda graph_module, fakes: graph_module)
    try:
        with torch.fx.traceback.preserve_node_meta():
            aot_module_simplified(Module(), tuple(inputs), fw_compiler=unused, bw_compiler=unused, partition_fn=take)
    except Found:
        pass
    return found[0]


def hold_at_most(size: Any, most: int) -> None:
    """Guards that a symbolic size is at most a number, which it is at capture: larger ones are captured again."""
    if size.node.hint is not None:
        bool(size <= most)


def symbolic_length(hint: int) -> tuple[Any, Any]:
    """A fake mode, and a symbol for a length in it; hint: what it is where a number is needed."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    return mode, mode.from_tensor(torch.empty(hint, device="meta"), symbolic_context=context).shape[0]
