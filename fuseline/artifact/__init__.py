"""Artifacts: `fuseline.save` writes an optimized model to a folder, `fuseline.load` makes it again from there.

    out/
      fuseline.json              the manifest: pipeline, model, every tensor's type, what was derived from which weights
      model-<digest>.safetensors derived values, and the weights and buffers that are still read as they are
      plan-<digest>.json         what passes that need data decided, with tensors beside it; only where there is a plan
      config.json, …             copies for other tools, of transformers models; not read back

No code and no kernel is stored: graphs and kernels are made again from the pipeline and the plan.
"""

from .load import load
from .save import save
