"""The start of a script with a fault of its own, for tests that run a command."""

HERE = """
import torch
import fuseline
import tests.debugging.faults as faults
from tests.helpers.models import Mlp

class Here(faults.Fault):
    name = "here"
    def before(self, x):
        return faults.call("silu", x)
    def _is_here(self, node):
        return True
    def after(self, m, new):
        return new(torch.ops.aten.relu.default, m.x)

faults.FAULTS["here"] = Here
"""
