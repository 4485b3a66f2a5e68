"""What is emitted for a replay: models by pipelines."""

from __future__ import annotations

import re
import sys
import tomllib
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from ..compiler.errors import UserError, nearest
from ..compiler.pipeline import Pipeline

FUSED = "raise{allow_empty},fuse{allow_empty}"
PIPELINES = (
    FUSED,
    "raise{allow_empty},quantize{weights=int8,allow_empty},fuse{allow_empty}",
    "raise{allow_empty},quantize{weights=int4:g32,allow_empty},fuse{allow_empty}",
    "raise{allow_empty},quantize{weights=int4:g32:sym,activations=int8,allow_empty},fuse{allow_empty}",
)
CORPORA = ("tiny", "families")


@dataclass(frozen=True)
class Case:
    """A model under a pipeline.

    folder: the name of its record. model: a MODEL, or `family:ROW`, a row of tests/families.
    """

    folder: str
    model: str
    pipeline: str

    def __str__(self) -> str:
        return f"{self.model}  {_short(self.pipeline)}"

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def corpus(name: str) -> list[Case]:
    """The cases of "tiny", of "families" (a checkout's tests/families), or of a TOML file.

    A file has `models = ["demo:tiny-llama", "py:mine.py:make"]`, and may have `pipelines = ["raise,fuse"]`.

    Raises:
        UserError: there is no such corpus, the file is not of that form, or there is no checkout.
    """
    if name == "tiny":
        models = ["demo:tiny-decoder"] + (["demo:tiny-llama"] if find_spec("transformers") else [])
        return cases(models, PIPELINES)
    if name == "families":
        return cases([f"family:{row}" for row in _families()], PIPELINES[:2])
    path = Path(name)
    if not path.is_file():
        raise UserError(f"no corpus {name!r}{nearest(name, CORPORA)}", remedy="a TOML file with models and pipelines")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no TOML file", [str(error)]) from error
    models, pipelines = data.get("models"), data.get("pipelines", [FUSED])
    for key, found in (("models", models), ("pipelines", pipelines)):
        if not isinstance(found, list) or not found or not all(isinstance(item, str) for item in found):
            raise UserError(f"{path}: '{key}' is not a list of strings", remedy='models = ["demo:tiny-llama"]')
    for pipeline in pipelines:
        Pipeline(pipeline)
    return cases(models, pipelines)


def cases(models: list[str], pipelines: tuple[str, ...] | list[str]) -> list[Case]:
    """Each model under each pipeline, in folders of their own."""
    found: dict[str, Case] = {}
    for model in models:
        for pipeline in pipelines:
            wish = folder = re.sub(r"[^\w.=-]+", "_", f"{model}__{_short(pipeline)}").strip("_")[:120]
            count = 1
            while folder in found:
                count += 1
                folder = f"{wish}_{count}"
            found[folder] = Case(folder, model, pipeline)
    return list(found.values())


def _short(pipeline: str) -> str:
    return pipeline.replace("{allow_empty}", "").replace(",allow_empty", "")


def _families() -> list[str]:
    root = str(Path(__file__).resolve().parents[2])
    sys.path.append(root)  # a checkout's tests are no installed package
    try:
        from tests.families.registry import ROWS  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError(
            "the corpus 'families' is in tests/families of a checkout, and needs transformers",
            [f"{type(error).__name__}: {error}"],
            "pip install -e CHECKOUT[hf]",
        ) from error
    finally:
        sys.path.remove(root)
    return list(ROWS)
