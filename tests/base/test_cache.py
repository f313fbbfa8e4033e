"""The cache of plans."""

from common import in_threads

from jactri._src.base.cache import Cache


def test_the_oldest_go_first():
    cache = Cache(3)
    for key in (1, 2, 3):
        cache[key] = key
    cache[1] = 10  # is there: nothing goes
    assert list(cache) == [1, 2, 3]
    cache[4] = 4
    assert list(cache) == [2, 3, 4]


def test_made_once_also_if_it_is_none():
    cache, calls = Cache(), []
    for _ in range(2):
        assert cache.of("key", lambda: calls.append(1)) is None
    assert calls == [1]


def test_threads_share_it():
    cache = Cache(4)

    def use(number):
        for k in range(3000):
            key = number * k % 7
            assert cache.of(key, lambda key=key: -key) == -key

    in_threads(4, use)
    assert len(cache) == 4
