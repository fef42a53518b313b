"""Types that signatures of several rooms share."""

from __future__ import annotations

import os

import torch
from torch import Tensor

Device = torch.device | str
PathLike = str | os.PathLike[str]
Features = slice | Tensor  # which of a layer's features: a slice, or their numbers [n]
