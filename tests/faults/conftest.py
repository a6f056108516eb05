from collections.abc import Callable

import pytest


@pytest.fixture
def amount(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """(quick, full) → how often to try: quick in CI, full with `--campaign`."""
    full = request.config.getoption("--campaign")
    return lambda quick, all_of_them: all_of_them if full else quick


@pytest.fixture
def counted(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """(campaign, **counts): for the record. To be called before the counts are asserted."""
    return lambda campaign, **counts: record_property("counted", {"campaign": campaign, **counts})
