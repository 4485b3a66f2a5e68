"""Stage 000: captured, before raise,fuse

Run this file to execute the stage on its inputs. Edit `forward` (one call of an op a line), and run it again or go on
from here: fuseline opt 000_captured.py -p PIPELINE
"""

import math
import operator
from math import inf, nan

import torch

import fuseline


class Stage:
    def forward(self, x, norm_weight, norm_bias, up_weight, up_bias, down_weight, down_bias):
        # norm    write.py:34
        layer_norm = torch.ops.aten.layer_norm.default(x, [8], norm_weight, norm_bias, 1e-05, False)  # float32[4, 8]
        # up    write.py:34
        linear = torch.ops.aten.linear.default(layer_norm, up_weight, up_bias)  # float32[4, 16]
        # the model    write.py:34
        silu = torch.ops.aten.silu.default(linear)  # float32[4, 16]
        # down    write.py:34
        linear_1 = torch.ops.aten.linear.default(silu, down_weight, down_bias)  # float32[4, 8]
        # the model    write.py:34
        add = torch.ops.aten.add.Tensor(x, linear_1)  # float32[4, 8]
        return (add,)


STAGE = {'format': 1,
 'inputs': {'x': {'index': 6, 'type': 'float32[4, 8]'}},
 'symbols': {},
 'training': False,
 'state': [],
 'regions': {},
 'tensors': {'kind': 'file', 'count': 7, 'numbers': {}, 'name': 'inputs.safetensors'}}

WEIGHTS = {'norm_weight': 'norm.weight',
 'norm_bias': 'norm.bias',
 'up_weight': 'up.weight',
 'up_bias': 'up.bias',
 'down_weight': 'down.weight',
 'down_bias': 'down.bias'}

PARAMETERS = {'norm.weight': {'index': 0, 'type': 'float32[8]'},
 'norm.bias': {'index': 1, 'type': 'float32[8]'},
 'up.weight': {'index': 2, 'type': 'float32[16, 8]'},
 'up.bias': {'index': 3, 'type': 'float32[16]'},
 'down.weight': {'index': 4, 'type': 'float32[8, 16]'},
 'down.bias': {'index': 5, 'type': 'float32[8]'}}

ORIGINS = {'modules': ['', 'norm', 'up', 'down'],
 'lines': ['', 'tests/formats/write.py:34'],
 'makers': [()],
 'nodes': {'layer_norm': (1, [1], 0),
           'linear': (2, [1], 0),
           'silu': (0, [1], 0),
           'linear_1': (3, [1], 0),
           'add': (0, [1], 0)}}


if __name__ == "__main__":
    from fuseline.compiler.stage import run_stage

    run_stage(__file__)
