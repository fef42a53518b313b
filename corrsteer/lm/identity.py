"""What tells a model from others, in anything JSON can hold."""

from __future__ import annotations

from typing import Any

from torch import nn

from corrsteer.fingerprints import fingerprint


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
