"""`python -m tests.kills`: kill commands that write, by the hundred, and print what was lost.

python -m tests.kills --cases 300
python -m tests.kills --only train --case 17 --seed 3     one case again, with its files kept
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.campaign_table import print_origin, print_table
from tests.forked import Forked
from tests.kills.campaign import Campaign, Verdict
from tests.kills.commands import COMMANDS

_KINDS = ("lost", "half", "status", "rerun", "unequal", "scratch")
_HEADS = ("kills", "absent", "unfinished", "complete", *_KINDS)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kills")
    parser.add_argument("--cases", type=int, default=300, help="in all; shared among the commands")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("--case", type=int, metavar="N", help="only this case of the command")
    options = parser.parse_args()
    if options.case is not None and options.only is None:
        parser.error("--case needs --only")
    names = [options.only] if options.only else list(COMMANDS)
    start, verdicts, broken = time.perf_counter(), [], []
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    with Forked() as forked:
        campaign = Campaign(folder, forked, options.seed, outside=0.2)
        for place, name in enumerate(names):
            try:
                campaign.reference(name)
            except RuntimeError as error:
                print(f"{name}: not even the unkilled run works: {error}")
                broken.append(name)
                continue
            for path in campaign.check_reference(name):
                print(f"{name}: two unkilled runs differ in {path}", flush=True)
            count = options.cases * (place + 1) // len(names) - options.cases * place // len(names)
            if options.case is not None:
                count = options.case + 1
            for case in campaign.cases(name, count)[options.case or 0 :]:
                verdict = campaign.run(case)
                verdicts.append(verdict)
                if verdict.faults:
                    _show(verdict)
        _table(verdicts)
        print_origin(options.seed, time.perf_counter() - start, forked)
    if options.case is not None:
        print(f"files: {folder}")
    else:
        subprocess.run(["rm", "-rf", str(folder)], check=True)
    return int(bool(broken) or any(verdict.faults for verdict in verdicts))


def _show(verdict: Verdict) -> None:
    case = verdict.case
    print(f"{case.name} --case {case.number}: {case.signal.name} {verdict.moment}"
          f"{'' if case.then is None else f', then SIGKILL {case.then} later'}"
          f"{'' if case.again is None else ', and again'}; out {verdict.out}")  # fmt: skip
    for fault in verdict.faults:
        print(f"    {fault}", flush=True)


def _table(verdicts: list[Verdict]) -> None:
    rows = {}
    for name in [*dict.fromkeys(verdict.case.name for verdict in verdicts), "all"]:
        ours = [verdict for verdict in verdicts if name in (verdict.case.name, "all")]
        rows[name] = Counter(verdict.out for verdict in ours)
        rows[name]["kills"] = sum(bool(verdict.moment) for verdict in ours)
        for verdict in ours:
            rows[name].update({fault.split()[0] for fault in verdict.faults})
    print_table("command", _HEADS, rows)


if __name__ == "__main__":
    sys.exit(main())
