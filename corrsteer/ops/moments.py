"""`Moments`: streaming sufficient statistics of pooled activations and rewards, and what follows from them.

It is data, and knows no operation; `update_moments` and `encode_update` fold batches into it.

Everything that corrsteer reports about a feature (correlation, coefficient, activation frequency) is computed
from these few arrays, which are updated batch by batch and merged across processes; no activation is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from corrsteer.arguments import check_type, whole
from corrsteer.errors import CorrSteerError
from corrsteer.files import write_tensors
from corrsteer.tensors import LARGEST, zeros
from corrsteer.types import Device, PathLike

POSITIVE, NEGATIVE = 0, 1
COEFFICIENTS = ("mean_positive", "mean_positive_active", "contrastive")
FORMAT = "corrsteer.moments/1"


class Moments:
    """Streaming moments of D features and R labels, in float64.

    Parameters
    ----------
    d_sae : D, number of features.
    n_labels : R, number of reward columns; several cost one encode.
    device : where the state lives.

    Attributes
    ----------
    count : `[]` samples seen.
    z_mean, z_m2 : `[D]` mean and centred second moment Σ(z - mean)² of the pooled activations.
    y_mean, y_m2 : `[R]` the same of the rewards.
    cross : `[R, D]` centred cross moment Σ(y - mean)(z - mean).
    n_positive : `[R]` samples with y > 0.
    n_active : `[D]` samples with z > 0.
    group_sum, group_active_sum, group_active_count : `[2, R, D]` sum of z, sum of z where z > 0 and count of z > 0,
        over the samples with y > 0 (first) and with y <= 0 (second).
    """

    STATE = (
        "count", "z_mean", "z_m2", "y_mean", "y_m2", "cross",
        "n_positive", "n_active", "group_sum", "group_active_sum", "group_active_count",
    )  # fmt: skip

    count: Tensor
    z_mean: Tensor
    z_m2: Tensor
    y_mean: Tensor
    y_m2: Tensor
    cross: Tensor
    n_positive: Tensor
    n_active: Tensor
    group_sum: Tensor
    group_active_sum: Tensor
    group_active_count: Tensor

    def __init__(self, d_sae: int, n_labels: int = 1, device: Device = "cpu"):
        self.d_sae: int = whole("d_sae", d_sae, 1, LARGEST)
        self.n_labels: int = whole("n_labels", n_labels, 1, LARGEST)
        with torch.inference_mode(False):  # made inside of it, they could not be updated outside
            for name, shape in self.shapes(self.d_sae, self.n_labels).items():
                setattr(self, name, zeros(f"moments of {self.d_sae} features", shape, device))

    @staticmethod
    def shapes(d_sae: int, n_labels: int) -> dict[str, tuple[int, ...]]:
        """Shape of each state array."""
        D, R = (d_sae,), (n_labels,)
        shapes = ((), D, D, R, R, R + D, R, D, (2,) + R + D, (2,) + R + D, (2,) + R + D)
        return dict(zip(Moments.STATE, shapes))

    def state(self) -> list[Tensor]:
        """The state arrays in the order of `STATE`; they are the arrays, not copies."""
        return [getattr(self, name) for name in self.STATE]

    @classmethod
    def from_state(cls, state: Sequence[Tensor]) -> Moments:
        """Moments over the given arrays themselves; what an update changes, it changes in them."""
        moments = cls.__new__(cls)
        for name, tensor in zip(cls.STATE, state):
            setattr(moments, name, tensor)
        moments.n_labels, moments.d_sae = moments.cross.shape
        return moments

    @classmethod
    def fitting(cls, state: Sequence[Tensor]) -> Moments:
        """`from_state` of arrays that were read from somewhere.

        Raises
        ------
        ValueError : where they do not fit each other.
        """
        cross = state[cls.STATE.index("cross")]
        shapes = cls.shapes(*reversed(cross.shape)) if cross.dim() == 2 else {}
        if [tuple(t.shape) for t in state] != list(shapes.values()) or any(t.dtype != torch.float64 for t in state):
            raise ValueError("its arrays do not fit each other")
        return cls.from_state(state)

    @property
    def device(self) -> torch.device:
        return self.z_mean.device

    @property
    def nbytes(self) -> int:
        """Memory of the state."""
        return sum(tensor.nbytes for tensor in self.state())

    @property
    def n(self) -> int:
        """Samples seen."""
        return int(self.count)

    def to(self, device: Device) -> Moments:
        """A copy on another device."""
        return Moments.from_state([tensor.to(device, copy=True) for tensor in self.state()])

    def of_labels(self, labels: Sequence[int]) -> Moments:
        """A copy of some labels, in that order."""
        index = torch.tensor(labels, dtype=torch.int64, device=self.device)
        dims = {"y_mean": 0, "y_m2": 0, "cross": 0, "n_positive": 0}
        dims |= dict.fromkeys(("group_sum", "group_active_sum", "group_active_count"), 1)
        copied = self.to(self.device)
        for name, dim in dims.items():
            setattr(copied, name, getattr(copied, name).index_select(dim, index))
        copied.n_labels = len(labels)
        return copied

    @torch.no_grad()
    def merge(self, other: Moments) -> None:
        """Fold in the moments of other samples, such as another process's; the order does not matter."""
        check_type("other", other, Moments, "a Moments")
        if (other.d_sae, other.n_labels) != (self.d_sae, self.n_labels):
            raise CorrSteerError(
                f"other must have d_sae={self.d_sae} and n_labels={self.n_labels}, "
                f"got d_sae={other.d_sae} and n_labels={other.n_labels}; merge runs of the same SAE and labels"
            )
        if other.n:
            self.fold(other.to(self.device))

    def fold(self, other: Moments) -> None:
        """`merge` of at least one sample, of the same kind and on the same device; it waits for no value on a GPU.

        Chan, Golub & LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances" (1979),
        eq. 1.5, here for cross moments as well.
        """
        total = self.count + other.count
        z_delta, y_delta = other.z_mean - self.z_mean, other.y_mean - self.y_mean
        weight = self.count * other.count / total
        self.z_m2 += other.z_m2 + weight * z_delta.square()
        self.y_m2 += other.y_m2 + weight * y_delta.square()
        self.cross += other.cross + weight * y_delta[:, None] * z_delta
        self.z_mean += z_delta * (other.count / total)
        self.y_mean += y_delta * (other.count / total)
        self.count += other.count
        for name in ("n_positive", "n_active", "group_sum", "group_active_sum", "group_active_count"):
            getattr(self, name).add_(getattr(other, name))

    def correlation(self) -> Tensor:
        """Pearson's r of every label and feature, `[n_labels, d_sae]` float64; 0 where either variance is 0."""
        varies = self.label_varies()[:, None] & self._varies(self.z_m2, self.z_mean)
        # the roots first, as the product of very large or small variances may be no float64
        scale = torch.where(varies, self.y_m2.sqrt()[:, None] * self.z_m2.sqrt(), 1)
        return torch.where(varies, self.cross / scale, 0).clamp(-1, 1)

    def label_varies(self) -> Tensor:
        """Which labels are not the same in every sample, `[n_labels]` bool; only those correlate with anything."""
        return self._varies(self.y_m2, self.y_mean)

    def _varies(self, m2: Tensor, mean: Tensor) -> Tensor:
        # A constant such as 0.1 leaves rounding errors of about 1e-16 a sample in m2; float32 values that differ at
        # all differ by 6e-8 of their size, so this bound parts the two.
        return m2 > self.count * (1e-14 * mean).square()

    def frequency(self) -> Tensor:
        """Share of samples in which each feature is active (z > 0), `[d_sae]`."""
        return self.n_active / self.count.clamp(min=1)

    def group_frequency(self) -> Tensor:
        """The same among samples with y > 0 (first) and with y <= 0, `[2, n_labels, d_sae]`; 0 for an empty group."""
        return self.group_active_count / self._group_size().clamp(min=1)

    def coefficient(self, kind: str = "mean_positive") -> Tensor:
        """Steering coefficients `[n_labels, d_sae]`.

        `mean_positive` is E[z | y > 0], zeros included, as published; `mean_positive_active` the same over active
        samples; `contrastive` E[z | y > 0] - E[z | y <= 0]. An empty group's mean is 0.
        """
        if kind == "mean_positive_active":
            return self.group_active_sum[POSITIVE] / self.group_active_count[POSITIVE].clamp(min=1)
        mean = self.group_sum / self._group_size().clamp(min=1)
        if kind == "mean_positive":
            return mean[POSITIVE]
        if kind == "contrastive":
            return mean[POSITIVE] - mean[NEGATIVE]
        raise CorrSteerError(f"coefficient must be one of {', '.join(COEFFICIENTS)}, got {kind!r}")

    def _group_size(self) -> Tensor:
        return torch.stack([self.n_positive, self.count - self.n_positive])[..., None]

    def save(self, path: PathLike) -> None:
        """Write the state to a safetensors file; `load` gives it back bit for bit."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in zip(self.STATE, self.state())}
        write_tensors(path, tensors, {"format": FORMAT})

    @classmethod
    def load(cls, path: PathLike, device: Device = "cpu") -> Moments:
        """Read what `save` wrote."""
        if not Path(path).is_file():
            raise CorrSteerError(f"there is no moments file at {path}")
        try:
            with safe_open(str(path), framework="pt", device=str(device)) as file:
                if (file.metadata() or {}).get("format") != FORMAT:
                    raise CorrSteerError(f"{path} is not a moments file of this version ({FORMAT})")
                return cls.fitting([file.get_tensor(name) for name in cls.STATE])
        except (SafetensorError, ValueError) as error:
            if isinstance(error, CorrSteerError):
                raise
            raise CorrSteerError(f"{path} is damaged ({error}); collect again") from None

    def __repr__(self) -> str:
        return f"Moments(n={self.n}, d_sae={self.d_sae}, n_labels={self.n_labels})"
