# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy", "torch==2.13.0", "matplotlib"]
# ///
"""
Transformers that learn linear regression in context run Newton's method, layer by layer. Watch one do it.

Give a Transformer a prompt x_1, y_1, x_2, y_2, ..., x_{n+1} whose answers come from a hidden linear rule y = w.x that
changes with every prompt. Trained on millions of such prompts, it learns to solve a *new* regression inside one
forward pass. Which algorithm does it run? Fu, Chen, Jia and Sharan (arXiv 2310.17086, "Fu" below) say: not gradient
descent. Each layer is worth a fixed number of steps of Iterative Newton, and every Newton step doubles the number of
correct digits; to keep up, gradient descent needs exponentially many steps. This file trains such a Transformer from
nothing on two CPU cores in about two minutes, reads a prediction out of every layer, and lays it beside the steps of
Newton and of gradient descent.

    python icl_newton.py                    everything: figures/*.png, figures/results.json and a table of claims
    python icl_newton.py --preset quick     a first look in half a minute: everything shrunk, conclusions too
    python icl_newton.py --figures rates    one figure, and only the models it needs
    python icl_newton.py --help             every setting, with what it does

The idea that keeps the file small: **every learner is a trajectory of predictions** of shape (steps, prompts, n+1).
Newton's steps, gradient descent's steps, a Transformer's layers: one error curve, one similarity and one best match
serve them all.

What differs from Fu's setting, and why (their own setting is `--preset paper`, for a GPU):
    d = 5, n = 10, not 20, 40       the same picture for a hundredth of the arithmetic
    8 layers of width 64            not 12 of 256, for the same reason
    Muon, batch 64, 2,500 steps     not Adam, 500,000 steps: see section 4
    GD's step size 1/lambda_max(S)  per prefix, not one fixed 0.01: GD at its textbook best, so that the race is fair
    the same norm before every probe   their code normalises only the last layer's state before the readout

Notation (Fu's symbols). Shapes in code put prompts first: (prompts, n+1, d).
    d, n          dimension of x; number of examples in a prompt. The (n+1)-th x is the last query.
    t = 0..n      prefix length: how many examples a prediction may use. Every prompt asks n+1 questions at once.
    w*            the hidden rule of one prompt, drawn from N(0, I_d)
    Sigma, kappa  covariance of x and its condition number (1: isotropic)
    S = X^T X     = sum_{i<=t} x_i x_i^T, the Gram matrix of a prefix; b = X^T y = sum_{i<=t} y_i x_i
    eta, alpha    step size of gradient descent; start of Newton, M_0 = alpha S
    k, l          a step of an algorithm; a layer of a network
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from torch import nn

matplotlib.use("Agg")  # pictures go to files: no display needed
import matplotlib.pyplot as plt

# %% [markdown]
# # Part I. The paper's claim
#
# ## 1. Settings
#
# All of them, once. The fields are the command line's flags, the comments their help.


# %%
@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run. Raises ValueError, in one line, for a value that cannot work."""

    # What is learned
    d: int = 5  # dimension of x and of the hidden rule w*
    n: int = 10  # examples in a prompt
    kappa: float = 1.0  # condition number of the covariance of x; 1 is isotropic (Fu's other value: 100)
    noise: float = 0.0  # standard deviation of the noise on y (Fu's other value: 0.1)
    # Who learns it
    layers: int = 8  # layers of the Transformer
    width: int = 64  # width of its residual stream
    heads: int = 4  # attention heads per layer; must divide the width
    # How it learns
    steps: int = 2500  # training steps
    batch: int = 64  # fresh prompts per step
    muon_lr: float = 0.005  # Muon's step size: the blocks' weight matrices
    adam_lr: float = 0.003  # AdamW's step size: embedding, positions and readout
    curriculum: int = 0  # steps per added dimension, starting at 2; 0: all d dimensions from the start
    seed: int = 1  # of initial weights and training prompts
    # How it is examined
    probes: int = 2048  # prompts that fit the readouts of the layers
    prompts: int = 512  # fresh prompts on which all comparisons are made
    # The run
    preset: str = "default"  # default, quick (shrunk, half a minute) or paper (Fu's sizes, for a CUDA GPU)
    figures: str = "all"  # which figures to make, by name, separated by commas
    device: str = "auto"  # cpu, cuda, or auto: CUDA where there is one
    out: str = "figures"  # folder for pictures and results.json
    checkpoints: str = "checkpoints"  # folder for trained models and for those still in training
    save_every: int = 250  # steps between checkpoints

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            may_be_zero = field.name in ("noise", "curriculum", "seed")
            if field.type in (int, float) and not (0 <= value < math.inf and (value or may_be_zero)):
                raise ValueError(f"--{field.name} must be a positive number{' or 0' * may_be_zero}, not {value}")
        if self.width % self.heads:
            raise ValueError(f"--heads must divide --width, but {self.heads} does not divide {self.width}")
        if self.kappa < 1 or (self.kappa > 1 and self.d == 1):
            raise ValueError("--kappa is at least 1, and 1 where d = 1")
        if unknown := set(self.figures.split(",")) - {"all", *FIGURES}:
            raise ValueError(f"--figures: no figure {', '.join(sorted(unknown))}; there are {', '.join(FIGURES)}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"--device is auto, cpu or cuda, not {self.device}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: no CUDA device on this machine")

    @property
    def torch_device(self):
        use_cuda = self.device != "cpu" and torch.cuda.is_available()
        return torch.device("cuda" if use_cuda else "cpu")


PRESETS = {
    "default": {},
    "quick": dict(d=3, n=6, layers=6, width=32, heads=2, steps=500, probes=512, prompts=256),
    "paper": dict(d=20, n=40, layers=12, width=256, heads=8, steps=30_000, curriculum=50, prompts=320),
}

# The setting of one training run, and so the name of its checkpoint; nothing else changes the trained weights.
TRAINING_FIELDS = ("d n kappa noise layers width heads steps batch muon_lr adam_lr curriculum seed").split()

# %% [markdown]
# ## 2. Prompts (Fu, section 3)
#
# w* ~ N(0, I_d),  x_i ~ N(0, Sigma),  y_i = w*.x_i + noise. A new w* for every prompt: nothing about w* can be
# memorised, so whatever predicts y_{t+1} must be an algorithm that runs on the prompt.


# %%
def sample_prompts(prompts, n, d, *, kappa=1.0, noise=0.0, generator=None):
    """Draw regression prompts: xs (prompts, n+1, d) and ys (prompts, n+1), float32, on the generator's device.

    With kappa > 1 each prompt has its own covariance: a uniformly random eigenbasis, the first d//2 eigenvalues kappa
    times the others, rescaled to trace d (Fu, section 4.3). `noise` is the standard deviation of the noise on y.
    """
    draw = functools.partial(torch.randn, generator=generator, device=generator.device if generator else None)
    xs = draw(prompts, n + 1, d)
    if kappa != 1:
        eigenvalues = torch.ones(d, device=xs.device)
        eigenvalues[: d // 2] = kappa
        eigenvalues *= d / eigenvalues.sum()
        basis = torch.linalg.qr(draw(prompts, d, d)).Q
        xs = (xs * eigenvalues.sqrt()) @ basis.mT
    w_star = draw(prompts, d, 1)
    ys = (xs @ w_star).squeeze(-1)
    return xs, ys + noise * draw(prompts, n + 1) if noise else ys


# %% [markdown]
# ## 3. Three classical learners (Fu, section 3.1)
#
# All of them see a prefix only through S = X^T X and b = X^T y, and all prefixes of all prompts are solved at once, in
# float64.
#
#     least squares       w = pinv(S) b               the answer; of minimum norm while t < d
#     gradient descent    w <- w - eta (S w - b)      O(kappa log 1/eps) steps to error eps
#     Iterative Newton    M <- 2M - M S M,  w = M b   O(log kappa + log log 1/eps) steps
#
# Newton looks for the inverse of S. Why it doubles its digits takes one line. With the residual R_k = I - S M_k,
#
#     R_{k+1} = I - S (2 M_k - M_k S M_k) = (I - S M_k)^2 = R_k^2,
#
# so an error of 10^-3 becomes 10^-6, then 10^-12. One step of gradient descent multiplies its error by (I - eta S),
# always the same factor: a fixed number of steps per digit. The catch: R_0 = I - alpha S^2 must have norm below 1 on
# the span of the examples, so alpha < 2/||S||^2. (Fu prints alpha = 2/||S S^T||_2, which is exactly the edge, where one
# eigenvalue of R is -1 and its square, 1, never shrinks. Their code uses 1/||S S^T||_F, and so do we.)

# %%
TINY = 1e-30  # keeps the empty prefix, S = 0, from dividing by zero


def prefix_moments(xs, ys, ridge=0.0):
    """S (prompts, n+1, d, d) and b (prompts, n+1, d) of the prefixes t = 0..n, float64; S + ridge I under noise."""
    xs, ys = xs.double(), ys.double()

    def sum_before(z):  # shifted by one, so that no prediction sees its own answer
        return torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1].cumsum(1)], dim=1)

    S = sum_before(xs[..., :, None] * xs[..., None, :])
    return S + ridge * torch.eye(xs.shape[-1], dtype=S.dtype, device=S.device), sum_before(ys[..., None] * xs)


def step_counts(steps):
    """The step counts of a trajectory: an int s means 0, 1, ..., s. Raises ValueError unless 0 <= and increasing."""
    counts = list(range(steps + 1)) if isinstance(steps, int) else [int(k) for k in steps]
    if not counts or counts[0] < 0 or any(a >= b for a, b in zip(counts, counts[1:])):
        raise ValueError(f"steps must be a count or an increasing sequence of counts, not {steps}")
    return counts


def predict(weights, xs):
    """Answer each prefix's query: weights (steps, prompts, n+1, d) -> trajectory (steps, prompts, n+1)."""
    return torch.einsum("kptd,ptd->kpt", weights, xs.double())


def ols(xs, ys, ridge=0.0):
    """Ordinary least squares, w = pinv(S) b: the minimum-norm solution while t < d. A trajectory of one step."""
    S, b = prefix_moments(xs, ys, ridge)
    weights = torch.linalg.pinv(S, hermitian=True, rtol=1e-12) @ b[..., None]
    return predict(weights.squeeze(-1)[None], xs)


def gradient_descent(xs, ys, steps, lr=None, w0=None, ridge=0.0):
    """Gradient descent, w <- w - lr (S w - b), as a trajectory (len(steps), prompts, n+1).

    `lr` defaults to 1/lambda_max(S), prefix by prefix; `w0`, the start, (d,) or (prompts, 1, d), to 0.
    """
    S, b = prefix_moments(xs, ys, ridge)
    eigenvalues, U = torch.linalg.eigh(S)  # (prompts, n+1, d) ascending; eigenvectors are the columns of U

    def in_eigenbasis(z):
        return (U.mT @ z.double().expand_as(b)[..., None]).squeeze(-1)

    # There every coordinate goes its own way, u <- (1 - lr lambda) u + lr c, so that k steps are one power and one
    # geometric sum: a million steps cost no more than one.
    largest = eigenvalues[..., -1:].clamp_min(TINY)
    eigenvalues = eigenvalues.clamp_min(1e-13 * largest)  # rounding makes zeros of about -1e-16
    shrink = 1 - (1 / largest if lr is None else lr) * eigenvalues
    powers = shrink ** torch.tensor(step_counts(steps), dtype=S.dtype, device=S.device)[:, None, None, None]
    u = (1 - powers) / eigenvalues * in_eigenbasis(b)  # (steps, prompts, n+1, d)
    if w0 is not None:
        u = u + powers * in_eigenbasis(w0)
    return predict(u, in_eigenbasis(xs))


def newton(xs, ys, steps, alpha=None, ridge=0.0):
    """Iterative Newton, M <- 2M - M S M from M_0 = alpha S, predicting with w_k = M_k b (Fu, section 3.1).

    A trajectory (len(steps), prompts, n+1); step 0 is M_0. `alpha` defaults to 1/||S S^T||_F, prefix by prefix.
    """
    counts = step_counts(steps)
    S, b = prefix_moments(xs, ys, ridge)
    if alpha is None:
        alpha = 1 / torch.linalg.matrix_norm(S @ S, keepdim=True).clamp_min(TINY)
    M, weights = alpha * S, []
    for k in range(counts[-1] + 1):
        if k > 0:
            M = 2 * M - M @ S @ M
        if k in counts:
            weights.append((M @ b[..., None]).squeeze(-1))
    return predict(torch.stack(weights), xs)


# %% [markdown]
# ## 4. The Transformer
#
# A GPT-2-like decoder on interleaved tokens x_1, y_1, ..., x_{n+1}: pre-norm blocks of causal attention and an MLP, each
# adding to the residual stream. It predicts y_{t+1} at the token x_{t+1}, having seen t examples. All layers' matrices
# of one shape live in one tensor, so that the optimiser can treat them together.


# %%
def interleave(xs, ys):
    """Prompts (prompts, n+1, d), (prompts, n+1) -> tokens (prompts, 2n+1, d): x_1, y_1, ..., x_{n+1}.

    y is zero-padded to d entries, and the last y, the answer, is left out (Fu, section 3).
    """
    y_tokens = F.pad(ys[..., None], (0, xs.shape[-1] - 1))  # (prompts, n+1, d): y, 0, ..., 0
    return torch.stack([xs, y_tokens], dim=2).flatten(1, 2)[:, :-1]


def normalize(h):
    """The one normalisation of the model, over the last axis and without parameters: mean 0, variance 1."""
    return F.layer_norm(h, h.shape[-1:])


def causal_attention(q, k, v):
    """softmax(q k^T / sqrt(D) + mask) v for q, k, v (..., T, D): token i looks at tokens 0..i only."""
    T, D = q.shape[-2:]
    scores = q @ k.mT / math.sqrt(D)  # (..., T, D) x (..., D, T) -> (..., T, T)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v


class Transformer(nn.Module):
    """Decoder-only Transformer for prompts of at most n examples; its sizes come from the Config."""

    def __init__(self, config):
        super().__init__()
        self.config, L, W = config, config.layers, config.width
        self.read_in = nn.Parameter(0.3 * torch.randn(W, config.d) / math.sqrt(config.d))
        self.positions = nn.Parameter(0.02 * torch.randn(2 * config.n + 1, W))
        self.attention = nn.Parameter(torch.randn(L, 4, W, W) / math.sqrt(3 * W))  # query, key, value, output
        self.mlp = nn.Parameter(torch.randn(L, 2, 4 * W, W) / math.sqrt(3 * W))  # up, and down transposed
        self.read_out = nn.Parameter(torch.zeros(W))
        with torch.no_grad():  # what writes into the residual stream starts small
            self.attention[:, 3] /= 2
            self.mlp[:, 1] /= 2

    def residual_streams(self, xs, ys):
        """The residual stream before the first layer and after each: a list of layers+1 (prompts, 2n+1, width)."""
        h = interleave(xs, ys) @ self.read_in.mT
        h = h + self.positions[: h.shape[1]]
        streams = [h]
        for attention, (up, down) in zip(self.attention.unbind(), self.mlp.unbind()):
            h = h + self.attend(normalize(h), attention)
            h = h + F.gelu(normalize(h) @ up.mT) @ down
            streams.append(h)
        return streams

    def attend(self, h, matrices):
        """Multi-head causal attention on h (prompts, T, width); the matrices (4, width, width) are Q, K, V, O."""
        P, T, W = h.shape
        heads = F.linear(h, matrices[:3].flatten(0, 1)).view(P, T, 3, self.config.heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (prompts, heads, T, width/heads)
        mixed = causal_attention(normalize(q), normalize(k), v)
        return mixed.transpose(1, 2).reshape(P, T, W) @ matrices[3].mT

    def forward(self, xs, ys):
        """Predictions (prompts, n+1) of ys: entry t is made at the token x_{t+1}, from t examples."""
        return normalize(self.residual_streams(xs, ys)[-1][:, ::2]) @ self.read_out

    def states(self, xs, ys):
        """What the probes see: the normalised stream at the x tokens, (layers+1, prompts, n+1, width)."""
        return torch.stack([normalize(h[:, ::2]) for h in self.residual_streams(xs, ys)])


# %% [markdown]
# ## 5. Training
#
# Mean squared error over every prefix, on fresh prompts at every step. The paper's Adam at a constant 1e-4 needs
# hundreds of thousands of steps; Muon (Keller Jordan, 2024) makes it thousands. Muon replaces each matrix's momentum G
# by the nearest orthogonal matrix, so that every direction is learned at the same speed. To find it, Muon runs a
# Newton-Schulz iteration, X <- X (a I + b X X^T + c (X X^T)^2): a relative of the very algorithm we are about to find
# inside the network. With all matrices of one shape in one tensor, the iteration runs on all layers at once.


# %%
def orthogonalize(G):
    """The nearest orthogonal matrix to each of (..., rows, columns), roughly: singular values end in 0.7..1.2.

    Five Newton-Schulz steps with Muon's coefficients, tuned for speed: they push singular values up fast, not to 1.
    """
    X = G.mT if G.shape[-2] > G.shape[-1] else G  # work on the smaller side
    X = X / torch.linalg.matrix_norm(X, keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.mT if G.shape[-2] > G.shape[-1] else X


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for parameters whose last two axes are matrices. torch.optim.Muon takes one matrix at
    a time; this one takes stacks, which is twice as fast here. The scale gives updates the size of AdamW's."""

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(average, group["momentum"]))
                p.sub_(update, alpha=group["lr"] * 0.2 * math.sqrt(max(p.shape[-2:])))


def learning_rate_factor(step, steps, warmup=100):
    """Linear warm-up, then linear decay to zero."""
    return min((step + 1) / warmup, 1) * (steps - step) / steps


def training_prompts(config, step, generator):
    """The fresh prompts of one step: xs (batch, n+1, d), ys (batch, n+1).

    A curriculum (Garg et al., 2022) starts with 2 active dimensions, the other entries zero, and 2d + 2 examples, and
    grows both up to d and n. Without it, training at d = 20 does not get off the ground.
    """
    d, n = config.d, config.n
    if config.curriculum:
        d = min(2 + step // config.curriculum, config.d)
        n = min(2 * d + 2, config.n) if d < config.d else config.n
    xs, ys = sample_prompts(config.batch, n, d, kappa=config.kappa, noise=config.noise, generator=generator)
    return F.pad(xs, (0, config.d - d)), ys


def flops_per_step(config):
    """Floating-point operations of one training step's matrix products: forward, backward and Muon."""
    W, T = config.width, 2 * config.n + 1
    forward = config.layers * config.batch * T * (2 * 12 * W**2 + 4 * T * W)  # weights, and attention's T x T
    muon = config.layers * 5 * (4 * 6 * W**3 + 2 * 18 * W**3)  # per Newton-Schulz step 2r^2 c twice and 2r^3
    return 3 * forward + muon  # the backward pass multiplies each matrix twice


def matmul_rate(size=2048, repeats=4):
    """Floating-point operations per second of a large float32 matrix product on the CPU: the best of a few."""
    a, seconds = torch.randn(size, size), []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def identity(config):
    """What a checkpoint is found by: the settings that decide the trained weights."""
    return {name: getattr(config, name) for name in TRAINING_FIELDS}


def checkpoint_path(config):
    key = hashlib.sha256(json.dumps(identity(config)).encode()).hexdigest()[:10]
    return Path(config.checkpoints) / f"transformer-d{config.d}-n{config.n}-seed{config.seed}-{key}.pt"


def load_checkpoint(config):
    """The saved state of this configuration's training, or None. A file that cannot be used is kept under a new name,
    with a line on standard error."""
    path = checkpoint_path(config)
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        reason = None if saved["identity"] == identity(config) else "belongs to another configuration"
    except Exception as error:  # torch.load raises half a dozen kinds for damaged files
        reason = f"is damaged ({type(error).__name__})"
    if reason is None:
        return saved
    kept = next(p for i in range(1, 10**6) if not (p := path.with_suffix(f".kept-{i}")).exists())
    path.rename(kept)
    print(f"icl_newton: checkpoint {path} {reason}; kept as {kept}, training anew", file=sys.stderr)
    return None


def save_atomically(write, path):
    """Call write(temporary path), then move the result to `path` in one step: a kill leaves the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write(temporary)
    os.replace(temporary, path)


def show_progress(config, step, loss, seconds_per_step):
    """One line: step, loss, rate, time left. It rewrites itself on a terminal; in a log it comes every tenth."""
    on_terminal, last = sys.stdout.isatty(), step == config.steps
    if on_terminal or last or step % max(config.steps // 10, 1) < 10:
        gflops, left = flops_per_step(config) / seconds_per_step / 1e9, (config.steps - step) * seconds_per_step
        line = f"  step {step:>6}/{config.steps}  loss/d {loss / config.d:.4f}  {gflops:4.0f} GFLOP/s  {left:4.0f} s left"
        print(line, end="\r" if on_terminal and not last else "\n", flush=True)


def train(config):
    """Train the Transformer of `config`, or go on from its checkpoint, and return it.

    A run that was killed continues at its last checkpoint and ends with the same weights, bit for bit on the same
    machine, as one that was not. model.training_seconds and model.losses (steps,) describe the training. Raises
    FloatingPointError, with the step, for a loss that is not finite.
    """
    device, path = config.torch_device, checkpoint_path(config)
    torch.manual_seed(config.seed)
    model = Transformer(config).to(device)
    blocks = [model.attention, model.mlp]
    rest = [p for p in model.parameters() if all(p is not block for block in blocks)]
    muon, adam = Muon(blocks, config.muon_lr), torch.optim.AdamW(rest, config.adam_lr, (0.9, 0.99), weight_decay=0)
    generator = torch.Generator(device).manual_seed(config.seed)
    losses, done, seconds = torch.full((config.steps,), math.nan, device=device), 0, 0.0
    if saved := load_checkpoint(config):
        model.load_state_dict(saved["model"])
        muon.load_state_dict(saved["muon"])
        adam.load_state_dict(saved["adam"])
        generator.set_state(saved["generator"])
        losses, done, seconds = saved["losses"].to(device), saved["done"], saved["seconds"]
        print(f"  found {path}: {done} of {config.steps} steps" + " done" * (done == config.steps))

    start = time.perf_counter() - seconds
    for step in range(done, config.steps):
        for optimizer, lr in ((muon, config.muon_lr), (adam, config.adam_lr)):
            optimizer.param_groups[0]["lr"] = lr * learning_rate_factor(step, config.steps)
        xs, ys = training_prompts(config, step, generator)
        loss = (model(xs, ys) - ys).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(rest, 1.0)
        muon.step()
        adam.step()
        model.zero_grad()
        losses[step] = loss.detach()

        done = step + 1
        save = done % config.save_every == 0 or done == config.steps
        if save or done % 10 == 0:  # not at every step: reading a number makes a GPU wait
            if not losses[: done].isfinite().all():
                bad = (~losses[: done].isfinite()).nonzero()[0].item() + 1
                raise FloatingPointError(f"the loss is not finite at step {bad}; try a smaller --muon_lr or --adam_lr")
            seconds = time.perf_counter() - start
            show_progress(config, done, losses[max(done - 50, 0) : done].mean().item(), seconds / done)
        if save:
            state = dict(identity=identity(config), done=done, seconds=seconds, losses=losses, model=model.state_dict(),
                         muon=muon.state_dict(), adam=adam.state_dict(), generator=generator.get_state())
            save_atomically(functools.partial(torch.save, state), path)
    model.training_seconds, model.losses = seconds, losses.cpu()
    return model.requires_grad_(False)


# %% [markdown]
# ## 6. What does each layer know? (Fu, section 4.1)
#
# Freeze the model and fit, for every layer, the linear readout that predicts best from that layer's state. This asks
# what a layer has computed, wherever it keeps it. Least squares does it in closed form. The readouts are fitted on
# other prompts than those they are judged on.


# %%
def fresh_prompts(config, count, seed):
    """Prompts of the configuration's distribution that training never saw, on the CPU."""
    generator = torch.Generator().manual_seed(1_000_003 * config.seed + seed)
    return sample_prompts(count, config.n, config.d, kappa=config.kappa, noise=config.noise, generator=generator)


@torch.no_grad()
def probe_features(model, xs, ys, chunk=512):
    """States of all layers with a constant 1 beside them, in chunks of prompts: (layers+1, chunk, n+1, width+1)."""
    device = next(model.parameters()).device
    for x, y in zip(xs.split(chunk), ys.split(chunk)):
        yield F.pad(model.states(x.to(device), y.to(device)).double().cpu(), (0, 1), value=1.0), y.double()


def fit_readouts(model, xs, ys):
    """The least-squares readout of every layer, over all prefixes at once: (layers+1, width+1), float64."""
    gram = moment = 0
    for H, y in probe_features(model, xs, ys):
        H = H.flatten(1, 2)  # (layers+1, prompts * (n+1), width+1)
        gram, moment = gram + H.mT @ H, moment + H.mT @ y.flatten()
    # A layer uses few of its directions at first; pinv leaves the unused ones alone.
    return (torch.linalg.pinv(gram, hermitian=True, rtol=1e-12) @ moment[..., None]).squeeze(-1)


def layer_predictions(model, xs, ys, readouts=None):
    """Every layer's predictions as a trajectory (layers+1, prompts, n+1); step 0 is the embedding.

    `readouts` (layers+1, width+1) come from fit_readouts; by default they are fitted on fresh prompts.
    """
    if readouts is None:
        readouts = fit_readouts(model, *fresh_prompts(model.config, model.config.probes, seed=1))
    return torch.cat([torch.einsum("lptw,lw->lpt", H, readouts) for H, _ in probe_features(model, xs, ys)], dim=1)


# %% [markdown]
# ## 7. Comparing two learners (Fu, section 4.1)
#
# How alike are two learners? Two that are both good make small errors; that says little. Do they make the *same*
# errors? Similarity of errors is the cosine between their error vectors over the prefixes t = 1..n of a prompt,
# averaged over prompts. (At t = 0 nobody knows anything, and every method predicts about 0.)
#
# Then the question of *rate*: which step of Newton does layer l resemble most? If the best match climbs by a constant
# number of Newton steps per layer, the network converges at Newton's rate.


# %%
def error_cosines(traj_a, traj_b, ys):
    """Cosines of the error vectors over t = 1..n, prompt by prompt: (len_a, len_b, prompts)."""

    def direction(trajectory):
        return F.normalize((trajectory.double() - ys.double())[..., 1:], dim=-1)

    return torch.einsum("apt,bpt->abp", direction(traj_a), direction(traj_b))


def similarity_of_errors(traj_a, traj_b, ys):
    """SimE, the mean cosine of error vectors, between every step of a and every step of b: (len_a, len_b)."""
    return error_cosines(traj_a, traj_b, ys).mean(-1)


def best_match(similarity):
    """For each step of a, the index of the step of b that is most similar: (..., len_a, len_b) -> (..., len_a)."""
    return similarity.argmax(-1)


def squared_error(trajectory, ys, d):
    """Mean squared error over d, prefix by prefix: (steps, n+1). Predicting 0 scores 1."""
    return (trajectory - ys).square().mean(1) / d


def bootstrap(values, rounds=1000):
    """Means over prompts of (..., prompts), for `rounds` resamples of the prompts: (rounds, ...)."""
    prompts = values.shape[-1]
    drawn = torch.randint(prompts, (rounds, prompts), generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(rounds, prompts, dtype=values.dtype).scatter_add_(1, drawn, torch.ones_like(drawn).to(values))
    return torch.einsum("rp,...p->r...", counts / prompts, values)


def interval(samples):
    """The middle 95% of bootstrap samples (rounds, ...): (2, ...)."""
    return torch.quantile(samples.double(), torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)


def line_fit(x, y):
    """Least-squares line through (x, y) along the last axis: slope, intercept and R^2, each (...)."""
    dx, dy = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    slope = (dx * dy).sum(-1) / dx.square().sum(-1)
    r2 = (slope * (dx * dy).sum(-1) / dy.square().sum(-1).clamp_min(TINY))
    return slope, y.mean(-1) - slope * x.mean(-1), r2


# %% [markdown]
# ## 8. One study, many figures
#
# A study is one configuration with everything its figures share, each thing computed when a figure first asks for it.

# %%
NEWTON_STEPS = list(range(0, 33))
GD_STEPS = sorted({round(2 ** (k / 2)) for k in range(0, 33)})  # 1, 2, 3, 4, 6, 8, 11, 16, ..., 65536
FIRST_LAYER = 3  # rates are fitted from here on: layers 1 and 2 only bring each y to its x, in the paper too

# Fu's Transformer (d = 20, n = 40, 12 layers): best-matching steps of layers 1..12, from figures 8 and 10 of v3
PAPER_NEWTON_STEPS = [1, 1, 2, 5, 8, 10, 14, 16, 20, 20, 21, 21]
PAPER_GD_STEPS = [1, 1, 4, 8, 32, 64, 256, 512, 1024, 4096, 4096, 4096]


@dataclasses.dataclass
class Match:
    """How the layers 1..L of a network match the steps of an algorithm, with bootstrap intervals over prompts."""

    counts: torch.Tensor  # (K,) the algorithm's step counts
    similarity: torch.Tensor  # (L, K) SimE
    best: torch.Tensor  # (L,) best-matching step counts
    best_interval: torch.Tensor  # (2, L)
    slope: float  # steps per layer, or doublings per layer, from FIRST_LAYER on
    intercept: float
    slope_interval: list
    r2: float


def match_layers(layers, trajectory, counts, ys, log2=False):
    """Match layers (layers+1, prompts, n+1), but for the embedding, to a trajectory whose step counts are `counts`.

    The line is fitted to the best-matching steps, or to their log2, against the layer.
    """
    counts = torch.as_tensor(counts, dtype=torch.float64)
    cosines = error_cosines(layers[1:], trajectory, ys)
    best = counts[best_match(cosines.mean(-1))]
    resampled = counts[best_match(bootstrap(cosines))]  # (rounds, L)
    first = min(FIRST_LAYER, len(best) - 1)
    numbers = torch.arange(first, len(best) + 1, dtype=torch.float64)

    def fit(steps):
        y = steps[..., first - 1 :]
        return line_fit(numbers, y.log2() if log2 else y)

    slope, intercept, r2 = (value.item() for value in fit(best))
    slopes = interval(fit(resampled)[0]).tolist()
    return Match(counts, cosines.mean(-1), best, interval(resampled), slope, intercept, slopes, r2)


class Study:
    """A configuration's model, its test prompts and the trajectories of all learners on them."""

    def __init__(self, config, clock):
        self.config, self.clock = config, clock
        self.ridge = config.noise**2  # under noise the best linear predictor is ridge regression with lambda = noise^2

    @functools.cached_property
    def model(self):
        with self.clock("training"):
            return train(self.config)

    @functools.cached_property
    def prompts(self):
        return fresh_prompts(self.config, self.config.prompts, seed=2)

    @functools.cached_property
    def layers(self):
        model = self.model
        with self.clock("probing"):
            return layer_predictions(model, *self.prompts)

    @functools.cached_property
    def newton(self):
        with self.clock("solvers"):
            return newton(*self.prompts, NEWTON_STEPS, ridge=self.ridge)

    @functools.cached_property
    def gd(self):
        with self.clock("solvers"):
            return gradient_descent(*self.prompts, GD_STEPS, ridge=self.ridge)

    @functools.cached_property
    def ols(self):
        with self.clock("solvers"):
            return ols(*self.prompts, ridge=self.ridge)

    @functools.cached_property
    def newton_match(self):
        return match_layers(self.layers, self.newton, NEWTON_STEPS, self.prompts[1])

    @functools.cached_property
    def gd_match(self):
        return match_layers(self.layers, self.gd, GD_STEPS, self.prompts[1], log2=True)

    def error(self, trajectory):
        """Squared error over d of a trajectory on the test prompts: (steps, n+1)."""
        return squared_error(trajectory, self.prompts[1], self.config.d)


# %% [markdown]
# ## 9. The figures of Part I
#
# Each figure is one function of a study. It returns the picture, the numbers behind it, and the claims it tests.


# %%
@dataclasses.dataclass
class Claim:
    """One claim of a paper, and what this run measured. `holds` is decided by the rule that `claim` states."""

    where: str
    claim: str
    paper: str
    here: str
    holds: bool


BLUE, VERMILLION, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "#888888"  # Okabe and Ito's palette, safe for all eyes
COLOR = {"Transformer": VERMILLION, "Newton": BLUE, "GD": GREEN, "paper": GRAY, "OLS": "black"}
STYLE = {"figure.dpi": 150, "font.size": 10, "axes.titlesize": 10.5, "axes.titlelocation": "left", "legend.frameon": False,
         "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
         "figure.constrained_layout.use": True, "lines.linewidth": 1.8, "lines.markersize": 4}  # fmt: skip
plt.rcParams.update(STYLE)

FIGURES = {}  # name -> function of a study, in the order in which they are made


def figure(function):
    """Register a function (study) -> (picture, numbers, claims) under its name."""
    FIGURES[function.__name__] = function
    return function


def shades(count):
    """`count` colours from dark to light, for an ordered family of curves."""
    return plt.get_cmap("viridis")(torch.linspace(0, 0.9, count).numpy())


@figure
def solvers(study):
    """Gradient descent and Newton alone: what is to be told apart. Needs no training."""
    d, n, picture = study.config.d, study.config.n, plt.figure(figsize=(8, 3.4))
    axes, numbers = picture.subplots(1, 2, sharey=True), {"gd_steps": GD_STEPS, "newton_steps": NEWTON_STEPS}
    for ax, kappa in zip(axes, (1.0, 100.0)):
        xs, ys = fresh_prompts(dataclasses.replace(study.config, kappa=kappa if d > 1 else 1.0), 512, seed=3)
        for name, steps, solver in (("GD", GD_STEPS, gradient_descent), ("Newton", NEWTON_STEPS, newton)):
            error = squared_error(solver(xs, ys, steps, ridge=study.ridge), ys, d)[:, n]
            numbers[f"{name.lower()}_error_kappa_{kappa:g}"] = error.tolist()
            ax.loglog(steps, error.clamp_min(1e-13), "o-", color=COLOR[name], label=name)
        floor = squared_error(ols(xs, ys, study.ridge), ys, d)[0, n].clamp_min(1e-13)
        ax.axhline(floor, color=COLOR["OLS"], linestyle=":", label="least squares (to float32 data)")
        ax.set(title=f"condition number {kappa:g}", xlabel="steps of the algorithm (log scale)")
    axes[0].set_ylabel(f"squared error / d after {n} examples")
    axes[0].legend()
    picture.suptitle("Newton needs a dozen steps where gradient descent needs hundreds, or many thousands")
    return picture, numbers, []


@figure
def convergence(study):
    """Fu, figure 2: squared error against layers, Newton's steps and gradient descent's steps."""
    config, picture = study.config, plt.figure(figsize=(10, 3.6))
    lengths = sorted({config.d - 1, config.d, (3 * config.d + 1) // 2, 2 * config.d, config.n} & set(range(1, config.n + 1)))
    panels = [("Transformer", "layers", range(config.layers + 1), study.layers),
              ("Newton", "steps", NEWTON_STEPS, study.newton), ("GD", "steps", GD_STEPS, study.gd)]  # fmt: skip
    numbers = {"prefix_lengths": lengths}
    for ax, (name, unit, steps, trajectory) in zip(picture.subplots(1, 3, sharey=True), panels):
        error = study.error(trajectory)
        numbers[name] = {"steps": list(steps), "error": error.tolist()}
        for t, color in zip(lengths, shades(len(lengths))):
            ax.semilogy(steps, error[:, t].clamp_min(1e-7), "o-", color=color, label=f"t = {t}")
        ax.set(title=f"{name}", xlabel=f"{unit} of {name}")
    ax.set(xscale="log", xlabel="steps of GD (log scale!)", ylim=(1e-7, 3))
    picture.axes[0].set_ylabel("squared error / d")
    ax.legend(title="after t examples", fontsize=8)
    picture.suptitle("Layer by layer, the Transformer's error falls as Newton's does; GD needs a log axis to be seen falling")
    return picture, numbers, []


def plot_similarity(ax, match, ylabel):
    """Heatmap of SimE, layers across and steps upwards; best matches as dots, their 95% intervals as bars."""
    L, K = match.similarity.shape
    image = ax.imshow(match.similarity.T, origin="lower", aspect="auto", cmap="cividis", vmin=0.5, vmax=1,
                      extent=(0.5, L + 0.5, -0.5, K - 0.5))  # fmt: skip
    rows = [torch.searchsorted(match.counts, x.contiguous()) for x in (match.best, *match.best_interval)]
    for layer, (best, low, high) in enumerate(zip(*rows), start=1):
        ax.plot([layer, layer], [low, high], color="white", linewidth=3, alpha=0.7, solid_capstyle="round")
        ax.plot(layer, best, "o", color=VERMILLION, markeredgecolor="white", markersize=7)
    ticks = range(0, K, 4)
    ax.set(xticks=range(1, L + 1), yticks=ticks, yticklabels=[f"{match.counts[i]:.0f}" for i in ticks])
    ax.set(xlabel="layer of the Transformer", ylabel=ylabel)
    ax.grid(False)
    return image


@figure
def heatmaps(study):
    """Fu, figures 3, 8 and 10: similarity of errors of layers against Newton's and gradient descent's steps."""
    picture = plt.figure(figsize=(9, 4))
    axes = picture.subplots(1, 2)
    plot_similarity(axes[0], study.newton_match, "steps of Newton")
    image = plot_similarity(axes[1], study.gd_match, "steps of GD (log scale)")
    picture.colorbar(image, ax=axes, label="similarity of errors", shrink=0.9)
    picture.suptitle("The ridge climbs straight on a linear axis of Newton steps, and on a logarithmic axis of GD steps")
    newton_match, gd_match = study.newton_match, study.gd_match
    numbers = {"newton_steps": NEWTON_STEPS, "newton_similarity": newton_match.similarity.tolist(),
               "gd_steps": GD_STEPS, "gd_similarity": gd_match.similarity.tolist()}  # fmt: skip
    ys = study.prompts[1]
    last = error_cosines(study.layers[-1:], torch.cat([study.ols, study.newton, study.gd]), ys)[0]  # (steps, prompts)
    split = 1 + len(NEWTON_STEPS)
    low, high = interval(bootstrap(last[0])).tolist()
    lead = bootstrap(last[1:split]).amax(-1) - bootstrap(last[split:]).amax(-1)
    low_lead, high_lead = interval(lead).tolist()
    numbers |= {"last_layer_to_ols": last[0].mean().item(), "last_layer_to_newton": last[1:split].mean(-1).max().item(),
                "last_layer_to_gd": last[split:].mean(-1).max().item()}  # fmt: skip
    return picture, numbers, [
        Claim("table 1", "the last layer makes the errors of Newton's limit, least squares: SimE >= .98", ".991",
              f"{numbers['last_layer_to_ols']:.3f} [{low:.3f}, {high:.3f}]", numbers["last_layer_to_ols"] >= 0.98),
        Claim("table 1", "it resembles Newton more than GD: SimE at the best step, interval of the difference above 0",
              ".991 vs .957", f"{numbers['last_layer_to_newton']:.4f} vs {numbers['last_layer_to_gd']:.4f}, "
              f"difference [{low_lead:.4f}, {high_lead:.4f}]", low_lead > 0),
    ]  # fmt: skip


@figure
def rates(study):
    """Fu, figure 3: best-matching steps against the layer. A line for Newton, a line on a log axis for GD."""
    picture = plt.figure(figsize=(9, 3.8))
    axes, numbers, claims = picture.subplots(1, 2), {}, []
    rows = [("Newton", study.newton_match, PAPER_NEWTON_STEPS, "steps", "2.93, R^2 .995"),
            ("GD", study.gd_match, PAPER_GD_STEPS, "doublings", "1.42, R^2 .993")]  # fmt: skip
    for ax, (name, match, paper, unit, paper_fit) in zip(axes, rows):
        layers = torch.arange(1, len(match.best) + 1)
        reach = (match.best_interval - match.best).abs()
        line = match.intercept + match.slope * layers[FIRST_LAYER - 1 :]
        fit = f"{match.slope:.2f} {unit} per layer [{match.slope_interval[0]:.2f}, {match.slope_interval[1]:.2f}]"
        ax.plot(range(1, 13), paper, "s--", color=COLOR["paper"], markersize=4, linewidth=1, label="Fu: d = 20, 12 layers")
        ax.plot(layers[FIRST_LAYER - 1 :], line if name == "Newton" else 2**line, color=COLOR[name], alpha=0.5, label=f"{fit}")
        ax.errorbar(layers, match.best, reach, fmt="o", color=COLOR[name], capsize=3, label="best match, 95% over prompts")
        ax.set(xlabel="layer of the Transformer", ylabel=f"best-matching step of {name}", title=f"{match.slope:.1f} {unit} of {name} per layer (R$^2$ = {match.r2:.3f})")
        ax.legend(fontsize=8)
        numbers[name] = {"layers": layers.tolist(), "best": match.best.tolist(), "interval": match.best_interval.tolist(),
                         "slope": match.slope, "slope_interval": match.slope_interval, "r2": match.r2, "paper": paper}  # fmt: skip
        shape = "grow linearly, as steps" if name == "Newton" else "grow exponentially, as log2 steps"
        claims.append(Claim("fig. 3, 8" if name == "Newton" else "fig. 3, 10",
                            f"best-matching {name} steps {shape} per layer with R^2 >= .95", paper_fit,
                            f"{match.slope:.2f} [{match.slope_interval[0]:.2f}, {match.slope_interval[1]:.2f}], R^2 {match.r2:.3f}",
                            match.r2 >= 0.95 and match.slope_interval[0] > 0))  # fmt: skip
    axes[1].set_yscale("log", base=2)
    picture.suptitle("What one layer is worth: a few steps of Newton, but a multiplication of the steps of GD")
    return picture, numbers, claims


@figure
def progression(study):
    """Fu, figure 7: squared error against the number of examples, layer by layer, beside the matching Newton steps."""
    config, match = study.config, study.newton_match
    picture, colors, t = plt.figure(figsize=(9, 3.8)), shades(config.layers), range(config.n + 1)
    layers, steps, least = study.error(study.layers), study.error(study.newton), study.error(study.ols)[0]
    best = [NEWTON_STEPS.index(int(k)) for k in match.best]
    axes = picture.subplots(1, 2, sharey=True)
    for l, k in enumerate(best, start=1):
        axes[0].semilogy(t, layers[l].clamp_min(1e-7), "o-", color=colors[l - 1], label=f"layer {l}")
        axes[1].semilogy(t, steps[k].clamp_min(1e-7), "o-", color=colors[l - 1], label=f"step {NEWTON_STEPS[k]}")
    for ax, title in zip(axes, ("layers of the Transformer", "best-matching steps of Newton")):
        ax.semilogy(t, least.clamp_min(1e-7), ":", color=COLOR["OLS"], label="least squares")
        ax.axvline(config.d, color=GRAY, linewidth=0.8)
        ax.set(xlabel="examples in the prompt, t", title=title, ylim=(1e-7, 3))
        ax.legend(fontsize=7, ncols=2)
    axes[0].set_ylabel("squared error / d")
    picture.suptitle("Each layer knows as much as its Newton step, however many examples there are")
    return picture, {"best_newton_steps": match.best.tolist(), "layers": layers.tolist(), "ols": least.tolist()}, []


# %% [markdown]
# # The run
#
# The command line, the clock and the table at the end. Nothing to learn here.


# %%
class Clock:
    """Seconds per stage: `with clock("training"): ...`. Time spent in an inner stage is not counted in the outer."""

    def __init__(self):
        self.seconds, self.inner = {}, [0.0]

    @contextlib.contextmanager
    def __call__(self, stage):
        start = time.perf_counter()
        self.inner.append(0.0)
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[stage] = self.seconds.get(stage, 0.0) + elapsed - self.inner.pop()
            self.inner[-1] += elapsed


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a mistake on the command line raises ValueError with one line."""

    def error(self, message):
        raise ValueError(message)


def parse_config(arguments):
    """Command line -> Config. Flags and help are the fields and comments of Config; a preset sets other defaults."""
    helps = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.MULTILINE))
    parser = OneLineParser("icl_newton.py", description=__doc__.strip().split("\n\n")[0], allow_abbrev=False,
                           formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    for field in dataclasses.fields(Config):
        parser.add_argument(f"--{field.name}", type=field.type, default=field.default, help=helps[field.name])
    preset = parser.parse_known_args([a for a in arguments if a not in ("-h", "--help")])[0].preset
    if preset not in PRESETS:
        raise ValueError(f"--preset is one of {', '.join(PRESETS)}, not {preset}")
    parser.set_defaults(**PRESETS[preset])
    return Config(**vars(parser.parse_args(arguments)))


def require_writable(*folders):
    """Raise ValueError for a folder that cannot be made or written."""
    for folder in folders:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ValueError(f"cannot write into folder {folder}: {error.strerror}") from None


def peak_memory():
    """The most memory this process has held, in bytes; None where the system does not tell."""
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def print_claims(claims):
    """The table at the end: every claim, the paper's number, ours with its spread, and whether they agree."""
    print("\nWhat the paper says, what this run measured (95% over prompts in brackets), and whether they agree:\n")
    for c in claims:
        print(f"  {'agrees' if c.holds else 'FAILS ':<8}{c.claim} ({c.where})\n{'':10}paper {c.paper};  here {c.here}")


def run(config):
    """Make the figures that the configuration asks for, write results.json, and print the table of claims."""
    clock, fast = Clock(), matmul_rate()
    names = list(FIGURES) if config.figures == "all" else config.figures.split(",")
    device = config.torch_device
    print(f"Will train a Transformer ({config.layers} layers, width {config.width}) on linear regression with d = {config.d}, "
          f"n = {config.n}, and draw {', '.join(names)} into {config.out}/")  # fmt: skip
    print(f"Device: {device}" + f", {torch.get_num_threads()} threads, {fast / 1e9:.0f} GFLOP/s in a large matrix product; "
          f"expect about {config.steps * flops_per_step(config) / (0.5 * fast) + 15:.0f} s" * (device.type == "cpu"))  # fmt: skip

    study, claims = Study(config, clock), []
    results = {"config": dataclasses.asdict(config), "figures": {}}
    for name in names:
        picture, numbers, tested = FIGURES[name](study)
        path = Path(config.out) / f"{name}.png"
        with clock("pictures"):
            save_atomically(functools.partial(picture.savefig, format="png"), path)
        print(f"  {path}: {picture.get_suptitle()}", flush=True)
        plt.close(picture)
        results["figures"][name] = numbers
        claims += tested

    results |= {"claims": [dataclasses.asdict(c) for c in claims], "seconds": clock.seconds,
                "peak_memory_bytes": peak_memory(), "threads": torch.get_num_threads(), "torch": torch.__version__,
                "matrix_product_flops_per_second": fast}  # fmt: skip
    if "model" in vars(study):  # a figure asked for it
        seconds, error = study.model.training_seconds, study.error(study.layers)[-1]
        results |= {"training_seconds": seconds, "error_over_d_after_n_examples": error[config.n].item(),
                    "error_over_d_after_2d_examples": error[min(2 * config.d, config.n)].item(),
                    "training_flops_per_second": config.steps * flops_per_step(config) / seconds}  # fmt: skip
    text = json.dumps(results, indent=1)
    save_atomically(lambda path: path.write_text(text), Path(config.out) / "results.json")
    if claims:
        print_claims(claims)
    print(f"\nNumbers: {Path(config.out) / 'results.json'}. Seconds: "
          + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in clock.seconds.items()))  # fmt: skip


def main(arguments=None):
    """Run the command line; returns the exit status: 0, 1 (training diverged), 2 (bad input) or 130 (Ctrl-C)."""
    try:
        config = parse_config(sys.argv[1:] if arguments is None else arguments)
        require_writable(config.out, config.checkpoints)
    except ValueError as error:
        print(f"icl_newton: {error}", file=sys.stderr)
        return 2
    try:
        run(config)
    except FloatingPointError as error:
        print(f"icl_newton: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nicl_newton: stopped; the same command continues from the last checkpoint in {config.checkpoints}/",
              file=sys.stderr)  # fmt: skip
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
