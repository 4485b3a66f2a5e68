"""A model to try the pass on: `fuseline opt py:model.py:make -p fold-layer-scale`."""

import torch
from test_fold_layer_scale import Block


def make():
    return torch.nn.Sequential(Block(), Block(bias=False)), (torch.randn(3, 8),)
