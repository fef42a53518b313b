"""What a pass over prompts and completions reads is what was captured while they were written."""

import functools
from types import SimpleNamespace

import architectures
import peft
import pytest
import tiny_models
import torch
import transformers
from tiny_models import ARCHITECTURES, LAYERS, PAD, VOCABULARY, WIDTH, build, prompts_of, tiny, traces

from corrsteer import Capture, Decoding, HookPoint, Steering
from corrsteer.errors import CorrSteerError
from corrsteer.lm import batches, prefill, teacher_forcing
from corrsteer.lm.generation import Generator
from corrsteer.lm.teacher_forcing import TeacherForcing
from corrsteer.lm.token_positions import POSITIONS

LENGTHS, N = (2, 7, 1, 5), 6
POINTS = {
    "embedding": HookPoint(0, "resid_pre"),
    1: HookPoint(1),
    "attention": HookPoint(1, "attn_out"),
    "mlp": HookPoint(2, "mlp_out"),
    2: HookPoint(2),
}
HEAD = [7, 11, 23, 5, 42, 17]  # more tokens than the attention windows' 5


def written(model, prompts, *, points=POINTS, positions="generated", exclude=(), stops=(), share=False, **decoding):
    """What is captured while a model completes prompts, and the sequences of tokens."""
    decode = lambda rows, skip_special_tokens: [tuple(row) for row in rows]  # noqa: E731
    tokenizer = SimpleNamespace(pad_token_id=PAD, eos_token_id=list(stops), batch_decode=decode)
    generator = Generator(model, tokenizer, Decoding(**{"max_new_tokens": N} | decoding))
    with Capture(
        model, points, stop_tokens=stops, positions=positions, max_new_tokens=N, exclude_tokens=exclude
    ) as capture:
        completions = generator.complete(
            prompts, list(range(len(prompts))), share=share, criteria=[capture.stopping_criterion]
        )
    return capture, [(prompt, completion.text) for prompt, completion in zip(prompts, completions)]


@functools.cache
def that_stop(architecture):
    """Prompts and stop tokens with which one completion ends at once, another after a token, and a third later."""
    for seed in range(500):
        prompts = prompts_of(LENGTHS, seed)
        _, sequences = written(tiny(architecture), prompts)
        tokens = [completion for _, completion in sequences]
        stops = [tokens[0][0], tokens[1][1], tokens[2][3]]
        found = [next((at for at, token in enumerate(row) if token in stops), N) for row in tokens]
        if found == [0, 1, 3, N]:
            return prompts, stops
    raise AssertionError("no prompts stop as they should")


def assert_read(residuals, capture, order=None, points=POINTS, close=1e-5):
    """Residuals of sequences in an order are those of a capture, relative to their norms."""
    order = list(order if order is not None else range(len(capture.last_prompt(next(iter(points))))))
    for key in points:
        (x, cu_seqlens), (expected, cu_expected) = residuals.packed(key), capture.packed(key)
        rows = expected.split(cu_expected.diff().tolist())
        assert cu_seqlens.dtype == torch.int32 and x.dtype == expected.dtype
        assert cu_seqlens.tolist() == [sum(len(rows[i]) for i in order[:at]) for at in range(len(order) + 1)]
        expected = torch.cat([rows[i] for i in order])
        assert ((x - expected).norm(dim=1) <= close * expected.norm(dim=1)).all(), key
        last, expected = residuals.last_prompt(key), capture.last_prompt(key)[order]
        assert ((last - expected).norm(dim=1) <= close * expected.norm(dim=1)).all(), key


# What is read


@pytest.mark.parametrize("positions", ["generated", "all"])
@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_pass_reads_what_was_captured_while_generating(architecture, temperature, positions):
    model, (prompts, stops) = tiny(architecture), that_stop(architecture)
    capture, sequences = written(model, prompts, positions=positions, stops=stops, temperature=temperature)
    if not temperature:
        assert [len(completion) for _, completion in sequences] == [0, 1, 3, N]
    reading = TeacherForcing(model, POINTS, positions=positions)
    assert_read(reading.read(sequences), capture)
    assert_read(reading.read([sequences[i] for i in (3, 0)]), capture, (3, 0))
    for i, sequence in enumerate(sequences):
        assert_read(reading.read([sequence]), capture, [i])


@pytest.mark.parametrize("exclude", [[59], [59, 3]])
@pytest.mark.parametrize("positions", ["generated", "all"])
def test_excluded_tokens_are_left_out_of_prompts_but_for_the_last_as_in_a_capture(positions, exclude):
    prompts = [[59, 4], [59, 5, 6, 59, 7, 8, 9], [3, 4, 5, 6, 59]]
    capture, sequences = written(tiny("llama"), prompts, positions=positions, exclude=exclude)
    sequences[0] = (sequences[0][0], sequences[0][1])
    reading = TeacherForcing(tiny("llama"), POINTS, positions=positions, exclude_tokens=exclude)
    assert_read(reading.read(sequences), capture)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_low_precision_it_is_as_near_as_rounding_allows(dtype):
    capture, sequences = written(tiny("llama", dtype), prompts_of(LENGTHS))
    residuals = TeacherForcing(tiny("llama", dtype), POINTS).read(sequences)
    assert_read(residuals, capture, close=16 * torch.finfo(dtype).eps)


def adapted(**config):
    torch.manual_seed(0)
    return peft.get_peft_model(build("llama"), peft.get_peft_config(config | {"task_type": "CAUSAL_LM"})).eval()


@pytest.mark.parametrize("positions", ["generated", "all"])
def test_a_model_with_an_adapter_is_read_as_it_wrote(positions):
    model = adapted(peft_type="LORA", init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    before = traces(model)
    capture, sequences = written(model, prompts_of(LENGTHS), positions=positions)
    assert_read(TeacherForcing(model, POINTS, positions=positions).read(sequences), capture)
    plain, _ = written(tiny("llama"), prompts_of(LENGTHS))
    assert not torch.allclose(capture.last_prompt(2), plain.last_prompt(2), rtol=1e-2, atol=1e-2)
    assert traces(model) == before


def test_prompt_tuning_is_refused_as_padding_lies_between_the_virtual_tokens_and_a_prompt():
    model = adapted(peft_type="PROMPT_TUNING", num_virtual_tokens=3)
    model.generation_config.use_cache = False  # with which it cannot even be captured, of some versions
    before = traces(model)
    with pytest.raises(CorrSteerError, match="depend on what is beside a row in a batch"):
        TeacherForcing(model, POINTS)
    assert traces(model) == before


@pytest.mark.parametrize("installed", [False, True], ids=["entered", "installed"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_a_steering_acts_as_it_does_while_generating(positions, installed):
    model, prompts = build("llama"), prompts_of(LENGTHS)
    direction = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    steering = Steering.from_vectors({"blocks.0.hook_resid_post": 3 * direction})
    plain, _ = written(model, prompts)
    place = steering.install(model, positions=positions) if installed else steering.apply(model, positions)
    with place:
        capture, sequences = written(model, prompts)
        residuals = TeacherForcing(model, POINTS).read(sequences)
        assert_read(residuals, capture)
    assert not torch.allclose(capture.last_prompt(2), plain.last_prompt(2), rtol=1e-2, atol=1e-2)


def test_transformers_warns_of_nothing(caplog):
    prompts, stops = that_stop("llama")
    transformers.logging.enable_propagation()
    try:
        reading = TeacherForcing(build("llama"), POINTS)
        reading.read([([PAD, 3], [PAD]), ([3, 4, PAD], []), (prompts[1], [stops[0], 3, 4, 5])])
    finally:
        transformers.logging.disable_propagation()
    assert "padding" not in caplog.text


def test_hooks_are_taken_off_again():
    model = build("llama")
    before = traces(model)
    reading = TeacherForcing(model, POINTS)
    reading.read([([3, 4], [5])])
    with pytest.raises(ZeroDivisionError):
        TeacherForcing(model, POINTS, buffer_bytes=0).read([([3, 4], [5])], sink=lambda *_: 1 / 0)
    assert traces(model) == before


# What is not computed


@pytest.mark.parametrize(
    ("points", "unused"),
    [
        ([HookPoint(1)], ["model.layers.2", "model.norm", "lm_head"]),
        ([HookPoint(1, "resid_pre"), HookPoint(0)], ["model.layers.1.self_attn", "model.layers.2", "lm_head"]),
        ([HookPoint(1, "attn_out"), HookPoint(0)], ["model.layers.1.mlp", "model.layers.2", "lm_head"]),
        ([HookPoint(1, "mlp_out"), HookPoint(1, "attn_out")], ["model.layers.2", "model.norm", "lm_head"]),
        ([HookPoint(2)], ["model.norm", "lm_head"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("shares", [False, True], ids=["apart", "shared"])
def test_nothing_above_the_last_hook_point_is_computed(points, unused, shares, monkeypatch):
    monkeypatch.setattr(batches, "PASS", 0)
    model, ran = build("llama"), []
    sequences = [([*HEAD, 3, 4], [5, 6]), ([*HEAD, 9], [5])]
    if not shares:
        sequences[1] = ([9, *HEAD], [5])
    reading = TeacherForcing(model, dict(enumerate(points)))
    reading.plan(sequences)  # after which it is known whether prefixes can be shared
    for name in unused:
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    model.model.layers[0].register_forward_pre_hook(lambda *_: ran.append("the first layer"))
    reading.read(sequences)
    assert ran == ["the first layer"] * (1 + shares)


# What prompts share


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3", "mistral", "gpt2"])
def test_what_prompts_begin_with_is_read_once(architecture, monkeypatch):
    model = tiny(architecture)
    prompts = [HEAD + rest for rest in ([9], [31, 8, 55, 12, 19, 4, 27, 44, 3], [15, 50, 6])]
    capture, sequences = written(model, prompts)
    sequences[2] = (prompts[2], sequences[2][1][:4])
    reading = TeacherForcing(model, POINTS)
    apart = reading.read(sequences)
    monkeypatch.setattr(batches, "PASS", 0)
    assert reading.plan(sequences) == [[1, 0, 2]]
    shapes = []
    handle = tiny_models.hook(model, architecture, HookPoint(0), lambda h: shapes.append(tuple(h.shape[:2])))
    shared = reading.read(sequences)
    handle.remove()
    assert shapes == [(1, len(HEAD)), (3, 9 + N - 1)]
    assert_read(shared, apart)
    assert_read(reading.read(sequences[:2]), capture, (0, 1))


def test_completions_of_one_prompt_share_all_of_it_but_its_last_token(monkeypatch):
    monkeypatch.setattr(batches, "PASS", 0)
    model, prompt = tiny("llama"), [*HEAD, 3]
    sequences = [(prompt, [4, 5, 6]), (prompt, [7]), (prompt, [])]
    reading = TeacherForcing(model, POINTS)
    alone = [reading.read([sequence]) for sequence in sequences]
    shapes = []
    handle = tiny_models.hook(model, "llama", HookPoint(0), lambda h: shapes.append(tuple(h.shape[:2])))
    together = reading.read(sequences)
    handle.remove()
    assert shapes == [(1, 6), (3, 3)]
    for key in POINTS:
        torch.testing.assert_close(together.packed(key)[0], torch.cat([one.packed(key)[0] for one in alone]))


def test_nothing_is_shared_where_prompts_are_kept(monkeypatch):
    monkeypatch.setattr(batches, "PASS", 0)
    monkeypatch.setattr(prefill, "read_prefix", lambda *_: pytest.fail("a prefix was read"))
    sequences = [([*HEAD, 3], [4]), ([*HEAD, 5], [6])]
    residuals = TeacherForcing(tiny("llama"), POINTS, positions="all").read(sequences)
    assert residuals.packed(1)[1].tolist() == [0, 7, 14]


# Batches and budgets


def random_sequences(n=40):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.stack(
        [torch.randint(1, 30, (n,), generator=generator), torch.randint(0, 20, (n,), generator=generator)]
    )
    return [(prompts_of([p], i)[0], prompts_of([c], i)[0] if c else []) for i, (p, c) in enumerate(lengths.T.tolist())]


@pytest.mark.parametrize("positions", ["generated", "all"])
@pytest.mark.parametrize(("batch_tokens", "steps"), [(100, 1000), (10_000, 30), (10_000, 1000), (1, 1)])
def test_batches_keep_to_both_budgets_and_hold_every_sequence_once(batch_tokens, steps, positions):
    sequences, step_bytes = random_sequences(), WIDTH * 4 * len(POINTS)
    reading = TeacherForcing(
        tiny("llama"), POINTS, positions=positions, batch_tokens=batch_tokens, buffer_bytes=steps * step_bytes
    )
    plan = reading.plan(sequences)
    assert sorted(i for batch in plan for i in batch) == list(range(len(sequences)))
    widths = []
    for batch in plan:
        prompts, completions = zip(*(sequences[i] for i in batch))
        kept = [max(len(c), 1) for c in completions]
        widths.append(max(map(len, prompts)) + max(kept) - 1)
        kept = sum(kept) + (sum(map(len, prompts)) - len(batch) if positions == "all" else 0)
        assert len(batch) == 1 or (len(batch) * widths[-1] <= batch_tokens and kept <= steps)
    assert widths == sorted(widths, reverse=True), "the longest come first"
    assert len(plan) < len(sequences) or batch_tokens == 1


def test_past_the_budget_residuals_go_to_the_sink_hook_point_by_hook_point():
    sequences, step_bytes, parts = random_sequences(3), WIDTH * 4 * len(POINTS), {}
    steps = sum(max(len(completion), 1) for _, completion in sequences)
    expected = TeacherForcing(tiny("llama"), POINTS, buffer_bytes=steps * step_bytes).read(
        sequences, sink=lambda *_: pytest.fail("it fits")
    )
    assert not expected.flushed
    reading = TeacherForcing(tiny("llama"), POINTS, buffer_bytes=steps * step_bytes - 1)
    residuals = reading.read(sequences, sink=lambda key, *part: parts.update({key: part}))
    assert residuals.flushed and set(parts) == set(POINTS)
    for key, (x, cu_seqlens) in parts.items():
        assert torch.equal(x, expected.packed(key)[0]) and torch.equal(cu_seqlens, expected.packed(key)[1])
        assert torch.equal(residuals.last_prompt(key), expected.last_prompt(key))
        rest, cu_rest = residuals.packed(key)
        assert rest.shape == (0, WIDTH) and rest.dtype == x.dtype and cu_rest.tolist() == [0] * 4
    with pytest.raises(CorrSteerError, match=f"buffer_bytes must be at least {steps * step_bytes} .* got"):
        reading.read(sequences)


# What is refused


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        (([], [3]), r"sequences\[1\] must have a prompt of at least one token"),
        (([3, VOCABULARY], [3]), rf"sequences\[1\] holds token {VOCABULARY} in its prompt, .* 0 to {VOCABULARY - 1}"),
        (([3], [4, VOCABULARY + 5]), rf"sequences\[1\] holds token {VOCABULARY + 5} in its completion"),
        (([3], [4, -1]), r"sequences\[1\] holds token -1 in its completion"),
        (([3] * 60, [4] * 6), r"sequences\[1\] has 65 tokens to read, 60 of its prompt, .* context of 64"),
        ([3, 4, 5], r"sequences\[1\] must be token ids of a prompt and of its completion"),
        (3, r"sequences\[1\] must be token ids of a prompt and of its completion, got 3"),
        (("a prompt", [3]), r"sequences\[1\]'s prompt must be a sequence of whole numbers, got 'a prompt'"),
        (([3], None), r"sequences\[1\]'s completion must be a sequence of whole numbers, got None"),
        (([3], [4, 2.5]), r"sequences\[1\]'s completion must be a sequence of whole numbers"),
    ],
)
def test_a_sequence_that_the_model_cannot_read_is_refused_by_its_place(sequence, message):
    reading = TeacherForcing(tiny("llama"), POINTS)
    for method in (reading.plan, reading.read):
        with pytest.raises(CorrSteerError, match=message):
            method([([3], [4]), sequence])


def test_a_sequence_as_long_as_the_context_is_read():
    residuals = TeacherForcing(tiny("llama"), POINTS).read([([3] * 60, [4] * 5)])
    assert residuals.packed(1)[0].shape == (5, WIDTH)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": {}}, "points must name at least one hook point"),
        ({"points": {1: HookPoint(LAYERS)}}, "outside the model"),
        ({"positions": "prompt"}, "positions must be one of generated, all, got 'prompt'"),
        ({"batch_tokens": 0}, "batch_tokens must be a whole number"),
        ({"buffer_bytes": -1}, "buffer_bytes must be a whole number"),
        ({"exclude_tokens": ["a"]}, "exclude_tokens must be a sequence of whole numbers"),
    ],
)
def test_options_are_checked_by_name(options, message):
    with pytest.raises(CorrSteerError, match=message):
        TeacherForcing(**{"model": tiny("llama"), "points": POINTS} | options)


def test_residuals_know_only_their_hook_points():
    residuals = TeacherForcing(tiny("llama"), {1: HookPoint(1)}).read([([3], [4])])
    for method in (residuals.packed, residuals.last_prompt):
        with pytest.raises(CorrSteerError, match="key must be one of 1, got 2"):
            method(2)
    with pytest.raises(CorrSteerError, match="sequences must hold at least one"):
        TeacherForcing(tiny("llama"), POINTS).read([])


@pytest.mark.parametrize(
    ("architecture", "multimodal"),
    [
        ("moshi", False),
        ("xlstm", False),
        ("paligemma", True),  # prompts are read in both directions
    ],
)
def test_a_model_that_does_not_read_what_it_wrote_is_refused_before_anything_is_read(architecture, multimodal):
    model = architectures.build(architecture, multimodal)
    for _ in range(2):  # also when it is known
        with pytest.raises(CorrSteerError, match="does not read a completion again as it wrote it.*capture while"):
            TeacherForcing(model, {1: HookPoint(1)})


def test_a_model_that_drops_activations_in_training_is_refused_until_it_is_evaluated():
    model = build("gpt2", resid_pdrop=0.5).train()
    with pytest.raises(CorrSteerError, match=r"call model\.eval\(\)"):
        TeacherForcing(model, POINTS)
    TeacherForcing(model.eval(), POINTS)


def test_a_model_is_tried_once(monkeypatch):
    model = build("llama")
    TeacherForcing(model, POINTS)
    monkeypatch.setattr(teacher_forcing, "_written", lambda _: pytest.fail("it was tried again"))
    TeacherForcing(model, POINTS, positions="all")


def test_a_model_that_is_told_to_read_prompts_in_chunks_is_refused():
    model = build("llama")
    model.generation_config.prefill_chunk_size = 2
    with pytest.raises(CorrSteerError, match="without prefill_chunk_size"):
        TeacherForcing(model, POINTS)
