"""Exported steerings in the tools that they are for, against `apply`."""

import json
from dataclasses import replace

import pytest
import torch

from corrsteer import Decoding, Steering, Task, demo, evaluate, export_steering, import_steering
from corrsteer.demo.run import tasks as demo_tasks
from corrsteer.files import to_json

LAYERS = (1, 2)
PROMPTS = ["12+34=", "7+8=", "105+29="]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The demo's model with its tokenizer, the folder that it lies in, and a steering that changes what it says."""
    model, tokenizer, _ = demo.load()
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generator = torch.Generator().manual_seed(4)
    vectors = {f"blocks.{layer}.hook_resid_post": torch.randn(128, generator=generator) for layer in LAYERS}
    steering = Steering.from_vectors(vectors, 0.3)
    steering.positions = "all"
    return model, tokenizer, folder, steering


def steered_harness(world, path):
    steered = pytest.importorskip("lm_eval.models.hf_steered")
    _, tokenizer, folder, steering = world
    export_steering(steering, "lm-eval", path, world[0], scale=1.5)
    return steered.SteeredModel(
        pretrained=str(folder), steer_path=str(path), device="cpu", dtype="float32", batch_size=4, max_length=64
    )


@torch.no_grad()
def test_logits_of_the_harness_are_those_of_apply_to_the_bit(world, tmp_path):
    model, tokenizer, _, steering = world
    harness = steered_harness(world, tmp_path / "s.pt")
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
        with steering.apply(model, scale=1.5):
            expected = model(tokens).logits
        assert torch.equal(harness._model_call(tokens), expected)
        assert not torch.equal(model(tokens).logits, expected)


def test_a_task_of_the_harness_gives_the_accuracy_that_evaluate_gives(world, tmp_path):
    evaluator, tasks = pytest.importorskip("lm_eval.evaluator"), pytest.importorskip("lm_eval.tasks")
    model, tokenizer, _, steering = world
    harness = steered_harness(world, tmp_path / "s.pt")
    rows = [{"prompt": one.prompt, "answer": one.answer} for one in demo_tasks()[2].examples[:40]]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": "sums", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "sums.jsonl")}},
        "test_split": "test", "output_type": "generate_until",
        "doc_to_text": "{{prompt}}", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    found = evaluator.simple_evaluate(
        model=harness, tasks=[config], task_manager=tasks.TaskManager(include_defaults=False), bootstrap_iters=0
    )
    theirs = found["results"]["sums"]["exact_match,none"]
    gentle = replace(steering, scale=1.5)
    ours = evaluate(model, tokenizer, Task.from_rows(rows), gentle, decoding=Decoding(max_new_tokens=4), progress=False)
    assert theirs == pytest.approx(ours.steered) and 0 < ours.steered != ours.unsteered


def test_a_vector_of_steering_vectors_steers_as_it_does_there(world, tmp_path):
    steering_vectors = pytest.importorskip("steering_vectors")
    model, tokenizer, _, steering = world
    theirs = steering_vectors.SteeringVector(
        layer_activations={point.layer: vector for point, vector in steering.vectors().items()}
    )
    torch.save({"layer_activations": theirs.layer_activations, "layer_type": theirs.layer_type}, tmp_path / "v.pt")
    ours = import_steering(tmp_path / "v.pt")
    tokens = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    with torch.no_grad(), theirs.apply(model):
        expected = model(tokens).logits
    with torch.no_grad(), ours.apply(model):
        assert torch.equal(model(tokens).logits, expected)
    assert to_json(ours.described())  # and can be saved


