import functools
import gc
import threading
import weakref

import architectures
import calls
import pytest
import torch
import transformers
from tiny_models import (
    ARCHITECTURES,
    LAYERS,
    WIDTH,
    batch_of,
    build,
    generate,
    hook,
    prompts_of,
    tiny,
    traces,
)

from corrsteer.errors import CorrSteerError
from corrsteer.lm import passes
from corrsteer.lm.capture import Capture
from corrsteer.lm.hook_points import HookPoint
from corrsteer.steering.steering import Feature, Steering

LENGTHS = (2, 7, 5)
LONGEST = 7
POINTS = {
    "embedding": HookPoint(0, "resid_pre"),
    1: HookPoint(1),
    "attention": HookPoint(2, "attn_out"),
    "mlp": HookPoint(1, "mlp_out"),
    2: HookPoint(2),
}
STEP_BYTES = len(LENGTHS) * WIDTH * 4 * len(POINTS)  # what one step takes in all buffers together


@functools.cache
def scenario(architecture):
    """Prompts and stop tokens with which the first row stops at its first token, another later, another never."""
    for seed in range(200):
        prompts = prompts_of(LENGTHS, seed)
        tokens = generate(tiny(architecture), prompts, LONGEST).tolist()
        for stop in tokens[1][2:5]:
            stops = [tokens[0][0], stop]
            first = [first_stop(row, stops) for row in tokens]
            if first[0] == 0 and first[1] in (2, 3, 4) and first[2] == LONGEST:
                return prompts, stops
    raise AssertionError("no prompts stop as they should")


def first_stop(tokens, stops):
    return next((i for i, token in enumerate(tokens) if token in stops), len(tokens))


def captured(model, prompts, stops, n, *, max_new_tokens=None, sink=None, points=POINTS, eos=False, **options):
    """The capture of a greedy generation, and its tokens."""
    capture_options = {k: options.pop(k) for k in ("positions", "buffer_bytes", "exclude_tokens") if k in options}
    capture = Capture(
        model, points, stop_tokens=stops, max_new_tokens=max_new_tokens or n, sink=sink, **capture_options
    )
    with capture:
        stopping = {"eos_token_id": stops, "pad_token_id": 0} if eos else {}
        tokens = generate(model, prompts, n, stopping_criteria=[capture.stopping_criterion], **stopping, **options)
    return capture, tokens.tolist()


def teacher_forced(architecture, prompts, tokens, stops, positions, points=POINTS):
    """What should be captured: each row alone, unpadded, uncached, in one pass over its prompt and completion."""
    model, rows = tiny(architecture), []
    for prompt, completion in zip(prompts, tokens):
        kept = max(1, first_stop(completion, stops))
        row, handles = {}, []
        for key, point in points.items():
            see = lambda h, key=key, row=row: row.update({key: h[0].clone()})  # noqa: E731
            handles.append(hook(model, architecture, point, see))
        model(torch.tensor([prompt + completion]), use_cache=False)
        for handle in handles:
            handle.remove()
        start = 0 if positions == "all" else len(prompt) - 1
        rows.append({key: h[start : len(prompt) - 1 + kept] for key, h in row.items()})
        rows[-1] |= {("last of the prompt", key): h[len(prompt) - 1] for key, h in row.items()}
    return rows


def assert_captured(capture, rows, points=POINTS):
    for key in points:
        x, cu_seqlens = capture.packed(key)
        lengths = [len(row[key]) for row in rows]
        assert cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        assert cu_seqlens.dtype == torch.int32
        torch.testing.assert_close(x, torch.cat([row[key] for row in rows]), rtol=1e-4, atol=1e-4)
        last = torch.stack([row["last of the prompt", key] for row in rows])
        torch.testing.assert_close(capture.last_prompt(key), last, rtol=1e-4, atol=1e-4)


# What is kept


@pytest.mark.parametrize("n", [1, 2, LONGEST])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("positions", ["generated", "all"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_generation_is_captured_as_one_pass_over_each_prompt_and_its_answer(architecture, positions, use_cache, n):
    prompts, stops = scenario(architecture)
    capture, tokens = captured(
        tiny(architecture), prompts, stops, n, positions=positions, use_cache=use_cache, eos=use_cache
    )
    assert [first_stop(row, stops) for row in tokens][::2] == [0, n]
    assert_captured(capture, teacher_forced(architecture, prompts, tokens, stops, positions))


@pytest.mark.parametrize(
    ("stopping", "kept"),
    [
        ([], [4, 4, 4]),  # no row ever stops
        ([2, 0, 3], [2, 1, 3]),  # the tokens at which each row stops
        ([0, 0, 0], [1, 1, 1]),
        ([1, 1, 1], [1, 1, 1]),
        ([3, 1, 1], [3, 1, 1]),
    ],
)
def test_as_many_steps_are_kept_as_tokens_come_before_the_first_stop_token_and_at_least_one(stopping, kept):
    stop, model = 60, tiny("llama")

    def choose(ids, scores):
        # Row i speaks its stop token when told to, then twice more; all else is token i + 1.
        step = ids.shape[1] - max(LENGTHS)
        scores = torch.full_like(scores, -1e9)
        for row in range(len(ids)):
            scores[row, stop if stopping and step >= stopping[row] else row + 1] = 0
        return scores

    capture, tokens = captured(model, prompts_of(LENGTHS), [stop], 4, logits_processor=[choose])
    assert [first_stop(row, [stop]) for row in tokens] == (stopping or [4, 4, 4])
    assert capture.packed(1)[1].diff().tolist() == kept


@pytest.mark.parametrize("positions", ["generated", "all"])
def test_a_generation_that_ends_early_is_captured_as_far_as_it_went(positions):
    prompts, stops = scenario("llama")
    capture, tokens = captured(
        tiny("llama"), prompts[:2], stops, LONGEST, max_new_tokens=50, positions=positions, eos=True
    )
    assert 1 < len(tokens[0]) < LONGEST
    assert_captured(capture, teacher_forced("llama", prompts[:2], tokens, stops, positions))


@pytest.mark.parametrize("positions", ["generated", "all"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3"])
def test_a_static_cache_changes_nothing(architecture, positions):
    prompts, stops = scenario(architecture)
    options = {"positions": positions, "cache_implementation": "static"}
    capture, tokens = captured(tiny(architecture), prompts, stops, 4, **options)
    assert_captured(capture, teacher_forced(architecture, prompts, tokens, stops, positions))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_captured_has_the_dtype_of_the_model(dtype):
    capture, _ = captured(tiny("llama", dtype), prompts_of(LENGTHS), [], 3)
    assert {tensor.dtype for key in POINTS for tensor in (capture.packed(key)[0], capture.last_prompt(key))} == {dtype}


def test_capturing_does_not_change_what_is_generated():
    model, prompts = tiny("gemma2"), prompts_of(LENGTHS)
    assert captured(model, prompts, [], 6, positions="all")[1] == generate(model, prompts, 6).tolist()


def test_a_capture_inside_a_steering_sees_the_steered_residual():
    model, prompts, direction = tiny("llama"), prompts_of(LENGTHS), torch.arange(WIDTH) / WIDTH
    steering = Steering([Feature("blocks.1.hook_resid_post", 2.0)], direction[None])
    before, _ = captured(model, prompts, [], 1)
    with steering.apply(model):
        after, _ = captured(model, prompts, [], 1)
    expected = (2 * direction).expand(len(prompts), -1)
    torch.testing.assert_close(after.packed(1)[0] - before.packed(1)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", ["generated", "all"])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_tokens_that_are_excluded_are_left_out_of_prompts_by_their_id_but_for_the_last(positions, use_cache):
    bos = 59
    prompts = [[bos, 4], [bos, 5, 6, bos, 7, 8, 9], [3, 4, 5, 6, bos]]  # begun by it, within, and last
    capture, tokens = captured(
        tiny("llama"), prompts, [], 4, positions=positions, use_cache=use_cache, exclude_tokens=[bos]
    )
    rows = teacher_forced("llama", prompts, tokens, [], positions)
    if positions == "all":
        kept = [[at for at, token in enumerate(prompt[:-1]) if token != bos] for prompt in prompts]
        kept = [at + list(range(len(prompt) - 1, len(prompt) + 3)) for at, prompt in zip(kept, prompts)]
        rows = [row | {key: row[key][at] for key in POINTS} for row, at in zip(rows, kept)]
    assert_captured(capture, rows)


def test_excluding_tokens_from_a_capture_leaves_the_steering_of_the_same_pass_alone():
    model, prompts = tiny("llama"), prompts_of(LENGTHS)
    steering, seen = Steering.from_vectors({"blocks.2.hook_resid_post": 5 * torch.ones(WIDTH)}), []
    for excluded in ((), tuple({token for prompt in prompts for token in prompt})):
        options = {"positions": "all", "exclude_tokens": excluded, "max_new_tokens": 2}
        with Capture(model, {1: HookPoint(1)}, stop_tokens=[], **options) as capture, steering.apply(model, "all"):
            handle = model.model.layers[2].register_forward_hook(lambda m, a, h: seen.append(h.clone()))
            generate(model, prompts, 2, stopping_criteria=[capture.stopping_criterion])
            handle.remove()
    assert all(torch.equal(one, other) for one, other in zip(seen[:2], seen[2:], strict=True))


def test_tokens_are_excluded_from_each_of_several_completions_of_a_prompt():
    prompts, options = prompts_of(LENGTHS), {"num_return_sequences": 2, "do_sample": True}
    excluded = [prompts[1][0]]
    with Capture(
        tiny("llama"), {1: HookPoint(1)}, stop_tokens=[], positions="all", exclude_tokens=excluded, max_new_tokens=2
    ) as capture:
        batch = batch_of(prompts)
        tiny("llama").generate(**batch, max_new_tokens=2, stopping_criteria=[capture.stopping_criterion], **options)
    kept = [sum(token not in excluded for token in prompt[:-1]) + 2 for prompt in prompts for _ in range(2)]
    assert capture.packed(1)[1].diff().tolist() == kept


def test_excluding_tokens_of_prompts_given_as_embeddings_is_refused():
    model, batch = tiny("llama"), batch_of(prompts_of(LENGTHS))
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    with Capture(model, POINTS, stop_tokens=[], positions="all", exclude_tokens=[1]) as capture:
        with pytest.raises(CorrSteerError, match="exclude_tokens are told by their id, but generate was given none"):
            model.generate(inputs_embeds=embeddings, stopping_criteria=[capture.stopping_criterion], max_new_tokens=2)


def test_what_a_pass_has_decided_is_looked_up_at_each_hook_point():
    def called(layers, n):
        """Functions of ours that a generation calls."""
        points = {layer: HookPoint(layer) for layer in range(layers)}
        with calls.counted() as found:
            captured(tiny("llama"), prompts_of(LENGTHS), [], n, max_new_tokens=9, points=points)
        return found

    one, all_of_them = (called(layers, 9) - called(layers, 5) for layers in (1, LAYERS))  # of 4 decode steps
    assert all_of_them - one == dict.fromkeys(("after", "at", "_store"), 4 * (LAYERS - 1))


# The memory budget


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("positions", ["generated", "all"])
def test_parts_that_left_the_buffer_and_what_stayed_make_up_the_whole_capture(positions, steps):
    prompts, stops = scenario("qwen3")
    budget, parts = steps * STEP_BYTES + 3, {key: [] for key in POINTS}

    def sink(key, x, cu_seqlens):
        parts[key].append(x.tensor_split(cu_seqlens[1:-1].tolist()))
        assert len(x) == cu_seqlens[-1] and x.nbytes <= budget // len(POINTS)
        assert sum(buffer.nbytes for buffer in capture._buffer.values()) <= budget

    options = {"positions": positions, "eos": True}
    whole, _ = captured(tiny("qwen3"), prompts, stops, LONGEST, **options)
    capture = Capture(
        tiny("qwen3"),
        POINTS,
        stop_tokens=stops,
        max_new_tokens=LONGEST,
        positions=positions,
        buffer_bytes=budget,
        sink=sink,
    )
    with capture:
        criteria = [capture.stopping_criterion]
        generate(tiny("qwen3"), prompts, LONGEST, stopping_criteria=criteria, eos_token_id=stops, pad_token_id=0)

    needed = LONGEST if positions == "generated" else max(LENGTHS) + LONGEST - 1
    assert capture.flushed == any(parts.values()) == (steps < needed)
    for key in POINTS:
        x, cu_seqlens = capture.packed(key)
        parts[key].append(x.tensor_split(cu_seqlens[1:-1].tolist()))
        whole_x, whole_cu = whole.packed(key)
        for row, expected in enumerate(whole_x.tensor_split(whole_cu[1:-1].tolist())):
            assert torch.equal(torch.cat([part[row] for part in parts[key]]), expected)
        assert torch.equal(capture.last_prompt(key), whole.last_prompt(key))


@pytest.mark.parametrize("n", [1, 3])
def test_a_prompt_longer_than_the_buffer_goes_to_the_sink_as_it_is_read(n):
    parts, prompts = [], prompts_of(LENGTHS)
    capture, _ = captured(
        tiny("llama"),
        prompts,
        [],
        n,
        points={1: HookPoint(1)},
        positions="all",
        buffer_bytes=3 * len(LENGTHS) * WIDTH * 4,
        sink=lambda key, x, cu_seqlens: parts.append(cu_seqlens.diff()),
    )
    kept = sum(parts, capture.packed(1)[1].diff())
    assert kept.tolist() == [length + n - 1 for length in LENGTHS]
    assert max(int(part.max()) for part in parts) <= 3


@pytest.mark.parametrize(
    ("budget", "sink", "needed"),
    [(4 * STEP_BYTES - 1, None, 4 * STEP_BYTES), (STEP_BYTES - 1, lambda *part: None, STEP_BYTES), (0, None, None)],
    ids=["no sink", "less than a step", "nothing"],
)
def test_a_budget_that_is_too_small_is_refused_with_what_is_needed(budget, sink, needed):
    with pytest.raises(CorrSteerError, match=f"buffer_bytes must be at least {needed or 4 * STEP_BYTES} "):
        captured(tiny("llama"), prompts_of(LENGTHS), [], 4, buffer_bytes=budget, sink=sink)


def test_a_budget_that_is_just_enough_needs_no_sink():
    capture, _ = captured(tiny("llama"), prompts_of(LENGTHS), [], 4, buffer_bytes=4 * STEP_BYTES)
    assert not capture.flushed and len(capture.packed(1)[0]) == 4 * len(LENGTHS)


# What is refused


def test_right_padded_prompts_are_refused():
    model = tiny("llama")
    with Capture(model, POINTS, stop_tokens=[], max_new_tokens=2) as capture:
        with pytest.raises(CorrSteerError, match="must be padded on the left"):
            batch = batch_of(prompts_of(LENGTHS), side="right")
            model.generate(**batch, max_new_tokens=2, stopping_criteria=[capture.stopping_criterion])


def test_generating_past_max_new_tokens_is_refused():
    with pytest.raises(CorrSteerError, match="went on past max_new_tokens=3"):
        captured(tiny("llama"), prompts_of(LENGTHS), [], 4, max_new_tokens=3)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_generating_without_the_stopping_criterion_is_refused(use_cache):
    model = tiny("llama")
    with Capture(model, POINTS, stop_tokens=[]):
        with pytest.raises(CorrSteerError, match="give generate the capture's stopping_criterion"):
            generate(model, prompts_of(LENGTHS), 4, use_cache=use_cache)


def test_a_second_generation_in_the_same_capture_is_refused():
    model, prompts = tiny("llama"), prompts_of(LENGTHS)
    with Capture(model, POINTS, stop_tokens=[]) as capture:
        generate(model, prompts, 2, stopping_criteria=[capture.stopping_criterion])
        with pytest.raises(CorrSteerError, match="one call of model.generate"):
            generate(model, prompts, 2, stopping_criteria=[capture.stopping_criterion])


@pytest.mark.parametrize("positions", ["generated", "all"])
def test_a_prompt_read_in_chunks_is_refused(positions):
    with pytest.raises(CorrSteerError, match="prompts must be read in one pass"):
        captured(tiny("llama"), prompts_of(LENGTHS), [], 4, positions=positions, prefill_chunk_size=3)


@pytest.mark.parametrize("architecture", ["qwen4_exp_text", "deepseek_v4", "prophetnet"])
@pytest.mark.parametrize("positions", ["generated", "all"])
def test_a_stream_of_several_lanes_or_of_other_positions_is_refused(architecture, positions):
    model, ids = architectures.build(architecture), torch.tensor(prompts_of((7,)))
    with Capture(model, {1: HookPoint(1)}, stop_tokens=[], positions=positions, max_new_tokens=2) as capture:
        with pytest.raises(CorrSteerError, match="the model's residual stream must be"):
            criteria = [capture.stopping_criterion]
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, stopping_criteria=criteria)


@pytest.mark.parametrize("told", ["as an argument", "by a configuration", "by the model's own"])
def test_beam_search_is_refused(told):
    model = build("llama")
    options = {"num_beams": 3} if told == "as an argument" else {}
    if told == "by a configuration":
        options["generation_config"] = transformers.GenerationConfig(num_beams=3, pad_token_id=0)
    if told == "by the model's own":
        model.generation_config.num_beams = 3
    with pytest.raises(CorrSteerError, match="beam search changes rows between passes"):
        captured(model, prompts_of(LENGTHS), [], 3, **options)


@pytest.mark.parametrize("stop_tokens", [[], [3]])
def test_generating_by_another_model_or_in_another_thread_is_refused(stop_tokens):
    model, errors = tiny("llama"), []

    def run(of):
        try:
            generate(of, prompts_of(LENGTHS), 3, stopping_criteria=[capture.stopping_criterion])
        except CorrSteerError as error:
            errors.append(str(error))

    with Capture(model, POINTS, stop_tokens=stop_tokens) as capture:
        run(tiny("qwen3"))
        thread = threading.Thread(target=run, args=(model,))
        thread.start()
        thread.join()
    assert len(errors) == 2 and all("the capture saw no pass of this generation" in error for error in errors)


def test_asking_for_a_capture_before_anything_was_generated_is_refused():
    with Capture(tiny("llama"), POINTS, stop_tokens=[]) as capture:
        for ask in (capture.packed, capture.last_prompt):
            with pytest.raises(CorrSteerError, match="nothing was captured"):
                ask(1)


def test_asking_for_a_hook_point_that_was_not_captured_is_refused():
    capture, _ = captured(tiny("llama"), prompts_of(LENGTHS), [], 2)
    with pytest.raises(CorrSteerError, match="key must be one of 'embedding', 1, .* got 7"):
        capture.packed(7)


@pytest.mark.parametrize(
    ("points", "options", "message"),
    [
        ({}, {}, "points must name at least one hook point"),
        ({0: HookPoint(LAYERS)}, {}, "outside the model"),
        ({0: HookPoint(1)}, {"positions": "prompt"}, "positions must be one of generated, all, got 'prompt'"),
        ({0: HookPoint(1)}, {"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused(points, options, message):
    with pytest.raises(CorrSteerError, match=message):
        Capture(tiny("llama"), points, stop_tokens=[], **options)


# What is left behind


@pytest.mark.parametrize("where", ["nowhere", "in the body", "in a hook", "while entering"])
def test_the_model_is_left_as_it_was_whether_or_not_something_is_raised(where):
    model, prompts = build("llama"), prompts_of(LENGTHS)
    generate(model, prompts, 1)
    before = traces(model)
    points = dict(POINTS)
    if where == "while entering":
        model.model.layers[2].feed_forward = model.model.layers[2]._modules.pop("mlp")
        points["last"] = HookPoint(2, "mlp_out")
        before = traces(model)
    expected = CorrSteerError if where in ("in a hook", "while entering") else RuntimeError
    try:
        with Capture(model, points, stop_tokens=[], max_new_tokens=2) as capture:
            assert where != "while entering"
            assert traces(model) != before and "generate" not in vars(model)
            n = 5 if where == "in a hook" else 2
            generate(model, prompts, n, stopping_criteria=[capture.stopping_criterion])
            if where == "in the body":
                raise RuntimeError
    except expected:
        assert where != "nowhere"
    else:
        assert where == "nowhere"
    assert traces(model) == before
    assert model not in passes._followed and "generate" not in vars(type(model))


def test_a_capture_that_is_kept_does_not_keep_the_cache_of_its_generation():
    model, caches = tiny("llama"), []

    def look(module, args, kwargs):
        caches.extend(weakref.ref(kwargs[name]) for name in passes.CACHES if kwargs.get(name) is not None)

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    capture, _ = captured(model, prompts_of(LENGTHS), [], 3)
    handle.remove()
    gc.collect()
    assert caches and all(cache() is None for cache in caches) and len(capture.packed(1)[0])


def test_what_was_captured_outlives_the_context_and_the_next_generation():
    model, prompts = tiny("llama"), prompts_of(LENGTHS)
    capture, _ = captured(model, prompts, [], 3)
    kept = capture.packed(1)[0].clone()
    generate(model, prompts_of(LENGTHS, seed=1), 3)
    assert torch.equal(capture.packed(1)[0], kept) and len(kept) == 3 * len(prompts)
