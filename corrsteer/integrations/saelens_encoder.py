"""What the kernels read of a SAELens SAE, folded when first needed and again when its weights have changed.

Only what comes after the SAE's own `process_sae_in` is folded: the product, the bias and the activation. Casts,
reshapes, normalisations and the subtraction of `b_dec` stay SAELens' own, with the same rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from corrsteer.sae.encoder import SparseEncoder

if TYPE_CHECKING:
    from sae_lens import SAE

# SAELens' own methods that write to weights through `.data`, which torch's version counters do not count.
WRITERS = ("fold_and_get_W_dec_norm", "fold_activation_norm_scaling_factor", "fold_activation_whitening")


def encoder_parameters(sae: SAE[Any]) -> dict[str, Tensor]:
    """The parameters that `sae.encode` uses after its input handling, by name."""
    unused = {"b_dec", "W_skip"} if _rescales(sae) else {"b_dec", "W_skip", "W_dec"}
    return {name: parameter for name, parameter in sae.named_parameters() if name not in unused}


class _Folded(NamedTuple):
    encoder: SparseEncoder
    counted: tuple[object, ...]
    sampled: tuple[Tensor, ...]


class FoldedEncoder:
    """The `SparseEncoder` of an SAE, never of weights that it no longer has.

    Seen at every call: other tensors, dtypes or devices; changes in place that torch counts (optimizers,
    `load_state_dict`, anything under `no_grad`); after `forget`, everything. Of changes through `.data` or NumPy, those
    that alter a bias or a threshold, or the first row or column of a matrix: a change of whole matrices, features or
    input dimensions does. One that leaves all of these as they are needs `forget`.
    """

    def __init__(self) -> None:
        self._folded: _Folded | None = None

    def __call__(self, sae: SAE[Any]) -> SparseEncoder:
        parameters = encoder_parameters(sae)
        k = getattr(sae.activation_fn, "k", None)
        parts = tuple((p.data_ptr(), p.dtype, p.shape, p.stride(), p._version) for p in parameters.values())
        counted = (k, _rescales(sae), parts)
        sampled = tuple(piece for parameter in parameters.values() for piece in _sample(parameter.detach()))
        found = self._folded
        if found is None or found.counted != counted or not all(map(torch.equal, found.sampled, sampled)):
            encoder = SparseEncoder.from_sae_lens(sae, input_handling=False)
            found = _Folded(encoder, counted, tuple(piece.clone() for piece in sampled))
            self._folded = found
        return found.encoder

    def forget(self) -> None:
        """Fold again at the next call."""
        self._folded = None


def _rescales(sae: SAE[Any]) -> bool:
    return bool(getattr(sae.cfg, "rescale_acts_by_decoder_norm", False))


def _sample(parameter: Tensor) -> tuple[Tensor, ...]:
    return (parameter[0], parameter[:, 0]) if parameter.dim() == 2 else (parameter,)
