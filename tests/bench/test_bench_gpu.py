"""`python -m bench.gpu`: its stages, also when it is cut off, tried out on the CPU at toy sizes."""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from bench import checks, contestants, counters, eager, gpu, measure, page, record, shapes, stages, table, timing
from bench.shapes import Case
from corrsteer import CorrSteerError
from corrsteer.ops import cuda_backend, reference, registry

CPU = torch.device("cpu")
TINY = Case("encode_update", d_in=16, d_sae=64, tokens=64, steps=4, precision="fp32", k=5)
GRAPH = Case(**vars(TINY) | {"kind": "graph"})
COMMAND = [sys.executable, "-m", "bench.gpu", "--dry-run", "--profile", "--sanitize"]
FILE = "dry-run.json"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(eager, "SAE_LENS", False)
    monkeypatch.setattr(timing, "ROUNDS", (3, 3))


def read(folder):
    return json.loads((folder / FILE).read_text())


def dry_run(folder, *more):
    return subprocess.run([*COMMAND, "--out", folder, *more], cwd=record.ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A dry run from beginning to end: its result, and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    done = dry_run(folder)
    assert done.returncode == 0, done.stderr
    return read(folder), done.stdout, folder


def structure(value):
    """A result without what differs from run to run: the times, and what is made of them."""
    if isinstance(value, dict):
        other = ("page", "continued", "peak_bytes", "first_peak_bytes", "peak_share")
        return {name: structure(part) for name, part in value.items() if name not in other}
    return [structure(part) for part in value] if isinstance(value, list) else type(value).__name__


def states(result):
    return {kept: [(r["name"], r["status"]) for r in result[kept]] for kept in set(stages.KEPT_IN.values())}


def test_a_dry_run_goes_through_every_stage_and_says_what_a_cpu_cannot(whole):
    result, said, _ = whole
    assert result["schema"] == record.DRY_RUN
    assert list(result["stages"]) == list(gpu.STAGES) and {s["status"] for s in result["stages"].values()} == {"done"}
    for check in result["checks"]:
        if check["status"] == "measured":
            assert check["ok"] and 0 <= check["error"] <= check["bound"] and check["seconds"] > 0
        else:
            assert (check["status"], check["reason"]) == ("skipped", "not on a CPU")
            assert "cuda" in check["name"] or "2^31" in check["name"]
    for kept in ("tests", "counters", "sanitizer"):
        assert result[kept] and {(r["status"], r["reason"]) for r in result[kept]} == {("skipped", "not on a CPU")}
    assert {c["kind"] for c in result["cases"] if c["status"] == "skipped"} == {"graph"}
    for case in result["cases"]:
        if case["stage"] == "shapes":
            assert case["contestants"]["reference"]["same_bits"] == {"runs": 20, "same": 20}
    assert "\n".join(result["page"]) in said and result["page"][-1].startswith("Next: ")


KILLED = {  # where -> the function that ends the process instead, at which of its calls; and what is done by then
    "in the first case after the checks": ("measure.one", 1, ("check",)),
    "in a case of the last stage": ("measure.one", 5, ("check", "shapes", "host", "tests")),
    "while the result is written": ("record.write", 20, ()),
    "before what was written takes the place of the result": ("os.replace", 20, ()),
}


@pytest.mark.parametrize("where", KILLED)
def test_a_dry_run_that_is_killed_is_continued_to_the_same_result(whole, tmp_path, where):
    function, call, done = KILLED[where]
    script = f"""
        import itertools, os, signal, sys
        from bench import measure, record, stages
        calls, before = itertools.count(1), {function}
        def kill(*arguments):
            if next(calls) == {call}:
                os.killpg(os.getpid(), signal.SIGKILL)
            return before(*arguments)
        {function} = kill
        stages.main(sys.argv[1:])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), *COMMAND[3:], "--out", tmp_path]
    killed = subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True, start_new_session=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = read(tmp_path)
    assert {name for name, stage in left["stages"].items() if stage["status"] == "done"} >= set(done)
    if function == "measure.one":
        assert [case["reason"] for case in left["cases"] if case["status"] == "started"] == [
            "the run was cut off in it"
        ]
    assert left["cases"][-1]["reason"] == "the run was stopped before"

    continued = dry_run(tmp_path)
    assert continued.returncode == 0, continued.stderr
    assert f"{FILE} continues:" in continued.stdout and "--again measures anew" in continued.stdout
    found = read(tmp_path)
    for kept in ("checks", "cases"):
        measured = {record["name"]: record for record in left[kept] if record["status"] == "measured"}
        again = {record["name"]: record for record in found[kept]}
        assert all(again[name] == record for name, record in measured.items())  # seconds and all: not run again
        assert measured or kept == "cases"
    assert len(found["continued"]) == 1 and found["date"] == left["date"]
    assert states(found) == states(whole[0]) and structure(found) == structure(whole[0])


def test_a_dry_run_is_kept_out_of_the_committed_results(capsys):
    with pytest.raises(SystemExit):
        gpu.options_of(["--dry-run", "--out", str(gpu.RESULTS)])
    assert "--out must be another folder than bench/results for a dry run" in capsys.readouterr().err


def run_of(folder, items, minutes=10.0, force=False):
    """A run of made-up cases."""
    result = record.new(CPU, "abc") | {"sources": "x", "continued": [], "forced": force}
    return stages.Run(result | {"schema": record.DRY_RUN}, folder, measure.Deadline(60 * minutes), force, items)


def options(folder, again=None, ended=None):
    return argparse.Namespace(out=folder, again=again, ended=ended)


def case_of(name, ran, stage="rest", status="measured", case=GRAPH, **more):
    def run():
        ran.append(name)
        return {"status": status, "contestants": {}, "ratios": {}, **more}

    planned = {"name": name, "stage": stage, "kind": case.kind, "ours": ["triton"], "precision": "bf16"}
    return stages.Item(stage, planned, run)


def check_of(status, operation="encode_update", backend="triton"):
    planned = {"name": "a check", "operation": operation, "ours": backend}
    return stages.Item("check", planned, lambda: {"status": status, "ok": status == "measured"})


def went(run, again=None, ended=None, limits=None):
    stages.continued(run, options(run.out, again, ended))
    run.save()
    return run.go(limits or {})


def test_what_is_there_is_not_measured_again_unless_it_is_asked_for(tmp_path):
    ran = []

    def items():
        return [case_of("a", ran, "shapes"), case_of("b", ran), case_of("c", ran, status="not measured", reason="")]

    assert went(run_of(tmp_path, items())) == gpu.FINISHED
    ran.clear()
    went(run_of(tmp_path, items()))
    assert ran == ["c"]
    ran.clear()
    went(run_of(tmp_path, items()), again=["shapes"])
    assert ran == ["a", "c"]
    ran.clear()
    went(run_of(tmp_path, items()), again=[])
    assert ran == ["a", "b", "c"]


def test_a_result_of_other_sources_is_not_continued(tmp_path):
    went(run_of(tmp_path, [case_of("a", [])]))
    other = run_of(tmp_path, [case_of("a", [])])
    other.result["sources"] = "y"
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(CorrSteerError, match="^--out must be .* got one of other sources; .*--again"):
        went(other)
    assert (tmp_path / FILE).read_bytes() == before
    went(other, again=[])
    assert read(tmp_path)["sources"] == "y"


def test_the_sources_are_what_is_measured_and_no_result(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "ROOT", tmp_path)
    for folder in ("kernels", "bench"):
        (tmp_path / folder).mkdir()
    (tmp_path / "kernels" / "a.json").write_text("1")
    first = record.sources()
    (tmp_path / "bench" / "a.py").write_text("1")
    assert record.sources() == first
    (tmp_path / "kernels" / "a.json").write_text("2")
    assert record.sources() != first


def test_no_case_is_started_after_the_deadline_and_a_stage_leaves_time_to_those_behind_it(tmp_path):
    ran = []
    assert went(run_of(tmp_path, [case_of("a", ran)], minutes=-1)) == gpu.FINISHED and ran == []
    assert read(tmp_path)["cases"][0]["reason"] == "the time was used up"
    items = [case_of("a", ran, "shapes"), case_of("b", ran, "host")]
    went(run_of(tmp_path, items), limits={"shapes": 0.0})
    assert ran == ["b", "a"]  # and what it left comes last


@pytest.mark.parametrize("force", [False, True])
def test_no_time_is_taken_of_what_fails_its_check_unless_forced(tmp_path, force):
    ran = []
    steered = case_of("steer", ran, case=Case(**vars(TINY) | {"kind": "steer_add"}))
    status = went(run_of(tmp_path, [check_of("wrong"), case_of("a", ran), steered], force=force))
    assert status == gpu.WRONG and ran == (["a", "steer"] if force else ["steer"])
    if not force:
        assert read(tmp_path)["cases"][0]["reason"] == "a check of encode_update did not hold (a check)"
        assert read(tmp_path)["page"][-1] == "Next: mend what does not hold, times come after: a check."


def test_the_rest_is_not_timed_where_the_gpu_tests_fail(tmp_path):
    ran = []
    tests = stages.Item("tests", {"name": "pytest"}, lambda: {"status": "failed", "reason": "1 failed"})
    assert went(run_of(tmp_path, [case_of("a", ran, "shapes"), tests, case_of("b", ran)])) == gpu.WRONG
    assert ran == ["a"] and read(tmp_path)["cases"][1]["reason"] == "the GPU tests did not pass"


def test_a_case_that_hangs_ends_the_process_and_the_next_one_goes_on_behind_it(tmp_path):
    script = f"""
        import sys, time, torch
        torch.set_num_threads(1)
        sys.path[:0] = [{str(record.ROOT)!r}, {os.path.dirname(__file__)!r}, {str(record.ROOT / "tests")!r}]
        from pathlib import Path
        from test_bench_gpu import case_of, run_of, went
        from bench import stages
        items = [case_of("before", []), case_of("hangs", []), case_of("behind", [])]
        items[1].run, items[1].longest = lambda: time.sleep(60), 0.5
        went(run_of(Path({str(tmp_path)!r}), items))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode not in (gpu.FINISHED, gpu.USAGE, gpu.WRONG) and "Timeout" in done.stderr
    assert [c["status"] for c in read(tmp_path)["cases"]] == ["measured", "started", "not measured"]

    ran = []
    went(run_of(tmp_path, [case_of(name, ran) for name in ("before", "hangs", "behind")]), ended="it took too long")
    assert ran == ["behind"]
    assert read(tmp_path)["cases"][1]["reason"] == "the process was ended in it (it took too long)"
    assert read(tmp_path)["page"][-1] == "Next: see what went wrong in this case: hangs."


def test_every_case_of_a_gpus_run_has_a_name_of_its_own_and_a_table_before_it_has_run(tmp_path):
    asked = gpu.options_of(["--out", str(tmp_path), "--profile", "--sanitize"])
    run = run_of(tmp_path, stages.items_of(asked, CPU, "triton"))
    stages.continued(run, options(tmp_path))
    run.save()
    names = [(item.stage, item.planned["name"]) for item in run.items]
    assert len(set(names)) == len(names) and list(dict.fromkeys(stage for stage, _ in names)) == list(gpu.STAGES)
    device = {"type": "gpu", "name": "Made-up GPU", "capability": "9.0", "driver": None}
    result = run.result | {"device": device, "schema": record.SCHEMA}
    assert f"Not measured (the run was stopped before): {shapes.TELLING[0].name};" in table.section([result])
    said = page.words(result)
    assert "  at most 1.00 of the bare product's time (not bf16x2): not measured" in said
    assert sum(line.endswith(", not measured") for line in said) == len(json.loads(page.PREDICTIONS.read_text()))


def test_a_case_that_was_running_when_a_run_was_killed_is_run_again(tmp_path):
    ran = []
    run = run_of(tmp_path, [case_of("a", ran)])
    stages.continued(run, options(tmp_path))
    run.records[0]["status"] = "started"
    run.save()
    went(run_of(tmp_path, [case_of("a", ran)]))
    assert ran == ["a"] and read(tmp_path)["cases"][0]["status"] == "measured"


def test_no_reason_in_a_result_holds_a_path(tmp_path):
    item = case_of("a", [])
    item.skipped = lambda: "its extension could not be imported (/home/someone/x.so: no symbol)"
    went(run_of(tmp_path, [item]))
    found = read(tmp_path)["cases"][0]
    assert (found["status"], found["reason"]) == ("skipped", "its extension could not be imported no symbol)")


def test_a_gpu_that_no_longer_answers_ends_the_process_once_the_case_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "answers", lambda: False)
    with pytest.raises(SystemExit) as ended:
        went(run_of(tmp_path, [case_of("a", [], status="failed", reason="illegal access"), case_of("b", [])]))
    assert ended.value.code == gpu.BROKEN
    assert [c["status"] for c in read(tmp_path)["cases"]] == ["failed", "not measured"]


def test_bench_gpu_starts_its_process_again_behind_the_case_that_ended_it(tmp_path, monkeypatch, capsys):
    started, statuses = [], [gpu.BROKEN, -11, gpu.WRONG]

    def run(command, env):
        started.append(command[3:])
        (tmp_path / "gpu.json").write_text(f"{len(started)}")
        os.utime(tmp_path / "gpu.json", ns=(0, len(started)))
        return argparse.Namespace(returncode=statuses[len(started) - 1])

    monkeypatch.setattr(subprocess, "run", run)
    assert gpu.main(["--out", str(tmp_path), "--again", "check", "--force"]) == 1
    assert "--ended" not in started[0] and all("--force" in command for command in started)
    for command, how in zip(started[1:], ("the GPU no longer answered", "it took too long, or crashed, status -11")):
        assert command[command.index("--ended") + 1] == how
    assert len(started) == 3 and capsys.readouterr().err.count("goes on behind the case") == 2


def test_bench_gpu_does_not_start_its_process_again_where_it_cannot_begin(tmp_path, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(
        subprocess, "run", lambda command, env: started.append(command) or argparse.Namespace(returncode=1)
    )
    assert gpu.main(["--out", str(tmp_path)]) == 1 and len(started) == 1
    assert "its process ended with status 1 before any case" in capsys.readouterr().err


def test_what_was_begun_anew_is_not_begun_a_second_time_when_a_case_ends_the_process(tmp_path):
    ran = []
    went(run_of(tmp_path, [case_of("a", ran)]))
    went(run_of(tmp_path, [case_of("a", ran)]), again=[], ended="it crashed")
    assert ran == ["a"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_command_says_what_it_needs(tmp_path, capfd):
    assert gpu.main(["--out", str(tmp_path)]) == gpu.USAGE
    assert "needs an NVIDIA GPU and a PyTorch build with CUDA" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_outcomes_are_counted_from_the_junit_report_and_none_is_no_pass():
    suite = '<testsuites><testsuite tests="7" failures="1" errors="1" skipped="2" time="1.5"></testsuite></testsuites>'
    assert stages.count(suite) == {"passed": 3, "failed": 2, "skipped": 2}
    assert not stages.tests_passed({"passed": 0, "failed": 0, "skipped": 4, "exit_status": 0})
    assert not stages.tests_passed({"exit_status": None, "timed_out": True})


def test_on_a_gpu_steering_is_timed_with_the_compiled_backend_too_where_it_runs(monkeypatch):
    steered = [case for cases in shapes.gpu_stages().values() for case in cases if "steer" in case.kind]
    for runs, expected in ((True, ["triton", "cuda"]), (False, ["triton"])):
        monkeypatch.setattr(cuda_backend, "verify", lambda call, runs=runs: registry.Verdict(runs))
        assert len(steered) == 2 and all(stages.backends_of(case, "triton") == expected for case in steered)
        assert stages.backends_of(TINY, "triton") == ["triton"]


def test_another_way_of_the_kernels_is_one_more_contestant_of_16_bit_cases(monkeypatch):
    from corrsteer.kernels import launch

    entry = {"way": "panels", "BT": 999}
    monkeypatch.setattr(contestants, "WAYS", {"panels": entry})
    bf16 = Case(**vars(TINY) | {"precision": "bf16"})
    assert contestants.ways_of("triton", bf16) == ["triton", "triton, panels"]
    for case in (TINY, Case(**vars(bf16) | {"activation": "topk"}), Case(**vars(bf16) | {"kind": "host"})):
        assert contestants.ways_of("triton", case) == ["triton"]
    assert contestants.ways_of("reference", bf16) == ["reference"]
    monkeypatch.setattr(contestants, "WAYS", {"panels": entry, "flattened": {"flatten": 1}})
    split = Case(**vars(bf16) | {"precision": "bf16x2"})
    assert contestants.ways_of("triton", split) == ["triton", "triton, panels"]
    assert contestants.ways_of("triton", bf16) == ["triton", "triton, panels", "triton, flattened"]
    of = (CPU, "encode_pool", "native", 64)
    shipped = launch.config(*of)
    with contestants.going("panels"):
        assert launch.config(*of) == shipped | entry and launch.config(CPU, "encode", "native", 64)["BT"] != 999
    with contestants.going(""):
        assert launch.config(*of) == shipped and shipped["BT"] != 999


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, kernels are not interpreted")
def test_a_case_is_measured_by_each_way_beside_the_one_that_ships(monkeypatch):
    from corrsteer.kernels import launch

    case = Case("encode_update", 16, 64, 16, 4, repeats=2)
    monkeypatch.setattr(contestants, "WAYS", {"small": launch.config(CPU, "encode_pool", "native", 64) | {"BF": 16}})
    found = measure.one(case, CPU, contestants.ways_of("triton", case), 0.01)
    assert found["status"] == "measured", found["reason"]
    for name in ("triton", "triton, small"):
        assert found["contestants"][name]["check"]["ok"] and found["contestants"][name]["median_ms"] > 0
        assert found["contestants"][name]["same_bits"] == {"runs": 2, "same": 2}
    assert {"triton, small", "matmul"} <= found["ratios"]["triton"].keys()


# The checks


@pytest.mark.parametrize("check", checks.checks(elements=1 << 12), ids=lambda check: check.name)
def test_a_check_holds_of_the_reference_also_at_the_sizes_beyond(check):
    if check.backend != "cuda":
        assert check.run(CPU, "reference")["ok"]


def test_the_checks_are_of_every_operation_and_of_what_the_issue_names():
    found = checks.checks()
    assert {check.operation for check in found} == set(registry.OPERATIONS)
    assert {check.operation for check in found if check.backend == "cuda"} == {"steer_add"}
    for word in ("T below a tile", "NaN and infinity", "misaligned", "2^31"):
        assert any(word in check.name for check in found), word
    assert len({(check.name, check.backend) for check in found}) == len(found)


@pytest.mark.parametrize("operation", registry.OPERATIONS)
def test_a_backend_that_computes_wrongly_fails_its_check(operation):
    def wrong(*arguments):
        out = getattr(reference, operation)(*arguments)
        changed = {"update_moments": 2, "update_sums": 2, "encode_update": 4, "steer_add": 0}.get(operation)
        target = out if changed is None else arguments[changed]
        target = target[0].z_mean if isinstance(target, tuple) else getattr(target, "z_mean", target)
        target.mul_(1.001)
        return out

    registry.register(registry.Backend("wrong", {operation: wrong}, lambda call: registry.Verdict(True)))
    try:
        check = next(check for check in checks.checks() if check.operation == operation)
        found = stages.checked(check, CPU, "wrong")
        assert found["status"] == "wrong" and not found["ok"] and found["error"] > found["bound"]
        other = next(check for check in checks.checks() if check.operation != operation)
        assert other.skipped(CPU, "wrong") == f"it has no {other.operation}"
    finally:
        registry.unregister("wrong")


def test_a_nan_or_an_infinity_that_is_not_where_it_belongs_is_an_error():
    true = torch.tensor([1.0, torch.nan, torch.inf, -2.0])
    assert checks.off(true, true) == 0.0
    assert checks.off(true + torch.tensor([0.5, 0, 0, 0]), true) == 0.25
    for at in range(4):
        for value in (torch.nan, torch.inf, -torch.inf, 7.0):
            got = true.clone()
            got[at] = value
            if not torch.equal(got.isnan(), true.isnan()) or at == 2 and value != torch.inf:
                assert checks.off(got, true) == math.inf


# Counters and memory checkers

NCU = """\
==PROF== Connected to process 1
"ID","Kernel Name","dram__bytes.sum","gpu__time_duration.sum","launch__registers_per_thread","lts__t_bytes.sum",\
"sm__inst_issued.avg.pct_of_peak_sustained_active","sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",\
"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio"
"","","Mbyte","us","register/thread","byte","%","%","inst","inst"
"0","encode_pool_kernel","95.5","401.25","214","1,234,567","31.5","78.2","0.5","2.25"
"1","combine_moments_kernel","n/a","3.5","40","10","3","0","0.1","n/a"
"""


def test_the_counters_are_read_from_ncus_table_in_its_units():
    first, second = counters.read(NCU)
    assert first == {
        "kernel": "encode_pool_kernel", "microseconds": 401.25, "tensor_core_percent": 78.2, "registers": 214.0,
        "issue_slots_percent": 31.5, "l2_bytes": 1234567.0, "dram_bytes": 95.5e6, "occupancy_percent": None,
        "stalls": {"long_scoreboard": 2.25, "barrier": 0.5},
    }  # fmt: skip
    assert list(first["stalls"]) == ["long_scoreboard", "barrier"]  # the most frequent first
    assert second["dram_bytes"] is None and second["stalls"] == {"barrier": 0.1}
    assert counters.read("==ERROR== no permission") == []


@pytest.mark.parametrize(
    "said, status, errors",
    [
        ("========= ERROR SUMMARY: 0 errors\n", "measured", 0),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", "measured", 0),
        ("========= Invalid __global__ read of size 4 bytes\n========= ERROR SUMMARY: 3 errors\n", "wrong", 3),
    ],
)
def test_what_compute_sanitizer_found_is_counted(said, status, errors):
    found = counters.found_by(said)
    assert (found["status"], found["errors"]) == (status, errors)
    assert found["reason"] == ("Invalid __global__ read of size 4 bytes" if errors else "")


def test_a_tool_that_is_absent_or_says_nothing_is_said(monkeypatch):
    assert counters.absent("ncu", CPU) == "not on a CPU"
    monkeypatch.setenv("PATH", "")
    assert counters.absent("ncu", torch.device("cuda")) == "ncu is not installed, or not in PATH"
    found = counters.found_by("it crashed in /a/b.py\n")
    assert found == {
        "status": "not measured", "reason": "compute-sanitizer ended without a summary: it crashed in"
    }  # fmt: skip


def test_ncu_that_may_not_count_leaves_a_case_unmeasured_with_its_reason(monkeypatch):
    said = "==ERROR== ERR_NVGPUCTRPERM - no permission to access counters"
    ran = []

    def run(command, **_):
        ran.append(command)
        return argparse.Namespace(stdout=NCU if len(ran) == 1 else said, stderr="", returncode=len(ran) - 1)

    monkeypatch.setattr(subprocess, "run", run)
    ours, product = counters.profiled([TINY], CPU, "triton", lambda *_: ["triton"])
    assert [planned["ours"] for planned, *_ in (ours, product)] == [["triton"], ["matmul"]]
    assert [kernel["registers"] for kernel in ours[1]()["kernels"]] == [214, 40]
    assert product[1]() == {"status": "not measured", "reason": f"ncu counted nothing: {said}"}
    assert Case(**json.loads(ran[0][-2])) == TINY and ran[1][-1] == "matmul"


# The last page


def test_every_prediction_is_of_a_case_that_is_measured_and_names_its_place_in_the_notes():
    names = {case.name for cases in shapes.gpu_stages().values() for case in cases}
    notes = (record.ROOT / "bench" / "NOTES.md").read_text()
    predictions = json.loads(page.PREDICTIONS.read_text())
    assert {case.name for case in shapes.TELLING if case.precision == "bf16"} <= {p["case"] for p in predictions}
    for p in predictions:
        assert p["case"] in names and p["value"] in page.VALUES and p["low"] < p["high"]
        assert f"## {p['source']}\n" in notes


@pytest.mark.parametrize("ratio, where", [(1.0, "below"), (1.1, "as predicted"), (1.3, "above")])
def test_a_prediction_stands_beside_what_was_measured(ratio, where):
    case = shapes.TELLING[0]
    found = {"name": case.name, "status": "measured", "contestants": {"triton": {"median_ms": 0.5, "peak_share": 0.01}}}
    found["ratios"] = {"triton": {"matmul": {"median": ratio}}}
    p = {"what": "w", "case": case.name, "of": "triton", "value": "ratio", "to": "matmul", "low": 1.05, "high": 1.25}
    (said,) = page.predicted({"cases": [found]}, [p])
    assert said == f"{case.name}, triton (w): 1.05 to 1.25 of matmul's time, measured {ratio:.2f}: {where}"
    assert page.measured({"cases": [found]}, p | {"value": "ms"}) == 0.5
    assert page.predicted({"cases": []}, [p])[0].endswith("of matmul's time, not measured")


def test_the_next_step_follows_from_what_was_found():
    result = {"checks": [], "sanitizer": [], "tests": [], "cases": []}
    assert page.next_step(result).startswith("measure:")
    case = vars(shapes.TELLING[1]) | {"name": "a", "stage": "shapes", "status": "measured", "contestants": {}}
    case["ratios"] = {"triton": {"matmul": {"median": 1.2}}}
    slow = result | {"cases": [case]}
    assert page.next_step(slow).startswith("a takes 1.20 of the bare product's time")
    assert "bench.tune --out kernels/configs --kind native" in page.next_step(slow)
    assert page.next_step(result | {"cases": [case | {"ratios": {"triton": {"matmul": {"median": 0.9}}}}]}).startswith(
        "nothing is slower"
    )
    case["contestants"] = {"triton": {"same_bits": {"runs": 20, "same": 19}}}
    assert page.next_step(slow) == ("find what makes the bits differ: a, triton: 19 of 20 runs have the same bits.")
    assert page.next_step(slow | {"tests": [{"status": "failed"}]}).startswith("mend what the GPU tests found")
