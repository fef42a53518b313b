"""`corrsteer export` and `corrsteer import`."""

import json

import pytest
import tiny_pipeline
import torch
from command_line import run

from corrsteer import Steering
from corrsteer.integrations.exports import FORMATS


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model's folder and a steering for it, which remembers no model."""
    home = tmp_path_factory.mktemp("exports")
    tiny_pipeline.model().save_pretrained(home / "model")
    tiny_pipeline.tokenizer().save_pretrained(home / "model")
    Steering.from_vectors({"blocks.2.hook_resid_post": torch.ones(128)}).save(home / "s.safetensors")
    return home


def test_a_steering_goes_out_and_comes_back(world, tmp_path):
    options = ("--to", "gguf", "--positions", "all", "--scale", 2)
    run("export", world / "s.safetensors", *options, "--out", tmp_path / "c.gguf")
    found = json.loads(run("import", tmp_path / "c.gguf", "--out", tmp_path / "i.safetensors", "--json").stdout)
    assert found["positions"] == "all" and found["hook_points"] == ["blocks.2.hook_resid_post"]
    assert torch.equal(Steering.load(tmp_path / "i.safetensors").directions, torch.full((1, 128), 2.0))


def test_the_usage_is_what_is_printed(world, tmp_path):
    options = ("export", world / "s.safetensors", "--to", "lm-eval", "--positions", "all", "--model", world / "model")
    text = run(*options, "--out", tmp_path / "s.pt").stdout
    arguments = f"pretrained={world}/model,steer_path={tmp_path}/s.pt"
    assert text == f"lm_eval --model steered --model_args {arguments} --tasks TASK\n"
    assert json.loads(run(*options, "--out", tmp_path / "s.pt", "--json").stdout)["usage"] == text.strip()


def test_a_checkpoint_is_written_of_the_model_that_is_named(world, tmp_path):
    options = ("export", world / "s.safetensors", "--to", "model", "--positions", "all", "--out", tmp_path / "folded")
    assert "model must be given for the format model" in run(*options, ok=False).stderr
    run(*options, "--model", world / "model")
    assert (tmp_path / "folded" / "model.safetensors").exists()


def test_a_model_that_is_named_is_what_the_steering_must_fit(world, tmp_path):
    Steering.from_vectors({"model.layers.2": torch.ones(128)}).save(tmp_path / "path.safetensors")
    Steering.from_vectors({"blocks.2.hook_resid_post": torch.ones(64)}).save(tmp_path / "wide.safetensors")
    options = ("--to", "vllm-lens", "--positions", "all", "--model", world / "model", "--out", tmp_path / "v.json")
    run("export", tmp_path / "path.safetensors", *options)
    assert json.loads((tmp_path / "v.json").read_text())[0]["layer_indices"] == [2]
    assert "width 64" in run("export", tmp_path / "wide.safetensors", *options, ok=False).stderr


def test_the_help_names_every_format():
    assert all(name in run("export", "--help").stdout for name in FORMATS)


def test_mistakes_are_one_line(world, tmp_path):
    steering = world / "s.safetensors"
    for arguments, reason in (
        (("export", steering, "--to", "gguf", "--out", tmp_path / "c.gguf"), "positions must be all for gguf"),
        (("export", steering, "--to", "csv", "--out", tmp_path / "c"), "to must be one of"),
        (("export", tmp_path / "no", "--to", "gguf", "--out", tmp_path / "c"), "there is no steering file"),
        (("import", tmp_path / "no.gguf", "--out", tmp_path / "s"), "there is no file"),
    ):
        result = run(*arguments, ok=False)
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and reason in result.stderr
    assert list(tmp_path.iterdir()) == []
