"""A hang within a check is told in the user's words: they never wrote the comparison in which others wait."""

from __future__ import annotations

from pytest_gputrain.checks.ranks import in_users_words

HUNG = """\
HUNG after 1.4 s: ranks wait for each other: rank 1 in all_reduce #4 (4 x int8) at my.py:3 in loss, \
rank 0 in all_gather #4 of group 1 (48 x 24 x uint8) at pytest_gputrain/checks/peers.py:36 in deviating   \
at my.py:3 in loss
  while training on 2 ranks
  rank 0: waits in all_gather #4 of group 1 (48 x 24 x uint8)   pytest_gputrain/checks/peers.py:36 in \
deviating   dist.all_gather(gathered, own, group=self._group)
  rank 1: waits in all_reduce #4 (4 x int8)   my.py:3 in loss   loss.backward()   [in backward]
  likely: ranks enter the collectives of two groups in opposite order; enter them in one order on all ranks
--- rank 0"""


def test_a_check_that_compares_its_ranks_is_no_collective_of_theirs() -> None:
    assert in_users_words(HUNG) == (
        "HUNG after 1.4 s: ranks wait for each other: rank 1 in all_reduce #4 (4 x int8) at my.py:3 in "
        "loss, rank 0 in this check's comparison of the ranks, after its step   at my.py:3 in loss\n"
        "  while training on 2 ranks\n"
        "  rank 0: waits in this check's comparison of the ranks, after its step\n"
        "  rank 1: waits in all_reduce #4 (4 x int8)   my.py:3 in loss   loss.backward()   [in backward]\n"
        "  likely: in this step some ranks do what others do not: a parameter got no gradient on some (DDP "
        "waits for it, unless find_unused_parameters=True), or a collective is called on some\n"
        "--- rank 0"
    )


def test_other_hangs_keep_their_words() -> None:
    own = HUNG.replace("pytest_gputrain/checks/peers.py:36 in deviating", "my.py:9 in gather")
    assert in_users_words(own) == own


def test_a_culprit_in_the_comparison_has_no_line_of_theirs() -> None:
    at = "at /lib/pytest_gputrain/checks/peers.py:49 in agree"
    assert in_users_words(
        f"HUNG: ranks wait for each other: rank 1 in all_reduce #8 of group 1 (3 x int64) {at}, "
        f"rank 0 in all_reduce #85 (9 x float32) at train.py:13 in take   {at}"
    ) == (
        "HUNG: ranks wait for each other: rank 1 in this check's comparison of the ranks, after its "
        "step, rank 0 in all_reduce #85 (9 x float32) at train.py:13 in take"
    )
