"""What is sampled depends on the seed, the sample and the step, and follows the model's distribution."""

import random

import pytest
import tiny_pipeline
import torch
from scipy import stats

from corrsteer import Decoding
from corrsteer.lm.generation import Generator, tokenize
from corrsteer.lm.sampling import Sampler, gumbel, sample_keys

CPU = torch.device("cpu")
N = 40_000


def drawn(logits, seed=0, keys=None, step=0, **options):
    """A token for each of many samples of the same logits `[vocabulary]`."""
    keys = keys or range(N)
    sampler = Sampler(Decoding(temperature=options.pop("temperature", 1.0), seed=seed, **options), keys, width=2)
    ids = torch.zeros(len(keys), 2 + step, dtype=torch.int64)
    return sampler(ids, logits.expand(len(keys), -1)).argmax(1)


LOGITS = torch.tensor([2.0, 0.0, -1.0, 1.0, -4.0, 3.0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_the_model_says(temperature):
    counts = torch.bincount(drawn(LOGITS, temperature=temperature), minlength=6)
    expected = N * (LOGITS.double() / temperature).softmax(0)
    assert stats.chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-3


def test_rare_tokens_are_drawn_as_often_as_the_model_says():
    logits = torch.full((50_000,), -12.0)
    logits[0] = 0.0
    share = (drawn(logits, keys=range(2000)) != 0).double().mean().item()
    assert share == pytest.approx(1 - logits.softmax(0)[0].item(), abs=0.03)  # 0.235, five standard errors


def test_only_the_nucleus_is_drawn_from():
    counts = torch.bincount(drawn(LOGITS, top_p=0.8), minlength=6)
    nucleus = LOGITS[[0, 5]].softmax(0)  # with 0.24 and 0.64
    assert counts[[1, 2, 3, 4]].sum() == 0
    assert counts[0].item() == pytest.approx(N * nucleus[0].item(), rel=0.05)


def test_noise_is_standard_gumbel_and_that_of_rows_is_independent():
    noise = gumbel([random.Random(1).getrandbits(64) for _ in range(1)] + list(range(63)), 5000, CPU)
    assert stats.kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 1e-3
    correlation = torch.corrcoef(noise) - torch.eye(64)
    assert correlation.abs().max().item() < 5.5 / 5000**0.5
    across = torch.corrcoef(noise[:, :60].T) - torch.eye(60)  # of tokens, over rows
    assert across.abs().max().item() < 0.65


def test_steps_seeds_and_samples_draw_differently_and_again_the_same():
    flat = torch.zeros(1000)
    first = drawn(flat, keys=range(50))
    assert torch.equal(first, drawn(flat, keys=range(50)))
    for other in (drawn(flat, seed=1, keys=range(50)), drawn(flat, keys=range(50), step=1)):
        assert (first == other).sum() < 5
    assert len(set(first.tolist())) > 40


def test_models_that_agree_draw_the_same():
    """Of two distributions that differ by 0.1 in total variation, at most 2 · 0.1 / 1.1 of draws differ."""
    p, q = torch.full((1000,), 1e-3), torch.full((1000,), 0.9e-3)
    q[0] = 1 - 0.9e-3 * 999
    differing = (drawn(p.log(), keys=range(5000)) != drawn(q.log(), keys=range(5000))).double().mean().item()
    assert 0.08 < differing < 0.2


def test_a_samples_completion_does_not_depend_on_its_batch():
    model, tokenizer, task = tiny_pipeline.model(), tiny_pipeline.tokenizer(), tiny_pipeline.task(12)
    decoding = Decoding(max_new_tokens=6, temperature=1.0, seed=5)
    prompts = tokenize(model, tokenizer, task, decoding)
    keys, generator = sample_keys(prompts), Generator(model, tokenizer, decoding)
    together = generator.complete(prompts, keys)
    order = list(range(12))
    random.Random(2).shuffle(order)
    for some in (order[:5], order[5:6], order[6:]):
        state = torch.get_rng_state()
        again = generator.complete([prompts[i] for i in some], [keys[i] for i in some])
        assert again == [together[i] for i in some]
        assert torch.equal(state, torch.get_rng_state()), "the caller's own random numbers are left alone"
    assert len(set(together)) > 6


def test_the_same_prompt_again_is_another_sample():
    keys = sample_keys([[1, 2], [1, 2], [3], [1, 2]])
    assert len(set(keys)) == 4
    assert sample_keys([[3], [1, 2]]) == [keys[2], keys[0]], "and a prompt is the same sample in any order"
