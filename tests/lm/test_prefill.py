"""What prompts begin with is read once, and a cache is given to other rows, without changing what is written."""

import contextlib
import logging
import weakref
from types import SimpleNamespace

import architectures
import pytest
import tiny_models
import torch

from corrsteer import Capture, Decoding, HookPoint, Steering
from corrsteer.lm import batches, generation, hook_points, prefill
from corrsteer.lm.generation import Generator
from corrsteer.lm.token_positions import POSITIONS

# Prompts of very different lengths that begin with the same 6 tokens, more than the attention windows' 5.
HEAD = [7, 11, 23, 5, 42, 17]
RESTS = ([9], [31, 8, 55, 12, 19, 4, 27, 44, 3], [15, 50, 6], [33, 21, 48, 13, 60])
PROMPTS = [HEAD + rest for rest in RESTS]

# architecture -> whether its cache can be given to other rows, and whether a prefix can be shared
REUSE = {
    "llama": (True, True),
    "gemma2": (True, True),  # windows in every other layer
    "gemma3_text": (True, True),
    "mistral": (True, True),  # windows in every layer
    "gpt2": (True, True),
    "gpt_neox": (True, True),
    "bloom": (True, True),  # distances in columns, not in positions
    "qwen3": (True, True),
    "phi3": (True, True),
    "deepseek_v3": (True, True),
    "bamba": (True, False),  # attention and states
    "qwen3_next": (True, False),
    "lfm2_moe": (True, False),
    "mamba": (False, False),  # states alone
    "falcon_mamba": (False, False),
}


@pytest.fixture(autouse=True)
def _share_whatever_it_saves(monkeypatch):
    """Tiny prompts are not worth it otherwise."""
    monkeypatch.setattr(batches, "PASS", 0)
    monkeypatch.setattr(generation, "PASS", 0)


def generator(model, **decoding):
    """Of completions as tuples of token ids."""
    decode = lambda rows, skip_special_tokens: [tuple(row) for row in rows]  # noqa: E731
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=None, batch_decode=decode)
    return Generator(model, tokenizer, Decoding(**{"max_new_tokens": 6} | decoding))


@contextlib.contextmanager
def tokens_read(model):
    """How many tokens each pass of a model reads: `[rows, columns]`."""
    seen = []
    handle = hook_points.attach(model, HookPoint(0), lambda h: seen.append(tuple(h.shape[:2])))
    yield seen
    handle.remove()


@pytest.mark.parametrize("architecture", REUSE)
def test_a_shared_prefix_changes_no_completion(architecture):
    model = architectures.build(architecture)
    alone = [generator(model).complete([prompt], [0], share=False)[0] for prompt in PROMPTS]
    g = generator(model)
    assert (g.reuse.rows, g.reuse.prefix) == REUSE[architecture]
    with tokens_read(model) as seen:
        assert g.complete(PROMPTS, [0] * 4) == alone
    if g.reuse.prefix:
        assert seen[:2] == [(1, 6), (4, 9)]
    else:
        assert seen[0] == (4, 15)
    assert len(set(alone)) == 4


def test_a_lora_model_shares_prefixes_and_rows_too():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_models.build("llama"), peft.LoraConfig(target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(0))
    g = generator(model.eval())
    alone = [g.complete([prompt], [0], share=False)[0] for prompt in PROMPTS]
    assert g.reuse == prefill.Reuse(rows=True, prefix=True)
    assert g.complete(PROMPTS, [0] * 4) == alone
    assert g.finish(g.read(PROMPTS), [0] * 4) == alone


def test_prompt_tuning_is_told_apart():
    """Virtual tokens come before the prompt, so that a cache of the prompt's own tokens is none of the model's."""
    peft = pytest.importorskip("peft")
    options = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(tiny_models.build("llama"), options).eval()
    g = generator(model)
    assert g.complete(PROMPTS, [0] * 4) == g.complete(PROMPTS, [0] * 4, share=False)
    assert not g.reuse.prefix


@pytest.mark.parametrize("kind", ["static", "hybrid", "dynamic", "quantized"])
def test_whatever_cache_a_model_asks_for_completions_are_the_same(kind):
    model = tiny_models.build("gemma2")
    plain = generator(model).complete(PROMPTS, [0] * 4)
    model = tiny_models.build("gemma2")
    model.generation_config.cache_implementation = kind
    g = generator(model)
    assert g.complete(PROMPTS, [0] * 4) == plain
    assert g.reuse == prefill.Reuse(rows=True, prefix=True)


def test_why_a_cache_cannot_be_used_again_is_logged(caplog):
    model = architectures.build("mamba")
    with caplog.at_level(logging.INFO, prefill.__name__):
        assert generator(model).reuse == prefill.Reuse(rows=False, prefix=False)
        assert generator(model).reuse == prefill.Reuse(rows=False, prefix=False)
    assert len(caplog.messages) == 2, "once a model"
    for message in caplog.messages:
        assert message.startswith("the cache of MambaForCausalLM cannot be used again, so ")


def test_a_cache_that_is_given_to_rows_stays_as_it_is():
    for architecture in ("llama", "bamba"):
        g = generator(architectures.build(architecture))
        begun, keys = g.read(PROMPTS), [0] * 6
        rows = [2, 0, 2, 3, 1, 1]
        first = g.finish(begun.rows(rows), keys)
        assert first == g.finish(begun.rows(rows), keys)
        whole = g.finish(begun.rows([0, 1, 2, 3]), keys[:4])
        assert whole == g.finish(begun.rows([0, 1, 2, 3]), keys[:4]) == g.complete(PROMPTS, keys[:4])
        assert first == [whole[i] for i in rows]


def test_rows_that_have_ended_leave_the_batch():
    model = architectures.build("llama")
    prompts, n = [[i + 3, 2 * i + 5, 40 - i] for i in range(16)], 24
    full = [row.text for row in generator(model, max_new_tokens=n).complete(prompts, [0] * 16)]
    stop = max(range(61), key=lambda token: len({row.index(token) for row in full if token in row}))
    model.generation_config.eos_token_id = stop
    expected = [row[: row.index(stop)] if stop in row else row for row in full]
    ends = sorted(len(row) for row in expected)
    assert ends[0] < ends[8] < n, "rows end at different times"
    g = generator(model, max_new_tokens=n)
    assert g.reuse.rows
    with tokens_read(model) as seen:
        written = g.complete(prompts, [0] * 16)
    assert [row.text for row in written] == expected
    assert [row.tokens for row in written] == [min(len(row) + 1, n) for row in expected], "what ended it is one more"
    steps = [rows for rows, columns in seen if columns == 1]
    assert steps == sorted(steps, reverse=True) and steps[-1] < 16
    unfinished = [sum(len(row) > at for row in expected) for at in range(1, len(steps) + 1)]
    assert all(rows <= max(1, left / (1 - generation.ENDED)) for rows, left in zip(steps[1:], unfinished))


def test_keeping_some_rows_of_a_cache_takes_no_more_memory_than_all_did():
    g = generator(tiny_models.tiny("llama"))
    cache = g.read(PROMPTS).cache
    before, first = cache.nbytes, weakref.ref(cache.value.layers[0].keys)
    cache.keep(torch.tensor([2, 0]))
    assert cache.nbytes == before / 2 and first() is None


def test_a_model_that_remembers_the_rows_of_its_prompts_is_not_given_others():
    """Qwen-VL keeps how far positions are shifted, a number a row, on itself."""
    model = architectures.build("qwen3_vl", multimodal=True)
    g = generator(model)
    assert not g.reuse.rows
    alone = [g.complete([prompt], [0], share=False)[0] for prompt in PROMPTS]
    assert g.complete(PROMPTS, [0] * 4) == alone


def test_a_state_that_takes_padding_in_is_not_given_to_rows_in_any_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        assert not generator(architectures.build("recurrent_gemma").to(dtype)).reuse.rows


def test_what_a_cache_can_be_used_for_is_tried_again_where_the_model_runs_in_another_way():
    model = tiny_models.build("llama")
    plain = generator(model).complete(PROMPTS, [0] * 4)
    assert generator(model).reuse.rows
    model.generation_config.use_cache = False
    assert not generator(model).reuse.rows
    assert generator(model).complete(PROMPTS, [0] * 4) == plain


@pytest.mark.parametrize("stops", [False, True], ids=["to the end", "rows leave"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_what_is_steered_around_a_generation_is_the_same_with_a_shared_prefix(positions, stops):
    """As where `grade` or `collect` runs inside `Steering.apply`."""
    model = tiny_models.build("llama") if stops else tiny_models.tiny("llama")
    steering = Steering.from_vectors({f"blocks.{at}.hook_resid_post": torch.linspace(-2, 2, 32) for at in (0, 2)})
    if stops:
        with steering.apply(model, positions):
            written = [generator(model).complete([prompt], [0], share=False)[0] for prompt in PROMPTS]
        model.generation_config.eos_token_id = written[0].text[1]
    plain = generator(model).complete(PROMPTS, [0] * 4)
    with steering.apply(model, positions):
        alone = [generator(model).complete([prompt], [0], share=False)[0] for prompt in PROMPTS]
        with tokens_read(model) as seen:
            assert generator(model).complete(PROMPTS, [0] * 4) == alone != plain
    assert seen[0] == (1, 6)


def test_what_is_captured_is_the_same_with_a_shared_prefix():
    model, point = tiny_models.tiny("gemma2"), {"x": HookPoint(1)}
    captured = []
    for share in (True, False):
        with Capture(model, point, stop_tokens=[], max_new_tokens=6) as capture:
            g = generator(model)
            g.complete(PROMPTS, [0] * 4, share=share, criteria=[capture.stopping_criterion])
        captured.append(capture.packed("x"))
    assert captured[0][1].tolist() == captured[1][1].tolist() == [0, 6, 12, 18, 24]
    torch.testing.assert_close(captured[0][0], captured[1][0], rtol=1e-4, atol=1e-4)


def test_looking_whether_a_cache_can_be_used_again_is_not_captured_or_steered():
    model = tiny_models.build("llama")  # whose cache was never tried
    with Capture(model, {"x": HookPoint(1)}, stop_tokens=[], max_new_tokens=6) as capture:
        generator(model).complete(PROMPTS, [0] * 4, criteria=[capture.stopping_criterion])
    assert len(capture.packed("x")[0]) == 24
    model = tiny_models.build("llama")
    ruinous = Steering.from_vectors({"blocks.1.hook_resid_post": torch.full((32,), 1e38)})
    with ruinous.apply(model, "all"):
        assert generator(model).reuse == prefill.Reuse(rows=True, prefix=True)
