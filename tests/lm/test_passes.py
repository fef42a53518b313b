"""Every way in which a model's layers come to run: which tokens each pass reads is known, or the call is refused."""

import contextlib
import copy
import functools
import inspect
import json
import pickle
import threading
from types import SimpleNamespace

import accelerate
import architectures
import peft
import pytest
import torch
import transformers
from tiny_models import PAD, WIDTH, batch_of, build, generate, prompts_of, tiny, traces

from corrsteer import Steering, apply_rows
from corrsteer.errors import CorrSteerError
from corrsteer.lm import passes
from corrsteer.lm.capture import Capture
from corrsteer.lm.hook_points import HookPoint
from corrsteer.lm.token_positions import POSITIONS

LENGTHS, N = (2, 7, 5), 5
VECTOR = 2 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
STEERING = Steering.from_vectors({"blocks.1.hook_resid_post": VECTOR})
OTHER = Steering.from_vectors({"blocks.1.hook_resid_post": -VECTOR})


class PlainHook:
    """Adds a vector at the output of decoder layer 1, by counting the tokens that it has seen of a generation.

    The first pass reads `virtual` tokens that are none, then the prompts.
    """

    def __init__(self, layer, positions="generated", vector=VECTOR, virtual=0, lengths=LENGTHS):
        self.positions, self.vector, self.virtual = positions, vector, virtual
        self.lengths, self.width, self.read = lengths, max(lengths), 0
        self.handle = layer.register_forward_hook(self)

    def __call__(self, module, args, h):
        steps = h.shape[1]
        start = self.read if steps == 1 else 0
        self.read = start + steps
        column = torch.arange(start, start + steps) - self.virtual  # of the prompt's
        padding = column < self.width - torch.tensor(self.lengths)[:, None]
        chosen = {"generated": column >= self.width - 1, "all": column >= 0, "prompt": column < self.width}
        where = (chosen[self.positions] & (column >= 0) & ~padding)[..., None]
        return torch.where(where, (h.float() + self.vector).to(h.dtype), h)


def expected(model, layer, prompts=None, n=N, **options):
    """What a plain hook makes of a generation."""
    hooking = {k: options.pop(k) for k in ("positions", "vector", "virtual") if k in options}
    prompts = prompts or prompts_of(LENGTHS)
    hook = PlainHook(layer, lengths=[len(p) for p in prompts], **hooking)
    try:
        return generate(model, prompts, n, **options).tolist()
    finally:
        hook.handle.remove()


@functools.cache
def steered(positions="generated", **options):
    model = build("llama")  # one that no context is open on
    found = expected(model, model.model.layers[1], positions=positions, **options)
    assert found != generate(model, prompts_of(LENGTHS), N).tolist()
    return found


# Calls of generate within one another


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_a_logits_processor_that_generates_does_not_change_which_positions_are_steered(positions, use_cache):
    model, inner = tiny("llama"), []

    def process(ids, scores):
        inner.append(generate(model, prompts_of((3, 2, 4), seed=4), 2, use_cache=use_cache).tolist())
        return scores

    with STEERING.apply(model, positions):
        outer = generate(model, prompts_of(LENGTHS), N, use_cache=use_cache, logits_processor=[process]).tolist()
    assert outer == steered(positions)
    assert inner == [expected(model, model.model.layers[1], prompts_of((3, 2, 4), seed=4), 2, positions=positions)] * N


def test_sublayers_may_be_looked_for_inside_a_generation():
    model, found = build("llama"), []
    steering = Steering.from_vectors({"blocks.1.hook_mlp_out": VECTOR})

    def process(ids, scores):
        with steering.apply(model):
            found.append(ids)
        return scores

    with STEERING.apply(model):
        assert generate(model, prompts_of(LENGTHS), N, logits_processor=[process]).tolist() == steered()
    assert len(found) == N


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize(
    "options",
    [
        lambda: {"assistant_early_exit": 2},
        lambda: {"assistant_model": tiny("llama")},
        lambda: {"assistant_model": build("llama")},
        lambda: {"prompt_lookup_num_tokens": 2},
    ],
    ids=["early exit", "itself", "another model", "prompt lookup"],
)
def test_speculative_decoding_gives_what_the_steered_model_gives(options, positions):
    model, prompts = tiny("llama"), prompts_of((7,), seed=5)
    plain = expected(model, model.model.layers[1], prompts, positions=positions)
    with STEERING.apply(model, positions):
        assert generate(model, prompts, N, **options()).tolist() == plain
    assert plain != generate(model, prompts, N).tolist()


def test_a_class_whose_own_generate_calls_that_of_its_parent_is_steered():
    class Polite(transformers.LlamaForCausalLM):
        def generate(self, *args, **kwargs):
            return super().generate(*args, **kwargs)

    model = Polite(tiny("llama").config).eval()
    model.load_state_dict(tiny("llama").state_dict())
    for outer in (tiny("llama"), model):  # whichever class is intercepted first
        with STEERING.apply(outer), STEERING.apply(model, scale=0.0 if outer is model else 1.0):
            assert generate(model, prompts_of(LENGTHS), N, use_cache=False).tolist() == steered()
    assert "generate" in vars(Polite) and "generate" not in vars(transformers.LlamaForCausalLM)


@pytest.mark.parametrize("lengths", [(1,), (4,)])
def test_guidance_is_refused(lengths):
    with STEERING.apply(tiny("llama")), pytest.raises(CorrSteerError, match="something other than what is generated"):
        generate(tiny("llama"), prompts_of(lengths), 3, guidance_scale=1.5)


def test_guidance_by_a_negative_prompt_is_refused():
    with STEERING.apply(tiny("llama")), pytest.raises(CorrSteerError, match="something other than what is generated"):
        ids = torch.tensor(prompts_of((9,)))
        generate(tiny("llama"), prompts_of((4,)), 3, guidance_scale=1.5, negative_prompt_ids=ids)


def test_guidance_by_a_negative_prompt_longer_than_the_prompt_is_refused_without_a_cache_too():
    with STEERING.apply(tiny("llama")), pytest.raises(CorrSteerError, match="something other than what is generated"):
        options = {"negative_prompt_ids": torch.tensor(prompts_of((9,))), "use_cache": False}
        generate(tiny("llama"), prompts_of((4,)), 3, guidance_scale=1.5, **options)


def test_new_tokens_after_a_filled_cache_that_nothing_covers_are_refused():
    model, ids = tiny("llama"), torch.tensor(prompts_of((10,)))
    name = next(name for name in passes.CACHES if name in inspect.signature(model.forward).parameters)
    with STEERING.apply(model):
        for mask in (None, torch.ones_like(ids)):
            filled = transformers.DynamicCache(config=model.config)
            model(ids[:, :6], **{name: filled})
            refused = pytest.raises(CorrSteerError, match="which tokens are prompt cannot be known; give it an")
            with refused if mask is None else contextlib.nullcontext():
                model.generate(ids[:, 6:], attention_mask=mask, max_new_tokens=2, do_sample=False, **{name: filled})


def test_a_model_with_an_encoder_is_refused():
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=61, **sizes))
    with pytest.raises(CorrSteerError, match="must be a decoder alone, got T5ForConditionalGeneration"):
        with STEERING.apply(model):
            pass


def test_a_generate_of_the_models_own_that_takes_its_prompts_alone_is_steered():
    class Own(transformers.LlamaForCausalLM):
        def generate(self, input_ids):
            for _ in range(N):
                input_ids = torch.cat([input_ids, self(input_ids).logits[:, -1:].argmax(-1)], 1)
            return input_ids

    model = Own(tiny("llama").config).eval()
    model.load_state_dict(tiny("llama").state_dict())
    prompts = prompts_of((6,))
    with STEERING.apply(model):
        assert model.generate(torch.tensor(prompts))[:, 6:].tolist() == expected(
            tiny("llama"), tiny("llama").model.layers[1], prompts
        )


def test_continuous_batching_is_refused():
    with STEERING.apply(tiny("llama")), pytest.raises(CorrSteerError, match="generate_batch packs the tokens of many"):
        tiny("llama").generate_batch([[1, 2, 3]])
    assert "init_continuous_batching" not in vars(type(tiny("llama")))


def test_a_pipeline_is_steered():
    model = tiny("llama")
    pipeline = transformers.pipeline("text-generation", model=model, tokenizer=Digits())
    with STEERING.apply(model):
        output = pipeline("3 4 5", max_new_tokens=N, do_sample=False, return_full_text=False)
    plain = expected(model, model.model.layers[1], [[3, 4, 5]])
    assert output[0]["generated_text"] == " ".join(map(str, plain[0]))


class Digits(transformers.PreTrainedTokenizer):
    """Words are token ids."""

    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self):
        super().__init__(pad_token="0")

    vocab_size = property(lambda self: 61)

    def get_vocab(self):
        return {str(i): i for i in range(61)}

    def _tokenize(self, text):
        return text.split()

    def _convert_token_to_id(self, token):
        return int(token)

    def _convert_id_to_token(self, index):
        return str(index)

    def convert_tokens_to_string(self, tokens):
        return " ".join(tokens)


# A generate that was taken before


@pytest.mark.parametrize("taken", [lambda model: model.generate, lambda model: functools.partial(model.generate)])
def test_a_generate_taken_from_the_model_before_is_steered_with_a_cache_and_refused_without(taken):
    model = tiny("llama")
    bound, batch = taken(model), batch_of(prompts_of(LENGTHS))
    with STEERING.apply(model):
        assert bound(**batch, max_new_tokens=N, do_sample=False)[:, max(LENGTHS) :].tolist() == steered()
        with pytest.raises(CorrSteerError, match="generate was taken from the model before"):
            bound(**batch, max_new_tokens=N, do_sample=False, use_cache=False)


def test_a_generate_taken_before_is_refused_where_it_reads_prompts_in_chunks():
    model = tiny("llama")
    bound, batch = model.generate, batch_of(prompts_of(LENGTHS))
    with STEERING.apply(model), pytest.raises(CorrSteerError, match="generate was taken from the model before"):
        bound(**batch, max_new_tokens=N, do_sample=False, prefill_chunk_size=3)


def test_a_shallow_copy_is_steered_with_a_cache_and_refused_without():
    model = build("llama")
    twin = copy.copy(model)
    with STEERING.apply(model):
        assert generate(twin, prompts_of(LENGTHS), N).tolist() == steered()
        with pytest.raises(CorrSteerError, match="generate was taken from the model before"):
            generate(twin, prompts_of(LENGTHS), N, use_cache=False)


# PEFT


def adapted(kind):
    """A model with an adapter, and how many virtual tokens a pass reads before a prompt's."""
    torch.manual_seed(0)
    task = {"task_type": "CAUSAL_LM"}
    config, in_pass = {
        "lora": (peft.LoraConfig(**task, init_lora_weights=False, target_modules=["q_proj", "v_proj"]), 0),
        "prompt tuning": (peft.PromptTuningConfig(**task, num_virtual_tokens=3), 3),
        "p-tuning": (peft.PromptEncoderConfig(**task, num_virtual_tokens=3, encoder_hidden_size=16), 3),
        "prefix tuning": (peft.PrefixTuningConfig(**task, num_virtual_tokens=3), 0),
    }[kind]
    return peft.get_peft_model(build("llama"), config).eval(), in_pass


def refused_if_peft_is_older_than_transformers(model, use_cache=True):
    """Where a generation works, or is refused as PEFT itself goes wrong: its virtual tokens are lost, or come again at
    each step, with a transformers that calls the cache by another name."""
    prompts, of_prefix = prompts_of(LENGTHS), model.active_peft_config.peft_type == "PREFIX_TUNING"
    if of_prefix:  # which cannot do without a cache
        first = [int(model(torch.tensor([prompt])).logits[0, -1].argmax()) for prompt in prompts]
        right = first == [int(generate(model, [prompt], 1)) for prompt in prompts]
    else:
        cached = generate(model, prompts, N, use_cache=use_cache)
        right = torch.equal(cached, generate(model, prompts, N, use_cache=False))
    if right:
        return contextlib.nullcontext()
    return pytest.raises(CorrSteerError, match="PEFT's .* with a transformers that is newer than it")


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("kind", ["lora", "prompt tuning", "p-tuning", "prefix tuning"])
@pytest.mark.parametrize("of", ["the adapter", "the model inside"])
def test_a_model_with_an_adapter_is_steered_at_its_prompts_and_completions(of, kind, use_cache, positions):
    if kind == "prefix tuning" and not use_cache:
        pytest.skip("a prefix is a cache")
    model, in_pass = adapted(kind)
    refused = refused_if_peft_is_older_than_transformers(model, use_cache)
    layer, prompts = model.get_base_model().model.layers[1], prompts_of(LENGTHS)
    plain = expected(model, layer, positions=positions, virtual=in_pass, use_cache=use_cache)
    works = isinstance(refused, contextlib.nullcontext)
    assert not works or plain != generate(model, prompts, N, use_cache=use_cache).tolist()
    with STEERING.apply(model if of == "the adapter" else model.get_base_model(), positions), refused:
        assert generate(model, prompts, N, use_cache=use_cache).tolist() == plain
    if kind == "lora" or (kind in ("prompt tuning", "p-tuning") and not use_cache):
        assert works


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kind", ["lora", "prompt tuning", "prefix tuning"])
def test_a_pass_of_a_model_with_an_adapter_outside_generate_reads_prompts(kind, positions):
    model, in_pass = adapted(kind)
    hook = PlainHook(model.get_base_model().model.layers[1], positions, virtual=in_pass)
    batch = batch_of(prompts_of(LENGTHS))
    plain = model(**batch).logits
    hook.handle.remove()
    with STEERING.apply(model, positions):
        torch.testing.assert_close(model(**batch).logits, plain)


@pytest.mark.parametrize("kind", ["lora", "prompt tuning", "prefix tuning"])
@pytest.mark.parametrize("positions", ["generated", "all"])
def test_virtual_tokens_are_not_captured(kind, positions):
    model, _ = adapted(kind)
    prompts = [1] * len(LENGTHS) if positions == "generated" else LENGTHS
    for use_cache in (True, False) if kind != "prefix tuning" else (True,):
        refused = refused_if_peft_is_older_than_transformers(model, use_cache)
        capture = Capture(model, {1: HookPoint(1)}, stop_tokens=[], positions=positions, max_new_tokens=3)
        with capture, refused:
            criteria = [capture.stopping_criterion]
            generate(model, prompts_of(LENGTHS), 3, stopping_criteria=criteria, use_cache=use_cache)
            assert capture.packed(1)[1].diff().tolist() == [length + 2 for length in prompts]


# Threads


def in_threads(*functions):
    """What functions return that run at once; the first error is raised."""
    results, errors = [None] * len(functions), []

    def run(at):
        try:
            results[at] = functions[at]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def test_threads_share_a_context_that_was_entered_before_them():
    model, prompts = tiny("llama"), [prompts_of((3, 5), seed=s) for s in range(4)]
    plain = [expected(model, model.model.layers[1], p) for p in prompts]
    with STEERING.apply(model):
        for _ in range(5):
            runs = [lambda p=p: [generate(model, p, N).tolist() for _ in range(4)] for p in prompts]
            assert in_threads(*runs) == [[one] * 4 for one in plain]


def test_threads_are_steered_each_by_its_own_context():
    model, prompts = tiny("llama"), prompts_of(LENGTHS)
    both = [steered(), expected(model, model.model.layers[1], vector=-VECTOR)]

    def run(steering):
        found = []
        for _ in range(10):
            with steering.apply(model):
                found.append(generate(model, prompts, N).tolist())
        return found

    before = traces(model)
    assert in_threads(lambda: run(STEERING), lambda: run(OTHER)) == [[one] * 10 for one in both]
    assert traces(model) == before


def test_a_capture_sees_its_own_thread_alone():
    model, prompts = tiny("llama"), prompts_of(LENGTHS)
    inside, done = threading.Event(), threading.Event()

    def other():
        inside.wait(10)
        generate(model, prompts_of((4, 4)), N)
        done.set()

    def captured():
        with Capture(model, {1: HookPoint(1)}, stop_tokens=[], max_new_tokens=N) as capture:
            inside.set()
            done.wait(10)
            generate(model, prompts, N, stopping_criteria=[capture.stopping_criterion])
        return capture.packed(1)[0]

    x, _ = in_threads(captured, other)
    inside.set(), done.set()
    assert torch.equal(x, captured())


def test_a_context_may_be_left_in_another_thread():
    model = build("llama")
    before, context = traces(model), STEERING.apply(model)
    context.__enter__()
    in_threads(lambda: context.__exit__(None, None, None))
    assert traces(model) == before and model not in passes._followed and "generate" not in vars(type(model))


def test_a_pass_that_another_thread_had_begun_before_a_context_goes_on():
    model, batch = build("llama"), batch_of(prompts_of(LENGTHS))
    plain, inside, go = model(**batch).logits, threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        go.wait(10)

    def steer():
        inside.wait(10)
        with STEERING.apply(model):
            go.set()
            done.wait(10)

    def run():
        try:
            return model(**batch).logits
        finally:
            done.set()

    done = threading.Event()
    model.model.layers[0].register_forward_hook(wait)
    assert torch.equal(in_threads(run, steer)[0], plain)


def test_whether_a_capture_is_steered_by_another_thread_is_not_guessed():
    model = tiny("llama")

    def captured(steering):
        with Capture(model, {1: HookPoint(1)}, stop_tokens=[], max_new_tokens=2) as capture, steering:
            generate(model, prompts_of(LENGTHS), 2, stopping_criteria=[capture.stopping_criterion])
        return capture.packed(1)[0]

    plain = captured(contextlib.nullcontext())
    with STEERING.apply(model):
        with pytest.raises(CorrSteerError, match="another thread steers the model"):
            in_threads(lambda: captured(contextlib.nullcontext()))
        assert torch.equal(in_threads(lambda: captured(STEERING.apply(model, scale=0.0)))[0], plain)


# Copies and files


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_inside_a_context_is_a_model_of_its_own_and_not_steered(copied):
    model, prompts = build("llama"), prompts_of(LENGTHS)
    plain = generate(model, prompts, N).tolist()
    with STEERING.apply(model):
        twin = copied(model)
        assert generate(twin, prompts, N).tolist() == plain
        assert generate(model, prompts, N).tolist() == steered()
    with torch.no_grad():
        twin.model.embed_tokens.weight.neg_()
    assert generate(twin, prompts, N).tolist() != plain == generate(model, prompts, N).tolist()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.modules())
    again = expected(twin, twin.model.layers[1])
    with STEERING.apply(twin):
        assert generate(twin, prompts, N).tolist() == again


def test_a_model_saved_inside_a_context_is_the_one_saved_outside(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "outside")
    with STEERING.apply(model):
        generate(model, prompts_of(LENGTHS), 1)
        model.save_pretrained(tmp_path / "inside")
    for file in (tmp_path / "outside").iterdir():
        assert file.read_bytes() == (tmp_path / "inside" / file.name).read_bytes()
    assert "disable_compile" not in json.loads((tmp_path / "inside" / "generation_config.json").read_text())


def test_a_generation_configuration_that_is_given_is_left_as_it_was():
    config = transformers.GenerationConfig(max_new_tokens=N, do_sample=False, pad_token_id=PAD)
    before, batch = config.to_dict(), batch_of(prompts_of(LENGTHS))
    with STEERING.apply(tiny("llama")):
        for output in (
            tiny("llama").generate(**batch, generation_config=config),
            tiny("llama").generate(batch["input_ids"], config, attention_mask=batch["attention_mask"]),
        ):
            assert output[:, max(LENGTHS) :].tolist() == steered()
    assert config.to_dict() == before


def test_asking_for_a_compiled_generation_is_refused():
    with STEERING.apply(tiny("llama")), pytest.raises(CorrSteerError, match="disable_compile must not be False"):
        generate(tiny("llama"), prompts_of(LENGTHS), 1, disable_compile=False)


# Passes outside generate


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_model_inside_reads_prompts_after_a_generation_too(positions):
    model, batch = tiny("llama"), batch_of(prompts_of(LENGTHS))
    hook = PlainHook(model.model.layers[1], positions)
    plain = model.model(**batch).last_hidden_state
    hook.handle.remove()
    with STEERING.apply(model, positions):
        generate(model, prompts_of((4, 4, 4)), 2)
        torch.testing.assert_close(model.model(**batch).last_hidden_state, plain)


def test_a_pass_within_a_pass_reads_what_it_is_given():
    model, outer, batch = tiny("llama"), batch_of(prompts_of(LENGTHS)), batch_of(prompts_of((3, 4)))
    inner = []

    def again(module, args, output):
        if not inner:
            inner.append(None)
            inner[0] = model.model(**batch).last_hidden_state

    with STEERING.apply(model):
        alone, plain = model.model(**batch).last_hidden_state, model(**outer).logits
        handle = model.model.layers[0].register_forward_hook(again)
        try:
            assert torch.equal(model(**outer).logits, plain) and torch.equal(inner[0], alone)
            inner.clear()
            with pytest.raises(CorrSteerError, match="something other than what is generated"):
                generate(model, prompts_of(LENGTHS), N)
        finally:
            handle.remove()


def test_a_decode_step_outside_generate_from_a_cache_that_is_a_state_needs_a_mask():
    model, ids = architectures.build("mamba"), torch.tensor(prompts_of((6,)))
    steering = Steering.from_vectors({"blocks.1.hook_resid_post": VECTOR})
    output = model(ids[:, :-1], use_cache=True)
    state = {name: output[name] for name in passes.CACHES if name in output}
    with steering.apply(model):
        with pytest.raises(CorrSteerError, match="how many tokens were read before cannot be known"):
            model(ids[:, -1:], **copy.deepcopy(state))
        mask = torch.ones_like(ids)
        found = model(ids[:, -1:], **copy.deepcopy(state), attention_mask=mask).logits
    hook = model.backbone.layers[1].register_forward_hook(lambda m, a, h: h + VECTOR)
    torch.testing.assert_close(found, model(ids[:, -1:], **copy.deepcopy(state), attention_mask=mask).logits)
    hook.remove()


@pytest.mark.parametrize("mask", [SimpleNamespace(shape=(3, 1, 7, 7)), torch.ones(3, 5), torch.ones(3, 7, 7)])
def test_a_mask_that_does_not_say_which_tokens_are_padding_is_refused(mask):
    reading = passes.Pass(3, 7, WIDTH, 0, 7, mask=mask)
    with pytest.raises(CorrSteerError, match="which does not say which tokens are padding"):
        reading.select(torch.zeros(3, 7, WIDTH), "all")


def test_a_mask_of_each_kind_of_layer_that_is_none_is_no_padding():
    reading = passes.Pass(2, 3, WIDTH, 0, 3, mask={"full_attention": None, "sliding_attention": None})
    where = reading.select(torch.zeros(2, 3, WIDTH), "generated")
    assert where is not None and where.tolist() == [[False, False, True]] * 2


# Layers that do not run


def frozen(model):
    freeze(model.model.layers[1])


def freeze(layer):
    """Make a layer's computation a recorded graph, as a captured CUDA graph is."""
    recorded = copy.deepcopy(layer).forward
    layer.__class__ = type("Frozen", (type(layer),), {"__call__": lambda self, *a, **k: recorded(*a, **k)})


def left_out(model):
    model.model.config.num_hidden_layers = 1


@pytest.mark.parametrize("broken", [frozen, left_out])
@pytest.mark.parametrize("what", ["steered", "captured"])
def test_a_layer_that_does_not_run_in_a_pass_is_refused(broken, what):
    model = build("llama")
    with STEERING.apply(model):
        pass
    broken(model)
    point = HookPoint(1)
    context = STEERING.apply(model) if what == "steered" else Capture(model, {1: point}, stop_tokens=[])
    with context, pytest.raises(CorrSteerError, match="blocks.1.hook_resid_post did not run"):
        generate(model, prompts_of(LENGTHS), 2)


def test_a_layer_that_does_not_run_is_refused_in_training_too_unless_the_model_drops_layers():
    model = architectures.build("opt").train()
    steering = Steering.from_vectors({"blocks.1.hook_resid_post": VECTOR})
    with steering.apply(model):
        model(torch.ones(1, 3, dtype=torch.int64))
    freeze(model.model.decoder.layers[1])
    with steering.apply(model):
        with pytest.raises(CorrSteerError, match="blocks.1.hook_resid_post did not run"):
            model(torch.ones(1, 3, dtype=torch.int64))
        model.config.layerdrop = 0.5
        model(torch.ones(1, 3, dtype=torch.int64))


def test_an_interrupt_leaves_nothing_behind():
    model = build("llama")

    def interrupt(*_):
        raise KeyboardInterrupt

    with STEERING.apply(model):
        handle = model.model.layers[2].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            generate(model, prompts_of(LENGTHS), N)
        handle.remove()
        assert generate(model, prompts_of(LENGTHS), N).tolist() == steered()
        with pytest.raises(CorrSteerError, match="layers run outside a forward pass"):
            h = torch.zeros(1, 1, WIDTH)
            model.model.layers[1](h, position_embeddings=model.model.rotary_emb(h, torch.zeros(1, 1)))


def test_a_pass_that_was_interrupted_says_nothing_of_the_next_one():
    model, batch = build("llama"), batch_of(prompts_of((7, 7)))

    def interrupt(*_):
        raise KeyboardInterrupt

    with STEERING.apply(model, "all"):
        plain = model.model(**batch).last_hidden_state
        handle = model.model.register_forward_pre_hook(interrupt, prepend=True)
        with pytest.raises(KeyboardInterrupt):
            model(**batch_of(prompts_of((2, 7))))
        handle.remove()
        assert torch.equal(model.model(**batch).last_hidden_state, plain)
        assert torch.equal(model.model(**batch).last_hidden_state, plain)


# Weights that are elsewhere, or small


def offloaded(tmp_path):
    return accelerate.cpu_offload(build("llama"))


def on_disk(tmp_path):
    return accelerate.disk_offload(build("llama"), str(tmp_path))


def torchao_int8(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    model = build("llama", torch.bfloat16)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def bitsandbytes(tmp_path, **options):
    pytest.importorskip("bitsandbytes")
    build("llama", torch.bfloat16, hidden_size=64, head_dim=16).save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(**options)
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")


MODELS = {
    "offloaded": offloaded,
    "on disk": on_disk,
    "torchao int8": torchao_int8,
    "bitsandbytes int8": functools.partial(bitsandbytes, load_in_8bit=True),
    "bitsandbytes 4 bit": functools.partial(bitsandbytes, load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16),
}


@pytest.mark.parametrize("kind", MODELS)
def test_models_that_are_offloaded_or_quantised_are_steered_and_captured_like_others(kind, tmp_path):
    model = MODELS[kind](tmp_path)
    layer, prompts = model.model.layers[1], prompts_of(LENGTHS)
    vector = 2 * torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    steering = Steering.from_vectors({"blocks.1.hook_resid_post": vector})
    plain, seen = expected(model, layer, vector=vector), []
    handle = layer.register_forward_hook(lambda m, a, h: seen.append(h[:, -1].clone()))
    unsteered = generate(model, prompts, N).tolist()
    handle.remove()
    with steering.apply(model), apply_rows(model, [steering], [-1] * len(LENGTHS)):
        assert generate(model, prompts, N).tolist() == plain != unsteered
    with Capture(model, {1: HookPoint(1)}, stop_tokens=[], max_new_tokens=N) as capture:
        assert generate(model, prompts, N, stopping_criteria=[capture.stopping_criterion]).tolist() == unsteered
    x, _ = capture.packed(1)
    assert torch.equal(x, torch.stack(seen, 1).flatten(0, 1)) and x.dtype == model.dtype
