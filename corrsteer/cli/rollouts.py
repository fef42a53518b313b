"""`corrsteer rollouts`."""

from __future__ import annotations

from typing import Annotated

import typer

from corrsteer import processes
from corrsteer.cli.app import Json, command, emit
from corrsteer.cli.options import Given
from corrsteer.cli.settings import RolloutsSettings
from corrsteer.cli.task_defaults import defaults
from corrsteer.errors import CorrSteerError


@command
def rollouts(
    given: Given[RolloutsSettings],
    force: Annotated[bool, typer.Option("--force", help="Replace what was begun or finished there before.")] = False,
    json: Json = False,
) -> None:
    """Generate and grade a task's completions, and write them to a file. Needs no SAE.

    The same command goes on with rollouts that were not finished.
    """
    settings = given.read(defaults(given))
    from corrsteer.cli import inputs
    from corrsteer.rollouts.asked import check_samples
    from corrsteer.rollouts.generate import generate_rollouts
    from corrsteer.rollouts.rollout import by_name

    inputs.check_file(settings.out)
    if settings.engine == "hf" and settings.engine_option:
        raise CorrSteerError(
            f"engine_option must be left out unless with --engine vllm, got {', '.join(settings.engine_option)}"
        )
    decoding = inputs.decoding(settings)
    check_samples(settings.samples_per_prompt, decoding)  # before a model is loaded
    task = inputs.load_task(settings)
    load = inputs.load_vllm if settings.engine == "vllm" else inputs.load_model
    model, tokenizer = load(settings)
    batches = generate_rollouts(
        model, tokenizer, task, decoding,
        samples_per_prompt=settings.samples_per_prompt, out=settings.out, replace_out=force,
        progress=processes.rank() == 0,
    )  # fmt: skip
    made = [rollout for batch in batches for rollout in batch]
    n, long = len(made), sum(rollout.finish == "length" for rollout in made)
    means = {name: sum(values) / n for name, values in by_name([rollout.rewards for rollout in made]).items()}
    written = sum(len(rollout.completion_ids or ()) for rollout in made)
    result = {
        "out": str(settings.out), "rollouts": n, "prompts": len(task), "rewards": means, "tokens": written,
        "finished_by_length": long,
    }  # fmt: skip
    text = [f"{n} rollouts of {len(task)} prompts written to {settings.out}"]
    text += [f"  mean {name} {mean:.3f}" for name, mean in means.items()]
    notes = []
    if long:
        notes.append(f"{long} of {n} completions were cut at --max-new-tokens {decoding.max_new_tokens}")
    emit(result, json, "\n".join(text), notes)
