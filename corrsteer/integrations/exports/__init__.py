"""A steering in the forms that other tools take, a file each.

What a format cannot say is refused with the reason. What it says is meant to be what `Steering.apply` does;
`Form.proven` says how far that was checked.
"""

from __future__ import annotations

from torch import nn

from corrsteer.arguments import as_path, check_type
from corrsteer.errors import CorrSteerError
from corrsteer.integrations.exports import (
    checkpoint,
    control_vector,
    easysteer,
    hotwire,
    lm_eval,
    neuronpedia,
    paper,
    plain_json,
    vllm_lens,
)
from corrsteer.integrations.exports.form import Export, Form
from corrsteer.steering.steering import Steering
from corrsteer.types import PathLike

FORMATS: dict[str, Form] = {
    module.FORM.name: module.FORM
    for module in (
        lm_eval, control_vector, vllm_lens, easysteer, hotwire, neuronpedia, plain_json, paper, checkpoint
    )
}  # fmt: skip


def export_steering(
    steering: Steering,
    to: str,
    path: PathLike,
    model: nn.Module | None = None,
    positions: str | None = None,
    scale: float | None = None,
) -> str:
    """Write a steering in a form that another tool takes.

    Parameters
    ----------
    to : a name of `FORMATS`.
    path : the file to write, or the folder for `easysteer`, `hotwire` and `model`.
    model : the model that it is for, which `lm-eval` and `model` cannot do without; others check against it.
    positions, scale : as for `Steering.apply`; by default the steering's own.

    Returns
    -------
    How to use what was written: a command, or lines of Python.

    Raises
    ------
    CorrSteerError : for what the format cannot say, a steering that does not fit the model, and a path that cannot be
        written.
    """
    form = checked(steering, to, positions, scale)
    positions, scale = steering.applied_as(positions, scale)
    if model is not None:
        steering.check(model)
    elif form.needs:
        raise CorrSteerError(f"model must be given, as the format {to} needs its {form.needs}")
    return form.write(Export(steering, as_path("path", path), model, positions, scale))


def checked(steering: Steering, to: str, positions: str | None = None, scale: float | None = None) -> Form:
    """The format that is meant, which has the positions asked for; otherwise as `export_steering`."""
    form = FORMATS.get(to)
    if form is None:
        raise CorrSteerError(f"to must be one of {', '.join(FORMATS)}, got {to!r}")
    check_type("steering", steering, Steering, "a Steering", "load one by Steering.load")
    if not steering.features:
        raise CorrSteerError("steering must have a feature, got none; nothing would be steered")
    positions, _ = steering.applied_as(positions, scale)
    if positions not in form.positions:
        others = [name for name, one in FORMATS.items() if positions in one.positions]
        raise CorrSteerError(
            f"positions must be {' or '.join(form.positions)} for {to}, got {positions!r}; evaluate the steering with "
            f"those and give them, or use a format that has yours: {', '.join(others)}"
        )
    return form
