"""The whole way with models whose weights lie elsewhere, or that carry an adapter: the same as with plain ones."""

import accelerate
import peft
import pytest
import tiny_pipeline
import torch

from corrsteer import Decoding, collect, evaluate, select

DECODING = Decoding(max_new_tokens=4, batch_size=16)


def whole_way(model, positions="all"):
    """Rewards, features and completions of a collection, a selection with trials, and an evaluation."""
    tokenizer, task = tiny_pipeline.tokenizer(), tiny_pipeline.task()
    options = {"decoding": DECODING, "progress": False}
    run = collect(model, tokenizer, tiny_pipeline.encoders(), task, positions=positions, permutations=0, **options)
    found = []
    for strategy in ("all", "pruned"):
        steering = select(
            run, strategy, model=model, tokenizer=tokenizer, validation=tiny_pipeline.task(16, seed=1), scale=2.0,
            encoders=tiny_pipeline.encoders(), **options,
        )  # fmt: skip
        result = evaluate(model, tokenizer, tiny_pipeline.task(20, seed=2), steering, scale=2.0, **options)
        found += [[(f.layer, f.index) for f in steering.features], result]
    assert found[1].changed_equal + found[1].improved + found[1].worsened > 0
    return [run.rewards.tolist(), *found]


def adapted(**options):
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"], **options)
    return peft.get_peft_model(tiny_pipeline.model(), config).eval()


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_a_model_that_accelerate_has_offloaded_is_collected_selected_on_and_evaluated(where, tmp_path):
    model = tiny_pipeline.model()
    offloaded = accelerate.cpu_offload(model) if where == "cpu" else accelerate.disk_offload(model, str(tmp_path))
    assert next(offloaded.parameters()).device.type == "meta"
    assert whole_way(offloaded) == whole_way(tiny_pipeline.model())


def test_a_lora_that_does_nothing_changes_nothing():
    assert whole_way(adapted()) == whole_way(tiny_pipeline.model())


def test_a_model_with_a_lora_is_the_one_it_can_be_merged_into():
    found = whole_way(adapted(init_lora_weights=False))
    assert found == whole_way(adapted(init_lora_weights=False).merge_and_unload())
    assert found != whole_way(tiny_pipeline.model())
