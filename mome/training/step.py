"""One optimiser step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mome.model_inputs import check_scalar
from mome.training.config import TrainConfig


def optimizer_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_function: nn.Module,
    batches: Iterator[dict[str, Tensor]],
    text_PT: Tensor,
    config: TrainConfig,
) -> dict[str, float]:
    """Makes one optimiser step over `gradient_accumulation` batches.

    Args:
        accelerator: The run's.
        model: The model, as `accelerator.prepare` returned it.
        optimizer: Likewise.
        loss_function: Logits, targets and what is annotated → segmentation loss.
        batches: What `mome.training.batches.batches_from` returns.
        text_PT: Rows (P, T) of the P prompts, as `TextRows.at` makes them.
        config: Settings of the loop.

    Returns:
        `loss`, `segmentation_loss`, `aux_loss` and, as `aux_loss/<name>`, every named auxiliary loss of the routers;
        means over the batches and all processes.

    Raises:
        InputError: The loss is no scalar.
    """
    totals: dict[str, Tensor] = {}
    for _ in range(config.gradient_accumulation):
        batch = next(batches)
        volume = batch["volume"]
        if config.channels_last:
            volume = volume.contiguous(memory_format=torch.channels_last_3d)
        with accelerator.accumulate(model):
            output = model(volume=volume, text_PT=text_PT.to(volume.device), origin_B3=batch["origin"])
            segmentation = loss_function(output.compared, batch["targets"], batch["supervised"])
            check_scalar(segmentation, loss_function)
            loss = segmentation + output.aux_loss
            accelerator.backward(loss)
            if accelerator.sync_gradients and config.clip_norm:
                accelerator.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimizer.step()
            if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                accelerator.unwrap_model(model).after_step()
            optimizer.zero_grad()
        losses = {"loss": loss, "segmentation_loss": segmentation, "aux_loss": output.aux_loss}
        losses |= {f"aux_loss/{name}": value for name, value in output.aux_losses.items()}
        for name, value in losses.items():
            total = value.detach().to(torch.promote_types(value.dtype, torch.float32))
            totals[name] = totals.get(name, 0) + total
    # The first is the loss, the sum of the others and of the widest type among them.
    widest = totals["loss"].dtype
    stacked = torch.stack([value.to(widest) for value in totals.values()])
    means = accelerator.reduce(stacked, reduction="mean") / config.gradient_accumulation
    return dict(zip(totals, means.tolist(), strict=True))
