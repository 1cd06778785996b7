# check_dump.py: checks one training step of a trainer against the oracle.
#
#     train_gpt2 ... --dump FILE
#     python dev/oracle/check_dump.py FILE [--flags "..."]
#
# FILE holds tokens, targets I32 (rows, T); param.<name>, grad.<name>, updated.<name>; logits
# (rows*T, V); loss and grad_norm. All that follows from the parameters and tokens is computed again
# in FP64 and compared by the rule of compare.py; at step 0 the parameters are held against --init
# and --seed. Large tensors may be sketches ("sketch.<name>"); parameters
# are then made from the flags. The flags come from the file's __metadata__, or from --flags.
#
# The table shows the worst tensor first: "of allowed" is the error as a part of what the rule
# allows, and infinite where something that should be exactly 0 is not. Exit code 1 if any is above
# 1 or missing.
# Time and memory: FP64 on one thread, so for models of up to some ten million parameters.
import argparse
import sys

import numpy as np
import torch

import compare
import optim
import tensorfile
from model import (
    Config, init_parameters, loss_and_gradients, parameter_table, parse_flags, scalar_terms)
from sketch import SIZE, sketch


def read_config(file, metadata, flags):
    text = metadata.get("flags") or flags
    if text is None:
        raise SystemExit("no flags in the file's __metadata__: give --flags '--depth ...'")
    values = parse_flags(text, ignore_unknown=True)
    rows, values["seq-len"] = file["tokens"].shape
    values["batch-tokens"] = rows * values["seq-len"]
    if not values["vocab"] and "logits" in file:  # it came from a tokenizer
        values["vocab"] = file["logits"].shape[1]
    return Config(values)


def read_parameters(config, file, it):
    """The dump's own, or with --dump-sketch those of the flags."""
    p = init_parameters(config)
    for row in parameter_table(config):
        stored = file.get(f"param.{row.name}")
        if stored is None and f"sketch.param.{row.name}" not in file:
            raise SystemExit(f"param.{row.name}: not in the file; are the flags those of the dump?")
        if stored is None and it:
            raise SystemExit(f"a sketched dump of step {it}: its parameters are not known; "
                             "dump without --dump-sketch")
        if stored is not None:
            if stored.shape != row.shape:
                raise SystemExit(f"param.{row.name}: found shape {stored.shape}, "
                                 f"expected {row.shape}")
            p[row.name] = torch.from_numpy(stored.astype(np.float64))
    return p


def recompute(config, p, tokens, it):
    """{name: array} of all that a dump should hold, and the lambdas' {grad.<name>: terms}."""
    loss, logits, gradients = loss_and_gradients(config, p, tokens)
    expected = {"logits": logits.flatten(0, 1)}
    expected |= {f"grad.{name}": g for name, g in gradients.items()}
    terms = {f"grad.{name}": x.numpy() for name, x in scalar_terms(config, p, tokens).items()}
    clipped, norm = optim.clip(gradients, config.flags["grad-clip"])
    if it == 0:  # later, parameters and updates depend on the steps before, which a dump lacks
        optim.Optimizer(config, p).step(clipped, it)
        expected |= {f"updated.{name}": x for name, x in p.items()}
        expected |= {f"param.{name}": x for name, x in init_parameters(config).items()}
    expected |= {"loss": torch.tensor([loss]), "grad_norm": torch.tensor([norm])}
    return {name: x.numpy() for name, x in expected.items()}, terms


def compare_all(file, expected, terms):
    """-> rows of compare.py, and the names that the file should hold but does not."""
    rows, missing = [], []
    for name, reference in expected.items():
        tolerance = compare.tolerance_of(name)
        if name in file:
            rows.append(compare.compare(name, file[name], reference, tolerance, terms.get(name)))
        elif f"sketch.{name}" in file:
            found = file[f"sketch.{name}"].reshape(SIZE)
            rows.append(compare.compare_sketch(name, found, sketch(reference), tolerance,
                                               reference.size))
        else:
            missing.append(name)
    return sorted(rows, key=lambda row: -row.ratio), missing


def check(path, flags=None):
    """-> rows, worst first, missing names, and the dump's step."""
    file, metadata = tensorfile.read(path)
    config = read_config(file, metadata, flags)
    it = int(metadata.get("step", 0))
    p = read_parameters(config, file, it)
    if not np.array_equal(file["tokens"][:, 1:], file["targets"][:, :-1]):
        raise SystemExit("targets: expected the tokens moved by one position")
    tokens = np.concatenate([file["tokens"], file["targets"][:, -1:]], axis=1)
    tokens = torch.from_numpy(tokens.astype(np.int64))
    expected, terms = recompute(config, p, tokens, it)
    return *compare_all(file, expected, terms), it


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("dump")
    parser.add_argument("--flags", help="the trainer's flags, where the file does not hold them")
    args = parser.parse_args()
    rows, missing, it = check(args.dump, args.flags)
    print(f"{'tensor':32} {'shape':>14} {'norm':>11} {'error':>11} {'relative':>8} of allowed")
    for row in rows:
        shape = "x".join(map(str, row.shape))
        print(f"{row.name:32} {shape:>14} {row.norm:11.4e} {row.error:11.4e} {row.relative:8.1e} "
              f"{row.ratio:10.4f}")
    failed = sum(not row.ratio <= 1 for row in rows)
    print(f"{len(rows)} tensors compared, {failed} failed, {len(missing)} missing", *missing)
    if it:
        print(f"step {it}: param and updated were not compared; they follow from the steps before")
    sys.exit(1 if failed or missing else 0)


if __name__ == "__main__":
    main()
