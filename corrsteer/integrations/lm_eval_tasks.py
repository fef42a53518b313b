"""Tasks of lm-evaluation-harness: its prompts, its examples in a prompt, its filters and its metrics as rewards.

A task that generates (GSM8K, TriviaQA, ...) is graded by its own filters and `process_results`, so that a reward is
what the harness gives the same completion. A multiple-choice task is scored there by the probability of each choice,
and nothing is generated. So here the choices become lettered options, the model writes a letter, and the grader is
`choice`. That is a score of its own, and not the harness's `acc`.

Optional: `pip install corrsteer[lm-eval]`.
"""

from __future__ import annotations

import difflib
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from corrsteer.arguments import whole
from corrsteer.errors import CorrSteerError
from corrsteer.tasks import Example, GraderSpec, Grading, Task, TaskError
from corrsteer.tasks.graders import one_line

PREFIX = "lm-eval:"
SPLITS = {"train": "training", "validation": "validation", "test": "test"}  # here -> in the harness's methods
SHOTS_SEED = 1234  # of the examples in a prompt, as the harness's own default


def is_lm_eval(name: str) -> bool:
    """Whether a task's name says that it is the harness's."""
    return name.startswith(PREFIX)


def load_lm_eval(
    name: str,
    *,
    shots: int | None = None,
    split: str | None = None,
    grader: GraderSpec = None,
    chat: bool = False,
    system: str | None = None,
    category_field: str | None = None,
    shots_seed: int = SHOTS_SEED,
) -> Task:
    """A task of lm-evaluation-harness.

    Parameters
    ----------
    name : the task's, or the path of its YAML file. `lm-eval:` may stand before it, and after it `,shots=N` and
        `,split=NAME`, which win over the arguments.
    shots : solved examples in each prompt; by default as the task has it.
    split : `train`, `validation` or `test`, where the task has it; by default the one that the harness evaluates on.
    grader : other graders than the task's own. Answers are its targets as text, or the letters of right options.
    chat, system, category_field : as for `Task.from_rows`. A prompt is one message, examples included; a document's
        fields are the examples' own.
    shots_seed : which examples are drawn, where the task draws them.

    Raises
    ------
    CorrSteerError : without the package.
    TaskError : for a task that is not there, a group of them, and one of a kind that no completion can be graded by:
        likelihoods of given texts, choices that stand in the middle of the prompt, images, and code that would be run.
    """
    name, options = _parsed(name)
    shots = options.get("shots", shots)
    theirs = _found(name)
    _check_kind(name, theirs)
    theirs.set_fewshot_seed(shots_seed)
    shots = int(theirs.config.num_fewshot or 0) if shots is None else whole("shots", shots, 0)
    split, docs = _docs(name, theirs, options.get("split", split))
    others = _Others.in_place_of(theirs, split)
    read = _option_example if theirs.OUTPUT_TYPE == "multiple_choice" else _text_example
    examples = []
    for at, doc in enumerate(docs, start=1):
        where = f"{PREFIX}{theirs.task_name}[{split}]:{at}"
        try:
            others.doc = doc
            examples.append(read(theirs, dict(doc), shots, where))
        except TaskError as error:
            raise TaskError(f"{where}: {error}") from None
        except Exception as error:  # a task's templates and functions raise as they like
            raise TaskError(f"{where}: the task's own prompt failed: {one_line(error)}") from error
    own: GraderSpec = "choice" if theirs.OUTPUT_TYPE == "multiple_choice" else LmEvalGrader(theirs)
    task = Task(theirs.task_name, tuple(examples), Grading(()), chat, system, category_field=category_field)
    for example in examples if category_field else ():
        task.category(example)
    return task.graded_by(own if grader is None else grader)


@dataclass(frozen=True)
class LmEvalGrader:
    """The metrics that a generating task of the harness gives a completion, by their names there.

    The completion ends where the task stops generating. With several filters a reward is called `metric,filter`, as the
    harness calls it. Metrics that are computed from all completions together, such as BLEU, are no rewards and are left
    out.
    """

    task: Any = field(repr=False)

    @property
    def label(self) -> str:
        """What provenance calls it."""
        return f"{PREFIX}{self.task.task_name}, version {self.task.VERSION}"

    def __call__(self, completion: str, example: Example) -> dict[str, float]:
        """Rewards by name."""
        from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

        instance = Instance("generate_until", example.fields, (example.prompt, {}), 0)
        instance.resps = [_stopped(completion, self.task.config.generation_kwargs)]
        found: dict[str, float] = {}
        for each in self.task._filters:
            each.apply([instance])
            metrics = self.task.process_results(example.fields, [instance.filtered_resps[each.name]])
            for metric, value in metrics.items():
                if isinstance(value, Real):
                    found[metric if len(self.task._filters) == 1 else f"{metric},{each.name}"] = float(value)
        if not found:
            raise TaskError("none of the task's metrics is of one completion; give another grader")
        return found


class _Others:
    """A task's sampler of solved examples, which never draws the document that is asked about.

    The harness sees to that on its test split alone, and other splits are read here too.
    """

    def __init__(self, sampler: Any, shared: bool):
        self.doc: Any = None
        self._sampler, self._shared = sampler, shared

    @classmethod
    def in_place_of(cls, task: Any, split: str) -> _Others:
        """Give a task this sampler for the documents of a split."""
        config, few = task.config, task.fewshot_cfg
        pool = few.split or config.training_split or config.validation_split or config.test_split
        drawn = few.split is not None or getattr(few, "samples", None) is None  # or written in the task
        task.sampler = cls(task.sampler, drawn and pool == getattr(config, f"{SPLITS[split]}_split"))
        return task.sampler

    def sample(self, n: int, eval_doc: Any = None) -> Sequence[Any]:
        """As the task's own, by whether the document is among what is drawn from."""
        return self._sampler.sample(n=n, eval_doc=self.doc if self._shared else None)


def _parsed(name: str) -> tuple[str, dict[str, Any]]:
    """The task's own name and the options after it."""
    own, *words = name.removeprefix(PREFIX).split(",")
    options: dict[str, Any] = {}
    for word in words:
        option, _, value = word.strip().partition("=")
        if option not in ("shots", "split") or not value or option in options:
            raise TaskError(f"task must be {PREFIX}NAME with ,shots=N or ,split=NAME once each, got {name!r}")
        if option == "shots" and not value.isdecimal():
            raise TaskError(f"shots of task {own} must be a whole number, got {value!r}")
        options[option] = int(value) if option == "shots" else value
    return own, options


def _found(name: str) -> Any:
    """The harness's task object."""
    try:
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise CorrSteerError(
            f"task {PREFIX}{name} needs lm-evaluation-harness, which cannot be imported ({error}): "
            f"pip install corrsteer[lm-eval]"
        ) from error
    is_file = name.endswith((".yaml", ".yml"))
    if is_file and not Path(name).is_file():
        raise TaskError(f"there is no task file {name}")
    manager = TaskManager(include_defaults=not is_file)
    if not is_file and name not in manager.all_subtasks:
        if name in manager.all_tasks:
            raise TaskError(f"task {name} is a group of lm-evaluation-harness; give one of its tasks")
        raise TaskError(f"lm-evaluation-harness has no task {name!r}{_near(name, manager.all_subtasks)}")
    try:
        tasks = manager.load(name)["tasks"]
    except Exception as error:  # datasets and tasks raise as they like
        raise TaskError(f"task {name} of lm-evaluation-harness cannot be loaded: {one_line(error)}") from error
    if len(tasks) != 1:
        raise TaskError(f"task {name} must be one task of lm-evaluation-harness, got {', '.join(sorted(tasks)[:8])}")
    return next(iter(tasks.values()))


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _check_kind(name: str, task: Any) -> None:
    """Raise for a task that completions cannot be graded by."""
    from lm_eval.api.task import ConfigurableTask  # pyright: ignore[reportMissingImports]

    reason = None
    if not isinstance(task, ConfigurableTask):
        reason = "is a class of its own, whose prompts cannot be asked for"
    elif task.OUTPUT_TYPE not in ("generate_until", "multiple_choice"):
        reason = f"is of the kind {task.OUTPUT_TYPE}, which scores given texts and generates none"
    elif getattr(task, "MULTIMODAL", False):
        reason = "has images or sound"
    elif getattr(task, "UNSAFE_CODE", False):
        reason = "runs the code that a model writes"
    elif task.multiple_input:
        reason = "has its choices in the middle of the prompt, each of which is a prompt of its own"
    if reason:
        raise TaskError(f"task {name} of lm-evaluation-harness {reason}; give a task that generates or has options")


def _docs(name: str, task: Any, split: str | None) -> tuple[str, Iterator[Mapping[str, Any]]]:
    """A split's documents, and its name."""
    there = [ours for ours, theirs in SPLITS.items() if getattr(task, f"has_{theirs}_docs")()]
    if split is None:
        split = "test" if "test" in there else "validation"
    if split not in there:
        raise TaskError(f"split of task {name} must be one of {', '.join(there) or 'none'}, got {split!r}")
    return split, iter(getattr(task, f"{SPLITS[split]}_docs")())


def _text_example(task: Any, doc: dict[str, Any], shots: int, where: str) -> Example:
    """A document that is answered by text, its prompt as the harness makes it."""
    target = task.doc_to_target(doc)
    if task.config.doc_to_choice is not None and isinstance(target, int):
        target = task.doc_to_choice(doc)[target]
    answer = tuple(map(str, target)) if isinstance(target, (list, tuple)) else str(target)
    return Example(_context(task, doc, shots), answer, doc, where)


def _option_example(task: Any, doc: dict[str, Any], shots: int, where: str) -> Example:
    """A document with options, its prompt as the harness makes it where that has them by letter already."""
    choices = task.doc_to_choice(doc)
    if _are_letters(choices) and all(f"{letter}." in task.doc_to_text(doc) for letter in choices):
        return Example(_context(task, doc, shots), _letters(task, doc, choices), doc, where)
    if len(choices) > len(string.ascii_uppercase):
        raise TaskError(f"a question may have {len(string.ascii_uppercase)} options, got {len(choices)}")
    solved = task.sampler.sample(shots)
    turns = [f"{_question(task, one)} {_first(_letters(task, one, task.doc_to_choice(one)))}" for one in solved]
    description = (task.resolve_field(doc, task.config.description) or "").strip()
    prompt = "\n\n".join([*([description] if description else []), *turns, _question(task, doc)])
    return Example(prompt, _letters(task, doc, choices), doc, where)


def _context(task: Any, doc: dict[str, Any], shots: int) -> str:
    return task.fewshot_context(doc, num_fewshot=shots, gen_prefix=task.doc_to_prefix(doc))


def _question(task: Any, doc: dict[str, Any]) -> str:
    """The question with its options by letter: `...\\nA. red\\nB. blue\\nAnswer:`."""
    text = task.doc_to_text(doc).strip()
    text = text.removesuffix("Answer:").removesuffix("A:").rstrip()
    options = [f"{letter}. {one.strip()}" for letter, one in zip(string.ascii_uppercase, task.doc_to_choice(doc))]
    return "\n".join([text, *options, "Answer:"])


def _letters(task: Any, doc: Mapping[str, Any], choices: Sequence[str]) -> str | tuple[str, ...]:
    """Of the right options."""
    target = task.doc_to_target(doc)
    right = [_place(one, choices) for one in (target if isinstance(target, (list, tuple)) else [target])]
    letters = choices if _are_letters(choices) else string.ascii_uppercase
    return letters[right[0]].strip() if len(right) == 1 else tuple(letters[at].strip() for at in right)


def _place(target: Any, choices: Sequence[str]) -> int:
    at = choices.index(target) if isinstance(target, str) and target in choices else target
    if isinstance(at, str) and at.isdecimal():
        at = int(at)
    if not isinstance(at, int) or not 0 <= at < len(choices):
        raise TaskError(f"the right option must be one of {len(choices)}, got {target!r}")
    return at


def _are_letters(choices: Sequence[str]) -> bool:
    return [one.strip() for one in choices] == list(string.ascii_uppercase[: len(choices)])


def _first(letters: str | tuple[str, ...]) -> str:
    return letters if isinstance(letters, str) else letters[0]


def _stopped(completion: str, generation: Mapping[str, Any] | None) -> str:
    """The completion up to the first text at which the task stops generating."""
    until = (generation or {}).get("until") or []
    for stop in [until] if isinstance(until, str) else until:
        completion = completion.split(stop)[0] if stop else completion
    return completion
