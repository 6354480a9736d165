"""open_clip: its `train_one_epoch`, whose optimizer gets the model's parameters alone.

    python examples/open_clip_loop.py --out runs/open_clip && ... --resume

Changed lines are marked SVR; the rest is what open_clip_train/main.py does.
"""

from pathlib import Path
from typing import Any

import torch
from open_clip import CLIP
from open_clip_train.data import DataInfo
from open_clip_train.params import parse_args
from open_clip_train.train import train_one_epoch
from torch import nn

from supclap_kernels import StaticRadius, attach_radius  # SVR
from supclap_kernels.integrations.open_clip import ClipLoss  # SVR

from toy import BATCH, command_line


class Loader:
    """Stands for your webdataset: one epoch is one step here."""

    num_batches, num_samples = 1, BATCH

    def __init__(self, epoch: int) -> None:
        generator = torch.Generator().manual_seed(epoch)
        images = torch.randn(BATCH, 3, 32, 32, generator=generator)
        self.batch = images, torch.randint(1, 64, (BATCH, 8), generator=generator)

    def __iter__(self) -> Any:
        return iter([self.batch])


def clip() -> CLIP:
    """Stands for open_clip.create_model_and_transforms(...)."""
    vision = {"layers": 1, "width": 32, "patch_size": 16, "image_size": 32, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    return CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text, output_dict=True)


def train(out: Path, steps: int, resume: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    args = parse_args(["--precision", "fp32", "--batch-size", str(BATCH), "--lr", "1e-2"])
    args.device, args.rank, args.world_size, args.local_rank = "cpu", 0, 1, 0
    args.distributed = args.skip_scheduler = args.distill = args.wandb = False
    torch.manual_seed(0)
    model = clip()
    radius = attach_radius(model, StaticRadius(1.0))  # SVR: before DDP and the optimizer
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    plain = [p for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n]
    rest = [p for n, p in named if not any(p is q for q in plain)]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": rest, "weight_decay": args.wd}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    loss = ClipLoss(radius=radius, beta=1.0)  # SVR: instead of create_loss(args)
    start, path = 0, out / "epoch_latest.pt"
    if resume:
        checkpoint = torch.load(path)
        model.load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start = checkpoint["epoch"]
    for epoch in range(start, steps):
        data = {"train": DataInfo(Loader(epoch))}
        constant = lambda step: None  # noqa: E731
        train_one_epoch(model, data, loss, epoch, optimizer, None, constant, None, args)
    checkpoint = {"epoch": steps, "state_dict": model.state_dict()}
    torch.save({**checkpoint, "optimizer": optimizer.state_dict()}, path)
    return model, optimizer


if __name__ == "__main__":
    command_line(train)
