"""LAION-CLAP: its `train_one_epoch`, which builds the loss anew each epoch.

    python examples/laion_clap_loop.py --out runs/laion && ... --resume

Changed lines are marked SVR; the rest is what laion_clap/training/main.py does.
"""

import functools
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from toy import BATCH, command_line

package = find_spec("laion_clap")
assert package is not None and package.submodule_search_locations, "pip install laion_clap"
sys.path.append(package.submodule_search_locations[0])  # its own scripts run in this folder
from clap_module.model import CLAP  # noqa: E402
from training import train as loop  # noqa: E402

from supclap_kernels import StaticRadius, attach_radius  # noqa: E402  # SVR
from supclap_kernels.integrations.laion_clap import ClipLoss  # noqa: E402  # SVR


class Loader:
    """Stands for your webdataset: one epoch is one step here."""

    num_batches, num_samples = 1, BATCH

    def __init__(self, epoch: int) -> None:
        generator = torch.Generator().manual_seed(epoch)
        waveform = torch.randn(BATCH, 1_000, generator=generator)
        text = torch.randint(1, 64, (BATCH, 8), generator=generator)
        self.batch = {"waveform": waveform, "text": text}

    def __iter__(self) -> Any:
        return iter([self.batch])


class Ears(nn.Module):
    """Stands for HTSAT: an audio branch of few parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1_000, 32)

    def forward(self, audio: Any, mixup_lambda: Any = None, device: Any = None) -> Any:
        return {"embedding": self.layer(audio["waveform"].to(device))}


def clap() -> nn.Module:
    """Stands for create_model(args.amodel, args.tmodel, ...)."""
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    text = {**text, "model_type": "transformer"}
    model = CLAP(32, {"model_name": "Cnn6"}, text, joint_embed_shape=32)
    model.audio_branch = Ears()
    return model


def train(out: Path, steps: int, resume: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    args = SimpleNamespace(
        device="cpu", precision="fp32", rank=0, world_size=1, distributed=False, horovod=False,
        local_loss=False, gather_with_grad=False, clap_mlploss=False, kappa=0, wandb=False,
        dataset_type="webdataset",
    )  # fmt: skip
    torch.manual_seed(0)
    model = clap()
    radius = attach_radius(model, StaticRadius(1.0))  # SVR: before DDP and the optimizer
    # SVR: each epoch's loss has this radius.
    loop.ClipLoss = functools.partial(ClipLoss, radius=radius, beta=1.0)  # SVR
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    plain = [p for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n]
    rest = [p for n, p in named if not any(p is q for q in plain)]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    start, path = 0, out / "epoch_latest.pt"
    if resume:
        checkpoint = torch.load(path)
        model.load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start = checkpoint["epoch"]
    for epoch in range(start, steps):
        torch.manual_seed(epoch)
        data = {"train": SimpleNamespace(dataloader=Loader(epoch), sampler=None)}
        loop.train_one_epoch(model, data, epoch, optimizer, None, lambda step: None, args)
    checkpoint = {"epoch": steps, "state_dict": model.state_dict()}
    torch.save({**checkpoint, "optimizer": optimizer.state_dict()}, path)
    return model, optimizer


if __name__ == "__main__":
    command_line(train)
