"""What holds over the whole source: import directions, small files, no model's name, no hard dependency."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import fuseline

ROOT = Path(fuseline.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
STAGES = ("compiler", "passes", "codegen", "runtime")
# What each stage may import of the others; what lies beside the stages (cli, backend, optimize, …) may import them all.
ALLOWED = {"compiler": set(), "passes": {"compiler"}, "codegen": {"compiler"}, "runtime": {"compiler"}}
FAMILIES = r"llama|qwen|mistral|mixtral|gemma|phi[-_ ]?\d|\bphi\b|gpt(?!q)|\bbert\b|smollm|falcon|deepseek|opt-\d|bloom"


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def part(path: Path) -> str:
    """The stage that a file belongs to, or its own name."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The parts of this package that a file imports, at its top or inside functions."""
    package = ["fuseline", *path.relative_to(ROOT).with_suffix("").parts[:-1]]
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            names = [".".join([*module, alias.name]) for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("fuseline.")}
        found |= {"fuseline"} & set(names)
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_imports_point_one_way(stage: str) -> None:
    forbidden = {part(p) for p in FILES} - ALLOWED[stage] - {stage} | {"fuseline"}
    wrong = {str(p.relative_to(ROOT)): imported(p) & forbidden for p in FILES if part(p) == stage}
    assert not {path: parts for path, parts in wrong.items() if parts}


def test_the_import_test_sees_what_it_should() -> None:
    assert imported(ROOT / "backend.py") == {"compile", "compiler"}
    assert imported(ROOT / "passes" / "quantize_sites.py") == {"compiler"}


@pytest.mark.parametrize("stage", ["passes", "codegen", "compiler"])
def test_no_models_name(stage: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in FILES
        if part(path) == stage
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(FAMILIES, line, re.IGNORECASE) or "model_type" in line
    ]
    assert not found


def test_files_are_small() -> None:
    assert not {str(p.relative_to(ROOT)): p.stat().st_size for p in FILES if p.stat().st_size > 20_000}


def test_no_code_from_strings_and_no_pickle() -> None:
    def forbidden(node: ast.AST) -> bool:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return node.func.id in ("exec", "eval")
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        return any(name.split(".")[0] in ("pickle", "cloudpickle", "dill") for name in names)

    assert not [str(p) for p in FILES if any(map(forbidden, ast.walk(tree(p))))]


def test_private_pytorch_is_in_one_file() -> None:
    """Modules of PyTorch whose path begins with an underscore are imported in `compat.py`; the names that many files
    need and that have no public twin are listed."""
    known = {"torch._subclasses.fake_tensor"}
    found = set()
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch."):
                if any(p.startswith("_") for p in node.module.split(".")) and node.module not in known:
                    found.add(str(path.relative_to(ROOT)))
    assert found <= {
        "compiler/compat.py",
        "compiler/compat_debug.py",
        "compiler/compat_distributed.py",
        "compiler/compat_graphs.py",
        "compiler/compat_joint.py",
    }


def test_the_links_at_the_root_lead_to_the_stages() -> None:
    for stage in STAGES:
        assert (ROOT.parent / stage).resolve() == ROOT / stage


WITHOUT = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {absent!r} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import torch
import fuseline

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(16, 16)

    def forward(self, x):
        return torch.relu(self.fc(x)) * 2

model = fuseline.optimize(Net(), "quantize{{weights=int4:g8}},fuse", target={target!r})
x = torch.randn(2, 16)
with torch.no_grad():
    print(fuseline.reports(model), float((model(x) - Net.forward(model, x)).abs().max()) < 0.5)
print(sorted(set(sys.modules) & {absent!r}))
"""


@pytest.mark.parametrize("target", ["eager", pytest.param("auto", marks=pytest.mark.slow)])
@pytest.mark.parametrize("absent", [{"triton", "transformers"}])
def test_neither_triton_nor_transformers_is_needed(absent: set[str], target: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(absent=absent, target=target)],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[] True", "[]"]


def test_importing_is_light() -> None:
    heavy = {"triton", "transformers", "torch._inductor.compile_fx"}
    command = f"import sys, fuseline; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_public_names_exist() -> None:
    assert all(hasattr(fuseline, name) for name in fuseline.__all__)
    assert {"capture", "optimize", "Pipeline", "Program", "Pass", "Rule"} <= set(fuseline.__all__)
