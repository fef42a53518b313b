"""What tells a model from others, in anything JSON can hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from corrsteer.fingerprints import fingerprint
from corrsteer.lm.hook_points import input_device


def described(model: Any) -> dict[str, Any]:
    """A model's name, dtype and some of its weights; of one that another engine holds, its name is asked for there."""
    if not isinstance(model, nn.Module):
        return {}
    config: Any = getattr(model, "config", None)
    return {
        "name": getattr(config, "_name_or_path", None) or None,
        "dtype": str(getattr(model, "dtype", None)),
        "weights": fingerprint(model.named_parameters()),
    }


def computed_on(model: Any) -> dict[str, Any]:
    """What a model computes on, which changes no more of what it says than how it is rounded."""
    if not isinstance(model, nn.Module):
        return {}
    device = input_device(model)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "threads": torch.get_num_threads()}
