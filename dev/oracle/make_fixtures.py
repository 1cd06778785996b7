# make_fixtures.py: writes the reference numbers that the trainers' tests read.
#
#     python dev/oracle/make_fixtures.py [--out dev/test/fixtures] [--only NAME] [--float32]
#
# oracle_<name>.safetensors: three training steps from --init test. __metadata__.flags holds the
#     trainer's flags. tokens I32 (3, rows, T+1); loss, grad_norm F64 (3); of step 1: logits
#     (rows*T, V), grad.<name> (averaged over the step, before clipping) and terms.<name> F64 (per
#     element of a lambda the sum of |terms| of its gradient); updated.<name>: after step 3.
# optim_<name>.safetensors: three updates from given gradients, updated.<name> only. Gradient of
#     step s = 1, 2, 3 for the tensor with table index k: gradient_scale * normal, rounded to float,
#     Philox key {1000 + s, k}, purpose 5; 0 in padded rows and for the tensor zero_gradient.
# schedule.txt: "name arguments value" lines.
#
# Tensors of more than FULL elements are stored as their sketch, "sketch.<name>" F64 (67), unless
# the fixture is marked full; tensors are F32, rounded from F64, gradients of lambdas F64.
# --float32 writes nothing: it repeats every fixture in FP32 and prints how far that is from FP64.
import argparse
import math
import os

import numpy as np
import torch

import compare
import optim
import philox
import tensorfile
from model import (Config, FLAGS, LAMBDAS, has_vocabulary_rows, init_parameters, loss_and_gradients,
                   matrix_parameters, parameter_table, default_channels, scalar_terms)
from sketch import sketch

STEPS = 3
FULL = 1024

# Learning rates and decay as they act on a step (after all scaling, before the schedule): three
# updates then move every tensor by a few percent, so that an error in any term shows. The decay
# stays small: it is cautious, so rounding that flips the sign of one element of Muon's X switches
# that element's decay, which must not fail a tensor on its own.
ACTING = {"lr-matrix": 0.03, "lr-lm-head": 0.005, "lr-wte": 0.01, "lr-value-embed": 0.002,
          "lr-resid": 0.03, "lr-x0": 0.01, "lr-smear": 0.02, "wd-matrix": 0.05}
ACTING_WARMUP = {name: value * (1 if name == "wd-matrix" else 10) for name, value in ACTING.items()}
# Given gradients carry no noise, so larger steps are safe, and the small decays of AdamW show too.
ACTING_GIVEN = {**ACTING, "lr-lm-head": 0.1, "lr-wte": 0.4, "lr-value-embed": 0.1,
                "lr-resid": 0.1, "lr-x0": 0.1}


def with_rates(flags, acting):
    """Adds the --lr- and --wd- flags that come to the acting values at this width and batch."""
    unit = Config(flags + "".join(f" --{name} 1" for name in acting))
    groups = {g.lr_flag: name for name, g in optim.GROUPS.items()}
    groups["lr-matrix"] = "muon"
    for name, value in acting.items():
        scale = optim.muon_wd(unit) if name == "wd-matrix" else optim.group_lr(unit, groups[name])
        flags += f" --{name} {value / scale:.3g}"
    return flags


class Fixture:
    """One training case. narrow: step s draws only tokens below narrow[s] (0: all of them)."""

    def __init__(self, name, flags, full=False, narrow=(0, 0, 0), acting=ACTING):
        self.name, self.full, self.narrow = name, full, narrow
        self.flags = with_rates(f"{flags} --init test --steps {STEPS}", acting)
        self.config = Config(self.flags)
        assert self.config.batch >= self.config.C and self.config.batch % self.config.T == 0
        self.tokens = [self._draw(step) for step in range(STEPS)]

    def _draw(self, step):
        """(rows, T+1) int64. Documents of 1 token to half a row; odd rows start inside one."""
        config = self.config
        rows, width = config.rows, config.T + 1
        u = philox.uniform(config.flags["seed"], step, philox.FIXTURE_TOKENS, rows * width)
        below = self.narrow[step] or config.V
        tokens = np.floor(u * below).astype(np.int64).reshape(rows, width)
        tokens[tokens == config.bos] = (config.bos + 1) % below
        lengths = [3, 1, config.T // 5, config.T // 2, 7, config.T // 3 + 1]
        for row in range(rows):
            turn = row + 2 * step
            at = 0 if row % 2 == 0 else lengths[(turn + 2) % 6] - 1
            while at < width:
                tokens[row, at] = config.bos
                at += lengths[turn % 6]
                turn += 1
        return torch.from_numpy(tokens)


def fixtures():
    return [
        Fixture("depth1", "--depth 1 --channels 64 --heads 2 --vocab 257 --seq-len 64 "
                "--batch-tokens 256 --micro-batch 4 --warmup 2 --seed 7", full=True),
        Fixture("odd_d128", "--depth 3 --channels 128 --heads 1 --vocab 300 --bos 5 --seq-len 128 "
                "--batch-tokens 384 --micro-batch 3 --warmup 1 --seed 11"),
        Fixture("window", "--depth 4 --channels 64 --heads 2 --vocab 257 --seq-len 384 "
                "--doc-mask 0 --batch-tokens 768 --micro-batch 2 --warmup 2 --seed 13"),
        Fixture("window_docs", "--depth 4 --channels 64 --heads 2 --vocab 257 --seq-len 384 "
                "--doc-mask 1 --window-short 128 --batch-tokens 768 --micro-batch 2 --warmup 2 "
                "--seed 67"),
        Fixture("micro_steps", "--depth 2 --channels 48 --heads 3 --vocab 300 --seq-len 48 "
                "--batch-tokens 192 --micro-batch 2 --warmup 1 --window-pattern L --seed 19",
                full=True),
        Fixture("clip", "--depth 3 --channels 64 --heads 4 --vocab 257 --seq-len 64 "
                "--batch-tokens 256 --micro-batch 2 --warmup 0 --grad-clip 0.1 --seed 23",
                narrow=(0, 24, 96)),
        Fixture("tall_gate", "--depth 4 --channels 128 --heads 16 --vocab 270 --seq-len 80 "
                "--batch-tokens 480 --micro-batch 3 --warmup 2 --window-pattern LSS "
                "--window-short 17 --seed 71"),
        Fixture("ragged_docs", "--depth 5 --channels 48 --heads 3 --vocab 290 --bos 0 --seq-len 97 "
                "--doc-mask 1 --window-short 40 --batch-tokens 291 --micro-batch 1 --warmup 40 "
                "--seed 31", acting=ACTING_WARMUP),
        # With D = 2 many a head's q or k is nearly 0, so that the epsilon of N shows.
        Fixture("heads_of_two", "--depth 2 --channels 48 --heads 24 --vocab 140 --seq-len 64 "
                "--doc-mask 1 --batch-tokens 256 --micro-batch 2 --warmup 2 --seed 101"),
    ]


class GivenGradients:
    """One optimizer case. zero: the tensor whose gradient is 0."""

    def __init__(self, name, flags, scale, zero):
        self.name, self.scale, self.zero = name, scale, zero
        self.flags = with_rates(f"{flags} --init test --steps {STEPS}", ACTING_GIVEN)
        self.config = Config(self.flags)

    def gradients(self, step):
        """{name: float64 tensor} of step 1, 2, 3."""
        result = {}
        for k, row in enumerate(parameter_table(self.config)):
            z = philox.normal(1000 + step, k, philox.GIVEN_GRADIENT, math.prod(row.shape))
            g = (self.scale * z).astype(np.float32).astype(np.float64).reshape(row.shape)
            if has_vocabulary_rows(row.name):
                g[self.config.V:] = 0
            if row.name == self.zero or (row.name == "backout_lambda" and self.config.L < 3):
                g[:] = 0
            result[row.name] = torch.from_numpy(g)
        return result


def given_gradients():
    shape = "--seq-len 64 --batch-tokens 256 --micro-batch 4"
    return [
        GivenGradients("plain", "--depth 3 --channels 64 --heads 2 --vocab 257 "
                       f"{shape} --warmup 2 --seed 37", 1e-3, "layers.1.wfc"),
        GivenGradients("gates", "--depth 2 --channels 96 --heads 16 --vocab 140 "
                       f"{shape} --warmup 1 --seed 41", 1e-3, "layers.0.wq"),
        GivenGradients("square_gate", "--depth 1 --channels 96 --heads 12 --vocab 140 "
                       f"{shape} --warmup 0 --seed 43", 1e-3, "layers.0.ve_gate"),
        # So small that every epsilon of AdamW and Muon weighs in.
        GivenGradients("tiny", "--depth 3 --channels 64 --heads 2 --vocab 257 "
                       f"{shape} --warmup 2 --seed 47", 1e-8, "layers.2.wproj"),
    ]


def train(fixture, dtype=torch.float64, noise=0.0):
    """{name: tensor} of the whole fixture: what the file holds, before rounding and sketching.

    noise: added to every gradient, as a part of the root mean square of its row."""
    config = fixture.config
    p = {name: x.to(dtype) for name, x in init_parameters(config).items()}
    optimizer = optim.Optimizer(config, p)
    result, losses, norms = {}, [], []
    for it, tokens in enumerate(fixture.tokens):
        loss, logits, gradients = loss_and_gradients(config, p, tokens)
        if it == 0:
            result["logits"] = logits.flatten(0, 1)
            result |= {f"grad.{name}": g for name, g in gradients.items()}
            if dtype == torch.float64:
                terms = scalar_terms(config, p, tokens)
                result |= {f"terms.{name}": x for name, x in terms.items()}
        if noise:
            for g in gradients.values():
                row = g.square().mean(-1, keepdim=True).sqrt()
                g += noise * row * torch.randn_like(g) * (g != 0)
        gradients, norm = optim.clip(gradients, config.flags["grad-clip"])
        optimizer.step(gradients, it)
        losses.append(loss)
        norms.append(norm)
    result |= {f"updated.{name}": x for name, x in p.items()}
    result["loss"] = torch.tensor(losses, dtype=torch.float64)
    result["grad_norm"] = torch.tensor(norms, dtype=torch.float64)
    return result


def update(case, dtype=torch.float64):
    """{updated.<name>: tensor} of an optimizer case."""
    p = {name: x.to(dtype) for name, x in init_parameters(case.config).items()}
    optimizer = optim.Optimizer(case.config, p)
    for it in range(STEPS):
        optimizer.step({name: g.to(dtype) for name, g in case.gradients(it + 1).items()}, it)
    return {f"updated.{name}": x for name, x in p.items()}


def stored(result, full):
    """As numpy arrays under the names of the file: large ones sketched, most of the rest in F32."""
    arrays = {}
    for name, x in result.items():
        x = x.numpy()
        exact = name in ("loss", "grad_norm") or name.startswith("terms.")
        exact = exact or name.removeprefix("grad.") in LAMBDAS
        if x.size > FULL and not full:
            arrays[f"sketch.{name}"] = sketch(x)
        else:
            arrays[name] = x if exact else x.astype(np.float32)
    return arrays


def schedule_lines():
    """Yields "name arguments value": what one header computes from (it, n) and from sizes alone."""
    yield "# lr_multiplier it n warmup | muon_momentum it n | muon_decay it n"
    for n, warmup in ((1, 0), (1, 40), (2, 1), (3, 2), (3, 40), (10, 0), (10, 3), (30, 5),
                      (50, 40), (70, 0), (100, 40), (120, 60), (1000, 40), (2205, 40),
                      (10000, 250)):
        d = optim.cooldown_steps(n)
        marks = {0, 1, 2, 39, 40, 41, 399, 400, 401, n // 4, n // 2, n - d - 1, n - d, n - d + 1,
                 n - 2, n - 1}
        for it in sorted(x for x in marks if 0 <= x < n):
            yield f"lr_multiplier {it} {n} {warmup} {optim.lr_multiplier(it, n, warmup):.17g}"
            yield f"muon_momentum {it} {n} {optim.muon_momentum(it, n):.17g}"
            yield f"muon_decay {it} {n} {optim.muon_decay(it, n):.17g}"
    yield ("# depth vocab, all else by default (T = 2048, ratio 10): matrix_parameters is P, "
           "horizon is Z")
    yield "# batch: the default; steps: with it; muon_wd: before its schedule; group_lr_<flag>: too"
    for depth in (1, 2, 3, 4, 5, 8, 11, 12, 13, 16, 20, 24, 26, 32):
        for vocab in (257, 50257):
            c = Config({**FLAGS, "depth": depth, "vocab": vocab})
            for name, value in (
                    ("channels", c.C), ("matrix_parameters", c.P), ("horizon", c.Z),
                    ("batch", c.batch), ("steps", c.steps), ("flops_per_token", c.flops_per_token),
                    ("muon_wd", optim.muon_wd(c)), ("lr_lm_head", optim.group_lr(c, "lm_head")),
                    ("lr_matrix", optim.group_lr(c, "muon")),
                    ("lr_smear", optim.group_lr(c, "smear"))):
                yield f"{name} {depth} {vocab} {value:.17g}"
    yield "# window_short T: the default"
    for T in (1, 64, 128, 256, 384, 511, 512, 513, 515, 1024, 2048, 4096):
        yield f"window_short {T} {Config({**FLAGS, 'depth': 2, 'seq-len': T}).windows[0]}"
    yield "# steps_of_ratio depth vocab ratio batch | steps_of_tokens tokens batch"
    for depth, vocab, ratio, batch in ((4, 50257, 10.0, 8192), (12, 50257, 10.5, 524288),
                                       (2, 257, 0.37, 4096)):
        c = Config({**FLAGS, "depth": depth, "vocab": vocab, "ratio": ratio, "batch-tokens": batch})
        yield f"steps_of_ratio {depth} {vocab} {ratio} {batch} {c.steps}"
    for tokens, batch in ((1000000, 8192), (8191, 8192), (8192, 8192)):
        yield f"steps_of_tokens {tokens} {batch} {tokens // batch}"


def describe(fixture, result):
    norms = ", ".join(f"{x:.4f}" for x in result["grad_norm"].tolist())
    losses = ", ".join(f"{x:.4f}" for x in result["loss"].tolist())
    start = init_parameters(fixture.config)
    moved = {name: ((result[f"updated.{name}"] - x).norm() / x.norm().clamp_min(1e-30)).item()
             for name, x in start.items()}
    low, high = min(moved, key=moved.get), max(moved, key=moved.get)
    print(f"{fixture.name}: loss {losses}; gradient norm {norms}; "
          f"moved {moved[low]:.3f} ({low}) .. {moved[high]:.3f} ({high})")


def float32_report():
    """How near can FP32 come? The same formulas in FP32 against FP64: each case's worst tensors."""
    for case in fixtures() + given_gradients():
        run = train if isinstance(case, Fixture) else update
        reference, found = run(case), run(case, torch.float32)
        rows = [compare.compare(name, x.numpy(), reference[name].numpy(),
                                compare.tolerance_of(name),
                                reference.get(f"terms.{name.removeprefix('grad.')}"))
                for name, x in found.items()]
        for kind in ("logits", "grad.", "updated.", "loss", "grad_norm"):
            of_kind = [row for row in rows if row.name.startswith(kind)]
            if of_kind:
                worst = max(of_kind, key=lambda row: row.ratio)
                print(f"{case.name:12} {worst.name:28} relative {worst.relative:.2e}  "
                      f"of tolerance {worst.ratio:.3f}")


def main():
    parser = argparse.ArgumentParser()
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    parser.add_argument("--out", default=os.path.join(root, "dev/test/fixtures"))
    parser.add_argument("--only", default="")
    parser.add_argument("--float32", action="store_true")
    args = parser.parse_args()
    if args.float32:
        return float32_report()
    os.makedirs(args.out, exist_ok=True)
    for fixture in fixtures():
        if args.only in ("", fixture.name):
            result = train(fixture)
            describe(fixture, result)
            tokens = {"tokens": torch.stack(fixture.tokens).to(torch.int32).numpy()}
            tensorfile.write(os.path.join(args.out, f"oracle_{fixture.name}.safetensors"),
                             tokens | stored(result, fixture.full), {"flags": fixture.flags})
    for case in given_gradients():
        if args.only in ("", case.name):
            metadata = {"flags": case.flags, "zero_gradient": case.zero,
                        "gradient_scale": f"{case.scale:g}"}
            tensorfile.write(os.path.join(args.out, f"optim_{case.name}.safetensors"),
                             stored(update(case), False), metadata)
    with open(os.path.join(args.out, "schedule.txt"), "w") as f:
        f.write("\n".join(schedule_lines()) + "\n")


if __name__ == "__main__":
    main()
