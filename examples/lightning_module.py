"""Truncated BPTT with synthetic gradients in PyTorch Lightning 2, which has no truncated BPTT of its own.

    python examples/lightning_module.py [FILE] [--precision bf16-mixed] [--accumulate 2]

A batch is a window, and the module keeps the state from one to the next. Optimization stays automatic, so
precision, accumulation, clipping and logging are options of the Trainer. The windows must come in order:
without shuffling, and without a sampler from the Trainer.
"""

import argparse
from pathlib import Path

import lightning as L
import torch
from characters import Average, CharModel, read, windows
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

ROWS = 32


# --8<-- [start:module]
class TruncatedBPTT(L.LightningModule):
    """`CharModel`, trained window by window."""

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.model = CharModel(symbols)
        self.average = Average()

    def on_train_epoch_start(self) -> None:
        self.state = self.model.initial_state(ROWS)  # the text starts again

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:  # 16-mixed only
            self.model.interface.loss_scale = scaler.scale(torch.ones((), device=self.device))
        x, y = batch
        logits, self.state, sent = self.model(x, self.state)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        self.average.add(loss)
        return loss + sent

    def configure_gradient_clipping(self, *_: object, gradient_clip_val: float, **__: object) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.net_parameters(), gradient_clip_val)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 3e-3)


# --8<-- [end:module]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path, nargs="?", help="any text; the default is a source file of torch")
    parser.add_argument("--bptt", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1500, help="windows")
    parser.add_argument("--precision", default="32-true", help="see the Trainer of Lightning")
    parser.add_argument("--accumulate", type=int, default=1, help="windows per update")
    parser.add_argument("--accelerator", default="auto")
    args = parser.parse_args()

    torch.manual_seed(0)
    text, symbols = read(args.file)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator=args.accelerator,
        precision=args.precision,
        accumulate_grad_batches=args.accumulate,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    stream = list(windows(text, ROWS, args.bptt, args.steps))
    trainer.fit(TruncatedBPTT(symbols), DataLoader(stream, batch_size=None))  # type: ignore[arg-type]
