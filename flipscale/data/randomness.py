"""Random numbers that are a pure function of (seed, purpose, position): crops, flips, masks and order.

Without a generator state, a position gets the same numbers in any process and worker, after a resume and in a second
pass. The mixer is SplitMix64's finaliser (Steele, Lea, Flood 2014) with a key for each purpose. It runs once over the
position and once over the index of the draw, for a whole batch at a time.
"""

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(bits: np.ndarray) -> np.ndarray:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def keyed_uniform(seed: int, purpose: str, positions: np.ndarray, count: int) -> np.ndarray:
    """Return `count` uniform numbers in [0, 1) for each of `positions`: float64 `(len(positions), count)`."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    key = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    rows = _mix(key + np.asarray(positions).astype(np.uint64) * _GOLDEN)
    bits = _mix(rows[:, None] + (np.arange(count, dtype=np.uint64) + np.uint64(1)) * _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def keyed_permutation(seed: int, purpose: str, key: int, count: int) -> np.ndarray:
    """Return a permutation of `range(count)`, int64, chosen by (seed, purpose, key)."""
    return np.argsort(keyed_uniform(seed, purpose, np.array([key]), count)[0], kind="stable")
