"""Whom a rank calls."""

import random

import pytest

from gossip.address_book import FIRST_SECONDS, LONGEST_SECONDS, OWN_SECONDS, AddressBook
from tests.clock import Clock


@pytest.fixture
def clock():
    return Clock(100.0)


@pytest.fixture
def peers():
    return ["a:1", "b:1", "c:1"]


@pytest.fixture
def book(peers, clock):
    return AddressBook(lambda: peers, random.Random(0), clock)


def test_address_book_chooses_any_peer_and_nobody_where_there_is_none(book, peers):
    assert {book.choose() for _ in range(100)} == set(peers)
    peers.clear()
    assert book.choose() is None


def test_address_book_leaves_who_is_silent_alone_for_longer_and_longer(book, peers, clock):
    pauses = []
    while not pauses or pauses[-1] < LONGEST_SECONDS or len(pauses) < 12:
        book.silent("b:1")
        began = clock.now
        assert {book.choose() for _ in range(50)} == {"a:1", "c:1"}
        while "b:1" not in book.known():
            clock.now += FIRST_SECONDS / 4
        pauses.append(clock.now - began)
    assert pauses[:3] == [FIRST_SECONDS, 2 * FIRST_SECONDS, 4 * FIRST_SECONDS] and pauses[-1] == LONGEST_SECONDS
    book.answered("b:1")
    book.silent("b:1")
    clock.now += FIRST_SECONDS
    assert book.known() == peers


def test_address_book_calls_a_silent_peer_again_at_once_when_it_has_answered(book, peers):
    book.silent("a:1")
    book.answered("a:1")
    assert book.known() == peers


def test_address_book_leaves_its_own_address_alone_but_not_for_ever(book, peers, clock):
    book.own("c:1")
    clock.now += OWN_SECONDS - 1
    assert book.known() == ["a:1", "b:1"]
    clock.now += 1  # somebody else may listen there by then
    assert book.known() == peers


def test_address_book_forgets_who_is_known_no_more(book, peers):
    for number in range(1000):
        peers[0] = f"host:{number}"
        book.silent(peers[0])
    assert len(book._left_alone) == 1
