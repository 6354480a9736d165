"""Lightning: the LightningModule is the model that its optimizer, DDP and checkpoints see.

    python examples/lightning_module.py --out runs/lightning && ... --resume

Changed lines are marked SVR. A radius anywhere in the module is trained; attached to the model it
is in the model's own checkpoints as well.
"""

from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from supclap_kernels import StaticRadius, SVRLoss, attach_radius  # SVR

from toy import Towers, batch, command_line


class Contrastive(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Towers()
        self.radius = attach_radius(self.model, StaticRadius(1.0))  # SVR

    def setup(self, stage: str) -> None:
        across = "world" if self.trainer.world_size > 1 else None
        self.criterion = SVRLoss(self.radius, beta=1.0, group=across)  # SVR

    def training_step(self, pairs: tuple[Tensor, Tensor], index: int) -> Tensor:
        return self.criterion(*self.model(*pairs))  # SVR

    def train_dataloader(self) -> Any:
        """Stands for your data: an epoch of one batch."""
        return torch.utils.data.DataLoader([batch(self.current_epoch)], batch_size=None)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def train(out: Path, steps: int, resume: bool = False) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    module = Contrastive()
    trainer = Trainer(
        max_epochs=steps, reload_dataloaders_every_n_epochs=1, accelerator="cpu", devices=1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    path = out / "last.ckpt"
    trainer.fit(module, ckpt_path=path if resume else None)
    trainer.save_checkpoint(path)
    return module.model, trainer.optimizers[0]


if __name__ == "__main__":
    command_line(train)
