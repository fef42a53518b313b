"""Hooks that stay on a model: what they add is what `apply` adds, compiled or not, and changes without compilation."""

import copy
import functools
import gc
import threading
from collections import Counter

import architectures
import pytest
import torch
import transformers
from tiny_models import ARCHITECTURES, LAYERS, WIDTH, batch_of, build, generate, prompts_of, tiny, traces

from corrsteer import Steering, apply_rows
from corrsteer.errors import CorrSteerError
from corrsteer.lm import interception, traced_passes
from corrsteer.lm.hook_points import KINDS, HookPoint
from corrsteer.lm.own_passes import prompts_of_width
from corrsteer.lm.token_positions import POSITIONS

LENGTHS, N = (2, 7, 5), 6
PROMPTS = prompts_of(LENGTHS)
BATCH = batch_of(PROMPTS)


def steering_at(*points, seed=0, d=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    return Steering.from_vectors({str(point): torch.randn(d, generator=generator) for point in points}, 2.5)


STEERINGS = {
    "one": steering_at(HookPoint(1), HookPoint(2, "mlp_out")),
    "other": steering_at(HookPoint(1), HookPoint(0, "attn_out"), seed=1),
    "none": Steering([], torch.zeros(0, WIDTH)),
}
ONE, OTHER = STEERINGS["one"], STEERINGS["other"]
FURTHER = ["blocks.0.hook_attn_out"]  # where the other is, and the one is not


@functools.cache
def applied(architecture, steering, positions="generated", scale=1.0):
    """The tokens that greedy decoding gives while a steering is applied."""
    model = build(architecture)  # one of its own, as what is installed on another adds up with it
    with STEERINGS[steering].apply(model, positions, scale):
        return generate(model, PROMPTS, N).tolist()


@pytest.fixture
def graphs():
    """How many graphs were compiled so far; what other tests have compiled is forgotten, before and after."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


# Not compiled


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 3},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=["cache", "no cache", "static cache", "prompt in chunks", "drafts"],
)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_installed_hooks_steer_the_tokens_that_apply_steers_however_generation_runs(architecture, positions, options):
    model, prompts, expected = tiny(architecture), PROMPTS, applied(architecture, "one", positions)
    if "prompt_lookup_num_tokens" in options:  # which transformers does for one prompt
        prompts, expected = PROMPTS[1:2], expected[1:2]
    with ONE.install(model, positions):
        assert generate(model, prompts, N, **options).tolist() == expected
    assert expected != applied(architecture, "none")[-len(expected) :]
    assert generate(model, PROMPTS, N).tolist() == applied(architecture, "none")


@pytest.mark.parametrize("positions", POSITIONS)
def test_drafts_of_the_models_first_layers_change_nothing(positions):
    model = build("llama")
    with ONE.install(model, positions):
        output = generate(model, PROMPTS[1:2], N, assistant_early_exit=2)
    assert output.tolist() == applied("llama", "one", positions)[1:2]


@pytest.mark.parametrize("positions", POSITIONS)
def test_installed_hooks_steer_beams_and_several_completions_as_apply_does(positions):
    model, options = tiny("llama"), {"num_beams": 3, "num_return_sequences": 2}
    with ONE.apply(model, positions):
        expected = generate(model, PROMPTS, N, **options)
    with ONE.install(model, positions):
        assert torch.equal(generate(model, PROMPTS, N, **options), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_a_pass_outside_generate_gives_the_logits_that_apply_gives(positions, side, dtype, kind):
    model, batch = tiny("llama", dtype), batch_of(PROMPTS, side)
    steering = steering_at(HookPoint(1, kind))
    with steering.apply(model, positions):
        expected = model(**batch).logits
    with steering.install(model, positions):
        assert torch.equal(model(**batch).logits, expected)  # it is rounded once
        assert torch.equal(model(batch["input_ids"], batch["attention_mask"]).logits, expected)
    assert not torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("in_generate", [True, False], ids=["generate", "forward"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_what_is_read_after_a_filled_cache_is_prompt_in_generate_and_generated_outside(positions, in_generate, steps):
    model, ids = tiny("gemma3"), torch.tensor([PROMPTS[1]])

    def logits():
        cache = model(ids[:, :-steps], use_cache=True).past_key_values
        if not in_generate:
            return model(ids[:, -steps:], past_key_values=cache).logits
        output = model.generate(
            ids, past_key_values=cache, max_new_tokens=2, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        return torch.stack(output.logits)

    with ONE.apply(model, positions):
        expected = logits()
    with ONE.install(model, positions):
        torch.testing.assert_close(logits(), expected)


@pytest.mark.parametrize("columns", [1, 6])
@pytest.mark.parametrize("positions", POSITIONS)
def test_the_beginning_of_prompts_that_is_read_ahead_has_no_last_token(positions, columns):
    model, prompt = tiny("llama"), torch.tensor([PROMPTS[1]])
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with ONE.apply(model, positions):
        expected = model.generate(prompt, max_new_tokens=2, **options).logits
    with ONE.install(model, positions):
        with prompts_of_width(len(PROMPTS[1])):
            cache = model.generate(prompt[:, :columns], max_new_tokens=1, **options).cache
        got = model.generate(prompt, cache=cache, max_new_tokens=2, **options).logits
    torch.testing.assert_close(got, expected)


def test_a_model_that_keeps_its_mask_to_itself_is_not_steered_at_padding():
    class Keeps(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, **kwargs):
            return super().forward(input_ids=input_ids, **kwargs)

    model = build("llama")
    model.__class__ = Keeps
    with steering_at(HookPoint(LAYERS - 1)).apply(model, "all"):
        expected = model(**BATCH).logits
    with steering_at(HookPoint(LAYERS - 1)).install(model, "all"):
        assert torch.equal(model(**BATCH).logits, expected)
        assert not torch.equal(model(BATCH["input_ids"]).logits, expected)  # nor is the mask kept for the next pass


def test_a_model_whose_cache_is_a_state_is_steered_where_that_says_enough():
    model, steering = architectures.build("mamba"), steering_at(HookPoint(1), d=architectures.WIDTH)
    plain = generate(model, PROMPTS[:1], N).tolist()
    for positions in ("generated", "all"):
        with steering.apply(model, positions):
            expected = generate(model, PROMPTS[:1], N).tolist()
        with steering.install(model, positions):
            assert generate(model, PROMPTS[:1], N).tolist() == expected != plain
    with steering.install(model, "prompt"):
        with pytest.raises(CorrSteerError, match="as the cache is a state that does not say"):
            generate(model, PROMPTS[:1], N)


# What is steered changes


def test_another_steering_another_scale_and_none_are_set_in_place():
    model = tiny("llama")
    with ONE.install(model, points=FURTHER, scale=0.5) as installed:
        assert generate(model, PROMPTS, N).tolist() == applied("llama", "one", scale=0.5)
        for steering, scale in (("other", 2.0), ("one", 1.0), ("other", -1.0), ("none", 1.0)):
            installed.set(STEERINGS[steering], scale)
            assert installed.steering is STEERINGS[steering] and installed.scale == scale
            assert generate(model, PROMPTS, N).tolist() == applied("llama", steering, scale=scale)
        installed.set(ONE)
        installed.set(None)
        assert installed.steering is None and generate(model, PROMPTS, N).tolist() == applied("llama", "none")


def test_installed_hooks_add_up_with_each_other_and_with_apply():
    model = tiny("llama")
    with ONE.apply(model), OTHER.apply(model), ONE.apply(model, "prompt"):
        expected = generate(model, PROMPTS, N).tolist()
    with ONE.install(model), OTHER.install(model), ONE.install(model, "prompt"):
        assert generate(model, PROMPTS, N).tolist() == expected
    with ONE.install(model), OTHER.apply(model), ONE.install(model, "prompt"):
        assert generate(model, PROMPTS, N).tolist() == expected
        assert generate(model, PROMPTS, N, cache_implementation="static").tolist() == expected
    assert generate(model, PROMPTS, N).tolist() == applied("llama", "none")


@pytest.mark.parametrize(
    ("steering", "scale", "message"),
    [
        (OTHER, 1.0, "at blocks.1.hook_resid_post, blocks.2.hook_mlp_out, got one at blocks.0.hook_attn_out"),
        (steering_at(HookPoint(1), d=40), 1.0, "width 40, but the model's is 32"),
        (ONE, float("inf"), "scale must be a finite number, got inf"),
        (ONE, 1e300, "scale must leave what is added finite"),
        ("one", 1.0, "steering must be a Steering, got 'one'"),
    ],
)
def test_what_cannot_be_set_is_refused_and_the_steering_stays(steering, scale, message):
    model = tiny("llama")
    with ONE.install(model) as installed:
        with pytest.raises(CorrSteerError, match=message):
            installed.set(steering, scale)
        assert installed.steering is ONE and installed.scale == 1.0
        assert generate(model, PROMPTS, N).tolist() == applied("llama", "one")


# The model


def test_a_model_is_left_as_it_was_when_hooks_are_removed_in_any_order():
    model = build("llama")
    before, own = traces(model), vars(type(model)).get("generate")
    first, second = ONE.install(model), OTHER.install(model)
    assert traces(model) != before and model.state_dict().keys() == build("llama").state_dict().keys()
    first.remove()
    first.remove()  # which does nothing
    assert generate(model, PROMPTS, N).tolist() == applied("llama", "other")
    second.remove()
    assert traces(model) == before and vars(type(model)).get("generate") is own and not interception._classes


def test_a_model_whose_hooks_were_never_removed_is_freed_with_all_that_was_put_on_its_class():
    model = build("llama")
    ONE.install(model)
    del model
    gc.collect()
    assert not interception._classes and "generate" not in vars(transformers.LlamaForCausalLM)
    assert not any(traced_passes._traced.values())


def test_a_pass_that_raises_leaves_nothing_behind():
    model = build("llama")
    with ONE.install(model):
        with pytest.raises(IndexError):
            model(torch.tensor([[999]]))
        with pytest.raises(CorrSteerError, match="run outside a forward pass of the model"):
            model.model.layers[1](torch.zeros(1, 2, WIDTH), position_embeddings=(torch.zeros(1), torch.zeros(1)))
        assert generate(model, PROMPTS, N).tolist() == applied("llama", "one")


def test_a_copy_of_the_model_is_not_steered():
    model = tiny("llama")
    with ONE.install(model):
        twin = copy.deepcopy(model)
        assert generate(twin, PROMPTS, N).tolist() == applied("llama", "none")
        assert generate(twin, PROMPTS, N).tolist() == applied("llama", "none")


def test_hooks_installed_in_inference_mode_may_be_set_outside_of_it():
    model = build("llama")
    with torch.inference_mode():
        installed = ONE.install(model, points=FURTHER)
        assert generate(model, PROMPTS, N).tolist() == applied("llama", "one")
    installed.set(OTHER)
    assert generate(model, PROMPTS, N).tolist() == applied("llama", "other")
    installed.remove()


def test_a_layer_that_is_replaced_afterwards_is_noticed():
    model = build("llama")
    with ONE.install(model):
        model.model.layers[1] = build("llama").model.layers[1]
        with pytest.raises(CorrSteerError, match="each of the 2 hook points .* must run once .* but 1 ran"):
            model(**BATCH)


# What is refused


def with_negative_prompt(model):
    generate(model, PROMPTS, 1, guidance_scale=2.0)


def padded_on_the_right(model):
    model.generate(**batch_of(PROMPTS, "right"), max_new_tokens=1)


def without_a_prompt(model):
    model.generate(bos_token_id=1, max_new_tokens=1)


def in_another_thread(model):
    raised = []

    def other():
        try:
            generate(model, PROMPTS, 1)
        except CorrSteerError as error:
            raised.append(error)

    def meanwhile(ids, scores, **_):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return torch.zeros(len(ids), dtype=torch.bool)

    generate(model, PROMPTS, 1, stopping_criteria=[meanwhile])
    raise raised[0]


def after_a_cache_that_holds_more(model):
    cache = model(torch.tensor([PROMPTS[1]]), use_cache=True).past_key_values
    model.generate(torch.tensor([PROMPTS[2]]), past_key_values=cache, max_new_tokens=1)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (after_a_cache_that_holds_more, "was given a cache of 7 tokens, but neither its prompts nor"),
        (with_negative_prompt, "guidance_scale must be 1, "),
        (padded_on_the_right, "prompts must be padded on the left"),
        (without_a_prompt, "generate must be given input_ids or inputs_embeds, got neither"),
        (lambda model: generate(model, PROMPTS, 1, prefill_chunk_size=1), "prefill_chunk_size must be 2 or more"),
        (in_another_thread, "generates in one thread at a time"),
        (lambda model: model.generate_batch([[1, 2]]), "use model.generate"),
        (lambda model: model(attention_mask=BATCH["attention_mask"]), "must be given input_ids"),
    ],
)
def test_a_generation_whose_tokens_cannot_be_told_apart_is_refused_and_the_next_is_not(run, message):
    model = tiny("llama")
    with ONE.install(model):
        with pytest.raises(CorrSteerError, match=message):
            run(model)
        assert generate(model, PROMPTS, N).tolist() == applied("llama", "one")


@pytest.mark.parametrize(
    ("steering", "options", "message"),
    [
        (ONE, {"positions": "last"}, "positions must be one of generated, all, prompt, got 'last'"),
        (ONE, {"scale": "much"}, "scale must be a finite number, got 'much'"),
        (ONE, {"points": "blocks.0.hook_attn_out"}, r"points must be a sequence of hook points, such as \['blocks"),
        (ONE, {"points": ["blocks.0.hook_z"]}, "hook point 'blocks.0.hook_z' cannot be used"),
        (ONE, {"points": ["blocks.7.hook_resid_post"]}, "outside the model, whose layers are 0..2"),
        (steering_at(HookPoint(LAYERS)), {}, "outside the model, whose layers are 0..2"),
        (steering_at(HookPoint(1), d=40), {}, "width 40, but the model's is 32"),
    ],
)
def test_what_cannot_be_installed_is_refused_and_the_model_left_as_it_was(steering, options, message):
    model = tiny("llama")
    before = traces(model)
    with pytest.raises(CorrSteerError, match=message):
        steering.install(model, **options)
    assert traces(model) == before and not interception._classes


def test_the_virtual_tokens_of_peft_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(CorrSteerError, match="with PEFT's virtual tokens must be steered by Steering.apply"):
        ONE.install(peft.get_peft_model(build("llama"), config))


def test_a_peft_adapter_is_steered():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    with ONE.apply(model):
        expected = generate(model, PROMPTS, N)
    with ONE.install(model):
        assert torch.equal(generate(model, PROMPTS, N), expected)
    assert not torch.equal(generate(model, PROMPTS, N), expected)


# Compiled


def compiled_forward(model, backend):
    model.forward = torch.compile(model.forward, fullgraph=True, backend=backend)
    return model


@pytest.mark.parametrize(
    ("architecture", "positions", "cache"),
    [
        ("llama", "generated", "dynamic"),
        ("llama", "prompt", "static"),
        ("gemma2", "prompt", "dynamic"),
        ("gemma2", "all", "static"),
        ("gemma2", "generated", "static"),
        ("gpt_neox", "generated", "static"),
        ("qwen3", "generated", "static"),
    ],
)
def test_a_compiled_model_is_steered_and_its_steering_changed_without_compiling_again(
    architecture, positions, cache, graphs
):
    model, options = build(architecture), {"cache_implementation": cache}
    with ONE.install(model, positions, points=FURTHER) as installed:
        compiled_forward(model, "eager")
        assert generate(model, PROMPTS, N, **options).tolist() == applied(architecture, "one", positions)
        before = graphs()
        for steering, scale in (("other", 1.0), ("other", -1.0), ("none", 1.0)):
            installed.set(STEERINGS[steering], scale)
            expected = applied(architecture, steering, positions, scale)
            assert generate(model, PROMPTS, N, **options).tolist() == expected
        installed.set(None)
        assert generate(model, PROMPTS, N, **options).tolist() == applied(architecture, "none")
        assert graphs() == before > 1


@pytest.mark.usefixtures("graphs")
def test_a_compiled_decode_step_reads_tensors_and_no_number_of_pythons_which_a_cuda_graph_would_keep():
    def inputs_of_a_decode_step(model):
        seen = []

        def backend(graph, inputs):
            seen.append(Counter(isinstance(one, torch.Tensor) for one in inputs))
            return graph.forward

        torch._dynamo.reset()
        generate(compiled_forward(model, backend), PROMPTS, 3, cache_implementation="static")
        return seen[-1]

    plain = inputs_of_a_decode_step(build("gemma2"))
    model = build("gemma2")
    with ONE.install(model, "prompt"):
        assert inputs_of_a_decode_step(model) - plain == {True: 3}  # two vectors, and where prompts end


def test_apply_steers_a_compiled_model_by_the_hooks_that_were_installed_on_it(graphs):
    model = build("llama")
    with ONE.install(model, points=FURTHER) as installed:
        installed.set(None)
        compiled_forward(model, "eager")
        assert generate(model, PROMPTS, N).tolist() == applied("llama", "none")
        before = graphs()
        with ONE.apply(model, scale=2.0):
            assert generate(model, PROMPTS, N).tolist() == applied("llama", "one", scale=2.0)
            installed.set(OTHER)
            with ONE.apply(model), ONE.apply(model, scale=-3.0):  # which comes to none of the one
                assert generate(model, PROMPTS, N).tolist() == applied("llama", "other")
        with pytest.raises(ZeroDivisionError), ONE.apply(model):
            raise ZeroDivisionError
        installed.set(None)
        assert generate(model, PROMPTS, N).tolist() == applied("llama", "none") and graphs() == before
        with pytest.raises(CorrSteerError, match="for positions generated and .*, got positions='all' and blocks"):
            with ONE.apply(model, "all"):
                pass
        with pytest.raises(CorrSteerError, match="got positions='generated' and blocks.2.hook_attn_out"):
            with steering_at(HookPoint(2, "attn_out")).apply(model):
                pass
        with pytest.raises(CorrSteerError, match="already compiled by torch.compile"):
            with apply_rows(model, [ONE, OTHER], [0, 1, -1]):
                pass
    with pytest.raises(CorrSteerError, match="already compiled by torch.compile"):
        with ONE.apply(model):
            pass


@pytest.mark.usefixtures("graphs")
def test_apply_steers_what_torch_compile_made_of_a_model_with_installed_hooks():
    model = build("llama")
    with torch.no_grad(), ONE.install(model, points=FURTHER):
        compiled = torch.compile(model, backend="eager")
        compiled(**BATCH)
        with OTHER.apply(compiled):
            both = compiled(**BATCH).logits
            assert torch.equal(model(**BATCH).logits, both)
    with torch.no_grad(), ONE.apply(model), OTHER.apply(model):
        torch.testing.assert_close(model(**BATCH).logits, both)


def test_inductor_steers_as_eager_does_and_a_swap_compiles_nothing(graphs):
    model = build("llama")
    with torch.no_grad(), ONE.install(model, points=FURTHER) as installed:
        compiled = torch.compile(model, fullgraph=True)
        for steering in (ONE, OTHER, None, ONE):
            installed.set(steering)
            torch.testing.assert_close(compiled(**BATCH).logits, model(**BATCH).logits, rtol=1e-4, atol=1e-4)
            assert graphs() == 1
        steered = compiled(**BATCH).logits
    with torch.no_grad():  # what was compiled is steered no longer
        assert not torch.allclose(model(**BATCH).logits, steered, atol=0.1)
        torch.testing.assert_close(compiled(**BATCH).logits, model(**BATCH).logits, rtol=1e-4, atol=1e-4)


def test_generate_compiles_a_model_with_installed_hooks_by_itself(graphs):
    model, config = build("llama"), transformers.CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True  # as on a GPU
    options = {"cache_implementation": "static", "compile_config": config}
    with ONE.install(model, points=FURTHER) as installed:
        assert generate(model, PROMPTS, N, **options).tolist() == applied("llama", "one")
        before = graphs()
        installed.set(OTHER)
        assert generate(model, PROMPTS, N, **options).tolist() == applied("llama", "other")
        assert graphs() == before > 0
        with ONE.apply(model):  # which no compiled graph knows of
            both = generate(model, PROMPTS, N, **options).tolist()
    with ONE.apply(model), OTHER.apply(model):
        assert generate(model, PROMPTS, N).tolist() == both
    with pytest.raises(CorrSteerError, match="was compiled by a call of generate with a static cache"):
        ONE.install(model)


@pytest.mark.parametrize("compiled", [torch.compile, compiled_forward])
def test_a_model_that_is_compiled_already_is_refused_and_install_named(compiled):
    model = compiled(build("llama"), backend="eager")
    for enter in (ONE.install, ONE.apply):
        with pytest.raises(CorrSteerError, match="already compiled by torch.compile.*Steering.install first"):
            with enter(model):
                pass
