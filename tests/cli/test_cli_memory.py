"""`corrsteer plan --memory`: what it says of a model and SAEs whose weights it does not read, and of a machine."""

import json

import pytest
import tiny_pipeline
import torch
import yaml
from typer.testing import CliRunner

from corrsteer.cli import app
from corrsteer.errors import CorrSteerError
from corrsteer.report import memory as fitting
from corrsteer.runs.memory import Memory
from corrsteer.runs.options import Options


def run(*arguments, ok=True):
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    assert (result.exit_code == 0) == ok, result.output
    return result


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The configuration of a model without its weights, an SAE, and a collection's settings."""
    from sae_lens import StandardSAE, StandardSAEConfig

    home = tmp_path_factory.mktemp("planned")
    config = tiny_pipeline.model().config
    config.dtype = "float32"
    config.save_pretrained(home / "model")
    for name, d_in in (("sae", 128), ("narrow", 64)):
        sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=40))
        sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
        sae.save_model(home / name)
    settings = {"model": str(home / "model"), "sae": f"1={home / 'sae'}", "max_new_tokens": 4, "permutations": 100}
    more = {"grader": "exact", "task": "task.jsonl", "precision": "bf16"}  # which a collection has besides
    (home / "collect.yaml").write_text(yaml.safe_dump(settings | more))
    return home


@pytest.fixture
def plan(world):
    def planned(*arguments, ok=True):
        return run("--memory", "--config", world / "collect.yaml", "--samples", 600, *arguments, ok=ok)

    return planned


GPUS = ("--device", "cuda", "--device-bytes", 80 << 30)


def test_the_settings_of_a_collection_are_planned_without_its_weights(plan):
    found = json.loads(plan("--json", *GPUS).stdout)
    assert found["process"]["encoders"] == 40 * 128 * 2 + 40 * 4
    assert found["folding"]["a block's samples"] == 512 * 4 * (2 * 40 + 2 * 128), "of two poolings"
    assert found["folding_process"] == sum((found["process"] | found["folding"]).values()) == found["all_processes"]
    assert found["keeps_activations"] and found["fits"] and found["advice"] == []
    text = plan(*GPUS).stdout
    assert "model weights" in text and "It fits" in text and f"The largest part is {found['largest']}." in text


def test_options_change_what_is_planned(plan):
    found = json.loads(plan("--json", *GPUS).stdout)
    never = json.loads(plan("--json", *GPUS, "--keep-activations", "never", "--precision", "fp32").stdout)
    assert never["folding"]["evidence"] == found["folding"]["evidence"] + 8 * 40 * 100
    assert never["process"]["encoders"] > found["process"]["encoders"] and "activations" not in never["disk"]
    dense = json.loads(plan("--json", *GPUS, "--density", 1, "--reward-count", 2).stdout)
    assert dense["disk"]["activations"] > 600 * 40 * 6 * 2 > found["disk"]["activations"]
    assert dense["folding"]["moments"] > found["folding"]["moments"]
    short = json.loads(plan("--json", *GPUS, "--prompt-tokens", 2).stdout)
    assert short["process"]["key-value cache"] < found["process"]["key-value cache"]


def test_processes_are_planned_one_by_one_and_together(plan):
    one = json.loads(plan("--json", *GPUS, "--devices", 4).stdout)
    four = json.loads(plan("--json", *GPUS, "--devices", 4, "--processes", 4).stdout)
    assert one["advice"] == ["every device has room for a copy: torchrun --nproc-per-node 4 is quicker"]
    assert four["all_processes"] == 3 * four["each_process"] + four["folding_process"] and four["advice"] == []
    assert "Memory of the one that folds blocks, besides" in plan(*GPUS, "--devices", 4, "--processes", 4).stdout


def test_without_anything_said_the_machine_is_this_one(plan):
    found = json.loads(plan("--json", "--device", "cpu").stdout)
    assert found["device"] == "cpu" and found["devices"] == 1 and found["device_bytes"] > 1 << 28
    assert found["fullest_device"] == found["folding_process"]


@pytest.mark.parametrize(
    "arguments, message",
    (
        (("--sae", "1=nowhere"), "there is no such directory"),
        (("--sae", "one"), "sae must be LAYER=SOURCE"),
        (("--model", "./nowhere"), "there is no model directory ./nowhere"),
        (("--device", "tpu"), "device must be auto, cpu, cuda or another that torch knows, got 'tpu'"),
        (("--device", "cpu", "--devices", 2), "devices must be left out on a CPU"),
        (("--device", "meta"), "device_bytes must be given for meta"),
        (("--permutations", 3), "permutations must be 0 or at least 19"),
        (("--batch-size", 0), "batch_size: Input should be greater than or equal to 1"),
        (("--density", 2), "density: Input should be less than or equal to 1"),
        (("--prompt-tokens", 10**6), "prompt_tokens must leave room"),
        (("--frequency", 0.1, "--alpha", 0.1), "--frequency, --alpha cannot be used with --memory"),
    ),
)
def test_bad_input_is_refused_by_name(arguments, message, plan):
    assert message in plan(*arguments, ok=False).stderr


def test_an_sae_of_another_model_is_refused_before_anything_is_loaded(plan, world):
    wrong = plan("--sae", f"1={world / 'narrow'}", ok=False).stderr
    assert "encoders[1] has d_in=64, but the model's residual stream is 128 wide" in wrong


def test_options_of_memory_are_refused_where_samples_are_planned(world):
    assert "--processes can only be used with --memory" in run("--processes", 2, ok=False).stderr
    assert "model is missing" in run("--memory", ok=False).stderr


# Whether it fits


def options(**given):
    names = {
        "pool": "max", "coefficient_pool": "max", "positions": "generated", "permutations": 0, "bootstrap": 0,
        "scores": (), "block_size": 8, "shuffle_seed": 0, "patience": None, "patience_layers": None,
        "buffer_bytes": 1, "statistics_bytes": 1000, "backend": None,
    }  # fmt: skip
    return Options(**names | given)


def fit(weights, evidence, devices, device_bytes, processes=1, device="cuda", **given):
    memory = Memory({"model weights": weights}, {"a block's samples": 0, "evidence": evidence}, {}, False)
    there = fitting.Machine(torch.device(device), devices, device_bytes)
    return fitting.fit(memory, there, processes, options(**given))


def test_one_process_is_spread_over_devices_and_several_hold_a_copy_each():
    assert not fit(150, 20, devices=1, device_bytes=100)["fits"]
    assert fit(150, 20, devices=2, device_bytes=100)["fits"], "weights and all the rest, over both"
    assert not fit(150, 20, devices=2, device_bytes=100, processes=2)["fits"]
    assert fit(60, 20, devices=2, device_bytes=100, processes=2)["fullest_device"] == 80
    assert fit(30, 20, devices=2, device_bytes=100, processes=4)["fullest_device"] == 80, "two share a device"


@pytest.mark.parametrize(
    "given, advice",
    (
        ({"weights": 60, "evidence": 20, "devices": 2}, ["every device has room for a copy: "]),
        ({"weights": 150, "evidence": 20, "devices": 2}, []),
        ({"weights": 150, "evidence": 20, "devices": 1}, ["load the model in a smaller --dtype", "or 2 devices, "]),
        ({"weights": 150, "evidence": 20, "devices": 2, "processes": 2},
         ["load the model in a smaller --dtype", "or one process, which device_map='auto' spreads over 2 devices"]),
        ({"weights": 30, "evidence": 20, "devices": 2, "processes": 8}, ["take at most 4 processes"]),
        ({"weights": 30, "evidence": 90, "devices": 1, "device": "cpu"},
         ["take fewer --permutations"]),
        ({"weights": 1, "evidence": 20, "devices": 1, "statistics_bytes": 10},
         ["collect refuses this with statistics_bytes=10; it takes 20"]),
    ),
)  # fmt: skip
def test_advice_says_what_to_change(given, advice):
    found = fit(device_bytes=100, **given)["advice"]
    assert len(found) == len(advice) and all(a.startswith(b) for a, b in zip(found, advice)), found


def test_every_part_of_a_plan_has_a_remedy(plan):
    found = json.loads(plan("--json", "--device", "cpu", "--buffer-bytes", 70000, "--positions", "all",
                            "--batch-size", 16).stdout)  # fmt: skip
    assert "pooled parts of a batch" in found["process"]
    assert set(found["process"] | found["folding"]) <= set(fitting.REMEDIES)


def test_a_container_has_what_its_control_group_may_take(tmp_path, monkeypatch):
    real = fitting.machine("cpu").device_bytes
    assert 0 < real
    monkeypatch.setattr(fitting, "CONTROL_GROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert fitting.machine("cpu").device_bytes >= real
    (tmp_path / "memory.max").write_text("12345\n")
    assert fitting.machine("cpu").device_bytes == 12345
    monkeypatch.setattr(fitting.os, "sysconf_names", {})
    (tmp_path / "memory.max").unlink()
    with pytest.raises(CorrSteerError, match="device_bytes must be given"):
        fitting.machine("cpu")


def test_sizes_are_written_for_people():
    assert [fitting.size(n) for n in (0, 1023, 1536, 5 << 20, 3 << 29)] == [
        "0 B", "1023 B", "1.50 KiB", "5.00 MiB", "1.50 GiB",
    ]  # fmt: skip
