"""Rollouts and the tokens of a model: what is missing is filled in, and what cannot be the model's is refused."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from corrsteer.arguments import whole
from corrsteer.rollouts.rollout import Rollout, RolloutError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_tokens(rollouts: Iterable[Rollout], vocabulary: int, context: int | None = None) -> None:
    """Raise unless a model can have read and written these tokens.

    Parameters
    ----------
    vocabulary : how many tokens the model knows.
    context : the most tokens that it takes, prompt and completion together; None for no limit.

    Raises
    ------
    RolloutError : for the first rollout that has a token beyond, or too many, with how many more there are.
    """
    whole("vocabulary", vocabulary, 1)
    bad = []
    for rollout in rollouts:
        for name in ("prompt_ids", "completion_ids"):
            most = max(getattr(rollout, name) or (), default=0)
            if most >= vocabulary:
                bad.append(
                    f"{rollout.where}: {name} has token {most}, but the model knows {vocabulary}; the rollouts must be "
                    f"of this model, or one with its tokenizer"
                )
                break
        n = len(rollout.prompt_ids or ()) + len(rollout.completion_ids or ())
        if context is not None and n > context:
            bad.append(f"{rollout.where}: prompt and completion have {n} tokens, more than the context of {context}")
    if bad:
        raise RolloutError(bad[0] + (f" (and {len(bad) - 1} more bad)" if len(bad) > 1 else ""))


def fill_in(
    rollouts: Iterable[Rollout], tokenizer: PreTrainedTokenizerBase, stop_tokens: Collection[int] = ()
) -> list[Rollout]:
    """Rollouts with prompt and completion both as text and as tokens, as far as a tokenizer can tell.

    A prompt's text is tokenised with the tokenizer's special tokens, messages by its chat template; a completion's text
    without special tokens, apart from its prompt. That may give other tokens than were generated, so rollouts should
    have their `completion_ids` where they are known. Of the tokens of a prompt alone no text is made.

    Parameters
    ----------
    stop_tokens : at which `completion_ids` are cut.

    Raises
    ------
    RolloutError : for a prompt without tokens, and messages that there is no chat template for.
    """
    found: list[Rollout] = []
    for rollout in rollouts:
        change: dict[str, Any] = {}
        if rollout.prompt_ids is None:
            change["prompt_ids"] = _prompt_ids(rollout, tokenizer)
        ids = rollout.completion_ids
        if ids is None:
            ids = tuple(tokenizer(rollout.completion, add_special_tokens=False)["input_ids"])
        end = next((at for at, token in enumerate(ids) if token in stop_tokens), None)
        change["completion_ids"] = ids[:end]
        if end is not None:
            change["finish"] = "stop"
        if rollout.completion is None:
            change["completion"] = tokenizer.decode(list(ids[:end]), skip_special_tokens=True)
        found.append(replace(rollout, **change))
    return found


def mismatched(rollouts: Iterable[Rollout], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Ids of those, filled in, whose completion's tokens do not decode to its text.

    Its text was cut or cleaned after it was generated, or is of another tokenizer: what is read of them is not quite
    what the model wrote.
    """
    rollouts = list(rollouts)
    ids = [list(rollout.completion_ids or ()) for rollout in rollouts]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [rollout.id for rollout, text in zip(rollouts, texts) if text != rollout.completion]


def _prompt_ids(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> Sequence[int]:
    prompt: Any = rollout.prompt
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif getattr(tokenizer, "chat_template", None) is None:
        raise RolloutError(
            f"{rollout.where}: the prompt is chat messages, and the tokenizer has no chat_template; give prompt_ids"
        )
    else:
        try:
            text: Any = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template raises as it likes
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise RolloutError(f"{rollout.where}: the chat template failed: {reason}") from error
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise RolloutError(f"{rollout.where}: the prompt has no tokens; give it some text, or prompt_ids")
    return tuple(ids)
