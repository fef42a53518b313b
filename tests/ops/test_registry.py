"""The registry: who runs an operation, and what is said when nobody can."""

import logging

import pytest
import torch

from corrsteer import BackendUnavailable, steer_add
from corrsteer.ops import reference, registry
from corrsteer.ops.registry import Backend, Call, Verdict


@pytest.fixture(autouse=True)
def those_of_every_machine(monkeypatch):
    """The reference, and Triton's kernels, which need a GPU; what is compiled may be there or not."""
    known = {b.name: b for b in registry.registered()}
    monkeypatch.setattr(registry, "_registry", {name: known[name] for name in ("reference", "triton")})
    registry._find.cache_clear()
    yield
    registry._find.cache_clear()


@pytest.fixture
def registered():
    """Registers backends for one test."""
    names = []

    def register(name, verdict, operations=None):
        names.append(name)
        registry.register(Backend(name, operations or {"steer_add": reference.steer_add}, lambda call: verdict))

    yield register
    for name in names:
        registry.unregister(name)


def choose(name=None, operation="steer_add", activation=None):
    return registry.choose(Call(operation, torch.device("cpu"), torch.float32, activation), name).name


def test_the_reference_runs_everything_everywhere():
    for operation in registry.OPERATIONS:
        assert registry.choose(Call(operation, torch.device("cuda"), torch.bfloat16), "reference").name == "reference"


def test_the_last_registered_backend_that_says_yes_is_chosen_for_what_it_has(registered):
    registered("swift", Verdict(True))
    assert choose() == "swift"
    assert choose(operation="encode") == "reference"


def test_a_backend_that_says_no_is_passed_over_and_logged_once(registered, caplog):
    registered("absent", Verdict(False, "there is no such chip here", "buy one"))
    with caplog.at_level(logging.INFO, "corrsteer.ops.registry"):
        assert choose() == "reference"
        registry._find.cache_clear()
        assert choose() == "reference"
    assert [r.getMessage() for r in caplog.records] == ["backend absent passed over: there is no such chip here"]


def test_a_backend_asked_for_by_name_raises_with_the_reason_and_the_fix(registered):
    registered("absent", Verdict(False, "there is no such chip here", "buy one"))
    with pytest.raises(BackendUnavailable, match="'absent' cannot run steer_add on cpu .* no such chip here; buy one"):
        choose("absent")
    with pytest.raises(BackendUnavailable, match="must be one of reference, triton, absent, got 'fast'"):
        choose("fast")


def test_a_backend_asked_for_by_name_raises_for_an_operation_it_does_not_have(registered):
    registered("partial", Verdict(True))
    with pytest.raises(BackendUnavailable, match="it has no encode;"):
        choose("partial", "encode")


def test_the_environment_asks_for_a_backend_as_the_argument_does(registered, monkeypatch):
    calls = []
    registered("counting", Verdict(True), {"steer_add": lambda *a: calls.append("counting")})
    arguments = torch.zeros(1, 1, 2), torch.ones(1, 2), torch.zeros(1, dtype=torch.int32)
    monkeypatch.setenv(registry.ENVIRONMENT, "reference")
    assert steer_add(*arguments).sum() == 2 and calls == []
    steer_add(*arguments, backend="counting")
    assert calls == ["counting"]
    monkeypatch.setenv(registry.ENVIRONMENT, "nonsense")
    with pytest.raises(BackendUnavailable, match="got 'nonsense'"):
        steer_add(*arguments)


def test_a_backend_cannot_claim_an_unknown_operation():
    with pytest.raises(ValueError, match="operations must be among .* got decode"):
        registry.register(Backend("odd", {"decode": None}, lambda call: Verdict(True)))


def test_a_verifier_sees_what_it_is_asked_to_run():
    def verify(call):
        return Verdict(call.activation != "topk", "it has no topk")

    registry.register(Backend("picky", {"encode": reference.encode}, verify))
    try:
        assert choose(operation="encode", activation="relu") == "picky"
        assert choose(operation="encode", activation="topk") == "reference"
        with pytest.raises(
            BackendUnavailable, match="cannot run encode on cpu in torch.float32 for topk: it has no topk"
        ):
            choose("picky", "encode", "topk")
    finally:
        registry.unregister("picky")
