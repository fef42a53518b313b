"""Commands that are killed at any moment, and whose writes fail: the same command again comes to the same result.

`make test-crash` runs a hundred of each kind; the ordinary suite a few. CORRSTEER_CRASHES says how many, and
CORRSTEER_CRASH_SEED which.
"""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
from crash.jobs import ERRORS, JOBS, Fault, differences, result, run_job, whole, write_world

CRASHES = int(os.environ.get("CORRSTEER_CRASHES", "4"))
SEED = int(os.environ.get("CORRSTEER_CRASH_SEED", str(random.SystemRandom().randrange(10**6))))
ATTEMPTS = 5
LIMIT = 300.0  # seconds that a command may take on a busy machine


@pytest.fixture(scope="module")
def context():
    """Processes that have everything imported, and nothing computed."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(
        ["torch", "transformers.models.llama.modeling_llama", "transformers.generation", "corrsteer.cli",
         "corrsteer.runs.collect", "corrsteer.experiments.selection", "corrsteer.experiments.baselines",
         "corrsteer.demo.run", "scipy.stats", "crash.jobs"]
    )  # fmt: skip
    return made


class Runner:
    """Runs commands, each in a process of its own."""

    def __init__(self, context, world, home):
        self.context, self.world, self.home = context, world, home
        self.expected, self.seconds, self.writes = {}, {}, {}

    def start(self, job, folder, **faults):
        folder.mkdir(parents=True, exist_ok=True)
        arguments = self.world.arguments(job, folder), str(folder / "log")
        process = self.context.Process(target=run_job, args=arguments, kwargs=faults)
        process.start()
        return process

    def run(self, job, folder, **faults):
        """The exit status of a command, and what it said."""
        process = self.start(job, folder, **faults)
        process.join(LIMIT)
        assert process.exitcode is not None, "it hangs"
        return process.exitcode, (folder / "log").read_text(errors="replace")

    def learn(self, job):
        """What a command that is left alone comes to, how long it takes and how often it writes."""
        if job not in self.expected:
            self.run(job, self.home / "warm" / job)
            folder = self.home / "expected" / job
            started = time.monotonic()
            status, said = self.run(job, folder, count_to=str(folder) + ".count")
            assert status == 0, said
            self.seconds[job] = time.monotonic() - started
            self.writes[job] = int((self.home / "expected" / f"{job}.count").read_text())
            self.expected[job] = result(job, folder)
        return self.expected[job]

    def check(self, job, folder, what):
        """The same command again, which must come to the same result."""
        whole(job, folder)
        status, said = self.run(job, folder)
        assert status == 0, f"seed {SEED}, {what}: {said}"
        assert not list(differences(result(job, folder), self.expected[job])), f"seed {SEED}, {what}"
        left = [path.name for path in folder.rglob("*") if path.name.endswith((".partial", ".part", "collecting"))]
        assert not left, f"seed {SEED}, {what}: {left}"
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def runner(context, tmp_path_factory):
    home = tmp_path_factory.mktemp("crashes")
    made = Runner(context, write_world(home), home)
    for job in ("collect", "search"):  # what the others begin with
        made.learn(job)
        if job == "collect":
            shutil.copytree(home / "expected" / "collect" / "run", home / "run")
        else:
            shutil.copy(home / "expected" / "search" / "s.safetensors", home / "s.safetensors")
    for job in JOBS:
        made.learn(job)
    print(f"\nseed {SEED}; writes {made.writes}; seconds { {job: round(s, 1) for job, s in made.seconds.items()} }")
    return made


def plan(kind):
    """Jobs in turn, each with random numbers of its own."""
    return [(n, JOBS[n % len(JOBS)], random.Random(f"{SEED} {kind} {n}")) for n in range(CRASHES)]


def test_a_command_that_is_killed_at_any_moment_goes_on_to_the_same_result(runner):
    before_end = 0
    for n, job, rng in plan("kill"):
        folder, moments = runner.home / "killed", []
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            if rng.random() < 0.5:  # at a moment
                moments.append(f"after {rng.uniform(0, runner.seconds[job]):.2f} s")
                process = runner.start(job, folder)
                process.join(float(moments[-1].split()[1]))
                process.kill()
                process.join()
                status = process.exitcode
            else:  # at a write, where something is half done
                fault = Fault(rng.randint(1, runner.writes[job]), rng.choice(("before", "after")))
                moments.append(f"{fault.kind} write {fault.at}")
                status, _ = runner.run(job, folder, fault=fault)
            before_end += status == -signal.SIGKILL
            whole(job, folder)
        runner.check(job, folder, f"killed {n}: {job} {', '.join(moments)}")
    print(f"\nseed {SEED}: {CRASHES} of {CRASHES} equal, {before_end} kills before the end")
    assert before_end >= CRASHES / 2 or CRASHES < 20, "of a few, all may come late on a machine that is quicker now"


def test_a_command_whose_write_fails_says_so_in_one_line_and_goes_on_to_the_same_result(runner):
    failed = 0
    for n, job, rng in plan("fail"):
        folder, fault = runner.home / "failed", Fault(rng.randint(1, runner.writes[job]), str(rng.choice(ERRORS)))
        what = f"failed {n}: {job} write {fault.at} with {os.strerror(int(fault.kind))}"
        status, said = runner.run(job, folder, fault=fault)
        assert status in (0, 1), f"seed {SEED}, {what}: {said}"
        if status:
            failed += 1
            (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
            assert os.strerror(int(fault.kind)) in line and "Traceback" not in said, f"seed {SEED}, {what}: {said}"
        runner.check(job, folder, what)
    print(f"\nseed {SEED}: {CRASHES} of {CRASHES} equal, {failed} commands ended by the failed write")
    assert failed >= CRASHES / 4 or CRASHES < 20, "of a few, all may be of writes that need not succeed"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, whose size can be changed."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(kilobytes, *more):
        options = ",".join([f"size={kilobytes}k", *more])
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)

    try:
        made = mount(64)
    except FileNotFoundError:
        made = None
    if made is None or made.returncode:
        pytest.skip("no file system can be mounted here")
    yield place, mount
    subprocess.run(["umount", str(place)])


def test_a_disk_that_is_full_leaves_what_it_takes_to_go_on_with_more_room(runner, small_disk):
    place, mount = small_disk
    full = 0
    for n, job, rng in plan("full")[: max(4, CRASHES // 4)]:
        needed = sum(path.stat().st_size for path in (runner.home / "expected" / job).rglob("*")) // 1024
        room = rng.randint(8, 2 * needed + 64) if n else max(8, needed // 2)
        mount(room, "remount")
        status, said = runner.run(job, place / "job")
        assert status in (0, 1), f"seed {SEED}, {room} KiB: {said}"
        if status:
            full += 1
            assert "No space left on device" in said and "Traceback" not in said, f"seed {SEED}: {said}"
        mount(1 << 17, "remount")
        runner.check(job, place / "job", f"full {n}: {job} in {room} KiB")
    print(f"\nseed {SEED}: {full} commands ended by a full disk")
    assert full


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("job", ["collect", "search"])
def test_a_command_that_is_asked_to_end_says_how_to_go_on(runner, job, number, status):
    for attempt in range(ATTEMPTS):  # it may be done before it is asked
        folder = runner.home / "asked" / str(attempt)
        process = runner.start(job, folder)
        until = time.monotonic() + LIMIT
        while not any(path.suffix == ".jsonl" for path in folder.rglob("*")) and time.monotonic() < until:
            time.sleep(0.002)
        os.kill(process.pid, number)
        asked = time.monotonic()
        process.join(LIMIT)
        took = time.monotonic() - asked
        said = (folder / "log").read_text()
        if "error: " in said:
            break
    else:
        pytest.skip("the machine is too slow to catch it")
    assert process.exitcode == status and took < 30, said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    command = {"collect": "collect", "search": "select"}[job]
    assert ("interrupted" if number == signal.SIGINT else "terminated") in line
    assert "what was done is kept in" in line and f"Go on with: corrsteer {command} " in line
    runner.check(job, folder, f"asked to end: {job}")
