"""The harness of all benchmarks: circumstances, timings, the device's own rates, and rows that fail alone.

A script makes a `Run`, measures one row after another with it, and prints its table. Everything that is timed is timed
by `timing.py`; every file in benchmarks/results is written by `run.py`.
"""

from .environment import circumstances, commit, short_name
from .profile import launched
from .rates import device_rates
from .run import Run, arguments, release, replace_defaults
from .timing import Timing, graph_replays, repeated, replayed, rotated, synchronize
