"""`python -m fuzz [--inputs N] [--seed S] [--kind KIND] [--at I] [--out FILE]`, in tests/: inputs with something wrong.

Each input ends in success or in the package's own error. Anything else, a crash and a hang among them, is a finding.
What runs is one process a kind, so that a crash is one of its inputs' and no more.
"""

import argparse
import collections
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
SECONDS = 20  # that an input may take
MEMORY = 12 << 30  # bytes of addresses


def kinds():
    from fuzz import arguments, files

    assert not set(files.KINDS) & set(arguments.KINDS), "a kind is of the one or the other"
    return (*files.KINDS, *arguments.KINDS)


def work(kind, seed, first, n, marker):
    """In a process of its own: inputs of a kind, a line of JSON for each finding, and one with the figures."""
    import torch

    torch.set_num_threads(1)
    from fuzz import arguments, files

    from corrsteer.errors import CorrSteerError

    def hangs(*_):
        raise TimeoutError(f"it takes more than {SECONDS} s")

    with tempfile.TemporaryDirectory() as folder:
        made = files.Files(Path(folder)) if kind in files.KINDS else None
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.signal(signal.SIGALRM, hangs)
        counts = collections.Counter()
        for number in range(first, first + n):
            os.pwrite(marker, f"{number:12d} {counts['accepted']:12d} {counts['refused']:12d}".encode(), 0)
            rng = random.Random(f"{seed} {kind} {number}")
            signal.alarm(SECONDS)
            try:
                made.once(rng, kind) if made else arguments.KINDS[kind](rng)
                counts["accepted"] += 1
            except CorrSteerError as error:
                counts["refused"] += 1
                if "\n" in str(error):
                    print(json.dumps({"input": number, "error": f"an error of several lines: {error}"}), flush=True)
            except (Exception, SystemExit) as error:
                at = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(at.filename).name}:{at.lineno}"
                text = f"{type(error).__name__}: {error}"[:300]
                print(json.dumps({"input": number, "error": text, "where": where}), flush=True)
            finally:
                signal.alarm(0)
        print(json.dumps({"done": counts}), flush=True)


def fuzz(kind, seed, n, first=0):
    """Figures of so many inputs of a kind, and its findings."""
    counts, findings = collections.Counter(), []
    end = first + n
    while first < end:
        with tempfile.TemporaryFile() as marker:
            os.set_inheritable(marker.fileno(), True)
            numbers = (seed, first, end - first, marker.fileno())
            command = [sys.executable, "-m", "fuzz", "--work", kind, *map(str, numbers)]
            done = subprocess.run(
                command, cwd=TESTS, close_fds=False, capture_output=True, text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS}:{TESTS.parent}"},
            )  # fmt: skip
            lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            findings += [line for line in lines if "input" in line]
            if done.returncode == 0:
                counts.update(lines[-1]["done"])
                break
            number, accepted, refused = map(int, os.pread(marker.fileno(), 40, 0).split() or (b"-1", b"0", b"0"))
            if number < 0:
                raise RuntimeError(f"{kind}: no input was reached: {done.stderr[-2000:]}")
            counts.update(accepted=accepted, refused=refused)
            ended = f"the process ended with {done.returncode}: {done.stderr[-300:]}"
            findings.append({"input": number, "error": ended})
            first = number + 1
    return {"kind": kind, "inputs": n, "accepted": counts["accepted"], "refused": counts["refused"]}, findings


def main():
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=1000, help="of each kind")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--kind", action="append", help="one of them; by default all")
    parser.add_argument("--at", type=int, default=0, help="the first input's number")
    parser.add_argument("--out", type=Path, help="folder for a result")
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        kind, *numbers = options.work
        work(kind, *map(int, numbers))
        return 0
    rows, found = [], 0
    for kind in options.kind or kinds():
        row, findings = fuzz(kind, options.seed, options.inputs, options.at)
        rows.append(row | {"findings": len(findings)})
        figures = ", ".join(f"{rows[-1][name]} {name}" for name in ("inputs", "accepted", "refused", "findings"))
        print(f"{kind}: {figures}", flush=True)
        for one in {line.get("where", line["error"][:60]): line for line in findings}.values():
            again = f"cd tests && python -m fuzz --kind {kind} --seed {options.seed} --at {one['input']} --inputs 1"
            print(f"  {one['error']} ({one.get('where', '')}); again: {again}", flush=True)
        found += len(findings)
    print(f"seed {options.seed}: {sum(row['inputs'] for row in rows)} inputs, {found} findings")
    if options.out:
        from bench import record

        head, path = record.study("fuzzing", options.seed), options.out / "fuzzing.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        if {name: known.get(name) for name in head} == head:  # what is run again takes its own place alone
            rows = list(({row["kind"]: row for row in known["kinds"]} | {row["kind"]: row for row in rows}).values())
        print(record.write_study(head | {"kinds": rows}, options.out))
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
