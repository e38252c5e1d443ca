"""Changed inputs end in a right result or in a refusal: a few of `python -m tests.fuzz`."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.forked import Forked
from tests.fuzz.campaign import Campaign, Case
from tests.fuzz.kinds import KINDS
from tests.fuzz.world import make_world

CASES = 33  # of each kind
SEED = 0


@pytest.fixture(scope="session")
def campaigns(
    forked: Forked, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Campaign, Campaign]]:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "world").mkdir()
    with Forked() as second:
        world = make_world(folder / "world", forked)
        yield Campaign(folder / "0", world, forked), Campaign(folder / "1", world, second)


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_input_gives_a_right_result_or_a_refusal(
    campaigns: tuple[Campaign, Campaign], kind: str
) -> None:
    def run(place: int) -> list[str]:
        verdicts = [
            campaigns[place].run(Case(kind, number, SEED))
            for number in range(place, CASES, len(campaigns))
        ]
        return [
            f"--case {verdict.case.number}: {verdict.command}: {verdict.change}: {verdict.faults}"
            for verdict in verdicts
            if verdict.faults
        ]

    with ThreadPoolExecutor(len(campaigns)) as pool:
        faults = [fault for found in pool.map(run, range(len(campaigns))) for fault in found]
    assert not faults, "\n".join(faults)


def test_a_case_is_the_same_every_time(campaigns: tuple[Campaign, Campaign]) -> None:
    first, second = (campaign.run(Case("recipe", 5, SEED)) for campaign in campaigns)
    assert (first.command, first.change) == (second.command, second.change)
    assert (first.outcome.code, first.faults) == (second.outcome.code, second.faults)
