"""A small byte-level language model, the text that it is trained on, and the loop that trains it."""

from .data import Corpus
from .loop import Trainer, held_out
