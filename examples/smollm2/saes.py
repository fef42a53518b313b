"""Top-k SAEs by SAELens' own trainer, saved in SAELens' own format."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corrsteer import SparseEncoder
from corrsteer.files import write_utf8

BATCH = 1024
QUALITY = "quality.json"


def train(x: Tensor, training: int, layer: int, folder: Path, d_sae: int, k: int, steps: int, seed: int = 0) -> None:
    """Train the SAE of a layer and save it to `folder`, unless it is there.

    Parameters
    ----------
    x : residuals `[T, d]`, of which the first `training` are trained on, and the others held out.
    """
    if (folder / QUALITY).exists():  # which is written last
        return
    started = time.process_time()
    torch.manual_seed(seed)
    sae = _trainer(x[:training], layer, d_sae, k, steps, min(BATCH, training)).fit()
    seconds = time.process_time() - started
    sae.save_inference_model(str(folder))
    write_utf8(folder / QUALITY, json.dumps({**quality(sae, x[training:]), "cpu_seconds": seconds}) + "\n")


def _trainer(x: Tensor, layer: int, d_sae: int, k: int, steps: int, batch: int) -> Any:
    from sae_lens import TopKTrainingSAEConfig, TrainingSAE
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    def batches() -> Iterator[Tensor]:
        while True:
            for rows in torch.randperm(len(x), dtype=torch.int64).split(batch):
                if len(rows) == batch:
                    yield x[rows].float()

    config = TopKTrainingSAEConfig(
        d_in=x.shape[1], d_sae=d_sae, k=k, rescale_acts_by_decoder_norm=True,
        normalize_activations="expected_average_only_in",  # as norms differ between layers; folded in at the end
    )  # fmt: skip
    config.metadata.hook_name = f"blocks.{layer}.hook_resid_post"
    config.metadata.hf_hook_name = f"model.layers.{layer}"
    config.metadata.model_name = "SmolLM2-135M-Instruct"
    sae = TrainingSAE.from_dict(config.to_dict())
    some = x[: 64 * batch].float()
    sae.b_dec.data = some.mean(0) * (x.shape[1] ** 0.5 / some.norm(dim=1).mean())  # where training starts
    settings = SAETrainerConfig(
        n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False, total_training_samples=steps * batch,
        device="cpu", autocast=True, lr=1e-3, lr_end=1e-4, lr_scheduler_name="cosineannealing",
        lr_warm_up_steps=min(50, steps // 4), lr_decay_steps=0, n_restart_cycles=1, adam_beta1=0.9, adam_beta2=0.999,
        train_batch_size_samples=batch, dead_feature_window=max(1, steps // 4), feature_sampling_window=2 * steps,
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    return SAETrainer(cfg=settings, sae=sae, data_provider=batches())


@torch.no_grad()
def quality(sae: Any, x: Tensor) -> dict[str, Any]:
    """What an SAE explains of the variance of `x [T, d]`, and how many features are active in none of its tokens."""
    left, fired = 0.0, torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    for part in x.float().split(4096):
        z = sae.encode(part)
        fired |= (z > 0).any(0)
        left += float((part - sae.decode(z)).square().sum())
    total = float((x.float() - x.float().mean(0)).square().sum())
    return {"tokens": len(x), "explained": 1 - left / total, "dead": int((~fired).sum()), "d_sae": len(fired)}


def load(folder: Path) -> tuple[SparseEncoder, dict[str, Any]]:
    """A saved SAE's encoder, and its quality."""
    return SparseEncoder.load(folder), json.loads((folder / QUALITY).read_text(encoding="utf-8"))
