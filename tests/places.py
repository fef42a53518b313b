"""Places: where an operation runs, a backend on a device, and tests parametrised over them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch

from corrsteer.ops import native_backend, registry
from corrsteer.ops.calls import Call

if TYPE_CHECKING:
    from problems import Case


class Place(NamedTuple):
    """A backend and the device it runs on; where it has code for several instruction sets, which of them; and where its
    launch configurations may name several ways, which they name: `panels`, or `flattened` loops."""

    backend: str
    device: str
    instruction_set: str = ""
    way: str = ""

    def __str__(self):
        return "/".join(filter(None, self))

    def does(self, operation: str, dtype=torch.float32, activation=None, precision=None) -> bool:
        """Whether its verifier says so; where there is no GPU to ask about, yes, as the test will be skipped.

        A place with a way does what goes that way, and nothing else; of that what is 16-bit, to save time.
        """
        if self.way and operation in ENCODING:
            of_x = {"bf16": torch.bfloat16, "bf16x2": torch.bfloat16, "fp16": torch.float16}
            goes = operation != "encode" and "topk" not in (activation or "") and activation != "identity"
            if not goes or (precision is not None and of_x.get(precision) != dtype):
                return False
        if self.device == "cuda" and not torch.cuda.is_available():
            return True
        backend = next(b for b in registry.registered() if b.name == self.backend)
        return registry.judge(backend, Call(operation, torch.device(self.device), dtype, activation, precision)).ok

    @property
    def operands(self) -> tuple[str, torch.dtype]:
        """Precision and dtype of x for a test that is about neither."""
        return ("bf16", torch.bfloat16) if self.way else ("fp32", torch.float32)


ENCODING = ("encode", "encode_pool", "encode_update")
REFERENCE = (Place("reference", "cpu"), Place("reference", "cuda"))
TRITON = (Place("triton", "cpu"), Place("triton", "cuda"))
PANELS = tuple(place._replace(way="panels") for place in TRITON)
FLATTENED = tuple(place._replace(way="flattened") for place in TRITON)
INSTRUCTION_SETS = native_backend._native.instruction_sets() if native_backend._native else ("none",)
NATIVE = tuple(Place("native", "cpu", name) for name in INSTRUCTION_SETS)
CUDA = (Place("cuda", "cuda"),)  # it steers, and does nothing else
PLACES = REFERENCE + NATIVE + TRITON
POOLING = PLACES + PANELS + FLATTENED  # for what encodes and pools
ON_GPU = (Place("reference", "cuda"), Place("triton", "cuda"))


def at(place: Place, *values, id: str = ""):
    """A test's parameters at a place: marked `gpu` where it needs one, skipped where it cannot run."""
    marks = [pytest.mark.gpu] if place.device == "cuda" else []
    if place.device == "cuda" and not torch.cuda.is_available():
        marks += [pytest.mark.skip(reason="there is no CUDA GPU")]
    elif not place.does("steer_add"):
        marks += [pytest.mark.skip(reason=f"{place} cannot run here; corrsteer doctor says why")]
    return pytest.param(place, *values, marks=marks, id=f"{place} {id}".strip())


def everywhere(places=PLACES):
    """Parametrise a test over places."""
    return pytest.mark.parametrize("place", [at(place) for place in places])


def for_each(cases: dict[str, Case], operation: str = "encode_pool", places=PLACES):
    """Parametrise a test over places and cases, without what a place's backend says it does not do."""
    return pytest.mark.parametrize(
        ("place", "case"),
        [
            at(place, case, id=name)
            for place in places
            for name, case in cases.items()
            if not place.does("steer_add") or place.does(operation, case.dtype, case.activation, case.precision)
        ],
    )
