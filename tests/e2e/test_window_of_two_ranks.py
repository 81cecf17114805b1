"""What two ranks make of a window together."""

from launching import Console


def test_ranks_sum_up_and_the_largest_is_told_to_all(two_ranks: Console) -> None:
    done = two_ranks.succeed("tests/e2e/most_of_ranks.py")
    line = f"1.5 [20.0] [{2**52 + 1.0}, 9.0]"
    assert done.stdout.splitlines().count(line) == 2, done.stdout
