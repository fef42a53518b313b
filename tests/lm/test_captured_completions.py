"""A capture goes along as a batch is cut down to the rows that go on, and holds what it would of the whole batch."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from tiny_models import PAD, WIDTH, build, prompts_of, tiny

from corrsteer import Capture, Decoding, HookPoint
from corrsteer.errors import CorrSteerError
from corrsteer.lm import generation
from corrsteer.lm.generation import Generator

LENGTHS, N = (2, 7, 3, 5, 4), 8
POINTS = {"embedding": HookPoint(0, "resid_pre"), 1: HookPoint(1), "mlp": HookPoint(2, "mlp_out")}
STEP_BYTES = len(LENGTHS) * WIDTH * 4 * len(POINTS)


@pytest.fixture(autouse=True)
def _cut_whenever_a_row_has_ended(monkeypatch):
    monkeypatch.setattr(generation, "PASS", 0)
    monkeypatch.setattr(generation, "ENDED", 0.01)


def generator(model, stops, **decoding):
    decode = lambda rows, skip_special_tokens: [tuple(row) for row in rows]  # noqa: E731
    tokenizer = SimpleNamespace(pad_token_id=PAD, eos_token_id=list(stops), batch_decode=decode)
    return Generator(model, tokenizer, Decoding(**{"max_new_tokens": N} | decoding))


def captured(model, prompts, stops, whole, *, sink=None, positions="generated", buffer_bytes=1 << 30, **decoding):
    """What is captured, how many rows each call of generate begins with, and the completions."""
    g, rows = generator(model, stops, **decoding), []
    capture = Capture(
        model, POINTS, stop_tokens=stops, max_new_tokens=N, positions=positions, buffer_bytes=buffer_bytes, sink=sink
    )
    within = lambda left: rows.append(len(left)) or contextlib.nullcontext()  # noqa: E731
    how = {"criteria": [capture.stopping_criterion]} if whole else {"capture": capture}
    with capture:
        completions = g.complete(prompts, list(range(len(prompts))), share=False, within=within, **how)
    return capture, rows, completions


def that_stop(model, **decoding):
    """Prompts and stop tokens with which rows end at different steps, and one never."""
    for seed in range(200):
        prompts = prompts_of(LENGTHS, seed)
        tokens = [c.text for c in generator(model, [], **decoding).complete(prompts, list(range(5)), share=False)]
        stops = [tokens[0][0], tokens[1][2], tokens[2][4]]
        ends = [next((at for at, token in enumerate(row) if token in stops), N) for row in tokens]
        if ends[:3] == [0, 2, 4] and max(ends) == N:
            return prompts, stops
    raise AssertionError("no prompts stop as they should")


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("positions", ["generated", "all"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_what_is_captured_of_a_batch_that_is_cut_down_is_what_is_captured_of_it_whole(
    architecture, positions, temperature
):
    model = tiny(architecture)
    prompts, stops = that_stop(model, temperature=temperature)
    whole, once, expected = captured(model, prompts, stops, True, positions=positions, temperature=temperature)
    capture, rows, completions = captured(model, prompts, stops, False, positions=positions, temperature=temperature)
    assert once == [5] and len(rows) >= 3 and rows == sorted(set(rows), reverse=True)
    assert completions == expected
    for key in POINTS:
        torch.testing.assert_close(capture.packed(key)[0], whole.packed(key)[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(capture.packed(key)[1], whole.packed(key)[1])
        torch.testing.assert_close(capture.last_prompt(key), whole.last_prompt(key), rtol=1e-4, atol=1e-4)


def test_parts_that_go_to_the_sink_are_of_all_rows_though_some_have_left():
    model, parts = tiny("llama"), []
    prompts, stops = that_stop(model)
    whole, _, _ = captured(model, prompts, stops, True)
    capture, rows, _ = captured(
        model, prompts, stops, False, buffer_bytes=3 * STEP_BYTES, sink=lambda *part: parts.append(part)
    )
    assert capture.flushed and len(rows) >= 3
    for key in POINTS:
        pieces = [(x, cu) for of, x, cu in parts if of == key] + [capture.packed(key)]
        split = [x.split(cu.diff().tolist()) for x, cu in pieces]
        joined = torch.cat([torch.cat([piece[row] for piece in split]) for row in range(5)])
        torch.testing.assert_close(joined, whole.packed(key)[0], rtol=1e-4, atol=1e-4)


def test_a_row_without_a_stop_token_cannot_be_left_out():
    model = tiny("llama")
    prompts, stops = that_stop(model)
    capture = Capture(model, POINTS, stop_tokens=[], max_new_tokens=N)
    with capture, pytest.raises(CorrSteerError, match=r"rows must hold every row without a stop token .* \[0\]"):
        generator(model, stops).complete(prompts, [0] * 5, share=False, capture=capture)


def test_rows_are_left_out_between_calls_alone():
    with (
        Capture(tiny("llama"), POINTS, stop_tokens=[], max_new_tokens=N) as capture,
        pytest.raises(CorrSteerError, match="once a call of generate is over"),
    ):
        capture.keep_rows([0])


def test_a_capture_still_refuses_another_call_that_nobody_told_it_of():
    model = build("llama")
    with Capture(model, POINTS, stop_tokens=[], max_new_tokens=N) as capture:
        g = generator(model, [])
        g.complete(prompts_of(LENGTHS), [0] * 5, share=False, capture=capture)
        with pytest.raises(CorrSteerError, match="a capture holds one call of model.generate"):
            g.complete(prompts_of(LENGTHS), [0] * 5, share=False, capture=capture)
