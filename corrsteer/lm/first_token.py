"""The first token of a completion restricted to some labels, such as those of the options of a question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from corrsteer.errors import CorrSteerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def label_tokens(tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> list[int]:
    """The tokens that are one of the labels, alone or after a space, in ascending order.

    Raises
    ------
    CorrSteerError : for a label that is no single token either way.
    """
    found: set[int] = set()
    for label in labels:
        # An unknown token, or half a character, is one token too, but does not say the label.
        tokens = {token for token in _candidates(tokenizer, label) if str(tokenizer.decode([token])).strip() == label}
        if not tokens:
            raise CorrSteerError(
                f"first_token_among has {label!r}, which is no single token of this tokenizer, alone or after a space; "
                f"leave it out (on the command line --options-only), or take labels that are, such as A, B, C"
            )
        found |= tokens
    return sorted(found)


def _candidates(tokenizer: PreTrainedTokenizerBase, label: str) -> set[int]:
    """What may be a label's token: the whole of what it is written as, and the piece of the vocabulary that it is.

    Some tokenizers put a space before all that they read, so that a label without one is only in their vocabulary.
    """
    written: list[list[int]] = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (label, f" {label}")]
    piece: Any = tokenizer.convert_tokens_to_ids(label)
    return {ids[0] for ids in written if len(ids) == 1} | ({piece} if isinstance(piece, int) else set())


class FirstTokenAmong:
    """A logits processor that leaves some tokens to the first step, and all of them to the others.

    Parameters
    ----------
    tokens : ids of those that are left.
    width : tokens of a row before the first that is generated.
    """

    def __init__(self, tokens: Sequence[int], width: int):
        self._tokens, self._width = list(tokens), width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`[B, vocabulary]` scores."""
        if input_ids.shape[1] > self._width:
            return scores
        left = scores.new_full(scores.shape, -float("inf"))
        left[:, self._tokens] = scores[:, self._tokens]
        return left
