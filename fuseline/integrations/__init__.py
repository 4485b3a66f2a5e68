"""What other libraries must be told before they take "fuseline" as a name: `import fuseline.integrations`.

accelerate, and the Trainer of transformers through it, accept only the backends of `torch.compile` that a list of their
own has. The import adds "fuseline" to it: `TrainingArguments(torch_compile=True, torch_compile_backend="fuseline")`,
`Accelerator(dynamo_backend="fuseline")`, `accelerate launch --dynamo_backend=fuseline`. Nothing else is changed, and
nothing happens where accelerate is not installed. Everything that takes a backend by its name, or a compiled module
(Lightning, peft, FSDP2), needs no import.
"""

from importlib.util import find_spec

from .accelerate import add_backend

if find_spec("accelerate") is not None:
    add_backend()

__all__ = ["add_backend"]
