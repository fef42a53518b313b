"""examples/smollm2 from its first stage to its last, on a tiny random model with a tiny SAE on two layers."""

import json

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench import record, table
from corrsteer import CorrSteerError
from examples.smollm2 import activations, job, page, tasks, top_tokens
from examples.smollm2.stages import stage

TEMPLATE = "<s>user\n{% for message in messages %}{{ message['content'] }}{% endfor %}\nassistant\n"


def tokenizer():
    characters = ["<pad>", "<s>", "</s>", "<unk>", "\n", *map(chr, range(32, 127))]
    made = Tokenizer(models.WordLevel({c: at for at, c in enumerate(characters)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"<s>|[\s\S]"), behavior="isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        padding_side="left", chat_template=TEMPLATE, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def model(vocabulary):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A result, the options that it was made with, and the model and its tokenizer."""
    reads, patch = tokenizer(), pytest.MonkeyPatch()
    kinds = {"sizes": tasks.Kind(tasks.sizes, "regex:^[A-Za-m]", 2, "a letter that is", "category")}
    patch.setattr(tasks, "KINDS", kinds)  # of which an untrained model gets one right sometimes
    options = job.Options(
        tmp_path_factory.mktemp("cache"), list(kinds), (60, 40, 30), texts=6, text_tokens=8, layers=(1, 2), d_sae=48,
        k=4, steps=12, permutations=99, completions=1000, compared=(16, 16, 2), progress=False,
    )  # fmt: skip
    of_tokens = model(len(reads))
    try:
        yield job.run(of_tokens, reads, options), options, of_tokens, reads
    finally:
        patch.undo()


def test_every_stage_leaves_what_the_page_shows(made, tmp_path):
    result = made[0]
    path = record.write_study(result, tmp_path, "smollm2")
    read = json.loads(path.read_text())
    assert set(read["saes"]) == {"1", "2"} and all(0 < one["tokens"] for one in read["saes"].values())
    for _, header, rows in page.PARTS.values():
        found = rows(read)
        assert found and all(len(row) == len(header) for row in found), header
    shown = page.text(read)
    assert all(name in shown for name in ("CorrSteer-S", "CorrSteer-A", "CorrSteer-P", "search", "difference of means"))
    for part in page.PARTS:
        assert table.smollm2(part)(path).count("\n| ") >= 2
    assert "make example-smollm2" in table.smollm2("saes")(tmp_path / "none.json")


def test_a_result_keeps_the_tasks_of_an_older_one_of_the_same_saes(made):
    new = made[0]
    old = new | {"tasks": {"sums": "of before", "sizes": "of before"}}
    both = job.added_to(old, new | {"comparison": None})
    assert both["tasks"] == {"sums": "of before", "sizes": new["tasks"]["sizes"]}
    assert both["comparison"] == new["comparison"]
    with pytest.raises(CorrSteerError, match="out holds a result of other SAEs"):
        job.added_to(old | {"saes": {}}, new)


def test_both_ways_of_working_find_the_same(made):
    found = made[0]["comparison"]["check"]
    assert found["same_rewards"] and found["r_apart"] < 1e-4
    assert found["same_features"] == found["features"] > 0


def test_a_second_run_makes_nothing_again(made):
    result, options, of_tokens, reads = made
    again = job.run(of_tokens, reads, options)
    assert again["tasks"] == result["tasks"] and again["saes"] == result["saes"]


def test_activations_leave_out_what_all_texts_begin_with(made):
    _, options, of_tokens, reads = made
    tokens = activations.load_tokens(options.activations)
    text = reads.decode(tokens.ids.tolist())
    assert "<s>" not in text and "user" not in text and "larger than" in text
    x, norms = activations.load(options.activations, 2)
    assert x.shape == (len(tokens.ids), 32)
    assert norms["most"] == pytest.approx(float(x.norm(dim=1).max()), rel=1e-5)
    assert 0 < tokens.training < len(tokens.ids)


def test_residuals_are_those_of_a_pass_over_the_whole_text(made):
    _, options, of_tokens, reads = made
    tokens, (x, _) = activations.load_tokens(options.activations), activations.load(options.activations, 1)
    opening = reads("<s>user\n", add_special_tokens=False)["input_ids"]
    for start, end in list(zip(tokens.cu_seqlens, tokens.cu_seqlens[1:]))[:3]:
        ids = torch.tensor([opening + tokens.ids[start:end].tolist()])
        read = of_tokens(ids, output_hidden_states=True).hidden_states[2][0, len(opening) :]
        torch.testing.assert_close(x[start:end], read, rtol=1e-4, atol=1e-4)


def test_top_tokens_are_those_of_the_largest_activations(made):
    _, options, _, reads = made
    encoder = job.saes.load(options.sae(1))[0]
    x, _ = activations.load(options.activations, 1)
    z = top_tokens.encode(x, encoder)
    index = int(z.sum(0).argmax())
    found = top_tokens.top_tokens(options.activations, 1, encoder, [index], reads, n=3)[index]
    tokens = activations.load_tokens(options.activations)
    assert found["top"][0]["activation"] == pytest.approx(float(z[:, index].max()), abs=1e-3)
    assert found["top"][0]["token"] == reads.decode([int(tokens.ids[int(z[:, index].argmax())])])
    assert len({one["token"] for one in found["top"]}) == len(found["top"]) <= 3
    assert found["active"] == pytest.approx(float((z[:, index] > 0).double().mean()))


def test_a_stage_that_is_there_is_not_made_again(tmp_path):
    calls = []
    for _ in range(2):
        found = stage(tmp_path, "one", lambda: {"n": len(calls) or calls.append(1) or 5})
    assert found["n"] == 5 and found["seconds"] >= 0 and len(calls) == 1
