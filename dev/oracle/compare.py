# compare.py: the rule by which two implementations agree, tensor by tensor.
#
#     ||a - b|| <= tolerance * ||b|| + 1e-8 * sqrt(numel)         b is the reference
#     |a - b| <= tolerance * sum of |terms|, per element           for the gradient of a lambda
#     what is exactly 0 in the reference must be exactly 0
#
# Tolerances: logits and loss 1e-5, gradients and updated parameters 1e-4, initial parameters 1e-6.
from collections import namedtuple

import numpy as np

# ratio: the error as a part of what is allowed; above 1, or infinite for a broken zero, it fails.
Row = namedtuple("Row", "name shape norm error relative ratio")


def tolerance_of(name):
    if name.startswith("param."):
        return 1e-6
    return 1e-5 if name in ("logits", "loss") else 1e-4


def compare(name, a, b, tolerance, terms=None):
    """a: the tensor in question, b: the reference, of one shape. terms: of a lambda's gradient."""
    if a.shape != b.shape:
        raise SystemExit(f"{name}: found shape {a.shape}, expected {b.shape}")
    a, b = a.astype(np.float64), b.astype(np.float64)
    norm, error = float(np.linalg.norm(b)), float(np.linalg.norm(a - b))
    if terms is not None:
        allowed = tolerance * np.asarray(terms, dtype=np.float64)
        parts = np.abs(a - b) / np.where(allowed > 0, allowed, 1)
        ratio = float(parts.max())
    else:
        ratio = error / (tolerance * norm + 1e-8 * np.sqrt(b.size))
    if not np.isfinite(error) or np.any(a[b == 0] != 0):
        ratio = np.inf
    return Row(name, a.shape, norm, error, error / norm if norm else 0.0, ratio)


def compare_sketch(name, a, b, tolerance, numel):
    """The same from two sketches: the distance is an estimate, zeros are counted."""
    from sketch import distance
    error = distance(a, b)
    ratio = error / (tolerance * b[0] + 1e-8 * np.sqrt(numel))
    if not np.isfinite(error) or a[2] > b[2]:
        ratio = np.inf
    return Row(name, (numel,), float(b[0]), error, error / b[0] if b[0] else 0.0, float(ratio))
