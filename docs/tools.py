"""The page docs/tools.md, from the examples in examples/tools, which the tests run."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples" / "tools"
#: In which order; an example that is not here comes at the end.
ORDER = ("trainer", "accelerate_loop", "peft_lora", "lightning_module", "fsdp2", "lm_eval_artifact")
INTRODUCTION = """\
# In the tools you have

Written by `python docs/generate.py` from `examples/tools`; `tests/test_tools.py` runs each of them, where the tool is
installed. What takes a backend of `torch.compile` by its name, or a module that is compiled already, takes Fuseline.

| tool | what to write | tested with |
|---|---|---|
| transformers' Trainer | `torch_compile_backend="fuseline"`, after `import fuseline.integrations` | 5.17 |
| accelerate | `dynamo_backend="fuseline"`, after the same import | 1.15 |
| peft | the model with its adapters, to `torch.compile` | 0.21 |
| Lightning | `self.model.compile(backend="fuseline")` | 2.6 |
| FSDP2 | `layer.compile(backend="fuseline")`, then `fully_shard(layer)` | PyTorch 2.13, gloo |
| lm-evaluation-harness | `HFLM(pretrained=fuseline.load(DIR), tokenizer=…)` | 0.4.13 |
| transformers, reading exports | `AutoModelForCausalLM.from_pretrained(DIR)`: [saving](saving.md) | 5.17 |
| vLLM, reading exports | its parser of configurations; serving was not tried | `tests/test_tools.py` |
"""


def page() -> str:
    found = {path.stem: path for path in sorted(FOLDER.glob("*.py"))}
    names = [*(name for name in ORDER if name in found), *(name for name in found if name not in ORDER)]
    return "".join([INTRODUCTION, *(section(found[name]) for name in names)])


def section(path: Path) -> str:
    """An example: its docstring as text, its code under it."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    document = ast.get_docstring(tree) or ""
    head, _, rest = document.partition("\n\n")
    code = "".join(text.splitlines(keepends=True)[tree.body[0].end_lineno :]).lstrip("\n")
    command = f"python {path.relative_to(ROOT).as_posix()}"
    if rest.startswith("    "):
        command, rest = rest.strip(), ""
    more = f"{rest}\n\n" if rest else ""
    title = path.stem.replace("_", " ")
    return f"\n## {title}\n\n{head}\n\n{more}```text\n{command}\n```\n\n```python\n{code}```\n"
