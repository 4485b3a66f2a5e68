"""Plans before the run: a training step's memory and time as formulas, and the longest sequence that fits."""

from .capture import joint_of_model, joint_of_shape
from .formulas import Formula, longest, step_formula
from .switches import Stretch, by_length

__all__ = ["Formula", "Stretch", "by_length", "joint_of_model", "joint_of_shape", "longest", "step_formula"]
