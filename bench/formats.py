"""How near encoders come to the libraries that SAEs are published for: python -m bench.formats

Small SAEs with random weights are written in every format's layout, and read by us and by the format's own library:
SAELens, sparsify (`eai-sparsify`) and dictionary_learning (`dictionary-learning`). `tests/neighbours` has what to
install. Errors are those of all activations together, over those that the library gives in float64.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench import record
from corrsteer import SparseEncoder, encode
from corrsteer.compatibility import installed
from corrsteer.report.tables import table
from corrsteer.sae.formats import FORMATS

D_IN, D_SAE, TOKENS, K = 64, 512, 256, 20
TINY = {"d_in": D_IN, "d_out": D_IN, "d_sae": D_SAE}
LLAMA_SCALE = 2.5  # what Llama Scope's SAEs multiply tokens by
PACKAGES = ("sae-lens", "eai-sparsify", "dictionary-learning")

Encode = Callable[[Tensor], Tensor]  # x [T, d_in] -> activations [T, d_sae], both of one dtype
Library = Callable[[Path, torch.dtype], Encode]  # of where an SAE lies


@dataclass(frozen=True)
class Published:
    """An SAE as it is published.

    Attributes
    ----------
    path : where it lies, in a folder that stands for the hub.
    write : makes it there.
    library : what it is published for.
    read : that library's own loader and encode.
    """

    path: str
    write: Callable[[Path], None]
    library: str
    read: Library


def weights(d_in: int = D_IN, d_sae: int = D_SAE) -> dict[str, Tensor]:
    """An SAE none of whose parameters is trivial, by SAELens' names."""
    generator = torch.Generator().manual_seed(d_sae)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    return {
        "W_enc": normal(d_in, d_sae) / d_in**0.5, "W_dec": normal(d_sae, d_in) / 8, "b_enc": 0.3 * normal(d_sae),
        "b_dec": 0.3 * normal(d_in), "threshold": normal(d_sae).abs() + 0.1, "b_gate": 0.3 * normal(d_sae),
        "b_mag": 0.3 * normal(d_sae), "r_mag": 0.3 * normal(d_sae),
    }  # fmt: skip


def _text(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def _tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def write_sae_lens(path: Path) -> None:
    w = weights()
    _text(path / "cfg.json", {
        "architecture": "gated", "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "device": "cpu", "reshape_activations": "none",
        "metadata": {"hook_name": "blocks.3.hook_resid_post", "sae_lens_version": "6.0.0"},
    })  # fmt: skip
    _tensors(path / "sae_weights.safetensors", {n: w[n] for n in w if n not in ("b_enc", "threshold")})


def write_gemma_scope(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    np.savez(path / "params.npz", **{name: weights()[name].numpy() for name in names})


def write_gemma_scope_2(path: Path) -> None:
    transcodes = "transcoder" in str(path)
    place = "pre_feedforward_layernorm.output" if transcodes else "output"
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt"}
    config |= {"hf_hook_point_in": f"model.layers.13.{place}"}
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    tensors = {name.lower(): weights()[name] for name in names}
    if transcodes:
        config |= {"hf_hook_point_out": "model.layers.13.post_feedforward_layernorm.output"}
        config |= {"affine_connection": True}
        tensors["affine_skip_connection"] = weights(D_IN, D_IN)["W_enc"]
    _text(path / "config.json", config)
    _tensors(path / "params.safetensors", tensors)


def write_llama_scope(path: Path) -> None:
    w = weights()
    tensors = {"encoder.weight": w["W_enc"].T / LLAMA_SCALE, "decoder.weight": w["W_dec"].T}
    tensors |= {"encoder.bias": w["b_enc"], "decoder.bias": w["b_dec"]}
    _text(path / "hyperparams.json", {
        "d_model": D_IN, "d_sae": D_SAE, "jump_relu_threshold": 0.2, "hook_point_in": "blocks.20.hook_resid_post",
        "dataset_average_activation_norm": {"in": D_IN**0.5 / LLAMA_SCALE},
    })  # fmt: skip
    _tensors(path / "checkpoints/final.safetensors", {name: tensor.bfloat16() for name, tensor in tensors.items()})


def write_qwen_scope(path: Path) -> None:
    w = weights()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"W_enc": w["W_enc"].T, "W_dec": w["W_dec"].T, "b_enc": w["b_enc"], "b_dec": w["b_dec"]}, path)


def write_sparsify(activation: str, transcodes: bool = False) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        w, k = weights(), 16 if activation == "groupmax" else K
        config = {"activation": activation, "expansion_factor": 32, "normalize_decoder": True, "num_latents": D_SAE}
        _text(path / "cfg.json", config | {"k": k, "multi_topk": False, "transcode": transcodes, "d_in": D_IN})
        tensors = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
        _tensors(path / "sae.safetensors", tensors)

    return write


def dictionary_learning_state(kind: str) -> dict[str, Tensor]:
    """The state dict of one of dictionary_learning's classes."""
    w = weights()
    counts = {"k": torch.tensor(K, dtype=torch.int32, device="cpu")}
    threshold = torch.tensor(0.4, dtype=torch.float32, device="cpu")
    if kind == "JumpReluAutoEncoder":
        return {name: w[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    if kind == "MatryoshkaBatchTopKSAE":
        sizes = torch.tensor([D_SAE // 4, D_SAE - D_SAE // 4], dtype=torch.int64, device="cpu")
        names = ("W_enc", "W_dec", "b_enc", "b_dec")
        return {name: w[name] for name in names} | counts | {"threshold": threshold, "group_sizes": sizes}
    linear = {"encoder.weight": w["W_enc"].T.contiguous(), "decoder.weight": w["W_dec"].T.contiguous()}
    if kind == "GatedAutoEncoder":
        gates = {"gate_bias": w["b_gate"], "mag_bias": w["b_mag"], "r_mag": w["r_mag"]}
        return linear | gates | {"decoder_bias": w["b_dec"]}
    linear["encoder.bias"] = w["b_enc"]
    if kind == "AutoEncoder":
        return linear | {"bias": w["b_dec"]}
    if kind == "AutoEncoderNew":
        return linear | {"decoder.bias": w["b_dec"]}
    return linear | counts | {"b_dec": w["b_dec"], "threshold": threshold}


def write_dictionary_learning(kind: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        trainer = {"dict_class": kind, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 8, "lm_name": "tiny"}
        trainer["submodule_name"] = "resid_post_layer_8"
        _text(path / "config.json", {"trainer": trainer | {"k": K}, "buffer": {"ctx_len": 128, "io": "out"}})
        torch.save(dictionary_learning_state(kind), path / "ae.pt")

    return write


# The libraries' own


@contextlib.contextmanager
def hub(folder: Path) -> Iterator[None]:
    """SAELens finds on its hub what lies in a folder, `OWNER/NAME/PATH`, and takes its shapes as they are."""
    from sae_lens.saes import sae

    def download(repo_id: str, filename: str, subfolder: str = "", **_: Any) -> str:
        return str(folder / repo_id / subfolder / filename)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        return {name: list(tensor.shape) for name, tensor in load_file(folder / repo_id / filename).items()}

    overrides = sae.get_config_overrides
    loaders = "sae_lens.loading.pretrained_sae_loaders"
    with (
        mock.patch(f"{loaders}.hf_hub_download", download),
        mock.patch(f"{loaders}.get_safetensors_tensor_shapes", shapes),
        mock.patch.object(sae, "get_norm_scaling_factor", lambda *_: LLAMA_SCALE),
        mock.patch.object(sae, "get_config_overrides", lambda *names: overrides(*names) | TINY),
    ):
        yield


def by_sae_lens(release: str | None = None, sae_id: str = "") -> Library:
    def read(path: Path, dtype: torch.dtype) -> Encode:
        from sae_lens import SAE

        if release is None:
            return SAE.load_from_disk(path, dtype="float32").to(dtype).encode
        with hub(next(parent for parent in path.parents if parent.name == "hub")):
            return SAE.from_pretrained(release, sae_id, device="cpu", dtype="float32").to(dtype).encode

    return read


def by_sparsify(path: Path, dtype: torch.dtype) -> Encode:
    from sparsify import SparseCoder

    coder = SparseCoder.load_from_disk(path).to(dtype)

    def run(x: Tensor) -> Tensor:
        found = coder.encode(x)
        return torch.zeros_like(found.pre_acts).scatter_(-1, found.top_indices, found.top_acts)

    return run


def by_dictionary_learning(path: Path, dtype: torch.dtype) -> Encode:
    from dictionary_learning.utils import load_dictionary

    dictionary, _ = load_dictionary(str(path), device="cpu")
    return dictionary.to(dtype).encode


QWEN = "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
DICTIONARIES = (
    "AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE",
    "JumpReluAutoEncoder",
)  # fmt: skip
PUBLISHED: dict[tuple[str, str], Published] = {  # format and kind
    ("sae_lens", "gated"): Published("hub/mine/gated", write_sae_lens, "sae-lens", by_sae_lens()),
    ("gemma_scope", "SAE"): Published(
        "hub/google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", write_gemma_scope, "sae-lens",
        by_sae_lens("gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical"),
    ),
    ("gemma_scope", "transcoder"): Published(
        "hub/google/gemma-scope-2b-pt-transcoders/layer_0/width_16k/average_l0_76", write_gemma_scope, "sae-lens",
        by_sae_lens("gemma-scope-2b-pt-transcoders", "layer_0/width_16k/average_l0_76"),
    ),
    ("gemma_scope_2", "SAE"): Published(
        "hub/google/gemma-scope-2-1b-pt/resid_post/layer_13_width_16k_l0_big", write_gemma_scope_2, "sae-lens",
        by_sae_lens("gemma-scope-2-1b-pt-res", "layer_13_width_16k_l0_big"),
    ),
    ("gemma_scope_2", "skip transcoder"): Published(
        "hub/google/gemma-scope-2-1b-pt/transcoder/layer_13_width_16k_l0_big_affine", write_gemma_scope_2, "sae-lens",
        by_sae_lens("gemma-scope-2-1b-pt-transcoders", "transcoder/layer_13_width_16k_l0_big_affine"),
    ),
    ("llama_scope", "SAE"): Published(
        "hub/fnlp/Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L20R-8x", write_llama_scope, "sae-lens",
        by_sae_lens("llama_scope_lxr_8x", "l20r_8x"),
    ),
    ("qwen_scope", "topk"): Published(
        f"hub/{QWEN}/layer1.sae.pt", write_qwen_scope, "sae-lens",
        by_sae_lens("qwen-scope-3-1.7b-base-w32k-l50", "layer1"),
    ),
    **{
        ("sparsify", f"{activation}{' transcoder' if transcodes else ''}"): Published(
            f"sparsify/{activation}{'-transcoder' if transcodes else ''}/layers.4{'.mlp' if transcodes else ''}",
            write_sparsify(activation, transcodes), "eai-sparsify", by_sparsify,
        )
        for activation in ("topk", "groupmax") for transcodes in (False, True)
    },
    **{
        ("dictionary_learning", kind): Published(
            f"dictionary_learning/{kind}", write_dictionary_learning(kind), "dictionary-learning",
            by_dictionary_learning,
        )
        for kind in DICTIONARIES
    },
}  # fmt: skip


# Errors


@torch.no_grad()
def errors(published: Published, root: Path, dtype: torch.dtype) -> dict[str, float]:
    """Of ours and of the library's own activations in a dtype, from the library's in float64; and between both."""
    path = root / published.path
    published.write(path)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, D_IN, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
    ours = encode(x, SparseEncoder.load(path, dtype=dtype)).double()
    theirs = published.read(path, dtype)(x).double()
    truth = published.read(path, torch.float64)(x.double())
    assert 0.01 < float((truth != 0).double().mean()) < 0.95, "some features are active and some are not"

    def relative(error: Tensor) -> float:
        return float(error.norm() / truth.norm())

    return {"ours": relative(ours - truth), "own": relative(theirs - truth), "between": relative(ours - theirs)}


DTYPES = ("float32", "bfloat16")
HEADER = ("format", "SAE", "its library", "dtype", "our error", "its own error", "between them")


def sae_rows(result: dict[str, Any]) -> list[list[str]]:
    """A row an SAE and dtype."""
    return [
        [
            *(one[name] for name in ("format", "sae", "library", "dtype")),
            *(f"{one[name]:.1e}" for name in ("ours", "own", "between")),
        ]
        for one in result["errors"]
    ]


DOCUMENTED = (
    "format", "what lies there", "activations", "compared with",
    *(f"{whose} error, {dtype}" for dtype in DTYPES for whose in ("our", "its own")),
)  # fmt: skip


def format_rows(result: dict[str, Any]) -> list[list[str]]:
    """A row a format: what it is, and the largest errors of its SAEs."""
    rows = []
    for name, one in FORMATS.items():
        of_format = [error for error in result["errors"] if error["format"] == name]
        worst = [
            f"{max(error[whose] for error in of_format if error['dtype'] == dtype):.1e}"
            for dtype in DTYPES for whose in ("ours", "own")
        ]  # fmt: skip
        rows.append([one.title, one.files, one.activations, of_format[0]["library"], *worst])
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.formats", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=record.STUDIES, help="where to write formats.json")
    options = parser.parse_args(arguments)
    if missing := [package for package in PACKAGES if installed(package) is None]:
        parser.error(f"{', '.join(missing)} must be installed, see tests/neighbours/requirements-formats.txt")
    result = record.study("formats", seed=1)
    result["packages"] |= {package: installed(package) for package in PACKAGES}
    result["errors"] = []
    with tempfile.TemporaryDirectory() as root:
        for (name, sae), published in PUBLISHED.items():
            for dtype in DTYPES:
                named = {"format": name, "sae": sae, "library": published.library, "dtype": dtype}
                result["errors"].append(named | errors(published, Path(root), getattr(torch, dtype)))
    print(table(HEADER, sae_rows(result)))
    print(record.write_study(result, options.out))


if __name__ == "__main__":
    main()
