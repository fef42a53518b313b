"""What ships compiles for GPUs that are not here: no spills, shared memory that fits, tensor-core instructions.

The compilers run beside the other tests from the start of the session, see conftest.py; these tests come last.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from problems import make_encoder

from corrsteer import CorrSteerError, Moments, encode_update

TESTS = Path(__file__).parents[1]
SECONDS = 1500
_started: dict[str, subprocess.Popen] = {}
_folder = tempfile.TemporaryDirectory()


def start() -> None:
    """Start the compilers, which must not be told to interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    commands = {
        "resources": ["-m", "bench.resources", "--jobs", "1", "--json", str(Path(_folder.name) / "resources.json")],
        "launches": [str(TESTS / "launches.py")],
    }
    for name, command in commands.items():
        with (Path(_folder.name) / f"{name}.txt").open("w") as out:
            _started[name] = subprocess.Popen(
                [sys.executable, *command], cwd=TESTS.parent, env=environment, stdout=out, stderr=subprocess.STDOUT
            )


def finished(name: str) -> str:
    """What a compiler printed, once it is done."""
    if not _started:
        start()
    status = _started[name].wait(SECONDS)
    text = (Path(_folder.name) / f"{name}.txt").read_text()
    assert status == 0, text
    return text


@pytest.fixture(scope="module")
def reports():
    print(finished("resources"))
    return json.loads((Path(_folder.name) / "resources.json").read_text())["reports"]


def test_everything_that_ships_compiles_without_a_fault(reports):
    assert [r for r in reports if r["faults"]] == []
    assert {r["arch"] for r in reports} == {80, 90, 100}
    assert {r["arch"] for r in reports if "panels" in r["label"]} == {80, 90, 100}


@pytest.mark.parametrize("arch, instruction", [(80, "HMMA"), (90, "HGMMA"), (100, "tcgen05.mma")])
def test_products_of_16_bit_numbers_use_the_architectures_tensor_cores(reports, arch, instruction):
    products = [r for r in reports if r["arch"] == arch and r["label"].startswith(("native", "bf16x2"))]
    assert {r["kernel"] for r in products} == {"encode_pool", "encode", "topk"}
    assert {r["tensor_core"] for r in products if "panels" not in r["label"]} == {instruction}


def test_a_main_kernel_that_spills_or_takes_too_much_shared_memory_is_named():
    from bench.resources import Report, faults

    good = Report("encode_pool", 90, "", 200, 0, 200_000, "HGMMA", [])
    assert faults(good, "native") == []
    for change, words in (
        ({"local": 3}, "3 spills"),
        ({"shared": 240_000}, "shared memory over 232448"),
        ({"tensor_core": "HMMA"}, "no HGMMA"),
        ({"products": 4, "waited": 4}, "serial products"),
    ):
        assert faults(Report(**(vars(good) | change)), "native") == [words]


def test_products_that_are_waited_for_are_counted():
    from bench.resources import _products

    product, waited = "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR36], R24", ", gsb0"
    in_groups = f"        {product} ;\n        {product}{waited} ;\n"
    assert _products(f"        {product}{waited} ;\n" * 4) == (4, 4)
    assert _products(in_groups * 4) == (8, 4) and _products("        HMMA.16816.F32 R4, R8, R16, R4 ;\n") == (0, 0)


def test_what_is_left_out_is_what_its_result_lists():
    from bench.resources import left_out

    result = json.loads((TESTS.parent / "bench/results/studies/left-out-triton-3.9.json").read_text())
    listed = [(report["arch"], report["label"]) for report in result["reports"]]
    assert listed == [(specimen.arch, specimen.label) for arch in (90, 100) for specimen in left_out(arch)]


def test_every_operations_launch_binds_its_arguments_and_compiles_for_sm_90():
    launched = finished("launches")
    for kernel in ("encode_pool", "combine_moments", "combine_pooled", "plan", "encode", "topk", "pool_sparse",
                   "products", "sums", "sum_products", "steer_add"):  # fmt: skip
        assert f"'{kernel}_kernel'" in launched


# Launch configurations


def test_a_configuration_is_the_most_special_one_there_is_for_a_call(monkeypatch):
    from corrsteer.kernels import launch

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(launch, "file_for", lambda device: "sm_90")
    monkeypatch.setattr(launch, "entries", launch.entries.__wrapped__)
    config = launch.config
    file = launch.read("sm_90")
    assert config(gpu, "encode_pool", "native", 4096) == file["encode_pool"]["native"][-1]
    assert config(gpu, "encode_pool", "native", 64)["up_to_tokens"] == 64
    assert config(gpu, "encode_pool", "native", 65)["up_to_tokens"] == 128
    assert config(gpu, "encode_pool", "native", 9, ("both", "singles")) == file["encode_pool_both"]["native"][0]
    assert config(gpu, "encode_pool", "ieee", 9, ("both",)) == file["encode_pool"]["ieee"][0]


def test_a_call_that_cannot_go_by_panels_is_launched_with_the_next_entry_that_multiplies_itself(monkeypatch):
    from corrsteer.kernels import launch

    entries = [ENTRY | PANEL, ENTRY | {"up_to_tokens": 8}, ENTRY]
    monkeypatch.setattr(launch, "read", lambda name: {"encode_pool": {"native": entries}})
    monkeypatch.setattr(launch, "entries", launch.entries.__wrapped__)
    cpu = torch.device("cpu")
    assert launch.config(cpu, "encode_pool", "native", 9, (), True) == entries[0]
    assert launch.config(cpu, "encode_pool", "native", 9) == entries[2]
    assert launch.config(cpu, "encode_pool", "native", 8) == entries[1]


def test_a_gpus_own_file_comes_first_and_a_borrowed_one_is_logged(monkeypatch, tmp_path, caplog):
    from corrsteer.kernels import launch

    gpu, capability = torch.device("cuda", 0), (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    file_for = launch.file_for.__wrapped__
    assert file_for(gpu) == "sm_90" and not caplog.records
    for capability, used in (((8, 6), "sm_80"), ((12, 0), "sm_80"), ((10, 3), "sm_100")):
        assert file_for(gpu) == used
        assert f"no launch configurations for sm_{capability[0]}{capability[1]} (NVIDIA_X1)" in caplog.messages[-1]
    monkeypatch.setattr(launch, "CONFIGS", tmp_path)
    (tmp_path / "NVIDIA_X1.json").write_text("{}")
    assert file_for(gpu) == "NVIDIA_X1"


BLOCKS = ("BF", "BT", "BK", "SUBTILE", "WIDE_SUBTILE", "GROUP_SIZE", "descriptors", "num_warps", "num_stages")
ENTRY = dict.fromkeys((*BLOCKS, "max_tiles_per_chunk"), 64)
PANEL = {"way": "panels", "panel_features": 64, "panel_tokens": 64}


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", r"X1\.json cannot be read \(Expecting property name"),
        ("{}", r"X1\.json has no encode_pool_short nor encode_pool for products of kind 'tf32x3'"),
        (
            json.dumps({"encode_pool": {"native": [ENTRY]}}),
            r"X1\.json has no encode_pool_short nor encode_pool for .*tf32x3",
        ),
        (
            json.dumps({"encode_pool": {"tf32x3": []}}),
            r"X1\.json has no encode_pool for any number of tokens, of .*tf32x3",
        ),
        (
            json.dumps({"encode_pool": {"tf32x3": [ENTRY | {"up_to_tokens": 2}]}}),
            r"X1\.json has no encode_pool for any number of tokens, of kind 'tf32x3'",
        ),
        (
            json.dumps({"encode_pool": {"tf32x3": [{k: v for k, v in ENTRY.items() if k not in ("BT", "num_warps")}]}}),
            r"X1\.json lacks BT, num_warps in encode_pool for products of kind 'tf32x3'",
        ),
        (
            json.dumps({"encode_pool": {"tf32x3": [ENTRY | PANEL]}}),
            r"X1\.json has no way 'panels' in encode_pool for products of kind 'tf32x3'",
        ),
    ],
    ids=["not JSON", "empty", "another kind", "an empty list", "few tokens", "an entry without blocks", "no panels"],
)
def test_a_file_that_lacks_a_configuration_is_named_with_the_kernel_and_the_kind(monkeypatch, tmp_path, text, message):
    from corrsteer.kernels import launch

    (tmp_path / "X1.json").write_text(text)
    monkeypatch.setattr(launch, "CONFIGS", tmp_path)
    monkeypatch.setattr(launch, "file_for", lambda device: "X1")
    for name in ("read", "entries"):
        monkeypatch.setattr(launch, name, getattr(launch, name).__wrapped__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, cu = torch.ones(5, 3, device=device), torch.tensor([0, 5], dtype=torch.int32, device=device)
    encoder, moments = make_encoder("relu", d_in=3, device=device), Moments(67, device=device)
    with pytest.raises(CorrSteerError, match=message):
        encode_update(x, cu, torch.ones(1, device=device), encoder, moments, backend="triton")


@pytest.mark.parametrize(
    "kernel, more, message",
    [
        ("encode_pool", {"way": "panels", "panel_tokens": 64}, "lacks panel_features in encode_pool"),
        ("encode_pool", {"way": "tiles"}, "has no way 'tiles' in encode_pool for products of kind 'native'"),
        ("encode", PANEL, "has no way 'panels' in encode for"),
        ("encode_pool", PANEL, "has no encode_pool for any number of tokens, of kind 'native' and way 'fused', at the"),
    ],
)
def test_a_way_to_multiply_that_there_is_not_or_whose_panels_have_no_size_is_named(monkeypatch, kernel, more, message):
    from corrsteer.kernels import launch

    monkeypatch.setattr(launch, "read", lambda name: {kernel: {"native": [ENTRY | more]}})
    with pytest.raises(launch.LaunchError, match=message):
        launch.entries.__wrapped__(torch.device("cpu"), kernel, "native")


def test_what_is_remembered_of_launches_does_not_grow_with_the_number_of_batches():
    from corrsteer.kernels import launch

    names = ("corrsteer.kernels", "corrsteer.ops")
    modules = [sys.modules[name] for name in sys.modules if name.startswith(names)]
    caches = {value for module in modules for value in vars(module).values() if hasattr(value, "cache_info")}
    assert {launch.entries, launch.tiles_per_chunk} <= caches
    for tokens in range(1, 4000):
        launch.config(torch.device("cpu"), "encode_pool", "native", tokens)
        launch.tiles_per_chunk(tokens, 8, 16, 132)
    assert max(cache.cache_info().currsize for cache in caches) <= 1024


@pytest.mark.parametrize("tiles, blocks, most", [(1, 1, 4), (2, 128, 4), (16, 128, 4), (128, 512, 4), (7, 3, 8)])
def test_chunks_of_tiles_cover_all_of_them_evenly_within_the_limit(tiles, blocks, most):
    from corrsteer.kernels.launch import tiles_per_chunk

    chunk = tiles_per_chunk(tiles, blocks, most, 132)
    chunks = -(-tiles // chunk)
    assert 1 <= chunk <= most and (chunks - 1) * chunk < tiles <= chunks * chunk
    if tiles * blocks >= 132 * most:  # there is work for all: long chunks, and few partial results
        assert chunk == most


def test_tuning_keeps_the_fastest_candidate_that_computes_rightly(monkeypatch):
    from bench import contestants, timing, tune
    from bench.shapes import Case

    used = []

    class Ours:
        def check(self):
            from corrsteer.kernels import launch

            used.append(launch.config()["BF"])
            return {"ok": used[-1] != 3}

        def call(self, round):
            from corrsteer.kernels import launch

            if launch.config()["BF"] == 4:
                raise RuntimeError("out of resources")

    monkeypatch.setattr(contestants, "contestants", lambda *_: {"triton": Ours})
    monkeypatch.setattr(timing, "CudaTimer", lambda: lambda call: (call(), 10.0 - used[-1])[1])
    entries = [{"BF": n} for n in (1, 2, 3, 4)]
    best, measured = tune.fastest(Case("encode_update", 8, 8, 8), entries, torch.device("cpu"), float("inf"))
    assert best == [{"BF": 2}] and used == [1, 2, 3, 4]
    assert measured[2]["wrong"] and measured[3]["failed"] == "RuntimeError"


@pytest.mark.parametrize("kind", ("native", "bf16x2", "tf32x3"))
@pytest.mark.parametrize("form", ("encode_pool", "encode_pool_short", "encode_pool_singles", "encode_pool_both"))
def test_tuning_races_two_programs_a_multiprocessor_first_and_nothing_that_shared_memory_cannot_hold(form, kind):
    from bench import tune

    usual = set(tune.launch.read("sm_90")["encode_pool"]["native"][-1])
    candidates = list(tune.candidates(kind, 4096, 1, form))
    found = [c for c in candidates if "way" not in c]
    tiles = [(c["BF"], c["BT"], c["num_warps"]) for c in found]
    splits = {"BF16_SPLITS"} if form == "encode_pool_short" and kind != "tf32x3" else set()
    assert len(found) >= 4
    assert all(set(c) == usual | ({"flatten"} if "flatten" in c else splits) for c in found)
    assert tiles[0] == (128, 128, 4) and found[0]["num_stages"] == 3
    assert any("flatten" in c for c in found) == (kind != "bf16x2")
    panels = [(c["panel_features"], c["panel_tokens"]) for c in candidates if "way" in c]
    assert panels == (list(tune.PANELS) if kind in tune.launch.PANEL_KINDS["encode_pool"] else [])
    assert form == "encode_pool_singles" or (128, 256, 8) in tiles or kind == "bf16x2"
    for c in found:
        rows = (2 if kind == "bf16x2" else 1) * c["BF"] + c["BT"]
        assert c["num_stages"] * rows * 128 <= 227 * 1024 and c["BT"] * c["max_tiles_per_chunk"] == 1024
    assert {c["BT"] for c in tune.candidates(kind, 64, 1, form)} == {64}


def test_the_winner_of_a_race_takes_the_place_of_the_entry_for_that_many_tokens():
    from bench import tune

    entries = [{"up_to_tokens": 64, "BF": 1}, {"up_to_tokens": 128, "BF": 2}, {"BF": 3}]
    assert tune.placed(entries, [{"BF": 9}], None) == [*entries[:2], {"BF": 9}]
    assert tune.placed(entries, [{"BF": 9}], 128) == [entries[0], {"up_to_tokens": 128, "BF": 9}, entries[2]]
    assert tune.placed(entries[2:], [{"BF": 9}], 64) == [{"up_to_tokens": 64, "BF": 9}, entries[2]]
    by_panels = tune.placed(entries, [{"way": "panels"}, {"BF": 9}], None)
    assert by_panels == [*entries[:2], {"up_to_tokens": tune.PANELS_FROM, "BF": 9}, {"way": "panels"}, {"BF": 9}]
    assert tune.placed(by_panels, [{"BF": 7}], None) == [*entries[:2], {"BF": 7}]
    assert tune.launch.read("sm_90")["encode_pool"]["native"][0]["up_to_tokens"] == 64


def test_tuning_that_is_cut_off_leaves_what_it_found_as_the_gpus_own_file(monkeypatch, tmp_path):
    from bench import tune

    raced = []

    def fastest(case, entries, device, deadline):
        if len(raced) == 2:
            raise KeyboardInterrupt
        raced.append(case)
        return entries[-1:], []

    monkeypatch.setattr(tune, "fastest", fastest)
    monkeypatch.setattr(tune.record, "new", lambda device: {"commit": "abc", "cases": []})
    monkeypatch.setattr(tune.launch, "file_for", lambda device: "sm_90")
    monkeypatch.setattr(tune.launch, "entries", tune.launch.entries.__wrapped__)
    for name, value in (("is_available", True), ("current_device", 0), ("get_device_name", "NVIDIA X1")):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(sys, "argv", ["tune", "--out", str(tmp_path), "--minutes", "1"])
    with pytest.raises(KeyboardInterrupt):
        tune.main()
    assert [(case.steps, case.tokens) for case in raced] == [(8, 4096), (1, 4096)]
    written, shipped = json.loads((tmp_path / "NVIDIA_X1.json").read_text()), tune.launch.read("sm_90")
    assert written["tuned"] == {"commit": "abc"} and written["encode_pool"] == shipped["encode_pool"]
    for form in ("encode_pool_short", "encode_pool_singles"):
        last = list(tune.candidates("native", 4096, 1, form))[-1]
        assert written[form]["native"] == [*shipped[form]["native"][:-1], last]


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, kernels are not interpreted")
@pytest.mark.parametrize("fastest", ("panels", "flattened"))
def test_a_dry_race_writes_a_file_that_then_launches_the_way_that_won(monkeypatch, tmp_path, fastest):
    from bench import timing, tune
    from corrsteer.kernels import launch

    def milliseconds(call):
        call()
        way = (launch.config().get("way") == "panels") + 2 * ("flatten" in launch.config())
        return {"panels": (2.0, 1.0, 1.5), "flattened": (2.0, 1.0, 0.99)}[fastest][way]

    for name in ("CudaTimer", "HostTimer"):
        monkeypatch.setattr(timing, name, lambda: milliseconds)
    monkeypatch.setattr(tune, "SHAPE", (32, 96))
    monkeypatch.setattr(tune, "ROUNDS", 3)
    monkeypatch.setattr(tune, "TOKENS", (16, 40))
    monkeypatch.setattr(tune, "PANELS", ((128, 32),))
    monkeypatch.setattr(tune, "PANELS_FROM", 24)
    monkeypatch.setattr(tune, "PANELS_AFTER", 1)
    monkeypatch.setattr(tune, "FORMS", {"encode_pool": {"steps": 8}})
    monkeypatch.setattr(tune, "RACED", {"encode_pool": ((64, 16, 4, 1, 8, 8, 0), (64, 16, 4, 1, 8, 8, 1))})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X1")
    options = argparse.Namespace(kind=["native"], minutes=9, out=tmp_path, log=tmp_path / "log.json")
    tune.race(torch.device("cpu"), options)
    log = json.loads(options.log.read_text())
    assert list(log) == [f"native encode_pool {tokens}" for tokens in (40, 16)]
    assert all("median_ms" in measured for race in log.values() for measured in race)
    assert [sum("way" in measured for measured in race) for race in log.values()] == [1, 0]

    monkeypatch.setattr(launch, "CONFIGS", tmp_path)
    monkeypatch.setattr(launch, "file_for", lambda device: "NVIDIA_X1")
    for name in ("read", "entries"):
        monkeypatch.setattr(launch, name, getattr(launch, name).__wrapped__)
    of = (torch.device("cpu"), "encode_pool", "native")
    assert (launch.config(*of, 40, (), True).get("way") == "panels") == (fastest == "panels")
    for tokens, panels in ((40, False), (24, True), (16, True)):
        assert launch.config(*of, tokens, (), panels)["flatten"] == 1
