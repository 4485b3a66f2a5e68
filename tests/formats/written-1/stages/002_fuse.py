"""Stage 002: after fuse: 2 rewrites, 0 refused

Run this file to execute the stage on its inputs. Edit `forward` (one call of an op a line), and run it again or go on
from here: fuseline opt 002_fuse.py -p PIPELINE
"""

import math
import operator
from math import inf, nan

import torch

import fuseline


class Stage:
    def forward(self, x, norm_weight, norm_bias, up_weight, up_bias, down_weight, down_bias):
        # the model    write.py:34
        linear_0 = self.linear_0(x, norm_weight, norm_bias, up_weight, up_bias)  # float32[4, 16]
        linear_2 = self.linear_1(linear_0, down_weight, down_bias, x)  # float32[4, 8]
        return (linear_2,)

    def linear_0(self, x, norm_weight, norm_bias, up_weight, up_bias):
        # norm    write.py:34
        layer_norm_default = torch.ops.fuseline.layer_norm.default(x, norm_weight, norm_bias, 1e-05)  # float32[4, 8]
        # up    write.py:34
        linear = torch.ops.aten.linear.default(layer_norm_default, up_weight, up_bias)  # float32[4, 16]
        # the model    write.py:34
        silu = torch.ops.aten.silu.default(linear)  # float32[4, 16]
        return silu

    def linear_1(self, linear_0, down_weight, down_bias, x):
        # down    write.py:34
        linear_1 = torch.ops.aten.linear.default(linear_0, down_weight, down_bias)  # float32[4, 8]
        # the model    write.py:34
        add = torch.ops.aten.add.Tensor(x, linear_1)  # float32[4, 8]
        return add


STAGE = {'format': 1,
 'inputs': {'x': {'index': 6, 'type': 'float32[4, 8]'}},
 'symbols': {},
 'training': False,
 'state': ['fused', 'raised'],
 'regions': {'linear_0': 'linear', 'linear_1': 'linear'},
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
 'makers': [(), ('raise/LayerNorm', 'fuse/layer_norm + linear + silu'), ('fuse/layer_norm + linear + silu',),
            ('fuse/linear + add',)],
 'nodes': {'linear_0.layer_norm_default': (1, [1, 1], 1),
           'linear_0.linear': (2, [1], 2),
           'linear_0.silu': (0, [1], 2),
           'linear_0': (0, [1, 1], 1),
           'linear_1.linear_0': (0, [1, 1], 1),
           'linear_1.linear_1': (3, [1], 3),
           'linear_1.add': (0, [1], 3),
           'linear_2': (0, [1, 1], 3)}}


if __name__ == "__main__":
    from fuseline.compiler.stage import run_stage

    run_stage(__file__)
