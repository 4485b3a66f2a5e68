"""A LightningModule whose network is compiled by Fuseline; Lightning's own loop trains it."""

import lightning
import torch

from fuseline.backend import recent
from fuseline.models.decoder import TinyDecoder


class Language(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = TinyDecoder(vocabulary=64, hidden=32, layers=1)
        self.model.compile(backend="fuseline")

    def training_step(self, batch, index):
        logits = self.model(batch[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


data = torch.utils.data.DataLoader(torch.arange(64).reshape(4, 16), batch_size=2)
trainer = lightning.Trainer(
    max_epochs=2, accelerator="auto", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False,
)  # fmt: skip
trainer.fit(Language(), data)
loss = trainer.callback_metrics["loss"].item()
print(f"loss {loss:.3f}; raise rewrote {recent[-1].report['raise'].matched} sites")
