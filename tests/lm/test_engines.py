"""A model says which engine completes its prompts, and vLLM is asked for what a `Decoding` says."""

import subprocess
import sys
import types

import pytest
import tiny_pipeline

from corrsteer import CorrSteerError, Decoding
from corrsteer.lm.engine import engine_of
from corrsteer.lm.generation import Generator
from corrsteer.lm.vllm_engine import VllmGenerator, load_vllm, request_seed
from corrsteer.rollouts.generate import generate_rollouts

SAMPLED = Decoding(max_new_tokens=4, temperature=0.5, top_p=0.9, seed=3, batch_size=5)


class LLM:
    """Stands in for vLLM's: every prompt is completed by the same tokens."""

    written = [9, 10, 2, 11]
    generation_config = {}

    def __init__(self, model="a model", **options):
        config = {"model": model, "max_model_len": 64, "get_vocab_size": lambda: 30}
        self.model_config = types.SimpleNamespace(
            **config, try_get_generation_config=lambda: dict(self.generation_config)
        )
        self.options, self.asked = options, []

    def generate(self, prompts, settings, use_tqdm):
        self.asked.append((prompts, settings))
        outputs = [types.SimpleNamespace(token_ids=tuple(self.written)) for _ in prompts]
        return [types.SimpleNamespace(outputs=[output]) for output in outputs]


@pytest.fixture
def vllm(monkeypatch):
    kind = type("LLM", (LLM,), {"__module__": "vllm.entrypoints.llm"})
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams, module.__version__ = kind, lambda **settings: settings, "9.9"
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


def test_a_model_goes_with_its_engine(vllm):
    tokenizer = tiny_pipeline.tokenizer()
    assert isinstance(engine_of(tiny_pipeline.model(), tokenizer, SAMPLED), Generator)
    engine = engine_of(vllm.LLM(), tokenizer, SAMPLED)
    assert isinstance(engine, VllmGenerator)
    assert (engine.engine, engine.model_name) == ("vllm 9.9", "a model")
    with pytest.raises(CorrSteerError, match="must be a Hugging Face model or a vllm.LLM, got 'gpt2'"):
        engine_of("gpt2", tokenizer, SAMPLED)


@pytest.mark.parametrize("stops, ids, finish", [(2, (9, 10), "stop"), ([11, 10], (9,), "stop"), (25, None, "length")])
def test_rollouts_of_vllm_end_before_the_models_own_stop_token(vllm, stops, ids, finish):
    llm, tokenizer = vllm.LLM(), tiny_pipeline.tokenizer()
    llm.generation_config = {"eos_token_id": stops}
    task = tiny_pipeline.task(3)
    for batch in generate_rollouts(llm, tokenizer, task, SAMPLED, progress=False):
        for rollout in batch:
            assert rollout.completion_ids == (ids or tuple(llm.written)) and rollout.finish == finish
            assert rollout.completion == tokenizer.decode(list(rollout.completion_ids), skip_special_tokens=True)
            assert rollout.engine == "vllm 9.9" and rollout.model == "a model" and set(rollout.rewards) == {"reward"}
    settings = llm.asked[0][1][0]
    assert settings["stop_token_ids"] == ([stops] if isinstance(stops, int) else stops) and settings["ignore_eos"]


def test_without_stop_tokens_of_the_models_the_tokenizers_are_taken(vllm):
    tokenizer = tiny_pipeline.tokenizer()
    assert engine_of(vllm.LLM(), tokenizer, SAMPLED).stops == [tokenizer.eos_token_id]


def test_vllm_is_given_tokens_and_a_seed_for_each_sample(vllm):
    llm, tokenizer, task = vllm.LLM(), tiny_pipeline.tokenizer(), tiny_pipeline.task(4)
    list(generate_rollouts(llm, tokenizer, task, SAMPLED, samples_per_prompt=3, progress=False))
    prompts = [prompt["prompt_token_ids"] for asked, _ in llm.asked for prompt in asked]
    settings = [one for _, asked in llm.asked for one in asked]
    ids = tokenizer([e.prompt for e in task.examples])["input_ids"]
    assert prompts == [of_prompt for of_prompt in ids for _ in range(3)]
    assert [len(asked) for asked, _ in llm.asked] == [5, 5, 2]
    seeds = [one.pop("seed") for one in settings]
    assert len(set(seeds)) == 12 and all(0 <= seed < 2**63 for seed in seeds)
    assert all((s["temperature"], s["top_p"], s["max_tokens"]) == (0.5, 0.9, 4) for s in settings)
    again = vllm.LLM()
    list(generate_rollouts(again, tokenizer, task, Decoding(4, 0.5, seed=3), progress=False))
    assert [one["seed"] for one in again.asked[0][1]] == seeds[::3], "the first sample's are the same"
    assert request_seed(3, 7) != request_seed(4, 7) != request_seed(4, 8)


def test_greedy_decoding_asks_vllm_for_no_nucleus(vllm):
    llm = vllm.LLM()
    list(generate_rollouts(llm, tiny_pipeline.tokenizer(), tiny_pipeline.task(2), Decoding(4), progress=False))
    assert llm.asked[0][1][0]["temperature"] == 0 and "top_p" not in llm.asked[0][1][0]


def test_a_prompt_beyond_what_vllm_was_told_to_take_is_refused(vllm):
    engine = engine_of(vllm.LLM(), tiny_pipeline.tokenizer(), Decoding(max_new_tokens=62))
    with pytest.raises(CorrSteerError, match="more than the model's context of 64"):
        engine.tokenize(tiny_pipeline.task(2))


def test_where_vllm_is_not_installed_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(CorrSteerError, match=r"cannot be imported .*pip install 'corrsteer\[vllm\]'"):
        load_vllm("a model")


def test_a_model_that_vllm_cannot_load_is_reported_in_a_line(vllm):
    def fails(**options):
        raise ValueError("no such\nmodel")

    assert load_vllm("m", dtype="auto").options == {"dtype": "auto"}
    vllm.LLM = fails
    with pytest.raises(CorrSteerError, match="model 'm' cannot be loaded by vLLM: ValueError: no such model"):
        load_vllm("m")


def test_importing_corrsteer_and_its_engines_does_not_import_vllm():
    code = "import sys; sys.modules['vllm'] = None; import corrsteer, corrsteer.lm.engine, corrsteer.rollouts.generate"
    subprocess.run([sys.executable, "-c", code], check=True)
