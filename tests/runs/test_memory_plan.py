"""What a collection is planned to take, against what is really allocated."""

import json

import pytest
import tiny_models
import tiny_pipeline
import torch

from corrsteer import CorrSteerError, Decoding, SparseEncoder, Task, collect, demo, encode_pool
from corrsteer.lm import prefill
from corrsteer.lm.capture import Capture
from corrsteer.lm.meta_model import cache_bytes, model_without_weights, weight_bytes
from corrsteer.ops import RunningPool, native_backend
from corrsteer.ops.moments import Moments
from corrsteer.runs.batches import BatchReader
from corrsteer.runs.blocks import BlockCollector
from corrsteer.runs.memory import plan_memory
from corrsteer.runs.options import Options
from corrsteer.sae.encoder import TENSORS

DECODING = Decoding(max_new_tokens=4, batch_size=6)
N = 20
HEADERS = 4096  # of a safetensors file, at most


def options(**given):
    names = {
        "pool": "max", "coefficient_pool": "mean", "positions": "generated", "permutations": 19, "bootstrap": 3,
        "scores": ("pearson",), "block_size": 8, "shuffle_seed": 0, "patience": None, "patience_layers": None,
        "buffer_bytes": 1 << 30, "statistics_bytes": 16 << 30, "backend": None,
    }  # fmt: skip
    return Options(**names | given)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with a model's configuration, and no weights."""
    home = tmp_path_factory.mktemp("configured")
    tiny_pipeline.model().config.save_pretrained(home)
    return home


@pytest.fixture(scope="module")
def without_weights(folder):
    return model_without_weights(str(folder), "float32")


def meta_encoders():
    return {layer: encoder.to("meta") for layer, encoder in tiny_pipeline.encoders().items()}


def task():
    """Prompts of one length."""
    rows = [{"prompt": f"{10 + i}+{99 - i}=", "answer": "1"} for i in range(N)]
    return Task.from_rows(rows, grader=tiny_pipeline.digits_up, name="of one length")


def longest():
    tokenizer = tiny_pipeline.tokenizer()
    return len(tokenizer(task().examples[0].prompt)["input_ids"])


def plan(model, chosen, **more):
    arguments = {"samples": N, "prompt_tokens": longest(), "density": 0.5, **more}
    return plan_memory(model, meta_encoders(), chosen, DECODING, **arguments)


def collection(chosen, directory=None):
    """A collection with these options."""
    names = (
        "pool", "coefficient_pool", "positions", "permutations", "bootstrap", "block_size", "buffer_bytes",
        "keep_activations", "activation_bytes",
    )  # fmt: skip
    return collect(
        tiny_pipeline.model(), tiny_pipeline.tokenizer(), tiny_pipeline.encoders(), task(),
        decoding=DECODING, progress=False, directory=directory, **{name: getattr(chosen, name) for name in names},
    )  # fmt: skip


def moments_of(run):
    return [of for layers in (run.moments, run.residuals) for by_pool in layers.values() for of in by_pool.values()]


@pytest.mark.parametrize("architecture", tiny_models.ARCHITECTURES)
def test_weights_and_cache_of_a_configuration_are_those_of_the_model(architecture, tmp_path):
    model = tiny_models.tiny(architecture)
    model.config.save_pretrained(tmp_path)
    planned = model_without_weights(str(tmp_path), "float32")
    assert weight_bytes(planned) == weight_bytes(model)
    assert all(tensor.is_meta for tensor in (*planned.parameters(), *planned.buffers()))
    rows, tokens = 3, 9
    cache = prefill.empty_cache(model, tokens)
    ids = torch.ones(rows, tokens, dtype=torch.int64, device="cpu")
    with torch.inference_mode():
        model(input_ids=ids, use_cache=True, **{cache.name: cache.value})
    held = sum(part.nbytes for layer in cache.value.layers for part in layer._reserved)
    assert cache_bytes(planned, rows, tokens) == held == rows * tokens * cache_bytes(planned, 1, 1)


def test_weights_are_planned_in_the_dtype_that_is_asked_for(folder):
    half, whole = (weight_bytes(model_without_weights(str(folder), dtype)) for dtype in ("bfloat16", "float32"))
    assert half[torch.bfloat16] * 2 == whole[torch.float32] - half.get(torch.float32, 0)


@pytest.mark.parametrize("precision", (None, "fp32", "bf16x2", "bf16", "fp16"))
def test_encoders_without_values_take_what_encoders_take(precision):
    directory = demo.run.HERE / "sae" / "layer_1"
    loaded, planned = SparseEncoder.load(directory), SparseEncoder.load(directory, device="meta")
    if precision:
        loaded, planned = loaded.to(precision=precision), planned.to(precision=precision)
    parts = [getattr(planned, name) for name in TENSORS if getattr(planned, name) is not None]
    assert all(part.is_meta for part in parts)
    assert planned.nbytes == loaded.nbytes == sum(part.nbytes for part in parts)


@pytest.mark.skipif(native_backend._native is None, reason=native_backend.MISSING or "")
@pytest.mark.parametrize("precision", ("fp32", "bf16x2", "bf16", "fp16"))
def test_the_native_backend_holds_what_it_says_it_holds_of_an_encoder(precision):
    encoder = tiny_pipeline.encoders()[1].to(precision=precision)
    before = set(native_backend._packed)
    x = torch.ones(2, encoder.d_in, dtype=torch.float32, device="cpu")
    encode_pool(x, torch.tensor([0, 2], dtype=torch.int32, device="cpu"), encoder, "max", backend="native")
    (packed,) = (entry for key, entry in native_backend._packed.items() if key not in before)
    assert native_backend.held_bytes(encoder.to("meta")) == packed.weight.nbytes


@pytest.mark.parametrize("positions", ("generated", "all"))
@pytest.mark.parametrize("buffer_bytes", (1 << 30, 8192))
def test_what_a_batch_is_planned_to_take_is_what_it_takes(positions, buffer_bytes, without_weights, monkeypatch):
    caches, captured, pools, pooled = [], [], [], []
    empty_cache, leave, new_pool, read = prefill.empty_cache, Capture.__exit__, RunningPool.__init__, BatchReader.read
    monkeypatch.setattr(prefill, "empty_cache", lambda *given: caches.append(empty_cache(*given)) or caches[-1])

    def exit(capture, *exception):
        tensors = (*capture._buffer.values(), *capture._last_prompt.values())
        captured.append((capture, sum(tensor.nbytes for tensor in tensors)))
        leave(capture, *exception)

    def init(pool, *given):
        new_pool(pool, *given)
        pools.append(pool)

    def batch(reader, which):
        made = read(reader, which)
        pooled.append(sum(z.nbytes for by in (made.pooled, made.residuals) for of in by.values() for z in of.values()))
        return made

    monkeypatch.setattr(BatchReader, "read", batch)
    monkeypatch.setattr(Capture, "__exit__", exit)
    monkeypatch.setattr(RunningPool, "__init__", init)
    chosen = options(positions=positions, buffer_bytes=buffer_bytes)
    collection(chosen)
    planned = plan(without_weights, chosen).process
    held = [sum(r.nbytes for layer in cache.value.layers for r in getattr(layer, "_reserved", ())) for cache in caches]
    assert planned["key-value cache"] == max(held)
    assert planned["a batch's samples"] == max(pooled)
    flushed = [nbytes for capture, nbytes in captured if capture.flushed]
    assert bool(flushed) == (buffer_bytes < 1 << 30) == ("pooled parts of a batch" in planned)
    most = max(nbytes for _, nbytes in captured)
    if not flushed:
        assert planned["captured residuals"] == most
    else:
        step = 6 * 128 * 4 * 2  # of 6 rows at two layers, whole ones of which fit the buffers
        assert most <= planned["captured residuals"] == buffer_bytes + step < most + 2 * step
        per_batch = [pool._mean.nbytes + pool._max.nbytes for pool in pools]
        assert planned["pooled parts of a batch"] == 2 * max(per_batch), "of two layers"


def test_a_batch_of_shorter_prompts_is_planned_for_if_it_takes_more(without_weights):
    decoding = Decoding(max_new_tokens=4, batch_tokens=64, batch_size=256)
    encoders, chosen = meta_encoders(), options(block_size=512)
    one = cache_bytes(without_weights, 1, 1)
    most = max(decoding.rows(tokens) * (tokens + 3) for tokens in range(1, 31))
    assert decoding.rows(30) * 33 < most
    planned = plan_memory(without_weights, encoders, chosen, decoding, samples=600, prompt_tokens=30)
    assert planned.process["key-value cache"] == most * one


@pytest.mark.parametrize("keep", ("always", "never"))
def test_what_statistics_are_planned_to_take_is_what_they_take(keep, without_weights, tmp_path, monkeypatch):
    rows, allocate = [], BlockCollector._rows_of

    def counted(collector, n):
        made = allocate(collector, n)
        rows.append(sum(t.nbytes for by in (made.pooled, made.residuals) for of in by.values() for t in of.values()))
        return made

    monkeypatch.setattr(BlockCollector, "_rows_of", counted)
    chosen = options(keep_activations=keep)
    run = collection(chosen, tmp_path)
    shares = [float(of.frequency().mean()) for by_pool in run.moments.values() for of in by_pool.values()]
    planned = plan(without_weights, chosen, density=sum(shares) / len(shares))
    evidence = sum(of.nbytes for by_pool in run.evidence.values() for of in by_pool.values())
    assert planned.keeps_activations == (run.activations is not None) == (keep == "always")
    assert planned.folding["a block's samples"] == max(rows)
    assert planned.folding["moments"] == 2 * sum(of.nbytes for of in moments_of(run))
    if keep == "never":
        assert planned.folding["evidence"] == evidence

    run.save(tmp_path)
    size = {path.name: path.stat().st_size for path in tmp_path.glob("*.safetensors")}
    stored = sum(n for name, n in size.items() if name.startswith("activations_"))
    if keep == "always":
        assert planned.disk["activations"] == pytest.approx(run.activations.nbytes, rel=0.01)
        assert 0 <= stored - run.activations.nbytes < HEADERS * 3
    else:
        assert "activations" not in planned.disk and stored == 0
    kept = sum(n for name, n in size.items() if ".evidence." in name)
    others = sum(n for name, n in size.items() if name.startswith("layer_")) - kept
    assert 0 <= kept - planned.disk["evidence"] < HEADERS * 6
    assert 0 <= others - planned.disk["moments"] < HEADERS * 10


def test_a_pooling_of_one_token_alone_holds_nothing_of_parts(without_weights):
    chosen = {"positions": "all", "buffer_bytes": 8192}
    last = options(pool="last_prompt", coefficient_pool="last_prompt", **chosen)
    assert "pooled parts of a batch" in plan(without_weights, options(**chosen)).process
    assert "pooled parts of a batch" not in plan(without_weights, last).process


def test_while_rows_are_kept_no_evidence_of_permutations_is_held(without_weights):
    few, many = (plan(without_weights, options(permutations=p, block_size=8)).folding["evidence"] for p in (19, 1000))
    assert few == many
    streamed = plan(without_weights, options(keep_activations="never", permutations=1000)).folding["evidence"]
    assert streamed - many > 2 * 48 * 8 * 1000, "of two layers"


def test_activations_that_would_take_too_much_become_evidence_as_in_a_collection(without_weights):
    kept = collection(options()).activations.nbytes
    for room, keeps in ((kept + 8 * 48 * 3 * 2 * 4, True), (kept // 2, False)):
        chosen = options(activation_bytes=room)
        run = collection(chosen)
        density = sum(float(m.frequency().mean()) for by in run.moments.values() for m in by.values()) / 6
        planned = plan(without_weights, chosen, density=density)
        assert planned.keeps_activations == keeps == (run.activations is not None)


def test_several_rewards_take_more_moments_and_no_more_evidence(without_weights):
    one, three = (plan(without_weights, options(), rewards=n).folding for n in (1, 3))
    widths = [48] * 6 + [128] * 4
    more = sum(Moments(d, 3).nbytes - Moments(d, 1).nbytes for d in widths)
    assert three["moments"] - one["moments"] == 2 * more and three["evidence"] == one["evidence"]


def test_one_process_folds_blocks_and_every_one_holds_the_rest(without_weights):
    planned = plan(without_weights, options())
    assert planned.total(1) == planned.alone == planned.each + sum(planned.folding.values())
    assert planned.total(3) == 3 * planned.each + sum(planned.folding.values())
    assert planned.largest == max(planned.process | planned.folding, key=(planned.process | planned.folding).get)


def test_what_does_not_fit_together_is_refused(without_weights):
    with pytest.raises(CorrSteerError, match="prompt_tokens must leave room for max_new_tokens=4 in the .* context"):
        plan(without_weights, options(), prompt_tokens=10**6)
    with pytest.raises(CorrSteerError, match="density must be a finite number from 0 to 1, got 3"):
        plan(without_weights, options(), density=3)
    with pytest.raises(CorrSteerError, match="buffer_bytes must be at least"):
        plan(without_weights, options(buffer_bytes=100))
    with pytest.raises(CorrSteerError, match=r"encoders\[1\] has d_in=64, but the model's residual stream is 128 wide"):
        wrong = {1: tiny_pipeline.encoders((1,), d_in=64)[1].to("meta")}
        plan_memory(without_weights, wrong, options(), DECODING, samples=10)


def test_a_model_that_cannot_be_planned_is_refused_with_the_reason(folder, tmp_path):
    with pytest.raises(CorrSteerError, match="has no configuration"):
        model_without_weights(str(tmp_path))
    written = json.loads((folder / "config.json").read_text())
    for changes, message in (
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "has quantized weights"),
        ({"dtype": None, "torch_dtype": None}, "names no dtype; give one"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(written | changes))
        with pytest.raises(CorrSteerError, match=message):
            model_without_weights(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "dtype": "float32"}))
    with pytest.raises(CorrSteerError, match="is no causal language model"):
        model_without_weights(str(tmp_path))


def test_encoders_that_are_packed_are_counted_as_what_they_then_hold(without_weights):
    from corrsteer.ops import pack

    encoders = tiny_pipeline.encoders()
    plans = {
        packs: plan_memory(without_weights, meta_encoders(), options(), DECODING, samples=N, packs=packs).process
        for packs in (False, True)
    }
    if "packed encoders" not in plans[False]:
        pytest.skip("no backend here packs weights")
    held = sum(pack(encoder).nbytes for encoder in encoders.values())
    assert plans[True]["encoders"] + plans[True]["packed encoders"] == held
    assert plans[False]["encoders"] == sum(encoder.nbytes for encoder in encoders.values())
