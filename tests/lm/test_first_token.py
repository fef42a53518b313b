"""The first token restricted to labels: in every path that generates, and no token after it."""

import random
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny_pipeline
import tiny_text
import torch
from scipy import stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from corrsteer import CorrSteerError, Decoding, Steering, Trial, collect, evaluate, generate_rollouts, run_trials
from corrsteer.experiments.trials import UNSTEERED
from corrsteer.lm import batches, generation, vllm_engine
from corrsteer.lm.first_token import FirstTokenAmong, label_tokens
from corrsteer.lm.generation import Generator, tokenize
from corrsteer.lm.sampling import Sampler
from corrsteer.rollouts.grading import grade
from corrsteer.tasks import Task

LABELS = ("A", "B", "C")
RNG = random.Random(0)
PROMPTS = ["Which of them? " + "x" * RNG.randrange(1, 30) + f"{n}\nAnswer:" for n in range(24)]
ROWS = [{"prompt": prompt, "answer": "B"} for prompt in PROMPTS]
TASK = Task.from_rows(ROWS, grader="choice", name="which")
RESTRICTED = Decoding(max_new_tokens=4, first_token_among=LABELS, batch_size=5)


@pytest.fixture(scope="module")
def tiny():
    """A model that is not a fixture of its own, so that what changes it shows."""
    return tiny_text.model(), tiny_text.tokenizer()


def ids_of(labels):
    """By the tokenizer's vocabulary."""
    vocabulary = tiny_text.tokenizer().get_vocab()
    return sorted(vocabulary[piece] for label in labels for piece in (label, f"Ġ{label}") if piece in vocabulary)


def by_hand(model, tokenizer, prompt, labels, n):
    """The greedy tokens after a prompt, without a cache, without `generate`, of which the first is among the labels."""
    ids, written = tokenizer(prompt, return_tensors="pt")["input_ids"], []
    for step in range(n):
        with torch.no_grad():
            scores = model(ids).logits[0, -1]
        among = ids_of(labels) if step == 0 and labels else range(len(scores))
        token = max(among, key=lambda token: float(scores[token]))
        if token == tokenizer.eos_token_id:
            break
        written.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return tuple(written)


def test_a_labels_tokens_are_those_alone_and_after_a_space(tiny):
    assert label_tokens(tiny[1], LABELS) == ids_of(LABELS) and len(ids_of(LABELS)) == 6
    assert label_tokens(tiny[1], ("E",)) == ids_of(["E"]) and len(ids_of(["E"])) == 1
    digits = tiny_pipeline.tokenizer()("37", add_special_tokens=False)["input_ids"]
    assert label_tokens(tiny_pipeline.tokenizer(), ("3", "7")) == sorted(digits)


def test_a_tokenizer_that_puts_a_space_before_everything_has_labels_without_one_too():
    pieces = ["<unk>", "▁", "A", "▁A", "B", "▁B", "▁▁"]
    merges = [("▁", "A"), ("▁", "B")]
    spaced = Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    spaced.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    spaced.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spaced, unk_token="<unk>")
    assert tokenizer("A")["input_ids"] == [pieces.index("▁A")]
    assert label_tokens(tokenizer, ("A", "B")) == sorted(map(pieces.index, ("A", "▁A", "B", "▁B")))


@pytest.mark.parametrize("label", ["AB", "é", "10"])
def test_a_label_that_is_no_single_token_is_named(tiny, label):
    with pytest.raises(CorrSteerError, match=f"first_token_among has '{label}', which is no single token of this"):
        label_tokens(tiny[1], ("A", label))


def test_an_unknown_token_is_no_label():
    assert len(tiny_pipeline.tokenizer()("%", add_special_tokens=False)["input_ids"]) == 1, "that of what is unknown"
    with pytest.raises(CorrSteerError, match="first_token_among has '%', which is no single token"):
        label_tokens(tiny_pipeline.tokenizer(), ("3", "%"))


def test_it_is_said_before_anything_is_generated(tiny):
    with pytest.raises(CorrSteerError, match="first_token_among has 'ten'"):
        tokenize(*tiny, TASK, Decoding(first_token_among=("A", "ten")))


@pytest.mark.parametrize("value", ["AB", ("A", "A"), (), ("A", ""), (" A",), ("A", 3), 5])
def test_the_labels_must_be_such(value):
    with pytest.raises(CorrSteerError, match="first_token_among must be labels"):
        Decoding(first_token_among=value)


def test_a_list_of_labels_is_kept_as_a_tuple_and_told_where_there_is_one():
    assert Decoding(first_token_among=["A", "B"]) == Decoding(first_token_among=("A", "B"))
    assert Decoding(first_token_among=["A"]).told()["first_token_among"] == ["A"]
    assert "first_token_among" not in Decoding().told()


@pytest.mark.parametrize("share", [True, False])
def test_the_first_token_is_the_best_of_the_labels_and_the_others_are_what_they_were(tiny, share, monkeypatch):
    monkeypatch.setattr(batches, "PASS", 0)  # tiny prompts are not worth sharing otherwise
    monkeypatch.setattr(generation, "PASS", 0)
    generator = Generator(*tiny, RESTRICTED)
    prompts = generator.tokenize(TASK)
    expected = [by_hand(*tiny, row["prompt"], LABELS, 4) for row in ROWS]
    assert len({tokens[0] for tokens in expected}) > 1, "else it would be no test"
    free = [by_hand(*tiny, row["prompt"], None, 4) for row in ROWS]
    assert sum(tokens[:1] == tokens_free[:1] for tokens, tokens_free in zip(expected, free)) < len(ROWS) / 2
    for batch in generator.plan(prompts, share=share):
        completed = generator.complete([prompts[i] for i in batch], batch, share=share)
        assert [each.ids for each in completed] == [expected[i] for i in batch]
        begun = generator.read([prompts[i] for i in batch])
        assert [each.ids for each in generator.finish(begun, batch)] == [expected[i] for i in batch]


def test_rows_that_go_on_after_others_have_ended_are_free(tiny, monkeypatch):
    monkeypatch.setattr(generation, "PASS", 0)
    model, tokenizer = tiny
    enders = {int(by_hand(model, tokenizer, row["prompt"], LABELS, 3)[1]) for row in ROWS[:12]}
    generator = Generator(model, tokenizer, Decoding(max_new_tokens=8, first_token_among=LABELS))
    monkeypatch.setattr(Generator, "stops", [tokenizer.eos_token_id, *sorted(enders)[:3]])  # so that some end early
    prompts = generator.tokenize(TASK)
    for row, completion in zip(ROWS, generator.complete(prompts, range(len(prompts)))):
        expected = by_hand(model, tokenizer, row["prompt"], LABELS, 8)
        end = next((at for at, token in enumerate(expected) if token in generator.stops), 8)
        assert completion.ids == expected[:end]


def test_of_samples_the_first_tokens_are_drawn_among_the_labels_as_often_as_the_model_says():
    logits, allowed, n = torch.tensor([2.0, 0.0, -1.0, 1.0, -4.0, 3.0]), [1, 3, 4], 20_000
    ids = torch.zeros(n, 2, dtype=torch.int64)
    scores = FirstTokenAmong(allowed, width=2)(ids, logits.expand(n, -1))
    drawn = Sampler(Decoding(temperature=1.0), range(n), width=2)(ids, scores).argmax(1)
    counts = torch.bincount(drawn, minlength=6)
    expected = n * logits[allowed].double().softmax(0)
    assert counts.sum() == counts[allowed].sum()
    assert stats.chisquare(counts[allowed].numpy(), expected.numpy()).pvalue > 1e-3
    assert FirstTokenAmong(allowed, width=1)(ids, logits) is logits, "a later step"


# Whatever generates


def first_letters(completions):
    return {completion.strip()[:1] for completion in completions}


def in_order(rollouts):
    """By the rows of the task that they are of."""
    return sorted(rollouts, key=lambda one: int(one.id.split(":")[1]))


def steering():
    """Along random directions, so far that nothing is as it was."""
    directions = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    vectors = {f"blocks.{layer}.hook_resid_post": 5 * directions[layer] for layer in (0, 1)}
    return Steering.from_vectors(vectors)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rollouts_and_grading_are_restricted_and_say_so(tiny, temperature):
    decoding = Decoding(4, temperature, first_token_among=LABELS)
    made = [one for batch in generate_rollouts(*tiny, TASK, decoding, progress=False) for one in batch]
    assert first_letters(one.completion for one in made) <= set(LABELS)
    assert made[0].decoding["first_token_among"] == list(LABELS)
    graded = grade(*tiny, TASK, decoding, progress=False)
    assert graded.completions == [one.completion for one in in_order(made)]
    with pytest.raises(CorrSteerError, match="first_token_among is .'A', 'B', 'C'., not None"):
        graded.check(TASK, Decoding(4, temperature))


@pytest.mark.parametrize("prefix", ["", "Read this first. " * 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_trials_are_restricted_as_each_would_be_alone(tiny, temperature, prefix, monkeypatch):
    monkeypatch.setattr(batches, "PASS", 0)
    monkeypatch.setattr(generation, "PASS", 0)
    task = Task.from_rows([row | {"prompt": prefix + row["prompt"]} for row in ROWS[:12]], grader="choice")
    decoding = replace(RESTRICTED, temperature=temperature)
    steered = steering()
    trials = [UNSTEERED, Trial(steered), Trial(steered, scale=-1.0), Trial(steered, positions="all")]
    found = run_trials(*tiny, task, trials, decoding, progress=False)
    for trial, graded in zip(trials, found):
        assert first_letters(graded.completions) <= set(LABELS)
        applied = nullcontext() if trial.steering is None else steered.apply(tiny[0], trial.positions, trial.scale)
        with applied:
            assert graded.completions == grade(*tiny, task, decoding, progress=False).completions
    assert len({tuple(graded.completions) for graded in found}) == 4, "which say something else, each"


def test_collect_and_evaluate_are_restricted_and_record_it(tiny):
    encoders = tiny_pipeline.encoders((1,), d_in=32)
    run = collect(*tiny, encoders, TASK, decoding=RESTRICTED, permutations=0, progress=False)
    assert first_letters(one.completion for one in run.rollouts) <= set(LABELS)
    assert tuple(run.provenance["decoding"]["first_token_among"]) == LABELS
    alone = grade(*tiny, TASK, RESTRICTED, progress=False)
    assert [one.completion for one in in_order(run.rollouts)] == alone.completions
    result = evaluate(*tiny, TASK, steering(), decoding=RESTRICTED, progress=False)
    said = [text for example in result.examples for text in (example["before"], example["after"])]
    assert first_letters(said) <= set(LABELS)


def test_vllm_is_told_which_tokens_it_may_choose_where_there_is_one(tiny, monkeypatch):
    vllm = SimpleNamespace(SamplingParams=lambda **given: given, __version__="9.9")
    monkeypatch.setattr(vllm_engine, "_vllm", lambda: vllm)
    asked = []

    def generate(prompts, settings, use_tqdm):
        asked.extend(settings)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids_of(["A"])[:1])]) for _ in prompts]

    llm = SimpleNamespace(
        generate=generate,
        model_config=SimpleNamespace(
            model="m", max_model_len=2048, get_vocab_size=lambda: 300, try_get_generation_config=dict
        ),
    )
    one = vllm_engine.VllmGenerator(llm, tiny[1], Decoding(1, first_token_among=LABELS))
    assert one.complete([[5, 6]], [0])[0].text == "A"
    assert asked[0]["allowed_token_ids"] == ids_of(LABELS)
    several = vllm_engine.VllmGenerator(llm, tiny[1], Decoding(2, first_token_among=LABELS))
    with pytest.raises(CorrSteerError, match="max_new_tokens must be 1 with first_token_among and a vllm.LLM, got 2"):
        several.complete([[5, 6]], [0])
