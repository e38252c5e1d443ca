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


def test_a_command_that_is_not_killed_is_no_kill(campaign: Campaign) -> None:
    verdict = campaign.run(Case("plan --json", 0, signal.SIGKILL, 10**6, 0, None, None))
    assert verdict.moment == "" and verdict.out == "complete" and not verdict.faults
