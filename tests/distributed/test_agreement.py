"""Ranks that run at their own pace do what one of them wishes at the same moment: threads and a real store."""

from __future__ import annotations

import random
import threading
import time
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from pantheraml.distributed.agreement import Agreement

RANKS = 3


@pytest.fixture
def connect():
    server = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60))
    return lambda: TCPStore("127.0.0.1", server.port, is_master=False)


def run(agreement, wishes, pace, goes_on):
    """What a rank does: ``(moment, wish)`` of those that came true, while ``goes_on(moment, them)``.

    Its wishes come up after so many seconds each, and when the one before came true.
    """
    over, done = threading.Event(), []

    def watch():
        while not over.wait(0.002):
            agreement.turn()

    def wish():
        for after, text in wishes:
            time.sleep(after)
            agreement.wish(text)
            while not over.is_set() and text not in [known for _, known in done]:
                time.sleep(0.002)

    threads = [threading.Thread(target=watch, daemon=True), threading.Thread(target=wish, daemon=True)]
    for thread in threads:
        thread.start()
    moment = 0
    while goes_on(moment, done):
        moment += 1
        time.sleep(pace(moment))
        found = agreement.passed()
        if found is not None:
            done.append((moment, found))
    over.set()
    for thread in threads:
        thread.join()
    agreement.close()
    return done


def together(connect, wishes, paces, goes_on):
    found = [None] * RANKS

    def rank(number):
        found[number] = run(Agreement("test", connect, number, RANKS), wishes[number], paces[number], goes_on)

    threads = [threading.Thread(target=rank, args=(number,), daemon=True) for number in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_all_do_it_at_the_same_moment(connect):
    """Also where two wish something at the same time, and again and again."""
    source = random.Random(3)
    paces = [lambda _, most=most: source.uniform(0, most) for most in (0.006, 0.012, 0.012)]
    wishes = [[(0.1, "a"), (0.3, "b")], [(0.1, "c")], [(0.5, "d")]]
    first, *others = together(connect, wishes, paces, lambda _, done: len(done) < 4)
    assert others == [first, first]
    assert {wish for _, wish in first} == {"a", "b", "c", "d"}


def test_a_rank_that_is_done_is_not_waited_for(connect):
    """It has no moment left, so nothing is done, and nobody waits for ever."""
    wishes = [[], [], [(0.5, "late")]]
    paces = [lambda _: 0.0, lambda _: 0.0, lambda _: 0.01]
    assert together(connect, wishes, paces, lambda moment, _: moment < 100) == [[], [], []]


def test_one_rank_does_it_at_its_next_moment():
    agreement = Agreement("alone")
    assert agreement.passed() is None
    agreement.wish("a")
    assert agreement.known == "a" and not agreement.turn()
    assert agreement.passed() == "a" and agreement.passed() is None
