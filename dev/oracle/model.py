# model.py: the model in PyTorch, FP64, written to be read; gradients come from autograd.
#
# Letters: B rows, T tokens a row, C channels, L layers, H heads, D head size (C = H*D), F = 4C,
# V vocabulary, Vp = V rounded up to a multiple of 128. Matrices are (out, in). No biases.
#
#     Config(flags)                    the shape of model and run from the trainer's flags
#     parameter_table(config)          every parameter: name, shape, both inits, optimizer group
#     init_parameters(config)          {name: tensor}, the numbers every implementation starts from
#     forward(config, p, idx)          tokens (B, T) -> logits (B, T, V)
#     loss_and_gradients(...)          what one training step needs
#
# It shares no code with the trainers: where both agree, two readings of the same formulas agree.
import math
import shlex
from collections import namedtuple

import numpy as np
import torch

import philox

torch.set_num_threads(1)

# The trainer's flags that change numbers, with its defaults. 0 (or -1) often means "by rule".
FLAGS = {
    "depth": 12, "channels": 0, "heads": 0, "vocab": 0, "bos": -1, "seq-len": 2048,
    "window-pattern": "SSSL", "window-short": 0, "doc-mask": 0,
    "batch-tokens": 0, "micro-batch": 0, "steps": 0, "tokens": 0, "ratio": 10.0, "warmup": 40,
    "grad-clip": 0.0, "seed": 1337, "init": "default",
    "lr-matrix": 0.02, "lr-lm-head": 0.008, "lr-wte": 0.3, "lr-value-embed": 0.15,
    "lr-resid": 0.005, "lr-x0": 0.5, "lr-smear": 0.2, "wd-matrix": 0.28,
}


def parse_flags(text, ignore_unknown=False):
    """'--depth 4 --vocab=257' -> {"depth": 4, "vocab": 257, and the defaults}."""
    flags = dict(FLAGS)
    items = shlex.split(text)
    while items:
        name, equals, value = items.pop(0).removeprefix("--").partition("=")
        value = value if equals else items.pop(0)
        if name in FLAGS:
            flags[name] = type(FLAGS[name])(value)
        elif not ignore_unknown:
            raise ValueError(f"unknown flag --{name}")
    return flags


def round_up(x, multiple):
    return -(-x // multiple) * multiple


def matrix_parameters(L, C, V):
    """P: the matrices of the layers (4 of C*C, 2 of 4C*C) and the V*C real rows of lm_head."""
    return L * 12 * C * C + V * C


def default_channels(depth):
    return round_up(64 * depth, 128)


class Config:
    def __init__(self, flags):
        if isinstance(flags, str):
            flags = parse_flags(flags)
        self.flags = flags
        self.L = flags["depth"]
        self.C = flags["channels"] or default_channels(self.L)
        self.H = flags["heads"] or max(1, self.C // 128)
        self.D = self.C // self.H
        self.F = 4 * self.C
        self.V = flags["vocab"] or 50257
        self.Vp = round_up(self.V, 128)
        self.T = flags["seq-len"]
        self.bos = flags["bos"] if flags["bos"] >= 0 else 50256 if self.V > 50256 else self.V - 1
        self.doc_mask = bool(flags["doc-mask"])
        self.windows = self._windows()
        assert self.C == self.H * self.D and self.D % 2 == 0 and self.C >= 24

        # The horizon Z is the model's own, also when --steps or --tokens cut the run short.
        self.P = matrix_parameters(self.L, self.C, self.V)
        self.Z = flags["ratio"] * self.P
        self.Z12 = flags["ratio"] * matrix_parameters(12, default_channels(12), self.V)
        suits = 2**19 * (self.Z / self.Z12) ** 0.383
        self.batch = flags["batch-tokens"] or 2 ** round(math.log2(suits))
        tokens = flags["tokens"] or math.floor(flags["ratio"] * self.P)
        self.steps = flags["steps"] or tokens // self.batch
        self.rows = self.batch // self.T
        self.flops_per_token = 6 * self.P + sum(12 * self.C * min(W, self.T) for W in self.windows)

    def _windows(self):
        """W_i: query t of layer i sees keys t - W_i .. t. The last layer sees the whole row."""
        short = self.flags["window-short"] or round_up(-(-self.T // 4), 128)
        pattern = self.flags["window-pattern"]
        kinds = [pattern[i % len(pattern)] for i in range(self.L - 1)] + ["L"]
        return [self.T if kind == "L" else short for kind in kinds]

    def has_value_embed(self, layer):
        return layer % 2 == (self.L - 1) % 2


# init, test_init: ("normal", std), ("uniform", low, high), ("ramp", first, last), ("constant", x).
# group: the optimizer's; "muon", or a row of optim.GROUPS.
Parameter = namedtuple("Parameter", "name shape init test_init group")


def parameter_table(config):
    L, C, F, H, Vp = config.L, config.C, config.F, config.H, config.Vp
    b = math.sqrt(3 / C)  # uniform -b .. b has standard deviation 1/sqrt(C)
    zero, plus_minus = ("constant", 0.0), lambda x: ("uniform", -x, x)
    table = []

    def add(name, shape, init, test_init, group):
        table.append(Parameter(name, shape, init, test_init, group))

    add("wte", (Vp, C), ("normal", 0.8), ("normal", 0.8), "wte")
    add("smear_gate", (24,), ("uniform", 0.0, 0.02), plus_minus(0.5), "smear")
    add("smear_lambda", (1,), zero, ("uniform", 0.3, 0.6), "smear")
    for i in range(L):
        for w in ("wq", "wk", "wv"):
            add(f"layers.{i}.{w}", (C, C), plus_minus(b), plus_minus(b), "muon")
        add(f"layers.{i}.wo", (C, C), zero, plus_minus(b), "muon")
        add(f"layers.{i}.wfc", (F, C), plus_minus(0.4 * b), plus_minus(b), "muon")
        add(f"layers.{i}.wproj", (C, F), zero, plus_minus(math.sqrt(3 / F)), "muon")
        if config.has_value_embed(i):
            add(f"layers.{i}.ve_gate", (H, 12), ("uniform", 0.0, 0.02), plus_minus(0.5), "muon")
            add(f"layers.{i}.value_embed", (Vp, C), plus_minus(b), plus_minus(b), "value_embed")
    add("resid_lambda", (L,), ("ramp", 1.15, 1.05), ("uniform", 0.8, 1.2), "resid")
    add("x0_lambda", (L,), ("ramp", 0.20, 0.05), ("uniform", 0.1, 0.4), "x0")
    backout = L >= 3  # below that its gradient would be noise: it is 0 and stays 0
    add("backout_lambda", (1,), ("constant", 0.2 if backout else 0.0),
        ("uniform", 0.2, 0.4) if backout else zero, "smear")
    add("lm_head", (Vp, C), ("normal", 0.001), ("normal", 3 / math.sqrt(C)), "lm_head")
    return table


def init_values(rule, count, seed, stream):
    """One tensor's numbers: made in double, rounded once to float. float64 (count)."""
    kind, *numbers = rule
    if kind == "normal":
        x = numbers[0] * philox.normal(seed, stream, philox.PARAMETER, count)
    elif kind == "uniform":
        low, high = numbers
        x = low + (high - low) * philox.uniform(seed, stream, philox.PARAMETER, count)
    elif kind == "ramp":
        first, last = numbers
        x = first + (last - first) * np.arange(count) / max(count - 1, 1)
    else:
        x = np.full(count, numbers[0])
    return x.astype(np.float32).astype(np.float64)


def has_vocabulary_rows(name):
    """Tables of shape (Vp, C): their rows V .. Vp-1 are 0 and stay 0."""
    return name in ("wte", "lm_head") or name.endswith("value_embed")


def init_parameters(config):
    """{name: float64 tensor}, in the table's order; the order is the Philox stream."""
    p = {}
    for stream, row in enumerate(parameter_table(config)):
        rule = row.test_init if config.flags["init"] == "test" else row.init
        x = init_values(rule, math.prod(row.shape), config.flags["seed"], stream).reshape(row.shape)
        if has_vocabulary_rows(row.name):
            x[config.V:] = 0
        p[row.name] = torch.from_numpy(x)
    return p


def N(x):
    """RMS norm over the last axis: no gain, no bias."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 2.0**-23)


def rope(x):
    """x: (B, T, H, D). Dim j pairs with j + D/2 and turns by pos * 100000^(-2j/D)."""
    T, D = x.shape[1], x.shape[3]
    j = torch.arange(D // 2, dtype=torch.float64)
    angle = torch.arange(T, dtype=torch.float64)[:, None] * 100000.0 ** (-2 * j / D)
    cos = torch.cos(angle).float().to(x.dtype)[:, None, :]  # computed in double, kept in FP32
    sin = torch.sin(angle).float().to(x.dtype)[:, None, :]
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


def visible(config, idx, window):
    """(B, T, T): may query i see key j? Causal, at most `window` back, in the same document."""
    t = torch.arange(idx.shape[1])
    distance = t[:, None] - t[None, :]
    mask = ((distance >= 0) & (distance <= window)).expand(idx.shape[0], -1, -1)
    if config.doc_mask:
        document = (idx == config.bos).cumsum(1)  # tokens before a row's first BOS are document 0
        mask = mask & (document[:, :, None] == document[:, None, :])
    return mask


def attention(q, k, v, mask):
    """q, k, v: (B, T, H, D), mask (B, T, T) -> (B, T, H*D)."""
    B, T, H, D = q.shape
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (1.44 / math.sqrt(D))
    att = torch.softmax(scores.masked_fill(~mask[:, None], -math.inf), dim=-1)
    return torch.einsum("bhij,bjhd->bihd", att, v).reshape(B, T, H * D)


def smear(config, p, x, idx):
    """Each token takes a gated part of the one before it; not the first of a row or document."""
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
    gate = torch.sigmoid(x[..., :24] @ p["smear_gate"])  # (B, T)
    if config.doc_mask:
        gate = gate * (idx != config.bos)
    return x + p["smear_lambda"] * gate[..., None] * before


def forward(config, p, idx):
    """idx: (B, T) tokens -> logits (B, T, V).

    A lambda may also be given with one copy per element that it multiplies; see scalar_terms."""
    B, T = idx.shape
    H, D = config.H, config.D
    x = N(p["wte"][idx])  # (B, T, C)
    x = smear(config, p, x, idx)
    x0 = x
    for i in range(config.L):
        w = lambda name: p[f"layers.{i}.{name}"]
        x = p["resid_lambda"][i] * x + p["x0_lambda"][i] * x0
        h = N(x)
        q, k, v = ((h @ w(name).T).reshape(B, T, H, D) for name in ("wq", "wk", "wv"))
        if config.has_value_embed(i):
            gate = 3 * torch.sigmoid(h[..., :12] @ w("ve_gate").T)  # (B, T, H)
            v = v + gate[..., None] * w("value_embed")[idx].reshape(B, T, H, D)
        q, k = N(rope(q)), N(rope(k))
        x = x + attention(q, k, v, visible(config, idx, config.windows[i])) @ w("wo").T
        x = x + torch.relu(N(x) @ w("wfc").T) ** 2 @ w("wproj").T
        if i == config.L // 2:
            xb = x
    if config.L >= 3:
        x = x - p["backout_lambda"] * xb
    logits = (N(x) @ p["lm_head"].T)[..., :config.V]
    return 15 * torch.tanh(logits / 15)


def loss_of(logits, targets):
    """Mean cross entropy in nats over all targets. logits (B, T, V), targets (B, T)."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def loss_and_gradients(config, p, tokens):
    """tokens: (B, T+1). Returns the loss (float), logits (B, T, V) and {name: gradient}.

    Averaged over all tokens of the step at once: micro-steps are an implementation's own affair."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in p.items()}
    logits = forward(config, leaves, tokens[:, :-1])
    loss = loss_of(logits, tokens[:, 1:])
    loss.backward()
    gradients = {name: torch.zeros_like(x) if x.grad is None else x.grad
                 for name, x in leaves.items()}
    return loss.item(), logits.detach(), gradients


LAMBDAS = ("smear_lambda", "resid_lambda", "x0_lambda", "backout_lambda")


def scalar_terms(config, p, tokens):
    """{lambda: per element the sum of |terms| of its gradient}, the scale of its rounding noise.

    Each lambda multiplies every element of a (B, T, C) tensor. Given as a (B, T, C) tensor of equal
    numbers, its gradient is the separate terms, whose plain sum is the lambda's gradient."""
    B, T = tokens.shape[0], tokens.shape[1] - 1
    spread = dict(p)
    for name in LAMBDAS:
        copies = p[name][:, None, None, None].expand(-1, B, T, config.C).clone()
        per_layer = name in ("resid_lambda", "x0_lambda")
        spread[name] = (copies if per_layer else copies[0]).requires_grad_()
    loss_of(forward(config, spread, tokens[:, :-1]), tokens[:, 1:]).backward()
    terms = {}
    for name in LAMBDAS:
        grad = spread[name].grad
        grad = torch.zeros_like(spread[name]) if grad is None else grad
        terms[name] = grad.abs().reshape(p[name].shape[0], -1).sum(1)
    return terms
