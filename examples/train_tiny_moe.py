"""Train a small mixture of experts on this machine's own text, a byte a token: what `demo:tiny-moe` is.

    python examples/train_tiny_moe.py --out tiny-moe.safetensors        the weights that the package ships, in minutes
    python examples/train_tiny_moe.py --steps 20                        a look at it, in seconds

The text is the standard library's sources; one file of sixteen is held out. The model has 16 experts a layer, of which
each byte takes two.
"""

import argparse
import hashlib
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from fuseline.models.mixture import TinyMixture

EVERY, LENGTH = 16, 128


def texts(limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes to train on and bytes held out, of whole files in an order that their names give."""
    library = Path(sysconfig.get_path("stdlib"))
    names = [p for p in library.rglob("*.py") if not {"test", "tests", "site-packages", "encodings"} & set(p.parts)]
    names.sort(key=lambda p: hashlib.sha256(p.relative_to(library).as_posix().encode()).digest())
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for number, path in enumerate(names):
        text = path.read_bytes()
        if 500 <= len(text) <= 150_000 and sum(map(len, parts[0])) < limit:
            parts[number % EVERY == EVERY - 1].append(text)
    training, held_out = (torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8) for part in parts)
    return training, held_out


def windows(text: torch.Tensor, count: int, draw: torch.Generator) -> torch.Tensor:
    """int64 [count, LENGTH + 1] at random places."""
    starts = torch.randint(len(text) - LENGTH - 1, (count, 1), generator=draw)
    return text[starts + torch.arange(LENGTH + 1)].long()


def loss_of(model: TinyMixture, batch: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--bytes", type=int, default=8_000_000)
    parser.add_argument("--out", type=Path, help="a .safetensors file, in bfloat16")
    options = parser.parse_args()
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    training, held_out = texts(options.bytes)
    model = TinyMixture(hidden=96, layers=3, heads=4, kv_heads=2, experts=16, chosen=2, inner=64)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=96**-0.5)
    optimizer = torch.optim.AdamW(model.parameters(), options.rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, total_steps=options.steps, pct_start=0.05)
    test = windows(held_out, 64, torch.Generator().manual_seed(1))
    started = time.monotonic()
    for step in range(options.steps):
        loss = loss_of(model, windows(training, options.batch, draw)) + 0.01 * model.balance()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, options.steps // 10) == 0:
            model.eval()
            with torch.no_grad():
                held = loss_of(model, test)
            model.train()
            print(
                f"step {step + 1}: held-out loss {held:.3f} nats a byte, {time.monotonic() - started:.0f} s", flush=True
            )
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, {2 * size / 1e6:.1f} MB in bfloat16")
    if options.out is not None:
        from safetensors.torch import save_file

        save_file({name: p.detach().bfloat16().contiguous() for name, p in model.state_dict().items()}, options.out)
        print(f"written: {options.out}")


if __name__ == "__main__":
    main()
