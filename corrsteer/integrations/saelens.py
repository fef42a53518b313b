"""SAELens' SAEs with their `encode` on corrsteer's kernels, and nothing else changed.

`accelerate` gives one SAE an `encode` of its own. SAELens' `forward`, `run_with_cache`, HookedSAETransformer and
SAETransformerBridge call `sae.encode`, and so use it. Where the kernels cannot give what a call asks for, or have not
been measured to be faster, the original runs (`saelens_paths`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import torch
from torch import Tensor

from corrsteer.arguments import shown, whole
from corrsteer.errors import CorrSteerError
from corrsteer.integrations import saelens_paths as paths
from corrsteer.integrations.saelens_encoder import WRITERS, FoldedEncoder, encoder_parameters
from corrsteer.ops import operations, reference

if TYPE_CHECKING:
    from sae_lens import SAE

AnySAE = TypeVar("AnySAE", bound="SAE[Any]")

ADDED = ("encode", "encode_pooled", "topk_features", *WRITERS)
# What normalisations leave on the SAE for the `decode` that follows.
LEFT_FOR_DECODE = ("x_norm_coeff", "ln_mu", "ln_std")
PART = 512  # tokens encoded at a time where the kernels are not faster
SAMPLES = 64  # pooled at a time where only the top features are kept


@overload
def accelerate(sae: AnySAE, *, explain: Literal[False] = False) -> AnySAE: ...


@overload
def accelerate(sae: SAE[Any], *, explain: Literal[True]) -> paths.Explanation: ...


def accelerate(sae: SAE[Any], *, explain: bool = False) -> SAE[Any] | paths.Explanation:
    """Let a SAELens SAE encode with corrsteer's kernels, in place; `restore` undoes it.

    `sae.encode` and all that calls it return what they did before, within the numerical contract: shape, dtype, device,
    gradients. With grad enabled a call is as fast as without; a backward pass runs SAELens' own `encode` once more.
    Changed weights are seen, see `corrsteer.integrations.saelens_encoder.FoldedEncoder`. The folded and the packed
    weight take twice the memory of `W_enc` beside it, from the first call on (float16: three times).

    Two methods are added, which make no dense `[tokens, d_sae]` matrix (unless `x` requires grad or activations are
    hooked) and have no gradients (unless `x` requires grad):

    - `sae.encode_pooled(x, attention_mask=None, pool="mean")`: `[B, d_sae]` float32
    - `sae.topk_features(x, attention_mask=None, k=10, pool="max")`: values and indices, `[B, k]` each

    with `x: [B, S, d_in]` (`[B, S, heads, d_head]` for hook_z) and `attention_mask: [B, S]`, 0 where there is padding.

    Parameters
    ----------
    sae : an `sae_lens.SAE`; one that the kernels cannot stand in for keeps its own `encode`.
    explain : return which path each kind of call takes and why, rather than the SAE.

    Returns
    -------
    The SAE itself, or an `Explanation`.
    """
    _check(sae)
    if not is_accelerated(sae):
        encode = _Encode(sae)
        methods = (encode, _EncodePooled(encode), _TopkFeatures(encode), *(_Writer(encode, name) for name in WRITERS))
        vars(sae).update(zip(ADDED, methods))
    return paths.explain(sae) if explain else sae


def restore(sae: AnySAE) -> AnySAE:
    """Take back what `accelerate` did, if it did; returns the SAE itself."""
    _check(sae)
    if is_accelerated(sae):
        for name in ADDED:
            vars(sae).pop(name, None)
    return sae


@contextlib.contextmanager
def accelerated(sae: AnySAE) -> Iterator[AnySAE]:
    """`accelerate` for the time of a with block; an SAE that was accelerated before stays so."""
    before = is_accelerated(sae)
    try:
        yield accelerate(sae)
    finally:
        if not before:
            restore(sae)


def is_accelerated(sae: SAE[Any]) -> bool:
    """Whether `accelerate` has been called on it."""
    return isinstance(vars(sae).get("encode"), _Encode)


def _check(sae: object) -> None:
    if not isinstance(sae, torch.nn.Module) or not hasattr(sae, "process_sae_in"):
        raise CorrSteerError(f"sae must be an sae_lens.SAE, got {shown(sae)}; load one with SAE.from_pretrained")


class _Encode:
    """`sae.encode`. A copy of the SAE has a copy of it, which folds that copy's own weights."""

    def __init__(self, sae: SAE[Any]):
        self.sae = sae
        self.folded = FoldedEncoder()

    def __getstate__(self) -> dict[str, Any]:
        return {"sae": self.sae}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.sae = state["sae"]
        self.folded = FoldedEncoder()

    def __call__(self, x: Tensor) -> Tensor:
        sae = self.sae
        if torch.compiler.is_compiling() or self.why_not(x) or paths.slower(sae, x.numel() // sae.cfg.d_in):
            return type(sae).encode(sae, x)
        return sae.hook_sae_acts_post(self.core(sae.process_sae_in(x)))

    def why_not(self, x: Tensor) -> str:
        """Why the kernels cannot run; empty if they can."""
        return paths.unsupported(self.sae) or paths.unwanted(self.sae, x)

    def core(self, sae_in: Tensor) -> Tensor:
        """Activations `[..., d_sae]` of `sae_in: [..., d_in]`, as `process_sae_in` returns it."""
        sae, parameters = self.sae, encoder_parameters(self.sae)
        if sae_in.shape[-1:] != (sae.cfg.d_in,) or sae_in.dtype != sae.dtype:  # whose error is SAELens' own
            return type(sae).encode(_AfterInput(sae, parameters), sae_in)  # pyright: ignore[reportArgumentType]
        if torch.is_grad_enabled() and any(t.requires_grad for t in (sae_in, *parameters.values())):
            return _Differentiable.apply(self, tuple(parameters), sae_in, *parameters.values())
        return self.run(sae_in)

    @torch.no_grad()
    def run(self, sae_in: Tensor) -> Tensor:
        """The kernels' activations, in the SAE's dtype."""
        return operations.encode(sae_in, self.folded(self.sae)).to(self.sae.dtype)


class _AfterInput:
    """An SAE as its own `encode` sees it, with its input handled already, hooks passed and parameters given."""

    def __init__(self, sae: SAE[Any], parameters: dict[str, Tensor]):
        self._sae = sae
        self._parameters = parameters

    def __getattr__(self, name: str) -> Any:
        if name in ("process_sae_in", "hook_sae_acts_pre", "hook_sae_acts_post"):
            return _same
        return self._parameters[name] if name in self._parameters else getattr(self._sae, name)


def _same(x: Tensor) -> Tensor:
    return x


class _Differentiable(torch.autograd.Function):
    """The kernels forward; backward, SAELens' own `encode` of the same input and weights, differentiated."""

    @staticmethod
    def forward(ctx: Any, encode: _Encode, names: tuple[str, ...], sae_in: Tensor, *parameters: Tensor) -> Tensor:
        ctx.sae, ctx.names = encode.sae, names
        ctx.save_for_backward(sae_in, *parameters)
        return encode.run(sae_in)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        sae_in, *parameters = ctx.saved_tensors
        again = torch.is_grad_enabled()  # where gradients of gradients are wanted
        with torch.enable_grad():
            original = _AfterInput(ctx.sae, dict(zip(ctx.names, parameters)))
            acts = type(ctx.sae).encode(original, sae_in)
        needed = ctx.needs_input_grad[2:]
        wanted = [tensor for tensor, needs in zip((sae_in, *parameters), needed) if needs]
        found = iter(torch.autograd.grad(acts, wanted, gradients, create_graph=again, allow_unused=True))
        return None, None, *(next(found) if needs else None for needs in needed)


class _Writer:
    """One of SAELens' methods that write through `.data`; afterwards the weights are folded again."""

    def __init__(self, encode: _Encode, name: str):
        self.encode, self.name = encode, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        sae = self.encode.sae
        try:
            return getattr(type(sae), self.name)(sae, *args, **kwargs)
        finally:
            self.encode.folded.forget()


class _EncodePooled:
    """`sae.encode_pooled`."""

    def __init__(self, encode: _Encode):
        self.encode = encode

    def __call__(self, x: Tensor, attention_mask: Tensor | None = None, pool: str = "mean") -> Tensor:
        """Activations pooled over each sample's tokens.

        Parameters
        ----------
        x : `[B, S, d_in]`, or `[B, S, heads, d_head]` for a hook_z SAE.
        attention_mask : `[B, S]`, 0 or False where there is padding; None if there is none.
        pool : `mean` or `max`; a sample without tokens pools to 0.

        Returns
        -------
        `[B, d_sae]` float32.
        """
        kept, lengths = _kept(self.encode.sae, x, attention_mask, pool)
        return _pooled(self.encode, x[kept], lengths, pool)


class _TopkFeatures:
    """`sae.topk_features`."""

    def __init__(self, encode: _Encode):
        self.encode = encode

    def __call__(
        self, x: Tensor, attention_mask: Tensor | None = None, k: int = 10, pool: str = "max"
    ) -> tuple[Tensor, Tensor]:
        """Each sample's k most active features, highest first.

        Parameters
        ----------
        x, attention_mask, pool : as for `encode_pooled`.
        k : features a sample.

        Returns
        -------
        Pooled activations `[B, k]` float32, and the features `[B, k]` int64.
        """
        d_sae = self.encode.sae.cfg.d_sae
        if whole("k", k, 1) > d_sae:
            raise CorrSteerError(f"k must lie in 1..d_sae={d_sae}, got {k}")
        kept, lengths = _kept(self.encode.sae, x, attention_mask, pool)
        parts = zip(x.split(SAMPLES), kept.split(SAMPLES), lengths.split(SAMPLES))
        tops = [_pooled(self.encode, rows[keep], count, pool).topk(k) for rows, keep, count in parts]
        return torch.cat([top.values for top in tops]), torch.cat([top.indices for top in tops])


def _kept(sae: SAE[Any], x: Tensor, attention_mask: Tensor | None, pool: str) -> tuple[Tensor, Tensor]:
    """Which tokens `[B, S]` count, and how many `[B]` they are in each sample."""
    dims = 4 if sae.hook_z_reshaping_mode else 3
    if not isinstance(x, Tensor) or x.dim() != dims:
        words = "[B, S, heads, d_head]" if dims == 4 else "[B, S, d_in]"
        raise CorrSteerError(f"x must be {words}, got {list(x.shape) if isinstance(x, Tensor) else shown(x)}")
    if not isinstance(pool, str) or pool not in ("mean", "max"):
        raise CorrSteerError(f"pool must be mean or max, got {shown(pool)}")
    if attention_mask is None:
        kept = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    elif isinstance(attention_mask, Tensor) and attention_mask.shape == x.shape[:2]:
        kept = attention_mask.to(x.device).bool()
    else:
        got = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else shown(attention_mask)
        raise CorrSteerError(f"attention_mask must be [B, S]={list(x.shape[:2])}, got {got}")
    return kept, kept.sum(1)


def _pooled(encode: _Encode, tokens: Tensor, lengths: Tensor, pool: str) -> Tensor:
    """`[N, d_sae]` float32 of packed tokens."""
    sae = encode.sae
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=tokens.device)
    cu_seqlens[1:] = lengths.cumsum(0)
    with _left_for_decode(sae):
        hooked = paths.hooked(sae, "hook_sae_acts_post")  # whose hooks may change what is pooled
        wanted = torch.is_grad_enabled() and tokens.requires_grad
        if hooked or wanted or torch.compiler.is_compiling() or encode.why_not(tokens):
            return reference.pool(encode(tokens).float(), cu_seqlens, pool)
        if not len(tokens) or not paths.slower(sae, len(tokens), "pooled"):
            return pooled_by_kernels(encode, tokens, cu_seqlens, pool)
        with torch.no_grad():
            return torch.cat([_pooled_densely(encode, part, tokens, pool) for part in _parts(cu_seqlens)])


@torch.no_grad()
def pooled_by_kernels(encode: _Encode, tokens: Tensor, cu_seqlens: Tensor, pool: str) -> Tensor:
    """`encode_pool` of packed tokens as they come to the SAE."""
    sae_in = encode.sae.process_sae_in(tokens)
    pooled = operations.encode_pool(sae_in, cu_seqlens, encode.folded(encode.sae), pool)
    assert isinstance(pooled, Tensor), "one pooling has one result"
    return pooled


def _pooled_densely(encode: _Encode, part: Tensor, tokens: Tensor, pool: str) -> Tensor:
    start, end = int(part[0]), int(part[-1])
    return reference.pool(encode(tokens[start:end]).float(), part - part[0], pool)


def _parts(cu_seqlens: Tensor) -> Iterator[Tensor]:
    """Stretches of samples, of `PART` tokens each or one sample, that never have many dense activations at a time."""
    ends, first = cu_seqlens.tolist(), 0
    for at in range(1, len(ends)):
        if at == len(ends) - 1 or ends[at + 1] - ends[first] > PART:
            yield cu_seqlens[first : at + 1]
            first = at


@contextlib.contextmanager
def _left_for_decode(sae: SAE[Any]) -> Iterator[None]:
    """Leave what the last `encode` left for its `decode` as it was."""
    left = {name: vars(sae)[name] for name in LEFT_FOR_DECODE if name in vars(sae)}
    try:
        yield
    finally:
        for name in LEFT_FOR_DECODE:
            vars(sae).pop(name, None)
        vars(sae).update(left)
