# tensorfile.py: writes and reads safetensors files.
#
# The file: 8 bytes N (little-endian), N bytes of JSON header padded with spaces, then the tensors'
# bytes. The library safetensors reads it; we write it ourselves because that library puts metadata
# in a different order from run to run, and fixtures must come out the same, bit for bit.
import json

import numpy as np
from safetensors import safe_open

DTYPES = {"<f4": "F32", "<f8": "F64", "<i4": "I32"}


def write(path, tensors, metadata):
    """tensors: {name: numpy array of float32, float64 or int32}; metadata: {text: text}."""
    header, at = {"__metadata__": metadata}, 0
    arrays = [np.ascontiguousarray(x) for x in tensors.values()]
    for name, x in zip(tensors, arrays):
        header[name] = {"dtype": DTYPES[x.dtype.str], "shape": list(x.shape),
                        "data_offsets": [at, at + x.nbytes]}
        at += x.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for x in arrays:
            f.write(x.tobytes())


def read(path):
    """-> {name: numpy array}, metadata"""
    with safe_open(path, "numpy") as f:
        return {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}
