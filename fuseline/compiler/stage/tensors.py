"""Where a stage's tensors come from: the values at capture, in a file beside it or in itself, or random ones."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError

if TYPE_CHECKING:
    from ..program import Program

FILE = "inputs.safetensors"
EMBEDDED_BYTES = 4 << 20  # of values, in the file's own text


@dataclass(frozen=True)
class Recipe:
    """How the values of a stage's flat arguments are found again.

    kind: "none" (types only), "file" (the safetensors file `name` beside the stage), "embedded" (in the stage's own
    text; for small programs), or "random" (drawn from `seed`, floating-point tensors with the mean and the deviation
    of the captured ones, integers within their range).
    """

    kind: str = "none"
    seed: int = 0
    name: str = FILE

    def to_json(self, program: Program) -> dict[str, Any]:
        """The table's entry; `numbers` are the arguments that are no tensors."""
        if self.kind == "none" or program.examples is None:
            return {"kind": "none"}
        entry: dict[str, Any] = {"kind": self.kind, **_plain(program.examples)}
        if self.kind == "file":
            return {**entry, "name": self.name}
        tensors = _tensors(program.examples)
        if self.kind == "embedded":
            from safetensors.torch import save

            size = example_bytes(program)
            if size > EMBEDDED_BYTES:
                raise UserError(
                    f"{size / 1e6:.1f} MB of tensors are too many to write into one file of text",
                    remedy="random values (seeded), or a program that was reduced first",
                )
            data = save(tensors)
            entry["data"] = base64.b64encode(data).decode()
        elif self.kind == "random":
            entry["seed"] = self.seed
            entry["like"] = {name: _statistics(t) for name, t in tensors.items()}
        return entry


def example_bytes(program: Program) -> int:
    """The bytes of the caller's tensors, parameters included."""
    return sum(t.numel() * t.element_size() for t in (program.examples or ()) if isinstance(t, torch.Tensor))


def save_examples(program: Program, directory: Path, name: str = FILE) -> None:
    """Writes the caller's tensors, parameters included, beside the stages of a dump."""
    from safetensors.torch import save_file

    save_file(_tensors(program.examples or ()), directory / name)


def examples(entry: dict[str, Any], directory: Path) -> list[Any] | None:
    """The flat arguments that a stage's entry describes; None where it has types only.

    Raises:
        UserError: the file beside the stage is missing.
    """
    from safetensors.torch import load, load_file

    if entry["kind"] == "none":
        return None
    flat: list[Any] = [entry["numbers"].get(str(i)) for i in range(entry["count"])]
    if entry["kind"] == "file":
        path = directory / entry["name"]
        if not path.exists():
            raise UserError(f"{directory} holds no {path.name}", remedy="dump again with tensors=True")
        found = load_file(path)
    elif entry["kind"] == "embedded":
        found = load(base64.b64decode(entry["data"]))
    else:
        generator = torch.Generator().manual_seed(entry["seed"])
        found = {name: _draw(like, generator) for name, like in entry["like"].items()}
    for name, tensor in found.items():
        flat[int(name.removeprefix("argument_"))] = tensor
    return flat


def placed(flat: list[Any], entries: Iterable[dict[str, Any]]) -> list[Any]:
    """The arguments on the devices that their entries name, where this machine has those."""
    for entry in entries:
        device, value = torch.device(entry.get("device", "cpu")), flat[entry["index"]]
        if isinstance(value, torch.Tensor) and (device.type != "cuda" or torch.cuda.is_available()):
            flat[entry["index"]] = value.to(device)
    return flat


def _tensors(flat: Sequence[Any]) -> dict[str, torch.Tensor]:
    return {f"argument_{i}": x.detach().cpu().clone().contiguous() for i, x in enumerate(flat) if torch.is_tensor(x)}


def _plain(flat: Sequence[Any]) -> dict[str, Any]:
    plain = (bool, int, float, str)
    numbers = {
        str(i): x if isinstance(x, plain) else int(x)
        for i, x in enumerate(flat)
        if isinstance(x, (*plain, torch.SymInt))
    }
    return {"count": len(flat), "numbers": numbers}


def _statistics(tensor: torch.Tensor) -> dict[str, Any]:
    entry: dict[str, Any] = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
    if tensor.numel() == 0:
        return entry
    if tensor.is_floating_point():
        finite = tensor.double()[tensor.isfinite()]
        entry["mean"] = float(finite.mean()) if finite.numel() else 0.0
        entry["deviation"] = float(finite.std()) if finite.numel() > 1 else 0.0
    elif not tensor.is_complex():
        entry["range"] = [int(tensor.min()), int(tensor.max())]
    return entry


def _draw(like: dict[str, Any], generator: torch.Generator) -> torch.Tensor:
    shape, dtype = like["shape"], getattr(torch, like["dtype"])
    if "mean" in like:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * like["deviation"] + like["mean"]
        return drawn.to(dtype)
    low, high = like.get("range", [0, 0])
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)
