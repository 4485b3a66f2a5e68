"""Rates of a device: what turns an op's FLOPs and bytes into seconds.

The figures are the vendors' data sheets', dense; `*_share` is the part that large operations reach in practice. Seconds
that are computed from them rank alternatives, they do not replace a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import UserError, nearest

GB = 1e9


@dataclass(frozen=True)
class Machine:
    """memory: bytes; flops: matrix products a second in 16-bit and in 32-bit types; bandwidth: of the memory, bytes a
    second; link: bytes a second between devices of a node, each way; network: the same between nodes; host: to the
    host's memory, each way; launch: seconds that a kernel takes whatever it does."""

    name: str
    memory: float
    flops_16: float
    flops_32: float
    bandwidth: float
    link: float
    network: float
    host: float
    launch: float = 3e-6
    per_node: int = 8
    product_share: float = 0.7
    attention_share: float = 0.45
    bandwidth_share: float = 0.8

    def lane(self, ranks: int) -> float:
        """Bytes a second that a device can send within a group of that many neighbours: `link` within a node."""
        return self.link if ranks <= self.per_node else self.network


MACHINES = {
    m.name: m
    for m in (
        Machine("a100", 80 * GB, 312e12, 156e12, 2.04e12, 300e9, 25e9, 25e9),
        Machine("h100", 80 * GB, 989e12, 495e12, 3.35e12, 450e9, 50e9, 55e9),
        Machine("h200", 141 * GB, 989e12, 495e12, 4.8e12, 450e9, 50e9, 55e9),
        Machine("b200", 180 * GB, 2250e12, 1125e12, 8.0e12, 900e9, 50e9, 55e9),
        Machine("cpu", 16 * GB, 2e11, 2e11, 4e10, 1e10, 1e10, 4e10, launch=1e-6),
    )
}


def find_machine(name: str) -> Machine:
    """The machine of that name.

    Raises:
        UserError: there is none.
    """
    if name not in MACHINES:
        raise UserError(f"unknown device '{name}'{nearest(name, MACHINES)}")
    return MACHINES[name]


def machine_of(device: torch.device) -> Machine:
    """The machine that a device is, by the name that it gives itself; the H100 for a GPU that the table lacks."""
    if device.type != "cuda":
        return MACHINES["cpu"]
    if not torch.cuda.is_available():
        return MACHINES["h100"]
    said = torch.cuda.get_device_name(device).lower()
    return next((m for name, m in MACHINES.items() if name in said), MACHINES["h100"])
