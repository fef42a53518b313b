"""Which code runs an operation: a registry of backends, each with a verifier that says yes, or no and why.

Chosen automatically, a backend that says no is passed over and logged once. Asked for by name, with `backend=` or
the environment variable CORRSTEER_BACKEND, it raises with the reason and what would fix it.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from corrsteer.arguments import check_type
from corrsteer.errors import BackendUnavailable
from corrsteer.ops import cuda_backend, native_backend, reference, triton_backend
from corrsteer.ops.calls import OPERATIONS, Call, Verdict
from corrsteer.sae.encoder import SparseEncoder

log: logging.Logger = logging.getLogger(__name__)

ENVIRONMENT = "CORRSTEER_BACKEND"


@dataclass(frozen=True)
class Backend:
    """Functions with the signatures of `corrsteer.ops.reference`, and a verifier of calls to them.

    `held_bytes` is what it holds of an encoder between calls, beside the encoder itself.
    """

    name: str
    operations: Mapping[str, Callable[..., Any]]
    verify: Callable[[Call], Verdict]
    held_bytes: Callable[[SparseEncoder], int] = lambda encoder: 0


_registry: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    """Add a backend, or replace the one of its name. The last one registered is tried first."""
    unknown = set(backend.operations) - set(OPERATIONS)
    if unknown:
        raise ValueError(f"operations must be among {', '.join(OPERATIONS)}, got {', '.join(sorted(unknown))}")
    _registry.pop(backend.name, None)
    _registry[backend.name] = backend
    _find.cache_clear()


def unregister(name: str) -> None:
    """Remove a backend."""
    del _registry[name]
    _find.cache_clear()


def registered() -> list[Backend]:
    """All backends, in the order in which they are tried."""
    return list(reversed(_registry.values()))


def choose(call: Call, name: str | None = None) -> Backend:
    """The backend that runs a call.

    Raises
    ------
    BackendUnavailable : if `name`, or CORRSTEER_BACKEND where `name` is None, cannot.
    """
    if name is not None:
        check_type("backend", name, str, "the name of a backend")
    return _find(call, name or os.environ.get(ENVIRONMENT) or None)


def check_name(name: str) -> None:
    """Raise unless there is a backend of that name."""
    if name not in _registry:
        raise BackendUnavailable(f"backend must be one of {', '.join(_registry)}, got {name!r}")


def judge(backend: Backend, call: Call) -> Verdict:
    """Whether a backend can run a call, and why not."""
    if call.operation not in backend.operations:
        return Verdict(False, f"it has no {call.operation}", "use another backend for this operation")
    return backend.verify(call)


@functools.cache
def _find(call: Call, name: str | None) -> Backend:
    if name is not None:
        check_name(name)
        verdict = judge(_registry[name], call)
        if not verdict.ok:
            raise BackendUnavailable(f"backend {name!r} cannot run {_words(call)}: {verdict.reason}; {verdict.fix}")
        return _registry[name]
    for backend in registered():
        verdict = judge(backend, call)
        if verdict.ok and verdict.automatic:
            return backend
        _log_once(backend.name, verdict)
    raise BackendUnavailable(f"no backend runs {_words(call)}")


def _words(call: Call) -> str:
    encoder = " ".join(filter(None, (call.activation, call.precision)))
    encoder = f" for {encoder}" if encoder else ""
    return f"{call.operation} on {call.device} in {call.dtype}{encoder}"


@functools.cache
def _log_once(name: str, verdict: Verdict) -> None:
    if verdict.missed:
        log.warning("backend %s is missing, a slower one runs: %s. To mend it: %s", name, verdict.reason, verdict.fix)
    else:
        log.info("backend %s passed over: %s", name, verdict.reason)


register(
    Backend(
        name="reference",
        operations={operation: getattr(reference, operation) for operation in OPERATIONS},
        verify=lambda call: Verdict(True),
    )
)
register(Backend("native", native_backend.OPERATIONS, native_backend.verify, native_backend.held_bytes))
for _name, _module in (("triton", triton_backend), ("cuda", cuda_backend)):
    register(Backend(_name, _module.OPERATIONS, _module.verify))
