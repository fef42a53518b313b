import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_pipeline
import torch

import corrsteer
from bench import accelerate as bench_accelerate
from corrsteer import CorrSteerError, accelerate, accelerated, restore
from corrsteer.integrations import saelens, saelens_paths

pytest.importorskip("sae_lens", reason="what is accelerated is SAELens")
from sae_lens import SAE, HookedSAETransformer  # noqa: E402
from sae_lens.saes.topk_sae import TopK  # noqa: E402
from transformer_lens import HookedTransformerConfig  # noqa: E402

ROOT = Path(__file__).parents[2]
D_IN, D_SAE, HOOK = 24, 67, "blocks.0.hook_resid_post"
KINDS = {
    "standard": {},
    "jumprelu": {},
    "gated": {},
    "topk": {"k": 9},
    "topk rescaled": {"k": 9, "rescale_acts_by_decoder_norm": True},
    "abstopk": {"k": 9},
    "transcoder": {"d_out": 17},
    "skip_transcoder": {"d_out": D_IN},
    "jumprelu_transcoder": {"d_out": 17},
    "jumprelu_skip_transcoder": {"d_out": D_IN},
}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
FEW = {torch.float32: 0, torch.float16: 0.005, torch.bfloat16: 0.03}  # so near to a threshold that either side is right


def make_sae(kind="standard", dtype=torch.float32, hook=HOOK, **settings):
    config = {"architecture": kind.split()[0], "d_in": D_IN, "d_sae": D_SAE, **KINDS.get(kind, {}), **settings}
    config |= {"dtype": str(dtype).removeprefix("torch."), "metadata": {"hook_name": hook, "hook_name_out": hook}}
    if "transcoder" in kind:
        config["apply_b_dec_to_input"] = False
    sae = SAE.from_dict(config)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            values = torch.randn(parameter.shape, generator=random)
            scale = {"W_enc": D_IN**-0.5, "W_dec": 0.3}.get(name, 0.3)
            parameter.copy_(values.abs() * scale if name == "threshold" else values * scale)
    return sae


def make_x(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(autouse=True)
def kernels_always(monkeypatch):
    """Whatever is faster, the kernels run where they can, and are counted."""
    monkeypatch.setattr(saelens_paths, "slower", lambda sae, tokens, call="encode": "")


@pytest.fixture
def runs(monkeypatch):
    """How often the kernels ran."""
    counted = []
    run = saelens._Encode.run
    monkeypatch.setattr(saelens._Encode, "run", lambda self, x: counted.append(1) or run(self, x))
    return counted


def assert_same(got, expected):
    assert got.shape == expected.shape and got.dtype == expected.dtype and got.device == expected.device
    if not expected.numel():
        return
    error = (got.float() - expected.float()).abs()
    allowed = TOLERANCE[expected.dtype] * expected.float().abs().max().clamp(min=1)
    assert (error > allowed).float().mean() <= FEW[expected.dtype]


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
def test_encode_and_forward_are_those_of_saelens(kind, dtype, norm, runs):
    sae = make_sae(kind, dtype, normalize_activations=norm)
    # Cast by the SAE, but for the skip path of a transcoder.
    x = make_x(40, D_IN, dtype=dtype if "skip" in kind else torch.float32)
    acts, out = sae.encode(x), sae(x)
    accelerate(sae)
    assert_same(sae.encode(x), acts)
    assert runs
    if FEW[dtype] == 0:  # a feature that falls on the other side changes a reconstruction
        assert_same(sae(x), out)


@pytest.mark.parametrize("shape", [(D_IN,), (1, D_IN), (0, D_IN), (2, 0, D_IN), (2, 3, D_IN), (2, 3, 4, D_IN)])
@pytest.mark.parametrize("x_dtype", TOLERANCE)
def test_any_leading_dimensions_empty_batches_and_dtypes_of_x(shape, x_dtype):
    sae = make_sae()
    x = make_x(*shape, dtype=x_dtype)
    expected = sae.encode(x)
    assert_same(accelerate(sae).encode(x), expected)


def test_heads_are_joined_as_saelens_joins_them():
    sae = make_sae(hook="blocks.0.attn.hook_z", reshape_activations="hook_z")
    x = make_x(2, 5, 3, 8)
    acts, out = sae.encode(x), sae(x)
    accelerate(sae)
    assert_same(sae.encode(x), acts)
    assert_same(sae(x), out)
    assert_same(sae.encode_pooled(x), acts.mean(1))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_saelens_to_the_bit(kind, runs):
    sae, x = make_sae(kind), make_x(6, D_IN).requires_grad_()
    upstream = make_x(6, D_SAE, seed=2)

    def gradients():
        acts = sae.encode(x)
        assert acts.requires_grad
        wanted = [x, *(p for name, p in sae.named_parameters())]
        return torch.autograd.grad(acts, wanted, upstream, allow_unused=True)

    expected = gradients()
    accelerate(sae)
    for got, one in zip(gradients(), expected):
        assert (got is None and one is None) or torch.equal(got, one)
    assert runs


def test_gradients_of_gradients_are_those_of_saelens():
    sae, x = make_sae("gated"), make_x(6, D_IN).requires_grad_()

    def second():
        (first,) = torch.autograd.grad(sae.encode(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x, sae.W_enc))

    expected = second()
    accelerate(sae)
    for got, one in zip(second(), expected):
        torch.testing.assert_close(got, one, rtol=1e-4, atol=1e-4)


def test_a_call_with_grad_enabled_runs_on_the_kernels_and_notices_weights_that_change_before_backward(runs):
    sae = accelerate(make_sae())
    acts = sae.encode(make_x(5, D_IN))
    assert runs and acts.requires_grad
    with torch.no_grad():
        sae.W_enc.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        acts.sum().backward()


def test_hooks_on_input_and_activations_run_and_may_change_them(runs):
    sae, x = make_sae(), make_x(5, D_IN)
    hooks = [("hook_sae_input", lambda t, hook: t * 2), ("hook_sae_acts_post", lambda t, hook: t.clamp(max=0.5))]
    expected = sae.run_with_hooks(x, fwd_hooks=hooks)
    accelerate(sae)
    assert_same(sae.run_with_hooks(x, fwd_hooks=hooks), expected)
    assert runs


def test_a_hook_on_preactivations_gets_saelens_own(runs):
    sae, x = make_sae("topk"), make_x(5, D_IN)
    hooks = [("hook_sae_acts_pre", lambda t, hook: t + 1)]
    expected = sae.run_with_hooks(x, fwd_hooks=hooks)
    accelerate(sae)
    assert torch.equal(sae.run_with_hooks(x, fwd_hooks=hooks), expected)
    assert not runs


def test_a_cache_of_all_points_is_saelens_own_and_one_without_preactivations_comes_from_the_kernels(runs):
    sae, x = make_sae("jumprelu"), make_x(5, D_IN)
    out, cache = sae.run_with_cache(x)
    accelerate(sae)
    out_again, again = sae.run_with_cache(x)
    assert torch.equal(out_again, out) and set(again) == set(cache)
    assert all(torch.equal(again[name], cache[name]) for name in cache) and not runs
    names = [name for name in cache if name != "hook_sae_acts_pre"]
    _, fewer = sae.run_with_cache(x, names_filter=names)
    assert set(fewer) == set(names) and runs
    for name in names:
        assert_same(fewer[name], cache[name])


@pytest.mark.parametrize("pre", [False, True])
def test_the_error_term_is_of_the_same_path_as_the_reconstruction(pre):
    sae, x = make_sae("topk", torch.bfloat16), make_x(50, D_IN, dtype=torch.bfloat16)
    sae._use_error_term = True
    accelerate(sae)
    hooks = [("hook_sae_acts_pre", lambda t, hook: None)] if pre else []
    expected = restore(copy.deepcopy(sae)).run_with_hooks(x, fwd_hooks=hooks)
    assert (sae.run_with_hooks(x, fwd_hooks=hooks) - expected).abs().max() <= 0.05
    assert (expected - x).abs().max() <= 0.05  # which an error term of another path would miss by far more


def test_compiled_autocast_and_transformed_calls_are_saelens_own(runs):
    sae, x = make_sae().requires_grad_(False), make_x(5, D_IN)
    expected, jacobian = sae.encode(x), torch.func.jacrev(sae.encode)(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = sae.encode(x)
    accelerate(sae)
    assert torch.equal(torch.compile(sae, backend="eager", fullgraph=True)(x), sae.decode(expected))
    assert torch.equal(torch.func.jacrev(sae.encode)(x), jacobian)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sae.encode(x), cast)
    assert not runs


def test_what_kernels_cannot_stand_in_for_keeps_its_own_encode(runs):
    class Mine(type(make_sae())):
        def encode(self, x):
            return x

    mine = Mine(make_sae().cfg)
    x = make_x(3, D_IN)
    assert torch.equal(accelerate(mine).encode(x), x)
    double = accelerate(make_sae(dtype=torch.float64))
    assert torch.equal(double.encode(x), type(double).encode(double, x))
    sparse = accelerate(make_sae("topk"))
    sparse.activation_fn = TopK(9, use_sparse_activations=True)
    assert sparse.encode(x).is_sparse
    assert not runs
    assert "Mine is no inference SAE of SAELens itself" in str(accelerate(mine, explain=True))


def test_a_training_sae_keeps_its_own_encode(runs):
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig

    sae, x = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE)), make_x(3, D_IN)
    expected = sae.encode(x)
    assert torch.equal(accelerate(sae).encode(x), expected) and not runs


@pytest.mark.parametrize("bad", [(3, D_IN + 1), (3, 1)])
def test_bad_input_gets_saelens_own_error_or_result(bad):
    sae = make_sae()

    def outcome():
        try:
            return sae.encode(make_x(*bad))
        except RuntimeError as error:
            return str(error)

    expected = outcome()
    accelerate(sae)
    got = outcome()
    assert torch.equal(got, expected) if isinstance(expected, torch.Tensor) else got == expected


WRITES = {
    "counted": lambda sae: torch.nn.init.ones_(sae.b_enc),
    "data, a matrix": lambda sae: sae.W_enc.data.mul_(1.5),
    "data, a feature": lambda sae: sae.W_enc.data[:, 5].zero_(),
    "data, an input dimension": lambda sae: sae.W_enc.data[5].zero_(),
    "data, one threshold": lambda sae: sae.threshold.data[7].add_(3),
    "fold_W_dec_norm": lambda sae: sae.fold_W_dec_norm(),
    "fold_activation_norm_scaling_factor": lambda sae: sae.fold_activation_norm_scaling_factor(1.01),
    "load_state_dict": lambda sae: sae.load_state_dict({k: v * 2 for k, v in sae.state_dict().items()}),
    "another tensor": lambda sae: setattr(sae.W_enc, "data", sae.W_enc.data * 2),
}


@pytest.mark.parametrize("write", WRITES)
def test_weights_that_were_changed_in_place_are_seen(write, runs):
    sae, x = accelerate(make_sae("jumprelu")), make_x(20, D_IN)
    before = sae.encode(x)
    WRITES[write](sae)
    assert_same(sae.encode(x), type(sae).encode(sae, x))
    assert not torch.equal(sae.encode(x), before) and len(runs) == 3


def test_saelens_own_writers_are_seen_where_the_sample_of_the_weights_stays_as_it_is():
    sae = make_sae("standard")
    with torch.no_grad():
        sae.W_enc[0], sae.W_enc[:, 0], sae.b_enc[:] = 0, 0, 0
    accelerate(sae)
    x = make_x(20, D_IN)
    before = sae.encode(x)
    sae.fold_W_dec_norm()
    assert_same(sae.encode(x), type(sae).encode(sae, x))
    assert not torch.equal(sae.encode(x), before)


def test_it_survives_to_half_eval_copies_and_saving_and_restore_undoes_it(tmp_path, runs):
    plain = make_sae()
    attributes = set(vars(plain))
    sae, x = accelerate(plain), make_x(20, D_IN)
    assert sae is plain
    sae.encode(x)
    twin = copy.deepcopy(sae.eval())
    with torch.no_grad():
        twin.W_enc.mul_(-1)
    assert_same(twin.encode(x), type(twin).encode(twin, x))
    assert_same(sae.encode(x), type(sae).encode(sae, x))
    sae.to(torch.bfloat16)
    assert sae.encode(x).dtype == torch.bfloat16
    count = len(runs)
    sae.half()  # which SAELens' own dtype does not follow
    with pytest.raises(RuntimeError):
        sae.encode(x)
    assert len(runs) == count
    sae.to(torch.float32)
    sae.save_model(tmp_path)
    assert torch.equal(SAE.load_from_disk(tmp_path).W_enc, sae.W_enc)
    assert restore(sae) is sae and set(vars(sae)) == attributes and restore(sae) is sae
    assert not hasattr(sae, "encode_pooled")


def test_accelerated_lasts_as_long_as_its_block_and_leaves_an_accelerated_sae_as_it_was():
    sae = make_sae()
    with pytest.raises(ZeroDivisionError), accelerated(sae) as same:
        assert same is sae and saelens.is_accelerated(sae)
        raise ZeroDivisionError
    assert not saelens.is_accelerated(sae)
    accelerate(sae)
    with accelerated(sae):
        pass
    assert saelens.is_accelerated(sae)


@pytest.mark.parametrize("norm", ["none", "layer_norm"])
@pytest.mark.parametrize("pool", ["mean", "max"])
def test_pooled_activations_and_top_features_of_each_sample(pool, norm):
    sae = accelerate(make_sae("jumprelu", normalize_activations=norm))
    x, mask = make_x(3, 6, D_IN), torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0]])
    z = type(sae).encode(sae, x).detach()
    pooled = sae.encode_pooled(x, mask, pool=pool)
    for got, row, kept in zip(pooled, z, mask.bool()):
        of_kept = row[kept] if kept.any() else torch.zeros(1, D_SAE)
        assert_same(got, of_kept.mean(0) if pool == "mean" else of_kept.amax(0))
    values, features = sae.topk_features(x, mask, k=4, pool=pool)
    assert torch.equal(values, pooled.topk(4).values) and torch.equal(pooled.gather(1, features), values)
    assert not pooled.requires_grad
    assert sae.encode_pooled(x.requires_grad_(), mask).requires_grad


def test_pooling_obeys_hooks_and_leaves_alone_what_the_next_decode_needs():
    sae = accelerate(make_sae(normalize_activations="layer_norm"))
    x, other = make_x(3, D_IN), make_x(2, 4, D_IN, seed=5)
    expected = sae(x)
    acts = sae.encode(x)
    sae.encode_pooled(other)
    assert torch.equal(sae.decode(acts), expected)
    with sae.hooks(fwd_hooks=[("hook_sae_acts_post", lambda t, hook: t * 0)]):
        assert not sae.encode_pooled(other).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda sae: sae.encode_pooled(make_x(3, D_IN)), r"x must be \[B, S, d_in\], got \[3, 24\]"),
        (lambda sae: sae.encode_pooled(make_x(2, 3, D_IN), torch.ones(2, 2)), r"attention_mask must be .*\[2, 3\]"),
        (lambda sae: sae.encode_pooled(make_x(2, 3, D_IN), pool="sum"), "pool must be mean or max, got 'sum'"),
        (lambda sae: sae.topk_features(make_x(2, 3, D_IN), k=D_SAE + 1), "k must lie in 1..d_sae=67, got 68"),
        (lambda sae: accelerate(3), "sae must be an sae_lens.SAE, got 3"),
    ],
)
def test_what_cannot_be_meant_is_refused(call, message):
    with pytest.raises(CorrSteerError, match=message):
        call(accelerate(make_sae()))


def users_script(sae, model, tokens):
    """What a user of SAELens writes."""
    _, cache = model.run_with_cache(tokens, names_filter=HOOK)
    acts = sae.encode(cache[HOOK])
    top = acts.topk(3).indices
    reconstruction = sae.decode(acts)
    logits = model.run_with_saes(tokens, saes=[sae])
    spliced, sae_cache = model.run_with_cache_with_saes(tokens, saes=[sae], use_error_term=True)
    return acts, top, reconstruction, logits, spliced, sae_cache[f"{HOOK}.hook_sae_acts_post"]


def test_a_users_script_gives_the_same_output_with_one_line_added(runs):
    config = HookedTransformerConfig(
        n_layers=2, d_model=D_IN, n_ctx=16, d_head=8, n_heads=3, d_vocab=50, d_mlp=32, act_fn="relu", seed=0,
        device="cpu",
    )  # fmt: skip
    model, sae = HookedSAETransformer(config), make_sae()
    tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(3))
    expected = users_script(sae, model, tokens)
    corrsteer.accelerate(sae)  # the line
    found = users_script(sae, model, tokens)
    assert torch.equal(found[1], expected[1])
    for got, one in zip(found, expected):
        assert_same(got.float(), one.float())
    assert len(runs) >= 2


def test_a_transformer_bridge_runs_with_an_accelerated_sae_as_without(runs, tmp_path):
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
    from transformers import AutoTokenizer

    model = tiny_pipeline.model()
    model.save_pretrained(tmp_path)
    tiny_pipeline.tokenizer().save_pretrained(tmp_path)
    bridge = SAETransformerBridge.boot_transformers(
        str(tmp_path), hf_model=model, tokenizer=AutoTokenizer.from_pretrained(tmp_path)
    )
    sae = make_sae(hook="blocks.1.hook_resid_post", d_in=128)
    tokens = torch.randint(1, 15, (2, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = bridge.run_with_saes(tokens, saes=[sae])
        accelerate(sae)
        runs.clear()
        got = bridge.run_with_saes(tokens, saes=[sae])
    assert runs
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_where_kernels_are_not_faster_samples_are_pooled_a_few_tokens_at_a_time(monkeypatch, pool, runs):
    sae, x, mask = accelerate(make_sae()), make_x(5, 6, D_IN), torch.ones(5, 6)
    mask[1], mask[3, 2:] = 0, 0
    expected = sae.encode_pooled(x, mask, pool)
    monkeypatch.setattr(saelens_paths, "slower", lambda sae, tokens, call="encode": "as it is")
    monkeypatch.setattr(saelens, "PART", 7)
    assert_same(sae.encode_pooled(x, mask, pool), expected)
    assert not runs


def test_an_explanation_names_each_path_and_its_reason(monkeypatch):
    monkeypatch.undo()  # the table decides
    monkeypatch.setattr(saelens_paths, "FASTER", {("encode", "relu", "float32"): (16, None)})
    monkeypatch.setattr(saelens_paths, "SMALLEST", 0)
    monkeypatch.setattr(saelens_paths.native_backend, "instruction_set", lambda: "avx512")
    sae = make_sae()
    told = accelerate(sae, explain=True)
    assert saelens.is_accelerated(sae)
    found = {call: (path, why) for call, path, why in told.rows}
    assert found["encode, 1 tokens"] == ("SAELens", "relu in float32 was faster from 16 tokens on")
    assert found["encode, 16 tokens"] == ("kernels", "")
    assert found["run_with_cache of all points"][0] == "SAELens"
    assert "encode, 256 tokens" in str(told)
    monkeypatch.setattr(saelens_paths.native_backend, "instruction_set", lambda: "avx2")
    assert "only CPUs with AVX-512 have been measured" in str(accelerate(sae, explain=True))


def test_the_table_of_what_is_faster_is_that_of_the_committed_measurements():
    rows = json.loads((ROOT / "bench/results/studies/accelerate.json").read_text(encoding="utf-8"))["rows"]
    assert saelens_paths.FASTER == bench_accelerate.faster(rows)
    assert saelens_paths.SMALLEST == bench_accelerate.smallest(rows)


def test_importing_corrsteer_imports_neither_saelens_nor_transformers():
    code = "import sys, corrsteer; corrsteer.accelerate; print({'sae_lens', 'transformers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "set()"
