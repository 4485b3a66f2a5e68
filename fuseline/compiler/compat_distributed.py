"""What rests on private APIs of `torch.distributed`: see `compat.py`, which hands all of it on."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Collection
from typing import Any

import torch


def group_name(group: Any) -> str:
    """The name by which functional collectives know a process group."""
    return str(group.group_name)


def place_in(name: str) -> tuple[int, int]:
    """The size of a process group of this name, and this process's place in it; (1, 0) where it is not known."""
    try:
        from torch.distributed.distributed_c10d import _resolve_process_group

        group = _resolve_process_group(name)  # type: ignore[arg-type]
        return int(group.size()), int(group.rank())
    except (ImportError, KeyError, RuntimeError, TypeError, ValueError):
        return 1, 0


def collectives() -> Any:
    """The namespace of functional collectives that carry gradients: on torch 2.13 `_c10d_functional` itself, whose ops
    partitioners know by name; before, its `_autograd` twin.

    On torch 2.13 an import registers their derivatives; without it they would cut gradients off unnoticed."""
    importlib.import_module("torch.distributed._functional_collectives")
    known = torch._C._dispatch_has_kernel_for_dispatch_key("_c10d_functional::all_to_all_single", "Autograd")
    return torch.ops._c10d_functional if known else torch.ops._c10d_functional_autograd


def shared_store() -> Any:
    """The store through which the processes of this job found one another; None where it is a fake for one process."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

    return None if dist.get_backend() == "fake" else _get_default_store()


def mesh_groups() -> dict[str, tuple[str, int, int]]:
    """Dimension of a DeviceMesh of this process → its group along it: name, size, rank.

    PyTorch keeps no public list of meshes, so they are looked for among all objects; the last one of a name counts.
    """
    import gc

    from torch.distributed.device_mesh import DeviceMesh

    found = {}
    for mesh in [o for o in gc.get_objects() if type(o) is DeviceMesh]:
        for dim in mesh.mesh_dim_names or ():
            if mesh.get_coordinate() is not None:
                group = mesh.get_group(dim)
                found[dim] = (group_name(group), group.size(), mesh.get_local_rank(dim))
    return found


def gathered(tensors: Collection[torch.Tensor]) -> list[torch.Tensor]:
    """Those that `fully_shard` (FSDP2) fills from all ranks before each use: it hides that from their versions."""
    module = sys.modules.get("torch.distributed._composable_state")
    wanted = {id(t) for t in tensors}
    found = []
    for reference in list(getattr(module, "_module_state_mapping", {}).values()):
        state = reference()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for parameter in (p for group in groups if group is not None for p in group.fsdp_params):
            tensor = getattr(parameter, "_unsharded_param", None)
            if id(tensor) in wanted:
                found.append(tensor)
    return found


def gradients_are_averaged(parameters: Collection[torch.Tensor]) -> bool:
    """Whether DistributedDataParallel runs the forward under way, or `fully_shard` gathered one of these parameters."""
    from torch.nn.parallel import DistributedDataParallel

    if DistributedDataParallel._get_active_ddp_module() is not None:
        return True
    return bool(gathered(parameters))


def is_wrapper(value: Any) -> bool:
    """Whether a value is a tensor made of others, such as a DTensor or another library's quantized weight."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value)
