"""What rests on private APIs of `torch.distributed`: see `compat.py`, which hands all of it on."""

from __future__ import annotations

import datetime
import importlib
import sys
from collections.abc import Collection
from typing import Any

import torch


def group_name(group: Any) -> str:
    """The name by which functional collectives know a process group."""
    return str(group.group_name)


def sequence_number(name: str) -> int:
    """How many collectives this process has begun in a process group; 0 where its backend does not count."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    try:
        return int(_resolve_process_group(name)._get_sequence_number_for_group())
    except RuntimeError:
        return 0


def default_timeout() -> datetime.timedelta | None:
    """How long the job's process group waits for a collective; None where it does not say."""
    import torch.distributed as dist

    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    try:
        options = dist.group.WORLD._get_backend(device).options  # type: ignore[union-attr]
    except (RuntimeError, AttributeError):
        return None
    found = getattr(options, "_timeout", None)
    return found if isinstance(found, datetime.timedelta) else None


def ranks_of(name: str) -> list[int]:
    """The members of a process group, by their ranks in the job."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _resolve_process_group

    return list(dist.get_process_group_ranks(_resolve_process_group(name)))


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
    wanted = {id(t) for t in tensors}
    found = []
    for parameter in (p for group in _sharded_groups() for p in group.fsdp_params):
        tensor = getattr(parameter, "_unsharded_param", None)
        if id(tensor) in wanted:
            found.append(tensor)
    return found


def sharded_by_block() -> bool:
    """Whether `fully_shard` gathers the parameters of several modules of this process, each by itself."""
    return len(_sharded_groups()) > 1


def _sharded_groups() -> list[Any]:
    """What `fully_shard` gathers at a time."""
    module = sys.modules.get("torch.distributed._composable_state")
    found = []
    for reference in list(getattr(module, "_module_state_mapping", {}).values()):
        state = reference()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        found += [group for group in groups if group is not None]
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
