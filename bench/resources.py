"""What the compiler makes of every launch configuration that ships, without a GPU: python -m bench.resources

Each kernel is compiled ahead of time for sm_80, sm_90 and sm_100, and the table says how many registers a thread has,
how many loads and stores go to local memory (spills), how much shared memory a program takes, and which tensor-core
instruction multiplies. Exits with 1 where a configuration cannot be shipped: it spills, takes more shared memory than
the architecture has, multiplies 16-bit numbers without the architecture's own instruction, or waits for each of these
instructions on sm_90 before the next, as the assembler has it where it cannot tell which registers are in use.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may take; CUDA C++ guide, table 29
# What a product of 16-bit numbers must show: in the assembly, or for sm_100 in the PTX, where its name is stable.
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "tcgen05.mma"}
OPERANDS = {  # element types of x, weight and weight_low
    "native": ("bf16", "bf16", None),
    "bf16x2": ("bf16", "bf16", "bf16"),
    "tf32x3": ("fp32", "fp32", None),
    "ieee": ("fp32", "fp32", None),
}
WIDTH = 74  # of the labels, in print
PANEL_BLOCKS = {  # what goes on from a panel is launched with until a GPU has measured better; each program is one warp
    "BF": 128, "BT": 16, "BK": 64, "SUBTILE": 8, "WIDE_SUBTILE": 8, "GROUP_SIZE": 8, "max_tiles_per_chunk": 8,
    "descriptors": 0, "num_warps": 1, "num_stages": 1,
}  # fmt: skip
ENCODER = ("bias", "threshold", "magnitude_scale", "magnitude_bias", "weight_sum")


@dataclass(frozen=True)
class Specimen:
    """One kernel as it would be compiled: types of its run-time arguments, values of the others."""

    kernel: str  # module and function under corrsteer.kernels
    arch: int
    label: str
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    product: str = ""  # the kind, where there is one


@dataclass
class Report:
    """What the compiler made of a specimen."""

    kernel: str
    arch: int
    label: str
    registers: int
    local: int  # instructions that load from or store to local memory
    shared: int  # bytes
    tensor_core: str
    faults: list[str]
    products: int = 0  # HGMMA, on sm_90
    waited: int = 0  # those of them that end a group of their own (gsb0), where Triton's have several a group


def encoding(arch: int, kernel: str, label: str, kind: str, entry: dict, types: dict, constants: dict, **given):
    """A specimen of a kernel that multiplies; `given` changes the encoder's form."""
    x, weight, low = given.get("operands", OPERANDS[kind])
    activation = given.get("activation", "jumprelu")
    present = {"jumprelu": {"threshold"}, "gated": {"magnitude_scale", "magnitude_bias"}}.get(activation, set())
    norm = {"weight_sum", "scale", "mean", "shift"} if given.get("normalised") else set()
    rows = {"x": entry["BT"], "weight": entry["BF"], "weight_low": entry["BF"]}
    all_types = {}
    for name, of in (("x", x), ("weight", weight), ("weight_low", low)):
        descriptor = f"tensordesc<{of}[{rows[name]}, {entry['BK']}]>" if entry["descriptors"] else f"*{of}"
        all_types[name] = descriptor if of else None
    for name in (*ENCODER, "scale", "mean", "shift"):
        all_types[name] = "*fp32" if name in {"bias"} | present | norm else None
    return Specimen(
        kernel, arch, label, all_types | types | dict(d_in="i32", d_sae="i32", T="i32"),
        {"ACTIVATION": activation, "DOT": kind, "DESCRIPTORS": bool(entry["descriptors"])}
        | {name: entry[name] for name in ("BF", "BT", "BK", "SUBTILE", "WIDE_SUBTILE", "GROUP_SIZE")} | constants,
        entry["num_warps"], entry["num_stages"], kind,
    )  # fmt: skip


def pooling(
    arch: int, kind: str, entry: dict, pools=("mean",), moments=True, singles=False, panels=False, **given
) -> Specimen:
    """A specimen of `encode_pool_kernel`, with `panels` as it goes on from a product of the vendor's library."""
    types = dict(cu="*i32", segment_ids="*i32", sample_stats="*fp32", partials="*fp32", finished="*fp32")
    types |= {f"pooled_{p}": "*fp32" if p in pools and not moments else None for p in ("mean", "max")}
    types |= dict(N="i32", chunk_tokens="i32", n_chunks="i32")
    if panels:
        types |= dict(product="*fp32", product_stride="i32", first_block="i32", first_chunk="i32")
        types |= dict(x=None, weight=None, weight_low=None)
    words = ["panels"] * panels + ["+".join(pools), "moments" if moments else "pooled"] + ["singles"] * singles
    words += ["short"] * ("BF16_SPLITS" in entry) + ["flat"] * ("flatten" in entry)
    words += [str(v) if k == "activation" else k for k, v in given.items()]
    constants = dict(MEAN="mean" in pools, MAX="max" in pools, MOMENTS=moments, SINGLES=singles)
    constants |= {"BF16_SPLITS": entry.get("BF16_SPLITS", 0), "FLATTEN": bool(entry.get("flatten"))}
    label = f"{kind} {entry['BF']}x{entry['BT']}x{entry['BK']} {' '.join(words)}"
    specimen = encoding(arch, "encode_pool.encode_pool_kernel", label, kind, entry, types, constants, **given)
    return replace(specimen, product="") if panels else specimen  # it multiplies no operands


def shipped(arch: int) -> Iterator[Specimen]:
    """Every configuration of an architecture's file; and with the one for many tokens every form of the kernel."""
    from corrsteer.kernels import launch

    file = launch.read(f"sm_{arch}")
    variants = {
        "encode_pool": [{}],
        "encode_pool_normalised": [{"normalised": True}],
        "encode_pool_singles": [{"singles": True}],
        "encode_pool_short": [{}],
        "encode_pool_both": [
            {"pools": ("mean", "max"), "singles": True},
            {"pools": ("mean", "max"), "normalised": True},
        ],
    }
    for name, of_name in variants.items():
        for kind in OPERANDS:
            if name == "encode_pool_short" and kind not in file.get(name, ()):
                continue  # the loop takes short samples as well
            entries = file[name if kind in file.get(name, ()) else "encode_pool"][kind]
            yield from (pooling(arch, kind, entry, **form) for entry in entries for form in of_name)
            if arch == 90 and kind == "native":  # as bench.gpu measures them beside what ships
                flat = {name: value for name, value in entries[-1].items() if name != "BF16_SPLITS"} | {"flatten": 1}
                yield from (pooling(arch, kind, flat, **form) for form in of_name)
    large = file["encode_pool"]["native"][-1]
    singles = file.get("encode_pool_singles", file["encode_pool"])["native"][-1]
    forms = [{"activation": "gated"}, {"pools": ("max",)}, {"moments": False}, {"activation": "relu"}]
    for form in forms if arch == 90 else forms[:1]:  # elsewhere what needs most registers stands for the others
        yield pooling(arch, "native", large, **form)
        yield pooling(arch, "native", singles, singles=True, **form)
    yield pooling(arch, "native", PANEL_BLOCKS, panels=True)
    both = {"pools": ("mean", "max"), "panels": True}
    for form in ({"singles": True}, {"activation": "gated"}, {"normalised": True}, {"moments": False}):
        yield pooling(arch, "native", PANEL_BLOCKS, **both, **form)
    yield pooling(arch, "native", large, operands=("fp16", "fp16", None))
    if large["descriptors"]:  # for a d_in that the copy engine cannot take
        yield pooling(arch, "native", large | {"descriptors": 0})
    yield pooling(arch, "tf32x3", file["encode_pool"]["tf32x3"][-1], operands=("bf16", "fp32", None))
    for kind in OPERANDS:
        for entry in file["encode"][kind]:
            label = f"{kind} {entry['BF']}x{entry['BT']}x{entry['BK']}"
            yield encoding(arch, "encode.encode_kernel", label, kind, entry, {"out": "*fp32"}, {})
    entry = file["encode"]["native"][-1]
    label = f"native {entry['BF']}x{entry['BT']}x{entry['BK']} normalised"
    yield encoding(arch, "encode.encode_kernel", label, "native", entry, {"out": "*fp32"}, {}, normalised=True)
    for slots in (None, "*i16"):
        label = f"native {entry['BF']}x{entry['BT']}x{entry['BK']} {'values' if slots else 'maxima'}"
        yield encoding(
            arch, "topk.topk_kernel", label, "native", entry, {"slots": slots, "out": "*fp32", "k": "i32"},
            {"ABSOLUTE": False, "BUCKET": 16},
        )  # fmt: skip
    yield from small(arch)


def raced(arch: int) -> Iterator[Specimen]:
    """What `bench.tune` would race at many tokens, in 16-bit numbers."""
    from bench import tune

    forms = {"encode_pool_singles": {"singles": True}, "encode_pool_both": {"pools": ("mean", "max")}}
    for form in tune.FORMS:
        for entry in tune.candidates("native", 4096, 0 if arch == 80 else 1, form):
            panels = entry.get("way") == "panels"
            specimen = pooling(arch, "native", entry, panels=panels, **forms.get(form, {}))
            launch = (entry["num_warps"], "warps", entry["num_stages"], "stages")
            words = (*launch, entry["SUBTILE"], entry["WIDE_SUBTILE"])
            if not panels or (entry["panel_features"], entry["panel_tokens"]) == tune.PANELS[0]:  # one kernel for all
                yield replace(specimen, label=" ".join(map(str, (specimen.label, *words))))


# What was tried beside `bench.tune.RACED` and is not raced, as most of it spills or waits for each product: form,
# features and tokens of a tile, warps, stages, SUBTILE, WIDE_SUBTILE, BF16_SPLITS and whether it is flattened.
LEFT_OUT = {
    90: (
        ("short", 128, 128, 4, 3, 16, 128, 2, 0), ("short", 128, 128, 4, 3, 16, 64, 2, 0),
        ("short", 128, 128, 4, 3, 16, 16, 2, 0), ("short", 256, 128, 8, 3, 16, 128, 2, 0),
        ("short", 256, 128, 8, 3, 16, 64, 2, 0), ("short", 128, 256, 8, 4, 16, 128, 2, 1),
        ("singles", 128, 256, 8, 4, 16, 64, 0, 0), ("singles", 128, 256, 8, 4, 16, 32, 0, 0),
        ("singles", 128, 256, 8, 4, 16, 8, 0, 0), ("singles", 64, 256, 4, 4, 16, 32, 0, 0),
        ("singles", 128, 128, 4, 3, 16, 32, 0, 0), ("singles", 128, 128, 4, 3, 16, 16, 0, 1),
    ),
    100: tuple(
        (form, 128, 128, 4, 3, 16, wide, 0, 1) for form, wide in (("mean", 64), ("max", 64), ("singles", 16))
    ),
}  # fmt: skip


def left_out(arch: int) -> Iterator[Specimen]:
    """What is not raced, in 16-bit numbers."""
    forms = {"singles": {"singles": True}, "max": {"pools": ("max",)}}
    for form, BF, BT, warps, stages, subtile, wide, splits, flat in LEFT_OUT.get(arch, ()):
        entry = {
            "BF": BF, "BT": BT, "BK": 64, "SUBTILE": subtile, "WIDE_SUBTILE": wide, "GROUP_SIZE": 8, "descriptors": 1,
            "num_warps": warps, "num_stages": stages,
        }  # fmt: skip
        entry |= ({"BF16_SPLITS": splits} if splits else {}) | ({"flatten": 1} if flat else {})
        specimen = pooling(arch, "native", entry, **forms.get(form, {}))
        yield replace(specimen, label=f"{specimen.label} {warps} warps {stages} stages {subtile} {wide}")


def small(arch: int) -> Iterator[Specimen]:
    """The kernels around the product, as `corrsteer.kernels.operations` launches them."""
    f, i, d, n = "*fp32", "*i32", "*fp64", "i32"
    sizes = dict.fromkeys(("T", "N", "d_sae", "chunk_tokens", "n_chunks", "stride"), n)
    samples = dict(cu=i, segment_ids=i, sample_stats=f)
    arrays = dict.fromkeys(("cross", "group_sum", "group_active_sum", "group_active_count"), d)
    moments = dict(partials=f, finished=f, before=d, batch_y=d, z_mean=d, z_m2=d, n_active=d) | samples | arrays
    yield Specimen("combine_chunks.combine_moments_kernel", arch, "", moments | sizes, dict(MAX=False, BF=64, BC=16))
    rows = dict(partials=f, pooled=f) | samples | sizes
    yield Specimen("combine_chunks.combine_pooled_kernel", arch, "", rows, dict(MAX=False, BF=128, BC=16))
    strides = dict.fromkeys(("pooled_n", "pooled_d", "y_n", "y_r", "N", "R", "D"), n)
    batch = dict(old_count=d, z_rows=d, y_rows=d)
    products = dict(pooled=f, y=f, z_mean=d, y_mean=d) | batch | arrays | strides
    yield Specimen("update_moments.products_kernel", arch, "", products, dict(BN=32, BR=16, BD=64), num_warps=8)
    columns = dict(pooled=f, y=f, count=d) | batch | strides
    yield Specimen("update_moments.column_moments_kernel", arch, "", columns, dict(BN=32, BC=64))
    state = dict.fromkeys(("count", "z_mean", "z_m2", "y_mean", "y_m2", "n_positive", "n_active"), d)
    yield Specimen("update_moments.merge_kernel", arch, "", state | batch | dict(N=n, R=n, D=n), dict(BC=64))
    summed = dict(pooled=f, weights=d, sums=d) | dict.fromkeys(("pooled_n", "weights_n", "sums_d", "N", "D", "C"), n)
    adjacent = dict.fromkeys(("pooled_d", "weights_c", "sums_c"), 1)  # as Triton takes a stride of 1
    for power in (1, 6):
        tile = adjacent | dict(POWER=power, BC=16, BD=128)
        yield Specimen("update_sums.sums_kernel", arch, f"p = {power}", summed, tile, num_stages=3)
    tile = adjacent | dict(BN=16, BD=64, BC=64)
    yield Specimen("update_sums.sum_products_kernel", arch, "", summed, tile, num_stages=3)
    steer = dict(h="*bf16", vectors=f, row_vector=i, positions="*i1") | dict.fromkeys(
        ("h_b", "h_s", "h_d", "vectors_v", "vectors_d", "row_stride", "positions_b", "positions_s", "S", "V", "d"), n
    )
    yield Specimen("steer_add.steer_add_kernel", arch, "", steer, dict(BLOCK=1024))
    scalars = ("before", "batch_y", "count", "y_mean", "y_m2", "n_positive")
    others = ("other_count", "other_y_mean", "other_y_m2", "other_n_positive")
    planned = samples | dict(y=f, y_stride=n, T=n, N=n, steps=n) | dict.fromkeys(scalars + others, d)
    yield Specimen("plan.plan_kernel", arch, "", planned, dict(TOKENS=256, SAMPLES=1024))
    norm = dict(x="*bf16", scale=f, mean=f, d_in=n)
    yield Specimen("token_norm.token_norm_kernel", arch, "", norm, dict(CENTRED=True, BK=1024))
    sparse = dict(values=f, features=i, cu=i, pooled=f, first_sample=n, T=n, k=n, d_sae=n)
    yield Specimen("pool_sparse.pool_sparse_kernel", arch, "", sparse, dict(MAX=True, SIGNED=True, K=64, BF=1024))


def examine(specimen: Specimen) -> Report:
    """Compile a specimen and read off what came of it."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, function = specimen.kernel.split(".")
    kernel = getattr(importlib.import_module(f"corrsteer.kernels.{module}"), function)
    signature, constants, divisible = {}, {}, {}
    for at, name in enumerate(kernel.arg_names):
        of = specimen.types.get(name)
        signature[name] = of or "constexpr"
        if of is None:
            constants[name] = specimen.constants.get(name)
        elif of.startswith("*") or name in ("d_in", "d_sae", "D", "product_stride"):  # multiples of 16, as real ones
            divisible[(at,)] = [["tt.divisibility", 16]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = triton.compile(
            ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible),
            target=GPUTarget("cuda", specimen.arch, 32),
            options={"num_warps": specimen.num_warps, "num_stages": specimen.num_stages},
        )
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output(tools / "cuobjdump", "-res-usage", cubin)
        assembly = _output(tools / "nvdisasm", "-c", cubin)
    report = Report(
        kernel=specimen.kernel.split(".")[1].removesuffix("_kernel"), arch=specimen.arch, label=specimen.label,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        local=len(re.findall(r"\b(?:LDL|STL)\b", assembly)),
        shared=compiled.metadata.shared,
        tensor_core=_tensor_core(assembly, compiled.asm["ptx"]), faults=[],
    )  # fmt: skip
    report.products, report.waited = _products(assembly)
    report.faults = faults(report, specimen.product)
    return report


def faults(report: Report, product: str) -> list[str]:
    """Why a kernel cannot be shipped; `product` is the kind of product it forms, if any."""
    found = []
    if report.local:
        found.append(f"{report.local} spills")
    if report.shared > SHARED_MEMORY[report.arch]:
        found.append(f"shared memory over {SHARED_MEMORY[report.arch]}")
    if product in ("native", "bf16x2") and report.tensor_core != TENSOR_CORE[report.arch]:
        found.append(f"no {TENSOR_CORE[report.arch]}")
    if product in ("native", "bf16x2") and 0 < report.products == report.waited:
        found.append("serial products")
    return found


def _output(*command) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


def _tensor_core(assembly: str, ptx: str) -> str:
    if "tcgen05.mma" in ptx:
        return "tcgen05.mma"
    return next((name for name in ("HGMMA", "HMMA") if re.search(rf"\b{name}\b", assembly)), "-")


def _products(assembly: str) -> tuple[int, int]:
    """How many HGMMA there are, and how many of them end a group (gsb0)."""
    products = re.findall(r"\bHGMMA\b[^;]*", assembly)
    return len(products), sum("gsb0" in product for product in products)


def examine_all(architectures, jobs: int, show=None, which=shipped) -> list[Report]:
    """Reports of everything that ships for the architectures, in order; `show` is called with each as it comes."""
    specimens = [specimen for arch in architectures for specimen in which(arch)]
    reports = []
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for report in pool.imap(examine, specimens):
            reports.append(report)
            if show:
                show(report)
    return reports


def line(report: Report) -> str:
    faults = "; ".join(report.faults) or "ok"
    return (
        f"sm_{report.arch:<4} {report.kernel:<12} {report.label:<{WIDTH}} {report.registers:>5} {report.local:>6} "
        f"{report.shared:>7} {report.tensor_core:<12} {faults}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, action="append", help="all of them by default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at once")
    parser.add_argument("--json", type=Path, help="write the table here as well")
    parser.add_argument("--raced", action="store_true", help="what bench.tune would race, instead of what ships")
    parser.add_argument("--left-out", action="store_true", help="what was tried and is not raced, instead")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("bench.resources compiles kernels; unset TRITON_INTERPRET, under which they are not", file=sys.stderr)
        return 2
    print(f"{'arch':<7} {'kernel':<12} {'what':<{WIDTH}} {'regs':>5} {'spills':>6} {'shared':>7} {'multiplies by':<12}")
    which = raced if options.raced else left_out if options.left_out else shipped
    reports = examine_all(
        options.arch or ARCHITECTURES, options.jobs, lambda report: print(line(report), flush=True), which
    )
    if options.json:
        import json

        import triton

        from corrsteer.files import write_utf8

        table = {"triton": triton.__version__, "reports": [asdict(r) for r in reports]}
        write_utf8(options.json, json.dumps(table, indent=1) + "\n")
    faulty = [report for report in reports if report.faults]
    print(f"{len(reports)} compiled, {len(faulty)} of them not fit to ship")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
