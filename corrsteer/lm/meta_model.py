"""A model without weights, of its configuration alone: what it would take, before anything of it is loaded.

Its tensors lie on torch's meta device, where they have shapes and dtypes, but no values and no memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from corrsteer.errors import CorrSteerError
from corrsteer.lm import prefill
from corrsteer.lm.prefill import Cache


def model_without_weights(name: str, dtype: str = "auto") -> nn.Module:
    """The causal language model of a configuration, on the meta device.

    Parameters
    ----------
    name : a directory with `config.json`, or a name on the hub, of which only that file is fetched.
    dtype : of the weights, by the name that torch gives it; `auto` is the configuration's own.

    Raises
    ------
    CorrSteerError : where there is no such configuration, where it names no dtype and none is given, or where weights
        are stored quantized, whose size it does not tell.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config: Any = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:  # Hugging Face's own are OSErrors
        raise CorrSteerError(f"model {name!r} has no configuration: {' '.join(str(error).split())}") from None
    text = config.get_text_config(decoder=True)
    if getattr(config, "quantization_config", None) is not None:
        raise CorrSteerError(
            f"model {name!r} has quantized weights, whose size its configuration does not tell; plan for the model "
            f"that it was made of, which takes more"
        )
    chosen = (config.dtype or text.dtype) if dtype == "auto" else getattr(torch, dtype)
    if chosen is None:
        raise CorrSteerError(f"the configuration of model {name!r} names no dtype; give one, such as bfloat16")
    text.pad_token_id = None  # some look for it among tokens, which have no values here
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=chosen).eval()
    except (ValueError, ImportError) as error:
        raise CorrSteerError(
            f"model {name!r} is no causal language model: {' '.join(str(error).split())[:300]}"
        ) from None


def weight_bytes(model: nn.Module) -> dict[torch.dtype, int]:
    """Memory of a model's parameters and buffers by dtype; what is shared counts once."""
    found: dict[torch.dtype, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        found[tensor.dtype] = found.get(tensor.dtype, 0) + tensor.nbytes
    return found


@torch.inference_mode()
def cache_bytes(model: nn.Module, rows: int, tokens: int) -> int:
    """Memory of what a model on the meta device keeps of so many rows and tokens: keys and values, or a state.

    Of layers that see but a window every token counts, as they are kept where what prompts begin with is read once.

    Raises
    ------
    CorrSteerError : for a model that reads nothing without values, or keeps nothing.
    """
    ids = torch.zeros(rows, tokens, dtype=torch.int64, device="meta")
    anyone: Any = model
    try:
        cache = Cache.of(anyone(input_ids=ids, use_cache=True))
        if cache.can_be_shared:
            roomy = prefill.empty_cache(model, tokens)
            cache = Cache.of(anyone(input_ids=ids, use_cache=True, **{roomy.name: roomy.value}))
        return cache.nbytes
    except Exception as error:  # whatever a model raises that looks at values
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CorrSteerError(
            f"what {type(model).__name__} keeps of tokens cannot be told from its configuration ({reason}); measure it "
            f"with a small collection"
        ) from error
