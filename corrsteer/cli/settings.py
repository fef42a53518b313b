"""Settings of the command line: one model a command, read from YAML, overridden by flags, checked by pydantic.

Every option is declared here, once; its flag is derived from it (see `options`).
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from corrsteer.arguments import LARGEST_SEED
from corrsteer.errors import CorrSteerError


class Settings(BaseModel):
    """Settings of a command. A field's description is the help of its flag."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML's true and yes are no numbers, which pydantic would read as 1."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and {int, float} & {annotation, *get_args(annotation)}:
            raise ValueError("must be a number")
        return value


class ChatSettings(Settings):
    """How a prompt is wrapped."""

    chat: bool = Field(default=False, description="Wrap prompts in the tokenizer's chat template.")
    system: str | None = Field(default=None, description="System message, with --chat.")


def _named_graders(value: Any) -> Any:
    """In YAML a mapping of names to graders, or a single grader, will do."""
    if isinstance(value, dict):
        return [f"{name}={grader}" for name, grader in value.items()]
    return [value] if isinstance(value, str) else value


class TaskSettings(ChatSettings):
    """A task: its rows, its graders, and which part of it."""

    task: str | None = Field(
        default=None,
        description="A benchmark by name, such as mmlu or bbq:ambig, or your own as FILE.py:NAME; lm-eval:NAME, a task "
        "of lm-evaluation-harness; a JSONL file; or a dataset on the hub as NAME or NAME:CONFIG. A benchmark has "
        "defaults of its own for several options.",
    )
    data: Path | None = Field(
        default=None,
        description="Of a benchmark: a copy of its dataset, a file or a folder as its publishers lay it out; by "
        "default it comes from the hub.",
    )
    shots: int = Field(default=0, ge=0, description="Of a benchmark: solved examples that a prompt begins with.")
    grader: list[str] = Field(
        default=["exact"],
        min_length=1,
        description="exact, choice, number, contains, regex, regex:PATTERN, token_f1, refusal_phrases, length, "
        "module:function, or none; refusal, similarity or judge:URL,model=NAME, which have a model, with options as in "
        "refusal:threshold=0.7. Give it again for more rewards, as NAME=GRADER to name them.",
    )
    reward: str | None = Field(default=None, description="Which of the graders' rewards to use; by default the first.")
    split: str = Field(default="train", description="Split of a hub dataset.")
    prompt_field: str = Field(default="prompt", description="Name of the prompt in each row.")
    answer_field: str | None = Field(default="answer", description="Name of the answer in each row.")
    category_field: str | None = Field(
        default=None, description="Name of the category in each row, for results by category; '' for none."
    )
    part: Literal["all", "train", "validation", "test"] = Field(
        default="all",
        description="all, or the train (80 %), validation (10 %) or test (10 %) part of the task; of a benchmark its "
        "own parts.",
    )
    split_seed: int = Field(default=0, ge=0, description="Seed of that division.")
    limit: int | None = Field(default=None, ge=1, description="Use only the first so many examples of the part.")

    _graders = field_validator("grader", mode="before")(_named_graders)


class ModelSettings(Settings):
    """A model and how it generates."""

    model: str = Field(description="Hugging Face model: a name on the hub or a directory.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto, float32, bfloat16 or float16."
    )
    device: str = Field(default="auto", description="auto (spread over the GPUs, else CPU), cpu, cuda, cuda:1, ...")
    max_new_tokens: int = Field(default=32, ge=1, description="Longest completion, in tokens.")
    temperature: float = Field(default=0.0, ge=0, description="0 decodes greedily.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus to sample from.")
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED, description="Seed of the sampling.")
    option: list[str] = Field(
        default=[],
        description="Label of one of the options of a question; give it again for more. A benchmark has its own.",
    )
    options_only: bool = Field(
        default=False, description="Restrict the first token that is generated to the options' labels."
    )
    batch_tokens: int = Field(
        default=16384, ge=1, description="Most tokens in a batch, padding and completions counted."
    )
    batch_size: int = Field(default=256, ge=1, description="Most prompts in a batch.")
    cache_bytes: int = Field(
        default=8 << 30, ge=1, description="Most bytes of keys and values that are repeated for a batch of trials."
    )

    @field_validator("option", mode="before")
    @classmethod
    def _option_list(cls, value: Any) -> Any:
        """In YAML a single label will do."""
        return [value] if isinstance(value, str) else value


class PositionSettings(Settings):
    """Where a steering is applied."""

    positions: Literal["generated", "all", "prompt"] | None = Field(
        default=None,
        description="generated, all or prompt: which tokens are steered; by default as the steering file says.",
    )


class SteeringSettings(PositionSettings):
    """How a steering is applied."""

    scale: float | None = Field(
        default=None, description="Multiplies the steering coefficients; by default as the steering file says."
    )


class GenerationSettings(TaskSettings, ModelSettings):
    """What is generated that is learnt from: of the train part, by default."""

    samples_per_prompt: int = Field(
        default=1, ge=1, description="Completions of each prompt; more than 1 needs a --temperature above 0."
    )
    part: Literal["all", "train", "validation", "test"] = Field(
        default="train",
        description="all, or the train (80 %), validation (10 %) or test (10 %) part of the task; of a benchmark its "
        "own parts.",
    )


class StatisticsSettings(Settings):
    """Of which SAEs what is kept, and how much memory that may take."""

    sae: list[str] = Field(
        min_length=1,
        description="LAYER=SOURCE, once for each layer, or FIRST-LAST=SOURCE with {layer} in the source. SOURCE is "
        "where an SAE lies, in any of the formats that are supported, RELEASE:SAE_ID of a published SAE, or "
        "`identity` for the residual dimensions themselves.",
    )
    within_prompt: bool = Field(
        default=False,
        description="Centre and permute within each prompt's completions: what tells good from bad answers to the "
        "same prompt.",
    )
    keep_activations: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="auto, always or never: keep every sample's pooled activations, of which any other reward, score "
        "and number of permutations can be had later.",
    )
    activation_bytes: int = Field(default=4 << 30, ge=1, description="Where auto stops keeping them, in bytes.")
    pool: Literal["max", "mean", "last_prompt"] = Field(
        default="max",
        description="max or mean over a sample's tokens, for the correlation; or last_prompt, its last prompt token.",
    )
    coefficient_pool: Literal["max", "mean", "last_prompt"] | None = Field(
        default=None, description="The same for the coefficient; by default as pool."
    )
    positions: Literal["generated", "all"] = Field(
        default="generated", description="generated, or all to read the prompt as well."
    )
    permutations: int = Field(
        default=1000,
        ge=0,
        description="Of the rewards, for p-values; each takes 8 bytes a feature where activations are not kept.",
    )
    bootstrap: int = Field(
        default=0,
        ge=0,
        description="Replicates for bootstrap intervals; 24 bytes each a feature where activations are not kept.",
    )
    score: list[str] = Field(
        default=["pearson"],
        description="A score to keep permutations of, besides the correlation; give it again for more.",
    )
    block_size: int = Field(
        default=512, ge=1, description="Examples among which rewards are permuted; no batch is larger."
    )
    statistics_bytes: int = Field(
        default=16 << 30, ge=1, description="The most memory that statistics may take, in bytes."
    )
    buffer_bytes: int = Field(default=1 << 30, ge=1, description="Memory for captured residuals, in bytes.")
    precision: Literal["fp32", "bf16x2", "bf16", "fp16"] | None = Field(
        default=None, description="The encoders' weights: fp32, bf16x2, bf16 or fp16; by default as stored."
    )
    backend: str | None = Field(default=None, description="A backend's name; by default the fastest that runs.")

    @field_validator("sae", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        """In YAML a mapping of layers to sources, or a single LAYER=SOURCE, will do."""
        if isinstance(value, dict):
            return [f"{layer}={source}" for layer, source in value.items()]
        return [value] if isinstance(value, str) else value

    @field_validator("score", mode="before")
    @classmethod
    def _scores(cls, value: Any) -> Any:
        """In YAML a single name will do."""
        return [value] if isinstance(value, str) else value


class CollectSettings(GenerationSettings, StatisticsSettings):
    """What `corrsteer collect` needs."""

    out: Path = Field(description="Directory to write the run to.")
    rollouts: Path | None = Field(
        default=None,
        description="File of completions that exist, to be read instead of generating some. They are graded by "
        "--grader, or else their rewards are taken.",
    )
    keep_bos: bool = Field(
        default=False,
        description="With --positions all, keep the BOS token and others that the SAEs were trained without.",
    )
    hook_offset: int = Field(default=0, description="-1 reads one block early, as the paper's code does.")
    shuffle_seed: int = Field(
        default=0, ge=0, description="Seed of the examples' order, the permutations and the bootstrap."
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        description="Stop when for so many blocks more samples have changed no layer's best feature; layer 0, which "
        "select leaves out, is not waited for.",
    )


class MemorySettings(ModelSettings, StatisticsSettings):
    """What `corrsteer plan --memory` needs, besides the number of samples."""

    prompt_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Memory: tokens of the longest prompt; by default 512, or what the model's context has room for.",
    )
    reward_count: int = Field(default=1, ge=1, description="Memory: rewards that graders give a completion.")
    density: float = Field(
        default=0.02,
        ge=0,
        le=1,
        description="Memory: share of an SAE's features that are active in a sample, once its tokens are pooled; an "
        "assumption, which a run's `Moments.frequency().mean()` replaces.",
    )
    processes: int = Field(default=1, ge=1, description="Memory: processes that share the collection.")
    devices: int | None = Field(
        default=None, ge=1, description="Memory: GPUs of the machine; by default those there are, and 1 on a CPU."
    )
    device_bytes: int | None = Field(
        default=None, ge=1, description="Memory: of each of these, or of the machine on a CPU; by default what it has."
    )


class RolloutsSettings(GenerationSettings):
    """What `corrsteer rollouts` needs."""

    out: Path = Field(description="File to write the rollouts to, a line of JSON each.")
    engine: Literal["hf", "vllm"] = Field(
        default="hf", description="hf (transformers) or vllm, which must be installed: what generates."
    )
    engine_option: list[str] = Field(
        default=[],
        description="NAME=VALUE that vLLM loads the model with, such as max_model_len=4096; give it again for more.",
    )

    @field_validator("engine_option", mode="before")
    @classmethod
    def _options(cls, value: Any) -> Any:
        """In YAML a mapping of names to values, or a single NAME=VALUE, will do."""
        if isinstance(value, dict):
            return [f"{name}={json.dumps(of)}" for name, of in value.items()]
        return [value] if isinstance(value, str) else value


class RegradeSettings(Settings):
    """What `corrsteer regrade` needs."""

    out: Path = Field(description="Directory to write the run with other rewards to.")
    grader: list[str] = Field(
        default=[], description="As for collect; give it again for more rewards, as NAME=GRADER to name them."
    )
    rewards: Path | None = Field(
        default=None, description="Instead of graders, a JSONL or CSV file with an id and rewards a line."
    )
    reward: str | None = Field(default=None, description="Which of the rewards to use; by default the first.")
    permutations: int | None = Field(default=None, ge=0, description="Of the rewards; by default as collected.")
    bootstrap: int | None = Field(default=None, ge=0, description="Replicates; by default as collected.")
    within_prompt: bool = Field(default=False, description="Centre and permute within each prompt's completions.")

    _graders = field_validator("grader", mode="before")(_named_graders)


class EvaluateSettings(TaskSettings, ModelSettings, SteeringSettings):
    """What `corrsteer evaluate` needs."""


class SelectSettings(EvaluateSettings):
    """What `corrsteer select --strategy pruned` needs for its validation, and `--strategy search` for the search."""

    positions: Literal["generated", "all", "prompt"] | None = Field(
        default=None, description="generated, all or prompt: which tokens are steered; by default generated."
    )
    scale: float | None = Field(
        default=None, description="Multiplies the coefficients; to search, the middle of the scales to begin with."
    )
    also_all: bool = Field(default=False, description="Search: try every feature at all positions as well.")
    candidates: int = Field(
        default=3, ge=1, description="Search: features to try of each layer, pooling and sign of the correlation."
    )
    most_features: int = Field(default=3, ge=1, description="Search: the most features that are steered together.")
    confirm: float = Field(
        default=0.5, gt=0, lt=1, description="Search: share of the validation prompts that are kept to confirm it by."
    )
    completions: int | None = Field(
        default=None, ge=1, description="Search: the most completions that may be generated; by default no limit."
    )
    minutes: float | None = Field(default=None, gt=0, description="Search: the most time, by the speed so far.")
    search_seed: int = Field(default=0, ge=0, description="Search: seed of the order of samples.")


class RecipeSettings(Settings):
    """What a recipe of `corrsteer run` says besides the settings of its steps."""

    strategies: list[Literal["single", "all", "pruned", "search"]] = Field(
        default=["single", "all", "pruned", "search"], min_length=1, description="What to select by."
    )
    coefficient: Literal["mean_positive", "mean_positive_active", "contrastive"] = Field(
        default="mean_positive", description="Of single, all and pruned; the first is as published."
    )
    layer: list[int] | None = Field(default=None, description="Select in these layers alone; by default all but 0.")
    baselines: bool = Field(default=True, description="Evaluate the baselines too.")
    report: bool = Field(default=True, description="Write a report.")


SEARCH = tuple(name for name in SelectSettings.model_fields if name not in EvaluateSettings.model_fields)


class CalibrateSettings(TaskSettings, ModelSettings, PositionSettings):
    """What `corrsteer calibrate` needs, which chooses the scale itself."""


class GenerateSettings(ChatSettings, ModelSettings, SteeringSettings):
    """What `corrsteer generate` needs, whose prompts come from the command line."""


S = TypeVar("S", bound=Settings)


def read(kind: type[S], config: Path | None, flags: dict[str, Any], defaults: dict[str, Any] | None = None) -> S:
    """Settings from `defaults`, a YAML file over them, and flags (None where not given) over both.

    Raises
    ------
    CorrSteerError : for a file that is not a YAML mapping, an unknown or missing setting, or a bad value.
    """
    values = {name: value for name, value in (defaults or {}).items() if name in kind.model_fields}
    if config is not None:  # one file may serve several commands
        values |= {name: value for name, value in _yaml(config).items() if name in kind.model_fields}
    values |= {name: value for name, value in flags.items() if value is not None}
    try:
        return kind(**values)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            name = ".".join(map(str, problem["loc"]))
            if problem["type"] == "missing":
                problems.append(f"{name} is missing: give --{name.replace('_', '-')} or put it in the YAML file")
            else:
                problems.append(f"{name}: {problem['msg'].removeprefix('Value error, ')}, got {problem['input']!r}")
        raise CorrSteerError("; ".join(problems)) from None


def asked(name: str, config: Path | None, flags: dict[str, Any]) -> Any:
    """What a flag or else a YAML file gives for a setting; None where neither does."""
    flag = flags.get(name)
    return flag if flag is not None or config is None else _yaml(config).get(name)


def given_in(config: Path) -> dict[str, Any]:
    """What a YAML file says, by the names of settings.

    Raises
    ------
    CorrSteerError : as `read`.
    """
    return _yaml(config)


class _NoKeyTwice(yaml.SafeLoader):
    """YAML as `safe_load` reads it, but for a key given twice, of which that would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # "<<" takes another mapping in, whose keys may be given again
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if not key.tag.endswith(":merge")]
        for at, key in enumerate(keys):
            if key in keys[:at]:
                raise yaml.constructor.ConstructorError(None, None, f"it has {key!r} twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_bytes().decode("utf-8-sig"), _NoKeyTwice)
    except OSError as error:
        raise CorrSteerError(f"config {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        where = f"byte {error.object[error.start]:#04x} at position {error.start}"
        raise CorrSteerError(f"config {path} is not UTF-8 ({where}); save it as UTF-8") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that does not exist is a ValueError
        raise CorrSteerError(f"config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise CorrSteerError(f"config {path} must be a mapping of settings, got {type(values).__name__}")
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    kinds = (CollectSettings, SelectSettings, RolloutsSettings, RegradeSettings, MemorySettings, RecipeSettings)
    known = {name: field for kind in kinds for name, field in kind.model_fields.items()}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it must be one of {', '.join(sorted(known))}"
            raise CorrSteerError(f"config {path} has an unknown setting {name!r}; {hint}")
    return values
