"""`corrsteer plan --memory`."""

from __future__ import annotations

from corrsteer.cli.app import emit
from corrsteer.cli.settings import MemorySettings


def plan_memory(settings: MemorySettings, samples: int, json: bool) -> None:
    """Say what a collection takes, and whether a machine has it; of model and SAEs no weight is read."""
    from corrsteer.cli import inputs
    from corrsteer.lm.meta_model import model_without_weights
    from corrsteer.report.memory import fit, machine, text
    from corrsteer.runs.memory import plan_memory as plan_memory_
    from corrsteer.runs.options import Options

    options = Options(**inputs.statistics_options(settings), shuffle_seed=0, patience=None, patience_layers=None)
    decoding = inputs.decoding(settings)
    there = machine(settings.device, settings.devices, settings.device_bytes)
    sources = inputs.parse_saes(settings.sae)
    inputs.check_saes(sources)
    inputs.check_model(settings)
    model = model_without_weights(settings.model, settings.dtype)
    encoders = inputs.load_encoders(sources, model, device="meta")
    if settings.precision:
        encoders = {layer: encoder.to(precision=settings.precision) for layer, encoder in encoders.items()}
    planned = plan_memory_(
        model, encoders, options, decoding,
        samples=samples, prompt_tokens=settings.prompt_tokens, density=settings.density,
        rewards=settings.reward_count, packs=True, device=there.device,
    )  # fmt: skip
    found = fit(planned, there, settings.processes, options)
    emit(found, json, text(found))
