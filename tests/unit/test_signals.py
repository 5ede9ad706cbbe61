"""What asks a run to stop before its end: votes, echoes of a signal, and how the handlers come and go."""

from __future__ import annotations

import os
import signal
import time

from megatron_hyperp.training.signals import SECONDS_OF_ONE_REQUEST, SIGNALS, StopRequests


def unlimited() -> StopRequests:
    return StopRequests(None, time.monotonic())


def test_nobody_asked() -> None:
    requests = unlimited()
    assert requests.ballot() == [0.0, 0.0, 0.0]
    assert requests.reason([0.0, 0.0, 0.0]) is None


def test_one_vote_of_many_ranks_stops_all() -> None:
    asked = unlimited()
    asked.note(signal.SIGUSR1, 0.0)
    votes = [sum(column) for column in zip(asked.ballot(), unlimited().ballot(), unlimited().ballot(), strict=True)]
    assert unlimited().reason(votes) == asked.reason(votes) == "SIGUSR1 (ranks that had got it: 1)"


def test_the_time_is_over_once_a_rank_says_so() -> None:
    late, early = StopRequests(1.5, time.monotonic() - 91), StopRequests(1.5, time.monotonic() - 89)
    assert (late.ballot(), early.ballot()) == ([0.0, 0.0, 1.0], [0.0, 0.0, 0.0])
    assert early.reason([0.0, 0.0, 1.0]) == "--exit-duration-in-mins 1.5 are over"


def test_an_echo_is_no_second_signal() -> None:
    """Torchrun passes SIGTERM on to workers that may have got it from Slurm already."""
    requests = unlimited()
    assert not requests.note(signal.SIGTERM, 100.0)
    assert not requests.note(signal.SIGTERM, 100.0 + SECONDS_OF_ONE_REQUEST)
    assert requests.note(signal.SIGTERM, 100.1 + SECONDS_OF_ONE_REQUEST)
    assert requests.note(signal.SIGUSR1, 100.1 + SECONDS_OF_ONE_REQUEST)


def test_handlers_are_there_only_while_listening() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    requests = unlimited()
    with requests.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
        deadline = time.monotonic() + 10
        while not any(requests.ballot()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert requests.ballot() == [0.0, 1.0, 0.0]
    assert [signal.getsignal(number) for number in SIGNALS] == before
