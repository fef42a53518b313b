"""`SparseEncoder`: the encoder of one SAE, folded to one form, and the rows of its decoder.

Whatever an SAE does to its input before the product (subtract `b_dec`, normalise, reshape heads) and after it
(rescale by decoder norms) is folded once, at load, into a weight, a bias and at most one scale per token:

    p = scale(x) · (W x) + b,   activation(p)

so that a kernel has one product and one epilogue. Only the encoder is held; decoder rows are read from where
they lie when features have been selected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from corrsteer.arguments import as_path, check_type, shown, whole, wholes
from corrsteer.errors import CorrSteerError
from corrsteer.files import plain
from corrsteer.sae import formats, sources
from corrsteer.sae.formats.format import refused
from corrsteer.sae.formats.stores import without_values
from corrsteer.sae.sources import Decoder
from corrsteer.tensors import check_tensor
from corrsteer.types import Device, PathLike

if TYPE_CHECKING:
    from sae_lens import SAE

ACTIVATIONS = ("relu", "jumprelu", "gated", "topk", "abstopk", "groupmax", "identity")
WITH_K = ("topk", "abstopk", "groupmax")  # that keep k features of a token
SIGNED = ("abstopk", "identity")  # that can be negative
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PRECISIONS = {
    "fp32": torch.float32,  # of float32 accuracy; on tensor cores each product is three of tf32
    "fp32_ieee": torch.float32,  # every product rounded as IEEE float32
    "bf16x2": torch.bfloat16,  # each weight the sum of two bfloat16: close to float32 for bfloat16 tokens
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,  # the truth that errors are measured from; the reference backend alone computes in it
}
TENSORS = (
    "weight", "weight_low", "packed_weight", "weight_sum", "bias", "threshold", "magnitude_scale", "magnitude_bias"
)  # fmt: skip
NEEDED = {
    "relu": ("weight", "bias"),
    "jumprelu": ("weight", "bias", "threshold"),
    "gated": ("weight", "bias", "magnitude_scale", "magnitude_bias"),
    "topk": ("weight", "bias"),
    "abstopk": ("weight", "bias"),
    "groupmax": ("weight", "bias"),
}
NORMS = ("none", "layer_norm", "constant_norm_rescale")
FOLD_ROWS = 8192  # features folded at a time, so that folding needs little memory beside the weight

# Architecture -> our activation: SAELens', and those that only sparsify has. A skip transcoder's skip path is not part
# of its encoder.
ARCHITECTURES = {
    "standard": "relu",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "topk": "topk",
    "abstopk": "abstopk",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
    "groupmax": "groupmax",
    "topk_transcoder": "topk",
    "groupmax_transcoder": "groupmax",
}
DTYPE_NAMES = {name: dtype for dtype in DTYPES for name in (str(dtype), str(dtype).removeprefix("torch."))}
INPUT_NORMS = {
    "none": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm_rescale",
    # These two are folded into the weights when an SAE is trained or fetched; SAELens applies nothing at run time.
    "expected_average_only_in": "none",
    "covariance_whitening": "none",
}
# Hook points that read the residual stream, or what is written to it, as TransformerLens names them.
WRITTEN = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
# Families of models with RMSNorm, which would notice a mean, and which TransformerLens leaves as they are in any case.
RMS_NORM = ("gemma", "llama", "mistral", "mixtral", "qwen", "phi-3", "olmo-2", "deepseek")


@dataclass(frozen=True, eq=False)
class SparseEncoder:
    """One SAE's encoder.

    Attributes
    ----------
    d_in, d_sae : width of the residual stream and number of features.
    activation : `relu`, `jumprelu`, `gated`, `topk`, `abstopk`, `groupmax` or `identity`;
        `corrsteer.ops.reference.encode` defines them.
    weight : `[d_sae, d_in]`, float32, bfloat16 or float16, contiguous; None for `identity`.
    weight_low : `[d_sae, d_in]` bfloat16, what `weight` lacks; for the precision `bf16x2` only.
    packed_weight : `[panels, d_in / k, rows, k]` float32 or bfloat16, padded with 0: the weight in panels of rows with
        k numbers of each side by side, which a CPU's kernels read; of an encoder that holds no other, see `ops.pack`.
    weight_sum : `[d_sae]` float32, the weight's row sums, for layer_norm only: W (x - mean x) = W x - mean x · sums.
        Centring W itself would be cheaper, but rounding would leave rows that do not quite sum to 0, times mean x.
        Kernels subtract what is large of mean x before the product.
    bias : `[d_sae]` float32; the gate's bias where gated.
    threshold : `[d_sae]` float32, jumprelu only.
    magnitude_scale, magnitude_bias : `[d_sae]` float32, gated only: the magnitude is relu(scale · W x + bias).
    k : features kept per token, topk and abstopk only; for groupmax the number of groups, which divides `d_sae`.
    input_norm : `none`, `layer_norm` or `constant_norm_rescale`, as SAELens defines them.
    precision : one of `PRECISIONS`; by default the weight's own.
    hook_name : where the SAE was trained, `blocks.20.hook_resid_post` or `model.layers.20`; None if it does not say.
    decoder : where decoder rows are read from.
    metadata : what the SAE's own configuration says about it, as JSON can hold it.
    """

    d_in: int
    d_sae: int
    activation: str
    weight: Tensor | None = None
    weight_low: Tensor | None = None
    packed_weight: Tensor | None = None
    weight_sum: Tensor | None = None
    bias: Tensor | None = None
    threshold: Tensor | None = None
    magnitude_scale: Tensor | None = None
    magnitude_bias: Tensor | None = None
    k: int = 0
    input_norm: str = "none"
    precision: str = ""
    hook_name: str | None = None
    decoder: Decoder = field(default_factory=lambda: sources.open_decoder({"kind": "none"}), repr=False)
    metadata: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        # Now, as it goes into every file that is made with the encoder.
        object.__setattr__(self, "metadata", plain(self.metadata))
        self._check()
        if self.weight is not None:
            self._check_precision(self.weight)
        elif self.packed_weight is None:
            return
        for name in TENSORS:  # views would be read wrongly by kernels, which take pointers
            if getattr(self, name) is not None:
                object.__setattr__(self, name, getattr(self, name).contiguous())
        if self.precision != "fp64":
            for name in TENSORS[TENSORS.index("weight_sum") :]:  # vectors, of whatever dtype they were given
                if getattr(self, name) is not None:
                    object.__setattr__(self, name, getattr(self, name).float())
        if self.input_norm == "layer_norm" and self.weight_sum is None:
            object.__setattr__(self, "weight_sum", _row_sums(required(self.weight), self.weight_low))

    def _check_precision(self, weight: Tensor) -> None:
        """Raise for a precision that is not the weight's; the weight's own where none was given."""
        own = "bf16x2" if self.weight_low is not None else _precision_of(weight.dtype)
        if not self.precision:
            object.__setattr__(self, "precision", own)
        if PRECISIONS.get(self.precision) != weight.dtype or (self.precision == "bf16x2") != (own == "bf16x2"):
            raise CorrSteerError(
                f"precision must be one of {', '.join(PRECISIONS)} and fit the weight, which is {own}, "
                f"got {self.precision!r}; use encoder.to(precision={self.precision!r})"
            )

    def _check(self) -> None:
        """Raise for parts that do not fit each other; kernels, which take pointers, would read past their ends."""
        for name, known in (("activation", ACTIVATIONS), ("input_norm", NORMS)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                raise CorrSteerError(f"{name} must be one of {', '.join(known)}, got {shown(value)}")
        for name, least in (("d_in", 1), ("d_sae", 1), ("k", int(self.activation in WITH_K))):
            object.__setattr__(self, name, whole(name, getattr(self, name), least))
        instead = () if self.packed_weight is None else ("weight",)
        needed = (name for name in NEEDED.get(self.activation, ()) if name not in instead)
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise CorrSteerError(f"{', '.join(missing)} must be given for activation {self.activation!r}, got None")
        fix = "make one with corrsteer.sae.sources.decoder_in_memory"
        check_type("decoder", self.decoder, Decoder, "a Decoder", fix)
        for name in TENSORS:
            part = getattr(self, name)
            if part is None:
                continue
            check_tensor(name, part)
            if name == "packed_weight":
                self._check_packed(part)
                continue
            shape = (self.d_sae, self.d_in) if name in ("weight", "weight_low") else (self.d_sae,)
            if part.shape != shape or part.dtype not in DTYPES:
                raise CorrSteerError(
                    f"{name} must be {list(shape)} float32, bfloat16 or float16 for d_sae={self.d_sae} and "
                    f"d_in={self.d_in}, got {list(part.shape)} {part.dtype}"
                )
        places = {str(part.device) for part in map(self.__getattribute__, TENSORS) if part is not None}
        if len(places) > 1:
            raise CorrSteerError(f"all tensors must be on one device, got {', '.join(sorted(places))}; use .to(device)")
        if self.activation == "identity" and self.d_sae != self.d_in:
            raise CorrSteerError(
                f"d_sae must be d_in={self.d_in} for activation 'identity', got {self.d_sae}; make one with "
                f"SparseEncoder.identity"
            )
        if self.k > self.d_sae:
            raise CorrSteerError(f"k must lie in 1..d_sae={self.d_sae}, got {self.k}")
        if self.activation == "groupmax" and self.d_sae % self.k:
            raise CorrSteerError(f"k must divide d_sae={self.d_sae} for groupmax, got {self.k}")

    def _check_packed(self, packed: Tensor) -> None:
        panels, depth, rows, side = packed.shape if packed.dim() == 4 else (0, 0, 0, 0)
        fits = (panels - 1) * rows < self.d_sae <= panels * rows and self.d_in <= depth * side < self.d_in + side
        if not fits or packed.device.type != "cpu" or self.weight is not None or self.precision not in PRECISIONS:
            raise CorrSteerError(
                f"packed_weight must be the only weight, on the CPU, of a known precision and for d_sae={self.d_sae} "
                f"and d_in={self.d_in}, got {list(packed.shape)} on {packed.device} in {self.precision!r}; use ops.pack"
            )

    @classmethod
    def from_sae_lens(
        cls,
        sae: SAE[Any],
        *,
        dtype: torch.dtype | None = None,
        device: Device | None = None,
        input_handling: bool = True,
    ) -> SparseEncoder:
        """The encoder of a SAELens SAE or transcoder, equal to its `encode`.

        Parameters
        ----------
        sae : an `sae_lens.SAE`. It is read, not changed, and kept only as the place decoder rows come from.
        dtype : of the weight; by default the SAE's own.
        device : by default the SAE's own.
        input_handling : False folds only what comes after the SAE's `process_sae_in`, for tokens that went through it.

        Raises
        ------
        CorrSteerError : for an architecture that is not a function of one token.
        """
        if not hasattr(sae, "cfg") or not isinstance(sae, torch.nn.Module):
            raise CorrSteerError(f"sae must be an sae_lens.SAE, got {shown(sae)}; for a directory use load")
        config = sae.cfg.to_dict()
        if not input_handling:
            config |= {"apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none"}
            config["metadata"] = config["metadata"] | {"model_from_pretrained_kwargs": None}
        with torch.no_grad():
            parameters = {name: p.detach() for name, p in sae.named_parameters()}
            decoder = sources.decoder_in_memory(parameters["W_dec"], divide_by_norm=_rescales(config))
            return _fold(config, parameters, decoder, dtype or sae.dtype, device, "the SAE given")

    @classmethod
    def load(cls, path: PathLike, *, dtype: torch.dtype | None = None, device: Device = "cpu") -> SparseEncoder:
        """The encoder of an SAE that lies on the disk, in any of the formats that `corrsteer.sae.formats` knows.

        Which one is told by the files that are there. No library that wrote them is imported, nothing is unpickled, and
        the decoder stays on disk. On the device `meta`, which holds no values, of weights too only shapes are read.

        Parameters
        ----------
        path : a directory, or for Qwen Scope a file.
        dtype : of the weight; by default the file's own, and float32 for Llama Scope, whose weights are scaled.

        Raises
        ------
        CorrSteerError : if there is no SAE of a known format, it is damaged, holds more than tensors, does not say
            what it was trained on, or is not a function of one token.
        """
        path = as_path("path", path)
        found = formats.recognise(path)
        config, origin = found.config(path), str(found.origin(path))
        with refused(origin):
            _activation(config, origin)  # first, as an architecture that cannot be used has other parameters
        with without_values(torch.device(device).type == "meta"):
            parameters = {name: p.to(device) for name, p in found.parameters(path, config).items()}
        decoder = sources.decoder_on_disk(path, divide_by_norm=_rescales(config), format=found.name)
        with refused(origin):
            dtype = dtype or _dtype_of(config, parameters, origin)
            return _fold(config, parameters, decoder, dtype, device, origin)
        raise AssertionError("`refused` lets no error through")

    @classmethod
    def from_pretrained(
        cls, release: str, sae_id: str, *, dtype: torch.dtype = torch.float32, device: Device = "cpu"
    ) -> SparseEncoder:
        """The encoder of a published SAE by SAELens' release and id, such as `gemma-scope-2b-pt-res-canonical`,
        `layer_20/width_16k/canonical`.

        SAELens loads it, so every published format it knows works. Its decoder is dropped again, and read once more
        from the local cache when features have been selected. On the device `meta` no weight is fetched, but the
        configuration alone.
        """
        meta = torch.device(device).type == "meta"
        read = sources.pretrained_without_values if meta else sources.load_pretrained
        sae = read(release, sae_id)  # in float32, as bias and threshold stay
        decoder = sources.decoder_in_release(release, sae_id, divide_by_norm=_rescales(sae.cfg.to_dict()))
        return replace(cls.from_sae_lens(sae, dtype=dtype, device=device), decoder=decoder)

    @classmethod
    def identity(cls, d_in: int, hook_name: str | None = None) -> SparseEncoder:
        """Residual dimensions themselves as features: the paper's "raw" ablation."""
        d_in = whole("d_in", d_in, 1)  # before it is the decoder's as well
        return cls(d_in, d_in, "identity", hook_name=hook_name, decoder=sources.decoder_of_identity(d_in))

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the reference computes in: float64 for a float64 weight, float32 otherwise."""
        return torch.float64 if self.weight is not None and self.weight.dtype == torch.float64 else torch.float32

    @property
    def device(self) -> torch.device | None:
        """Where the weight is; None for `identity`, which has none."""
        held = self.weight if self.packed_weight is None else self.packed_weight
        return None if held is None else held.device

    @property
    def nbytes(self) -> int:
        """Memory of its tensors."""
        return sum(getattr(self, name).nbytes for name in TENSORS if getattr(self, name) is not None)

    def decoder_rows(self, features: Sequence[int]) -> Tensor:
        """Decoder directions `[len(features), d_out]`, float32 on the CPU.

        They are divided by their norm where the SAE rescales activations by decoder norm, so that activation times
        direction is the feature's contribution in either case.
        """
        features = wholes("features", features, empty=True)
        outside = [f for f in features if not 0 <= f < self.d_sae]
        if outside:
            raise CorrSteerError(f"features must lie in 0..{self.d_sae - 1}, got {outside[:5]}")
        return self.decoder.rows(features)

    def full_weight(self) -> Tensor:
        """The weight `[d_sae, d_in]` in `compute_dtype`, both its parts together for bf16x2."""
        if self.packed_weight is not None:
            rows = self.packed_weight.float().transpose(1, 2).flatten(2).flatten(0, 1)
            return rows[: self.d_sae, : self.d_in].contiguous()
        weight = required(self.weight).to(self.compute_dtype)
        return weight if self.weight_low is None else weight + self.weight_low

    def unpacked(self) -> SparseEncoder:
        """The same with its weight `[d_sae, d_in]`, of an encoder that `ops.pack` made; of another, itself.

        The weight is what it was, to the bit; of bf16x2, both its parts together are.
        """
        if self.packed_weight is None:
            return self
        whole = self.full_weight()
        weight = whole.to(PRECISIONS[self.precision])
        low = (whole - weight).to(torch.bfloat16) if self.precision == "bf16x2" else None
        return replace(self, packed_weight=None, weight=weight, weight_low=low)

    def to(
        self, device: Device | None = None, dtype: torch.dtype | None = None, *, precision: str | None = None
    ) -> SparseEncoder:
        """A copy elsewhere; `dtype`, or `precision` by name, applies to the weight alone, the rest stays float32."""
        if isinstance(device, torch.dtype):  # encoder.to(torch.bfloat16), as one writes it to a tensor
            device, dtype = None, device
        if dtype is not None:
            _check_dtype(dtype)
            precision = precision or _precision_of(dtype)
        if precision is not None and (
            not isinstance(precision, str)
            or precision not in PRECISIONS
            or (dtype is not None and PRECISIONS[precision] != dtype)
        ):
            words = f"{', '.join(PRECISIONS)} and fit dtype"
            raise CorrSteerError(f"precision must be one of {words}, got {shown(precision)}")
        if self.packed_weight is not None and (
            (device is not None and torch.device(device).type != "cpu") or precision not in (None, self.precision)
        ):
            return self.unpacked().to(device, precision=precision)
        moved = {name: getattr(self, name).to(device) for name in TENSORS if getattr(self, name) is not None}
        if precision is not None and "weight" in moved:
            whole = replace(self, **moved).full_weight() if self.precision == "bf16x2" else moved["weight"]
            moved |= {"weight": whole.to(PRECISIONS[precision]), "weight_low": None, "weight_sum": None}
            if precision == "bf16x2":
                moved["weight_low"] = (whole.to(self.compute_dtype) - moved["weight"]).to(torch.bfloat16)
            moved["precision"] = precision
        return replace(self, **moved)

    def describe(self) -> str:
        """One line for tables and logs."""
        precision = f" in {self.precision}" if self.precision else ""
        return f"{self.activation} {self.d_in}x{self.d_sae}{precision} at {self.hook_name or 'an unnamed hook point'}"


def _rescales(config: dict[str, Any]) -> bool:
    return bool(config.get("rescale_acts_by_decoder_norm"))


def _activation(config: dict[str, Any], origin: str) -> str:
    activation = ARCHITECTURES.get(config["architecture"])
    if activation is None:
        raise CorrSteerError(
            f"architecture {config['architecture']!r} of {origin} cannot be used: its features are not a function of "
            f"one token. Use one of {', '.join(ARCHITECTURES)}"
        )
    return activation


def _reads_centred(metadata: dict[str, Any]) -> bool:
    """Whether the SAE was trained on tokens less their mean over d_in.

    TransformerLens' `center_writing_weights` takes the mean off all that is written to the residual stream, which
    models with LayerNorm do not notice. On the model as Hugging Face has it, W (x - mean x) is meant: W with each row
    less its own mean, times x. Its other options (`fold_ln`, `center_unembed`, `fold_value_biases`,
    `refactor_factored_attn_matrices`) leave these hook points as they are.
    """
    options = metadata.get("model_from_pretrained_kwargs") or {}
    hook, model = str(metadata.get("hook_name") or WRITTEN[0]), str(metadata.get("model_name")).lower()
    layer_normed = not any(family in model for family in RMS_NORM)
    return bool(options.get("center_writing_weights")) and layer_normed and any(point in hook for point in WRITTEN)


def _hook_name(metadata: dict[str, Any]) -> str | None:
    """Where an SAE says that it was trained.

    TransformerLens' `hook_mlp_in` comes before a norm. SAELens means the MLP's own input by it, and says so by a path.
    """
    names = [metadata.get("hook_name"), metadata.get("hf_hook_name")]
    if str(names[0]).endswith(".hook_mlp_in"):
        names.reverse()
    return names[0] or names[1]


def _precision_of(dtype: torch.dtype) -> str:
    return next(name for name, d in PRECISIONS.items() if d == dtype and name != "bf16x2")


def _row_sums(weight: Tensor, low: Tensor | None) -> Tensor:
    sums = torch.cat([block.double().sum(1) for block in weight.split(FOLD_ROWS)])
    if low is not None:
        sums += torch.cat([block.double().sum(1) for block in low.split(FOLD_ROWS)])
    return sums.to(torch.promote_types(weight.dtype, torch.float32))


def required(part: Tensor | None) -> Tensor:
    """A part that encoders of its activation have, see `NEEDED`."""
    assert part is not None, "the encoder's own check has seen to it"
    return part


def _dtype_of(config: dict[str, Any], parameters: dict[str, Tensor], origin: str) -> torch.dtype:
    """The dtype that an SAE's configuration names, or else that of its weight."""
    named = config.get("dtype")
    if named is not None and named not in DTYPE_NAMES:
        raise CorrSteerError(f"dtype in {origin} must be one of {', '.join(DTYPE_NAMES)}, got {named!r}")
    return parameters["W_enc"].dtype if named is None else DTYPE_NAMES[named]


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise CorrSteerError(f"dtype must be float32, bfloat16 or float16, got {dtype}")


def _fold(
    config: dict[str, Any],
    parameters: dict[str, Tensor],
    decoder: Decoder,
    dtype: torch.dtype,
    device: Device | None,
    origin: str,
) -> SparseEncoder:
    """SAELens' parameters, `W_enc [d_in, d_sae]` and the rest, in our one form."""
    architecture, activation = config["architecture"], _activation(config, origin)
    input_norm = INPUT_NORMS.get(config.get("normalize_activations") or "none")
    if input_norm is None:
        raise CorrSteerError(
            f"normalize_activations of {origin} must be one of {', '.join(INPUT_NORMS)}, "
            f"got {config['normalize_activations']!r}"
        )
    _check_dtype(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def vector(name: str) -> Tensor:
        # Llama Scope's threshold is a scalar. A copy, so that later changes to the SAE do not reach the encoder.
        return parameters[name].to(device, wide).expand(d_sae).clone(memory_format=torch.contiguous_format)

    W_enc = parameters["W_enc"].to(device)
    d_in, d_sae = W_enc.shape
    scale = parameters["W_dec"].to(device, wide).norm(dim=-1) if _rescales(config) else None
    subtracted = None
    if config.get("apply_b_dec_to_input") and "transcoder" not in architecture:
        subtracted = parameters["b_dec"].to(device, torch.float64)

    metadata = {k: v for k, v in (config.get("metadata") or {}).items() if v is not None}
    centred = _reads_centred(metadata) and input_norm != "layer_norm"  # which takes the mean off by itself
    if centred and input_norm != "none":
        raise CorrSteerError(
            f"normalize_activations of {origin} must be none or layer_norm for a model loaded with "
            f"center_writing_weights, got {config['normalize_activations']!r}"
        )
    weight = W_enc.new_empty(d_sae, d_in, dtype=dtype)
    shift = W_enc.new_zeros(d_sae, dtype=torch.float64)
    for start in range(0, d_sae, FOLD_ROWS):
        rows = slice(start, start + FOLD_ROWS)
        block = W_enc[:, rows].T.to(wide)
        if scale is not None:
            block = block * scale[rows, None]
        mean = block.double().mean(1)
        weight[rows] = block.double() - mean[:, None] if centred else block
        if subtracted is not None:  # with the rounded weight, so that a token equal to b_dec gives exactly the bias
            shift[rows] = weight[rows].double() @ subtracted
            if centred:  # what b_dec is subtracted from is centred, but b_dec itself need not be
                shift[rows] += mean * subtracted.sum()

    bias = vector("b_gate" if activation == "gated" else "b_enc")
    if scale is not None:
        bias = bias * scale
    bias = (bias.double() - shift).to(wide)
    form: dict[str, Any] = {"weight": weight, "bias": bias}
    if activation == "jumprelu":
        form["threshold"] = vector("threshold")
        undefined = [] if W_enc.is_meta else form["threshold"].isnan().nonzero().flatten().tolist()
        if undefined:
            raise CorrSteerError(
                f"threshold of {origin} must not be NaN, got NaN for {len(undefined)} features, {undefined[0]} among "
                f"them; the SAE is damaged, fetch it again"
            )
    if activation == "gated":
        form["magnitude_scale"] = vector("r_mag").exp()
        form["magnitude_bias"] = (vector("b_mag").double() - form["magnitude_scale"].double() * shift).to(wide)
    if activation in WITH_K:
        k = int(config.get("k") or 0)
        if not 0 < k <= d_sae:
            raise CorrSteerError(f"k of {origin} must lie in 1..d_sae={d_sae}, got {k}; its configuration is damaged")
        form["k"] = k
    metadata |= {"architecture": architecture, "reshape_activations": config.get("reshape_activations", "none")}
    return SparseEncoder(
        d_in=d_in,
        d_sae=d_sae,
        activation=activation,
        input_norm=input_norm,
        hook_name=_hook_name(metadata),
        decoder=decoder,
        metadata=metadata,
        **form,
    )
