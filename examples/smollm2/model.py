"""The language model, from the package that carries it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bench.smollm2 import write


def load(cache: Path) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in bfloat16 and its tokenizer, written to `cache/model` the first time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = cache / "model"
    if not (folder / "tokenizer_config.json").exists():  # which is written last
        write(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    return model, AutoTokenizer.from_pretrained(folder)
