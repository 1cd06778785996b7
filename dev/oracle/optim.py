# optim.py: AdamW and Muon in FP64, their schedules and groups. One step at a time, no fusing.
#
#     lr_multiplier, muon_momentum, muon_decay    pure functions of (it, n)
#     clip(gradients, limit)                      by the global norm
#     Optimizer(config, p).step(gradients, it)    updates p, {name: tensor}, in place
#
# Muon here is Jordan 2024 with Polar Express (2505.16932), NorMuon (2510.05491), MuonEq
# (2603.28254), Muon+ (2602.21545) and cautious weight decay.
import math
from collections import namedtuple

import torch

from model import parameter_table

# AdamW's groups. Tables divide the learning rate of a 768-channel model by the root of their width.
Group = namedtuple("Group", "lr_flag by_width by_batch beta1 beta2 wd eps")
GROUPS = {
    "lm_head":     Group("lr-lm-head", True, True, 0.8, 0.96, 0.01, 1e-10),
    "wte":         Group("lr-wte", True, True, 0.8, 0.995, 0.001, 1e-10),
    "value_embed": Group("lr-value-embed", True, True, 0.8, 0.995, 0.01, 1e-10),
    "resid":       Group("lr-resid", False, True, 0.8, 0.95, 0.05, 1e-8),
    "x0":          Group("lr-x0", False, True, 0.96, 0.95, 0.0, 1e-8),
    "smear":       Group("lr-smear", False, False, 0.8, 0.95, 0.0, 1e-8),
}

MUON_BETA2 = 0.9

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def cooldown_steps(n):
    return round(0.65 * n)  # half to even


def lr_multiplier(it, n, warmup):
    d = cooldown_steps(n)
    if it < warmup:
        return (it + 1) / warmup
    if it <= n - d:
        return 1.0
    p = (n - it) / d
    return p + 0.05 * (1 - p)


def muon_momentum(it, n):
    d = cooldown_steps(n)
    if it < 400:
        return 0.85 + 0.12 * it / 400
    if it >= n - d:
        return 0.97 - 0.07 * (it - (n - d)) / d
    return 0.97


def muon_decay(it, n):
    return (1 + math.cos(math.pi * it / n)) / 2


def batch_scale(config):
    return math.sqrt(config.batch / 2**19)


def muon_wd(config):
    """Before its schedule: the longer the horizon, the less decay a step."""
    return config.flags["wd-matrix"] * batch_scale(config) * config.Z12 / config.Z


def group_lr(config, group):
    """Before its schedule."""
    if group == "muon":
        return config.flags["lr-matrix"] * batch_scale(config)
    g = GROUPS[group]
    width = math.sqrt(768 / config.C) if g.by_width else 1.0
    return config.flags[g.lr_flag] * width * (batch_scale(config) if g.by_batch else 1.0)


def global_norm(gradients):
    return math.sqrt(sum((g.double() ** 2).sum().item() for g in gradients.values()))


def clip(gradients, limit):
    """limit 0: as they are. Returns the gradients and the norm before clipping."""
    norm = global_norm(gradients)
    scale = min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0
    return {name: g * scale for name, g in gradients.items()}, norm


def adamw(p, g, state, t, lr, group):
    """t = 1, 2, ... counts the updates of this tensor."""
    m = state.setdefault("m", torch.zeros_like(p))
    v = state.setdefault("v", torch.zeros_like(p))
    m.copy_(group.beta1 * m + (1 - group.beta1) * g)
    v.copy_(group.beta2 * v + (1 - group.beta2) * g * g)
    p *= 1 - lr * group.wd
    p -= lr / (1 - group.beta1**t) * m / (torch.sqrt(v / (1 - group.beta2**t)) + group.eps)


def even_rows(X):
    """2. MuonEq: every row gets the root mean square of the rows' norms."""
    R = X.shape[0]
    return X * ((X.norm() / math.sqrt(R)) / X.norm(dim=1, keepdim=True).clamp_min(1e-6))


def polar_express(X):
    """3. Towards the nearest orthogonal matrix: five odd polynomials of the singular values."""
    R, K = X.shape
    X = X / (1.01 * X.norm() + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        if R <= K:
            A = X @ X.T
            X = a * X + (b * A + c * A @ A) @ X
        else:
            A = X.T @ X
            X = a * X + X @ (b * A + c * A @ A)
    return X


def restore_norm(X):
    """4. Muon+: the norm of a matrix whose min(R, K) singular values are all 1."""
    return X * (math.sqrt(min(X.shape)) / X.norm().clamp_min(1e-6))


def normuon(X, state, beta2=MUON_BETA2):
    """5. Rows (R >= K) or columns divided by their running root mean square, the norm of X kept."""
    R, K = X.shape
    reduced = 1 if R >= K else 0  # the axis that the mean runs over
    n = X.shape[reduced]
    v = (X * X).mean(dim=reduced, keepdim=True)
    s = state.setdefault("s", torch.zeros_like(v))
    s.copy_(beta2 * s + (1 - beta2) * v)
    r = 1 / torch.sqrt(s.clamp_min(1e-10))
    before = torch.sqrt(n * v.sum())
    after = torch.sqrt(n * (v * r * r).sum())
    return X * r * (before / after.clamp_min(1e-10))


def muon(w, G, state, lr, momentum, wd):
    R, K = w.shape
    buf = state.setdefault("buf", torch.zeros_like(w))
    buf.copy_(momentum * buf + (1 - momentum) * G)  # 1. momentum, Nesterov's form
    X = (1 - momentum) * G + momentum * buf
    X = even_rows(X)
    X = polar_express(X)
    X = restore_norm(X)
    X = normuon(X, state)
    lr_eff = lr * math.sqrt(max(1.0, R / K))
    decays = (X * w >= 0).to(w.dtype)  # 6. decay only where it agrees with the update
    w -= lr_eff * X + lr_eff * wd * w * decays


class Optimizer:
    def __init__(self, config, p):
        self.config, self.p = config, p
        self.table = parameter_table(config)
        self.state = {row.name: {} for row in self.table}
        self.t = 0

    def step(self, gradients, it):
        """gradients: {name: tensor}, already clipped. it: 0-based step of the schedules."""
        config = self.config
        n = config.steps
        self.t += 1
        multiplier = lr_multiplier(it, n, config.flags["warmup"])
        for row in self.table:
            if row.name == "backout_lambda" and config.L < 3:
                continue
            p, g, state = self.p[row.name], gradients[row.name], self.state[row.name]
            lr = group_lr(config, row.group) * multiplier
            if it == 0 and row.group in ("resid", "x0", "smear"):
                lr = 0.0  # gradients that are 0 but for rounding, from the default init
            if row.group == "muon":
                wd = muon_wd(config) * muon_decay(it, n)
                muon(p, g, state, lr, muon_momentum(it, n), wd)
            else:
                adamw(p, g, state, self.t, lr, GROUPS[row.group])
