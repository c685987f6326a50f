from __future__ import annotations

import numpy as np

from shmcache_tools.chunks import KEY_BYTES, Pattern, keys_of, words_of
from shmcache_tools.demo.wire import Done, Failed, Ready, Task, decode_answer

_IDS = np.array([0, 1, 2**63, 2**64 - 1], dtype=np.uint64)


def test_keys_are_a_matrix_of_different_rows() -> None:
    keys = keys_of(_IDS)
    assert keys.shape == (4, KEY_BYTES)
    assert keys.dtype == np.uint8
    assert keys.flags.c_contiguous
    assert len({row.tobytes() for row in keys}) == 4
    assert keys_of(_IDS[:0]).shape == (0, KEY_BYTES)


def test_words_follow_from_the_key_alone() -> None:
    keys = keys_of(_IDS)
    words = words_of(keys)
    assert len(set(words.tolist())) == 4
    assert words_of(keys[2:3])[0] == words[2]
    assert words_of(keys[:0]).shape == (0,)


def test_every_wrong_word_is_found() -> None:
    pattern = Pattern(4096)
    mine, other = words_of(keys_of(_IDS))[:2]
    chunk = np.empty(512, dtype=np.int64)
    pattern.fill(chunk, mine)
    assert pattern.layout.nbytes == 4096
    assert pattern.matches(chunk, mine)
    assert not pattern.matches(chunk, other)
    for place in (0, 255, 511):
        chunk[place] ^= 1
        assert not pattern.matches(chunk, mine)
        chunk[place] ^= 1
    assert not pattern.matches(np.roll(chunk, 1), mine)


def test_messages_come_through_as_they_went() -> None:
    task = Task.decode(Task(2**40, keys_of(_IDS)).encode())
    assert task.request == 2**40
    assert task.keys.tolist() == keys_of(_IDS).tolist()
    for answer in (Ready(), Done(7, 5, 1, 2, 0.25, 0.5, 1e-9), Failed("größe\n")):
        assert decode_answer(answer.encode()) == answer
