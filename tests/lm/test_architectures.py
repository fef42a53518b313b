"""Every causal language model of transformers, tiny and random: steered, captured, or refused for a reason.

What happens to each is written into docs/architectures.md: `python tests/lm/test_architectures.py` writes it anew.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import architectures
import pytest
import torch
import transformers

from corrsteer.errors import CorrSteerError
from corrsteer.lm import generation_settings, hook_points
from corrsteer.lm.capture import Capture
from corrsteer.lm.decoding import Decoding
from corrsteer.lm.generation import Generator
from corrsteer.lm.hook_points import HookPoint
from corrsteer.lm.teacher_forcing import TeacherForcing
from corrsteer.lm.token_positions import POSITIONS
from corrsteer.steering.steering import Steering
from corrsteer.version import __version__

DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"
LENGTHS, N = (2, 7, 5), 4
POINT = HookPoint(1)
CLOSE = {"rtol": 1e-3, "atol": 1e-3, "equal_nan": True}


@dataclass(frozen=True)
class Outcome:
    """What comes of an architecture: `supported`, `refused` or `untested`, and why."""

    state: str
    reason: str = ""
    sublayers: bool = False
    rows: int = len(LENGTHS)
    once: str = ""  # what is read once for many rows
    again: bool = False  # whether it reads a completion again as it wrote it


class Prompts:
    """A left-padded batch; of rows, the longest alone if there is but one."""

    def __init__(self, rows: int):
        generator, width = torch.Generator().manual_seed(0), max(LENGTHS)
        lengths = LENGTHS if rows > 1 else (width,)
        self.ids = torch.zeros(rows, width, dtype=torch.int64)
        self.mask = torch.zeros(rows, width, dtype=torch.int64)
        for row, length in enumerate(lengths):
            self.ids[row, width - length :] = torch.randint(3, architectures.VOCABULARY, (length,), generator=generator)
            self.mask[row, width - length :] = 1

    def generate(self, model, **options):
        """The logits of N greedy steps `[rows, N, vocabulary]`."""
        return torch.stack(self._output(model, **options).logits, 1)

    def generate_tokens(self, model, **options):
        """The tokens of N greedy steps `[rows, N]`."""
        return self._output(model, **options).sequences[:, -N:]

    def _output(self, model, **options):
        return model.generate(
            input_ids=self.ids, attention_mask=self.mask, max_new_tokens=N, min_new_tokens=N, do_sample=False,
            output_logits=True, return_dict_in_generate=True, pad_token_id=0, **options,
        )  # fmt: skip

    def real(self, read: int, steps: int):
        """Which columns of a pass are no padding, by how many tokens were read before: `[rows, steps]`."""
        generated = torch.ones(len(self.ids), read + steps, dtype=torch.bool)
        generated[:, : self.mask.shape[1]] = self.mask.bool()
        return generated[:, read : read + steps]


class ByHand:
    """A plain hook on a decoder layer, that adds a vector, or only looks. It counts what it has read."""

    def __init__(self, model, prompts, positions="all", vector=None):
        self.prompts, self.positions, self.vector = prompts, positions, vector
        self.read, self.seen = 0, []
        _, layers = hook_points.decoder_layers(model)
        self.handle = layers[POINT.layer].register_forward_hook(self)

    def __call__(self, module, args, output):
        h = output[0] if isinstance(output, (tuple, list)) else output
        steps, width = h.shape[1], self.prompts.ids.shape[1]
        start = 0 if steps > 1 else self.read  # without a cache, everything is read anew
        self.read = start + steps
        real = self.prompts.real(start, steps)
        self.seen.append((h.detach().clone(), real))
        if self.vector is None:
            return None
        column = torch.arange(start, start + steps)
        chosen = {"generated": column >= width - 1, "all": column >= 0, "prompt": column < width}[self.positions]
        h = torch.where((real & chosen)[..., None], h + self.vector.to(h.dtype), h)
        return type(output)([h, *output[1:]]) if isinstance(output, (tuple, list)) else h


@contextlib.contextmanager
def by_hand(*given):
    hand = ByHand(*given)
    yield hand
    hand.handle.remove()


def problem(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


@functools.cache
def outcome(architecture: str, multimodal: bool = False) -> Outcome:
    """Build the model, steer it and capture it. What is supported but does not agree fails an assertion."""
    transformers.logging.set_verbosity_error()
    try:
        model = architectures.build(architecture, multimodal)
        prompts = Prompts(len(LENGTHS))
        cached = prompts.generate(model)
    except Exception as error:  # whatever a model raises
        return Outcome("untested", problem(error))
    try:
        uncached = prompts.generate(model, use_cache=False)
        if not torch.allclose(cached, uncached, **CLOSE):  # its own batches or its cache are broken: try one row
            one = Prompts(1)
            alone = one.generate(model)
            if torch.allclose(alone, one.generate(model, use_cache=False), **CLOSE):
                prompts, cached, uncached = one, alone, alone
    except Exception:  # it cannot do without a cache
        uncached = None
    same = uncached is not None and torch.allclose(cached, uncached, **CLOSE)
    reasons = [
        refusal(check, model, prompts, positions, *given)
        for check, where, given in (
            (check_steering, POSITIONS, (cached, same, uncached is not None)),
            (check_capture, ("generated", "all"), (same,)),
        )
        for positions in where
    ]
    if any(reasons):
        assert all(reasons), "what is refused for one is refused for all"
        return Outcome("refused", reasons[0])
    try:
        hook_points.check_point(model, HookPoint(POINT.layer, "mlp_out"))
        hook_points.attach(model, HookPoint(POINT.layer, "mlp_out"), print).remove()
        sublayers = True
    except CorrSteerError:
        sublayers = False
    rows = len(prompts.ids)
    return Outcome("supported", "", sublayers, rows, check_reuse(model, rows), check_teacher_forcing(model, prompts))


def refusal(check, *given) -> str:
    """Why a check was refused; nothing where it was not."""
    try:
        check(*given)
    except CorrSteerError as error:
        return str(error)
    return ""


def check_steering(model, prompts, positions, plain, same, can_uncached):
    """Steering is what a plain hook does, with a cache and without; and both are the same where the model's are."""
    width = hook_points.width(model)
    vector = 3 * torch.randn(width, generator=torch.Generator().manual_seed(5))
    steering = Steering.from_vectors({str(POINT): vector})
    results = {}
    for use_cache in (True, False) if can_uncached else (True,):
        with steering.apply(model, positions):
            steered = prompts.generate(model, use_cache=use_cache)
        with by_hand(model, prompts, positions, vector):
            expected = prompts.generate(model, use_cache=use_cache)
        torch.testing.assert_close(steered, expected, **CLOSE)
        assert not torch.allclose(steered, plain, **CLOSE), "nothing was steered"
        results[use_cache] = steered
    if same and can_uncached:
        torch.testing.assert_close(results[True], results[False], rtol=1e-2, atol=1e-2)


def check_capture(model, prompts, positions, same):
    """What is captured with a cache is what a pass over prompts and answers reads, and what a plain hook sees."""
    with Capture(model, {"x": POINT}, stop_tokens=[], positions=positions, max_new_tokens=N) as capture:
        prompts.generate(model, stopping_criteria=[capture.stopping_criterion])
    x, cu_seqlens = capture.packed("x")
    if same:  # the last pass without a cache is that over everything
        with by_hand(model, prompts) as hand:
            prompts.generate(model, use_cache=False)
        parts = hand.seen[-1:]
    else:
        with by_hand(model, prompts) as hand:
            prompts.generate(model)
        parts = hand.seen
    h, real = torch.cat([h for h, _ in parts], 1), torch.cat([real for _, real in parts], 1)
    first = prompts.ids.shape[1] - 1 if positions == "generated" else 0
    expected = [row[keep] for row, keep in zip(h[:, first:], real[:, first:])]
    assert cu_seqlens.diff().tolist() == [len(row) for row in expected]
    torch.testing.assert_close(x, torch.cat(expected), **CLOSE)


def check_reuse(model, rows) -> str:
    """What is read once; steered completions are the same as where every row is read whole."""
    decode = lambda rows, skip_special_tokens: [tuple(row) for row in rows]  # noqa: E731
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=None, batch_decode=decode)
    for name in generation_settings.REFUSED:
        setattr(model.generation_config, name, None)
    g = Generator(model, tokenizer, Decoding(max_new_tokens=N))
    generator = torch.Generator().manual_seed(3)
    words = lambda n: torch.randint(3, architectures.VOCABULARY, (n,), generator=generator).tolist()  # noqa: E731
    head, *rests = map(words, (40, *LENGTHS))
    prompts, keys = [head + rest for rest in rests], [0] * len(rests)
    vector = 3 * torch.randn(hook_points.width(model), generator=torch.Generator().manual_seed(5))
    steering = Steering.from_vectors({str(POINT): vector})
    if rows > 1:  # otherwise the model's own batches are broken
        with steering.apply(model):
            expected = g.complete(prompts, keys, share=False)
            assert g.complete(prompts, keys) == expected
    if rows > 1 and g.reuse.rows:
        begun = g.read(prompts)
        with steering.apply(model):
            assert g.finish(begun, keys) == expected
    return ", ".join(["prompts"] * g.reuse.rows + ["prefixes"] * g.reuse.prefix) or "nothing"


def check_teacher_forcing(model, prompts) -> bool:
    """Whether completions can be read again; then what is read is what was captured, in another batch as well."""
    rows = range(len(prompts.ids))
    for positions in ("generated", "all"):
        with Capture(model, {"x": POINT}, stop_tokens=[], positions=positions, max_new_tokens=N) as capture:
            tokens = prompts.generate_tokens(model, stopping_criteria=[capture.stopping_criterion])
        x, cu_seqlens = capture.packed("x")
        expected = x.split(cu_seqlens.diff().tolist())
        sequences = [(prompts.ids[i][prompts.mask[i].bool()].tolist(), tokens[i].tolist()) for i in rows]
        try:
            reading = TeacherForcing(model, {"x": POINT}, positions=positions)
        except CorrSteerError:
            assert positions == "generated", "what is refused for one is refused for all"
            return False
        for order in ([*rows], [*rows][:0:-1] or [0]):
            x, cu_seqlens = reading.read([sequences[i] for i in order]).packed("x")
            assert cu_seqlens.diff().tolist() == [len(expected[i]) for i in order]
            torch.testing.assert_close(x, torch.cat([expected[i] for i in order]), **CLOSE)
    return True


def rendered() -> str:
    """The document."""
    outcomes = {architecture: outcome(architecture) for architecture in architectures.NAMES}
    states = {state: [a for a, o in outcomes.items() if o.state == state] for state in STATES}
    lines = [
        "# Architectures",
        "",
        f"Every causal language model class of transformers {transformers.__version__}, as a tiny random model: a "
        "left-padded batch is generated with and without a cache, steered at the output of a decoder layer and "
        "captured there, and its completions are read again. Steering is compared with a plain hook that was written "
        "for the purpose, and what is captured with one pass over prompts and completions. This page is generated by "
        "that test, `tests/lm/test_architectures.py`.",
        "",
        f"{len(outcomes)} architectures: {', '.join(f'{len(names)} {state}' for state, names in states.items())}.",
        "",
        "## Supported",
        "",
        "`attn_out` and `mlp_out` can be used where two parts of a layer put out what it adds to the residual stream; "
        "`resid_pre` and `resid_post` always. What is read once: `prompts`, for all trials of each, and `prefixes`, "
        "for all prompts of a batch that begin alike. Read again: whether `TeacherForcing` reads a completion as it "
        "was written, or refuses the model, as its residuals depend on the padding beside a row, on its cache or on "
        "where a prompt ends.",
        "",
        "| architecture | hook points | read once | read again | |",
        "|---|---|---|---|---|",
    ]
    for name in states["supported"]:
        found = outcomes[name]
        points = "all" if found.sublayers else "`resid_pre`, `resid_post`"
        alone = "" if found.rows > 1 else f"one prompt at a time: {ALONE}"
        lines.append(f"| `{name}` | {points} | {found.once} | {AGAIN[found.again]} | {alone} |")
    for state in ("refused", "untested"):
        lines += ["", f"## {state.capitalize()}", "", STATES[state], "", "| architecture | reason |", "|---|---|"]
        lines += [f"| `{name}` | {outcomes[name].reason.replace('|', '/')} |" for name in states[state]]
    return "\n".join([*lines, *multimodal()]) + "\n"


def multimodal() -> list[str]:
    """The document's part on models that read images as well."""
    outcomes = {architecture: outcome(architecture, True) for architecture in architectures.MULTIMODAL}
    lines = ["", "## Multimodal", "", "Models that read images, given text alone.", ""]
    for state in STATES:
        names = ", ".join(f"`{name}`" for name, found in outcomes.items() if found.state == state)
        lines += [f"- {state}: {names or 'none'}"]
    refused = [f"`{name}`" for name, found in outcomes.items() if found.state == "supported" and not found.again]
    return [*lines, f"- {NOT_AGAIN}: {', '.join(refused) or 'none'}"]


AGAIN = {True: "yes", False: "refused"}
NOT_AGAIN = "supported, but completions are not read again"
ALONE = "transformers' own batch gives other results with a cache than without"
STATES = {
    "supported": "",
    "refused": "Nothing is captured or steered, with this error.",
    "untested": "A tiny model of theirs cannot be built from the configuration alone, or does not generate by itself. "
    "Nothing is known of them.",
}


@pytest.mark.parametrize("architecture", architectures.NAMES)
def test_a_causal_language_model_is_steered_and_captured_or_refused_as_the_documents_say(architecture):
    found = outcome(architecture)
    if of_this_transformers():
        state, row = documented()[architecture]
        assert found.state == state and found.reason.replace("|", "/") in row
        assert not found.once or f"| {found.once} | {AGAIN[found.again]} |" in row


@pytest.mark.parametrize("architecture", architectures.MULTIMODAL)
def test_a_multimodal_model_given_text_is_steered_and_captured_or_refused_as_the_documents_say(architecture):
    found = outcome(architecture, True)
    if of_this_transformers():
        lines = DOCUMENT.read_text(encoding="utf-8").partition("## Multimodal")[2].splitlines()
        named = [line[2:].partition(":")[0] for line in lines if f"`{architecture}`" in line]
        assert named == [found.state, *[NOT_AGAIN] * (found.state == "supported" and not found.again)]


@functools.cache
def documented() -> dict[str, tuple[str, str]]:
    """What the document says of each architecture: its state, and the whole row."""
    rows, state = {}, ""
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            state = line[3:].lower()
        elif state == "multimodal":
            break
        elif line.startswith("| `"):
            rows[line.split("`")[1]] = state, line
    return rows


def of_this_transformers() -> bool:
    """Whether the document was written with the transformers that is installed."""
    return f"transformers {transformers.__version__}," in DOCUMENT.read_text(encoding="utf-8")


def test_the_document_lists_what_the_installed_transformers_has():
    if not of_this_transformers():
        pytest.skip("the document is of another transformers")
    assert set(documented()) == set(architectures.NAMES)
    assert len([name for name, (state, _) in documented().items() if state == "supported"]) > 150


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    DOCUMENT.write_text(rendered(), encoding="utf-8")
    sys.stdout.write(f"{DOCUMENT} ({__version__})\n")
