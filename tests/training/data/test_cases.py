"""data.cases: which cases are taken."""

from mdf_training.data.cases import spread


def test_cases_are_spread_over_the_whole_set() -> None:
    assert spread(10, 5) == [0, 2, 4, 6, 8]
    assert spread(3, 5) == spread(3, None) == [0, 1, 2]
