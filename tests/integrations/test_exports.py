"""Steerings in the forms that others take. What a form cannot say is refused; what it says is what `apply` does."""

import base64
import json

import gguf
import numpy as np
import pytest
import torch
from tiny_models import LAYERS, WIDTH, batch_of, build, prompts_of, tiny
from transformers import AutoModelForCausalLM

from corrsteer import CorrSteerError, Steering, export_steering, import_steering
from corrsteer.integrations.exports import FORMATS
from corrsteer.lm.hook_points import HookPoint
from corrsteer.lm.token_positions import POSITIONS
from corrsteer.steering.features import Feature, FeatureStatistics

BATCH = batch_of(prompts_of((5, 7, 3)))
REAL = BATCH["attention_mask"].bool()
OF_LAYERS = ("lm-eval", "gguf", "vllm-lens", "easysteer", "hotwire")
SAES = {
    str(layer): {
        "metadata": {"neuronpedia_id": f"tiny/{layer}-res-1k", "hook_name": f"blocks.{layer}.hook_resid_post"}
    }
    for layer in range(LAYERS)
}


def steering_at(*points, scale=1.5, positions="all", **more):
    """Two directions at each hook point."""
    generator = torch.Generator().manual_seed(len(points))
    features = [
        Feature(str(point), c, layer=point.layer, index=7 + at, statistics=FeatureStatistics(0.1 + at, 0.5, 0.6, 0.4))
        for at, (point, c) in enumerate((point, c) for point in points for c in (2.0, -0.5))
    ]
    directions = torch.randn(len(features), WIDTH, generator=generator)
    provenance = {"model": "some/model", "saes": SAES}
    return Steering(features, directions, provenance=provenance, positions=positions, scale=scale, **more)


TWO = steering_at(HookPoint(1), HookPoint(2))


def exported(steering, to, path, **options):
    if FORMATS[to].needs:
        options.setdefault("model", tiny("llama"))
    return export_steering(steering, to, path, **options)


def added(steering):
    return {point.layer: steering.scale * vector for point, vector in steering.vectors().items()}


def logits(model):
    with torch.no_grad():
        return model(**BATCH).logits[REAL]


@pytest.mark.parametrize("to", FORMATS)
def test_positions_that_a_format_cannot_have_are_refused_with_what_to_do(to, tmp_path):
    for positions in set(POSITIONS) - set(FORMATS[to].positions):
        with pytest.raises(CorrSteerError, match=f"positions must be .*{to}.*got '{positions}'; evaluate") as error:
            exported(TWO, to, tmp_path / "out.pt", positions=positions)
        others = str(error.value).rpartition(": ")[2].split(", ")
        assert others == [name for name, one in FORMATS.items() if positions in one.positions]
    assert list(tmp_path.iterdir()) == []


def test_the_steerings_own_positions_are_what_counts_where_none_are_given(tmp_path):
    with pytest.raises(CorrSteerError, match="got 'generated'"):
        exported(steering_at(HookPoint(1), positions="generated"), "vllm-lens", tmp_path / "s.json")


@pytest.mark.parametrize("point", [HookPoint(0, "resid_pre"), HookPoint(1, "mlp_out"), HookPoint(1, "attn_out"),
                                   HookPoint(1, "z")], ids=str)  # fmt: skip
@pytest.mark.parametrize("to", OF_LAYERS)
def test_places_that_are_no_layers_output_are_refused(to, point, tmp_path):
    with pytest.raises(CorrSteerError, match=rf"steering adds at {point}, and .*outputs of decoder layers.*model"):
        exported(steering_at(HookPoint(2), point), to, tmp_path / "out.pt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", FORMATS)
def test_what_holds_nothing_or_is_not_known_is_refused(to, tmp_path):
    with pytest.raises(CorrSteerError, match="steering must have a feature"):
        exported(Steering([], torch.zeros(0, WIDTH), positions="all"), to, tmp_path / "s.pt")
    with pytest.raises(CorrSteerError, match="to must be one of lm-eval, .*, got 'csv'"):
        export_steering(TWO, "csv", tmp_path / "s")


@pytest.mark.parametrize("to", ("lm-eval", "model"))
def test_a_format_that_needs_the_model_says_so(to, tmp_path):
    with pytest.raises(CorrSteerError, match=f"model must be given, as the format {to} needs its"):
        export_steering(TWO, to, tmp_path / "s.pt")


@pytest.mark.parametrize("to", ("lm-eval", "vllm-lens", "hotwire"))
def test_a_steering_for_another_model_is_refused_where_the_model_is_known(to, tmp_path):
    with pytest.raises(CorrSteerError, match="blocks.9.hook_resid_post is outside the model"):
        exported(steering_at(HookPoint(9)), to, tmp_path / "s.pt", model=tiny("llama"))


@pytest.mark.parametrize("to", ("lm-eval", "vllm-lens", "hotwire"))
def test_a_scale_that_leaves_nothing_finite_is_refused(to, tmp_path):
    with pytest.raises(CorrSteerError, match="scale must leave what is added finite in float32.*at layer 1"):
        exported(TWO, to, tmp_path / "s.pt", scale=1e39)


@pytest.mark.parametrize("architecture", ("llama", "gpt2", "gpt_neox"))
def test_the_harness_file_names_modules_of_the_base_model_and_what_is_added_to_them(architecture, tmp_path):
    usage = export_steering(TWO, "lm-eval", tmp_path / "s.pt", model=tiny(architecture))
    entries = torch.load(tmp_path / "s.pt", weights_only=True)
    assert list(entries) == [f"{'h' if architecture == 'gpt2' else 'layers'}.{layer}" for layer in (1, 2)]
    for entry, vector in zip(entries.values(), added(TWO).values()):
        assert torch.equal(entry.pop("steering_vector"), vector)
        assert entry == {"steering_coefficient": 1.0, "action": "add", "bias": None, "head_index": None}
    arguments = f"pretrained=some/model,steer_path={tmp_path}/s.pt"
    assert usage == f"lm_eval --model steered --model_args {arguments} --tasks TASK"


def test_the_harness_tells_a_file_by_its_ending_so_others_are_refused(tmp_path):
    with pytest.raises(CorrSteerError, match=r"path must end with .pt"):
        exported(TWO, "lm-eval", tmp_path / "s.bin")
    with pytest.raises(CorrSteerError, match="have no comma"):
        exported(TWO, "lm-eval", tmp_path / "a,b.pt")


def test_a_model_without_weights_will_do_for_its_modules_names(tmp_path):
    with torch.device("meta"):
        structure = AutoModelForCausalLM.from_config(tiny("llama").config)
    export_steering(TWO, "lm-eval", tmp_path / "s.pt", model=structure)
    assert list(torch.load(tmp_path / "s.pt", weights_only=True)) == ["layers.1", "layers.2"]


def test_what_a_layer_reads_is_the_output_of_the_one_before(tmp_path):
    steering = steering_at(HookPoint(1), HookPoint(2, "resid_pre"))
    exported(steering, "lm-eval", tmp_path / "s.pt")
    entries = torch.load(tmp_path / "s.pt", weights_only=True)
    assert list(entries) == ["layers.1"]
    both = sum(steering.scale * vector for vector in steering.vectors().values())
    torch.testing.assert_close(entries["layers.1"]["steering_vector"], both)


def test_vllm_lens_takes_vectors_for_every_position_without_matching_norms(tmp_path):
    usage = exported(TWO, "vllm-lens", tmp_path / "s.json")
    (vector,) = json.loads((tmp_path / "s.json").read_text())
    tensor = vector.pop("activations")
    assert vector == {"layer_indices": [1, 2], "scale": 1.0, "norm_match": False, "position_indices": None}
    values = np.frombuffer(base64.b64decode(tensor["data"]), tensor["dtype"]).reshape(tensor["shape"])
    assert np.array_equal(values, torch.stack(list(added(TWO).values())).numpy())
    compile(usage, "usage", "exec")


def test_hotwire_takes_a_row_for_each_layer_and_requests_name_those_that_are_steered(tmp_path):
    usage = exported(TWO, "hotwire", tmp_path / "vectors")
    (file,) = (tmp_path / "vectors").glob("*.pt")
    rows = torch.load(file, weights_only=True)
    assert rows.shape == (3, WIDTH) and not rows[0].any()
    request = json.loads((tmp_path / "vectors" / "request.json").read_text())
    assert request == [{"id": file.stem, "layer": layer, "scale": 1.0} for layer in (1, 2)]
    assert all(torch.equal(rows[layer], vector) for layer, vector in added(TWO).items())
    compile(usage, "usage", "exec")


def test_hotwire_is_given_a_slot_for_each_layer(tmp_path):
    for layers, slots in ((3, 16), (20, 20)):
        steering = steering_at(*map(HookPoint, range(layers)))
        usage = export_steering(steering, "hotwire", tmp_path / "vectors")
        assert f'os.environ["HOTWIRE_SLOTS"] = "{slots}"' in usage


@pytest.mark.parametrize("to", ("neuronpedia", "paper"))
def test_tools_that_multiply_decoder_rows_are_given_none_that_were_divided_by_their_norms(to, tmp_path):
    steering = steering_at(HookPoint(1), positions=FORMATS[to].positions[0])
    steering.provenance["saes"] = {"1": SAES["1"] | {"source": {"divide_by_norm": True}}}
    with pytest.raises(CorrSteerError, match="layer 1 feature 7 is of an SAE that rescales activations"):
        exported(steering, to, tmp_path / "f.json")


def test_neuronpedia_is_asked_for_the_features_by_its_own_names(tmp_path):
    exported(TWO, "neuronpedia", tmp_path / "n.json")
    found = json.loads((tmp_path / "n.json").read_text())
    assert found["links"][0] == "https://www.neuronpedia.org/tiny/1-res-1k/7" and len(found["links"]) == 4
    assert found["request"]["features"][1] == {"modelId": "tiny", "layer": "1-res-1k", "index": 8, "strength": -0.75}
    assert found["request"]["modelId"] == "tiny" and found["request"]["steer_method"] == "SIMPLE_ADDITIVE"
    assert found["request"].keys() >= {"prompt", "temperature", "n_tokens", "freq_penalty", "seed",
                                       "strength_multiplier"}  # fmt: skip


def test_neuronpedia_is_not_asked_for_what_it_does_not_have(tmp_path):
    of_users = Steering.from_vectors({"blocks.1.hook_resid_post": torch.ones(WIDTH)})
    early = steering_at(HookPoint(1))
    early.features[0] = Feature("blocks.0.hook_resid_post", layer=1, index=3)
    without_page = steering_at(HookPoint(1))
    without_page.provenance["saes"] = {"1": {"metadata": {}}}
    several = steering_at(HookPoint(1), HookPoint(2))
    several.provenance["saes"] = SAES | {
        "2": {"metadata": {"neuronpedia_id": "b/2", "hook_name": "blocks.2.hook_resid_post"}}
    }
    for steering, reason in (
        (of_users, "is no feature of an SAE"), (early, "adds where its SAE was trained"),
        (without_page, "names no page"), (several, "must be of one model .*, got b, tiny"),
    ):  # fmt: skip
        with pytest.raises(CorrSteerError, match=reason):
            exported(steering, "neuronpedia", tmp_path / "n.json", positions="all")
    assert not (tmp_path / "n.json").exists()


def test_json_holds_all_of_a_steering(tmp_path):
    steering = steering_at(
        HookPoint(1, "mlp_out"), positions="generated", notes=["é"], table={1: [Feature("blocks.1.hook_resid_post")]}
    )
    exported(steering, "json", tmp_path / "s.json")
    read = import_steering(tmp_path / "s.json")
    assert torch.equal(read.directions, steering.directions) and read.digest == steering.digest
    assert read.described() == steering.described()


def test_the_papers_evaluator_takes_a_feature_a_layer_that_is_added_where_the_layer_reads(tmp_path):
    known = FeatureStatistics(0.25, 0.5, 0.6, 0.4)
    features = [
        Feature("blocks.0.hook_resid_post", 2.0, 1, 5, known),
        Feature("blocks.2.hook_resid_pre", -1.0, 2, 9, known),
    ]
    steering = Steering(features, torch.randn(2, WIDTH), scale=0.5)
    exported(steering, "paper", tmp_path / "f.json")
    assert json.loads((tmp_path / "f.json").read_text())["layers"] == {
        "1": {"selected": {"feature_index": 5, "coefficient": 1.0, "correlation": 0.25}},
        "2": {"selected": {"feature_index": 9, "coefficient": -0.5, "correlation": 0.25}},
    }
    for others, reason in (
        ([Feature("blocks.0.hook_resid_post", layer=1, index=5)], "has no correlation"),
        ([Feature("blocks.1.hook_resid_post", 1.0, 1, 5, known)], "collect with hook_offset=-1"),
        ([features[0], features[0]], "is not the first of its layer"),
        ([Feature("blocks.1.hook_resid_post")], "is no feature of an SAE"),
    ):
        with pytest.raises(CorrSteerError, match=reason):
            exported(Steering(others, torch.randn(len(others), WIDTH)), "paper", tmp_path / "f.json")


@pytest.mark.parametrize("architecture", ("llama", "gpt2"))
def test_a_checkpoint_gives_what_apply_gives_at_all_positions_and_the_model_is_left_as_it_was(architecture, tmp_path):
    model = build(architecture)
    before = logits(model)
    with TWO.apply(model):
        expected = logits(model)
    export_steering(TWO, "model", tmp_path / "folded", model=model)
    assert torch.equal(logits(model), before)
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded").eval()
    torch.testing.assert_close(logits(folded), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_layer_0_has_no_control_vector(tmp_path):
    with pytest.raises(CorrSteerError, match="layer 0, for which llama.cpp has no control vector"):
        exported(steering_at(HookPoint(0)), "gguf", tmp_path / "c.gguf")


@pytest.mark.parametrize("to", ("gguf", "easysteer"))
def test_without_the_package_gguf_the_error_says_how_to_get_it(to, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(CorrSteerError, match="pip install 'corrsteer\\[gguf\\]'"):
        exported(TWO, to, tmp_path / "c.gguf")


def test_gguf_reads_the_control_vector_that_is_written_and_it_comes_back(tmp_path):
    export_steering(TWO, "gguf", tmp_path / "c.gguf", tiny("llama"), scale=2.0)
    reader = gguf.GGUFReader(tmp_path / "c.gguf")
    fields = {name: reader.fields[name].contents() for name in reader.fields if not name.startswith("GGUF.")}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "llama" and fields["controlvector.layer_count"] == len(TWO.vectors())
    expected = {f"direction.{point.layer}": 2.0 * vector for point, vector in TWO.vectors().items()}
    assert [one.name for one in reader.tensors] == list(expected)
    assert all(torch.equal(torch.from_numpy(one.data.copy()), expected[one.name]) for one in reader.tensors)
    read = import_steering(tmp_path / "c.gguf")
    assert read.positions == "all"
    assert [f.hook_point for f in read.features] == list(map(str, TWO.vectors()))
    assert torch.equal(read.directions, torch.stack(list(expected.values())))


def test_easysteer_is_given_the_vectors_and_the_tokens_they_are_for(tmp_path):
    usage = export_steering(TWO, "easysteer", tmp_path / "s", positions="generated")
    (vector,) = json.loads((tmp_path / "s" / "steering.json").read_text())["vectors"]
    assert vector.pop("apply") == {"prompt_positions": [-1], "generation": "all"}
    source = vector.pop("source")
    assert vector == {"algorithm": "direct", "scale": 1.0, "layers": [1, 2], "normalize": False}
    assert torch.equal(import_steering(source).directions, torch.stack(list(added(TWO).values())))
    compile(usage, "usage", "exec")


def test_damaged_control_vectors_are_refused_by_name(tmp_path):
    export_steering(TWO, "gguf", tmp_path / "c.gguf")
    whole = (tmp_path / "c.gguf").read_bytes()
    for cut in (0, 3, 40, len(whole) // 2):
        (tmp_path / "cut.gguf").write_bytes(whole[:cut])
        with pytest.raises(CorrSteerError, match="cut.gguf"):
            import_steering(tmp_path / "cut.gguf")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CorrSteerError, match="must be a control vector, got architecture 'llama'"):
        import_steering(tmp_path / "other.gguf")
