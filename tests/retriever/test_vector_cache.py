from __future__ import annotations

import gc

import numpy as np

from lora_hub_sdk.retriever.vector_cache import VectorCache, text_key


def vector(value: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.full(100, value, dtype=np.float32)  # 400 bytes of numbers, 800 as an entry


def test_what_was_unused_for_longest_is_dropped_first() -> None:
    cache = VectorCache(1700)
    cache.keep(b"a", vector(1))
    cache.keep(b"b", vector(2))
    assert set(cache.find([b"a"])) == {b"a"}
    cache.keep(b"c", vector(3))
    assert set(cache.find([b"a", b"b", b"c"])) == {b"a", b"c"}
    assert cache.use.bytes == 1600


def test_a_key_that_is_kept_twice_takes_room_once() -> None:
    cache = VectorCache(10_000)
    cache.keep(b"a", vector(1))
    cache.keep(b"a", vector(1))
    assert (cache.use.texts, cache.use.bytes) == (1, 800)


def test_hits_and_misses_count_texts_that_were_asked_for() -> None:
    cache = VectorCache(10_000)
    assert cache.use.hit_rate == 0.0
    cache.keep(b"a", vector(1))
    cache.find([b"a", b"a", b"b", b"c"])
    assert (cache.use.hits, cache.use.misses, cache.use.hit_rate) == (2, 2, 0.5)


def test_a_cache_without_room_keeps_nothing() -> None:
    cache = VectorCache(0)
    cache.keep(b"a", vector(1))
    assert cache.use.texts == 0


def test_a_row_is_held_without_the_batch_that_it_came_from() -> None:
    cache = VectorCache(10_000)
    batch = np.ones((50, 100), dtype=np.float32)
    cache.keep(b"a", batch[3])
    held = cache.find([b"a"])[b"a"]
    batch[:] = 0
    gc.collect()
    assert held.base is None
    assert held.sum() == 100


def test_texts_that_differ_have_keys_that_differ() -> None:
    texts = ["", " ", "a", "A", "a\0", "\ud800", "\ufffd", "ä", "a\u0308"]
    assert len({text_key(text) for text in texts}) == len(texts)
