# test_oracle.py: the oracle held against what it cannot get from itself: published vectors, finite
# differences, invariances of the model, and hand-worked updates.
#
#     python dev/oracle/test_oracle.py
import math
import os
import tempfile

import numpy as np
import torch

import check_dump
import compare
import make_fixtures
import optim
import philox
import tensorfile
from model import (
    Config, LAMBDAS, forward, init_parameters, loss_and_gradients, loss_of, parameter_table, rope,
    scalar_terms)
from sketch import distance, sketch


SMALL = ("--depth 4 --channels 48 --heads 2 --vocab 50 --bos 3 --seq-len 24 --window-short 5 "
         "--batch-tokens 72 --init test --seed 5 --steps 3")


def float64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def small(flags=""):
    """A config with every part of the model in it, its parameters and one batch of tokens."""
    config = Config(f"{SMALL} {flags}")
    u = philox.uniform(9, 0, philox.FIXTURE_TOKENS, 3 * 25).reshape(3, 25)
    tokens = torch.from_numpy(np.floor(u * config.V).astype(np.int64))
    tokens[0, 0] = tokens[0, 9] = tokens[1, 4] = tokens[1, 5] = tokens[2, 24] = config.bos
    return config, init_parameters(config), tokens


def test_philox_known_answers():
    """Random123's kat_vectors for philox4x32 with 10 rounds."""
    ones = 0xFFFFFFFF
    for counter, key, expected in (
            ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
            ([ones] * 4, (ones, ones), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
            ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], (0xA4093822, 0x299F31D0),
             "d16cfe09 94fdcceb 5001e420 24126ea1")):
        found = philox.rounds([[c] for c in counter], key)
        assert " ".join(f"{int(w[0]):08x}" for w in found) == expected


def test_philox_distributions():
    u, z = philox.uniform(1, 2, 0, 100001), philox.normal(1, 2, 0, 100001)
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.005
    assert abs(z.mean()) < 0.01 and abs(z.std() - 1) < 0.01 and abs((z**4).mean() - 3) < 0.1
    assert np.array_equal(philox.normal(1, 2, 0, 6), z[:6])


def test_parameters():
    config = Config("--depth 1 --channels 64 --vocab 257")
    names = [row.name for row in parameter_table(config)]
    assert names == (
        "wte smear_gate smear_lambda layers.0.wq layers.0.wk layers.0.wv layers.0.wo layers.0.wfc "
        "layers.0.wproj layers.0.ve_gate layers.0.value_embed resid_lambda x0_lambda "
        "backout_lambda lm_head").split()
    p = init_parameters(config)
    assert p["wte"].shape == (384, 64) and not p["wte"][257:].any() and p["wte"][:257].all()
    assert not p["layers.0.wo"].any() and p["resid_lambda"].item() == np.float32(1.15)
    assert p["backout_lambda"].item() == 0
    deep = init_parameters(Config("--depth 12"))
    assert sum(x.numel() for name, x in deep.items() if ".w" in name) == 12 * 12 * 768**2
    assert np.allclose(deep["x0_lambda"].numpy()[[0, 11]], [0.20, 0.05], atol=1e-7)
    assert [Config("--depth %d" % d).C for d in (1, 2, 3, 12, 13)] == [128, 128, 256, 768, 896]
    assert Config("--depth 5 --seq-len 2048").windows == [512, 512, 512, 2048, 2048]
    has = [Config("--depth 12").has_value_embed(i) for i in (0, 1, 10, 11)]
    assert has == [False, True, False, True]


def test_default_init_is_silent():
    """wo = wproj = 0: most gradients are exactly 0. lm_head is small: the loss is ln V, nearly."""
    config, _, tokens = small("--init default")
    loss, _, g = loss_and_gradients(config, init_parameters(config), tokens)
    assert abs(loss - math.log(config.V)) < 1e-2
    for name, x in g.items():
        silent = name.split(".")[-1] in (
            "wq", "wk", "wv", "wfc", "value_embed", "ve_gate", "smear_gate")
        assert bool(x.any()) != silent, name


def test_finite_differences():
    """Central differences of the loss at the largest and two other elements of every parameter."""
    for flags in ("--doc-mask 0", "--doc-mask 1", "--depth 1", "--depth 3 --doc-mask 1"):
        config, p, tokens = small(flags)
        _, _, g = loss_and_gradients(config, p, tokens)
        loss = lambda: loss_of(forward(config, p, tokens[:, :-1]), tokens[:, 1:]).item()
        for name, x in p.items():
            flat, gradient = x.view(-1), g[name].view(-1)
            if name == "backout_lambda" and config.L < 3:
                assert not gradient.any()
                continue
            picks = {gradient.abs().argmax().item(), 0, flat.numel() // 3}
            for e in picks:
                keep, h = flat[e].item(), 1e-5
                flat[e] = keep + h
                above = loss()
                flat[e] = keep - h
                below = loss()
                flat[e] = keep
                difference = (above - below) / (2 * h)
                error = abs(difference - gradient[e].item())
                assert error < 1e-5 * gradient.abs().max().item() + 1e-10, (flags, name, e)


def test_terms_add_up():
    """The sums of |terms|: above |gradient|, and equal where two lambdas multiply the same x."""
    config, p, tokens = small()
    _, _, g = loss_and_gradients(config, p, tokens)
    terms = scalar_terms(config, p, tokens)
    for name in LAMBDAS:
        assert terms[name].shape == g[name].shape
        assert (terms[name] > g[name].abs()).all(), name  # more, as terms of both signs occur
    # Layer 0 multiplies x = x0 by both lambdas: their gradients and terms are the same.
    assert torch.allclose(terms["resid_lambda"][0], terms["x0_lambda"][0], rtol=1e-12)
    assert torch.allclose(g["resid_lambda"][0], g["x0_lambda"][0], rtol=1e-9)


def test_causal():
    config, p, tokens = small()
    idx = tokens[:, :-1]
    changed = idx.clone()
    changed[:, 13] = (changed[:, 13] + 1) % config.V
    a, b = forward(config, p, idx), forward(config, p, changed)
    assert torch.equal(a[:, :13], b[:, :13]) and (a[:, 13:] != b[:, 13:]).any(-1).all()


def test_documents_do_not_see_each_other():
    """With --doc-mask 1 a change before a BOS is not felt from the BOS on; without, it is."""
    for doc_mask in (0, 1):
        config, p, tokens = small(f"--doc-mask {doc_mask}")
        idx = tokens[:1, :-1].clone()  # BOS at 0 and 9
        changed = idx.clone()
        changed[0, 8] = (changed[0, 8] + 1) % config.V
        a, b = forward(config, p, idx), forward(config, p, changed)
        assert torch.equal(a[:, :8], b[:, :8])
        assert torch.equal(a[:, 9:], b[:, 9:]) == bool(doc_mask)


def test_window_edge():
    """One short layer and no smear: query t feels key t - W and not key t - W - 1."""
    config, p, tokens = small("--depth 2 --window-pattern S --window-short 5")
    config.windows = [5, 0]  # the second layer sees only the query itself
    p["smear_lambda"].zero_()
    idx = tokens[:, :-1]
    changed = idx.clone()
    changed[:, 10] = (changed[:, 10] + 1) % config.V
    differs = (forward(config, p, idx) != forward(config, p, changed)).any(-1)
    assert differs[:, 10:16].all() and not differs[:, 16:].any() and not differs[:, :10].any()


def test_rope_is_relative():
    """q . k depends on the distance d only, and pair j turns by d * base^(-2j/D)."""
    D = 8
    q, k = torch.randn(2, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    turned = lambda x: rope(x.expand(1, 20, 1, D))[0, :, 0]
    products = turned(q) @ turned(k).T
    assert torch.allclose(products.diagonal(3), products.diagonal(3)[0].expand(17), atol=1e-6)
    unit = torch.zeros(D, dtype=torch.float64)
    unit[1] = 1.0  # pair j = 1: dims 1 and 5
    y = turned(unit)[7]
    angle = 7 * 100000 ** (-2 / D)
    assert abs(y[1] - math.cos(angle)) < 1e-7 and abs(y[5] + math.sin(angle)) < 1e-7


def test_schedules():
    assert [optim.cooldown_steps(n) for n in (10, 30, 50, 3, 1)] == [6, 20, 32, 2, 1]
    assert [optim.lr_multiplier(it, 3, 2) for it in range(3)] == [0.5, 1.0, 0.525]
    late = [optim.lr_multiplier(it, 3, 40) for it in range(3)]
    assert late == [1 / 40, 2 / 40, 3 / 40]  # warmup goes before the decay
    assert optim.lr_multiplier(350, 1000, 40) == 1.0 and optim.lr_multiplier(351, 1000, 40) < 1.0
    assert abs(optim.lr_multiplier(999, 1000, 40) - 0.05) < 0.002
    assert optim.muon_momentum(0, 2000) == 0.85 and optim.muon_momentum(400, 2000) == 0.97
    assert abs(optim.muon_momentum(2000, 2000) - 0.90) < 1e-12
    assert optim.muon_decay(0, 10) == 1 and abs(optim.muon_decay(5, 10) - 0.5) < 1e-12
    depth12 = Config("--depth 12")
    assert depth12.batch == 2**19 and abs(optim.muon_wd(depth12) - 0.28) < 1e-12
    assert depth12.P == 12 * 12 * 768**2 + 50257 * 768


def test_adamw_first_step():
    """At t = 1 the corrected m is g and v is g^2: the step is lr * sign(g), nearly."""
    p, g = float64(2.0, -1.0, 0.5), float64(3.0, -0.1, 0.0)
    optim.adamw(p, g, {}, 1, 0.1, optim.GROUPS["lm_head"])
    assert torch.allclose(p, float64(2 * 0.999 - 0.1, -0.999 + 0.1, 0.4995), atol=1e-8)


def test_muon_steps():
    generator = torch.Generator().manual_seed(2)
    for R, K in ((7, 7), (20, 6), (6, 20)):
        X = torch.randn(R, K, dtype=torch.float64, generator=generator)
        rows = optim.even_rows(X)
        assert torch.allclose(rows.norm(dim=1), (X.norm() / math.sqrt(R)).expand(R))
        U, S, Vt = torch.linalg.svd(rows, full_matrices=False)
        polar = optim.polar_express(rows)
        s = S / (1.01 * rows.norm() + 1e-6)
        for a, b, c in optim.POLAR_EXPRESS:
            s = a * s + b * s**3 + c * s**5
        assert torch.allclose(polar, U @ torch.diag(s) @ Vt, atol=1e-10)
        restored = optim.restore_norm(polar)
        assert abs(restored.norm() - math.sqrt(min(R, K))) < 1e-12
        state = {}
        out = optim.normuon(restored, state)
        assert abs(out.norm() - restored.norm()) < 1e-12
        assert state["s"].shape == ((R, 1) if R >= K else (1, K))
        even = (out * out).mean(dim=1 if R >= K else 0)  # from s = 0 the first step evens out fully
        assert torch.allclose(even, even.mean().expand(len(even)))


def test_muon_by_hand():
    """One row: it is even, and its polar factor is the row over its norm."""
    w = float64([1.0, -2.0])
    optim.muon(w, float64([3.0, 4.0]), {}, 0.1, 0.85, 0.5)
    # X = (0.6, 0.8) after step 4; step 5 (R < K) makes both columns equal at the same norm, so they
    # are sqrt(1/2); w[0] has X's sign and decays by 0.1 * 0.5 of itself, w[1] does not.
    expected = float64([1.0 - 0.1 * math.sqrt(0.5) - 0.05, -2.0 - 0.1 * math.sqrt(0.5)])
    assert torch.allclose(w, expected, atol=1e-12)


def test_zero_gradient_only_decays():
    config, p, tokens = small("--warmup 0")
    before = {name: x.clone() for name, x in p.items()}
    optim.Optimizer(config, p).step({name: torch.zeros_like(x) for name, x in p.items()}, 0)
    for row in parameter_table(config):
        lr = 0 if row.group in ("resid", "x0", "smear") else optim.group_lr(config, row.group)
        wd = optim.muon_wd(config) if row.group == "muon" else optim.GROUPS[row.group].wd
        if row.group == "muon":
            lr *= math.sqrt(max(1, row.shape[0] / row.shape[1]))
        expected = before[row.name] * (1 - lr * wd)
        assert torch.allclose(p[row.name], expected, rtol=1e-14, atol=0), row.name


def test_clip():
    g = {"a": torch.tensor([3.0]).double(), "b": torch.tensor([[4.0]]).double()}
    clipped, norm = optim.clip(g, 1.0)
    assert norm == 5 and abs(optim.global_norm(clipped) - 1) < 1e-6
    assert optim.clip(g, 0)[0]["a"] == 3 and optim.clip(g, 6.0)[0]["a"] == 3


def test_sketch():
    a, b = philox.normal(3, 0, 0, 70001), philox.normal(3, 1, 0, 70001)
    near = a + 1e-4 * b
    near[5:9] = 0
    true = np.linalg.norm(a - near)
    assert 0.6 * true < distance(sketch(a), sketch(near)) < 1.4 * true
    assert sketch(near)[2] == 70001 - 4 and math.isclose(sketch(a)[0], np.linalg.norm(a))
    one = np.zeros(5)
    one[3] = 2.0
    word = philox.words(0, 0, philox.SKETCH, 1, 1)[0, 3]  # of element 3, projections 32 .. 63
    assert sketch(one)[3 + 40] == (2.0 if word >> 8 & 1 else -2.0)


def test_rule():
    b = np.array([3.0, 4.0, 0.0])
    ratio = lambda a: compare.compare("x", a, b, 1e-4).ratio
    assert ratio(b * (1 + 0.9e-4)) < 1 < ratio(b * (1 + 1.1e-4))
    assert ratio(b + [0, 0, 1e-30]) == math.inf and ratio(b * math.nan) == math.inf


def test_check_dump():
    """A dump made in FP32 passes, whole and sketched; one wrong element fails by name."""
    config, start, tokens = small("--warmup 0")
    p = {name: x.float() for name, x in start.items()}
    loss, logits, g = loss_and_gradients(config, p, tokens)
    dump = {f"param.{name}": x.clone() for name, x in p.items()}
    dump |= {f"grad.{name}": x for name, x in g.items()}
    optim.Optimizer(config, p).step(g, 0)
    dump |= {f"updated.{name}": x for name, x in p.items()} | {"logits": logits.flatten(0, 1)}
    dump |= {"loss": float64(loss), "grad_norm": float64(optim.global_norm(g))}
    dump |= {"tokens": tokens[:, :-1].int(), "targets": tokens[:, 1:].int()}
    dump = {name: x.numpy() for name, x in dump.items()}
    kept = ("tokens", "targets", "loss", "grad_norm")
    sketched = {name: dump[name] for name in kept}
    sketched |= {f"sketch.{name}": sketch(x) for name, x in dump.items() if name not in kept}
    flags = f'{SMALL} --warmup 0 --out "a b"'

    def check(tensors, failed=None):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "dump.safetensors")
            tensorfile.write(path, tensors, {"flags": flags})
            rows, missing, _ = check_dump.check(path)
        assert len(rows) == 3 * len(p) + 3 and not missing
        assert [row.name for row in rows if not row.ratio <= 1] == ([failed] if failed else [])

    check(dump)
    check(sketched)
    for name in ("grad.layers.1.wv", "grad.wte", "updated.lm_head", "updated.layers.3.wproj",
                 "logits"):
        changed = dump[name].copy()
        changed.flat[1000] += 1e-3 * np.linalg.norm(changed)
        check({**dump, name: changed}, name)
    pad = dump["grad.lm_head"].copy()
    pad[50, 0] = 1e-30
    check({**dump, "grad.lm_head": pad}, "grad.lm_head")


def test_fixtures_cover_their_cases():
    """Documents longer and shorter than the window, rows that start inside one, all gate shapes."""
    cases = {f.name: f for f in make_fixtures.fixtures()}
    for name in ("window_docs", "ragged_docs"):
        config = cases[name].config
        starts = [np.flatnonzero(row == config.bos) for row in cases[name].tokens[0].numpy()]
        edges = [np.concatenate([[0], s, [config.T + 1]]) for s in starts]
        lengths = np.concatenate([np.diff(e) for e in edges])
        short = min(config.windows)
        assert lengths.max() > short + 1 and 0 < lengths[lengths > 0].min() < short
        assert any(s[0] > 0 for s in starts) and any(s[0] == 0 for s in starts)
    for case in cases.values():
        assert case.config.batch >= case.config.C and (case.tokens[0] == case.config.bos).any()
    heads = [case.config.H for case in make_fixtures.given_gradients()]
    assert min(heads) < 12 < max(heads) and 12 in heads


if __name__ == "__main__":
    tests = [(name, test) for name, test in list(globals().items()) if name.startswith("test_")]
    for name, test in tests:
        test()
        print("ok", name)
    print(len(tests), "passed")
