"""`python -m tests.fuzz`: change inputs at random, by the thousand, and print what went wrong.

python -m tests.fuzz --cases 10000 --jobs 8
python -m tests.fuzz --only recipe --case 17 --seed 3     one case again, with its files kept
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tests.campaign_table import print_origin, print_table
from tests.forked import Forked, Outcome
from tests.fuzz.campaign import Campaign, Case, Verdict
from tests.fuzz.judge import FAULTS
from tests.fuzz.kinds import KINDS
from tests.fuzz.world import make_world

_HEADS = ("cases", "exit 0", "exit 2", *FAULTS)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--cases", type=int, default=300, help="in all; shared among the kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--case", type=int, metavar="N", help="only this case of the kind")
    parser.add_argument("--jobs", type=int, default=1, help="processes that run cases")
    options = parser.parse_args()
    if options.case is not None and options.only is None:
        parser.error("--case needs --only")
    start = time.perf_counter()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    jobs = 1 if options.case is not None else options.jobs
    (folder / "world").mkdir()
    processes = [Forked() for _ in range(jobs)]
    world = make_world(folder / "world", processes[0])
    free: SimpleQueue[Campaign] = SimpleQueue()
    for number, process in enumerate(processes):
        free.put(Campaign(folder / f"job-{number}", world, process))

    def run(case: Case) -> Verdict:
        campaign = free.get()
        try:
            return campaign.run(case)
        except Exception as error:  # one case must not end a campaign of thousands
            fault = f"bug of the campaign: {type(error).__name__}: {error}"
            return Verdict(case, "", "", Outcome(1, None, "", "", 0, 0, 0, None), [fault])
        finally:
            free.put(campaign)

    verdicts = []
    with ThreadPoolExecutor(jobs) as pool:
        for verdict in pool.map(run, _cases(options)):
            verdicts.append(verdict)
            if verdict.faults or options.case is not None:
                _show(verdict)
    _table(verdicts)
    print_origin(options.seed, time.perf_counter() - start, processes[0])
    for process in processes:
        process.__exit__(None, None, None)
    if options.case is not None:
        print(f"files: {folder / 'job-0'}")
    else:
        shutil.rmtree(folder)
    return int(any(verdict.faults for verdict in verdicts))


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    names = [options.only] if options.only else list(KINDS)
    if options.case is not None:
        yield Case(options.only, options.case, options.seed)
        return
    for place, name in enumerate(names):
        count = options.cases * (place + 1) // len(names) - options.cases * place // len(names)
        for number in range(count):
            yield Case(name, number, options.seed)


def _show(verdict: Verdict) -> None:
    case = verdict.case
    print(f"--only {case.kind} --case {case.number} --seed {case.seed}: {verdict.command}")
    print("   ", verdict.change.encode("unicode_escape").decode())
    for fault in verdict.faults or [f"exit {verdict.outcome.code}\n{verdict.outcome.stderr}"]:
        print(f"    {fault}", flush=True)


def _table(verdicts: list[Verdict]) -> None:
    rows = {}
    for name in [*dict.fromkeys(verdict.case.kind for verdict in verdicts), "all"]:
        ours = [verdict for verdict in verdicts if name in (verdict.case.kind, "all")]
        rows[name] = Counter(f"exit {verdict.outcome.code}" for verdict in ours)
        rows[name]["cases"] = len(ours)
        for verdict in ours:
            faults = {head for head in FAULTS for fault in verdict.faults if fault.startswith(head)}
            rows[name].update(faults)
    print_table("kind", _HEADS, rows)


if __name__ == "__main__":
    sys.exit(main())
