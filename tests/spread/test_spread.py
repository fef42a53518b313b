"""Jobs that `torchrun` spreads: the result of several processes is that of one, also where some of them die."""

import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest
from crash.jobs import differences, result, write_world

if "CORRSTEER_CRASHES" not in os.environ:
    pytest.skip("launchers and agents take a minute: make test-crash", allow_module_level=True)

LIMIT = 600.0
QUIET = {"OMP_NUM_THREADS": "1", "TORCHELASTIC_ERROR_FILE": "", "PYTHONWARNINGS": "ignore"}
LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--max-restarts", "3")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Tasks, and what one process has made of them."""
    home = tmp_path_factory.mktemp("spread")
    made = write_world(home, train=160)
    for job, left in (("collect", "run"), ("search", "s.safetensors"), ("evaluate", None), ("rollouts", None)):
        folder = home / "one" / job
        folder.mkdir(parents=True)
        done = start([sys.executable, "-m", "corrsteer"], made, job, folder)
        assert done.wait(LIMIT) == 0, (folder / "log").read_text()
        if left:
            (folder / left).rename(home / left)
            os.symlink(home / left, folder / left)
    return made


def start(launcher, world, job, folder, *more):
    folder.mkdir(parents=True, exist_ok=True)
    log = (folder / "log").open("ab")
    command = [*launcher, *world.arguments(job, folder), *more]
    return subprocess.Popen(
        command, stdout=log, stderr=log, env=os.environ | QUIET, start_new_session=True, stdin=subprocess.DEVNULL
    )


def spread(n, *more):
    return [*LAUNCHER, "--nproc-per-node", str(n), *more, "-m", "corrsteer"]


def same(world, job, folder):
    assert not list(differences(result(job, folder), result(job, world.home / "one" / job)))
    assert not [path for path in folder.rglob("*") if path.name.endswith((".partial", ".part", "collecting"))]


def units(folder):
    return [path for path in folder.rglob("*.jsonl") if path.parent.name.endswith((".partial", "collecting"))]


def wait_for_units(folder, n=1):
    until = time.monotonic() + LIMIT
    while len(units(folder)) < n and time.monotonic() < until:
        time.sleep(0.005)


def workers(launcher):
    """The processes that a launcher has started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher.pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


@pytest.mark.parametrize("job", ["collect", "search", "evaluate", "rollouts"])
def test_two_processes_come_to_the_result_of_one_to_the_bit(world, tmp_path, job):
    launcher = start(spread(2), world, job, tmp_path)
    assert launcher.wait(LIMIT) == 0, (tmp_path / "log").read_text()
    same(world, job, tmp_path)


def test_the_same_command_once_more_finds_it_done(world, tmp_path):
    for _ in range(2):
        launcher = start(spread(2), world, "evaluate", tmp_path)
        assert launcher.wait(LIMIT) == 0, (tmp_path / "log").read_text()
    assert "holds what is asked for" in (tmp_path / "log").read_text()
    same(world, "evaluate", tmp_path)


@pytest.mark.parametrize("job", ["collect", "search"])
def test_a_process_that_dies_is_started_again_and_the_result_is_the_same(world, tmp_path, job):
    launcher = start(spread(2), world, job, tmp_path)
    wait_for_units(tmp_path, 2)
    started = workers(launcher)
    assert len(started) == 2, "it was done before"
    os.kill(started[-1], signal.SIGKILL)
    assert launcher.wait(LIMIT) == 0, (tmp_path / "log").read_text()
    same(world, job, tmp_path)


def test_a_launcher_that_is_stopped_is_gone_on_with_by_one_process_alone(world, tmp_path):
    launcher = start(spread(2), world, "collect", tmp_path)
    wait_for_units(tmp_path, 2)
    os.killpg(launcher.pid, signal.SIGTERM)
    launcher.wait(LIMIT)
    done = start([sys.executable, "-m", "corrsteer"], world, "collect", tmp_path)
    assert done.wait(LIMIT) == 0, (tmp_path / "log").read_text()
    same(world, "collect", tmp_path)


def test_several_processes_do_not_begin_anew(world, tmp_path):
    launcher = start([*LAUNCHER[:-2], *spread(1)[len(LAUNCHER) :]], world, "collect", tmp_path, "--force")
    assert launcher.wait(LIMIT) != 0
    assert "cannot be begun anew by several processes" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("kills", [0, 1])
def test_three_machines_over_a_shared_directory_come_to_the_same_also_where_one_is_lost(world, tmp_path, kills):
    """As three agents of this machine, which share no more than three machines would: a directory, and a port."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    meeting = ("--nnodes", "1:3", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}",
               "--rdzv-id", str(random.randrange(10**9)),
               "--rdzv-conf", "join_timeout=60,last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=2",
               )  # fmt: skip
    agents = [start(spread(1, *meeting), world, "collect", tmp_path) for _ in range(3)]
    try:
        if kills:
            wait_for_units(tmp_path, 2)
            os.killpg(agents[-1].pid, signal.SIGKILL)  # with all that it has started
        until = time.monotonic() + LIMIT
        while not (tmp_path / "run" / "run.json").exists() and time.monotonic() < until:
            time.sleep(0.1)
        assert (tmp_path / "run" / "run.json").exists(), (tmp_path / "log").read_text()
        while (tmp_path / "run" / "collecting").exists() and time.monotonic() < until:
            time.sleep(0.1)
        if not kills:
            assert [agent.wait(LIMIT) for agent in agents] == [0, 0, 0], (tmp_path / "log").read_text()
        same(world, "collect", tmp_path)
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
