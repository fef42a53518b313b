"""The benchmarks' own logic, on tiny shapes: what is measured, what is not, and what the README then says."""

import itertools
import json
import platform
import re
from collections import Counter

import pytest
import torch

from bench import chart, contestants, cpu, eager, ground_truth, measure, page, record, resident, shapes, table, timing
from bench.shapes import Case
from corrsteer import Moments, SparseEncoder, encode_update
from corrsteer.ops import reference, registry

CPU = torch.device("cpu")
TINY = Case("encode_update", d_in=16, d_sae=64, tokens=64, steps=4, precision="fp32", k=5)
SECONDS = 0.01


@pytest.fixture(autouse=True)
def written_out(monkeypatch):
    monkeypatch.setattr(eager, "SAE_LENS", False)  # importing SAELens takes longer than all of these tests
    monkeypatch.setattr(timing, "ROUNDS", (3, 3))


@pytest.fixture
def broken():
    """Registers a backend that lets its moments go wrong."""

    def registered(break_it):
        def encode_update(x, cu_seqlens, y, encoder, moments, pools):
            reference.encode_update(x, cu_seqlens, y, encoder, moments, pools)
            break_it(moments[0])

        operations = {"encode_update": encode_update}
        registry.register(registry.Backend("broken", operations, lambda call: registry.Verdict(True)))

    yield registered
    registry.unregister("broken")


def one(case, backend="reference"):
    return measure.one(case, CPU, [backend], SECONDS)


def gpu_result(**cases_by_status):
    """A made-up result of a GPU, with a case of each status given."""
    timed = {"status": "measured", "p20_ms": 1.0, "p80_ms": 1.0, "rounds": 9, "peak_bytes": 1}
    cases = []
    for status, case in cases_by_status.items():
        made_up = measure.not_measured(case, ["triton"], "the time was used up") | {"status": status.replace("_", " ")}
        if status == "measured":
            made_up["contestants"] = {
                "triton": timed | {"median_ms": 2.0, "tflops": 500.0, "peak_share": 0.01},
                "matmul": timed | {"median_ms": 1.9},
                "eager fp32": timed | {"median_ms": 40.0},
                "eager bf16": {"status": "out of memory"},
                "compiled, segments": timed | {"median_ms": 6.0},
                "compiled, scatters": timed | {"median_ms": 3.0},
            }
            made_up["ratios"]["triton"] = {
                "matmul": {"median": 1.05},
                "eager fp32": {"median": 0.05},
                "compiled, segments": {"median": 0.33},
                "compiled, scatters": {"median": 0.625},
            }
        cases.append(made_up)
    device = {"type": "gpu", "name": "Made-up GPU", "capability": "9.0", "driver": None}
    return record.new(CPU, commit="0123456789abcdef") | {"device": device, "cases": cases}


@pytest.mark.parametrize("tokens, mean", [(512, 64), (4096, 8), (512, 1), (64, 64)])
def test_lengths_sum_to_the_tokens_with_the_mean_asked_for(tokens, mean):
    drawn = shapes.lengths(tokens, mean)
    assert sum(drawn) == tokens and len(drawn) == tokens // mean
    assert min(drawn) >= 1 and max(drawn) <= 2 * mean - 1
    assert len(set(drawn)) > 1 or mean == 1 or len(drawn) == 1


def test_the_gpu_cases_cover_every_sae_tokens_and_steps_once_each():
    cases = [case for stage in shapes.gpu_stages().values() for case in stage]
    assert max(Counter(case.name for case in cases).values()) == 1
    plain = [c for c in cases if (c.kind, c.precision, c.activation, c.pool, c.compiled) == TINY_BF16]
    assert len(plain) == len(shapes.SAES) * 3 * 3
    assert {"fp32", "bf16x2", "fp16"} < {c.precision for c in cases} and {"max", "both"} < {c.pool for c in cases}
    others = {"permutations", "update_moments", "update_sums", "steer_add", "host", "steer_host", "graph"}
    assert {c.kind for c in cases} == {"encode_update"} | others


def test_the_eight_shapes_come_first_with_their_bits_compared_and_then_against_torch_compile():
    cases = shapes.gpu_stages()["shapes"]
    assert [c.repeats for c in cases] == [20] * 8 + [0] * 3
    assert [c.compiled for c in cases] == [""] * 8 + ["default"] * 3
    assert cases[8].name == f"{cases[0].name}, torch.compile default"
    compiled = [c for stage in shapes.gpu_stages().values() for c in stage if c.compiled == "default"]
    assert len(compiled) == 8


TINY_BF16 = ("encode_update", "bf16", "jumprelu", "mean", "")


def test_contestants_are_timed_in_turn_and_each_round_has_its_own_order_and_inputs():
    calls = []
    contestants = {name: lambda at, name=name: calls.append((name, at)) for name in "abc"}
    times = timing.interleaved(contestants, 4, lambda call: call() or 1.0)
    assert calls == [(name, at) for at, order in enumerate(("abc", "bca", "cab", "abc")) for name in order]
    assert times == {name: [1.0] * 4 for name in "abc"}


def test_a_ratio_is_the_median_of_the_rounds_ratios_and_so_does_not_see_drift():
    slow_clock = [1.0, 2.0, 4.0, 8.0]
    assert timing.ratio([2 * t for t in slow_clock], slow_clock) == {"median": 2.0, "p20": 2.0, "p80": 2.0}
    assert timing.summary([1.0, 2.0, 9.0])["median_ms"] == 2.0


def test_the_gpu_timer_measures_again_behind_a_longer_delay_until_the_host_is_ahead(monkeypatch):
    delays = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            pass

        def query(self):
            return delays[-1] < 1 << 20  # by then the GPU has come to the first event

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 7.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", delays.append, raising=False)
    timer, calls = timing.CudaTimer(), []
    assert [timer(lambda: calls.append(0)) for _ in range(2)] == [7.0, 7.0]
    assert delays == [1 << 18, 1 << 19, 1 << 20, 1 << 20] and len(calls) == 4 and timer.exposed == 0
    monkeypatch.setattr(Event, "query", lambda self: True)
    timer(calls.clear)
    assert delays[-1] == timer.LONGEST and timer.exposed == 1


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"precision": "bf16"},
        {"precision": "bf16x2"},
        {"precision": "fp16"},
        {"pool": "max"},
        {"pool": "both"},
        {"steps": 1},
        {"steps": 64},
        {"labels": 3},
        {"activation": "topk"},
        {"kind": "update_moments", "tokens": 12, "labels": 3},
        {"kind": "update_sums", "tokens": 12, "labels": 3},
        {"kind": "permutations", "labels": 20},
        {"kind": "steer_add", "tokens": 4},
    ],
    ids=str,
)
def test_a_case_is_checked_timed_and_compared(change):
    case = Case(**vars(TINY) | change)
    found = json.loads(json.dumps(one(case), allow_nan=False))
    assert found["status"] == "measured", found
    ours = found["contestants"]["reference"]
    assert ours["check"]["ok"]
    others = {name for name, c in found["contestants"].items() if c["status"] == "measured"} - {"reference"}
    assert others == set(found["ratios"]["reference"]) and others
    for name in (*others, "reference"):
        assert found["contestants"][name].keys() >= {"median_ms", "p20_ms", "p80_ms", "rounds", "peak_bytes"}
    if case.kind == "encode_update":
        assert {"matmul", "eager fp32"} <= others
        assert ours["peak_share"] is None or ours["peak_share"] >= 0
        assert ours["tflops"] > 0 and found["dense_bytes"] == 4 * 64 * 64 and found["eager_encode"]
        assert found["contestants"]["compiled"]["status"] == "not measured"


def test_runs_of_the_same_inputs_whose_bits_differ_are_counted(broken):
    found = one(Case(**vars(TINY) | {"repeats": 4}))
    assert found["contestants"]["reference"]["same_bits"] == {"runs": 4, "same": 4}
    drift = iter([0.0, 0.0, 0.0, 0.0, 0.0, 1e-12, 0.0])  # of two runs before, four, and one to warm up with
    broken(lambda moments: moments.z_mean.add_(next(drift, 0.0)))
    found = one(Case(**vars(TINY) | {"repeats": 4}), "broken")
    assert found["contestants"]["broken"]["same_bits"] == {"runs": 4, "same": 3}


@pytest.mark.parametrize("pooling", [eager.pool_segments, eager.pool_scatter])
@pytest.mark.parametrize("how", ["mean", "max"])
@pytest.mark.parametrize("activation", ["jumprelu", "topk"])
def test_the_eager_contestants_compute_what_ours_does(activation, how, pooling):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(20, 16), torch.randn(64, 16) / 4, 0.1 * torch.randn(64)
    threshold = torch.rand(64) if activation == "jumprelu" else None
    sizes = torch.tensor([3, 1, 7, 9])
    cu_seqlens = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).int()
    y, moments, sums = torch.tensor([[0.0], [1.0], [1.0], [0.0]]), Moments(64), torch.zeros(3, 64, dtype=torch.float64)

    encoder = SparseEncoder(16, 64, activation, weight=weight, bias=bias, threshold=threshold, k=5)
    encode_update(x, cu_seqlens, y, encoder, moments, how, backend="reference")
    sample = torch.repeat_interleave(torch.arange(4), sizes)
    encode_x = eager.encoder(weight.T.contiguous(), bias, threshold, 5)
    eager.collect(encode_x, x, sizes, sample, y, [sums], [how], pooling)

    torch.testing.assert_close(sums[0] / 4, moments.z_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sums[1] - sums[0] ** 2 / 4, moments.z_m2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sums[2:] - 0.5 * sums[0], moments.cross, rtol=1e-4, atol=1e-5)


def test_the_written_out_encode_is_sae_lens_own(monkeypatch):
    pytest.importorskip("sae_lens")
    torch.manual_seed(0)
    W_enc, b_enc, threshold = torch.randn(16, 64), torch.randn(64), torch.rand(64)
    x = torch.randn(20, 16)
    expected = eager.encode(x, W_enc, b_enc, threshold, 0)
    monkeypatch.setattr(eager, "SAE_LENS", True)
    assert eager.encoded_by("jumprelu").startswith("sae-lens ")
    assert torch.equal(eager.encoder(W_enc, b_enc, threshold, 0)(x), expected)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda moments: moments.z_mean.mul_(1.001),
        lambda moments: moments.z_mean[-1:].fill_(torch.nan),
        lambda moments: moments.z_m2.add_(1e-2),
        lambda moments: moments.cross.neg_(),
        lambda moments: moments.cross.fill_(torch.nan),
        lambda moments: moments.group_sum.zero_(),
        lambda moments: moments.count.add_(1),
    ],
)
def test_a_wrong_result_is_recorded_and_no_time_is(broken, break_it):
    broken(break_it)
    found = one(TINY, "broken")
    assert found["status"] == "wrong" and not found["contestants"]["broken"]["check"]["ok"]
    assert "median_ms" not in json.dumps(found, allow_nan=False) and found["ratios"] == {}
    assert "Wrong, so not timed: 16 x 64" in table.text(gpu_result() | {"cases": [found]})


@pytest.mark.parametrize("first", ("broken", "reference"))
def test_of_two_ways_the_right_one_keeps_its_times_where_the_other_is_wrong(broken, first):
    broken(lambda moments: moments.cross.neg_())
    second = {"broken": "reference", "reference": "broken"}[first]
    found = measure.one(TINY, CPU, [first, second], SECONDS)
    assert found["status"] == "wrong" and found["reason"].startswith("broken: ")
    assert found["contestants"]["broken"]["status"] == "wrong" and "median_ms" not in found["contestants"]["broken"]
    assert found["contestants"]["reference"]["median_ms"] > 0 and found["ratios"]["reference"].keys() >= {"matmul"}
    assert found["ratios"].keys() == {"reference"} and "broken" not in found["ratios"]["reference"]
    result = gpu_result() | {"cases": [found]}
    assert re.search("16 x 64, .* reference ", table.text(result)) and "Broken wrong: 16 x 64" in table.text(result)
    assert "wrong: broken: " in measure.line(found) and re.search(r"reference \d", measure.line(found))
    prediction = {"case": found["name"], "of": "reference", "value": "ratio", "to": "matmul"}
    assert page.measured(result, prediction) == found["ratios"]["reference"]["matmul"]["median"]
    assert page.measured(result, prediction | {"of": "broken"}) is None


def test_a_large_encoder_is_checked_at_both_ends():
    features = ground_truth.some_features(131072)
    assert len(features) == ground_truth.FEATURES and features[0] == 0 and features[-1] == 131071
    assert torch.equal(ground_truth.some_features(64), torch.arange(64))


def test_a_contestant_without_memory_leaves_the_others_their_times(monkeypatch):
    def collect(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(eager, "collect", collect)
    found = one(TINY)
    assert found["contestants"]["eager fp32"] == {"status": "out of memory"}
    assert found["status"] == "measured" and set(found["ratios"]["reference"]) == {"matmul", "oneDNN, prepacked"}


def test_an_error_of_ours_fails_the_case_and_names_no_path(broken):
    def fail(moments):
        raise RuntimeError("cannot launch /home/someone/kernel.py today")

    broken(fail)
    found = one(TINY, "broken")
    assert found["status"] == "failed"
    assert found["reason"] == "broken: RuntimeError: cannot launch today"


def test_cases_that_time_does_not_reach_are_listed_as_not_measured():
    result, saved = {}, []
    cases = [TINY, Case(**vars(TINY) | {"steps": 1})]

    class OneCase(measure.Deadline):
        def left(self):
            return 1000.0 if len(saved) < 2 else -1.0  # saved before the first case and after it

    def save():
        saved.append(json.loads(json.dumps([case["status"] for case in result["cases"]])))

    measure.all_cases(result, cases, CPU, lambda case: ["reference"], OneCase(0), save, SECONDS)
    assert saved == [["not measured"] * 2, ["measured", "not measured"], ["measured", "not measured"]]
    assert result["cases"][1]["reason"] == "the time was used up"
    assert result["cases"][1]["name"] == cases[1].name


def test_a_row_has_the_ratios_as_they_are_read():
    result = gpu_result(measured=TINY)
    (row,) = table.encode_rows(result["cases"])
    assert row == (TINY.name, "triton", "2", "500", "1.05", "-", "1.60", "-", "20.00", "1.00%")
    assert table.targets(result) == [
        "at most 1.00 of the bare product's time (not bf16x2): in 0 of 1 cases, worst 1.05",
        "at least 1.3 times as fast as torch.compile: in 1 of 1 cases",
        "at least 10 times as fast as eager fp32: in 1 of 1 cases",
        "working memory under 2 % of the dense activations: in 1 of 1 cases",
        "1000 permutations, and the moments for intervals, add at most 10 % to encode_update: not measured",
    ]


def test_the_section_says_what_was_not_measured_and_what_found_no_memory():
    other = Case(**vars(TINY) | {"steps": 8})
    said = table.section([gpu_result(measured=TINY, not_measured=other)])
    assert f"Not measured (the time was used up): {other.name}." in said
    assert f"Eager bf16 out of memory: {TINY.name}." in said
    assert "Made-up GPU, sm_90" in said and "0123456789ab" in said
    assert table.NO_GPU not in said


def test_without_a_gpu_result_the_section_says_so_and_how_to_get_one():
    assert table.section([]) == table.NO_GPU and "python -m bench.gpu" in table.NO_GPU
    result = record.new(CPU, commit="abc") | {"cases": [one(TINY)]}
    said = table.section([result])
    assert said.startswith("No GPU has measured this yet.") and result["device"]["name"] in said
    assert f"| {TINY.name} | reference |" in said


@pytest.fixture
def documents(tmp_path, monkeypatch):
    """A folder with a document whose one block says which GPUs were measured."""
    monkeypatch.setattr(table, "DOCUMENTS", {"a.md": (("a", lambda folder: table.section(table.load(folder)), "."),)})
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "a.md").write_text(f"before\n{table.BEGIN.format('a')}\nold\n{table.END.format('a')}\nafter\n")
    return tmp_path


def test_a_document_is_renewed_between_its_markers_and_checked(documents, capsys):
    document = documents / "a.md"
    assert table.main(["--check"], documents) == 1 and "old" in document.read_text()
    assert "a.md: not what bench/results says" in capsys.readouterr().err
    assert table.main([], documents) == 0
    begin, end = table.BEGIN.format("a"), table.END.format("a")
    assert document.read_text() == f"before\n{begin}\n\n{table.NO_GPU}\n\n{end}\nafter\n"
    assert table.main(["--check"], documents) == 0
    record.write(gpu_result(measured=TINY), documents / "bench" / "results")
    assert table.main(["--check"], documents) == 1


def test_a_document_without_its_markers_is_refused(documents):
    (documents / "a.md").write_text("no markers")
    with pytest.raises(SystemExit, match="must have these two lines once each"):
        table.main([], documents)


def test_the_documents_are_what_the_results_say():
    assert table.main(["--check"]) == 0


def test_every_generated_block_is_in_a_document_that_is_checked():
    marked = {
        (path.relative_to(record.ROOT).as_posix(), block)
        for path in [record.ROOT / "README.md", *(record.ROOT / "docs").rglob("*.md")]
        for block in re.findall(r"<!-- ([\w -]+): generated by", path.read_text())
    }
    assert marked == {(name, block) for name, blocks in table.DOCUMENTS.items() for block, *_ in blocks}


def test_the_readmes_table_has_a_row_a_size_with_both_precisions_side_by_side():
    said = table.speed([cpu_result([(16, 64, 512), (16, 64, 64), (8, 64, 64)])])
    rows = [line for line in said.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert rows == [
        f"| {tokens} | {d_in} x 64 | 1.20 | 1.20 | 4.00 | 8.00 | 0.10% | 0.10% |"
        for tokens, d_in in ((64, 8), (64, 16), (512, 16))
    ]
    assert said.startswith(table.NO_GPU) and table.NO_GPU not in table.speed([gpu_result(measured=TINY)])


def test_a_result_names_its_device_and_nothing_of_the_host(tmp_path):
    path = record.write(record.new(CPU), tmp_path)
    assert path.name.startswith("cpu-") and list(tmp_path.iterdir()) == [path]
    text = path.read_text()
    assert str(record.ROOT) not in text and platform.node() not in text


def test_only_backends_that_run_on_a_cpu_for_speed_are_timed_there():
    assert cpu.backends_of(TINY) == ["native", "reference"]
    assert cpu.backends_of(Case("encode_update", *shapes.LLAMA_32K, 64)) == ["native"]
    others = {"matmul", "eager fp32", "oneDNN, prepacked"}
    assert contestants.contestants(TINY, CPU, ["reference"]).keys() == {"reference"} | others


def cpu_result(sizes=((16, 64, 64),)):
    """A made-up result of a CPU: ours 4 (fp32) and 8 (bf16) times as fast as eager fp32, and 1.2 of oneDNN's time."""
    timed = {"status": "measured", "p20_ms": 1.0, "p80_ms": 1.0, "rounds": 9, "tflops": 0.4, "peak_share": 0.001}
    cases = []
    for (d_in, d_sae, tokens), precision in itertools.product(sizes, ("fp32", "bf16")):
        case = Case("encode_update", d_in, d_sae, tokens, 8, precision)
        made_up = measure.not_measured(case, ["native", "reference"], "") | {"status": "measured"}
        made_up["contestants"] = {"native": timed | {"median_ms": 2.0}, "reference": timed | {"median_ms": 90.0}}
        eager = {"eager fp32": {"median": 0.25 if precision == "fp32" else 0.125}, "eager bf16": {"median": 0.5}}
        ratios = {"oneDNN, prepacked": {"median": 1.2}} | eager
        made_up["ratios"] = {"native": ratios, "reference": {"eager fp32": {"median": 9.0}}}
        cases.append(made_up)
    return record.new(CPU, commit="abc") | {"cases": cases}


@pytest.mark.skipif(platform.system() != "Linux", reason="only Linux tells")
def test_memory_that_a_call_uses_is_seen_whether_or_not_it_was_used_before():
    def use(megabytes):
        return resident.peak(lambda: torch.ones(megabytes << 18))

    for _ in range(2):
        assert resident.peak(lambda: None) < 1 << 19
        for megabytes in (1, 20, 100):
            assert abs(use(megabytes) / (megabytes << 20) - 1) < 0.5


def test_a_cpu_has_its_own_targets_which_the_reference_is_not_held_to():
    result = cpu_result()
    assert table.targets(result) == [
        "at most 1.10 of oneDNN's time: in 0 of 2 cases, worst 1.20",
        "in fp32 at least 2.5 times as fast as eager fp32: in 1 of 1 cases",
        "in bf16 at least 6 times as fast as eager fp32: in 1 of 1 cases",
        "working memory under 2 % of the dense activations: in 2 of 2 cases",
        "1000 permutations, and the moments for intervals, add at most 10 % to encode_update: not measured",
    ]
    assert "compiled /" not in table.section([result]).split(table.LEGEND)[0]


def test_what_permutations_add_is_compared_with_encode_update_of_the_same_backend():
    cases = []
    for ratio in (1.04, 1.15):
        found = one(Case(**vars(TINY) | {"kind": "permutations", "labels": 20, "tokens": 64}))
        found["ratios"] = {"native": {"encode_update, native": {"median": ratio}, "encode_update, reference": {}}}
        cases.append(found | {"ours": ["native"]})
        found["contestants"]["native"] = found["contestants"]["reference"]
        found["contestants"]["encode_update, native"] = found["contestants"]["encode_update, reference"]
    assert table.permutations({"cases": cases}).endswith("encode_update: in 1 of 2 cases, 4.0% to 15.0%")
    assert [row[3] for row in table.other_rows(cases)] == ["encode_update, native"] * 2


def test_the_chart_has_the_speeds_of_the_result_and_the_same_bytes_each_time(tmp_path):
    result = cpu_result([(16, 64, 512), (16, 64, 64)])
    found = chart.speeds(result)
    assert list(found) == ["16 × 64\n512 tokens", "16 × 64\n64 tokens"]
    expected = {"native": 8.0, "eager fp32": 1.0, "eager bf16": 4.0, "oneDNN, prepacked": pytest.approx(9.6)}
    assert found["16 × 64\n64 tokens"]["bf16"] == expected
    one, other = tmp_path / "one.svg", tmp_path / "other.svg"
    chart.draw(result, one)
    chart.draw(result, other)
    assert one.read_bytes() == other.read_bytes()
    assert {">8.0<", ">4.0<", ">1.0<"} <= set(re.findall(r">[\d.]+<", one.read_text()))
    assert f"results/{record.stem(result)}.svg)" in table.section([result])


def test_a_benchmark_says_what_machine_it_ran_on_and_names_no_host():
    from bench.conftest import KEPT, pytest_benchmark_update_machine_info

    said = dict.fromkeys(KEPT, "x") | {"cpu": {"brand_raw": "made up"}, "node": "a-host"}
    pytest_benchmark_update_machine_info(None, said)
    assert said["cpu"] == "made up" and "node" not in said and said["packages"]["torch"]
