# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy", "torch==2.13.0", "matplotlib"]
# ///
"""
Do Transformers that learn linear regression in context run Newton's method, layer by layer?

Give a Transformer a prompt x_1, y_1, ..., x_{n+1} whose answers come from a hidden rule y =
w*.x, new in every prompt. Trained on enough of them, it solves a *new* regression in one
forward pass. By which algorithm? Fu, Chen, Jia and Sharan (arXiv 2310.17086, "Fu") say: each
layer is worth a fixed number of steps of Iterative Newton; gradient descent would need
exponentially many. This file trains such a network on their problem in minutes, reads a
prediction out of every layer, lays it beside Newton, gradient descent (GD) and conjugate
gradient (CG), and asks whether the evidence could have said no.

    python icl_newton.py                    eight figures, results, a table of claims
    python icl_newton.py --preset quick     a first look in half a minute
    python icl_newton.py --figures rates    one figure; --help lists every setting

One idea carries the file: **every learner is a trajectory of predictions** (steps, prompts,
n+1): a method's steps, a network's layers. The same comparisons serve them all.

    Part I     the paper's claim: prompts, four learners, the network, two rulers, the figures
    Part II    theory that runs: Newton written by hand; linear attention; softmax attention
    Part III   machinery: claims, drawing, checkpoints, command line. Nothing to learn there.

Unlike Fu's: 8 layers of width 64, not 12 of 256; Muon and thousands of steps, not Adam and
500,000; GD's step size 1/lambda_max(S), not 0.01; SiLU, not GELU; positions start as
sinusoids.

Notation (Fu's). Shapes: prompts first, (prompts, n+1, d). P prompts, L layers, T tokens, W wide.
    d, n          dimension of x; examples in a prompt. The (n+1)-th x is the last query.
    t = 0..n      prefix length: every prompt asks n+1 questions, after 0, 1, ..., n examples
    Sigma, kappa  covariance of x and its condition number (1: isotropic)
    S, b          X^T X = sum_{i<=t} x_i x_i^T and X^T y of a prefix
    M             Newton's estimate of the inverse of S
"""

import argparse
import copy
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import nn

# %% Part I, the paper's claim. 1. Settings


def setting(default, text, *allowed):
    """A field of Config: its default, its help, and (least, most) or allowed words."""
    return dataclasses.field(default=default, metadata={"text": text, "allowed": allowed})


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting; its fields are the flags. ValueError for one that cannot work."""

    # These decide the weights of a network.
    d: int = setting(20, "dimension of x and of the hidden rule w*", 2, 256)
    n: int = setting(40, "examples in a prompt, at least d + 2", 4, 1024)
    kappa: float = setting(1.0, "condition number of the covariance of x (Fu: 1, 100)", 1, 1e6)
    noise: float = setting(0.0, "standard deviation of noise on y (Fu: 0, 0.1)", 0, 1e3)
    layers: int = setting(8, "layers of the Transformer", 4, 64)
    width: int = setting(64, "width of its residual stream", 2, 4096)
    heads: int = setting(2, "attention heads per layer; must divide the width", 1, 64)
    recipe: str = setting("muon", "muon; or fu: Adam at 1e-4, squared error", "muon", "fu")
    steps: int = setting(1500, "training steps; 0: an untrained network", 0, 10**7)
    tuning: int = setting(300, "further steps at kappa, if it is above 1", 0, 10**7)
    batch: int = setting(96, "fresh prompts per step", 1, 65_536)
    muon_lr: float = setting(0.014, "Muon's step size, for the layers' matrices", 1e-9, 1)
    adam_lr: float = setting(0.005, "AdamW's, for embedding, positions, readout", 1e-9, 1)
    curriculum: int = setting(12, "steps per added dimension; 0: all at once", 0, 10**6)
    seed: int = setting(1, "of weights and prompts", 0, 10**9)
    # These do not.
    seeds: int = setting(1, "how many networks to compare, from `seed` on", 1, 100)
    prompts: int = setting(640, "prompts to compare on; 4 times as many fit readouts", 2, 65_536)
    figures: str = setting("all", "which figures to make, by name, separated by commas")
    device: str = setting("auto", "auto: CUDA where there is one", "auto", "cpu", "cuda")
    out: str = setting("figures", "folder for pictures and results")
    checkpoints: str = setting("checkpoints", "folder for networks, trained and in training")

    def __post_init__(self):
        check(self)  # section 17


NOT_OF_WEIGHTS = "seeds", "prompts", "figures", "device", "out", "checkpoints"


# %% 2. Prompts (Fu, section 3)
# w* ~ N(0, I_d), x_i ~ N(0, Sigma), y_i = w*.x_i + noise. A new w* for every prompt: nothing
# can be memorised, so whatever predicts y_{t+1} must be an algorithm that runs on the prompt.

def sample_prompts(prompts, n, d, kappa=1.0, noise=0.0, generator=None):
    """Regression prompts xs (prompts, n+1, d), ys (prompts, n+1), float32, generator's device.

    kappa > 1: each prompt has its own covariance, a uniformly random eigenbasis whose first d//2
    eigenvalues are kappa times the others, of trace d (Fu, section 4.3). noise: the standard
    deviation of what is added to every y.
    """
    device = generator.device if generator else None
    draw = functools.partial(torch.randn, generator=generator, device=device)
    xs = draw(prompts, n + 1, d)
    if kappa != 1:
        eigenvalues = torch.ones(d, device=xs.device)
        eigenvalues[: d // 2] = kappa
        eigenvalues *= d / eigenvalues.sum()
        basis = torch.linalg.qr(draw(prompts, d, d)).Q
        xs = (xs * eigenvalues.sqrt()) @ basis.mT
    w_star = draw(prompts, d, 1)
    ys = (xs @ w_star).squeeze(-1)
    return xs, ys + noise * draw(prompts, n + 1)


def fresh_prompts(config, count, purpose):
    """Prompts that training never saw, on the CPU; each purpose, a number, has its own."""
    generator = torch.Generator().manual_seed(1_000_003 * config.seed + purpose)
    return sample_prompts(count, config.n, config.d, config.kappa, config.noise, generator)


# %% 3. Four classical learners (Fu, section 3.1)
# They see a prefix only through S = X^T X and b = X^T y, all prefixes at once, in float64.
# Noise of variance s^2 turns the best predictor's S into S + s^2 I: that is `ridge`.
#     least squares       w = pinv(S) b               the answer; of minimum norm while t < d
#     gradient descent    w <- w - eta (S w - b)      O(kappa log 1/eps) steps; kappa of S
#     Iterative Newton    M <- 2M - M S M,  w = M b   O(log kappa + log log 1/eps) steps
#     conjugate gradient  the best w in span(b, S b, S^2 b, ...): the best of all methods that
#                         multiply by S once a step; exact after d steps. It is our *control*:
#                         what it does, too, is no sign of Newton.
#
# Newton looks for the inverse of S. Let R_k = I - S M_k be what is missing from it. Then
#     R_{k+1} = I - S (2 M_k - M_k S M_k) = (I - S M_k)^2 = R_k^2,
# so 10^-3 becomes 10^-6, then 10^-12: digits double. Without noise w* - w_k = R_k w*, as M_k
# and S commute. Along an eigenvector of eigenvalue lambda, k steps of Newton, M_0 = alpha S,
# leave a share (1 - alpha lambda^2)^(2^k) of the error, m steps of GD (1 - eta lambda)^m.
#
# In practice? A direction is found when its share is small: when 2^k alpha lambda^2, or m eta
# lambda, is about 1. With alpha = 1/lambda_max^2 and eta = 1/lambda_max, Newton has found the
# directions with lambda > lambda_max 2^(-k/2), GD those with lambda > lambda_max/m. So at
# first a step of Newton widens its *reach* by 1.4; GD needs 1.4 times as many steps for the
# same. Once all directions are found, digits double. The figures mostly measure the first
# phase.
#
# Newton converges for alpha < 2/lambda_max(S)^2. Fu print the edge, 2/||S S^T||_2: one
# eigenvalue of R is -1 there, and its square never shrinks. And the order of factors matters:
# M S M forgets rounding errors; S M M or M M S lets them grow up to kappa-fold in every step.

TINY = 1e-30  # keeps the empty prefix, S = 0, from dividing by zero
RANK_TOLERANCE = 1e-12  # an eigenvalue below this share of the largest is rounding


def prefix_moments(xs, ys, ridge=0.0):
    """S (prompts, n+1, d, d), plus ridge I, and b (prompts, n+1, d) of the prefixes t = 0..n."""
    xs, ys = xs.double(), ys.double()
    S = (xs[..., :, None] * xs[..., None, :]).cumsum(1)  # of t + 1 examples, at entry t
    b = (ys[..., None] * xs).cumsum(1)
    # Shifted by one, since no prediction may see its own answer; and nothing is known at t = 0.
    S, b = F.pad(S[:, :-1], (0, 0, 0, 0, 1, 0)), F.pad(b[:, :-1], (0, 0, 1, 0))
    return S + ridge * torch.eye(xs.shape[-1]).to(S), b


def times(matrices, vectors):
    """Matrix times vector, batched: (..., a, d), (..., d) -> (..., a)."""
    return (matrices @ vectors[..., None]).squeeze(-1)


def predict(weights, xs):
    """Answer each prefix's query: weights (steps, prompts, n+1, d) -> (steps, prompts, n+1)."""
    return torch.einsum("kptd,ptd->kpt", weights, xs.double())


def ols(xs, ys, ridge=0.0):
    """Ordinary least squares, pinv(S) b: a trajectory of one step, (1, prompts, n+1)."""
    S, b = prefix_moments(xs, ys, ridge)
    inverse = torch.linalg.pinv(S, hermitian=True, rtol=RANK_TOLERANCE)
    return predict(times(inverse, b)[None], xs)


def gradient_descent(xs, ys, steps, ridge=0.0):
    """Gradient descent, w <- w - eta (S w - b) from w = 0: a trajectory (steps+1, prompts, n+1).

    eta is the textbook's safe step 1/lambda_max(S), prefix by prefix. Step 0 is w = 0. Float64.
    """
    S, b = prefix_moments(xs, ys, ridge)
    eta = 1 / torch.linalg.eigvalsh(S)[..., -1:].clamp_min(TINY)  # (prompts, n+1, 1)
    weights = [torch.zeros_like(b)]
    for _ in range(steps):
        weights.append(weights[-1] - eta * (times(S, weights[-1]) - b))
    return predict(torch.stack(weights), xs)


def gradient_descent_doubling(xs, ys, squarings, ridge=0.0):
    """The same after 0, 1, 2, 4, ..., 2^squarings steps: (squarings+2, prompts, n+1).

    m steps from 0 make w_m, and from any w they make B^m w + w_m, B = I - eta S. So 2m steps make
    B^m w_m + w_m, and B^m is squared as Newton squares its R.
    """
    S, b = prefix_moments(xs, ys, ridge)
    eta = 1 / torch.linalg.eigvalsh(S)[..., -1:].clamp_min(TINY)
    B, w = torch.eye(S.shape[-1]).to(S) - eta[..., None] * S, eta * b
    weights = [torch.zeros_like(b)]
    for _ in range(squarings + 1):
        weights.append(w)
        B, w = B @ B, times(B, w) + w
    return predict(torch.stack(weights), xs)


def newton_start(S):
    """A safe alpha for M_0 = alpha S (..., d, d): (..., 1, 1), finite for S = 0 too.

    At most 1/lambda_max(S)^2, so that no eigenvalue of R_0 = I - alpha S^2 is negative, and not
    much less, since every halving costs a step. In S's dtype, float32 too.
    """
    # The authors' code has 1/||S S^T||_F, which asks for no eigenvalues.
    return 1 / torch.linalg.matrix_norm(S @ S.mT, keepdim=True).clamp_min(TINY)


def newton(xs, ys, steps, alpha=None, ridge=0.0):
    """Iterative Newton, M <- 2M - M S M from M_0 = alpha S, w_k = M_k b (Fu, section 3.1).

    A trajectory (steps+1, prompts, n+1), float64; step 0 is M_0. alpha, a number, defaults to
    newton_start(S), prefix by prefix.
    """
    S, b = prefix_moments(xs, ys, ridge)
    M = (newton_start(S) if alpha is None else alpha) * S
    weights = [times(M, b)]
    for _ in range(steps):
        M = 2 * M - M @ S @ M
        weights.append(times(M, b))
    return predict(torch.stack(weights), xs)


def conjugate_gradient(xs, ys, steps, ridge=0.0):
    """Conjugate gradient on S w = b from w = 0: a trajectory (steps+1, prompts, n+1), float64.

    Each step goes to the lowest point along its direction, and directions are S-orthogonal to
    all earlier ones, so that nothing gained is lost again (Hestenes and Stiefel, 1952).
    """
    S, b = prefix_moments(xs, ys, ridge)
    residual, direction, weights = b, b, [torch.zeros_like(b)]
    energy = start = b.square().sum(-1, keepdim=True)  # (prompts, n+1, 1)
    for _ in range(steps):
        S_direction = times(S, direction)
        length = energy / (direction * S_direction).sum(-1, keepdim=True)
        length = torch.where(energy > 1e-28 * start, length, 0.0)  # only rounding is left: stop
        weights.append(weights[-1] + length * direction)
        residual = residual - length * S_direction
        before, energy = energy, residual.square().sum(-1, keepdim=True)
        direction = residual + energy / before.clamp_min(TINY) * direction
    return predict(torch.stack(weights), xs)


# %% 4. The Transformer
# A decoder like GPT-2: layers of causal attention and an MLP add to a residual stream. It
# predicts y_{t+1} at the token x_{t+1}. Normalised queries and keys keep large step sizes
# stable.
#
# Its first task is a copy: y_i must meet its x_i, one token to the left. Learned position by
# position, that copy is where training at d = 20 got stuck. Sinusoids make it one task, since
# a step to the left is the same rotation everywhere. So positions *start* as sinusoids, of a
# size that leaves the prompt heard, and are learned from there.

def interleave(xs, ys):
    """Prompts (prompts, n+1, d), (prompts, n+1) -> tokens (prompts, 2n+1, d): x_1, y_1, ...

    y is zero-padded to d entries, and the last y, the answer, is left out (Fu, section 3).
    """
    y_tokens = F.pad(ys[..., None], (0, xs.shape[-1] - 1))  # (prompts, n+1, d): y, 0, ..., 0
    return torch.stack([xs, y_tokens], dim=2).flatten(1, 2)[:, :-1]


def sinusoids(T, W):
    """A code for T positions (T, W): sines and cosines of periods of 2 pi to 200 pi tokens."""
    angles = torch.arange(T)[:, None] * 100.0 ** -torch.linspace(0, 1, (W + 1) // 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :W]


def normalize(h):
    """The one normalisation of the network, over the last axis: mean 0, variance 1."""
    return F.layer_norm(h, h.shape[-1:])


def causal_attention(q, k, v):
    """softmax(q k^T / sqrt(D) + mask) v for q, k, v (..., T, D): token i sees tokens 0..i."""
    T, D = q.shape[-2:]
    mask = torch.full((T, T), -math.inf, device=q.device).triu(1)  # 0 for the past, -inf after
    return (q / math.sqrt(D) @ k.mT + mask).softmax(-1) @ v  # (..., T, T) @ (..., T, D)


class Transformer(nn.Module):
    """Decoder-only Transformer; sizes from the Config."""

    def __init__(self, config):
        super().__init__()
        self.heads, L, W = config.heads, config.layers, config.width
        self.read_in = nn.Parameter(torch.randn(W, config.d) / math.sqrt(config.d))
        self.positions = nn.Parameter(0.3 * sinusoids(2 * config.n + 1, W))
        self.read_out = nn.Parameter(torch.zeros(W))
        # Standard deviations 1/sqrt(3 W), as torch.nn.Linear's; half that for what writes to h.
        self.attention = nn.Parameter(torch.randn(L, 4, W, W) / math.sqrt(3 * W))  # Q, K, V, O
        self.mlp = nn.Parameter(torch.randn(L, 2, 2 * W, W) / math.sqrt(3 * W))  # up, down^T
        with torch.no_grad():
            self.attention[:, 3] /= 2
            self.mlp[:, 1] /= 2

    def stream(self, xs, ys):
        """The residual stream (P, T, W) after the embedding and after every layer."""
        h = interleave(xs, ys) @ self.read_in.mT  # (P, T, d) @ (d, W)
        h = h + self.positions[: h.shape[1]]
        yield h
        for attention, (up, down) in zip(self.attention.unbind(), self.mlp.unbind()):
            h = h + self.attend(normalize(h), attention)
            h = h + F.silu(normalize(h) @ up.mT) @ down  # (P, T, W) -> (P, T, 2W) -> (P, T, W)
            yield h

    def attend(self, h, weights):
        """Multi-head causal attention on h (P, T, W) with weights Q, K, V, O (4, W, W)."""
        QKV = weights[:3].flatten(0, 1)  # (3W, W): one product in place of three
        qkv = (h @ QKV.mT).unflatten(-1, (3, self.heads, -1))  # (P, T, 3, heads, W/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (P, heads, T, W/heads)
        mixed = causal_attention(normalize(q), normalize(k), v)
        return mixed.transpose(1, 2).flatten(2) @ weights[3].mT  # heads side by side: (P, T, W)

    def states(self, xs, ys):
        """What probes see: the normalised x tokens of the stream, (L+1, P, n+1, W)."""
        return torch.stack([normalize(h[:, ::2]) for h in self.stream(xs, ys)])

    def forward(self, xs, ys):
        """Predictions (P, n+1) of ys: entry t is made at the token x_{t+1}."""
        *_, last = self.stream(xs, ys)
        return normalize(last[:, ::2]) @ self.read_out


# %% 5. Training
# The paper's Adam takes hundreds of thousands of steps (`--recipe fu` is it). Three changes
# make it thousands. First the loss. With e_t the error after t examples, it is
#     mean over t of  sqrt( mean over prompts of |e_t|^1.5 ).
# Late errors are a thousand times smaller than early ones, which no method can avoid; yet the
# late ones show how well a network computes. The root lets them count. And |e|^1.5 in place
# of e^2, since among squares a few unlucky prompts drown the rest.
#
# Second the optimiser. Muon (Keller Jordan, 2024) replaces each matrix's momentum by the
# nearest orthogonal matrix, so that all directions are learned at one speed. To find it takes
# five steps of X <- a X + b (X X^T) X + c (X X^T)^2 X, a relative of Newton's: they move
# every singular value s to a s + b s^3 + c s^5. Jordan's a, b, c drive it to about 1 fast.
#
# Third a curriculum (Garg et al., 2022): 2 dimensions and 2d + 2 examples at first, then
# more, up to d and n. Training at d = 20 does not start without it.

def orthogonalize(G):
    """Roughly the nearest orthogonal matrix to each of (..., m, n); tiny singular values lag."""
    X = G.mT if G.shape[-2] > G.shape[-1] else G  # work on the smaller side
    X = X / torch.linalg.matrix_norm(X, keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.mT if G.shape[-2] > G.shape[-1] else X


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for stacks of matrices (torch's own takes them one at a time)."""

    def __init__(self, params, lr, momentum=0.9):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        """One update, of the size of AdamW's: entries of about 0.2 lr (Liu et al., 2025)."""
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(average, group["momentum"]))
                p.sub_(update, alpha=group["lr"] * 0.2 * math.sqrt(max(p.shape[-2:])))


def make_optimizers(model, config):
    """AdamW, and Muon for the stacks of matrices; or the paper's Adam alone."""
    if config.recipe == "fu":
        return [torch.optim.Adam(model.parameters(), 1e-4)]
    rest = [model.read_in, model.positions, model.read_out]
    adam = torch.optim.AdamW(rest, config.adam_lr, (0.9, 0.99), weight_decay=0)
    return [adam, Muon([model.attention, model.mlp], config.muon_lr)]


def curriculum(config, step):
    """Active dimensions and examples of a training step: (d, n)."""
    d = min(2 + step // config.curriculum, config.d) if config.curriculum else config.d
    return d, config.n if d == config.d else min(2 * d + 2, config.n)


def training_step(model, optimizers, config, step, generator):
    """One step on fresh prompts. Returns their errors (batch, n+1), on the device."""
    d, n = curriculum(config, step)
    xs, ys = sample_prompts(config.batch, n, d, config.kappa, config.noise, generator)
    error = model(F.pad(xs, (0, config.d - d)), ys) - ys  # inactive dimensions are 0
    if config.recipe == "fu":
        loss, factor = error.square().mean(), 1.0
    else:
        typical = error.abs().clamp_min(TINY).pow(1.5).mean(0)  # (n+1,), prefix by prefix
        loss = typical.sqrt().mean()
        factor = min((step + 1) / 100, 1) * (1 - step / config.steps)  # of the step sizes
    loss.backward()
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * factor
        optimizer.step()
    model.zero_grad()
    return error.detach()


def train(config):
    """The trained network of `config`; a killed run goes on at its checkpoint, to the same bits.

    At kappa > 1 the network of kappa = 1 goes on, for `tuning` steps. FloatingPointError: errors
    are not finite. ValueError: the checkpoint is damaged.
    """
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    torch.manual_seed(config.seed)
    model = Transformer(config).to(device)
    if config.kappa > 1:
        model.load_state_dict(train(dataclasses.replace(config, kappa=1.0)).state_dict())
        config = dataclasses.replace(config, curriculum=0, steps=config.tuning)
    if config.steps == 0:
        return model.requires_grad_(False)
    generator = torch.Generator(device).manual_seed(config.seed)
    optimizers = make_optimizers(model, config)
    checkpoint = Checkpoint(config, model, optimizers, generator)  # section 16
    first, start = checkpoint.restore(), time.perf_counter()
    # Not even the best learner has an average of 0: t < d examples leave 1 - t/d unknown.
    best = sum(1 - t / config.d for t in range(config.d)) / (config.n + 1)
    at_best = f" (at best {best:.3f})" if config.kappa == 1 and config.noise == 0 else ""
    for step in range(first, config.steps):
        error = training_step(model, optimizers, config, step, generator)
        done = step + 1
        if done % 250 == 0 or done == config.steps:
            d, size = curriculum(config, step)[0], error.square().mean(0)  # (n+1,)
            if not size.isfinite().all():
                raise FloatingPointError(f"no finite error at step {done}: lower --muon_lr")
            left = (time.perf_counter() - start) / (done - first) * (config.steps - done)
            print(f"  step {done}, d = {d}: error / d {size[-1] / d:.4f} after the last example, "
                  f"{size.mean() / d:.3f} on average{at_best}; {left:.0f} s left", flush=True)
            checkpoint.save(done)
    return model.requires_grad_(False)


# %% 6. What does each layer know? (Fu, section 4.1)
# Fit, for every layer of the frozen network, the linear readout that predicts best from its
# state, on prompts other than those that judge it, and many: few would blur the last layer.

def least_squares_readout(H, y):
    """The r that minimises ||H r - y||: H (..., samples, width), y (samples,) -> (..., width).

    Of all best r the shortest, since a layer leaves directions of its state unused. All float64.
    """
    return times(torch.linalg.pinv(H.mT @ H, hermitian=True, rtol=1e-12), times(H.mT, y))


@torch.no_grad()
def probe_features(model, xs, ys):
    """All layers' states and a constant 1, float64, on the CPU: (L+1, prompts, n+1, W+1)."""
    device = model.read_out.device
    return F.pad(model.states(xs.to(device), ys.to(device)).double().cpu(), (0, 1), value=1.0)


def read_layers(model, fitting, prompts):
    """The layers as a trajectory on `prompts`, (L+1, prompts, n+1); step 0 is the embedding.

    fitting, prompts: pairs (xs, ys). Readouts are fitted on the first, all prefixes at once.
    """
    H = probe_features(model, *fitting).flatten(1, 2)  # (L+1, samples, W+1)
    readouts = least_squares_readout(H, fitting[1].double().flatten())
    return torch.einsum("lptw,lw->lpt", probe_features(model, *prompts), readouts)


NEWTON_STEPS = range(33)  # float64 is safe for about 40: off the span rounding doubles
GD_STEPS = [0, *(2**k for k in range(17))]  # 0, 1, 2, 4, ..., 65536


@functools.cache
def study(config):
    """A trained network's layers and three methods' steps, all on the same fresh prompts.

    xs, ys; least_squares (1, prompts, n+1); runs, {learner: (its counts of steps, trajectory)}.
    """
    fitting = fresh_prompts(config, 4 * config.prompts, purpose=1)
    xs, ys = fresh_prompts(config, config.prompts, purpose=2)
    layers = read_layers(train(config), fitting, (xs, ys))
    data = dict(xs=xs, ys=ys, ridge=config.noise**2)
    runs = {"Newton": (NEWTON_STEPS, newton(**data, steps=NEWTON_STEPS[-1])),
            "GD": (GD_STEPS, gradient_descent_doubling(**data, squarings=len(GD_STEPS) - 2)),
            "CG": (range(25), conjugate_gradient(**data, steps=24)),
            "Transformer": (range(len(layers)), layers)}
    return SimpleNamespace(xs=xs, ys=ys, runs=runs, least_squares=ols(**data))


# %% 7. Two rulers
# How many steps of Newton is a layer worth? *Similarity* (Fu, section 4.1) asks which step
# makes the most similar errors: the cosine between the vectors of errors that two learners
# make on a prompt, over the prefixes t = 1..n. (At t = 0 nobody knows anything; the authors'
# code counts it.) *Equal error* asks after how many steps Newton errs as little as the layer,
# after t examples. Any learner can stand in the layer's place, and one that is known should:
# Newton itself must give 0, 1, 2, ...

def similarity_of_errors(traj_a, traj_b, ys):
    """Fu's SimE: cosines of prediction - y over t = 1..n, averaged over prompts, in float64.

    (A, prompts, n+1), (B, prompts, n+1) -> (A, B), all pairs of steps; an error of 0 counts as 0.
    """
    a, b = (F.normalize((z.double() - ys)[..., 1:], dim=-1) for z in (traj_a, traj_b))
    return torch.einsum("apt,bpt->ab", a, b) / ys.shape[0]


def most_similar_steps(learner, run, ys):
    """Which steps of a run, a pair (counts, trajectory), a learner's steps are most like: (A,)."""
    counts, trajectory = run
    return np.array(counts)[similarity_of_errors(learner, trajectory, ys).argmax(1)]


def squared_error(traj, ys, t):
    """Mean squared error after t examples, step by step: (steps,)."""
    return (traj[..., t] - ys[:, t]).square().mean(-1)


def equal_error_steps(errors, counts, run_errors):
    """After how many steps a run errs as little: errors (A,), counts, run_errors (B,) -> (A,).

    Between the run's steps log error is taken to be linear; should it rise, the least counts.
    """
    wanted, gained = (-z.clamp_min(TINY).log() for z in (errors, run_errors))
    return np.interp(wanted, gained.cummax(0).values, counts)


# Rates are measured from layer 3 on, as the paper's are: the first two gather each y to its
# x. Two shapes compete: a line, steps = a + b l, and an exponential, log2 steps = a + b l.
# R^2, the share of the variance that a fit explains, says which is closer; on six points no
# more than that.

FIRST_LAYER = 3


def line_fit(steps, first=FIRST_LAYER):
    """Slope and R^2 of the least-squares line through steps (L,) of layers 1..L, from `first` on.

    R^2 is 0 if the points neither rise nor fall.
    """
    y = np.asarray(steps)[first - 1 :]
    x = np.arange(len(y))
    slope = np.polyfit(x, y, 1)[0]
    return slope, (slope * x.std() / y.std()) ** 2 if np.ptp(y) > 1e-9 else 0.0


def doublings(steps):
    """log2 of numbers of steps; less than one step counts as one."""
    return np.log2(np.maximum(steps, 1))


# %% 8. The paper's figures
# An experiment draws one network's results into the panels of a `sheet` (section 15), which
# all seeds share. It returns the panels; the headline, with gaps for numbers; and the numbers
# that fill them and the claims (section 14): {key: measured} or {key: (measured, what it must
# beat)}.

PAPER = (  # Fu's Transformer (d = 20, n = 40): best matches of layers 1..12, figures 8 and 10
    [1, 1, 2, 5, 8, 10, 14, 16, 20, 20, 21, 21],  # steps of Newton, then of GD
    [1, 1, 4, 8, 32, 64, 256, 512, 1024, 4096, 4096, 4096])


def learning_curves(config, t):
    """Every learner's squared error after t examples: {learner: (counts, errors (counts,))}."""
    s = study(config)
    return {name: (counts, squared_error(run, s.ys, t)) for name, (counts, run) in s.runs.items()}


def climb(config, learner):
    """What a learner's steps 1..L match: three times (L,).

    Steps of Newton and of GD by similarity, and of Newton by equal error after n examples.
    """
    s, curves, L = study(config), learning_curves(config, config.n), config.layers
    run, errors = s.runs[learner][1][1 : L + 1], curves[learner][1][1 : L + 1]
    return (most_similar_steps(run, s.runs["Newton"], s.ys),
            most_similar_steps(run, s.runs["GD"], s.ys),
            equal_error_steps(errors, *curves["Newton"]))


def rates(config, sheet):
    """Fu, figures 3, 8, 10: the steps of Newton and GD that layers match; CG is the control.

    CG's rate counts all its steps until it is exact: it has no layers to lose.
    """
    axes = sheet("like which step of Newton?", "like which step of GD?",
                 "erring as which step of Newton?", xlabel="layer, or step", ylabel="step")
    axes[1].set_yscale("symlog", linthresh=1)
    climbs = {name: climb(config, name) for name in ("Newton", "CG", "Transformer")}
    for name, matched in [*climbs.items(), ("Fu's Transformer", PAPER)]:
        for ax, steps in zip(axes, matched):
            curve(ax, name, steps)
    (to_newton, to_gd, equal), (cg, _, cg_equal) = climbs["Transformer"], climbs["CG"]
    rate, line = line_fit(to_newton)
    gd_rate, exponential = line_fit(doublings(to_gd))
    title = "A layer is worth {newton_rate[0]:.1f} Newton steps, a step of CG {newton_rate[1]:.1f}"
    return axes, title + "; by error {equal_rate[0]:.1f} and {equal_rate[1]:.1f}", {
        "newton_rate": (rate, line_fit(cg[: config.d - 1], 1)[0]),
        "equal_rate": (line_fit(equal)[0], line_fit(cg_equal[: config.d - 1], 1)[0]),
        "newton_line": (line, line_fit(doublings(to_newton))[1]),
        "gd_exponential": (exponential, line_fit(to_gd)[1]),
        "gd_rate": gd_rate, "newton_steps": to_newton, "gd_steps": to_gd}


def draw_learning_curves(ax, config, t):
    """Every learner's squared error / d after t examples; returns learning_curves."""
    curves = learning_curves(config, t)
    for name, (counts, errors) in curves.items():
        curve(ax, name, errors / config.d, counts)
    return curves


def convergence(config, sheet):
    """Fu, figure 2: squared error of all four learners, against the layer or step."""
    axes = sheet(f"after all {config.n} examples", f"after d + 2 = {config.d + 2} examples",
                 xlabel="layer or step", ylabel="squared error / d", yscale="log",
                 ylim=(1e-7, 2), xlim=(0, 24))
    errors = draw_learning_curves(axes[0], config, config.n)["Transformer"][1]
    draw_learning_curves(axes[1], config, config.d + 2)
    digits = -errors[FIRST_LAYER - 1 :].log10().diff()  # gained by layers 3..L
    early, late = digits[: len(digits) // 2], digits[-(len(digits) // 2) :]
    title = f"After {config.n} examples the last layer's squared error / d is {{error:.1e}}"
    gained = late.mean(), max(early.mean(), 0.1)  # a tenth of a digit at least
    return axes, title, {"error": errors[-1] / config.d, "superlinear": gained}


# What is similarity made of? Most of an error no method can avoid: t < d examples do not
# determine w*. So a *null* keeps each layer's best Newton step and its deviations from that
# step, but gives the deviations to other prompts, with random signs. Its score needs no
# resemblance.

def null_similarity(layers, steps, ys):
    """SimE (L,) of layers (L, P, n+1) with steps (L, P, n+1) when deviations are shuffled."""
    generator = torch.Generator().manual_seed(0)
    others = torch.randperm(len(ys), generator=generator)
    signs = 2 * torch.randint(2, (len(ys), 1), generator=generator) - 1
    shuffled = steps + (layers - steps)[:, others] * signs
    return similarity_of_errors(shuffled, steps, ys).diagonal()


def heatmaps(config, sheet):
    """Fu, figures 3, 8, 10: similarity of errors; beside it what a null and t > d alone score."""
    s, d = study(config), config.d
    axes = sheet("similarity to steps of Newton", "to steps of GD", "at the best step",
                 xlabel="layer", ylabel="step")
    layers, newton = s.runs["Transformer"][1][1:], s.runs["Newton"][1]
    alike = {name: similarity_of_errors(layers, s.runs[name][1], s.ys) for name in ("Newton", "GD")}
    for ax, (name, z) in zip(axes, alike.items()):  # z (L, steps)
        curve(axes[2], name, z.amax(1))
        if not ax.collections:  # the first seed's
            x, counts = range(1, len(layers) + 1), s.runs[name][0]
            mesh = ax.pcolormesh(x, range(len(counts)), z.T, vmin=0.5, vmax=1)
            ax.figure.colorbar(mesh, ax=ax)
            ax.plot(x, z.argmax(1), "ow", markeredgecolor="black", label="best step")
            ax.set_yticks(range(0, len(counts), 4), counts[::4])
    null = null_similarity(layers, newton[alike["Newton"].argmax(1)], s.ys)
    late = similarity_of_errors(layers[..., d:], newton[..., d:], s.ys[:, d:])
    curve(axes[2], "shuffled null", null)
    curve(axes[2], "Newton, t > d alone", late.amax(1), style=":")
    axes[2].set(ylabel="similarity of errors", ylim=(0, 1.03))
    to_newton, to_gd = (z[-1].max() for z in alike.values())
    title = "The last layer's similarity to Newton is {null[0]:.3f}; shuffled, it is {null[1]:.3f}"
    return axes, title, {
        "null": (to_newton, null[-1]), "like_newton": (to_newton, to_gd),
        "like_ols": similarity_of_errors(layers[-1:], s.least_squares, s.ys)[0, 0]}


# %% 9. A ruler that can say no: how many products with S is a layer worth?
# A first-order method multiplies a vector by S once a step. Let its step sizes and momenta be
# fixed in advance, in units of 1/lambda_max(S). Two steps of GD with sizes u, v, from w = 0:
#     w_1 = u b,    w_2 = w_1 - v (S w_1 - b) = (u + v) b - u v S b.
# Whatever u and v are, w_2 = c_0 b + c_1 S b: a polynomial of S, of degree 1, times b, the
# same for all prompts. D steps make one of degree D - 1. So the polynomial that is best on
# average errs at most as much as *every* such method of D steps, and least squares finds it,
# for each D and t. D*(l) is the D whose best polynomial errs as layer l does: a network that
# makes one such step a layer has D*(l) <= l. More than that no first-order method with fixed
# sizes can do.
#
# Not covered is CG, which finds its sizes on the prompt: it is drawn beside. And Newton
# starts slower than one: k steps reach lambda_max 2^(-k/2), the best D products
# lambda_max/D^2, so that at first Newton's D* is but 2^(k/4).

MOST_PRODUCTS = 128


def polynomial_features(xs, ys, t):
    """x_q^T T_j(2 S/lambda_max - I) b/lambda_max after t examples, j < 128: (prompts, 128).

    T_j are Chebyshev's polynomials: the same span as powers of S, but far better conditioned.
    """
    X, x_q = xs[:, :t].double(), xs[:, t].double()
    eigenvalues, U = torch.linalg.eigh(X.mT @ X)
    largest = eigenvalues[:, -1:]
    weight = times(U.mT, x_q) * times(U.mT, times(X.mT, ys[:, :t].double())) / largest
    T = np.polynomial.chebyshev.chebvander(2 * eigenvalues / largest - 1, MOST_PRODUCTS - 1)
    return torch.einsum("pd,pdj->pj", weight, torch.from_numpy(T))


def polynomial_errors(config, t):
    """Squared errors after t examples of the best methods of 0..128 products: (129,).

    Measured on the prompts of `study`; the methods are fitted on others.
    """
    fitting, s = fresh_prompts(config, 20_000, purpose=3), study(config)
    fit, test = (polynomial_features(*prompts, t) for prompts in (fitting, (s.xs, s.ys)))
    Q, R = torch.linalg.qr(fit)  # one orthonormal basis serves all degrees
    basis = torch.linalg.solve_triangular(R, test, upper=True, left=False)  # (prompts, 128)
    parts = basis * (Q.mT @ fitting[1][:, t].double())
    answers = F.pad(parts.cumsum(1), (1, 0))  # no product, no answer
    return (answers - s.ys[:, t, None]).square().mean(0)


def products(config, sheet):
    """New: D* of the layers, of Newton's steps and of CG's, after d and after n examples."""
    L, found = config.layers, {}
    axes = sheet(f"after d = {config.d} examples", f"after all {config.n}", yscale="log",
                 xlabel="layer or step", ylabel="worth in products with S",
                 ylim=(0.8, MOST_PRODUCTS))
    for ax, name, t in zip(axes, "dn", (config.d, config.n)):
        x, best, curves = range(1, L + 1), polynomial_errors(config, t), learning_curves(config, t)
        ax.fill_between(x, 0.8, x, color="#DDDDDD", label="one product a layer, or less")
        for label in ("Newton", "CG", "Transformer"):
            worth = equal_error_steps(curves[label][1][1 : L + 1], range(len(best)), best)
            curve(ax, label, worth)
        found[f"products_{name}"] = worth[-1], L  # the Transformer's, which came last
    title = f"The last of {L} layers is worth {{products_d[0]:.0f}} products with S after d"
    return axes, title + " examples, {products_n[0]:.0f} after n", found


# %% 10. Ill-conditioned data (Fu, section 4.3)
# For one error GD may need kappa times the steps, Newton 2 log2 kappa more. (Fu: over 2,000;
# 21.) The network for kappa = 100 goes on from the one for kappa = 1, for `tuning` steps.

def conditioning(config, sheet):
    """Fu, figures 4, 16: errors at kappa 1 and 100, and the steps that err as the last layers."""
    axes = sheet("kappa = 1", "kappa = 100", xlabel="layer or step", xscale="symlog", yscale="log",
                 ylabel=f"squared error / d after {config.n} examples", ylim=(1e-7, 2))
    steps = []  # of Newton and of GD, at kappa 1, then at 100
    for ax, kappa in zip(axes, (1.0, 100.0)):
        curves = draw_learning_curves(ax, dataclasses.replace(config, kappa=kappa), config.n)
        last = curves["Transformer"][1][-1:]
        steps += [equal_error_steps(last, *curves[name])[0] for name in ("Newton", "GD")]
    title = "At kappa = 100 the last layer errs as Newton after {kappa_newton[0]:.0f} steps"
    return axes, title + ", GD after {kappa_gd[0]:.0f}", {
        "kappa_newton": (steps[2], 1.5 * steps[0]), "kappa_gd": (steps[3], 4 * max(steps[1], 1))}


# %% What Part I found
# Three networks (README has the table) climb Newton's ladder as the paper's does: two steps a
# layer, along its own points, while GD's steps double from layer to layer. CG, the best
# first-order method, climbs 1.3 steps a step: it starts faster, and flattens where the layers
# go on. By equal error the difference is smaller. After d examples the last layer errs less than
# any first-order method of as many steps with fixed sizes; after n it ties. And similarity alone
# says little: deviations taken from other prompts score nearly the same, and so does GD. So a
# layer is as fast as some steps of Newton. That it *is* Newton does not follow from its rate.


# %% Part II, theory that runs. 11. Newton's weights, written by hand (Fu, theorem 5.1)
# Why is Newton possible in attention at all? Because attention makes sums over examples. Let
# an example be one token [T x_j ; x_j ; y_j], where T is to become M. Attention has ReLU in
# place of softmax, and two heads of opposite sign: ReLU(s) - ReLU(-s) = s. (The printed proof
# gives both values one sign, which makes |s|; and scores <T x_j, x_t>, which make T S T^T:
# that doubles antisymmetric rounding.) With j over the examples:
#     first layer      T = alpha S         adds  alpha sum_j x_j <x_j, x_t>  to the top block
#     Newton layer     T <- 2T - T S T     adds  -1/2 T S T x_t  to it, and the MLP doubles it
#     readout layer    x_q^T T b           adds  sum_j y_j <T x_j, x_q>  to the query's empty y
# So k steps take k + 2 layers; Fu's proof spends k + 8. Two costs: one alpha for all prompts;
# and every example must see all others, which our Transformer's causal mask forbids.

def relu_attention(h, heads, mask):
    """h_t + sum over heads (Q, K, V) and j of mask[t, j] ReLU(<Q h_t, K h_j>) V h_j, all t."""
    return h + sum((mask * ((h @ Q.mT) @ (h @ K.mT).mT).relu()) @ (h @ V.mT) for Q, K, V in heads)


def token_blocks(d):
    """(d, 2d+1), (d, 2d+1), (1, 2d+1) that read T x, x, y of a token; transposed, they write."""
    return torch.eye(2 * d + 1, dtype=torch.float64).split([d, d, 1])


def linear_heads(Q, K, V):
    """Two ReLU heads that add sum_j <Q h_t, K h_j> V h_j: ReLU(s) V - ReLU(-s) V = s V."""
    return [(Q, K, V), (-Q, K, -V)]


def newton_layer(d):
    """The weights of one Newton step: tokens [T x ; x ; y] -> [(2T - T S T) x ; x ; y].

    S = sum_j x_j x_j^T over the examples. Attention does its part in the top block, then the MLP
    h + down ReLU(up h) doubles that block. All float64: heads, two (Q (d, 2d+1), K (d, 2d+1),
    V (2d+1, 2d+1)), and mlp = (up (2d, 2d+1), down (2d+1, 2d)).
    """
    Tx, x, _ = token_blocks(d)
    heads = linear_heads(Q=Tx, K=x, V=-0.5 * Tx.mT @ Tx)
    up = torch.cat([Tx, -Tx])  # the MLP adds ReLU(s) - ReLU(-s) = s to each entry s of the block
    return heads, (up, up.mT)


def construction(xs, ys, steps, alpha):
    """Newton in ReLU attention: answers to the last query after 0..steps, (steps+1, P)."""
    Tx, x, y = token_blocks(xs.shape[-1])
    heads, (up, down) = newton_layer(xs.shape[-1])
    mask = torch.ones(xs.shape[1], xs.shape[1], dtype=torch.float64)  # [token, key]
    mask[:, -1] = 0  # the query is no example
    h = torch.cat([0 * xs, xs, ys[..., None]], dim=-1).double()  # (prompts, n+1, 2d+1)
    h[:, -1, -1] = 0  # to be filled in
    h = relu_attention(h, linear_heads(Q=x, K=x, V=alpha * Tx.mT @ x), mask)
    answers = []
    for _ in range(steps + 1):
        filled = relu_attention(h, linear_heads(Q=x, K=Tx, V=y.mT @ y), mask)
        answers.append(filled[:, -1, -1])
        h = relu_attention(h, heads, mask)
        h = h + (h @ up.mT).relu() @ down.mT
    return torch.stack(answers)


def by_hand(config, sheet):
    """Fu, theorem 5.1: hand-written weights against Newton, with the smallest alpha for all."""
    axes = sheet("", xlabel="layer or step k", ylabel="squared error / d", yscale="log")
    xs, ys = fresh_prompts(config, 256, purpose=2)
    steps, alpha = NEWTON_STEPS[-1], newton_start(prefix_moments(xs, ys)[0][:, -1]).min()
    ours, hand = newton(xs, ys, steps, alpha)[..., -1], construction(xs, ys, steps, alpha)
    for name, answers, style in (("Newton", ours, "-"), ("Transformer by hand", hand, " ")):
        errors = (answers - ys[:, -1]).square().mean(1) / config.d
        curve(axes[0], name, errors, NEWTON_STEPS, style)
    apart = (hand - ours).abs().max() / ys.square().mean().sqrt()
    title = "Attention with hand-written weights is Newton's method, to {by_hand:.0e}"
    return axes, title, {"by_hand": apart}


# %% 12. Linear attention is preconditioned gradient descent (Ahn et al., arXiv 2306.00297)
# Without softmax, what a trained layer does can be read off its weights. A prompt is a matrix
# Z, one token a column; I_0 = diag(I_n, 0): the query is no example; e = (0, ..., 0, 1):
#     Z = [ x_1 ... x_n  x_q ]      Z <- Z + (1/n) P Z I_0 (Z^T Q Z)
#         [ y_1 ... y_n   0  ]      P = e e^T      Q = -blockdiag(A, 0)
# Only the last row changes, y_j <- y_j - (1/n) sum_{i<=n} y_i x_i^T A x_j. It holds y_j -
# w.x_j, with w = 0 at first, and -w.x_q under the query. So a layer adds A^T r to w, r =
# (1/n) sum_i (y_i - w.x_i) x_i being minus the gradient of R(w) = (1/2n) sum_i (w.x_i -
# y_i)^2: for a symmetric A, w <- w - A grad R(w) (lemma 1). What is left to learn is A. For
# one layer and w ~ N(0, I) the problem is convex, the loss quadratic in A: with endless
# examples the best A is a Newton step, Sigma^-1; with few it moves less along small
# eigenvalues (theorem 1).

def linear_attention(A, xs, ys):
    """One layer's answers (P,) to the last query, minus the last entry of the new Z; A (d, d)."""
    examples, queries = xs[:, :-1], xs[:, -1]
    b = times(examples.mT, ys[:, :-1]) / examples.shape[1]
    return (b @ A * queries).sum(-1)


def optimal_preconditioner(Sigma, n):
    """The A (d, d) of least expected squared error for one layer (Ahn, theorem 1).

    For n examples and a query x ~ N(0, Sigma), w ~ N(0, I). It has Sigma's eigenvectors.
    """
    # The loss is quadratic in A. E S^2 = n (n+1) Sigma^2 + n tr(Sigma) Sigma makes its minimum,
    # for each eigenvalue lambda of Sigma, 1 / ((n+1)/n lambda + tr(Sigma)/n).
    eigenvalues, U = torch.linalg.eigh(Sigma)
    return U / ((n + 1) / n * eigenvalues + eigenvalues.sum() / n) @ U.mT


def train_preconditioner(root, n, steps, seed):
    """A (d, d), trained by Muon on n examples x = root N(0, I), w ~ N(0, I)."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    A = (0.1 * draw(root.shape)).requires_grad_()
    optimizer = Muon([A], lr=0.06, momentum=0.8)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.06 * (1 - step / steps)
        xs = draw(1000, n + 1, len(root)) @ root.mT
        ys = times(xs, draw(1000, len(root)))
        optimizer.zero_grad()
        F.mse_loss(linear_attention(A, xs, ys), ys[:, -1]).backward()
        optimizer.step()
    return A.detach()


def preconditioners(config, sheet):
    """Ahn, theorem 1, in the sizes of Ahn's figures: a trained layer's A, entry by entry."""
    d, n, norm = 5, 20, torch.linalg.matrix_norm
    U = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(config.seed))).Q
    spectrum = torch.tensor([1, 1, 1 / 4, 1 / 16, 1])
    closed = optimal_preconditioner((U * spectrum) @ U.mT, n)
    trained = train_preconditioner((U * spectrum.sqrt()) @ U.mT, n, 1000, config.seed)
    axes = sheet("entries of A", xlabel="in theorem 1", ylabel="as trained")
    axes[0].axline((0, 0), slope=1, color="#666666", label="equal")
    curve(axes[0], "Transformer", trained.flatten(), closed.flatten(), " ")
    title = "A layer of linear attention learns the predicted preconditioner, to {ahn_one:.1%}"
    return axes, title, {"ahn_one": norm(trained - closed) / norm(closed)}


# %% 13. Softmax attention learns in stages (Huang et al., arXiv 2310.05249)
# A token is one of K orthonormal features, v_k with probability p_k; its answer is w.v_k. One
# layer of softmax attention, with a matrix Q that starts at 0, averages a prompt's N answers:
#     yhat = sum_i softmax_i(x_i^T Q x_q) y_i = sum_n a_n w.v_n     a_n: attention on feature n
# For a query x_q = v_k, and E w w^T = I, the loss is 1/2 [(1 - a_k)^2 + sum_{n != k} a_n^2].
# Its gradient moves A_k = Q[k,k] and B_{k,n} = Q[n,k]. If all p_k are equal, the A_k grow
# together, past log K, where one right feature balances K wrong. With p_1 = 1/2 feature 1
# comes at once, but half of every other query's attention rests on it, too: first B_{k,1}
# falls, then A_k grows.

def train_attention(K, p_1, steps, seed, eta=2.0):
    """Gradient descent on Q, on fresh prompts of N = 10 K examples, queries weighted by p_k.

    Returns (2, steps): the loss of queries for feature 1; the mean loss of the others.
    """
    p = torch.tensor([p_1] + [(1 - p_1) / (K - 1)] * (K - 1))
    generator, path = torch.Generator().manual_seed(seed), []
    Q = torch.zeros(K, K, requires_grad=True)
    for _ in range(steps):
        tokens = torch.multinomial(p.expand(32, K), 10 * K, replacement=True, generator=generator)
        counts = F.one_hot(tokens, K).sum(1)
        attention = (counts.log()[:, :, None] + Q).softmax(1)  # [prompt, n, k]; log 0: not there
        losses = (attention - torch.eye(K)).square().sum(1).mean(0) / 2  # (K,), query by query
        (gradient,) = torch.autograd.grad(p @ losses, Q)
        Q.data -= eta * gradient
        path.append([losses[0].item(), losses[1:].mean().item()])
    return torch.tensor(path).T


def stages(config, sheet):
    """Huang, section 3: balanced features are learned together, a dominant one first."""
    axes = sheet("all features alike, p = 1/16", "feature 1 has p = 1/2", xlabel="training step",
                 ylabel="loss")
    for ax, p_1 in zip(axes, (1 / 16, 1 / 2)):
        path = train_attention(16, p_1, 3000, config.seed)
        ax.loglog(path[0], color="#0072B2", label="queries for feature 1")
        ax.loglog(path[1], color="#D55E00", label="queries for the others")
    first, others = (path > 0.1 * path[:, :1]).sum(1)  # steps above a tenth of the start
    title = "With a dominant feature the others are learned {huang:.0f} times later than it"
    return axes, title, {"huang": others / first}


# %% Part III, machinery. Nothing to learn here. 14. The claims, in the order of the story
# A claim is an inequality: a measured number against one to beat, fixed here before anything
# is measured, or measured beside it: a control. It holds in so many seeds. In brackets: the
# paper's number. On an untrained network (--steps 0 --tuning 0) no claim about layers may
# hold.

CLAIMS = {  # key: (what is said, the relation that must hold, the bound if it is fixed)
    "superlinear": ("fig. 2: later layers gain more digits than earlier", ">", None),
    "newton_line": ("fig. 3: Newton's steps: R^2 of a line, an exponential", ">", None),
    "newton_rate": ("fig. 3: Newton steps a layer (2.93), a step of CG", ">", None),
    "equal_rate": ("the same by equal error after n examples", ">", None),
    "gd_exponential": ("fig. 3: GD's steps: R^2 of an exponential, a line", ">", None),
    "like_newton": ("tab. 1: similarity to Newton (.991), to GD (.957)", ">", None),
    "like_ols": ("last layer's similarity to least squares", ">", 0.975),
    "products_d": ("products with S it is worth, after d; layers", ">", None),
    "products_n": ("the same after n examples", ">", None),
    "kappa_newton": ("fig. 4: Newton steps at kappa 100, 1.5 x those at 1", "<", None),
    "kappa_gd": ("fig. 4: GD steps at kappa 100, 4 x those at 1", ">", None),
    "by_hand": ("thm. 5.1: Newton in hand-written attention, to", "<", 1e-6),
    "ahn_one": ("Ahn, thm. 1: one layer is the closed form, to", "<", 0.03),
    "huang": ("Huang: other features take longer than feature 1, x", ">", 5),
}


def table(found):
    """The claims among found, {key: [each seed's measurement]}: lines of Markdown, and a record.

    The record: {claim: its values, what they must beat, in how many seeds it holds}.
    """
    lines = ["| claim (the paper's number) | measured, seed by seed | holds in |", "|---|---|---|"]
    record = {}
    for key, (sentence, relation, bound) in CLAIMS.items():
        if key in found:
            pairs = [z if bound is None else (z, bound) for z in found[key]]
            holds = sum(a > b if relation == ">" else a < b for a, b in pairs)
            record[key] = dict(zip(("values", "bounds"), zip(*pairs)), holds=holds)
            texts = [[f"{z:.3g}" for z in row] for row in zip(*pairs)]
            left, right = (" ".join(z if len(set(z)) > 1 else z[:1]) for z in texts)
            lines.append(f"| {sentence} | {left} {relation} {right} | {holds} of {len(pairs)} |")
    return lines, record


# %% 15. Drawing: one learner, one colour and mark, in every picture

LOOK = {"Transformer": ("#D55E00", "o"), "Newton": ("#0072B2", "s"), "GD": ("#009E73", "^"),
        "CG": ("#CC79A7", "D"), "Fu's": ("#666666", "x"), "shuffled": ("#666666", "x")}
STYLE = {"font.size": 10, "axes.grid": True, "axes.spines.top": False, "grid.alpha": 0.25,
         "axes.spines.right": False, "lines.markersize": 4, "lines.linewidth": 1.2}


@rc_context(STYLE)
def make_sheet(*titles, **settings):
    """The panels of an empty picture, one for each title; settings are those of every panel."""
    size = max(7.5, 4.2 * len(titles) + 0.8), 4.2  # inches
    picture = Figure(size, dpi=130, layout="constrained")
    axes = picture.subplots(1, len(titles), squeeze=False)[0]
    for ax, title in zip(axes, titles):
        ax.set(title=title, **settings)
    return axes


def curve(ax, label, y, x=None, style="-"):
    """Draw a line in the look of the label's first word; x defaults to 1, 2, ..."""
    color, mark = LOOK[label.split()[0].rstrip(",")]
    x = range(1, len(y) + 1) if x is None else x
    ax.plot(x, y, mark + style, color=color, label=label)


def draw(axes, title):
    """The picture of these panels, PNG bytes. Its one legend lies below and hides nothing."""
    buffer, picture = io.BytesIO(), axes[0].figure
    pairs = [zip(*ax.get_legend_handles_labels()[::-1]) for ax in axes]
    entries = {label: handle for pair in pairs for label, handle in pair}
    picture.legend(entries.values(), entries, loc="outside lower center", ncols=5, frameon=False)
    picture.suptitle(title)
    picture.savefig(buffer, format="png")
    return buffer.getvalue()


# %% 16. Checkpoints

def write_file(path, content):
    """Write bytes so that a kill leaves the old file or the new one. OSError: one line."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror}") from None


def form(z):
    """What a checkpoint is made of: keys, types, shapes, and whether all is finite."""
    if isinstance(z, torch.Tensor):
        return z.dtype, z.shape, bool(z.isfinite().all())
    if isinstance(z, dict):
        return {key: form(value) for key, value in z.items()}
    return [form(value) for value in z] if isinstance(z, (list, tuple)) else type(z)


class Checkpoint:
    """The file of one training; its name has a hash of all that decides the weights, code too."""

    def __init__(self, config, model, optimizers, generator):
        self.parts, self.generator, self.steps = [model, *optimizers], generator, config.steps
        # Code is known by what it does: rehearse the first and the last step on a copy.
        other, twin = copy.deepcopy(model), torch.Generator(generator.device).manual_seed(0)
        its_optimizers = make_optimizers(other, config)
        for step in (0, config.steps - 1):
            training_step(other, its_optimizers, config, step, twin)
        self.form = form(self.content(1, [other, *its_optimizers]))
        sums = [z.detach().double().sum().item() for m in (model, other) for z in m.parameters()]
        settings = {k: v for k, v in vars(config).items() if k not in NOT_OF_WEIGHTS}
        all_of_it = settings, sums, torch.__version__, torch.get_num_threads(), generator.device
        key = hashlib.sha256(repr(all_of_it).encode()).hexdigest()[:10]
        self.path = Path(config.checkpoints) / f"d{config.d}-seed{config.seed}-{key}.pt"

    def content(self, done, parts):
        """What a file holds: steps done; network and optimisers; the generator of prompts."""
        return {"done": done, "parts": [part.state_dict() for part in parts],
                "generator": self.generator.get_state()}

    def save(self, done):
        """Write where the training stands."""
        torch.save(self.content(done, self.parts), buffer := io.BytesIO())
        write_file(self.path, buffer.getvalue())

    def restore(self):
        """Go on where the training stood: returns the steps done. ValueError: a damaged file."""
        if not self.path.exists():
            return 0
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            if form(saved) != self.form or not 0 < saved["done"] <= self.steps:
                raise ValueError("it does not fit")  # no assert: python -O would let it pass
        except Exception:  # torch raises many kinds
            raise ValueError(f"{self.path} is damaged: delete it") from None
        for part, state in zip(self.parts, saved["parts"]):
            part.load_state_dict(state)
        self.generator.set_state(saved["generator"])
        return saved["done"]


# %% 17. The command line

EXPERIMENTS = {f.__name__: f for f in (by_hand, rates, convergence, heatmaps, products,
                                       conditioning, preconditioners, stages)}
PRESETS = {  # name: (the first line that a run prints, settings)
    "default": ("the paper's problem, d = 20 and n = 40, in a smaller network", {}),
    "quick": ("a first look at d = 5; its numbers are not to be trusted", dict(
        d=5, n=10, width=32, layers=6, steps=1500, batch=64, curriculum=0, prompts=256,
        figures="by_hand,rates,products", out="figures/quick")),
    "small": ("d = 5, n = 10, where conjugate gradient, too, looks like Newton", dict(
        d=5, n=10, width=40, steps=5000, batch=64, curriculum=0, prompts=2048,
        out="figures/small")),
    "long": ("the paper's problem, a longer training", dict(steps=10_000, out="figures/long")),
    "paper": ("the paper's problem, a network of the paper's size: for CUDA", dict(
        layers=12, width=256, heads=8, steps=12_000, batch=256, out="figures/paper")),
}


def check(config):
    """Raise ValueError, in one line, for a configuration that cannot work."""
    for field in dataclasses.fields(config):
        value, allowed = getattr(config, field.name), field.metadata["allowed"]
        if isinstance(value, str) and allowed and value not in allowed:
            raise ValueError(f"--{field.name}: {' or '.join(allowed)}, not {value!r}")
        if not isinstance(value, str) and not allowed[0] <= value <= allowed[1]:
            raise ValueError(f"--{field.name}: {allowed[0]} to {allowed[1]}, not {value}")
    known = {"all", *EXPERIMENTS}.issuperset(config.figures.split(","))
    grown = config.curriculum * (config.d - 2)
    for good, message in (
        (known, f"--figures: all, or some of {','.join(EXPERIMENTS)}"),
        (config.n >= config.d + 2, "--n: at least d + 2"),
        (config.width % config.heads == 0, "--heads: a divisor of --width"),
        (config.steps > grown or not config.steps, f"--steps: 0, or above --curriculum's {grown}"),
        (config.device != "cuda" or torch.cuda.is_available(), "--device cuda: none here"),
    ):
        if not good:
            raise ValueError(message)


def parse(arguments):
    """Command line -> (the preset's line, Config). Bad input: one line and exit status 2."""
    parser = argparse.ArgumentParser("icl_newton.py", usage=argparse.SUPPRESS, allow_abbrev=False)
    presets = "; ".join(f"{name}: {line}" for name, (line, _) in PRESETS.items())
    parser.add_argument("--preset", choices=PRESETS, default="default", help=presets)
    for field in dataclasses.fields(Config):
        text = f"{field.metadata['text']} (default: {field.default})"
        options = dict(type=field.type, default=argparse.SUPPRESS, help=text)
        parser.add_argument(f"--{field.name}", **options)
    given = vars(parser.parse_args(arguments))
    line, settings = PRESETS[given.pop("preset")]
    try:
        config = Config(**settings | given)
        for folder in (config.out, config.checkpoints):
            Path(folder).mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise ValueError(f"cannot write into {folder}")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return line, config


def run(config):
    """Make the figures, print the table of claims, write both and all numbers into `out`."""
    out, found, titles, start = Path(config.out), {}, {}, time.perf_counter()
    wanted, seeds = config.figures.split(","), range(config.seed, config.seed + config.seeds)
    for name in [name for name in EXPERIMENTS if name in wanted or "all" in wanted]:
        sheet, rows = functools.cache(make_sheet), []  # all seeds draw into the same panels
        for one in (dataclasses.replace(config, seed=seed, seeds=1) for seed in seeds):
            axes, title, numbers = EXPERIMENTS[name](one, sheet)
            rows.append({key: np.asarray(z, dtype=float).tolist() for key, z in numbers.items()})
        measured = {key: [row[key] for row in rows] for key in rows[0]}
        titles[name] = title.format(**{key: np.mean(z, axis=0) for key, z in measured.items()})
        found |= measured
        write_file(out / f"{name}.png", draw(axes, titles[name]))
        print(f"{time.perf_counter() - start:5.0f} s  {name}: {titles[name]}", flush=True)
    lines, results = table(found)
    record = dict(settings=vars(config), titles=titles, claims=results, measured=found)
    write_file(out / "results.json", json.dumps(record, indent=1).encode())
    write_file(out / "table.md", "\n".join(lines).encode())
    print("", *lines, "", *titles.values(), sep="\n")
    return results


def main(arguments=None):
    """Run the command line; the exit status: 0, 1 (a run failed), 2 (bad input) or 130 (Ctrl-C)."""
    line, config = parse(sys.argv[1:] if arguments is None else arguments)
    print(f"icl_newton: {line}")
    try:
        run(config)
    except (NotImplementedError, FloatingPointError, ValueError, OSError, MemoryError) as error:
        print(f"icl_newton: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nicl_newton: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__" and Path(globals().get("__file__", "")).is_file():
    # In a notebook, or from standard input, there is no file: call run(Config()).
    sys.exit(main())
