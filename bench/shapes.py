"""What is measured: the cases, the most important first, and the ragged samples they are made of."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace

GEMMA_16K, GEMMA_65K = (2304, 16384), (2304, 65536)  # Gemma 2 2B with Gemma Scope
LLAMA_32K, LLAMA_131K = (4096, 32768), (4096, 131072)  # Llama 3.1 8B with Llama Scope
SAES = (GEMMA_16K, LLAMA_32K, GEMMA_65K, LLAMA_131K)


@dataclass(frozen=True)
class Case:
    """One comparison: an operation at a shape.

    Attributes
    ----------
    kind : `encode_update`, `permutations` (encode_pool, update_moments and evidence, against encode_update),
        `update_moments`, `update_sums`, `steer_add`, `host` and `steer_host` (a call's time on the host, of
        `encode_update` and `steer_add`) or `graph` (a replay).
    d_in, d_sae : width of the residual stream and number of features.
    tokens : T, kept tokens in the batch; samples for `update_moments` and `update_sums`, rows for `steer_add`.
    steps : mean number of kept tokens a sample.
    precision : of the encoder; residuals are float32 for `fp32`, float16 for `fp16` and bfloat16 otherwise.
    labels : R, reward columns; for `update_sums` columns of the first power, for `permutations` how many of them.
    k : features kept per token by topk.
    compiled : the mode in which torch.compile takes part, which takes tens of seconds to compile; "" for not at all.
    repeats : runs of ours, of the same inputs, whose bits are compared.
    """

    kind: str
    d_in: int
    d_sae: int
    tokens: int
    steps: int = 1
    precision: str = "bf16"
    activation: str = "jumprelu"
    pool: str = "mean"
    labels: int = 1
    k: int = 64
    compiled: str = ""
    repeats: int = 0

    @property
    def name(self) -> str:
        """One line for tables and logs."""
        if self.kind in ("steer_add", "steer_host"):
            where = ", on the host" if self.kind == "steer_host" else ""
            return f"steer_add [{self.tokens}, 1, {self.d_in}] {self.precision}{where}"
        if self.kind == "update_moments":
            return f"update_moments {self.tokens} samples, {self.d_sae} features, R={self.labels}"
        if self.kind == "update_sums":
            return f"update_sums {self.tokens} samples, {self.d_sae} features, C={self.labels}"
        shape = f"{self.d_in} x {self.d_sae}, {self.tokens} tokens"
        if self.kind == "permutations":
            return f"{self.labels} permutations, {shape}, {self.steps} a sample, {self.precision}"
        if self.kind != "encode_update":
            return f"{self.kind} {shape}"
        activation = f"topk {self.k}" if self.activation == "topk" else self.activation
        against = f", torch.compile {self.compiled}" if self.compiled else ""
        return f"{shape}, {self.steps} a sample, {self.precision}, {activation}, {self.pool}{against}"


def lengths(tokens: int, mean: int, seed: int = 0) -> list[int]:
    """Lengths of `tokens / mean` samples: uniform on 1..2·mean-1, then moved one by one until they sum to `tokens`."""
    if tokens % mean:
        raise ValueError(f"tokens must be a multiple of mean={mean}, got {tokens}")
    draw = random.Random(seed)
    longest = 2 * mean - 1
    drawn = [draw.randint(1, longest) for _ in range(tokens // mean)]
    excess = sum(drawn) - tokens
    step = -1 if excess > 0 else 1
    while excess:
        at = draw.randrange(len(drawn))
        if 1 <= drawn[at] + step <= longest:
            drawn[at] += step
            excess += step
    return drawn


# The shapes that are measured first: each says something that the others do not.
TELLING = (
    Case("encode_update", *GEMMA_16K, 4096, 8),  # the paper's own SAE, in batches as `collect` makes them
    Case("encode_update", *LLAMA_131K, 4096, 8),  # weights of 20 times the L2 cache: who shares what is fetched
    Case("encode_update", *LLAMA_32K, 4096, 8),  # a longer product under the same epilogue
    Case("encode_update", *GEMMA_16K, 32768, 8),  # many waves of programs: the last one, half empty, no longer counts
    Case("encode_update", *GEMMA_16K, 512, 8),  # bound by fetching the weights once, and by launches
    Case("encode_update", *GEMMA_16K, 4096, 64),  # long samples, pooled by the loop: the cheapest epilogue
    Case("encode_update", *GEMMA_16K, 4096, 1),  # one token a sample: a kernel of its own, as for multiple choice
    Case("encode_update", *GEMMA_16K, 4096, 8, "fp32"),  # three tf32 products for one
)
COMPILED = (TELLING[0], TELLING[2], TELLING[6])  # that torch.compile is tried at first
REPEATS = 20


def gpu_stages() -> dict[str, list[Case]]:
    """The GPU's cases by stage, in the order in which they are worth having should time run out."""

    def encode(saes: Iterable[tuple[int, int]], tokens: int, steps: int, **more) -> list[Case]:
        return [Case("encode_update", *sae, tokens, steps, **more) for sae in saes]

    rest = [
        *encode([GEMMA_65K], 4096, 8),
        *encode(SAES, 32768, 8),
        *encode([LLAMA_32K], 4096, 8, precision="fp32"),
        *encode([GEMMA_16K, LLAMA_32K], 4096, 8, precision="bf16x2"),
        *encode(SAES, 512, 8),
        *[Case("update_moments", 1, 16384, 4096, labels=labels) for labels in (1, 64, 1024)],
        *[Case("update_sums", 1, 16384, samples, labels=1000) for samples in (64, 4096)],
        *[Case("permutations", *GEMMA_16K, 32 * samples, 32, labels=1000) for samples in (64, 256)],
        *encode([GEMMA_16K], 4096, 8, pool="max"),
        *encode([GEMMA_16K], 4096, 8, pool="both"),
        *encode([GEMMA_16K], 4096, 8, activation="topk"),
        *encode([GEMMA_16K, LLAMA_32K], 4096, 8, precision="fp16"),
        replace(TELLING[0], compiled="max-autotune-no-cudagraphs"),
        *[case for tokens in (4096, 32768, 512) for steps in (64, 1) for case in encode(SAES, tokens, steps)],
        *[replace(case, compiled="default") for case in TELLING if case not in COMPILED],
    ]
    return {
        "shapes": [replace(c, repeats=REPEATS) for c in TELLING] + [replace(c, compiled="default") for c in COMPILED],
        "host": [
            Case("steer_host", 4096, 1, 32),
            Case("host", 2304, 1024, 32),
            Case("graph", 2304, 1024, 32),
            Case("steer_add", 4096, 1, 32),
        ],
        "rest": [case for case in rest if case not in TELLING],
    }


def toy_stages() -> dict[str, list[Case]]:
    """Cases of each stage that take a CPU no time."""
    tiny = Case("encode_update", d_in=16, d_sae=64, tokens=64, steps=4, precision="fp32", k=5)
    others = ("update_moments", "update_sums")
    return {
        "shapes": [replace(tiny, steps=steps, repeats=REPEATS) for steps in (4, 1)],
        "host": [replace(tiny, kind=kind) for kind in ("steer_host", "host", "graph")],
        "rest": [replace(tiny, kind=kind, tokens=12, labels=3) for kind in others] + [replace(tiny, pool="both")],
    }


def cpu_cases(full: bool = False, compiled: bool = False) -> list[Case]:
    """The CPU's cases: small enough for any machine, or if `full` SAEs of real models' sizes."""
    saes, tokens, features = (
        ((GEMMA_16K, LLAMA_32K), (512, 64, 4096), 16384) if full else (((512, 4096),), (512,), 4096)
    )
    cases = [
        Case("encode_update", *sae, T, steps, precision, compiled="default" if compiled and steps == 8 else "")
        for steps in (8, 1, 64)
        for T in tokens
        for sae in saes
        for precision in ("fp32", "bf16")
    ]
    some = Case("encode_update", *saes[0], 512, 8, "fp32")
    cases += [replace(some, activation="topk"), replace(some, pool="both")]
    cases += [Case("update_moments", 1, features, 64, labels=labels) for labels in (1, 64)]
    cases += [Case("update_sums", 1, features, 64, labels=labels) for labels in (8, 1000)]
    cases += [
        Case("permutations", *saes[0], 32 * samples, 32, precision, labels=1000)
        for samples in ((64, 256) if full else (16,))
        for precision in ("fp32", "bf16")
    ]
    return [*cases, *[Case("steer_add", 4096, 1, 32, precision=precision) for precision in ("fp32", "bf16")]]
