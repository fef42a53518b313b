"""`Journal`: what a job has done so far, in a folder that any moment leaves whole.

A job is cut into units, such as a batch of completions. Each is a file of its own, that is there once all of it is on
the disk, and never changed. So what is whole is what is there, a job that was killed goes on with the units that are
not, and several processes may share one folder: each claims a unit, by a lock that it loses when it dies, before it
does it. `manifest.json` says what was begun, and what goes on must be that.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any

from corrsteer import processes
from corrsteer.arguments import as_path
from corrsteer.errors import CorrSteerError
from corrsteer.files import from_json, plain, sync_folder, to_json, write_utf8
from corrsteer.locks import ByteLocks, NoLocks
from corrsteer.types import PathLike
from corrsteer.version import __version__

log: logging.Logger = logging.getLogger(__name__)

FORMAT = "corrsteer.journal/1"
MANIFEST, LOCKS = "manifest.json", "lock"
MEMBER, OPENING, COLLECTING, FINISHED = 0, 1, 2, 3  # bytes of the lock file; units have others
FIRST_UNIT, UNITS = 16, 1 << 40
POLL = 0.2  # seconds between looks at what others do
PATIENCE = 60.0  # seconds for which one of several processes waits to be let in

Unit = Callable[[str], str]  # lines of a unit, given its name


class JobDiffers(CorrSteerError):
    """A job was begun with other settings; the message lists each difference."""


class Journal:
    """Units of a job, by name.

    Parameters
    ----------
    folder : which is made where it is not there, and removed by `finish`.
    begun : what the job is, as JSON can hold it: whatever its result depends on.
    made_with : what it may go on without, but is noted where it changes, as are the versions of libraries.
    anew : whether what was begun there is thrown away.

    Attributes
    ----------
    resumed : whether units were there.
    notes : what a result should say of how it came about.
    processes : how many it was begun with, whoever goes on.

    Raises
    ------
    JobDiffers : where another job was begun there.
    CorrSteerError : where another process has it, and where it cannot be written.
    """

    def __init__(
        self,
        folder: PathLike,
        begun: Mapping[str, Any],
        *,
        made_with: Mapping[str, Any] | None = None,
        anew: bool = False,
    ):
        self.folder: Path = as_path("folder", folder)
        self.begun: dict[str, Any] = plain(begun)
        self._made_with: dict[str, Any] = _versions() | plain(made_with or {})
        self.notes: list[str] = []
        self.processes: int = processes.world_size()
        self.calls: int = 0  # of what is done by the same calls in the same order, see `run_trials`
        if anew and processes.among_others():
            raise CorrSteerError(
                f"what was begun in {self.folder} cannot be begun anew by several processes, of which each would "
                f"throw away what the others do; remove it, or begin anew in one process"
            )
        self._at = os.path.realpath(self.folder)  # wherever the process goes meanwhile
        if _open_here.setdefault(self._key, self) is not self:
            raise self._in_use("this process", "finish what uses it, or have it closed")
        try:
            self._locks = self._entered()
        except BaseException:
            del _open_here[self._key]
            raise
        try:
            self._open(anew)
            self._known: set[str] = set(self.names())
        except BaseException:
            with contextlib.suppress(OSError):
                if not processes.among_others() and not self._rest():
                    self._remove()
            self._let_go()
            raise
        self.resumed: bool = bool(self._known)
        if self.resumed and processes.rank() == 0:
            log.warning("going on with what was done in %s", self.folder)

    def has(self, name: str) -> bool:
        """Whether a unit is done."""
        if name not in self._known and self.path(name).exists():
            self._known.add(name)
        return name in self._known

    def read(self, name: str) -> list[Any]:
        """The lines of a unit, each as what JSON holds.

        Raises
        ------
        CorrSteerError : for one that is damaged.
        """
        try:
            return [from_json(line) for line in self.path(name).read_bytes().split(b"\n") if line]
        except (OSError, ValueError) as error:
            path = self.path(name)
            raise CorrSteerError(f"{path} is damaged ({error}); remove it, so that it is made again") from None

    def write(self, name: str, text: str) -> None:
        """Have a unit done, with its lines. One that is there stays."""
        write_utf8(self.path(name), text, once=True)

    def path(self, name: str) -> Path:
        """A unit's file."""
        return self.folder / f"{name}.jsonl"

    def names(self) -> Iterator[str]:
        """Units that are done, in any order."""
        return (path.stem for path in self.folder.glob("[!.]*.jsonl"))

    @contextlib.contextmanager
    def claimed(self, name: str) -> Iterator[bool]:
        """Whether a unit is this process' to do, until the end: it is not done, and no other process is at it."""
        at = FIRST_UNIT + int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big") % UNITS
        if not processes.among_others():
            yield not self.has(name)
            return
        if self.has(name) or not self._locks.take(at):
            yield False
            return
        try:
            yield not self.has(name)  # it may have been done since
        finally:
            self._locks.release(at)

    def collects(self) -> bool:
        """Whether this process is the one that puts units together; once it is, it stays."""
        return not processes.among_others() or self._locks.take(COLLECTING)

    def share(self, names: Iterable[str], make: Unit) -> Iterator[str]:
        """Units in the order in which they are done: here, or by another process."""
        left = list(names)
        while left:
            waiting = []
            for name in left:
                if not self.has(name):
                    with self.claimed(name) as mine:
                        if mine:
                            self.write(name, make(name))
                    if not self.has(name):
                        waiting.append(name)
                        continue
                yield name
            if len(waiting) == len(left):
                time.sleep(POLL)
            left = waiting

    @property
    def finished(self) -> bool:
        """Whether another process has done the job, and its result is where it belongs."""
        if not self.folder.exists():
            return True
        if not self._locks.take(FINISHED, shared=True):
            return True
        self._locks.release(FINISHED)
        return False

    def finish(self) -> None:
        """Remove the folder, the result being where it belongs, once no other process reads in it."""
        # A lock says so, as a disk may have no room for a file.
        while processes.among_others() and not (self._locks.take(FINISHED) and self._locks.take(MEMBER)):
            time.sleep(POLL)
        self._remove()

    def leave(self) -> None:
        """Remove the folder, the result being where it belongs already, unless another process is in it."""
        if processes.among_others():
            self._locks.release(MEMBER)  # of several that leave at once one finds itself alone
            if not (self._locks.take(MEMBER) and self._locks.current):
                self._let_go()
                return
        self._remove()

    def settle(self, write: Callable[[], object]) -> None:
        """Have one process put the result where it belongs, and the others wait for it."""
        while not self.finished:
            if self.collects():
                write()
                self.finish()
                return
            time.sleep(POLL)
        self.close()

    def close(self) -> None:
        """Give back what was claimed. A folder without any unit is removed."""
        if _open_here.get(self._key) is not self:  # it is closed, or another process' that this one is forked from
            return
        if processes.among_others() or any(self.names()):
            self._let_go()
        else:
            self._remove()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, Exception | KeyboardInterrupt) and any(self.names()):
            error.unfinished = self.folder  # type: ignore[attr-defined]
        self.close()

    @property
    def _key(self) -> tuple[int, str]:
        return os.getpid(), self._at

    def _entered(self) -> ByteLocks:
        """The folder's locks, once this process is let in: alone, or as one of several."""
        several, until = processes.among_others(), time.monotonic() + PATIENCE
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                locks = ByteLocks(self.folder / LOCKS)
            except FileNotFoundError:  # it was removed meanwhile, by a job that is done
                continue
            except OSError as error:
                raise CorrSteerError(
                    f"{self.folder} cannot be written to ({error}); give another directory"
                ) from None
            try:
                entered = locks.take(MEMBER, shared=several)
            except NoLocks as error:
                if several:
                    locks.close()
                    raise
                log.warning("%s; see that no other process works in it", error)
                entered = True
            if entered and locks.current:
                return locks
            locks.close()
            if not entered and (not several or time.monotonic() > until):
                raise self._in_use("another process", "wait until it is done, stop it")
            if not entered:
                time.sleep(POLL)

    def _in_use(self, by: str, remedy: str) -> CorrSteerError:
        return CorrSteerError(
            f"{self.folder} is in use by {by}{_owner(self.folder)}; {remedy}, or give another directory"
        )

    def _open(self, anew: bool) -> None:
        """Begin, or see that what was begun is this job."""
        while processes.among_others() and not self._locks.take(OPENING):
            time.sleep(POLL)
        try:
            known = manifest(self.folder)
            if known is None and (strange := sorted(path.name for path in self._rest() if path.name[0] != ".")):
                raise CorrSteerError(
                    f"{self.folder} must be a folder that a job keeps what it has done in, or not be there, and holds "
                    f"{', '.join(strange[:3])}; give another path, or move them"
                )
            if known is None or anew:
                self._clear()
                owner = {"host": platform.node(), "process": os.getpid()}
                described = {
                    "format": FORMAT, "begun": self.begun, "made_with": self._made_with, "by": owner,
                    "processes": self.processes,
                }  # fmt: skip
                write_utf8(self.folder / MANIFEST, to_json(described, indent=1))
                sync_folder(self.folder.parent)  # which the folder may be new in
                return
            if known["format"] != FORMAT:
                raise JobDiffers(
                    f"what was begun in {self.folder} is not of this version, but {known['format']!r}; begin anew, or "
                    f"give another directory"
                )
            check_same(known["begun"], self.begun, f"what was begun in {self.folder}")
            self.processes = known["processes"]
            self.notes += [
                f"begun with {name} {known['made_with'].get(name)} and gone on with {now}"
                for name, now in self._made_with.items()
                if known["made_with"].get(name) != now
            ]
        finally:
            if processes.among_others():
                self._locks.release(OPENING)

    def _rest(self) -> list[Path]:
        """What is there beside the locks, the manifest last."""
        return sorted(
            (path for path in self.folder.iterdir() if path.name != LOCKS), key=lambda path: path.name == MANIFEST
        )

    def _clear(self) -> None:
        """Remove all but the locks; the manifest last, which says that the rest is ours to remove."""
        for path in self._rest():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _remove(self) -> None:
        """Let go of the folder and remove it; what cannot be removed stays, for the same job to remove."""
        with contextlib.suppress(OSError):
            self._clear()
            (self.folder / LOCKS).unlink(missing_ok=True)
        self._let_go()
        with contextlib.suppress(OSError):  # it may be another job's by now, and NFS keeps what was open until here
            self.folder.rmdir()

    def _let_go(self) -> None:
        self._locks.close()
        if _open_here.get(self._key) is self:
            del _open_here[self._key]


_open_here: dict[tuple[int, str], Journal] = {}  # by process, whose own locks do not keep it out, and folder


def beside(path: Path) -> Path:
    """The folder of the journal of a file that is to be written."""
    return Path(f"{path}.partial")


def begun_in(folder: Path) -> bool:
    """Whether a job was begun in a folder that was not finished."""
    return (folder / MANIFEST).exists()


def manifest(folder: Path) -> dict[str, Any] | None:
    """What was begun in a folder; None where nothing was, or nothing of it is left."""
    try:
        found = from_json((folder / MANIFEST).read_bytes())
        return {
            "format": found["format"], "begun": dict(found["begun"]), "made_with": dict(found["made_with"]),
            "processes": int(found["processes"]),
        }  # fmt: skip
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorrSteerError(f"{folder / MANIFEST} is damaged ({error}); remove {folder}") from None


def check_same(known: Any, asked: Any, what: str) -> None:
    """Raise JobDiffers, which lists each difference, unless a job is the one that was begun."""
    if differ := list(_differences(known, plain(asked))):
        raise JobDiffers(
            f"{what} differs from what is asked for: {'; '.join(differ)}. Ask for the same to go on, begin anew "
            f"(--force), or give another place"
        )


def _differences(known: Any, asked: Any, name: str = "") -> Iterator[str]:
    if isinstance(known, dict) and isinstance(asked, dict):
        for key in dict.fromkeys((*known, *asked)):
            yield from _differences(known.get(key), asked.get(key), f"{name}.{key}" if name else key)
    elif known != asked:
        yield f"{name} was {_short(known)}, is {_short(asked)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _versions() -> dict[str, str]:
    import torch
    import transformers

    return {"corrsteer": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _owner(folder: Path) -> str:
    """Who began it, as far as that is known."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        by = from_json((folder / MANIFEST).read_bytes())["by"]
        return f" (begun by process {by['process']} on {by['host']})"
    return ""
