# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy", "torch==2.13.0", "matplotlib"]
# ///
"""
Do Transformers that learn linear regression in context run Newton's method, layer by layer?

Give a Transformer a prompt x_1, y_1, ..., x_{n+1} whose answers come from a hidden rule y =
w*.x, new in every prompt. Trained on enough of them, it solves a *new* regression in one
forward pass. By which algorithm? Fu, Chen, Jia and Sharan (arXiv 2310.17086, "Fu") say: each
layer is worth a few steps of Iterative Newton; of gradient descent (GD) it would take a number
that doubles with every layer. This file trains such a network, reads a prediction out of each
layer, lays it beside Newton, GD and conjugate gradient (CG), and asks if the evidence could
have said no.

    python icl_newton.py                   eight figures, a table of claims
    python icl_newton.py --preset quick    a first look; --help lists every setting

One idea carries the file: **every learner is a trajectory of predictions** (steps, prompts,
n+1): a method's steps, a network's layers. So one ruler measures them all.

    Part I     the paper's claim: prompts, four learners, the network, two rulers, the figures
    Part II    theory that runs: Newton by hand; linear attention; softmax attention
    Part III   machinery: claims, drawing, checkpoints, command line

Unlike Fu's: 8 layers, not 12, of width 64, not 256; Muon, not Adam; 1/lambda_max(S) for GD's
step size, not 0.01; SiLU, not GELU; positions start as sinusoids; another loss (section 5).

Notation (Fu's). P prompts, L layers, T tokens, W the width of the network.
    d, n          dimension of x; examples in a prompt. The (n+1)-th x is the last query.
    t = 0..n      length of a prefix: a prompt asks n+1 questions, after 0, ..., n examples
    Sigma, kappa  covariance of x and its condition number (1: isotropic)
    X, y          a prefix: its rows x_1, ..., x_t, and their answers
    S, b          X^T X = sum_i x_i x_i^T, and X^T y = sum_i y_i x_i
    M             Newton's estimate of the inverse of S
"""

import argparse
import copy
import dataclasses
import functools
import hashlib
import io
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# %% Part I, the paper's claim. 1. Settings


def setting(default, text, *allowed):
    """A field of Config: its default, help, and what is allowed: least and most, or words."""
    return dataclasses.field(default=default, metadata={"text": text, "allowed": allowed})


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting, a flag each. ValueError for one that cannot work."""

    d: int = setting(20, "dimension of x and of the hidden rule w*", 2, 256)
    n: int = setting(40, "examples in a prompt, at least d + 2", 4, 1024)
    kappa: float = setting(1.0, "condition number of Sigma (Fu: 1, 100)", 1, 1e6)
    noise: float = setting(0.0, "standard deviation of noise on y (Fu: 0, .1)", 0, 1e3)
    layers: int = setting(8, "layers of the Transformer", 4, 64)
    width: int = setting(64, "width of its residual stream", 2, 4096)
    heads: int = setting(2, "attention heads; a divisor of the width", 1, 64)
    recipe: str = setting("muon", "muon; or fu: Adam at 1e-4, squared error", "muon", "fu")
    steps: int = setting(2000, "training steps; 0, and tuning 0: untrained", 0, 10**7)
    batch: int = setting(96, "fresh prompts per step", 1, 65_536)
    muon_lr: float = setting(0.018, "Muon's step size, for the layers' matrices", 1e-9, 1)
    curriculum: int = setting(12, "steps per added dimension; 0: all at once", 0, 10**6)
    seed: int = setting(1, "of weights and prompts", 0, 10**9)
    # Those above decide a network's weights, these do not (tuning becomes its steps).
    tuning: int = setting(750, "further steps at kappa, if it is above 1", 0, 10**7)
    seeds: int = setting(1, "how many networks, from `seed` on", 1, 100)
    prompts: int = setting(640, "prompts to compare on; readouts: 4 times as many", 2, 65_536)
    figures: str = setting("all", "which figures, separated by commas")
    device: str = setting("auto", "auto: CUDA where there is one", "auto", "cpu", "cuda")
    out: str = setting("figures", "folder for pictures and results")
    checkpoints: str = setting("checkpoints", "folder for networks")

    def __post_init__(self):
        check(self)  # section 17


NOT_OF_WEIGHTS = "tuning", "seeds", "prompts", "figures", "device", "out", "checkpoints"


# Torch splits small tensors among its threads badly. So it gets one, and ours take a part of a
# batch each. Numbers are then the same on any number of cores.
THREADS = ThreadPoolExecutor(torch.get_num_threads(), "part", torch.set_num_threads, (1,))
torch.set_num_threads(1)


def side_by_side(function, *tensors):
    """function(*tensors) in parts of 32 prompts: axis 0 of the tensors, axis 1 of the result."""
    return torch.cat([*THREADS.map(function, *(z.split(32) for z in tensors))], dim=1)


# %% 2. Prompts (Fu, section 3)
# w* ~ N(0, I_d), x_i ~ N(0, Sigma), y_i = w*.x_i + noise. A new w* for every prompt: nothing
# can be memorised, so whatever predicts y_{t+1} must be an algorithm, run on the prompt.

def sample_prompts(prompts, n, d, kappa=1.0, noise=0.0, generator=None):
    """Prompts xs (prompts, n+1, d), ys (prompts, n+1), float32, on the generator's device.

    kappa > 1: each prompt has its own covariance, of trace d, in a uniformly random basis; d//2
    eigenvalues are kappa times the others (Fu, section 4.3)."""
    device = generator.device if generator else None
    draw = functools.partial(torch.randn, generator=generator, device=device)
    xs = draw(prompts, n + 1, d)
    if kappa != 1:
        eigenvalues = torch.where(torch.arange(d, device=device) < d // 2, kappa, 1.0)
        basis = torch.linalg.qr(draw(prompts, d, d)).Q
        xs = (xs * (eigenvalues / eigenvalues.mean()).sqrt()) @ basis.mT
    w_star = draw(prompts, d, 1)
    ys = (xs @ w_star).squeeze(-1)
    return xs, ys + noise * draw(prompts, n + 1)


def fresh_prompts(config, count, purpose):
    """Prompts that training never saw, on the CPU; each purpose, a number, has its own."""
    generator = torch.Generator().manual_seed(1_000_003 * config.seed + purpose)
    return sample_prompts(count, config.n, config.d, config.kappa, config.noise, generator)


# %% 3. Four classical learners (Fu, section 3.1)
# They see a prefix only through S = X^T X and b = X^T y, all prefixes at once, in float64.
# With noise of variance s^2 the best predictor is the w of (S + s^2 I) w = b: `ridge` is s^2.
#     least squares     w = pinv(S) b              the answer; of minimum norm while t < d
#     gradient descent  w <- w - eta (S w - b)     O(kappa(S) log 1/eps) steps
#     Iterative Newton  M <- 2M - M S M, w = M b   O(log kappa(S) + log log 1/eps) steps
#     conjugate gradient: of all methods with one product by S a step, the least error on the
#         examples. Our *control*: whatever CG does, too, is no evidence for Newton.

# Newton looks for the inverse of S (if t < d, within the span of the examples: there all of
# this holds, too). Let R_k = I - S M_k be what is missing from it. Then
#     R_{k+1} = I - S (2 M_k - M_k S M_k) = (I - S M_k)^2 = R_k^2,
# so 10^-3 becomes 10^-6, then 10^-12: digits double. Without noise b = S w*, and M_k and S
# commute, so w* - w_k = w* - M_k S w* = R_k w*. Along an eigenvector of eigenvalue lambda, the
# share still missing is (1 - alpha lambda^2)^(2^k) after k steps of Newton from alpha S, and
# (1 - eta lambda)^m after m of GD.

# As (1 - x)^N is about e^(-N x), a direction is found once 2^k alpha lambda^2, or m eta lambda,
# passes 1. With alpha = 1/lambda_max^2 and eta = 1/lambda_max, Newton has found the directions
# lambda > lambda_max 2^(-k/2), GD those lambda > lambda_max/m. So at first a Newton step lowers
# the least lambda in *reach* by sqrt(2); k steps are worth about 2^(k/2) of GD. Once all are
# found, digits double, and so must the steps of GD. The figures mostly measure the first phase.

# Newton converges for alpha < 2/lambda_max(S)^2. Fu print the edge, 2/||S S^T||_2: one
# eigenvalue of R is -1 there, and its square never shrinks. And order matters: M S M forgets
# rounding errors within the examples' span; S M M lets them grow up to kappa(S)-fold a step.

# A method takes S (..., d, d), b (..., d) and returns the w of all steps: (steps+1, ..., d).

TINY = 1e-30  # keeps zeros out of divisions and logarithms


def prefix_moments(xs, ys, ridge=0.0):
    """S + ridge I (prompts, n+1, d, d) and b (prompts, n+1, d) of the prefixes t = 0..n."""
    # Shifted by one: no prediction may see its own answer.
    xs, ys = F.pad(xs.double(), (0, 0, 1, -1)), F.pad(ys.double(), (1, -1))
    S = (xs[..., :, None] * xs[..., None, :]).cumsum(1)  # of t examples, at entry t
    b = (ys[..., None] * xs).cumsum(1)
    return S + ridge * torch.eye(xs.shape[-1]).to(S), b


def times(matrices, vectors):
    """Matrix times vector, batched: (..., a, d), (..., d) -> (..., a)."""
    return (matrices @ vectors[..., None]).squeeze(-1)


def predict(weights, xs):
    """Each prefix's query answered, w.x: (..., prompts, n+1, d) -> (..., prompts, n+1)."""
    return torch.einsum("...ptd,ptd->...pt", weights, xs.double())


def ols(S, b):
    """Ordinary least squares, pinv(S) b: the answer itself, (..., d)."""
    return times(torch.linalg.pinv(S, hermitian=True, rtol=1e-12), b)  # less is rounding


def gradient_descent(S, b, steps):
    """Gradient descent, w <- w - eta (S w - b), from w = 0, with eta = 1/lambda_max(S)."""
    eta = 1 / torch.linalg.eigvalsh(S)[..., -1:].clamp_min(TINY)  # (..., 1), one a prefix
    weights = [torch.zeros_like(b)]
    for _ in range(steps):
        weights.append(weights[-1] - eta * (times(S, weights[-1]) - b))
    return torch.stack(weights)


def gradient_descent_after(S, b, counts):
    """The same in closed form, as the figures take up to 65,536 steps: (counts, ..., d)."""
    eigenvalues, U = torch.linalg.eigh(S)
    eta_lambda = eigenvalues / eigenvalues[..., -1:].clamp_min(TINY)
    found = torch.stack([(1 - (1 - eta_lambda) ** m) / eigenvalues for m in counts])
    coordinates = torch.where(eta_lambda > 1e-12, found, 0.0) * times(U.mT, b)
    return torch.einsum("...ij,s...j->s...i", U, coordinates)


def newton_start(S):
    """A safe alpha for M_0 = alpha S (..., d, d): (..., 1, 1), finite for S = 0 too.

    At most 1/lambda_max(S)^2, so that no eigenvalue of R_0 = I - alpha S^2 is negative; not much
    less, since every halving costs a step. The authors: 1/||S S^T||, Frobenius norm."""
    return 1 / torch.linalg.matrix_norm(S @ S.mT, keepdim=True).clamp_min(TINY)


def newton(S, b, steps, alpha=None):
    """Iterative Newton, M <- 2M - M S M, w_k = M_k b, from M_0 = alpha S (Fu, section 3.1).

    alpha, a number, defaults to newton_start(S), prefix by prefix."""
    M = (newton_start(S) if alpha is None else alpha) * S
    weights = [times(M, b)]
    for _ in range(steps):
        M = 2 * M - M @ S @ M
        weights.append(times(M, b))
    return torch.stack(weights)


def conjugate_gradient(S, b, steps):
    """Conjugate gradient on S w = b, from w = 0 (Hestenes and Stiefel, 1952).

    A step goes along a direction p to the least w^T S w - 2 b^T w, the squared error on the
    examples but for a constant. Any two directions have p^T S q = 0: no gain is lost again."""
    residual, direction, weights = b, b, [torch.zeros_like(b)]
    squared = start = b.square().sum(-1, keepdim=True)  # |residual|^2
    for _ in range(steps):
        S_direction = times(S, direction)
        step_size = squared / (direction * S_direction).sum(-1, keepdim=True)
        step_size = torch.where(squared > 1e-28 * start, step_size, 0.0)  # stop at rounding
        weights.append(weights[-1] + step_size * direction)
        residual = residual - step_size * S_direction
        before, squared = squared, residual.square().sum(-1, keepdim=True)
        direction = residual + squared / before.clamp_min(TINY) * direction
    return torch.stack(weights)


# %% 4. The Transformer
# A decoder like GPT-2: layers of causal attention and an MLP add to a residual stream. It
# predicts y_{t+1} at the token x_{t+1}. Normalised queries and keys keep large steps stable.

# Its first task is a copy: y_i must meet its x_i, one token to the left. Learned position by
# position, that copy is where training got stuck. Sinusoids make it one task: a step to the
# left rotates them alike everywhere. So positions *start* as sinusoids.

def interleave(xs, ys):
    """(prompts, n+1, d), (prompts, n+1) -> tokens x_1, y_1, x_2, ...: (prompts, 2n+1, d).

    y is padded with zeros; the last y, the answer, is left out; dtype as xs (Fu, section 3)."""
    y_tokens = F.pad(ys[..., None], (0, xs.shape[-1] - 1))  # (prompts, n+1, d): y, 0, ..., 0
    return torch.stack([xs, y_tokens], dim=2).flatten(1, 2)[:, :-1]


def sinusoids(T, W):
    """A code for T positions (T, W): sines and cosines, periods of 2 pi to 200 pi tokens."""
    angles = torch.arange(T)[:, None] * 100.0 ** -torch.linspace(0, 1, (W + 1) // 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :W]


def normalize(h):
    """The one normalisation of the network, over the last axis: mean 0, variance 1."""
    return F.layer_norm(h, h.shape[-1:])


class Transformer(nn.Module):
    """Decoder-only Transformer; sizes from the Config."""

    def __init__(self, config):
        super().__init__()
        self.heads, L, W = config.heads, config.layers, config.width
        self.read_in = nn.Parameter(torch.randn(W, config.d) / config.d**0.5)
        self.positions = nn.Parameter(0.3 * sinusoids(2 * config.n + 1, W))
        self.read_out = nn.Parameter(torch.zeros(W))
        scale = torch.tensor([1, 1, 1, 0.5])[:, None, None] / (3 * W) ** 0.5  # O, down: half
        self.attention = nn.Parameter(torch.randn(L, 4, W, W) * scale)  # Q, K, V, O
        self.mlp = nn.Parameter(torch.randn(L, 2, 2 * W, W) * scale[2:])  # up, down^T

    def stream(self, xs, ys):
        """The residual stream (P, T, W) after the embedding and after every layer."""
        tokens = interleave(xs, ys)
        h = tokens @ self.read_in.mT + self.positions[: tokens.shape[1]]  # (P, T, d) @ (d, W)
        yield h
        for attention, (up, down) in zip(self.attention, self.mlp):
            h = h + self.attend(normalize(h), attention)
            h = h + F.silu(normalize(h) @ up.mT) @ down  # (P, T, 2W), then (P, T, W)
            yield h

    def attend(self, h, weights):
        """Multi-head causal attention on h (P, T, W) with weights Q, K, V, O (4, W, W)."""
        Q, K, V, O = weights
        q, k, v = ((h @ Z.mT).unflatten(-1, (self.heads, -1)) for Z in (Q, K, V))
        heads = (z.transpose(1, 2) for z in (normalize(q), normalize(k), v))
        # softmax(q k^T / sqrt(W/heads)) v, where token i sees tokens 0..i
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)  # (P, heads, T, W/heads)
        return mixed.transpose(1, 2).flatten(2) @ O.mT  # heads side by side again: (P, T, W)

    def states(self, xs, ys):
        """What probes see: the normalised x tokens of the stream, (L+1, P, n+1, W)."""
        return torch.stack([normalize(h[:, ::2]) for h in self.stream(xs, ys)])

    def forward(self, xs, ys):
        """Predictions (P, n+1) of ys: entry t is made at the token x_{t+1}."""
        *_, last = self.stream(xs, ys)
        return normalize(last[:, ::2]) @ self.read_out


# %% 5. Training
# The paper's Adam (`--recipe fu`) takes hundreds of thousands of steps. Three changes make them
# thousands. First the loss. With e_t the error after t examples, it is
#     mean over t of  sqrt( mean over prompts of |e_t|^1.5 ).
# No method can avoid early errors, a thousand times larger; late ones show how well a network
# computes: the root lets them count. And |e|^1.5, since a few unlucky squares drown the rest.
# (On a CPU each quarter of a batch has its own loss and thread; gradients are averaged.)

# Second the optimiser. Muon (Keller Jordan, 2024) replaces each matrix's momentum by the
# nearest orthogonal matrix: all directions are learned at one speed. Five steps find it, X <-
# a X + b X X^T X + c X (X^T X)^2, a relative of Newton's: they move a singular value s to a s +
# b s^3 + c s^5. Jordan's a, b, c drive it to about 1 fast. Step sizes rise for 100 steps and
# fall in the second half.

# Third a curriculum (Garg et al., 2022): 2 dimensions and 6 examples at first, then more, up
# to d and n. Training at d = 20 does not start without it.

def orthogonalize(G):
    """Roughly the nearest matrix with orthonormal columns to each of (..., m, n), m >= n."""
    X = F.normalize(G, dim=(-2, -1), eps=1e-7)
    for _ in range(5):
        gram = X.mT @ X
        X = 3.4445 * X + X @ (-4.7750 * gram + 2.0315 * gram @ gram)
    return X


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for stacks of matrices (torch's own takes single ones)."""

    @torch.no_grad()
    def step(self):
        """One update, of the size of AdamW's: entries of about 0.2 lr (Liu et al., 2025)."""
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(average, group["momentum"]))
                p.sub_(update, alpha=group["lr"] * 0.2 * max(p.shape[-2:]) ** 0.5)


def make_optimizers(model, config):
    """Adam, and Muon for the stacks of matrices; or the paper's Adam alone."""
    muon_lr = config.muon_lr / (2 if config.kappa > 1 else 1)
    if config.recipe == "fu":
        return [torch.optim.Adam(model.parameters(), 1e-4)]
    rest = [model.read_in, model.positions, model.read_out]
    return [torch.optim.Adam(rest, 0.005, (0.9, 0.99)),
            Muon([model.attention, model.mlp], dict(lr=muon_lr, momentum=0.9))]


def gradients(model, recipe, xs, ys):
    """The errors (P, n+1) on some prompts, and their loss's gradient for each parameter."""
    error = model(xs, ys) - ys
    power, root = (2, 1) if recipe == "fu" else (1.5, 0.5)
    loss = error.abs().clamp_min(TINY).pow(power).mean(0).pow(root).mean()
    return error.detach(), torch.autograd.grad(loss, list(model.parameters()))


def training_step(model, optimizers, config, step, generator):
    """One step on fresh prompts. Returns their errors (batch, n+1), on the device."""
    d = min(2 + step // config.curriculum, config.d) if config.curriculum else config.d
    n = config.n if d == config.d else min(2 * d + 2, config.n)
    xs, ys = sample_prompts(config.batch, n, d, config.kappa, config.noise, generator)
    # Inactive dimensions are 0. A GPU takes the batch whole.
    parts = [z.chunk(1 if xs.is_cuda else 4) for z in (F.pad(xs, (0, config.d - d)), ys)]
    errors, grads = zip(*THREADS.map(functools.partial(gradients, model, config.recipe), *parts))
    for p, *of_parts in zip(model.parameters(), *grads):
        p.grad = sum(len(e) * grad for e, grad in zip(errors, of_parts)) / len(ys)
    rise, fall = (step + 1) / 100, 2 * (1 - step / config.steps)
    factor = 1 if config.recipe == "fu" else min(rise, 1, fall)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * factor
        optimizer.step()
    return torch.cat(errors)


def train(config):
    """The trained network of `config`; a killed run goes on at its checkpoint, bit for bit.

    At kappa > 1 the network of kappa = 1 goes on, for `tuning` steps, Muon's half as large.
    FloatingPointError: errors are not finite; ValueError: a damaged checkpoint."""
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
    for done in range(first + 1, config.steps + 1):
        error = training_step(model, optimizers, config, done - 1, generator)
        if done % 250 == 0 or done == config.steps:
            if not error.isfinite().all():
                raise FloatingPointError(f"errors are not finite at step {done}")
            left = (time.perf_counter() - start) / (done - first) * (config.steps - done)
            last, n = error[:, -1].square().mean() / config.d, error.shape[1] - 1
            print(f"  step {done}: error / d {last:.4f}, t = {n}; {left:.0f} s left", flush=True)
            checkpoint.save(done)
    return model.requires_grad_(False)


# %% 6. What does each layer know? (Fu, section 4.1)
# Fit, for every layer of the frozen network, the best linear readout of its state, on prompts
# other than those that judge, and so many that the fit's own error is below the layer's.

def least_squares_readout(H, y):
    """The r of least ||H r - y||, float64: H (..., samples, width), y (samples,) -> (..., width).

    The shortest of them, since a layer leaves directions of its state unused."""
    return ols(H.mT @ H, times(H.mT, y))


@torch.no_grad()
def read_layers(model, fitting, prompts):
    """The layers as a trajectory on `prompts`, (L+1, prompts, n+1); step 0 is the embedding.

    fitting, prompts: pairs (xs, ys). One readout a layer, for all t, is fitted on the first."""
    pairs = [[z.to(model.read_out.device) for z in pair] for pair in (fitting, prompts)]
    states = [side_by_side(model.states, *pair).double().cpu() for pair in pairs]
    H, judged = (F.pad(z, (0, 1), value=1.0) for z in states)  # and a constant 1: W+1
    readouts = least_squares_readout(H.flatten(1, 2), fitting[1].double().flatten())
    return torch.einsum("lptw,lw->lpt", judged, readouts)


# How many steps an entry of a method's trajectory stands for; a network's: 0, 1, 2, ...
STEPS = {"Newton": range(33), "CG": range(25), "GD": [0, *(2**k for k in range(17))]}


@functools.cache
def study(config):
    """A trained network and the methods on the same fresh prompts xs, ys.

    runs: {learner: its trajectory, at STEPS}; least_squares: its predictions."""
    fitting = fresh_prompts(config, 4 * config.prompts, purpose=1)
    xs, ys = fresh_prompts(config, config.prompts, purpose=2)
    S, b = prefix_moments(xs, ys, ridge=config.noise**2)
    iterate = functools.partial(newton, steps=STEPS["Newton"][-1])
    runs = {"Newton": predict(side_by_side(iterate, S, b), xs),
            "GD": predict(gradient_descent_after(S, b, STEPS["GD"]), xs),
            "CG": predict(conjugate_gradient(S, b, STEPS["CG"][-1]), xs),
            "Transformer": read_layers(train(config), fitting, (xs, ys))}
    return SimpleNamespace(xs=xs, ys=ys, runs=runs, least_squares=predict(ols(S, b), xs))


# %% 7. Two rulers
# How many steps of Newton is a layer worth? *Similarity* asks which step has the most similar
# errors: the cosine between the vectors of errors that two learners make on a prompt, over t =
# 1..n. (The authors: from t = 0.) *Equal error* asks after how many steps Newton errs
# as little as the layer. Any learner can stand in the layer's place, and a known one should:
# Newton must give 0, 1, 2.

def similarity_of_errors(traj_a, traj_b, ys):
    """Fu's SimE: cosines of prediction - y over t = 1..n, averaged over prompts, in float64.

    (A, prompts, n+1), (B, prompts, n+1) -> (A, B), all pairs of steps; zero errors score 0."""
    a, b = (F.normalize((z.double() - ys)[..., 1:], dim=-1) for z in (traj_a, traj_b))
    return torch.einsum("apt,bpt->ab", a, b) / ys.shape[0]


def equal_error_steps(errors, counts, run_errors):
    """After how many steps a run errs as little: errors (A,), counts, run_errors (B,) -> (A,).

    Log error is taken to be linear between steps that lower it. At most the run's last step."""
    wanted, gained = (-z.clamp_min(TINY).log() for z in (errors, run_errors))
    reached, first = np.unique(gained.cummax(0).values, return_index=True)
    return np.interp(wanted, reached, np.array(counts)[first])


# Rates are measured from layer 3 on: the first two gather y's to x's. (The paper's: layers 3 to
# 9, before its plateau.) Two shapes compete: a line, steps = a + b l, and an exponential, log2
# steps = a + b l. R^2, the share of variance that a fit explains, says which is straighter. CG's
# steps 1 to 8 pass both tests: a shape alone is no evidence.

FIRST_LAYER = 3


def line_fit(steps, first=FIRST_LAYER):
    """Slope and R^2 (0 if all are equal) of the line through steps (L,), layers `first` to L."""
    y = np.asarray(steps, dtype=float)[first - 1 :]
    x = np.arange(len(y)) - (len(y) - 1) / 2  # centred
    slope = x @ y / max(x @ x, TINY)
    return slope, slope**2 * x.var() / max(y.var(), 1e-12)


def doublings(steps):
    """log2 of numbers of steps; less than one step counts as one."""
    return np.log2(np.maximum(steps, 1))


# %% 8. The paper's figures
# An experiment, called once a seed, draws by `curve` into panels that all seeds share (`sheet`,
# section 15). It returns the panels; a headline with {gaps}; and numbers for these gaps and the
# claims (section 14): {key: measured, or (measured, what it must beat)}.

PAPER = (  # Fu's Transformer (d = 20, n = 40): best matches of layers 1..12, figures 8 and 10
    [1, 1, 2, 5, 8, 10, 14, 16, 20, 20, 21, 21],  # steps of Newton, then of GD
    [1, 1, 4, 8, 32, 64, 256, 512, 1024, 4096, 4096, 4096])


def learning_curves(config, t, ax=None):
    """Squared errors after t examples, {learner: (steps,)}; ax is a panel to draw them in."""
    s = study(config)
    curves = {k: (run[..., t] - s.ys[:, t]).square().mean(1) for k, run in s.runs.items()}
    if ax:
        for name, errors in curves.items():
            curve(ax, name, errors / config.d, STEPS.get(name, range(len(errors))))
    return curves


def compared(config, learner):
    """The steps of a learner that are compared: 1..L; CG's end before d, where it is exact."""
    return slice(1, min(config.layers + 1, config.d) if learner == "CG" else config.layers + 1)


def climb(config, learner):
    """What a learner's compared steps match, three arrays.

    Steps of Newton and of GD by similarity, steps of Newton by equal error after n examples."""
    s, curves, own = study(config), learning_curves(config, config.n), compared(config, learner)
    to_newton = similarity_of_errors(s.runs[learner][own], s.runs["Newton"], s.ys).argmax(1)
    to_gd = similarity_of_errors(s.runs[learner][own], s.runs["GD"], s.ys).argmax(1)
    equal = equal_error_steps(curves[learner][own], STEPS["Newton"], curves["Newton"])
    return to_newton.numpy(), np.take(STEPS["GD"], to_gd), equal


def rates(config, sheet):
    """Fu, figures 3, 8, 10: the steps of Newton and GD that layers match; CG is the control."""
    axes = sheet("errors like which Newton step's?", "like which GD step's?",
                 "as small as which Newton step's?", xlabel="layer or step", ylabel="step")
    axes[1].set_yscale("symlog", linthresh=1)
    climbs = {name: climb(config, name) for name in ("Newton", "CG", "Transformer")}
    for name, matched in [*climbs.items(), ("Fu's Transformer", PAPER)]:
        for ax, steps in zip(axes, matched):
            curve(ax, name, steps)
    to_newton, to_gd, equal = climbs["Transformer"]
    cg, _, cg_equal = climbs["CG"]
    title = "A layer climbs {newton_rate[0]:.1f} Newton steps (a step of CG {newton_rate[1]:.1f})"
    return axes, title + "; by error size after n {equal_rate[0]:.1f} (CG {equal_rate[1]:.1f})", {
        "newton_rate": (line_fit(to_newton)[0], line_fit(cg, 1)[0]),
        "equal_rate": (line_fit(equal)[0], line_fit(cg_equal, 1)[0]),
        "newton_line": (line_fit(to_newton)[1], line_fit(doublings(to_newton))[1]),
        "gd_exponential": (line_fit(doublings(to_gd))[1], line_fit(to_gd)[1]),
        "newton_steps": to_newton, "gd_steps": to_gd}


def convergence(config, sheet):
    """Fu, figure 2: squared error of all four learners, against the layer or step."""
    axes = sheet(f"after all {config.n} examples", f"after d + 2 = {config.d + 2}", yscale="log",
                 xlabel="layer or step", ylabel="squared error / d", xlim=(0, 24), ylim=(1e-7, 2))
    learning_curves(config, config.d + 2, axes[1])
    curves = learning_curves(config, config.n, axes[0])
    errors = curves["Transformer"]
    early, late = (-errors[FIRST_LAYER - 1 :].log10().diff()).chunk(2)  # digits of layers 3..L
    worth = [equal_error_steps(errors[-1], STEPS[k], curves[k]) for k in ("Newton", "CG", "GD")]
    title = "After n examples the last layer errs as Newton after {worth[0]:.0f} steps"
    return axes, title + ", CG after {worth[1]:.0f}, GD after {worth[2]:.0f}", {
        "error": errors[-1] / config.d, "worth": worth,
        "superlinear": (late.mean(), max(early.mean(), 0.1))}


# What is similarity made of? Most of an error no method can avoid: t < d examples do not
# determine w*. So a *null* takes each layer's best Newton step and adds the deviations from
# it that the layer shows on *another* prompt. Small deviations score high, whatever their
# direction: a score at its null says how small they are.

def heatmaps(config, sheet):
    """Fu, figures 3, 8, 10: similarity of errors, and what a shuffled null scores."""
    s = study(config)
    axes = sheet("to which step of Newton?", "to which step of GD?", "at the best step",
                 xlabel="layer", ylabel="step")
    layers = s.runs["Transformer"][1:]
    alike = {k: similarity_of_errors(layers, s.runs[k], s.ys) for k in ("Newton", "GD")}
    for ax, (name, similarity) in zip(axes, alike.items()):  # (L, steps)
        curve(axes[2], name, 1 - similarity.amax(1))
        if not ax.collections:  # the first seed's
            x, steps = range(1, len(layers) + 1), STEPS[name]
            mesh = ax.pcolormesh(x, range(len(steps)), similarity.T, vmin=0.5, vmax=1)
            ax.figure.colorbar(mesh, ax=ax, label="similarity of errors")
            ax.plot(x, similarity.argmax(1), "ow", markeredgecolor="black", label="best step")
            ax.set_yticks(range(0, len(steps), 4), steps[::4])
    best = s.runs["Newton"][alike["Newton"].argmax(1)]  # (L, P, n+1)
    shuffled = best + (layers - best).roll(1, dims=1)  # deviations of the previous prompt
    null = similarity_of_errors(shuffled, best, s.ys).diagonal()
    curve(axes[2], "shuffled null", 1 - null)
    axes[2].set(ylabel="1 - similarity", yscale="log", ylim=(1e-3, 1))
    last = [z[-1].max() for z in alike.values()] + [null[-1]]
    title = "The last layer's similarity to Newton is {last[0]:.3f}, to GD {last[1]:.3f}"
    return axes, title + "; shuffled, to Newton {last[2]:.3f}", {
        "last": last, "like_newton": (1 - last[1], 1 - last[0]),
        "like_ols": (similarity_of_errors(layers[-1:], s.least_squares[None], s.ys)[0, 0], 0.975)}


# %% 9. A ruler that can say no: how many first-order steps is a layer worth?
# A first-order method multiplies a vector by S once a step. Let its step sizes and momenta be
# fixed in advance, in units of 1/lambda_max(S). Two steps of GD with sizes u, v, from w = 0:
#     w_1 = u b,    w_2 = w_1 - v (S w_1 - b) = (u + v) b - u v S b.
# Whatever u and v are, w_2 = c_0 b + c_1 S b: a polynomial of S, of degree 1, times b, the
# same for all prompts. D steps make one of degree D - 1. So the polynomial that is best on
# average errs at most as much as *every* such method of D steps, and least squares finds it,
# for each D and t. D*(l) is the D whose best polynomial errs as layer l does. If D*(l) > l, no
# method of one such step a layer does what the layers do; if D*(l) <= l, one may.

# CG is no such method: it finds its sizes on the prompt. Newton's D* is but 2^(k/4) at first: k
# steps reach lambda_max 2^(-k/2), the best D fixed ones lambda_max/D^2.


def polynomial_features(xs, ys, t):
    """x_q^T T_j(2 S/lambda_max - I) b/lambda_max after t examples, j < 128: (prompts, 128).

    T_j, Chebyshev's polynomials, span the powers of S and are far better conditioned."""
    X, x_q, y = xs[:, :t].double(), xs[:, t].double(), ys[:, :t].double()
    eigenvalues, U = torch.linalg.eigh(X.mT @ X)
    largest = eigenvalues[:, -1:]
    # x_q^T T_j(S) b sums, over eigenvectors u, T_j(lambda) (u.x_q) (u.b).
    overlaps = times(U.mT, x_q) * times(U.mT, times(X.mT, y)) / largest
    T = np.polynomial.chebyshev.chebvander(2 * eigenvalues / largest - 1, 127)
    return torch.einsum("pd,pdj->pj", overlaps, torch.from_numpy(T))


def polynomial_errors(config, t):
    """Squared errors after t examples of the best methods of 0..128 steps: (129,)."""
    fitting, s = fresh_prompts(config, 20_000, purpose=3), study(config)
    fit, test = (polynomial_features(*prompts, t) for prompts in (fitting, (s.xs, s.ys)))
    # D columns of Q span D columns of fit: one more step adds one more term.
    Q, R = torch.linalg.qr(fit)
    basis = torch.linalg.solve_triangular(R, test, upper=True, left=False)  # (prompts, 128)
    terms = basis * (Q.mT @ fitting[1][:, t].double())
    answers = F.pad(terms.cumsum(1), (1, 0))
    return (answers - s.ys[:, t, None]).square().mean(0)


def products(config, sheet):
    """New: D* of the layers, of Newton's steps and of CG's, after d and after n examples."""
    L, found = config.layers, {}
    axes = sheet(f"after d = {config.d} examples", f"after all {config.n}",
                 xlabel="layer or step", ylabel="first-order steps")
    for ax, name, t in zip(axes, ("products_d", "products_n"), (config.d, config.n)):
        x, best, curves = range(1, L + 1), polynomial_errors(config, t), learning_curves(config, t)
        ax.fill_between(x, 0, x, color="#DDDDDD", label="one first-order step a layer, or less")
        for who in ("Newton", "CG", "Transformer"):
            worth = equal_error_steps(curves[who][compared(config, who)], range(len(best)), best)
            curve(ax, who, worth)
        found[name] = worth[-1], L  # the Transformer's
    title = "The last layer is worth {products_d[0]:.0f} first-order steps after d examples"
    return axes, title + ", {products_n[0]:.0f} after n", found


# %% 10. Ill-conditioned data (Fu, section 4.3)
# For the same error GD may need up to kappa times the steps, Newton up to 2 log2 kappa more.

def conditioning(config, sheet):
    """Fu, figures 4, 16: errors at kappa 1 and 100; which steps err as the last layers do."""
    axes = sheet("kappa = 1", "kappa = 100", xlabel="layer or step", xscale="symlog", yscale="log",
                 ylabel=f"squared error / d after {config.n} examples", ylim=(1e-7, 2))
    worth = []  # in steps of Newton and of GD, at kappa 1, then at 100
    for ax, kappa in zip(axes, (1.0, 100.0)):
        curves = learning_curves(dataclasses.replace(config, kappa=kappa), config.n, ax)
        last = curves["Transformer"][-1]
        worth += [equal_error_steps(last, STEPS[k], curves[k]) for k in ("Newton", "GD")]
    title = "The last layer errs as Newton after {kappas[0]:.0f} steps, GD after {kappas[1]:.0f}"
    return axes, title + "; at kappa = 100 after {kappas[2]:.0f} and {kappas[3]:.0f}", {
        "kappas": worth, "kappa_gd": (worth[3], 4 * max(worth[1], 1))}


# %% What Part I found
# By similarity a layer climbs two or three of Newton's steps, as the paper's do; GD's steps
# more than double. CG starts faster and flattens; by size of error after n examples it is ahead
# until the last layer draws level; after d examples layers pass it from the sixth on, and the
# last errs less than any method of 8 first-order steps with fixed sizes. Similarity says little:
# deviations from other prompts score nearly the same. So a layer is as *fast* as one to three
# steps of Newton, which does not show that it *is* Newton.


# %% Part II, theory that runs. 11. Newton's weights, written by hand (Fu, theorem 5.1)
# Newton is possible in attention because attention makes sums over examples. Let an example be
# one token [T x_j ; x_j ; y_j], where T is to become M. Attention has ReLU in place of softmax,
# and two heads of opposite sign: ReLU(s) - ReLU(-s) = s. (Fu print one V for both: |s|.)
#     first layer    T = alpha S      adds alpha sum_j x_j <x_j, x_t> to the top block
#     Newton layer   T <- 2T - T S T  adds -1/2 T S T x_t to it, and the MLP doubles it
#     readout layer  x_q^T T b        adds sum_j y_j <T x_j, x_q> to the query's empty y
# So k steps take k + 2 layers; Fu's proof spends k + 8. Two costs: one alpha for all prompts;
# and every example must see all others, which our Transformer's causal mask forbids.

def relu_attention(h, heads, mask):
    """h_t + sum over heads (Q, K, V) and j of mask[j] ReLU(<Q h_t, K h_j>) V h_j, for all t."""
    return h + sum((mask * ((h @ Q.mT) @ (h @ K.mT).mT).relu()) @ (h @ V.mT) for Q, K, V in heads)


def token_blocks(d):
    """(d, 2d+1), (d, 2d+1), (1, 2d+1): read T x, x, y of a token; transposed, they write."""
    return torch.eye(2 * d + 1, dtype=torch.float64).split([d, d, 1])


def linear_heads(Q, K, V):
    """Two heads (Q, K, V) that add sum_j s V h_j, s = <Q h_t, K h_j>: ReLU(s) V - ReLU(-s) V."""
    return [(Q, K, V), (-Q, K, -V)]


def newton_layer(d):
    """The weights of a Newton step: tokens [T x ; x ; y] -> [(2T - T S T) x ; x ; y], float64.

    S is the examples' sum of x_j x_j^T. Attention first, two heads (Q (d, 2d+1), K (d, 2d+1),
    V (2d+1, 2d+1)); then mlp = (up (2d, 2d+1), down (2d+1, 2d)) adds down ReLU(up h) to h."""
    Tx, x, _ = token_blocks(d)
    heads = linear_heads(Q=Tx, K=x, V=-0.5 * Tx.mT @ Tx)
    up = torch.cat([Tx, -Tx])  # ReLU(s) - ReLU(-s) = s is added to each entry s of the block
    return heads, (up, up.mT)


def construction(xs, ys, steps, alpha):
    """Newton in ReLU attention: answers to the last query after 0..steps, (steps+1, P)."""
    Tx, x, y = token_blocks(xs.shape[-1])
    heads, (up, down) = newton_layer(xs.shape[-1])
    mask = (torch.arange(xs.shape[1]) < xs.shape[1] - 1).double()  # the query is no example
    h = torch.cat([torch.zeros_like(xs), xs, (mask * ys)[..., None]], -1)  # (P, n+1, 2d+1)
    h = relu_attention(h, linear_heads(Q=x, K=x, V=alpha * Tx.mT @ x), mask)
    answers = []
    for _ in range(steps + 1):
        filled = relu_attention(h, linear_heads(Q=x, K=Tx, V=y.mT @ y), mask)
        answers.append(filled[:, -1, -1])
        h = relu_attention(h, heads, mask)
        h = h + (h @ up.mT).relu() @ down.mT
    return torch.stack(answers)


def by_hand(config, sheet):
    """Fu, theorem 5.1: hand-written weights against Newton; one alpha for all prompts."""
    axes = sheet("", xlabel="layer or step k", ylabel="squared error / d", yscale="log")
    xs, ys = fresh_prompts(config, 256, purpose=2)
    S, b = (z[:, -1] for z in prefix_moments(xs, ys))  # after n examples
    steps, alpha = STEPS["Newton"][-1], newton_start(S).min()
    ours = (newton(S, b, steps, alpha) * xs[:, -1]).sum(-1)
    hand = construction(xs, ys, steps, alpha)
    for name, answers, style in (("Newton", ours, "-"), ("Transformer by hand", hand, " ")):
        errors = (answers - ys[:, -1]).square().mean(1) / config.d
        curve(axes[0], name, errors, STEPS["Newton"], style)
    title = "Attention with hand-written weights is Newton's method, to {by_hand[0]:.0e}"
    return axes, title, {"by_hand": ((hand - ours).abs().max() / ys.square().mean().sqrt(), 1e-6)}


# %% 12. Linear attention is preconditioned gradient descent (Ahn et al., arXiv 2306.00297)
# A layer without softmax, which compares x's and writes y's, answers a query x_q by
#     yhat = (1/n) sum_i y_i x_i^T A x_q = b^T A x_q / n.
# Now b/n is minus the gradient at w = 0 of R(w) = (1/2n) sum_i (w.x_i - y_i)^2. So the layer
# is one step of gradient descent on R, preconditioned by A, and more layers are more steps
# (lemma 1). For one layer and w ~ N(0, I) the loss is quadratic in A: to train is to fit least
# squares. With endless examples the best A is a Newton step, Sigma^-1; with few it moves less,
# most so along small eigenvalues (theorem 1).

def optimal_preconditioner(Sigma, n):
    """The A (d, d) of least expected squared error for one layer (Ahn, theorem 1).

    For n examples and a query x ~ N(0, Sigma), w ~ N(0, I). It has Sigma's eigenvectors."""
    # As E S^2 = n (n+1) Sigma^2 + n tr(Sigma) Sigma, the loss is least at A = n times the inverse
    # of (n+1) Sigma + tr(Sigma) I.
    identity = torch.eye(len(Sigma)).to(Sigma)
    return n * torch.linalg.inv((n + 1) * Sigma + Sigma.trace() * identity)


def preconditioners(config, sheet):
    """Ahn, theorem 1, in the sizes of Ahn's figures: a fitted layer's A, entry by entry."""
    d, n, generator = 5, 20, torch.Generator().manual_seed(config.seed)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    U, spectrum = torch.linalg.qr(draw(d, d)).Q, torch.tensor([1, 1, 1 / 4, 1 / 16, 1])
    closed = optimal_preconditioner((U * spectrum) @ U.mT, n)
    xs = (draw(200_000, n + 1, d) * spectrum.sqrt()) @ U.mT
    ys = times(xs, draw(200_000, d))
    # The answer b^T A x_q / n is linear in A: A_jk has the feature b_j x_qk / n.
    features = torch.einsum("pij,pi,pk->pjk", xs[:, :-1], ys[:, :-1], xs[:, -1]).flatten(1) / n
    trained = least_squares_readout(features, ys[:, -1]).unflatten(0, (d, d))
    (ax,) = axes = sheet("entries of A", xlabel="in theorem 1", ylabel="as fitted")
    ax.axline((0, 0), slope=1, color="#666666", label="equal")
    curve(ax, "Transformer", trained.flatten(), closed.flatten(), " ")
    title = "The best layer of linear attention is the predicted one, to {ahn_one[0]:.1%}"
    return axes, title, {"ahn_one": ((trained - closed).norm() / closed.norm(), 0.03)}


# %% 13. Softmax attention learns in stages (Huang et al., arXiv 2310.05249)
# A token is one of K orthonormal features, v_k with probability p_k; its answer is w.v_k. One
# layer of softmax attention, with a matrix Q that starts at 0, averages a prompt's N answers:
#     yhat = sum_i softmax_i(x_i^T Q x_q) y_i = sum_n a_n w.v_n     a_n: attention on feature n
# For a query x_q = v_k, and E w w^T = I, the loss is 1/2 [(1 - a_k)^2 + sum_{n != k} a_n^2].
# Its gradient moves A_k = Q[k,k] and B_{k,n} = Q[n,k]. If all p_k are equal, the A_k grow
# together, past log K, where one right feature balances K wrong. If p_1 = 1/2, feature 1 is
# first; for all others B_{k,1} must fall before A_k grows.

def train_attention(K, p_1, steps, seed, eta=2.0):
    """Gradient descent on Q, on fresh prompts of N = 10 K examples, queries weighted by p_k.

    Returns (2, steps): the loss of queries for feature 1; the mean loss of the others."""
    p = torch.tensor([p_1] + [(1 - p_1) / (K - 1)] * (K - 1))
    generator, path = torch.Generator().manual_seed(seed), []
    Q = torch.zeros(K, K, requires_grad=True)
    for _ in range(steps):
        tokens = torch.multinomial(p.expand(32, K), 10 * K, replacement=True, generator=generator)
        counts = F.one_hot(tokens, K).sum(1)
        attention = (counts.log()[:, :, None] + Q).softmax(1)  # [prompt, n, k]; e^log 0 = 0
        losses = (attention - torch.eye(K)).square().sum(1).mean(0) / 2  # (K,), one a query
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
        ax.loglog(path[0], color="black", label="queries for feature 1")
        ax.loglog(path[1], color="#8C510A", label="queries for the others")
    # Of the last path, p_1 = 1/2: how many steps are above a tenth of the start?
    first, others = (path > 0.1 * path[:, :1]).sum(1)
    title = "With a dominant feature the others are learned {huang[0]:.0f} times later than it"
    return axes, title, {"huang": (others / first, 5)}


# %% Part III, machinery. 14. The claims

CLAIMS = {  # key: (measured; what it must beat: a control, a fixed number; the relation)
    "superlinear": ("fig. 2: digits gained late; early (or 0.1)", ">"),
    "newton_rate": ("fig. 3: Newton steps a layer (2.93); a step of CG", ">"),
    "equal_rate": ("the same by size of error after n examples", ">"),
    "newton_line": ("fig. 3: R^2 of Newton's steps: line; exponential", ">"),
    "gd_exponential": ("fig. 3: R^2 of GD's steps: exponential; line", ">"),
    "like_newton": ("1 - similarity: GD (.043); Newton (.009)", ">"),
    "like_ols": ("similarity to least squares; our goal", ">"),
    "products_d": ("first-order steps the last layer is worth after d; layers", ">"),
    "products_n": ("the same after n examples", ">"),
    "kappa_gd": ("fig. 4: its GD steps at kappa 100; 4 times those at 1", ">"),
    "by_hand": ("thm. 5.1: weights by hand, distance from Newton", "<"),
    "ahn_one": ("Ahn, thm. 1: a fitted layer, distance from the theory", "<"),
    "huang": ("Huang: how many times later other features are learned", ">")}


def table(found):
    """Lines of Markdown, {claim: in how many seeds it holds}; found: {key: a pair a seed}."""
    lines = ["| claim (the paper's number) | measured, seed by seed | holds in |", "|---|---|---|"]
    holds = {}
    for key, (sentence, relation) in CLAIMS.items():
        if key in found:
            holds[key] = sum(a > b if relation == ">" else a < b for a, b in found[key])
            texts = [[f"{z:.3g}" for z in row] for row in zip(*found[key])]
            left, right = (" ".join(z if len(set(z)) > 1 else z[:1]) for z in texts)
            score = f"{left} {relation} {right} | {holds[key]} of {len(found[key])}"
            lines.append(f"| {sentence} | {score} |")
    return lines, holds


# %% 15. Drawing: a learner has one colour and mark everywhere

LOOK = {"Transformer": ("#D55E00", "o"), "Newton": ("#0072B2", "s"), "GD": ("#009E73", "^"),
        "CG": ("#CC79A7", "D"), "Fu's": ("#666666", "x"), "shuffled": ("#666666", "x")}
STYLE = {"axes.grid": True, "grid.alpha": 0.25, "lines.markersize": 4, "lines.linewidth": 1.2}


def make_sheet(*titles, **settings):
    """The panels of an empty picture, one a title, all with these settings."""
    inches = 4.5 * max(len(titles), 2), 4.2
    picture = matplotlib.figure.Figure(inches, dpi=130, layout="constrained")
    axes = picture.subplots(1, len(titles), squeeze=False)[0]
    for ax, title in zip(axes, titles):
        ax.set(title=title, **settings)
    return axes


def curve(ax, label, y, x=None, style="-"):
    """A line in the look of its label's first word; x defaults to 1, 2, ..."""
    color, mark = LOOK[label.split()[0]]
    x = range(1, len(y) + 1) if x is None else x
    ax.plot(x, y, mark + style, color=color, label=label)


def draw(axes, title):
    """The picture of these panels, PNG bytes, with one legend, below."""
    buffer, picture = io.BytesIO(), axes[0].figure
    entries = {z.get_label(): z for ax in axes for z in ax.get_legend_handles_labels()[0]}
    picture.legend(entries.values(), entries, loc="outside lower center", ncols=5, frameon=False)
    picture.suptitle(title)
    picture.savefig(buffer, format="png")
    return buffer.getvalue()


# %% 16. Files and checkpoints

def write_file(path, content):
    """Write bytes; a kill leaves the old file or the new one. OSError, in one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror}") from None


class Checkpoint:
    """The file of one training; its name hashes what decides the weights: settings and code."""

    def __init__(self, config, model, optimizers, generator):
        self.parts, self.generator = [model, *optimizers], generator
        # Code is known by what it does: try some steps. What none shows goes unseen.
        other, *its_optimizers = copy.deepcopy(self.parts)
        twin = torch.Generator(generator.device).manual_seed(0)
        for step in sorted({0, config.curriculum, config.steps // 2, config.steps - 1}):
            training_step(other, its_optimizers, config, step, twin)
        sums = [z.detach().double().sum().item() for m in (model, other) for z in m.parameters()]
        settings = {k: v for k, v in vars(config).items() if k not in NOT_OF_WEIGHTS}
        all_of_it = settings, sums, torch.__version__, generator.device
        key = hashlib.sha256(repr(all_of_it).encode()).hexdigest()[:10]
        self.path = Path(config.checkpoints) / f"d{config.d}-seed{config.seed}-{key}.pt"

    def seal(self, content):
        """What ends a file, 32 bytes: proof that it is whole and this training's."""
        return hashlib.sha256(self.path.name.encode() + content).digest()

    def save(self, done):
        """Write where the training stands: torch.load reads it."""
        state = {"done": done, "parts": [part.state_dict() for part in self.parts],
                 "generator": self.generator.get_state()}
        torch.save(state, buffer := io.BytesIO())
        write_file(self.path, buffer.getvalue() + self.seal(buffer.getvalue()))

    def restore(self):
        """Go on where the training stood: the steps done. ValueError: a damaged file."""
        if not self.path.exists():
            return 0
        content = self.path.read_bytes()
        if content[-32:] != self.seal(content[:-32]):
            raise ValueError(f"{self.path} is damaged: delete it")
        saved = torch.load(io.BytesIO(content[:-32]), map_location="cpu", weights_only=True)
        for part, state in zip(self.parts, saved["parts"]):
            part.load_state_dict(state)
        self.generator.set_state(saved["generator"])
        return saved["done"]


# %% 17. The command line

EXPERIMENTS = {f.__name__: f for f in (by_hand, rates, convergence, heatmaps, products,
                                       conditioning, preconditioners, stages)}
SMALL = dict(d=5, n=10, batch=64, curriculum=0)
PRESETS = {  # name: (the first line that a run prints, settings)
    "default": ("the paper's problem, d = 20 and n = 40, in a smaller network", {}),
    "quick": ("a first look at d = 5; its numbers are not to be trusted", SMALL | dict(
        width=32, layers=6, steps=1500, prompts=256, figures="by_hand,rates,products",
        out="figures/quick")),
    "small": ("d = 5, n = 10, where conjugate gradient, too, looks like Newton", SMALL | dict(
        width=40, steps=5000, prompts=2048, out="figures/small")),
    "long": ("d = 20, n = 40, trained longer", dict(steps=8000, tuning=2000, out="figures/long")),
    "paper": ("the paper's problem, a network of the paper's size: for CUDA", dict(
        layers=12, width=256, heads=8, steps=12_000, batch=256, out="figures/paper"))}


def check(config):
    """ValueError, in one line, for a configuration that cannot work."""
    for field in dataclasses.fields(config):
        value, allowed = getattr(config, field.name), field.metadata["allowed"]
        word = isinstance(value, str)
        if allowed and not (value in allowed if word else allowed[0] <= value <= allowed[1]):
            raise ValueError(f"--{field.name} {value}: not within {allowed}")
    grown = config.curriculum * (config.d - 2)
    unknown = set(config.figures.split(",")) - {"all", *EXPERIMENTS}
    for wrong, message in (
        (unknown, f"figures: all, or some of {','.join(EXPERIMENTS)}"),
        (config.n < config.d + 2, "n: at least d + 2"),
        (config.width % config.heads, "heads: a divisor of the width"),
        (config.seed + config.seeds > 10**9 + 1, "seed, seeds: the last is above 1000000000"),
        (0 < config.steps <= grown, f"steps: 0, or above {grown} (curriculum)"),
        (config.device == "cuda" and not torch.cuda.is_available(), "device cuda: none here")):
        if wrong:
            raise ValueError(f"--{message}")


def parse(arguments):
    """Command line -> (the preset's line, Config). Bad input: one line, exit status 2."""
    parser = argparse.ArgumentParser("icl_newton.py", usage=argparse.SUPPRESS, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    presets = "; ".join(f"{name}: {line}" for name, (line, _) in PRESETS.items())
    parser.add_argument("--preset", choices=PRESETS, default="default", help=presets)
    for field in dataclasses.fields(Config):
        text = f"{field.metadata['text']} (default: {field.default})"
        parser.add_argument(f"--{field.name}", type=field.type, help=text)
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


@matplotlib.rc_context(STYLE)
def run(config):
    """Make the figures, print the table of claims, write all into `out`."""
    out, found, titles, start = Path(config.out), {}, {}, time.perf_counter()
    wanted, seeds = config.figures.split(","), range(config.seed, config.seed + config.seeds)
    for name in [name for name in EXPERIMENTS if name in wanted or "all" in wanted]:
        sheet = functools.cache(make_sheet)  # same titles, same panels, for all seeds
        for one in (dataclasses.replace(config, seed=seed, seeds=1) for seed in seeds):
            axes, title, numbers = EXPERIMENTS[name](one, sheet)
            for key, z in numbers.items():
                found.setdefault(key, []).append(np.asarray(z, dtype=float).tolist())
        titles[name] = title.format(**{key: np.mean(found[key], axis=0) for key in numbers})
        write_file(out / f"{name}.png", draw(axes, titles[name]))
        print(f"{time.perf_counter() - start:5.0f} s  {name}: {titles[name]}", flush=True)
    lines, holds = table(found)
    record = dict(settings=vars(config), titles=titles, holds=holds, measured=found)
    write_file(out / "results.json", json.dumps(record, indent=1).encode())
    write_file(out / "table.md", "\n".join(lines).encode())
    print("", *lines, "", *titles.values(), sep="\n")
    return holds


def main(arguments=None):
    """Run the command line. Exit status 0, 1 (a run failed), 2 (bad input) or 130 (Ctrl-C)."""
    line, config = parse(arguments)
    print(f"icl_newton: {line}")
    try:
        run(config)
    except (NotImplementedError, FloatingPointError, ValueError, OSError, MemoryError) as error:
        print(f"icl_newton: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nicl_newton: stopped; say it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__" and "__file__" in globals():  # in a notebook: run(Config())
    sys.exit(main())
