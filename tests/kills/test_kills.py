"""Commands that write are killed, and run again: a few of `python -m tests.kills`."""

import signal

import pytest

from tests.forked import Forked
from tests.kills.campaign import Campaign, Case
from tests.kills.commands import COMMANDS

CASES = 2  # of each command


@pytest.fixture(scope="session")
def campaign(forked: Forked, tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    return Campaign(tmp_path_factory.mktemp("kills"), forked, seed=0)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_loses_nothing_and_its_next_run_is_as_the_first(
    campaign: Campaign, name: str
) -> None:
    for case in campaign.cases(name, CASES):
        verdict = campaign.run(case)
        assert not verdict.faults, verdict
        assert verdict.moment, "it ended before"


@pytest.mark.parametrize("largest", [4_000, 15_000])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_the_users_to_mend_and_loses_nothing(
    campaign: Campaign, name: str, largest: int
) -> None:
    """Among what does not fit is a small file, then only weights."""
    done, faults = campaign.run_in(name, "tests.kills.settings:full_disk", largest)
    assert not faults
    if done.code:
        assert done.code == 2, done.stderr
        assert "error: " in done.stderr and "try: " in done.stderr
        assert not campaign.rerun(name)


@pytest.mark.parametrize("name", COMMANDS)
def test_permissions_of_all_files_follow_the_umask(campaign: Campaign, name: str) -> None:
    done, faults = campaign.run_in(name, "tests.kills.settings:umask", 0o027)
    assert not done.code and not faults
    for path in campaign.written(name):
        whole = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == whole & ~0o027, path


def test_a_command_that_is_not_killed_is_no_kill(campaign: Campaign) -> None:
    verdict = campaign.run(Case("plan --json", 0, signal.SIGKILL, 10**6, 0, None, None))
    assert verdict.moment == "" and verdict.out == "complete" and not verdict.faults
