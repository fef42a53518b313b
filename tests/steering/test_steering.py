import contextlib
import dataclasses
import functools
import json
import pickle

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tiny_models import (
    ARCHITECTURES,
    LAYERS,
    VOCABULARY,
    WIDTH,
    batch_of,
    build,
    generate,
    hook,
    prompts_of,
    tiny,
    traces,
)

from corrsteer import Steering, apply_rows
from corrsteer.errors import CorrSteerError
from corrsteer.lm import passes
from corrsteer.lm.hook_points import KINDS, HookPoint, device_of
from corrsteer.lm.token_positions import POSITIONS
from corrsteer.steering.features import Feature, FeatureStatistics
from corrsteer.steering.steering import FORMAT

LENGTHS = (2, 7, 5)
N = 6


def feature(point, index=0, coefficient=2.5):
    return Feature(str(point), coefficient, point.layer, index)


def steering_at(*points, seed=0, coefficient=2.5):
    """A steering with one random direction per hook point, which may be named more than once."""
    directions = torch.randn(len(points), WIDTH, generator=torch.Generator().manual_seed(seed))
    return Steering([feature(point, i, coefficient + i) for i, point in enumerate(points)], directions)


STEERING = steering_at(HookPoint(1), HookPoint(2, "mlp_out"))
STEERING_OF_FIRST = steering_at(HookPoint(0))
OTHER = steering_at(HookPoint(1), HookPoint(0, "attn_out"), seed=1)


def columns(positions, prompt_length, length):
    """Which of a row's tokens are steered, `[length, 1]`."""
    at = torch.arange(length)
    return {"generated": at >= prompt_length - 1, "all": at >= 0, "prompt": at < prompt_length}[positions][:, None]


@contextlib.contextmanager
def with_plain_hooks(model, architecture, steering, positions, prompt_length, scale=1.0):
    """Steering by plain torch hooks, for passes that read one row from its first token on."""
    handles = []
    for one, direction in zip(steering.features, steering.directions):
        added = scale * one.coefficient * direction

        def add(h, added=added):
            return torch.where(columns(positions, prompt_length, h.shape[1]), h + added, h)

        handles.append(hook(model, architecture, HookPoint.parse(one.hook_point), add))
    yield
    for handle in handles:
        handle.remove()


def greedy_steered_by_plain_hooks(architecture, prompt, n, steering=None, positions="generated", scale=1.0):
    """Greedy decoding of one row without padding, cache or `generate`."""
    model, ids = tiny(architecture), list(prompt)
    steering = steering or Steering([], torch.zeros(0, WIDTH))
    with with_plain_hooks(model, architecture, steering, positions, len(prompt), scale):
        for _ in range(n):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@functools.cache
def unsteered(architecture):
    return [greedy_steered_by_plain_hooks(architecture, prompt, N) for prompt in prompts_of(LENGTHS)]


# Which positions are steered


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steered_generation_is_that_of_adding_the_vectors_in_plain_hooks_with_and_without_a_cache(
    architecture, positions
):
    model, prompts = tiny(architecture), prompts_of(LENGTHS)
    expected = [greedy_steered_by_plain_hooks(architecture, prompt, N, STEERING, positions) for prompt in prompts]
    assert expected != unsteered(architecture)
    for use_cache in (True, False):
        with STEERING.apply(model, positions):
            assert generate(model, prompts, N, use_cache=use_cache).tolist() == expected
    assert generate(model, prompts, N).tolist() == unsteered(architecture)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_logits_of_a_steered_generation_are_those_of_one_pass_over_prompt_and_answer(architecture, positions, kind):
    model, prompts, steering = tiny(architecture), prompts_of(LENGTHS), steering_at(HookPoint(1, kind))
    batch = batch_of(prompts)
    with steering.apply(model, positions):
        output = model.generate(
            **batch, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    logits = torch.stack(output.logits, 1)  # [B, 4, vocabulary]
    for row, prompt in enumerate(prompts):
        ids = prompt + output.sequences[row, max(LENGTHS) :].tolist()
        with with_plain_hooks(model, architecture, steering, positions, len(prompt)):
            expected = model(torch.tensor([ids[:-1]])).logits[0, -4:]
        torch.testing.assert_close(logits[row], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [{"cache_implementation": "static"}, {"prefill_chunk_size": 3}, {"num_beams": 2, "num_return_sequences": 1}],
    ids=["static cache", "prompt in chunks", "beams"],
)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_how_generation_runs_does_not_change_which_positions_are_steered(architecture, positions, options):
    model, prompts = tiny(architecture), prompts_of(LENGTHS)
    plain = {k: v for k, v in options.items() if k.startswith("num")}
    with STEERING.apply(model, positions):
        uncached = generate(model, prompts, N, use_cache=False, **plain).tolist()
        assert generate(model, prompts, N, **options).tolist() == uncached
    assert generate(model, prompts, N, **plain).tolist() != uncached


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_conversation_that_goes_on_from_a_filled_cache_steers_its_new_tokens_only(positions):
    model, (_, first, second) = tiny("llama"), prompts_of(LENGTHS)
    cache = model(torch.tensor([first]), use_cache=True).past_key_values
    ids, new = torch.tensor([first + second]), torch.tensor([second])
    with STEERING.apply(model, positions):
        output = model.generate(
            new,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
    start = len(first) if positions != "generated" else len(first + second) - 1
    handles = [
        hook(
            model,
            "llama",
            HookPoint.parse(one.hook_point),
            lambda h, v=one.coefficient * d: torch.where((torch.arange(h.shape[1]) >= start)[:, None], h + v, h),
        )
        for one, d in zip(STEERING.features, STEERING.directions)
    ]
    expected = model(ids).logits[:, -1]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(output.logits[0], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_forward_pass_outside_generate_reads_prompts_and_steers_the_last_real_token_of_each(
    architecture, positions, side
):
    model, prompts = tiny(architecture), prompts_of(LENGTHS)
    batch = batch_of(prompts, side)
    with torch.no_grad():  # generate makes its own position ids
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with STEERING.apply(model, positions):
            logits = model(**batch).logits
        for row, prompt in enumerate(prompts):
            with with_plain_hooks(model, architecture, STEERING, positions, len(prompt)):
                expected = model(torch.tensor([prompt])).logits[0]
            real = logits[row][batch["attention_mask"][row].bool()]
            torch.testing.assert_close(real, expected, rtol=1e-3, atol=1e-3)


def test_a_mask_given_by_position_is_heeded():
    model, batch = tiny("llama"), batch_of(prompts_of(LENGTHS), side="right")
    with STEERING.apply(model):
        by_name = model(**batch).logits
        assert torch.equal(model(batch["input_ids"], batch["attention_mask"]).logits, by_name)


@pytest.mark.parametrize("positions", POSITIONS)
def test_padding_is_never_steered(positions):
    model, batch, steering = tiny("llama"), batch_of(prompts_of(LENGTHS)), steering_at(HookPoint(LAYERS - 1))
    plain = model(**batch, output_hidden_states=True).hidden_states[-1]
    with steering.apply(model, positions):
        steered = model(**batch, output_hidden_states=True).hidden_states[-1]
    changed = (steered != plain).any(-1)
    real = batch["attention_mask"].bool()
    last = torch.arange(real.shape[1]) == real.shape[1] - 1
    assert torch.equal(changed, real & last if positions == "generated" else real)


def test_embeddings_that_the_caller_passes_in_are_not_written_to():
    model = tiny("llama")
    embeddings = model.get_input_embeddings()(batch_of(prompts_of([4, 4]))["input_ids"])
    kept = embeddings.clone()
    with steering_at(HookPoint(0, "resid_pre")).apply(model, "all"):
        steered = model(inputs_embeds=embeddings).logits
    assert torch.equal(embeddings, kept) and not torch.allclose(steered, model(inputs_embeds=kept).logits, atol=0.1)


# Batches


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_neox", "gpt2"])
def test_left_padded_rows_are_steered_as_they_would_be_one_by_one(architecture, positions):
    model, prompts = tiny(architecture), prompts_of(LENGTHS, seed=3)
    with STEERING.apply(model, positions):
        alone = [generate(model, [prompt], N)[0].tolist() for prompt in prompts]
        assert generate(model, prompts, N).tolist() == alone


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_each_row_gets_its_own_steering_and_a_row_of_minus_one_none(architecture, positions):
    model, prompts, steerings = tiny(architecture), prompts_of((3, 6, 5, 2)), [STEERING, OTHER]
    with apply_rows(model, steerings, [1, -1, 0, 1], positions=positions, scale=1.5):
        steered = generate(model, prompts, N).tolist()
    mine = [OTHER, None, STEERING, OTHER]
    expected = [greedy_steered_by_plain_hooks(architecture, p, N, s, positions, 1.5) for p, s in zip(prompts, mine)]
    assert steered == expected


@pytest.mark.parametrize("rows", [[-2, 0, 0], [0, 0, 2]])
def test_a_row_of_an_unknown_steering_is_refused(rows):
    with pytest.raises(CorrSteerError, match=r"rows must lie in -1\.\.1, got"):
        with apply_rows(tiny("llama"), [STEERING, OTHER], rows):
            pass


def test_a_batch_of_another_size_than_rows_is_refused():
    with apply_rows(tiny("llama"), [STEERING], [0, -1]):
        with pytest.raises(CorrSteerError, match=r"one entry per row of the batch \(3\), got 2"):
            generate(tiny("llama"), prompts_of(LENGTHS), 1)


# How much is added


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("scale", [0.5, -2.0])
def test_a_steering_is_applied_at_its_own_positions_and_by_its_own_scale_unless_told_otherwise(positions, scale):
    model, prompts = tiny("llama"), prompts_of(LENGTHS)
    own = dataclasses.replace(STEERING, positions=positions, scale=scale)

    def generated(context):
        with context:
            return generate(model, prompts, N).tolist()

    asked = generated(STEERING.apply(model, positions, scale))
    assert generated(own.apply(model)) == generated(apply_rows(model, [own], [0] * len(prompts))) == asked
    with own.install(model):
        assert generate(model, prompts, N).tolist() == asked
    with STEERING.install(model, positions) as installed:
        installed.set(own)
        assert installed.scale == scale and generate(model, prompts, N).tolist() == asked
    assert generated(own.apply(model, "generated", 1.0)) == generated(STEERING.apply(model))
    assert generated(own.apply(model, scale=1.0)) == generated(STEERING.apply(model, positions))
    assert generated(own.apply(model, "all")) == generated(STEERING.apply(model, "all", scale))


def test_rows_of_steerings_with_different_positions_of_their_own_need_to_be_told_which():
    model, prompts = tiny("llama"), prompts_of(LENGTHS)
    steerings = [STEERING, dataclasses.replace(OTHER, positions="all")]
    with pytest.raises(CorrSteerError, match=r"the same positions, got \['all', 'generated'\]; give positions"):
        apply_rows(model, steerings, [0, 1, 0]).__enter__()
    with apply_rows(model, steerings, [0, 1, 0], positions="all"):
        generate(model, prompts, N)


@pytest.mark.parametrize("steering", [STEERING, OTHER], ids=["two points", "other points"])
@pytest.mark.parametrize("scale", [-1.0, 0.5, 2.0])
def test_the_scale_multiplies_the_coefficients(steering, scale):
    model, prompts = tiny("qwen3"), prompts_of(LENGTHS)
    expected = [greedy_steered_by_plain_hooks("qwen3", prompt, N, steering, scale=scale) for prompt in prompts]
    with steering.apply(model, scale=scale):
        assert generate(model, prompts, N).tolist() == expected
    assert expected != unsteered("qwen3")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("steering", "scale"), [(STEERING, 0.0), (Steering([], torch.zeros(0, WIDTH)), 1.0)], ids=["scale 0", "empty"]
)
def test_steering_by_nothing_changes_nothing(steering, scale, dtype):
    model, batch = tiny("gemma2", dtype), batch_of(prompts_of(LENGTHS))
    plain = model(**batch).logits
    with steering.apply(model, "all", scale):
        assert torch.equal(model(**batch).logits, plain)


def test_several_features_of_one_hook_point_are_summed_and_of_several_kinds_kept_apart():
    points = [HookPoint(1), HookPoint(1), HookPoint(1, "mlp_out"), HookPoint(1), HookPoint(2, "resid_pre")]
    steering = steering_at(*points)
    vectors, c, d = steering.vectors(), [f.coefficient for f in steering.features], steering.directions
    torch.testing.assert_close(vectors[HookPoint(1)], c[0] * d[0] + c[1] * d[1] + c[3] * d[3])
    torch.testing.assert_close(vectors[HookPoint(1, "mlp_out")], c[2] * d[2])
    torch.testing.assert_close(vectors[HookPoint(2, "resid_pre")], c[4] * d[4])
    assert len(vectors) == 3 and {v.dtype for v in vectors.values()} == {torch.float32}

    model, prompts = tiny("llama"), prompts_of(LENGTHS)
    expected = [greedy_steered_by_plain_hooks("llama", prompt, N, steering) for prompt in prompts]
    with steering.apply(model):
        assert generate(model, prompts, N).tolist() == expected


def test_a_hook_point_named_by_a_module_path_is_the_same_place():
    by_path = Steering([Feature("model.layers.1", 2.5)], STEERING.directions[:1])
    model, prompts = tiny("llama"), prompts_of(LENGTHS)
    with by_path.apply(model):
        steered = generate(model, prompts, N)
    with Steering(STEERING.features[:1], STEERING.directions[:1]).apply(model):
        assert torch.equal(generate(model, prompts, N), steered)
    assert steered.tolist() != unsteered("llama")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_residual_keeps_the_dtype_of_the_model_and_is_rounded_once(dtype, kind):
    model, batch, point = tiny("llama", dtype), batch_of(prompts_of([4, 4])), HookPoint(1, kind)
    seen = {}
    with contextlib.ExitStack() as stack:
        handle = hook(model, "llama", point, lambda h: seen.update(plain=h.clone()))
        model(**batch)
        handle.remove()
        stack.enter_context(steering_at(point).apply(model, "all"))
        handle = hook(model, "llama", point, lambda h: seen.update(steered=h.clone()))
        stack.callback(handle.remove)
        model(**batch)
    expected = (seen["plain"].float() + steering_at(point).vectors()[point]).to(dtype)
    assert seen["steered"].dtype == dtype and torch.equal(seen["steered"], expected)


# Contexts


@pytest.mark.parametrize("positions", POSITIONS)
def test_nested_contexts_add_up(positions):
    model, prompts = tiny("mistral"), prompts_of(LENGTHS)
    both = Steering(STEERING.features + OTHER.features, torch.cat([STEERING.directions, OTHER.directions]))
    expected = [greedy_steered_by_plain_hooks("mistral", prompt, N, both, positions) for prompt in prompts]
    with STEERING.apply(model, positions):
        only = generate(model, prompts, N).tolist()
        with OTHER.apply(model, positions):
            assert generate(model, prompts, N).tolist() == expected
        assert generate(model, prompts, N).tolist() == only
    assert only != expected and generate(model, prompts, N).tolist() == unsteered("mistral")


def test_nested_contexts_may_steer_different_positions():
    model, prompts, n = tiny("llama"), prompts_of(LENGTHS), 4
    with STEERING.apply(model, "prompt"), STEERING.apply(model, "generated"):
        steered = generate(model, prompts, n).tolist()
    for row, prompt in enumerate(prompts):
        with with_plain_hooks(model, "llama", STEERING, "prompt", len(prompt)):
            assert greedy_steered_by_plain_hooks("llama", prompt, n, STEERING, "generated") == steered[row]


def test_the_same_steering_twice_is_twice_the_steering():
    model, prompts = tiny("llama"), prompts_of(LENGTHS)
    with STEERING.apply(model), STEERING.apply(model):
        twice = generate(model, prompts, N).tolist()
    assert twice == [greedy_steered_by_plain_hooks("llama", prompt, N, STEERING, scale=2.0) for prompt in prompts]
    assert twice != [greedy_steered_by_plain_hooks("llama", prompt, N, STEERING) for prompt in prompts]


def test_contexts_one_after_the_other_do_not_add_up():
    model, prompts = tiny("llama"), prompts_of(LENGTHS)
    for _ in range(3):
        with STEERING.apply(model):
            steered = generate(model, prompts, N).tolist()
    assert steered == [greedy_steered_by_plain_hooks("llama", prompt, N, STEERING) for prompt in prompts]


def broken_in_its_last_layer():
    model = build("llama")
    layer = model.model.layers[2]
    layer.feed_forward = layer._modules.pop("mlp")
    return model


@pytest.mark.parametrize("outer", [False, True], ids=["alone", "nested"])
@pytest.mark.parametrize(
    ("where", "model", "run"),
    [
        ("nowhere", lambda: build("llama"), lambda model: generate(model, prompts_of(LENGTHS), 2)),
        ("in the body", lambda: build("llama"), lambda model: 1 / 0),
        ("in generate", lambda: build("llama"), lambda model: generate(model, [[VOCABULARY + 1]], 2)),
        ("while entering", broken_in_its_last_layer, lambda model: pytest.fail("the context was entered")),
        ("by the model", lambda: build("llama").model, lambda model: pytest.fail("the context was entered")),
    ],
)
def test_a_model_is_left_as_it_was_whether_or_not_something_is_raised(where, model, run, outer):
    model = model()
    before, failed = traces(model), False
    if outer and where != "by the model":
        with STEERING_OF_FIRST.apply(model):
            between = traces(model)
            with contextlib.suppress(Exception), STEERING.apply(model):
                assert traces(model) != between
                run(model)
            assert traces(model) == between
    else:
        try:
            with STEERING.apply(model):
                assert traces(model) != before
                run(model)
        except Exception:
            failed = True
        assert failed == (where != "nowhere")
    assert traces(model) == before
    assert model not in passes._followed and "generate" not in vars(type(model))
    assert where == "by the model" or model.generation_config.disable_compile is None


def test_a_generate_of_the_models_own_is_used_and_put_back():
    model, calls = build("llama"), []

    def own(*args, inner=model.generate, **kwargs):
        calls.append(kwargs)
        return inner(*args, **kwargs)

    model.generate = own
    with STEERING.apply(model):
        generate(model, prompts_of(LENGTHS), 1)
    assert model.generate is own and len(calls) == 1


# What is refused


@pytest.mark.parametrize(
    ("features", "directions", "message"),
    [
        (1, torch.zeros(2, WIDTH), r"directions must be \[1, d\], one per feature, got \[2, 32\]"),
        (1, torch.zeros(WIDTH), r"got \[32\]"),
        (1, torch.full((1, WIDTH), torch.nan), "directions must be finite"),
        (1, torch.full((1, WIDTH), -torch.inf), "directions must be finite"),
    ],
)
def test_directions_that_do_not_fit_the_features_or_are_not_finite_are_refused(features, directions, message):
    with pytest.raises(CorrSteerError, match=message):
        Steering([feature(HookPoint(1))] * features, directions)


@pytest.mark.parametrize(
    ("steering", "options", "message"),
    [
        (Steering([feature(HookPoint(1))], torch.ones(1, 40)), {}, "width 40, but the model's is 32"),
        (Steering([feature(HookPoint(LAYERS))], torch.ones(1, WIDTH)), {}, "outside the model, whose layers are 0"),
        (STEERING, {"positions": "last"}, "positions must be one of generated, all, prompt, got 'last'"),
    ],
)
def test_a_steering_that_does_not_fit_the_model_is_refused(steering, options, message):
    model = tiny("llama")
    before = traces(model)
    with pytest.raises(CorrSteerError, match=message):
        with steering.apply(model, **options):
            pass
    assert traces(model) == before


def compile_in_place(model):
    model.compile()
    return model


def compile_a_layer(model):
    model.model.layers[1].compile()  # which is steered
    return model


def compile_inside(model):
    model.model.compile()
    return model


def compile_forward(model):
    model.forward = torch.compile(model.forward)
    return model


@pytest.mark.parametrize(
    "compiled", [torch.compile, compile_in_place, compile_a_layer, compile_inside, compile_forward]
)
def test_a_compiled_model_is_refused(compiled):
    model = compiled(build("llama"))
    before = traces(model)
    with pytest.raises(CorrSteerError, match="already compiled by torch.compile"):
        with STEERING.apply(model):
            pass
    assert traces(model) == before


def test_generate_does_not_compile_a_steered_model_by_itself():
    model, prompts = tiny("llama"), prompts_of(LENGTHS)
    config = transformers.CompileConfig(backend="never to be used")
    config._compile_all_devices = True
    with STEERING.apply(model):
        steered = generate(model, prompts, N, cache_implementation="static", compile_config=config)
    assert steered.tolist() == [greedy_steered_by_plain_hooks("llama", prompt, N, STEERING) for prompt in prompts]


# Files


def full_steering():
    known = FeatureStatistics(0.45, 0.5, 0.75, 0.25, low=0.1, p_adjusted=0.2, coefficients={"contrastive": [1.0, None]})
    described = dataclasses.replace(feature(HookPoint(2), 3), statistics=known)
    table = {0: [feature(HookPoint(0), 7)], 2: [described, feature(HookPoint(2), 1, -0.1)]}
    provenance = {"model": "a/b", "settings": {"scale": 1.5, "layers": [1, 2]}, "naïve": None}
    steering = steering_at(HookPoint(1), HookPoint(2, "mlp_out"), coefficient=0.1 + 0.2)
    return Steering(steering.features, steering.directions, table, ["a note", "„another“"], provenance, "all", 0.3)


@pytest.mark.parametrize("steering", [full_steering(), Steering([], torch.zeros(0, WIDTH), notes=["none"])])
def test_what_is_saved_is_what_is_loaded(steering, tmp_path):
    steering.save(tmp_path / "s.safetensors")
    loaded = Steering.load(tmp_path / "s.safetensors", tiny("llama"))
    assert loaded.directions.numpy().tobytes() == steering.directions.numpy().tobytes()
    assert loaded.directions.shape == steering.directions.shape
    for name in ("features", "table", "notes", "provenance", "positions", "scale"):
        assert getattr(loaded, name) == getattr(steering, name)


@pytest.mark.parametrize("transform", [lambda d: d.T.contiguous().T, lambda d: d.to(torch.bfloat16)])
def test_directions_of_any_layout_and_dtype_are_saved_as_float32(transform, tmp_path):
    steering = Steering(STEERING.features, transform(STEERING.directions))
    steering.save(tmp_path / "s.safetensors")
    loaded = Steering.load(tmp_path / "s.safetensors").directions
    assert loaded.dtype == torch.float32 and torch.equal(loaded, steering.directions.float())


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def saved(path):
    full_steering().save(path)
    return path.read_bytes()


def steering_file(path, directions=None, **described):
    whole = {"features": [], "table": {}, "notes": [], "provenance": {}, "positions": "all", "scale": 2.0} | described
    directions = torch.zeros(len(whole["features"] or []), WIDTH) if directions is None else directions
    save_file({"directions": directions}, path, metadata={"format": FORMAT, "steering": json.dumps(whole)})


def not_finite(path):
    steering_file(path, torch.full((1, WIDTH), torch.nan), features=[dataclasses.asdict(feature(HookPoint(1)))])


DAMAGED = {
    "missing": (lambda path: None, "there is no steering file"),
    "a directory": (lambda path: path.mkdir(), "there is no steering file"),
    "no bytes": (lambda path: path.write_bytes(b""), "is damaged"),
    "truncated header": (lambda path: path.write_bytes(saved(path)[:50]), "is damaged"),
    "truncated tensor": (lambda path: path.write_bytes(saved(path)[:-1]), "is damaged"),
    "text": (lambda path: path.write_text("not a safetensors file, but long enough to hold a header"), "is damaged"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps(Payload(path.with_name("ran")))), "is damaged"),
    "a torch file": (lambda path: torch.save(Payload(path.with_name("ran")), path), "is damaged"),
    "another safetensors file": (
        lambda path: save_file({"W_dec": torch.zeros(2, 2)}, path),
        "is not a steering file of this version: its format must be .* got None",
    ),
    "another format": (
        lambda path: save_file({"directions": torch.zeros(2, 2)}, path, metadata={"format": "pt"}),
        "got 'pt'",
    ),
    "no description": (
        lambda path: save_file({"directions": torch.zeros(0, 2)}, path, metadata={"format": FORMAT}),
        "is damaged",
    ),
    "no directions": (
        lambda path: save_file({"other": torch.zeros(0, 2)}, path, metadata={"format": FORMAT, "steering": "{}"}),
        "is damaged",
    ),
    "half a description": (
        lambda path: save_file({"directions": torch.zeros(0, 2)}, path, metadata={"format": FORMAT, "steering": "{"}),
        "is damaged",
    ),
    "features of other fields": (lambda path: steering_file(path, features=[{"layer": 1}]), "is damaged"),
    "features that are null": (lambda path: steering_file(path, features=None), "is damaged"),
    "a table of other layers": (lambda path: steering_file(path, table={"one": []}), "is damaged"),
    "a table that is a list": (lambda path: steering_file(path, table=[]), "is damaged"),
    "positions that are unknown": (lambda path: steering_file(path, positions="some"), "positions must be one of"),
    "a scale that is no number": (lambda path: steering_file(path, scale=None), "scale must be a finite number"),
    "more directions than features": (
        lambda path: steering_file(path, torch.zeros(1, WIDTH)),
        r"directions must be \[0, d\]",
    ),
    "directions that are not finite": (not_finite, "directions must be finite"),
}


@pytest.mark.parametrize(("write", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_or_foreign_file_is_refused_and_never_unpickled(write, message, tmp_path):
    path = tmp_path / "s.safetensors"
    write(path)
    with pytest.raises(CorrSteerError, match=message) as error:
        Steering.load(path)
    assert "finite" in message or "directions" in message or str(path) in str(error.value)
    assert not path.with_name("ran").exists()


def test_the_payload_of_the_test_above_does_run_when_it_is_unpickled(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran"))).close()
    assert (tmp_path / "ran").exists()


def test_a_vector_of_ones_own_is_a_steering_without_statistics(tmp_path):
    model, prompts = tiny("llama"), prompts_of(LENGTHS)
    mine = Steering.from_vectors({"blocks.1.hook_resid_post": STEERING.directions[0]}, coefficient=2.5)
    (one,) = mine.features
    assert one.index is None and one.statistics is None and not one.by_chance
    with Steering(STEERING.features[:1], STEERING.directions[:1]).apply(model):
        expected = generate(model, prompts, N)
    mine.save(tmp_path / "s")
    with Steering.load(tmp_path / "s", model).apply(model):
        assert torch.equal(generate(model, prompts, N), expected)
    assert expected.tolist() != unsteered("llama")


@pytest.mark.parametrize(
    "vectors", [{}, {"blocks.1.hook_resid_post": torch.ones(1, WIDTH)}, {"a": torch.ones(2), "b": torch.ones(3)}]
)
def test_vectors_that_are_none_or_of_another_shape_are_refused(vectors):
    with pytest.raises(CorrSteerError, match=r"vectors must map hook points to tensors \[d\], one or more of one"):
        Steering.from_vectors(vectors)


def test_a_scaled_feature_scales_the_error_of_its_coefficient_too():
    known = FeatureStatistics(0.45, 0.5, 0.75, 0.25, coefficient_error=0.5)
    scaled = dataclasses.replace(feature(HookPoint(1)), statistics=known).scaled(-2)
    assert (scaled.coefficient, scaled.statistics.coefficient_error) == (-5.0, 1.0)
    assert feature(HookPoint(1)).scaled(2) == feature(HookPoint(1), coefficient=5.0)


@pytest.mark.parametrize(
    ("steering", "message"),
    [
        (Steering([feature(HookPoint(1))], torch.ones(1, 40)), "width 40, but the model's is 32"),
        (Steering([feature(HookPoint(LAYERS))], torch.ones(1, WIDTH)), "outside the model"),
    ],
)
def test_a_file_for_another_model_is_refused_only_when_the_model_is_given(steering, message, tmp_path):
    steering.save(tmp_path / "s.safetensors")
    assert Steering.load(tmp_path / "s.safetensors").features == steering.features
    with pytest.raises(CorrSteerError, match=message):
        Steering.load(tmp_path / "s.safetensors", tiny("llama"))


# Devices


def test_a_model_whose_layers_accelerate_keeps_on_the_disk_is_steered_where_they_run(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, prompts = build("llama"), prompts_of(LENGTHS)
    places = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    places |= {"model.layers.1": "disk", "model.layers.2": "disk"}
    model = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    assert next(model.model.layers[1].parameters()).device.type == "meta"
    assert device_of(model, HookPoint(1)) == torch.device("cpu")
    steering = steering_at(*(HookPoint(layer, kind) for layer in range(LAYERS) for kind in KINDS), coefficient=0.5)
    with steering.apply(model):
        steered = generate(model, prompts, N).tolist()
    assert steered == [greedy_steered_by_plain_hooks("llama", prompt, N, steering) for prompt in prompts]


def test_a_scale_that_is_not_finite_and_a_folder_that_is_not_there_are_refused(tmp_path):
    steering = Steering([], torch.zeros(0, 0))
    with pytest.raises(CorrSteerError, match="scale must be a finite number, got nan"):
        with steering.apply(build("llama"), scale=float("nan")):
            pass
    with pytest.raises(CorrSteerError, match="cannot be written .* give a path in a folder that exists"):
        steering.save(tmp_path / "none" / "s")
