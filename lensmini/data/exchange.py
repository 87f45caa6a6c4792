"""Slots that longest processing time first left uneven, evened out by exchanging samples.

Axes: n samples of a step, s slots. The first dealing is off by up to the smallest sample; two samples of nearly the same size
that change places move a little of the difference, and there are many such pairs.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["even_out"]

# An exchange that takes less than this share of a mean slot off the most expensive one is not worth the time.
_FINE = 1e-3
# How many of the cheapest slots are tried, and exchanges per slot.
_PARTNERS, _ROUNDS = 4, 4


def even_out(
    order: NDArray[np.int64],
    offsets: NDArray[np.int64],
    tokens: NDArray[np.int64],
    costs: NDArray[np.float64],
    max_tokens: int | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Exchange samples between the most expensive slot and the cheapest ones while that gains something.

    One sample goes over, against one or none in return, so that the more expensive of the two slots becomes as cheap
    as one exchange can make it. The largest cost of all slots never grows, a cap that was kept is kept, and no slot
    becomes empty. It ends when no exchange with one of the four cheapest slots takes a thousandth of a mean slot off,
    or after four exchanges a slot.

    Args:
        order: ``[n]`` samples' positions, slot after slot, as ``assign_slots`` returns them.
        offsets: ``[s + 1]`` where each slot begins.
        tokens: ``[n]`` tokens of each sample, by position.
        costs: ``[n]`` what is to be balanced, likewise; positive.
        max_tokens: most tokens of one slot; none by default.

    Returns:
        Order and offsets of the same samples, evened out.

    Example:
        >>> costs = np.array([6.0, 5.0, 4.0, 3.0, 2.0, 2.0])
        >>> order, offsets = even_out(np.array([0, 1, 2, 3, 4, 5]), np.array([0, 3, 6]), costs.astype(int), costs)
        >>> [float(costs[slot].sum()) for slot in np.split(order, offsets[1:-1])]
        [11.0, 11.0]
    """
    slots = np.split(order, offsets[1:-1])
    loads, held = (np.array([values[slot].sum() for slot in slots]) for values in (costs, tokens))
    fine = _FINE * loads.mean()
    rounds = _ROUNDS * len(slots) if len(slots) > 1 and len(order) else 0
    for _ in range(rounds):
        heavy = int(loads.argmax())
        for light in np.argsort(loads, kind="stable")[:_PARTNERS].tolist():
            first, second = slots[heavy], slots[light]
            # The last column is nothing in return.
            cost = costs[first][:, None] - np.append(costs[second], 0.0)
            size = tokens[first][:, None] - np.append(tokens[second], 0)
            gain = np.minimum(cost, loads[heavy] - loads[light] - cost)
            if max_tokens is not None:
                gain[(held[light] + size > max_tokens) | (held[heavy] - size > max_tokens)] = 0
            given, taken = divmod(int(gain.argmax()), len(second) + 1)
            if gain[given, taken] > fine:
                slots[heavy] = np.append(np.delete(first, given), second[taken : taken + 1])
                slots[light] = np.append(np.delete(second, slice(taken, taken + 1)), first[given])
                for values, moved in ((loads, cost), (held, size)):
                    values[heavy] -= moved[given, taken]
                    values[light] += moved[given, taken]
                break
        else:
            break
    return np.concatenate(slots), np.cumsum([0, *map(len, slots)])
