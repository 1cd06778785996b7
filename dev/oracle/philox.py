# philox.py: random numbers that are a pure function of (seed, stream, purpose, element).
#
# Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in numpy, with
# the coordinates that llmc/rand.h documents:
#
#     key     = { seed, stream }
#     counter = { low half of element/4, high half of element/4, purpose, 0 }
#     word of element e = output[e % 4]
#
# uniform in [0, 1):  (word >> 8) * 2^-24
# normal:             Box-Muller on the words (0, 1) for elements 4j, 4j+1 and (2, 3) for 4j+2, 4j+3
import numpy as np

PARAMETER, SHUFFLE, SAMPLE, SKETCH, SPLIT = range(5)  # purposes, as in llmc/rand.h
GIVEN_GRADIENT, FIXTURE_TOKENS = 5, 6  # purposes of the fixtures only


def rounds(counter, key):
    """counter: four arrays of 32-bit words, key: two words -> four uint32 arrays (ten rounds)."""
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in counter)
    k0, k1 = int(key[0]), int(key[1])
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c2 = (p1 >> shift) ^ c1 ^ np.uint64(k0), (p0 >> shift) ^ c3 ^ np.uint64(k1)
        c1, c3 = p1 & low, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [np.asarray(c).astype(np.uint32) for c in (c0, c1, c2, c3)]


def words(seed, stream, purpose, first, count):
    """The words of blocks first .. first+count-1: uint32 (count, 4)."""
    block = np.arange(first, first + count, dtype=np.uint64)
    zero = np.zeros_like(block)
    low, high = block & np.uint64(0xFFFFFFFF), block >> np.uint64(32)
    counter = (low, high, zero + np.uint64(purpose), zero)
    return np.stack(rounds(counter, (seed & 0xFFFFFFFF, stream)), axis=1)


def uniform(seed, stream, purpose, count):
    """Elements 0 .. count-1, uniform in [0, 1): float64 (count)."""
    w = words(seed, stream, purpose, 0, (count + 3) // 4)
    return (w >> np.uint32(8)).reshape(-1)[:count] * 2.0**-24


def normal(seed, stream, purpose, count):
    """Elements 0 .. count-1, standard normal: float64 (count)."""
    w = words(seed, stream, purpose, 0, (count + 3) // 4) >> np.uint32(8)
    w = w.astype(np.float64).reshape(-1, 2)
    radius = np.sqrt(-2.0 * np.log((w[:, 0] + 1) * 2.0**-24))
    angle = 2.0 * np.pi * (w[:, 1] * 2.0**-24)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)[:count]
