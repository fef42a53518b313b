"""`Journal`: units that are whole or not there, what goes on, and who is let in."""

import errno
import multiprocessing
import os
import time

import pytest

from corrsteer import processes
from corrsteer.errors import CorrSteerError
from corrsteer.locks import ByteLocks
from corrsteer.rollouts.journal import JobDiffers, Journal

JOB = {"model": {"name": "m", "layers": [1, 2]}, "seed": 0}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "job"


def elsewhere(function, *arguments):
    """What a function does in another process, and the exit status of that."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def made(journal, names):
    """Units of their names, and those that were made here."""
    mine = []
    done = list(journal.share(names, lambda name: (mine.append(name), f'"{name}"\n')[1]))
    assert all(journal.read(name) == [name] for name in names)
    return done, mine


def test_a_job_goes_on_with_the_units_that_are_not_there(folder):
    with Journal(folder, JOB) as journal:
        assert not journal.resumed
        journal.write("b", '"b"\n')
    with Journal(folder, JOB) as journal:
        assert journal.resumed and sorted(journal.names()) == ["b"]
        assert made(journal, ["a", "b", "c"]) == (["a", "b", "c"], ["a", "c"])
        journal.finish()
    assert not folder.exists()


def test_every_difference_from_what_was_begun_is_listed(folder):
    with Journal(folder, JOB) as journal:
        journal.write("a", "1\n")
    other = {"model": {"name": "n", "layers": [1, 2]}, "seed": 0, "more": "x" * 100}
    with pytest.raises(JobDiffers, match=r'model.name was "m", is "n"; more was null, is "x+\.\.\.\. Ask for the same'):
        Journal(folder, other)
    with Journal(folder, JOB) as journal:
        assert journal.read("a") == [1], "what was begun is left as it was"
    with Journal(folder, other, anew=True) as journal:
        assert not journal.resumed


def test_a_job_without_units_leaves_nothing(folder):
    Journal(folder, JOB).close()
    assert not folder.exists()


def test_a_folder_of_something_else_is_not_touched(folder):
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    for anew in (False, True):
        with pytest.raises(CorrSteerError, match="holds thesis.tex; give another path"):
            Journal(folder, JOB, anew=anew)
    assert (folder / "thesis.tex").read_text() == "years of work"


def test_what_was_being_removed_is_gone_on_removing(folder, monkeypatch):
    with Journal(folder, JOB) as journal:
        journal.write("a", "1\n")
        journal.write("b", "2\n")
        real, removed = os.unlink, []

        def unlink(path, **_):
            if len(removed) == 1:
                raise OSError(errno.EIO, "dies here")
            removed.append(path)
            real(path)

        with monkeypatch.context() as patched:
            patched.setattr("pathlib.Path.unlink", unlink)
            journal.finish()
    assert (folder / "manifest.json").exists() and len(list(journal.names())) == 1
    Journal(folder, {"another": "job"}, anew=True).close()
    assert not folder.exists()


@pytest.mark.parametrize("text", ["{", '{"format": 1}', "[]", '{"format": "x", "begun": 1, "made_with": {}}', "\x00"])
def test_a_damaged_manifest_is_said_to_be(folder, text):
    with Journal(folder, JOB) as journal:
        journal.write("a", "1\n")
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CorrSteerError, match="manifest.json is damaged .* remove"):
        Journal(folder, JOB)


def test_a_damaged_unit_is_said_to_be(folder):
    with Journal(folder, JOB) as journal:
        journal.write("a", "1\n")
        journal.path("a").write_text("{")
        with pytest.raises(CorrSteerError, match="a.jsonl is damaged .* so that it is made again"):
            journal.read("a")


def test_a_unit_that_is_there_stays(folder):
    with Journal(folder, JOB) as journal:
        journal.write("a", "1\n")
        journal.write("a", "2\n")
        assert journal.read("a") == [1] and [path.name for path in folder.glob(".*")] == []


def test_another_version_is_noted(folder, monkeypatch):
    with Journal(folder, JOB) as journal:
        journal.write("a", "1\n")
    monkeypatch.setattr("torch.__version__", "99.0")
    with Journal(folder, JOB) as journal:
        (note,) = journal.notes
    assert note.startswith("begun with torch ") and note.endswith("and gone on with 99.0")


def test_what_it_is_made_with_may_change_and_is_noted(folder):
    with Journal(folder, JOB, made_with={"device": "cpu", "threads": 1}) as journal:
        journal.write("a", "1\n")
    with Journal(folder, JOB, made_with={"device": "NVIDIA H100", "threads": 1}) as journal:
        assert journal.notes == ["begun with device cpu and gone on with NVIDIA H100"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_unit_that_cannot_be_written_is_not_there(folder, monkeypatch, code):
    def fails(*_):
        raise OSError(code, "cannot")

    with Journal(folder, JOB) as journal:
        journal.write("a", "1\n")
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fails)
            with pytest.raises(CorrSteerError, match="cannot be written .*cannot"):
                journal.write("b", "2\n")
        assert not journal.has("b") and [path.name for path in folder.glob(".*")] == []
        journal.write("b", "2\n")
        assert journal.read("b") == [2]


def test_a_file_system_without_links_does(folder, monkeypatch):
    def none(*_):
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", none)
    with Journal(folder, JOB) as journal:
        journal.write("a", "1\n")
        journal.write("a", "2\n")
        assert journal.read("a") == [1]


# Who is let in


def test_a_second_process_is_refused_until_the_first_ends_however_it_does(folder):
    def second():
        try:
            Journal(folder, JOB)
        except CorrSteerError as error:
            assert "is in use by another process (begun by process" in str(error)
            os._exit(7)
        os._exit(0)

    def dies():
        journal = Journal(folder, JOB)
        journal.write("a", "1\n")
        os.kill(os.getpid(), 9)

    with Journal(folder, JOB):
        assert elsewhere(second) == 7
        with pytest.raises(CorrSteerError, match="is in use by this process"):
            Journal(folder, JOB)
    assert elsewhere(dies) == -9
    assert elsewhere(second) == 0
    with Journal(folder, JOB) as journal:
        assert journal.read("a") == [1]


@pytest.fixture
def several(monkeypatch):
    """As `torchrun` launches processes."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)


def test_several_processes_make_each_unit_once(folder, several, tmp_path):
    names = [f"unit_{n}" for n in range(12)]

    def work(rank):
        os.environ["RANK"] = str(rank)
        with Journal(folder, JOB) as journal:

            def slowly(name):
                (tmp_path / f"{name}.{rank}").touch()
                time.sleep(0.02)
                return f'"{name}"\n'

            assert set(journal.share(names, slowly)) == set(names)
            journal.settle(lambda: (tmp_path / "result").write_text("done"))

    workers = [multiprocessing.get_context("fork").Process(target=work, args=(rank,)) for rank in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert sorted(path.stem for path in tmp_path.glob("unit_*")) == sorted(names)
    assert len({path.suffix for path in tmp_path.glob("unit_*")}) > 1
    assert (tmp_path / "result").exists() and not folder.exists()


def test_what_a_process_had_claimed_is_another_s_once_it_is_dead(folder, several):
    def dies():
        journal = Journal(folder, JOB)
        with journal.claimed("a") as mine:
            assert mine
            os.kill(os.getpid(), 9)

    assert elsewhere(dies) == -9
    with Journal(folder, JOB) as journal:
        assert made(journal, ["a"]) == (["a"], ["a"])


def test_what_another_process_is_at_is_left_to_it(folder, several):
    context = multiprocessing.get_context("fork")
    claimed, done = context.Event(), context.Event()

    def works():
        journal = Journal(folder, JOB)
        with journal.claimed("a") as mine:
            assert mine
            claimed.set()
            done.wait(20)
            journal.write("a", '"a"\n')

    process = context.Process(target=works)
    process.start()
    assert claimed.wait(20)
    with Journal(folder, JOB) as journal:
        with journal.claimed("a") as mine:
            assert not mine
        with journal.claimed("b") as mine:
            assert mine

        def make(name):
            assert name == "c"
            done.set()
            return '"c"\n'

        assert list(journal.share(["a", "c"], make)) == ["c", "a"]
    process.join()


def test_one_process_alone_is_kept_out_by_several_and_they_by_it(folder, monkeypatch, several):
    monkeypatch.setattr("corrsteer.rollouts.journal.PATIENCE", 0.5)

    def alone():
        del os.environ["RANK"]
        Journal(folder, JOB)

    with Journal(folder, JOB):
        assert elsewhere(alone) == 1
    monkeypatch.delenv("RANK")
    with Journal(folder, JOB):
        assert not processes.among_others()

        def joins():
            os.environ["RANK"] = "1"
            Journal(folder, JOB)

        assert elsewhere(joins) == 1


def test_several_processes_do_not_begin_anew(folder, several):
    with pytest.raises(CorrSteerError, match="cannot be begun anew by several processes"):
        Journal(folder, JOB, anew=True)
    assert not folder.exists()


def test_a_file_system_without_locks_is_taken_by_one_process_and_by_no_more(folder, monkeypatch, caplog):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", none)
    with Journal(folder, JOB) as journal:
        journal.write("a", "1\n")
    assert "cannot be locked" in caplog.text and "see that no other process works in it" in caplog.text
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CorrSteerError, match="cannot be locked .* take a directory of a file system that has locks"):
        Journal(folder, JOB)


def test_locks_of_different_bytes_are_different(tmp_path):
    locks = ByteLocks(tmp_path / "lock")
    assert locks.take(3) and locks.take(1 << 41)

    def another():
        other = ByteLocks(tmp_path / "lock")
        os._exit(int(other.take(4)) + 2 * int(other.take(3)) + 4 * int(other.take(1 << 41, shared=True)))

    assert elsewhere(another) == 1
    locks.release(3)
    assert elsewhere(another) == 3
    locks.close()
    assert elsewhere(another) == 7


# Moments at which others come and go


def test_a_job_that_is_begun_while_another_is_removed_is_left_alone(folder, monkeypatch):
    context = multiprocessing.get_context("fork")
    begun, done = context.Event(), context.Event()

    def begins():
        with Journal(folder, {"another": "job"}) as journal:
            begun.set()
            done.wait(20)
            journal.write("a", "1\n")

    other, real = context.Process(target=begins), os.rmdir

    def rmdir(path, **_):
        real(path)
        if other.pid is None:
            other.start()
            assert begun.wait(20)

    with Journal(folder, JOB) as journal:
        journal.write("a", "1\n")
        monkeypatch.setattr(os, "rmdir", rmdir)
        journal.finish()
    assert (folder / "manifest.json").exists()
    done.set()
    other.join()
    assert other.exitcode == 0 and (folder / "a.jsonl").exists()


def test_of_processes_that_leave_a_finished_job_at_once_the_last_removes_it(folder, several, monkeypatch):
    with Journal(folder, JOB) as journal:
        journal.write("a", "1\n")
    context = multiprocessing.get_context("fork")
    inside, leaving = context.Barrier(2), context.Barrier(2)
    close = ByteLocks.close

    def late(self):
        leaving.wait(20)
        close(self)

    def leaves():
        journal = Journal(folder, JOB)
        inside.wait(20)
        monkeypatch.setattr(ByteLocks, "close", late)  # so that each has looked before any is gone
        journal.leave()

    both = [context.Process(target=leaves) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0] and not folder.exists()


def test_a_process_that_was_forked_leaves_the_journal_to_its_parent(folder):
    with Journal(folder, JOB) as journal:
        assert elsewhere(journal.close) == 0
        journal.write("a", "1\n")
        assert (folder / "manifest.json").exists()
        with pytest.raises(CorrSteerError, match="in use by this process .*finish what uses it, or have it closed"):
            Journal(folder, JOB)
    with Journal(folder, JOB) as journal:
        assert journal.read("a") == [1]
