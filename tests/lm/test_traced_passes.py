"""Which tokens are meant, told by tensors alone. Whole models are in tests/steering/test_install.py."""

import pytest
import torch
import transformers
from tiny_models import WIDTH, build, generate, prompts_of

from corrsteer import Steering
from corrsteer.errors import CorrSteerError
from corrsteer.lm.token_positions import real_tokens

REAL = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]]).bool()  # columns 0..5
ROOM = torch.nn.functional.pad(REAL, (0, 3))  # a static cache has room for three more


def prepared(keys, steps, start, first=0):
    """A mask [B, 1, steps, keys] as for a static cache: column `first + k` is seen from what comes after it."""
    column, at = torch.arange(keys) + first, torch.arange(steps) + start
    held = torch.nn.functional.pad(REAL, (0, keys))[:, first : first + keys]
    return held[:, None, None] & (column <= at[:, None])


# (mask, tokens read, tokens read before)
MASKS = {
    "of the tokens read": (REAL.long(), 6, 0),
    "of the tokens read alone": (REAL[:, 3:].long(), 3, 3),
    "of all tokens": (REAL.long(), 4, 2),
    "of a cache with room": (ROOM.long(), 3, 1),
    "for a static cache": (prepared(9, 6, 0), 6, 0),
    "for a static cache, later": (prepared(9, 4, 1), 4, 1),
    "added to scores": (torch.where(prepared(9, 4, 1), 0.0, float("-inf")), 4, 1),
    "for a sliding window": (prepared(4, 2, 4, first=2), 2, 4),
    "one a kind": ({"sliding": prepared(4, 2, 4, first=2), "full": prepared(9, 2, 4), "linear": None}, 2, 4),
    "none at all": (None, 4, 2),
    "one for all rows": (prepared(9, 6, 0)[1:2], 6, 0),
}


@pytest.mark.parametrize(("mask", "steps", "start"), MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("known", [True, False], ids=["start in Python", "start in a tensor"])
def test_padding_is_told_by_every_kind_of_mask_whether_or_not_python_knows_the_start(mask, steps, start, known):
    got = real_tokens(mask, 3, steps, start if known else torch.tensor(start), torch.device("cpu"))
    every = mask is None or (isinstance(mask, torch.Tensor) and len(mask) == 1)
    assert torch.equal(got, REAL[:, start : start + steps] | every)


def test_a_mask_that_covers_some_of_what_was_read_before_is_refused_where_that_is_known():
    with pytest.raises(CorrSteerError, match="does not say which tokens are padding"):
        real_tokens(REAL[:, :5], 3, 4, 2, torch.device("cpu"))


@pytest.mark.parametrize("mask", [torch.ones(3, 2), torch.ones(3, 4, 4), torch.ones(3, 1, 2, 4), {"full": "blocks"}])
def test_a_mask_that_does_not_say_which_tokens_are_padding_is_refused(mask):
    with pytest.raises(CorrSteerError, match="does not say which tokens are padding"):
        real_tokens(mask, 3, 4, torch.tensor(0), torch.device("cpu"))


def test_hooks_on_one_model_leave_another_of_its_class_alone():
    installed, applied, plain = (build("llama") for _ in range(3))
    prompts, steering = prompts_of((2, 7, 5)), Steering.from_vectors({"blocks.1.hook_resid_post": torch.ones(WIDTH)})
    config = transformers.CompileConfig(backend="never to be used")
    config._compile_all_devices = True
    expected = generate(plain, prompts, 4)
    with steering.install(installed), steering.apply(applied):
        assert torch.equal(generate(plain, prompts, 4), expected)
        steered = generate(installed, prompts, 4)
        assert not torch.equal(steered, expected)
        options = {"cache_implementation": "static", "compile_config": config}
        assert torch.equal(generate(applied, prompts, 4, **options), steered)
    assert torch.equal(generate(installed, prompts, 4), expected)
