"""`fuseline.examine(model, *args)`: what will become of a model, before anything of it is compiled."""

from .call import examine, examine_program
from .findings import Examination, Finding

__all__ = ["Examination", "Finding", "examine", "examine_program"]
