"""Keyed shuffles of [0, n) that need no memory: any position of an epoch's order is computed alone.

A bijection on the m-bit words, 2^m the first power of two not below n and at least 64, is made of rounds of two steps that are
bijections themselves (arithmetic modulo 2^m): ``x -> a x + c`` with a odd carries low bits up, and
``x -> x xor (x >> s)`` with s >= m / 2 carries high bits down and is its own inverse. Results outside [0, n) are put
through again until they are inside (cycle walking, Black and Rogaway 2002), which restricts the bijection to [0, n);
above 32 it takes fewer than two passes on average since n > 2^(m - 1).

All functions are vectorised and broadcast their arguments. Not cryptography: good enough to shuffle.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["derive_key", "inverse_permute", "permute", "permute_windows"]

_MASK = (1 << 64) - 1
# On words of fewer bits there are too few different rounds to reach all orders of a tiny domain evenly.
_ROUNDS = 6
_LEAST_BITS = 6
# Words per piece: the temporaries of one piece stay in a core's second-level cache.
_PIECE = 1 << 15


def derive_key(seed: Any, *numbers: Any) -> Any:
    """Hash a seed and any number of integers into a 64-bit key (SplitMix64, Steele et al. 2014, chained).

    Args:
        seed: integer of any sign, or array of them.
        numbers: integers or arrays that broadcast; their order matters.

    Returns:
        A Python integer in [0, 2^64), or a uint64 array if an argument is an array.

    Raises:
        ValueError: if an argument is no integer.

    Example:
        >>> derive_key(0, 1) == derive_key(0, 1), derive_key(0, 1) == derive_key(1, 0)
        (True, False)
        >>> bool((derive_key(7, np.arange(3))[2] == derive_key(7, 2)))
        True
    """
    key = _mix64(_word("seed", seed))
    for number in numbers:
        key = _mix64(key ^ _word("numbers", number))
    return key


def permute(i: ArrayLike, n: ArrayLike, key: ArrayLike) -> NDArray[np.int64]:
    """Where a keyed bijection on [0, n) sends ``i``.

    Args:
        i: positions, any shape, integers in [0, n).
        n: size of the domain, 1 to 2^62, broadcast with ``i``.
        key: 64-bit key (:func:`derive_key` makes good ones), broadcast with ``i``.

    Returns:
        int64 of the broadcast shape, in [0, n).

    Raises:
        ValueError: if a position is outside [0, n), n is outside its range, or anything is no integer.

    Example:
        >>> sorted(permute(np.arange(5), 5, 7).tolist()), permute(3, 5, 7).shape
        ([0, 1, 2, 3, 4], ())
    """
    return _walk(_forward, i, n, key)


def inverse_permute(i: ArrayLike, n: ArrayLike, key: ArrayLike) -> NDArray[np.int64]:
    """The position that :func:`permute` sends to ``i``; same arguments.

    Example:
        >>> inverse_permute(permute([4, 0, 2], 5, 7), 5, 7).tolist()
        [4, 0, 2]
    """
    return _walk(_backward, i, n, key)


def permute_windows(i: ArrayLike, n: int, window: int, key: ArrayLike) -> NDArray[np.int64]:
    """Where a bijection on [0, n) sends ``i`` that finishes one window before it starts the next.

    Windows are the runs ``[v window, (v + 1) window)``, the last one cut at n. They are visited in a permuted order,
    and each is permuted inside with a key of its own: reads stay within one shard, or a few, at a time.

    Args:
        i: positions, any shape, integers in [0, n).
        n: size of the domain, 1 to 2^62.
        window: samples per window, at least 1; n or more is one window.
        key: 64-bit key, broadcast with ``i``.

    Returns:
        int64 of the broadcast shape, in [0, n).

    Raises:
        ValueError: as :func:`permute`, or if ``window`` is not positive.

    Example:
        >>> (permute_windows(np.arange(6), 6, 2, 1) // 2).tolist()
        [1, 1, 0, 0, 2, 2]
    """
    if window < 1:
        raise ValueError(f"window: expected at least 1, got {window}")
    position = _integers("i", i)
    _check_domain(position, np.asarray(n))
    window = min(window, n)
    num_windows, tail = -(-n // window), n % window
    if tail == 0:
        visit, offset = position // window, position % window
        length = window
    else:
        # The short window is visited at one known place, which shifts all that come after it.
        place = inverse_permute(num_windows - 1, num_windows, key)
        before, after = position < place * window, position >= place * window + tail
        start = np.where(before, 0, np.where(after, place * window + tail, place * window))
        first = np.where(before, 0, np.where(after, place + 1, place))
        visit, offset = first + (position - start) // window, (position - start) % window
        length = np.where(before | after, window, tail)
    chosen = permute(visit, num_windows, key)
    return chosen * window + permute(offset, length, derive_key(key, chosen))


def _mix64(word: Any) -> Any:
    word = (word + 0x9E3779B97F4A7C15) & _MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)


def _word(name: str, value: Any) -> Any:
    """An integer modulo 2^64, or an array of them."""
    if isinstance(value, int | np.integer):
        return int(value) & _MASK
    array = np.asarray(value)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name}: expected integers, got {array.dtype} of shape {list(array.shape)}")
    return int(array) & _MASK if array.ndim == 0 else array.astype(np.uint64)


def _integers(name: str, value: ArrayLike) -> NDArray[np.int64]:
    array = np.asarray(value)
    if not (np.issubdtype(array.dtype, np.integer) or array.size == 0):
        raise ValueError(f"{name}: expected integers, got {array.dtype} of shape {list(array.shape)}")
    return array.astype(np.int64, copy=False)


def _check_domain(position: NDArray[np.int64], n: NDArray[np.int64]) -> None:
    if n.size and (n.min() < 1 or n.max() > 1 << 62):
        raise ValueError(f"n: expected 1 to 2^62, got {n.min()} to {n.max()}")
    if position.size and n.size and (position.min() < 0 or np.any(position >= n)):
        raise ValueError(
            f"i: expected positions in [0, n), got {position.min()} to {position.max()} with n = {n.max()}"
        )


Words = NDArray[Any]
Pass = Callable[[Words, list[tuple[Any, Any]], Any, Any], None]


def _forward(words: Words, rounds: list[tuple[Any, Any]], mask: Any, shift: Any) -> None:
    for multiplier, increment in rounds:
        words *= multiplier
        words += increment
        words &= mask
        words ^= words >> shift


def _backward(words: Words, rounds: list[tuple[Any, Any]], mask: Any, shift: Any) -> None:
    for multiplier, increment in reversed(rounds):
        words ^= words >> shift
        words -= increment
        words *= _inverse(multiplier)
        words &= mask


def _inverse(odd: Words) -> Words:
    """Inverse modulo the word size: Newton's iteration doubles the right bits, from three (odd^2 = 1 modulo 8)."""
    result = odd.copy()
    for _ in range(5):
        result *= 2 - odd * result
    return result


def _walk(one_pass: Pass, i: ArrayLike, n: ArrayLike, key: ArrayLike) -> NDArray[np.int64]:
    position, domain, word = _integers("i", i), _integers("n", n), _word("key", key)
    shape = np.broadcast_shapes(position.shape, domain.shape, np.shape(key))
    _check_domain(position, domain)
    if 0 in shape:
        return np.empty(shape, np.int64)
    bits = np.maximum(_LEAST_BITS, _bit_length(np.atleast_1d(domain) - 1))
    # Modulo 2^m only the low m bits count, so 32-bit words give the same results, twice as fast.
    dtype = np.uint32 if bits.max() <= 32 else np.uint64
    mask = (np.uint64(_MASK) >> (64 - bits).astype(np.uint64)).astype(dtype)
    shift = ((bits + 1) // 2).astype(dtype)
    constants = [(_mix64(word ^ (2 * r + 1)) | 1, _mix64(word ^ (2 * r + 2))) for r in range(_ROUNDS)]
    # One key is cheapest as Python integers, which numpy wants back as arrays to wrap around without a warning.
    rounds = [(_words(a, dtype), _words(c, dtype)) for a, c in constants]
    limit = np.atleast_1d(domain).astype(np.uint64)
    words = np.broadcast_to(position, shape).astype(dtype).reshape(-1)

    def select(values: Words, where: Any) -> Words:
        return values.reshape(-1) if values.size == 1 else np.broadcast_to(values, shape).reshape(-1)[where]

    def transform(some: Words, where: Any) -> None:
        for start in range(0, len(some), _PIECE):
            piece = slice(start, start + _PIECE)
            index = piece if where is None else where[piece]
            chosen = [(select(a, index), select(c, index)) for a, c in rounds]
            one_pass(some[piece], chosen, select(mask, index), select(shift, index))

    transform(words, None)
    # A domain of one needs no walk, and would have the longest.
    bound = np.where(limit == 1, np.uint64(_MASK), limit)
    outside = np.flatnonzero(words >= select(bound, slice(None)))
    while len(outside):
        again = words[outside]
        transform(again, outside)
        words[outside] = again
        outside = outside[again >= select(bound, outside)]
    return np.minimum(words.astype(np.int64), select(limit, slice(None)).astype(np.int64) - 1).reshape(shape)


def _words(values: Any, dtype: Any) -> Words:
    return np.atleast_1d(np.asarray(values, np.uint64)).astype(dtype)


def _bit_length(values: NDArray[np.int64]) -> NDArray[np.int64]:
    if values.size == 1:
        return np.array([int(values.flat[0]).bit_length()]).reshape(values.shape)
    # A float64 rounds above 2^53, perhaps up to the next power of two: the high and the low half are exact.
    high, low = (values >> 32).astype(np.float64), (values & 0xFFFFFFFF).astype(np.float64)
    return np.where(high > 0, 32 + np.frexp(high)[1], np.frexp(low)[1]).astype(np.int64)
