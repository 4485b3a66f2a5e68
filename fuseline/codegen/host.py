"""The host function of a fused kernel: allocates the results, computes the grid, launches."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from .call import Unsupported
from .kernel import BufferUse, Kernel, Launcher, Out
from .kernel_text import call
from .schedule import Domain, Launch
from .sizes import SizeReader, product, same, shape, size
from .values import Names


@dataclass(frozen=True)
class Output:
    """A tensor that the kernel writes: the node, and the host's name for its buffer."""

    node: torch.fx.Node
    name: str


class Host:
    """A region's inputs and outputs as the host sees them. Raises Unsupported for a region that cannot be launched."""

    def __init__(self, name: str, nodes: list[torch.fx.Node]):
        self.name = name
        self.names = Names()
        self.names.taken |= {"torch", "triton", "rows", "n", "min", "max", name, f"{name}_kernel"}
        self.placeholders = [n for n in nodes if n.op == "placeholder"]
        self.parameters = [self.names.new(_role(n.name)) for n in self.placeholders]
        self.sizes = SizeReader(self.placeholders, self.parameters)
        pairs = zip(self.placeholders, self.parameters, strict=True)
        self.inputs = {n: text for n, text in pairs if isinstance(n.meta.get("val"), torch.Tensor)}
        if not self.inputs:
            raise Unsupported("no input is a tensor")
        result = next(n for n in nodes if n.op == "output").args[0]
        self.is_tuple = isinstance(result, (tuple, list))
        self.results = list(result) if isinstance(result, (tuple, list)) else [result]
        written = [
            r for r in dict.fromkeys(self.results)
            if isinstance(r, torch.fx.Node) and r.op != "placeholder" and isinstance(r.meta.get("val"), torch.Tensor)
        ]  # fmt: skip
        for node in self.results:
            if isinstance(node, torch.fx.Node) and isinstance(node.meta.get("val"), (list, tuple)):
                raise Unsupported(f"{node.name} is a list of tensors")
        wishes = ["out"] if len(written) == 1 else [f"{re.sub(r'(_[0-9]+)+$', '', n.name)}_out" for n in written]
        self.outputs = [Output(n, self.names.new(wish)) for n, wish in zip(written, wishes, strict=True)]
        self.device = next(iter(self.inputs.values()))
        devices = {n.meta["val"].device for n in (*self.inputs, *written)}
        if len(devices) != 1:
            raise Unsupported(f"it works on several devices: {', '.join(sorted(map(str, devices)))}")

    def launcher(
        self, kernel: Kernel, arguments: Mapping[str, str], domain: Domain, launch: Launch, *, rows_only: bool
    ) -> Launcher:
        """rows_only: some output has one value a row, so there is work even where rows have no columns."""
        body = []
        if not isinstance(domain.rows, int):
            body.append(f"rows = {self.sizes.product(domain.lead)}")
        if not isinstance(domain.length, int):
            body.append(f"n = {self.sizes.text(domain.length)}")
        for output in self.outputs:
            body += self._allocate(output)
        factors = [("rows", domain.rows)] + ([] if rows_only else [("n", domain.length)])
        symbolic = [f"{name} > 0" for name, value in factors if not isinstance(value, int)]
        if all(not isinstance(value, int) or value > 0 for _, value in factors):
            body += self._launch(kernel, arguments, launch, symbolic)
        body.append(f"return {self._results()}")
        head = call(f"def {self.name}(", [*self.parameters, *(f"{o.name}=None" for o in self.outputs)], "):")
        source = "\n".join([*head, *("    " + line for line in body)]) + "\n"
        return Launcher(self.name, source, (kernel,) if kernel.name in source else (), outs=tuple(self._outs()))

    def buffers(self, signature: Iterable[str]) -> tuple[BufferUse, ...]:
        """What a kernel's pointers point to, in the order of its arguments."""
        uses = {f"{text}_ptr": (node.name, "read") for node, text in self.inputs.items()}
        uses |= {f"{output.name}_ptr": (output.node.name, "write") for output in self.outputs}
        return tuple(BufferUse(argument, *uses[argument]) for argument in signature if argument in uses)

    def _outs(self) -> Iterator[Out]:
        for output in self.outputs:
            tensor = output.node.meta["val"]
            place = self.results.index(output.node)
            yield Out(output.name, place, shape(output.node), _strides(tensor), tensor.dtype)

    def _launch(self, kernel: Kernel, arguments: Mapping[str, str], launch: Launch, symbolic: list[str]) -> list[str]:
        indent, lines = "", []
        if symbolic:
            lines.append(f"if {' and '.join(symbolic)}:")
            indent += "    "
        computed = {name: text for name, text in launch.constants.items() if not text.isdigit()}
        lines += [f"{indent}{name} = {text}" for name, text in computed.items()]
        values = [_bare(arguments[a]) for a, kind in kernel.signature.items() if kind != "constexpr"]
        constants = {name: name if name in computed else text for name, text in launch.constants.items()}
        values += [f"{name}={text}" for name, text in constants.items()]
        values += [f"num_warps={kernel.num_warps}", f"num_stages={kernel.num_stages}"]
        lines.append(f"{indent}with torch.cuda.device_of({self.device}):")
        return lines + call(f"{kernel.name}[({launch.grid},)](", values, ")", indent + "    ")

    def _allocate(self, output: Output) -> list[str]:
        tensor = output.node.meta["val"]
        sizes = self._tuple(shape(output.node))
        rest = f"dtype={tensor.dtype}, device={self.device}.device"
        strides = _strides(tensor)
        made = f"empty({sizes}" if strides is None else f"empty_strided({sizes}, {self._tuple(strides)}"
        return [f"if {output.name} is None:", f"    {output.name} = torch.{made}, {rest})"]

    def _tuple(self, values: tuple[object, ...]) -> str:
        texts = [self.sizes.text(v) for v in values]
        return f"({', '.join(texts)}{',' if len(texts) == 1 else ''})"

    def _results(self) -> str:
        named = {o.node: o.name for o in self.outputs} | dict(zip(self.placeholders, self.parameters, strict=True))
        texts = []
        for result in self.results:
            if not isinstance(result, torch.fx.Node):
                texts.append(repr(result))
            elif result in named:
                texts.append(named[result])
            elif isinstance(result.meta.get("val"), (int, torch.SymInt)):
                texts.append(self.sizes.text(size(result.meta["val"])))
            else:
                raise Unsupported(f"{result.name} is neither a tensor nor a size")
        if not self.is_tuple:
            return texts[0]
        return f"({', '.join(texts)}{',' if len(texts) == 1 else ''})"


def _role(name: str) -> str:
    """`model_layers_3_input_layernorm_weight` → `weight`: which weight it is does not make it another kernel."""
    return re.sub(r".*_(weight|bias|codes|scale|zero)$", r"\1", name)


def _bare(text: str) -> str:
    """An argument without the parentheses that a formula carries for use inside another."""
    whole = text.startswith("(") and text.endswith(")") and ")" not in text[1:-1]
    return text[1:-1] if whole else text


def _strides(tensor: torch.Tensor) -> tuple[object, ...] | None:
    """The strides that the graph promises; None for contiguous ones, and for those of an expanded tensor.

    Elements of an expanded tensor share memory, so it cannot be written as such.
    """
    sizes, strides = tuple(size(s) for s in tensor.shape), tuple(size(s) for s in tensor.stride())
    if any(same(stride, 0) and not same(length, 1) for length, stride in zip(sizes, strides, strict=True)):
        return None
    contiguous = all(
        same(length, 1) or same(stride, product(sizes[k + 1 :]))
        for k, (length, stride) in enumerate(zip(sizes, strides, strict=True))
    )
    return None if contiguous or any(same(s, 0) for s in sizes) else strides
