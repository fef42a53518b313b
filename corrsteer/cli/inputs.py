"""What settings stand for: tasks, models, encoders and decoding."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from corrsteer import processes
from corrsteer.cli.names import from_anywhere
from corrsteer.cli.settings import ModelSettings, RolloutsSettings, StatisticsSettings, TaskSettings
from corrsteer.errors import CorrSteerError
from corrsteer.integrations.lm_eval_tasks import is_lm_eval, load_lm_eval
from corrsteer.lm.decoding import Decoding
from corrsteer.lm.hook_points import input_device, width
from corrsteer.ops import pack, registry
from corrsteer.rollouts.model_graders import with_models
from corrsteer.sae.encoder import SparseEncoder
from corrsteer.sae.formats import recognise
from corrsteer.sae.releases import check_names
from corrsteer.tasks import Benchmark, GraderSpec, Task, TaskError, benchmarks, load_benchmark
from corrsteer.tasks.benchmark import OWN
from corrsteer.tasks.graders import WITH_MODELS
from corrsteer.tasks.registry import is_benchmark, near_names

# Within `one_model`, the last model by what it was asked for.
_last_model: ContextVar[dict[tuple[str, str, str], tuple[nn.Module, Any]] | None] = ContextVar("model", default=None)


def load_task(given: TaskSettings) -> Task:
    """The part of a task that was asked for."""
    if given.task is None:
        raise CorrSteerError("task is missing: give --task or put it in the YAML file")
    benchmark = is_benchmark(given.task)
    task = _benchmark_task(given, load_benchmark(given.task)) if benchmark else _own_task(given)
    if given.reward is not None:
        task = task.rewarded_by(given.reward)
    if given.part != "all" and not benchmark:
        parts = dict(zip(("train", "validation", "test"), task.split(seed=given.split_seed)))
        if len(parts[given.part]) == 0:
            raise CorrSteerError(
                f"the {given.part} part of {given.task} is empty, as it has only {len(task)} examples; use --part all"
            )
        task = parts[given.part]
    return task if given.limit is None else task.take(given.limit)


def _benchmark_task(given: TaskSettings, benchmark: Benchmark) -> Task:
    grader = OWN if given.grader == [OWN] else parse_graders(given.grader, _device(given))
    return benchmark.task(
        given.part, given.data, shots=given.shots, grader=grader, chat=given.chat, system=given.system,
        category_field=given.category_field or None, seed=given.split_seed,
    )  # fmt: skip


def _own_task(given: TaskSettings) -> Task:
    """The whole task of a file, or of a dataset on the hub."""
    name = str(given.task)
    for setting, strange in (("data", given.data is not None), ("shots", given.shots > 0)):
        if strange:
            raise CorrSteerError(
                f"{setting} is of benchmarks, which are {', '.join(benchmarks())} and FILE.py:NAME, got task {name!r}; "
                f"leave it out"
            )
    wrapped = {"category_field": given.category_field or None, "chat": given.chat, "system": given.system}
    if is_lm_eval(name):
        return load_lm_eval(
            name, grader=None if given.grader == [OWN] else parse_graders(given.grader, _device(given)), **wrapped
        )
    options = {
        "grader": parse_graders(given.grader, _device(given)), "prompt_field": given.prompt_field,
        "answer_field": given.answer_field, **wrapped,
    }  # fmt: skip
    if name.endswith((".jsonl", ".json")) or Path(name).is_file():
        return Task.from_jsonl(name, **options)
    dataset, _, config = name.partition(":")
    try:
        return Task.from_dataset(dataset, config or None, split=given.split, **options)
    except TaskError as error:
        near = [] if "/" in name else near_names(name)
        raise TaskError(f"{error}; did you mean the benchmark {' or '.join(near)}?") from error if near else error


def parse_graders(entries: list[str], device: str = "auto") -> GraderSpec:
    """What `Task` takes, of entries GRADER or NAME=GRADER; among several, one without a name has its own.

    Parameters
    ----------
    device : of graders with a model.
    """
    if entries == ["none"]:
        return None
    found: dict[str, str] = {}
    for entry in entries:
        # A name comes before any colon: regex:a=b has none.
        named = re.fullmatch(r"([^:=\s]+)=(.+)", entry, re.DOTALL)
        name, grader = named.groups() if named else (_own_name(entry), entry)
        if not named and len(entries) == 1:
            return with_models(entry, device)
        if grader == "none":
            raise CorrSteerError("grader none is for a task without rewards; give it alone")
        if name in found:
            raise CorrSteerError(f"grader gives the reward {name!r} twice; name them: --grader NAME={grader}")
        found[name] = grader
    return with_models(found, device)


def _own_name(grader: str) -> str:
    """What the reward of a grader is called that was given none: that of its function, or the kind of its model."""
    kind, _, _ = grader.partition(":")
    return kind if kind in WITH_MODELS else grader.rpartition(":")[2] or grader


def _device(given: TaskSettings) -> str:
    """Where a task's graders with a model run: where the run's model does, if there is one."""
    return given.device if isinstance(given, ModelSettings) else "auto"


def parse_saes(entries: list[str]) -> dict[int, str]:
    """Sources by layer, of entries LAYER=SOURCE, or FIRST-LAST=SOURCE whose {layer} is each layer's number."""
    sources: dict[int, str] = {}
    for entry in entries:
        layers, separator, source = entry.partition("=")
        named = re.fullmatch("([0-9]+)(?:-([0-9]+))?", layers)
        if not separator or not named:
            raise CorrSteerError(f"sae must be LAYER=SOURCE, got {entry!r}; several layers are FIRST-LAST=SOURCE")
        first, last = int(named[1]), int(named[2] or named[1])
        if last < first or (first < last and "{layer}" not in source):
            raise CorrSteerError(
                f"sae must name layers from the first to the last and have {{layer}} in their source, such as "
                f"1-25=RELEASE:layer_{{layer}}/width_16k/canonical, got {entry!r}"
            )
        for layer in range(first, last + 1):
            if layer in sources:
                raise CorrSteerError(f"sae gives layer {layer} twice; give one SAE a layer")
            sources[layer] = source.replace("{layer}", str(layer)) if named[2] else source
    return sources


def check_saes(sources: dict[int, str]) -> None:
    """Raise for a source that cannot be one, by what this machine knows."""
    for layer, source in sources.items():
        if _is_release(source):
            check_names(*source.split(":", 1))
        elif source != "identity":
            path = Path(source)
            if not path.exists():
                raise CorrSteerError(
                    f"sae must come from where an SAE lies, RELEASE:SAE_ID or identity, got {source!r}; there is no "
                    f"such directory"
                )
            hook_name = (recognise(path).config(path).get("metadata") or {}).get("hook_name") or ""
            named = re.match(r"blocks\.(\d+)\.", hook_name)
            if named and int(named[1]) != layer:
                raise CorrSteerError(
                    f"sae gives layer {layer} {source!r}, which was trained at {hook_name}; give it as "
                    f"{named[1]}={source}"
                )


def _is_release(source: str) -> bool:
    return ":" in source and not Path(source).exists()


def load_encoders(sources: dict[int, str], model: nn.Module, device: str = "cpu") -> dict[int, SparseEncoder]:
    """Encoders by layer, from where each lies."""

    def load(source: str) -> SparseEncoder:
        if source == "identity":
            return SparseEncoder.identity(width(model))
        if _is_release(source):
            return SparseEncoder.from_pretrained(*source.split(":", 1), device=device)
        return SparseEncoder.load(source, device=device)

    return {layer: load(source) for layer, source in sources.items()}


def check_model(given: ModelSettings) -> None:
    """Raise for a directory that is not there."""
    if given.model.startswith((".", "/", "~")) and not Path(given.model).is_dir():
        raise CorrSteerError(f"there is no model directory {given.model}; was it moved?")


def pack_where_read(
    encoders: dict[int, SparseEncoder], model: nn.Module, backend: str | None
) -> dict[int, SparseEncoder]:
    """Encoders that hold one copy of their weight, the packed one, where the native backend is what reads it."""
    device = input_device(model)
    if device.type != "cpu":
        return encoders

    def packed(encoder: SparseEncoder) -> SparseEncoder:
        call = registry.Call("encode_pool", device, torch.float32, encoder.activation, encoder.precision)
        return pack(encoder) if registry.choose(call, backend).name == "native" else encoder

    return {layer: packed(encoder) for layer, encoder in encoders.items()}


@contextlib.contextmanager
def one_model() -> Iterator[None]:
    """Have a model that was loaded last be the one that is meant, where the same is asked for again."""
    token = _last_model.set({})
    try:
        yield
    finally:
        _last_model.reset(token)


def load_model(given: ModelSettings) -> tuple[nn.Module, Any]:
    """A model and its tokenizer."""
    last, asked = _last_model.get(), (from_anywhere(given.model), given.dtype, given.device)
    if last is None:
        return _load_model(given)
    if asked not in last:
        last.clear()  # before the next is there
        last[asked] = _load_model(given)
    return last[asked]


def _load_model(given: ModelSettings) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_model(given)
    placement: dict[str, Any] = {}
    if given.device != "auto":
        placement["device_map"] = given.device
    elif torch.cuda.is_available():
        own = processes.local_rank()  # each of several processes has one to itself
        placement["device_map"] = "auto" if own is None else f"cuda:{own}"
    dtype = given.dtype if given.dtype == "auto" else getattr(torch, given.dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype=dtype, **placement).eval()
        return model, AutoTokenizer.from_pretrained(given.model)
    except (OSError, ValueError, RuntimeError, AssertionError, ImportError) as error:  # they raise as they like
        raise CorrSteerError(f"model {given.model!r} cannot be loaded on device {given.device!r}: {error}") from error


def load_vllm(given: RolloutsSettings) -> tuple[Any, Any]:
    """A model as vLLM loads it, where its device is vLLM's own choice, and its tokenizer."""
    from transformers import AutoTokenizer

    from corrsteer.lm import vllm_engine

    options = parse_engine_options(given.engine_option)
    if given.device != "auto":
        raise CorrSteerError(
            f"device must be left out with --engine vllm, which chooses by itself, got {given.device!r}"
        )
    # It logs to standard output unless told otherwise before it is imported, and that is where the result goes.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    llm = vllm_engine.load_vllm(given.model, dtype=given.dtype, **options)
    return llm, AutoTokenizer.from_pretrained(given.model)


def parse_engine_options(entries: list[str]) -> dict[str, Any]:
    """What `vllm.LLM` takes, of entries NAME=VALUE, whose values are read as YAML."""
    options: dict[str, Any] = {}
    for entry in entries:
        name, _, value = entry.partition("=")
        if not name.isidentifier() or not value:
            raise CorrSteerError(f"engine_option must be NAME=VALUE, such as max_model_len=4096, got {entry!r}")
        if name in ("model", "dtype") or name in options:
            fix = "is given twice" if name in options else f"is what --{name} says"
            raise CorrSteerError(f"engine_option {name} {fix}; leave {entry!r} out")
        try:
            options[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise CorrSteerError(f"engine_option {name} must have a value that is YAML, got {value!r}") from None
    return options


def statistics_options(given: StatisticsSettings) -> dict[str, Any]:
    """What is kept of completions, as `collect` takes it."""
    same = ("pool", "positions", "permutations", "bootstrap", "block_size", "statistics_bytes", "buffer_bytes",
            "backend", "keep_activations", "activation_bytes", "within_prompt")  # fmt: skip
    return {name: getattr(given, name) for name in same} | {
        "coefficient_pool": given.coefficient_pool or given.pool,
        "scores": tuple(dict.fromkeys(("pearson", *given.score))),
    }


def decoding(given: ModelSettings) -> Decoding:
    """How completions are generated."""
    names = ("max_new_tokens", "temperature", "top_p", "seed", "batch_tokens", "batch_size", "cache_bytes")
    if given.options_only and not given.option:
        raise CorrSteerError(
            "options_only needs the labels of the options, which benchmarks of multiple choice have; give --option A "
            "--option B, or leave it out"
        )
    labels = tuple(given.option) if given.options_only else None
    return Decoding(**{name: getattr(given, name) for name in names}, first_token_among=labels)


def recorded(provenance: dict[str, Any], part: str) -> dict[str, Any]:
    """The settings of a collection, but for what it does not decide: which part of the task, and how to steer."""
    return provenance.get("settings", {}) | {"part": part, "positions": None, "limit": None}


def recorded_model(provenance: dict[str, Any]) -> ModelSettings:
    """How a collection loaded its model."""
    known = provenance.get("settings", {})
    if known.get("model") is None:
        raise CorrSteerError(
            "the run does not say where its model is, as it was not collected by this command; use the Python functions"
        )
    return ModelSettings(**{name: known[name] for name in ModelSettings.model_fields if name in known})


def recorded_encoders(
    provenance: dict[str, Any], model: nn.Module, layers: Collection[int] | None = None
) -> dict[int, SparseEncoder]:
    """The encoders of a collection's layers, from where each was read, in the precision that it had."""
    found: dict[int, SparseEncoder] = {}
    for layer, described in provenance["saes"].items():
        if layers is not None and int(layer) not in layers:
            continue
        source = described["source"]
        if source["kind"] == "memory":
            raise CorrSteerError(
                f"the SAE of layer {layer} was in memory when the run was made, so that it cannot be read again; use "
                f"the Python functions"
            )
        named = {"directory": source.get("directory"), "release": f"{source.get('release')}:{source.get('sae_id')}"}
        encoder = load_encoders({int(layer): named.get(source["kind"], source["kind"])}, model)[int(layer)]
        precision = provenance.get("settings", {}).get("precision")
        found[int(layer)] = encoder.to(precision=precision) if precision else encoder
    return found


def check_file(out: Path) -> None:
    """See that a file can be written before what goes into it is made."""
    if not out.parent.is_dir():
        raise CorrSteerError(f"out {out} cannot be written: there is no folder {out.parent}")
    if out.exists() and not out.is_file():
        raise CorrSteerError(f"out {out} cannot be written: it is no file; give the path of one")
    check_writable(Path(os.path.realpath(out)).parent)


def check_folder(out: Path) -> None:
    """See that files can be made in a folder, which is made where it is not there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CorrSteerError(f"out {out} cannot be written to ({error.strerror}); give another directory") from None
    check_writable(out)


def check_writable(folder: Path) -> None:
    """See that files can be made in a folder, without touching any that is there."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CorrSteerError(f"out {folder} cannot be written to ({error.strerror}); give another folder") from None
