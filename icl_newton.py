# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy", "torch==2.13.0", "matplotlib"]
# ///
"""
Do Transformers that learn linear regression in context run Newton's method, layer by layer?

Give a Transformer a prompt x_1, y_1, ..., x_{n+1} whose answers come from a hidden rule y = w*.x,
new in every prompt. Trained on enough of them, it solves a *new* regression in one forward pass. By
which algorithm? Fu, Chen, Jia and Sharan (arXiv 2310.17086, "Fu") say: each layer is worth a fixed
number of steps of Iterative Newton; gradient descent would need exponentially many. This file
trains such a network in minutes, reads a prediction out of every layer, lays it beside Newton and
gradient descent, and asks whether the evidence could have said no.

    python icl_newton.py                    all figures, figures/results.json, a table of claims
    python icl_newton.py --preset quick     a first look in half a minute
    python icl_newton.py --figures rates    one figure; --help lists every setting

It finds (README) that at d = 5 the last of 8 layers beats any first-order method of 8
steps, step sizes fixed in advance. But little singles out Newton: conjugate gradient climbs three
Newton steps a step, a layer fewer by error after 2d examples, and training moves the rate.

One idea carries the file: **every learner is a trajectory of predictions** (steps, prompts, n+1):
a method's steps, a network's layers. The same comparisons serve them all.

Unlike Fu's: d = 5, n = 10, 8 layers, not 20, 40, 12 (`--preset laptop`: Fu's d, n). Muon, not Adam:
thousands of steps, not 500,000. GD's step size is 1/lambda_max(S), not 0.01. SiLU, not GELU.

Notation (Fu's). Shapes: prompts first, (prompts, n+1, d). P prompts, L layers, T tokens, W wide.
    d, n          dimension of x; examples in a prompt. The (n+1)-th x is the last query.
    t = 0..n      prefix length: every prompt asks n+1 questions, after 0, 1, ..., n examples
    Sigma, kappa  covariance of x and its condition number (1: isotropic)
    S, b          X^T X = sum_{i<=t} x_i x_i^T and X^T y of a prefix
"""

import argparse
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
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from torch import nn

# %% Part I, the paper's claim. 1. Settings: the fields are the flags, the comments their help


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run. Raises ValueError, in one line, for a value that cannot work."""

    d: int = 5  # dimension of x and of the hidden rule w*
    n: int = 10  # examples in a prompt
    kappa: float = 1.0  # condition number of the covariance of x (Fu's other value: 100)
    noise: float = 0.0  # standard deviation of the noise on y (Fu's other value: 0.1)
    tails: int = 0  # inputs with Student's t of so many degrees of freedom; 0: Gaussian
    layers: int = 8  # layers of the Transformer
    width: int = 40  # width of its residual stream
    heads: int = 2  # attention heads per layer; must divide the width
    recipe: str = "muon"  # muon, or fu: the paper's Adam at a constant 1e-4, mean squared error
    steps: int = 6000  # training steps
    batch: int = 64  # fresh prompts per step
    muon_lr: float = 0.007  # Muon's step size, for the matrices of the blocks
    adam_lr: float = 0.01  # AdamW's step size, for embedding, positions and readout
    curriculum: int = 0  # steps per added dimension, starting at 2; 0: all d from the start
    seed: int = 1  # of weights and prompts; it and all above it decide the weights
    seeds: int = 1  # how many seeds to run, from `seed` on; verdicts then rest on their spread
    prompts: int = 2048  # fresh prompts for comparisons; four times as many fit the readouts
    preset: str = "default"  # default, quick (shrunk), laptop (Fu's problem) or paper (for CUDA)
    figures: str = "all"  # which figures to make, by name, separated by commas
    device: str = "auto"  # cpu, cuda, or auto: CUDA where there is one
    out: str = "figures"  # folder for pictures and results.json
    checkpoints: str = "checkpoints"  # folder for models, trained and in training

    def __post_init__(self):
        check(self)  # near the end of the file


# %% 2. Prompts (Fu, section 3)
# w* ~ N(0, I_d), x_i ~ N(0, Sigma), y_i = w*.x_i + noise. A new w* for every prompt: nothing can be
# memorised, so whatever predicts y_{t+1} must be an algorithm that runs on the prompt.

def sample_prompts(prompts, n, d, *, kappa=1.0, noise=0.0, tails=0, generator=None):
    """Regression prompts xs (prompts, n+1, d), ys (prompts, n+1), float32, on generator's device.

    kappa > 1: each prompt has its own covariance, a uniformly random eigenbasis whose first d//2
    eigenvalues are kappa times the others, of trace d (Fu, section 4.3). noise: the standard
    deviation of what is added to every y. tails > 0: every Gaussian x_i is divided by the root
    mean square of so many standard normals, which makes it Student's t.
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
    if tails:
        xs = xs * draw(prompts, n + 1, tails).square().mean(-1, keepdim=True).rsqrt()
    w_star = draw(prompts, d, 1)
    ys = (xs @ w_star).squeeze(-1)
    return xs, (ys + noise * draw(prompts, n + 1) if noise else ys)


def draw_prompts(config, count, generator, n=None, d=None):
    """Prompts of the configuration's distribution, of its own size unless another is given."""
    law = dict(kappa=config.kappa, noise=config.noise, tails=config.tails)
    return sample_prompts(count, n or config.n, d or config.d, **law, generator=generator)


# %% 3. Three classical learners (Fu, section 3.1)
# They see a prefix only through S = X^T X and b = X^T y, all prefixes at once, in float64. Noise of
# variance s^2 turns the best predictor's S into S + s^2 I: that is `ridge`.
#     least squares       w = pinv(S) b               the answer; of minimum norm while t < d
#     gradient descent    w <- w - eta (S w - b)      O(kappa log 1/eps) steps; kappa of S
#     Iterative Newton    M <- 2M - M S M,  w = M b   O(log kappa + log log 1/eps) steps
# Newton looks for the inverse of S. Let R_k = I - S M_k be what is missing from it. Then
#     R_{k+1} = I - S (2 M_k - M_k S M_k) = (I - S M_k)^2 = R_k^2,
# so 10^-3 becomes 10^-6, then 10^-12: digits double. Without noise w* - w_k = R_k w*, as M_k and S
# commute. Along an eigenvector of eigenvalue lambda, k steps of Newton, M_0 = alpha S, leave a
# share (1 - alpha lambda^2)^(2^k) of the error, m steps of GD (1 - eta lambda)^m. So at first only
# Newton's *reach* grows: it has found directions with lambda > lambda_max 2^(-k/2), GD those with
# lambda > lambda_max/m. Once all are found, digits double. The figures mostly measure phase one.
#
# Newton converges for alpha < 2/lambda_max(S)^2. Fu print the edge, 2/||S S^T||_2: one eigenvalue
# of R is -1 there, and its square never shrinks. And the order of factors matters: M S M forgets
# rounding errors; S M M or M M S lets them grow up to kappa-fold in every step.

TINY = 1e-30  # keeps the empty prefix, S = 0, from dividing by zero
RANK_TOLERANCE = 1e-12  # an eigenvalue below this share of the largest is rounding


def prefix_moments(xs, ys, ridge=0.0):
    """S (prompts, n+1, d, d), plus ridge I, and b (prompts, n+1, d) of the prefixes t = 0..n."""
    xs, ys = xs.double(), ys.double()

    def sum_before(z):  # shifted by one, so that no prediction sees its own answer
        return torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1].cumsum(1)], dim=1)

    S = sum_before(xs[..., :, None] * xs[..., None, :])
    return S + ridge * torch.eye(xs.shape[-1]).to(S), sum_before(ys[..., None] * xs)


def step_counts(steps):
    """The step counts of a trajectory, in increasing order; an int s means 0..s."""
    return list(range(steps + 1)) if isinstance(steps, int) else list(steps)


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


def gradient_descent(xs, ys, steps, lr=None, ridge=0.0):
    """Gradient descent from 0, w <- w - lr (S w - b): a trajectory (len(steps), prompts, n+1).

    lr, a number, defaults to the textbook's safe step 1/lambda_max(S), prefix by prefix.
    """
    S, b = prefix_moments(xs, ys, ridge)
    eigenvalues, U = torch.linalg.eigh(S)  # ascending; eigenvectors are the columns of U
    lr = 1 / eigenvalues[..., -1:].clamp_min(TINY) if lr is None else lr
    spanned = eigenvalues > RANK_TOLERANCE * eigenvalues[..., -1:]
    solution = torch.where(spanned, times(U.mT, b) / eigenvalues, 0.0)
    k = torch.tensor(step_counts(steps), dtype=torch.float64)[:, None, None, None]
    found = 1 - (1 - lr * eigenvalues) ** k  # (steps, prompts, n+1, d): k steps are one power
    return predict(found * solution, times(U.mT, xs.double()))  # w.x is the same in every basis


def newton_start(S):
    """A safe alpha for M_0 = alpha S (..., d, d): 1/||S S^T||_F (..., 1, 1), finite for S = 0."""
    return 1 / torch.linalg.matrix_norm(S @ S.mT, keepdim=True).clamp_min(TINY)


def newton(xs, ys, steps, alpha=None, ridge=0.0):
    """Iterative Newton, M <- 2M - M S M from M_0 = alpha S, w_k = M_k b (Fu, section 3.1).

    A trajectory (len(steps), prompts, n+1), float64; step 0 is M_0. alpha, a number, defaults to
    newton_start(S), prefix by prefix.
    """
    counts = step_counts(steps)
    S, b = prefix_moments(xs, ys, ridge)
    M = (newton_start(S) if alpha is None else alpha) * S
    weights = [times(M, b)]
    for _ in range(counts[-1]):
        M = 2 * M - M @ S @ M
        weights.append(times(M, b))
    return predict(torch.stack(weights)[counts], xs)


# %% 4. The Transformer
# A decoder like GPT-2: blocks of causal attention and an MLP add to a residual stream. It predicts
# y_{t+1} at the token x_{t+1}. Normalised queries and keys keep large step sizes stable.

def interleave(xs, ys):
    """Prompts (prompts, n+1, d), (prompts, n+1) -> tokens (prompts, 2n+1, d): x_1, y_1, ...

    y is zero-padded to d entries, and the last y, the answer, is left out (Fu, section 3).
    """
    y_tokens = F.pad(ys[..., None], (0, xs.shape[-1] - 1))  # (prompts, n+1, d): y, 0, ..., 0
    return torch.stack([xs, y_tokens], dim=2).flatten(1, 2)[:, :-1]


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
        self.config, L, W, T = config, config.layers, config.width, 2 * config.n + 1
        self.read_in = nn.Parameter(0.3 * torch.randn(W, config.d) / math.sqrt(config.d))
        self.positions = nn.Parameter(0.02 * torch.randn(T, W))
        self.read_out = nn.Parameter(torch.zeros(W))
        # Standard deviations 1/sqrt(3 W), as torch.nn.Linear's; half that for what writes into h.
        self.attention = nn.Parameter(torch.randn(L, 4, W, W) / math.sqrt(3 * W))  # Q, K, V, O
        self.mlp = nn.Parameter(torch.randn(L, 2, 2 * W, W) / math.sqrt(3 * W))  # up, down^T
        with torch.no_grad():
            self.attention[:, 3] /= 2
            self.mlp[:, 1] /= 2

    def stream(self, xs, ys):
        """The residual stream (prompts, T, W) after the embedding and after every layer."""
        h = interleave(xs, ys) @ self.read_in.mT
        h = h + self.positions[: h.shape[1]]
        yield h
        for attention, (up, down) in zip(self.attention.unbind(), self.mlp.unbind()):
            h = h + self.attend(normalize(h), attention)
            h = h + F.silu(normalize(h) @ up.mT) @ down
            yield h

    def attend(self, h, weights):
        """Multi-head causal attention on h (prompts, T, W) with weights (4, W, W)."""
        P, T, W = h.shape
        qkv = F.linear(h, weights[:3].flatten(0, 1))
        q, k, v = qkv.view(P, T, 3, self.config.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = causal_attention(normalize(q), normalize(k), v)  # (prompts, heads, T, W/heads)
        return mixed.transpose(1, 2).reshape(P, T, W) @ weights[3].mT

    def states(self, xs, ys):
        """What probes see: the normalised x tokens of the stream, (L+1, prompts, n+1, W)."""
        return torch.stack([normalize(h[:, ::2]) for h in self.stream(xs, ys)])

    def forward(self, xs, ys):
        """Predictions (prompts, n+1) of ys: entry t is made at the token x_{t+1}."""
        *_, last = self.stream(xs, ys)
        return normalize(last[:, ::2]) @ self.read_out


# %% 5. Training
# The paper's Adam takes hundreds of thousands of steps. Two changes, and larger steps that shrink,
# make it thousands (`--recipe fu` has none). Each prefix counts by the *square root* of its mean
# error: late errors are a thousand times smaller than early ones, yet show the rate. (Errors are
# |e|^1.5: among squares a few unlucky prompts drown the rest.) And Muon (Keller Jordan, 2024)
# replaces each matrix's momentum by the nearest orthogonal matrix, which a relative of Newton's
# iteration finds: all directions are learned at one speed.

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
        """One update, of the size of AdamW's."""
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


def training_prompts(config, step, generator):
    """The fresh prompts of one training step: xs (batch, n+1, d), ys (batch, n+1).

    A curriculum (Garg et al., 2022) starts with 2 active dimensions and 2d + 2 examples, and grows
    both up to d and n; inactive dimensions are 0. Training at d = 20 does not start without it.
    """
    d = min(2 + step // config.curriculum, config.d) if config.curriculum else config.d
    n = config.n if d == config.d else min(2 * d + 2, config.n)
    xs, ys = draw_prompts(config, config.batch, generator, n, d)
    return F.pad(xs, (0, config.d - d)), ys


def training_step(model, optimizers, config, step, generator):
    """One step on fresh prompts. Returns their mean squared error, a tensor on the device."""
    xs, ys = training_prompts(config, step, generator)
    error = model(xs, ys) - ys  # (batch, n+1)
    warm_up, decay = min((step + 1) / 100, 1), (config.steps - step) / config.steps
    if config.recipe == "fu":
        loss, factor = error.square().mean(), 1.0
    else:
        typical = error.abs().clamp_min(TINY).pow(1.5).mean(0)  # (n+1,), prefix by prefix
        loss, factor = typical.sqrt().mean(), warm_up * decay
    loss.backward()
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * factor
        optimizer.step()
    model.zero_grad()
    return error.detach().square().mean()


def checkpoint_path(config, device):
    """The file of this training; its name has a hash of all that decides the weights, code too."""
    code = [Transformer, interleave, normalize, causal_attention, sample_prompts, draw_prompts,
            training_prompts, training_step, make_optimizers, Muon, orthogonalize]
    settings = str(list(vars(config).items())).partition("('seeds'")[0]
    text = "".join(map(inspect.getsource, code)) + settings + str(device)
    key = hashlib.sha256(text.encode()).hexdigest()[:10]
    return Path(config.checkpoints) / f"d{config.d}-seed{config.seed}-{key}.pt"


def write_file(path, write):
    """write(temporary path), then move it to `path`: a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write(temporary)
    temporary.replace(path)


def train(config, save_every=250):
    """The trained network of `config`; a killed run goes on at its checkpoint, to the same bits.

    FloatingPointError: the loss is not finite. ValueError: the checkpoint is damaged.
    """
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed)
    model = Transformer(config).to(device)
    parts = [model, *make_optimizers(model, config)]
    generator = torch.Generator(device).manual_seed(config.seed)
    path = checkpoint_path(config, device)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}
    except Exception as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}): delete it") from None
    for part, state in zip(parts, saved.get("parts", [])):
        part.load_state_dict(state)
    generator.set_state(saved.get("generator", generator.get_state()))
    first, start = saved.get("done", 0), time.perf_counter()
    for done in range(first + 1, config.steps + 1):
        error = training_step(model, parts[1:], config, done - 1, generator)
        if done % save_every == 0 or done == config.steps:
            if not error.isfinite():
                raise FloatingPointError(f"no finite loss at step {done}: try a smaller --muon_lr")
            left = (time.perf_counter() - start) / (done - first) * (config.steps - done)
            print(f"  step {done}, error/d {error / config.d:.4f}, {left:.0f} s left", flush=True)
            states = [part.state_dict() for part in parts]
            saved = dict(done=done, parts=states, generator=generator.get_state())
            write_file(path, functools.partial(torch.save, saved))
    return model.requires_grad_(False)


# %% 6. What does each layer know? (Fu, section 4.1)
# Fit, for every layer of the frozen network, the linear readout that predicts best from its state,
# on prompts other than those that judge it, and many: 2,048 would double the last layer's error.

def fresh_prompts(config, count, purpose):
    """Prompts that training never saw, on the CPU; each purpose, a number, has its own."""
    generator = torch.Generator().manual_seed(1_000_003 * config.seed + purpose)
    return draw_prompts(config, count, generator)


@torch.no_grad()
def probe_features(model, xs, ys):
    """All layers' states and a constant 1, in float64 on the CPU: (L+1, prompts, n+1, W+1)."""
    device = model.read_out.device
    return F.pad(model.states(xs.to(device), ys.to(device)).double().cpu(), (0, 1), value=1.0)


def least_squares_readout(H, y):
    """The r that minimises ||H r - y||: H (..., samples, width), y (samples,) -> (..., width).

    Of all best r the shortest, since a layer leaves directions of its state unused. All float64.
    """
    return times(torch.linalg.pinv(H.mT @ H, hermitian=True, rtol=1e-12), times(H.mT, y))


def layer_learner(model, xs, ys):
    """A learner: (xs, ys) -> the layers' predictions, (L+1, prompts, n+1); 0 is the embedding.

    Each layer's readout is the one that fits the given prompts best, all prefixes at once.
    """
    H = probe_features(model, xs, ys).flatten(1, 2)
    readouts = least_squares_readout(H, ys.double().flatten())
    return lambda xs, ys: torch.einsum("lptw,lw->lpt", probe_features(model, xs, ys), readouts)


# %% 7. Comparing two learners
# Two rulers. *Similarity* (Fu, section 4.1): the cosine between the error vectors that two learners
# make on a prompt, over the prefixes t = 1..n. (At t = 0 nobody knows anything; the authors' code
# counts it.) Which step of Newton is a layer most like? *Equal error*: after how many steps is
# Newton as good as the layer, after t examples? Intervals come from the bootstrap: everything is
# computed again on prompts drawn, with replacement, from ours.

def error_cosines(traj_a, traj_b, ys):
    """Cosines of errors, prediction - y over t = 1..n, of all pairs, prompt by prompt, in float64.

    (A, prompts, n+1), (B, prompts, n+1) -> (A, B, prompts); 0 where an error is 0.
    """
    a, b = (F.normalize((z.double() - ys)[..., 1:], dim=-1) for z in (traj_a, traj_b))
    return torch.einsum("apt,bpt->abp", a, b)


def similarity_of_errors(traj_a, traj_b, ys):
    """Fu's SimE, the mean of error_cosines over prompts: (A, B)."""
    return error_cosines(traj_a, traj_b, ys).mean(-1)


def best_match(similarity):
    """For each step of a, the index of the most similar step of b: (..., A, B) -> (..., A)."""
    return similarity.argmax(-1)


def means(values, rounds=1000):
    """Mean over prompts, then over resampled prompts: (..., prompts) -> (1 + rounds, ...).

    The same draws in every call, so that a difference or a ratio of two means is fair.
    """
    P = values.shape[-1]
    times_drawn = np.random.default_rng(0).multinomial(P, np.full(P, 1 / P), rounds)
    shares = torch.from_numpy(np.vstack([np.ones(P), times_drawn]) / P)
    return torch.einsum("rp,...p->r...", shares, values.double())


def matched_steps(layers, counts, run, ys):
    """The steps of a run that layers 1..L are most like: (1 + rounds, L), resampled as in means.

    layers (L+1, prompts, n+1), run (K, prompts, n+1), counts (K,): the run's steps.
    """
    return torch.as_tensor(counts).double()[best_match(means(error_cosines(layers[1:], run, ys)))]


def equal_steps(layers, counts, run, ys, t):
    """The same, but when the run's mean squared error after t examples reaches the layer's."""
    counts = torch.as_tensor(counts).double()
    wanted, curve = (means((z[..., t] - ys[:, t]).square()) for z in (layers[1:], run))
    wanted, rising = (-z.clamp_min(TINY).log() for z in (wanted, curve.cummin(-1).values))
    right = torch.searchsorted(rising, wanted).clamp(1, len(counts) - 1)
    low, high = rising.gather(-1, right - 1), rising.gather(-1, right)
    share = ((wanted - low) / (high - low).clamp_min(TINY)).clamp(0, 1)
    return counts[right - 1] + share * (counts[right] - counts[right - 1])


def by_each_ruler(layers, counts, run, ys, d):
    """Both rulers, error after n and d examples: {ruler: (1 + rounds, L)}."""
    pair = layers, counts, run, ys
    equal = {f"error, t = {name}": equal_steps(*pair, t) for name, t in (("n", -1), ("d", d))}
    return {"similarity": matched_steps(*pair)} | equal


def line_fit(x, y):
    """Least-squares line through (x, y) along the last axis: slope and R^2, each (...)."""
    dx, dy = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    slope = (dx * dy).sum(-1) / dx.square().sum(-1).clamp_min(TINY)
    return slope, slope * (dx * dy).sum(-1) / dy.square().sum(-1).clamp_min(TINY)


# %% 8. At which rate do the layers converge?
# The best-matching steps of layers 3, 4, ... should lie on a line; its slope is the Newton steps
# that a layer is worth. For GD it is their log2: steps double from layer to layer. An experiment
# returns a title, its panels' data and {claim: measured}; `draw` makes the picture.

FIRST_LAYER = 3  # rates start here, as the paper's do
NEWTON_STEPS = list(range(33))  # float64 is safe for about 40: off the span rounding doubles
GD_STEPS = sorted({round(2 ** (k / 2)) for k in range(33)})  # 1, 2, 3, 4, 6, ..., 65536
PAPER = {  # Fu's Transformer (d = 20, n = 40): best matches of layers 1..12, figures 8 and 10
    "Newton": [1, 1, 2, 5, 8, 10, 14, 16, 20, 20, 21, 21],
    "GD": [1, 1, 4, 8, 32, 64, 256, 512, 1024, 4096, 4096, 4096]}
SHAPE_OF = {"Newton": "line", "GD": "exponential"}  # what the paper sees in them


def interval(samples):
    """The middle 95% of samples (1 + rounds, ...): (2, ...)."""
    return samples.double().quantile(torch.tensor([0.025, 0.975]).double(), dim=0)


def measured(samples):
    """A number, or the first of samples (1 + rounds,), with the middle 95% of them."""
    samples = torch.as_tensor(samples).double().reshape(-1)
    low, high = interval(samples).tolist()
    return {"value": samples[0].item(), "low": low, "high": high}


def panel(title, curves, xlabel="layer", ylabel="", log="", heat=None, **axes):
    """One panel of a picture: curves {label: y or (x, y)}, x = 1, 2, ...; or a heat map.

    y may be samples (1 + rounds, points): their first row is drawn, with 95% bars. log: which axes.
    """
    data = {}
    for label, curve in curves.items():
        x, y = curve if isinstance(curve, tuple) else (range(1, np.shape(curve)[-1] + 1), curve)
        bars = interval(y) if np.ndim(y) == 2 else None
        data[label] = {"x": x, "y": y if bars is None else y[0], "bars": bars}
    axes |= {"xlabel": xlabel, "ylabel": ylabel} | {f"{axis}scale": "log" for axis in log}
    return {"title": title, "curves": data, "heat": heat, "axes": axes}


def rate(steps, log2=False, first=FIRST_LAYER):
    """Slope of steps (..., L), or of their log2, against the layer, from the first on: (...)."""
    y = steps.clamp_min(1).log2() if log2 else steps
    return line_fit(torch.arange(first, y.shape[-1] + 1).double(), y[..., first - 1 :])[0]


@functools.cache
def study(config):
    """A trained network's layers, and the steps of Newton and GD, on one set of test prompts."""
    model, ridge = train(config), config.noise**2
    learner = layer_learner(model, *fresh_prompts(config, 4 * config.prompts, purpose=1))
    xs, ys = fresh_prompts(config, config.prompts, purpose=2)
    runs = {"Newton": (NEWTON_STEPS, newton(xs, ys, NEWTON_STEPS, ridge=ridge)),
            "GD": (GD_STEPS, gradient_descent(xs, ys, GD_STEPS, ridge=ridge))}
    return SimpleNamespace(learner=learner, xs=xs, ys=ys, layers=learner(xs, ys), runs=runs)


@functools.cache
def climbs(config):
    """The steps of Newton and GD that layers 1..L match: {"Newton: ruler": (1 + rounds, L)}."""
    s = study(config)
    return {f"{name}: {ruler}": steps for name, run in s.runs.items()
            for ruler, steps in by_each_ruler(s.layers, *run, s.ys, config.d).items()}


def rates(config):
    """Fu, figure 3, by both rulers: the steps of Newton and of GD that the layers match."""
    found, curves = {}, {name: {"Fu: d = 20, 12 layers": PAPER[name]} for name in PAPER}
    for key, steps in climbs(config).items():
        name, ruler = key.split(": ")
        shape, unit = SHAPE_OF[name], "doublings" if name == "GD" else "steps"
        worth = found[f"{name}_rate: {ruler}"] = measured(rate(steps, log2=name == "GD"))
        curves[name][f"{name} by {ruler}: {worth['value']:.1f} {unit} a layer"] = steps
        if ruler == "similarity":
            found[f"{name}_{shape}"] = measured(evidence(shape, steps))
    panels = [panel("steps of Newton", curves["Newton"]),
              panel("steps of GD", curves["GD"], log="y")]
    both = (found[f"Newton_rate: {ruler}"]["value"] for ruler in ("similarity", "error, t = n"))
    title = "A layer adds {:.1f} Newton steps by similarity, {:.1f} by error after n examples"
    return title.format(*both), panels, found


# %% Part II, evidence that can say no. 9. Claims, verdicts, rulers
# Every claim, with its rule, before anything is measured; `.98 ..` reads: at least .98. A claim
# *agrees* if the whole 95% interval (over prompts for one seed, over seeds for several) obeys the
# rule, *fails* if all of it breaks the rule, and is *undecided* else. `shape`: see `evidence`.
# Rulers before results: known algorithms take the place of the layers. The control is CG, conjugate
# gradient: a first-order method, one product with S a step, exact after d steps, whose step sizes
# adapt to the prompt. At d = 5 it climbs two or three Newton steps a step, by ruler: **there such
# rates are no sign of second order.** At d = 20 they are about one.

CLAIMS = """
Newton_line     | fig. 3  | best-matching Newton steps lie on a line            | yes  | shape
GD_exponential  | fig. 3  | best-matching GD steps grow exponentially           | yes  | shape
Newton_rate     | fig. 3  | Newton steps per layer                              | 2.93 |
GD_rate         | fig. 3  | doublings of GD steps per layer                     | 1.42 |
CG_rate         | control | Newton steps per step of CG                         | -    |
error           | open    | last layer's squared error / d after n examples     | -    |
superlinear     | fig. 2  | digits gained per layer: later layers minus earlier | > 0  | 0 ..
like_OLS        | tab. 1  | last layer's similarity to least squares            | -    | .98 ..
like_Newton     | tab. 1  | its similarity to Newton minus to GD, at their best | .034 | 0 ..
like_null       | open    | its similarity to Newton minus a shuffled null's    | -    |
like_beyond_d   | open    | its similarity to Newton on prefixes t > d alone    | -    |
products        | open    | products with S that the last layer is worth        | -    | L ..
products_growth | open    | factor by which a layer multiplies them             | -    |
products_shape  | open    | they grow exponentially with the layer              | -    | shape
kappa_Newton    | fig. 4  | Newton steps matched, kappa = 100 over kappa = 1    | 1.0  | .. 1.5
kappa_GD        | fig. 4  | GD steps matched, kappa = 100 over kappa = 1        | -    | 4 ..
not_linear      | open    | share of the last layer's error that is not linear  | -    |
by_hand         | thm 5.1 | Newton in hand-written layers: largest difference   | 0    | .. 1e-6
Ahn_one         | thm 1   | one layer: relative distance to the closed form     | 0    | .. .03
Ahn_three       | thm 3   | three layers, whitened: distance to a multiple of I | 0    | .. .1
Huang_times     | Huang   | time to learn the other features over feature 1's   | -    |
"""
CLAIMS = {row[0]: row[1:] for row in (re.split(r" *\| ?", r) for r in CLAIMS.strip().split("\n"))}
STUDENT_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # 97.5%, by seeds


def verdict(rule, low, high):
    """agrees, fails or undecided for an interval and a rule; answer where there is no rule."""
    if not rule:
        return "answer"
    least, most = rule.replace("shape", "1.3 ..").split("..")
    least, most = float(least.strip() or -math.inf), float(most.strip() or math.inf)
    if least <= low and high <= most:
        return "agrees"
    lost = -1.3 if rule == "shape" else least
    return "fails" if high < lost or low > most else "undecided"


def over_seeds(runs):
    """Several seeds' numbers as one: their mean, with the 95% interval of Student's t."""
    if len(runs) == 1:
        return runs[0]
    values = [run["value"] for run in runs]
    half = STUDENT_T.get(len(runs), 2.3) * np.std(values, ddof=1) / math.sqrt(len(runs))
    mean = np.mean(values)
    return {"value": mean, "low": mean - half, "high": mean + half}


def print_table(config, runs):
    """Print the claims that were measured. Returns {claim: numbers, seeds' values, verdict}."""
    results = {}
    print("\nverdict (?: another seed may say otherwise)  measured [95%]  rule  paper  claim")
    for key in runs[0]:  # "name: how" is the claim of that name, measured so
        name, _, how = key.partition(": ")
        _, text, paper, rule = CLAIMS[name]
        m, rule = over_seeds([run[key] for run in runs]), rule.replace("L", str(config.layers))
        outcome = verdict(rule, m["low"], m["high"])
        results[key] = m | {"seeds": [run[key]["value"] for run in runs], "verdict": outcome}
        unsure = len(runs) == 1 and name != "by_hand" and "Fu" not in how
        if unsure and outcome in ("agrees", "fails"):
            outcome += "?"
        ends = f"[{m['low']:.3g}, {m['high']:.3g}]" if m["low"] < m["high"] else ""
        print(f"{outcome:<11}{m['value']:>9.3g}  {ends:<18} {rule:<12} {paper:<5} {text} {how}")
    return results


SHAPES = {"line": torch.clone, "square root": torch.sqrt, "square": torch.square,
          "logarithm": torch.log, "exponential": torch.clone, "power law": torch.log}
LOG_Y = "exponential", "power law"  # where a line goes through log y, not y, against f(x)


def evidence(shape, steps):
    """How much likelier a shape is than its best rival, log10, for steps (..., L): (...).

    R^2 says little: six points of a logarithm score .98 on a line. So a shape must beat rivals, all
    of them lines through transformed points. With Gaussian residuals a likelihood is (mean squared
    residual)^(-points/2), residuals of log y being multiplied by the geometric mean of y (Box and
    Cox). Above 1.3, twenty times, the shape wins; below -1.3 it loses.
    """
    y, fits = steps[..., FIRST_LAYER - 1 :].double().clamp_min(1), {}
    x = torch.arange(FIRST_LAYER, steps.shape[-1] + 1).double()
    for name, f in SHAPES.items():
        z, unit = (y.log(), y.log().mean(-1).exp()) if name in LOG_Y else (y, 1.0)
        unexplained = 1 - line_fit(f(x), z)[1].clamp_max(0.999)  # whole steps resolve no more
        residual = unexplained * z.var(-1) * unit**2
        fits[name] = -len(x) / 2 * residual.clamp_min(TINY).log10()
    return fits.pop(shape) - torch.stack(list(fits.values())).amax(0)


def conjugate_gradient(xs, ys, steps, ridge=0.0):
    """Conjugate gradient on S w = b from w = 0: a trajectory (len(steps), prompts, n+1)."""
    S, b = prefix_moments(xs, ys, ridge)
    residual, direction, weights = b, b, [torch.zeros_like(b)]
    energy = start = b.square().sum(-1, keepdim=True)  # (prompts, n+1, 1)
    for _ in range(step_counts(steps)[-1]):
        S_direction = times(S, direction)
        length = energy / (direction * S_direction).sum(-1, keepdim=True)
        length = torch.where(energy > 1e-28 * start, length, 0.0)  # only rounding is left: stop
        weights.append(weights[-1] + length * direction)
        residual = residual - length * S_direction
        before, energy = energy, residual.square().sum(-1, keepdim=True)
        direction = residual + energy / before.clamp_min(TINY) * direction
    return predict(torch.stack(weights)[step_counts(steps)], xs)


def rulers(config):
    """Known learners in the layers' place, each ruler, d = 5 and 20. Trains nothing."""
    panels, found = [], {}
    for d in (5, 20):
        xs, ys = sample_prompts(512, 2 * d, d, generator=torch.Generator().manual_seed(config.seed))
        target = NEWTON_STEPS, newton(xs, ys, NEWTON_STEPS)
        known = {"Newton": target[1][:13], "GD": gradient_descent(xs, ys, 12),
                 "CG": conjugate_gradient(xs, ys, min(d - 1, 12))}
        climb = {name: by_each_ruler(run, *target, ys, d) for name, run in known.items()}
        for ruler in climb["CG"]:
            curves = {name: steps[ruler] for name, steps in climb.items()}
            panels.append(panel(f"d = {d}, by {ruler}", curves, "its own step", "Newton step"))
            found[f"CG_rate: d = {d}, {ruler}"] = measured(rate(curves["CG"], first=1))
    for name, last in (("Newton", 9), ("GD", 10)):  # the paper's table, and the layers it fits
        for key, end in (("Fu", 12), (f"Fu, to layer {last}", last)):
            lead = evidence(SHAPE_OF[name], torch.tensor(PAPER[name][:end]))
            found[f"{name}_{SHAPE_OF[name]}: {key}"] = measured(lead)
    title = "By similarity CG climbs {:.1f} Newton steps a step at d = 5, {:.1f} at d = 20"
    slopes = (m["value"] for key, m in found.items() if "similarity" in key)
    return title.format(*slopes), panels, found


# %% 10. Errors, layer by layer, and what similarity is made of
# Most of an error no method can avoid: at t < d the examples do not determine w*. So a
# *null* gives a layer's deviations from its best Newton step to other prompts, with random signs.

def convergence(config):
    """Fu, figure 2: squared error of layers, of Newton's steps, and of GD's."""
    s, d, n, panels = study(config), config.d, config.n, []
    runs = {"Transformer": (range(config.layers + 1), s.layers)} | s.runs
    for name, (counts, run) in runs.items():
        error = (run - s.ys).square().mean(1) / d  # (steps, n+1)
        curves = {f"t = {t}": (counts, error[:, t]) for t in sorted({d - 1, d, d + 2, n})}
        labels = "layer or step", "squared error / d", "xy" if name == "GD" else "y"
        panels.append(panel(name, curves, *labels, ylim=(1e-7, 2)))
    errors = means((s.layers[FIRST_LAYER - 1 :, :, n] - s.ys[:, n]).square())  # of layers 2..L
    digits = -errors.log10().diff()  # gained by layers 3..L: (1 + rounds, L-2)
    half = digits.shape[-1] // 2
    superlinear = digits[:, -half:].mean(-1) - digits[:, :half].mean(-1)
    found = {"error": measured(errors[:, -1] / d), "superlinear": measured(superlinear)}
    title = f"After {n} examples the last layer's error / d is {found['error']['value']:.1e}"
    return title, panels, found


def null_similarity(layers, steps, ys):
    """SimE (L,) of layers (L, P, n+1) with steps (L, P, n+1) when deviations are shuffled."""
    generator = torch.Generator().manual_seed(0)
    others = torch.randperm(len(ys), generator=generator)
    signs = 2 * torch.randint(2, (len(ys), 1), generator=generator) - 1
    shuffled = steps + (layers - steps)[:, others] * signs
    return similarity_of_errors(shuffled, steps, ys).diagonal()


def heatmaps(config):
    """Fu, figures 3, 8, 10: similarity of errors; and what its null and t > d alone score."""
    s, d, panels, curves, last, match = study(config), config.d, [], {}, {}, {}
    layers, steps = s.layers[1:], s.runs["Newton"][1]
    for name, (counts, run) in s.runs.items():
        alike = means(error_cosines(layers, run, s.ys))  # (1 + rounds, L, K)
        curves[name], last[name] = alike[0].amax(-1), alike[:, -1].amax(-1)
        ticks = dict(yticks=range(0, len(counts), 8), yticklabels=counts[::8], ylabel="step")
        match[name] = best_match(alike[0])
        dots = {"Transformer's best match": match[name]}
        panels.append(panel(name, dots, heat=alike[0].T, **ticks))
    null = curves["(shuffled null)"] = null_similarity(layers, steps[match["Newton"]], s.ys)
    late = similarity_of_errors(layers[..., d:], steps[..., d:], s.ys[:, d:]).amax(-1)
    curves["Newton, t > d alone"] = late
    panels.append(panel("similarity at the best step", curves))
    to_ols = error_cosines(layers[-1:], ols(s.xs, s.ys, config.noise**2), s.ys)
    found = {"like_OLS": measured(means(to_ols)), "like_beyond_d": measured(late[-1]),
             "like_Newton": measured(last["Newton"] - last["GD"]),
             "like_null": measured(last["Newton"][0] - null[-1])}
    title = "The last layer's similarity to Newton: {:.3f}; shuffled: {:.3f}"
    return title.format(last["Newton"][0], null[-1]), panels, found


# %% 11. How many products with S is a layer worth?
# A ruler that can say no. A first-order method multiplies a vector by S once a step. Let its step
# sizes and momenta be fixed in advance, in units of 1/lambda_max(S). After D steps from 0 (the
# first multiplies 0) w = p(S/lambda_max) b/lambda_max, with a polynomial p of degree D - 1 that is
# the same for all prompts. So the p that is best on average is at least as good as *every* such
# method, and least squares finds it, for each D and t. D*(l) is the D whose best p is as good as
# layer l: a network that makes one such step a layer has D*(l) <= l. (Drawn too: sizes in one unit
# for all.) Not covered is CG, which finds its sizes on the prompt. And Newton starts slower than
# one: k steps reach lambda_max 2^(-k/2), D products lambda_max/D^2: at first D* is but 2^(k/4).

def polynomial_features(xs, ys, t, degree, size=None):
    """x_q^T T_j(2 S/size - I) b/size, T_j Chebyshev polynomials, j < degree: (prompts, degree)."""
    X, x_q = xs[:, :t].double(), xs[:, t].double()
    eigenvalues, U = torch.linalg.eigh(X.mT @ X)
    size = eigenvalues[:, -1:] if size is None else size
    weight = times(U.mT, x_q) * times(U.mT, times(X.mT, ys[:, :t].double())) / size
    T = np.polynomial.chebyshev.chebvander((2 * eigenvalues / size - 1).numpy(), degree - 1)
    return np.einsum("pd,pdj->pj", weight.numpy(), T)


@functools.cache
def best_polynomials(config, t, per_prefix=True, degree=128):
    """The answers of the best methods of 0..degree products on the prompts of `study`, at t alone.

    (degree+1, prompts, n+1); zeros at other prefixes. The methods are fitted on other prompts.
    """
    fitting, s = fresh_prompts(config, 20_000, purpose=4), study(config)
    size = None if per_prefix else torch.linalg.matrix_norm(fitting[0][:, :t], 2).max() ** 2
    fit = polynomial_features(*fitting, t, degree, size)
    test = polynomial_features(s.xs, s.ys, t, degree, size)
    Q, R = np.linalg.qr(fit)  # one orthonormal basis serves all degrees
    parts = np.linalg.solve(R.T, test.T) * (Q.T @ fitting[1][:, t].double().numpy())[:, None]
    answers = torch.zeros(degree + 1, *s.ys.shape, dtype=torch.float64)
    answers[1:, :, t] = torch.from_numpy(parts.cumsum(0))
    return answers


def worth_in_products(config, run, t, per_prefix=True):
    """D*, the products with S that the steps 1..L of a run are worth: (1 + rounds, L)."""
    methods = best_polynomials(config, t, per_prefix)
    return equal_steps(run, range(len(methods)), methods, study(config).ys, t)


def products(config):
    """D* of the layers, of Newton's steps and of CG's, for t = d, d + 2 and n."""
    s, L, panels, found = study(config), config.layers, [], {}
    cg = conjugate_gradient(s.xs, s.ys, min(config.d - 1, L), config.noise**2)
    runs = {"Transformer": s.layers, "Newton": s.runs["Newton"][1][: L + 1], "CG": cg}
    layer = torch.arange(1, L + 1)
    for name, t in (("d", config.d), ("d + 2", config.d + 2), ("n", config.n)):
        curves = {"(one a layer)": layer, "(2^layer)": 2.0**layer, "(3^layer)": 3.0**layer}
        curves |= {label: worth_in_products(config, run, t) for label, run in runs.items()}
        curves["Transformer, one scale"] = worth_in_products(config, s.layers, t, per_prefix=False)
        labels = "layer or step", "products with S", "y"
        panels.append(panel(f"after t = {t} examples", curves, *labels, ylim=(0.5, 150)))
        worth = curves["Transformer"]
        found[f"products: t = {name}"] = measured(worth[:, -1])
    growth = found["products_growth"] = measured(2 ** rate(worth, log2=True))  # at t = n
    found["products_shape"] = measured(evidence("exponential", worth))
    title = "After n examples the last layer is worth {:.0f} products; a layer: times {:.2f}"
    return title.format(worth[0, -1], growth["value"]), panels, found


# %% 12. Ill-conditioned data (Fu, section 4.3)
# For one error GD may need kappa times the steps, Newton 2 log2 kappa more. (Fu: over 2,000; 21.)

def conditioning(config):
    """Fu, figures 4, 16: steps that two networks match, at kappa 1 and 100."""
    panels, found, both = [], {}, []
    for c in (dataclasses.replace(config, kappa=kappa) for kappa in (1.0, 100.0)):
        worth = worth_in_products(c, study(c).layers, c.d + 2)
        both.append(climbs(c) | {"products with S, t = d + 2": worth})
    for key, easy in both[0].items():
        hard = both[1][key]
        scale = {} if key.startswith("Newton") else dict(log="y", ylim=(0.8, None))
        panels.append(panel(key, {"kappa = 1": easy, "kappa = 100": hard}, **scale))
        if not key.startswith("products"):
            found[f"kappa_{key}"] = measured(hard[:, -1] / easy[:, -1].clamp_min(1))
    ratios = [found[f"kappa_{name}: error, t = n"]["value"] for name in ("Newton", "GD")]
    title = "At t = n, kappa = 100 matches {:.1f} times Newton's steps, {:.1f} times GD's"
    return title.format(*ratios), panels, found


# %% 13. Is an answer linear in the query, and in the answers before it?
# All of Newton's and GD's are, in both: to answers (y_a + y_b)/sqrt 2 they respond with (yhat_a +
# yhat_b)/sqrt 2. CG's are linear in the query, but not in y: its step sizes depend on it.

def not_linear(learner, xs, ys):
    """Shares (steps,) of the squared error after n examples that are not linear: in x_q, in y."""
    y_b = times(xs, torch.randn(len(xs), xs.shape[-1], generator=torch.Generator().manual_seed(0)))
    x_b, x_mixed = xs.clone(), xs.clone()
    x_b[:, -1] = xs[:, -1].roll(1, 0)  # another prompt's query
    x_mixed[:, -1] = (xs[:, -1] + x_b[:, -1]) / math.sqrt(2)
    prompts = [(xs, ys), (x_b, ys), (x_mixed, ys), (xs, y_b), (xs, (ys + y_b) / math.sqrt(2))]
    a, of_x_b, of_x, of_y_b, of_y = (learner(*prompt)[..., -1].double() for prompt in prompts)
    error = 2 * (a - ys[:, -1]).square().mean(-1).clamp_min(TINY)  # 1 + 1/2 + 1/2 errors
    return [(both - (a + b) / math.sqrt(2)).square().mean(-1) / error
            for both, b in ((of_x, of_x_b), (of_y, of_y_b))]


def linearity(config):
    """New: are a layer's answers linear in the query and in y? Newton's and GD's are."""
    s, last, panels, found = study(config), min(config.d - 1, config.layers), [], {}
    learners = {"Transformer": s.learner, "CG": functools.partial(conjugate_gradient, steps=last)}
    shares = {name: not_linear(learner, s.xs, s.ys) for name, learner in learners.items()}
    for i, of in enumerate(("query", "y")):
        curves = {name: share[i][1:] for name, share in shares.items()}
        panels.append(panel(f"not linear in {of}", curves, "layer or step", "share of the error"))
        for name, curve in curves.items():
            found[f"not_linear: in {of}, {name}"] = measured(curve[-1])
    in_query, in_y = (share[-1] for share in shares["Transformer"])
    title = f"Not linear: {in_query:.0%} of the last error in the query, {in_y:.0%} in y"
    return title, panels, found


# %% Part III, theory that runs. 14. Newton's weights, written by hand (Fu, theorem 5.1)
# An example is one token [T x_j ; x_j ; y_j]; T, no token, is Newton's M. Attention has ReLU
# in place of softmax, and two heads of opposite sign: ReLU(s) - ReLU(-s) = s. (The printed proof
# gives both values one sign, which makes |s|; and scores <T x_j, x_t>, which make T S T^T: that
# doubles antisymmetric rounding.) With j over the examples:
#     first layer      T = alpha S         adds  alpha sum_j x_j <x_j, x_t>  to the top block
#     Newton layer     T <- 2T - T S T     adds  -1/2 T S T x_t  to it, and the MLP doubles it
#     readout layer    x_q^T T b           adds  sum_j y_j <T x_j, x_q>  to the query's empty y
# So k steps take k + 2 layers; Fu's proof spends k + 8. Two costs: one alpha for all prompts; and
# every example must see all others, which our Transformer's causal mask forbids.

def relu_attention(h, heads, mask):
    """h_t + sum over heads (Q, K, V) and j of mask[t, j] ReLU(<Q h_t, K h_j>) V h_j, all t."""
    return h + sum((mask * ((h @ Q.mT) @ (h @ K.mT).mT).relu()) @ (h @ V.mT) for Q, K, V in heads)


def token_blocks(d):
    """(d, 2d+1), (d, 2d+1), (1, 2d+1) that read T x, x, y from a token; transposed, they write."""
    return torch.eye(2 * d + 1, dtype=torch.float64).split([d, d, 1])


def linear_heads(Q, K, V):
    """Two ReLU heads that add sum_j <Q h_t, K h_j> V h_j: ReLU(s) V - ReLU(-s) V = s V."""
    return [(Q, K, V), (-Q, K, -V)]


def newton_layer(d):
    """The weights of one Newton step: tokens [T x ; x ; y] -> [(2T - T S T) x ; x ; y].

    S = sum_j x_j x_j^T. Attention adds -1/2 sum_j T x_j <x_j, T x_t> to the top block, then the MLP
    h + down ReLU(up h) doubles it. All float64: heads, two (Q (d, 2d+1), K (d, 2d+1),
    V (2d+1, 2d+1)), and mlp = (up (2d, 2d+1), down (2d+1, 2d)).
    """
    Tx, x, _ = token_blocks(d)
    heads = linear_heads(Q=Tx, K=x, V=-0.5 * Tx.mT @ Tx)
    up = torch.cat([Tx, -Tx])  # the MLP adds ReLU(s) - ReLU(-s) = s to each entry s of the block
    return heads, (up, up.mT)


def construction(xs, ys, steps, alpha):
    """Newton in ReLU attention: answers to the last query after steps 0..steps, (steps+1, P)."""
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


def by_hand(config):
    """Fu, theorem 5.1: hand-written weights against Newton."""
    xs, ys = fresh_prompts(config, config.prompts, purpose=2)
    setting = NEWTON_STEPS[-1], newton_start(prefix_moments(xs, ys)[0]).min()  # steps, alpha
    runs = {"Newton": newton(xs, ys, *setting)[..., -1],
            "Transformer by hand": construction(xs, ys, *setting)}
    apart = (runs["Transformer by hand"] - runs["Newton"]).abs().max() / ys.square().mean().sqrt()
    curves = {label: (NEWTON_STEPS, (answers - ys[:, -1]).square().mean(1) / config.d)
              for label, answers in runs.items()}
    panels = [panel("", curves, "layer or step k", "squared error / d", "y")]
    title = f"Hand-written attention is Newton, to {apart:.0e}"
    return title, panels, {"by_hand": measured(apart)}


# %% 15. Linear attention is preconditioned gradient descent (Ahn et al., arXiv 2306.00297)
# Without softmax, what a trained layer does can be read off its weights. A prompt is a matrix Z,
# one token a column; M = diag(I_n, 0): the query is no example; e = (0, ..., 0, 1):
#     Z = [ x_1 ... x_n  x_q ]      Z <- Z + (1/n) P Z M (Z^T Q Z)
#         [ y_1 ... y_n   0  ]      P = e e^T      Q = -blockdiag(A, 0)
# Only the last row changes, y_j <- y_j - (1/n) sum_{i<=n} y_i x_i^T A x_j. It holds y_j - w.x_j,
# with w = 0 at first, and -w.x_q under the query. So a layer adds A^T r to w, where r = (1/n) sum_i
# (y_i - w.x_i) x_i is minus the gradient of R(w) = (1/2n) sum_i (w.x_i - y_i)^2: for a symmetric A,
# w <- w - A grad R(w) (lemma 1). What is left to learn is A. For one layer and w ~ N(0, I) the
# problem is convex, the loss quadratic in A: with endless examples the best A is a Newton step,
# Sigma^-1; with few it moves less along small eigenvalues (theorem 1). For many layers and w ~
# N(0, Sigma^-1) no direction is special to Sigma^-1/2 x, so A_l should be a_l Sigma^-1 (theorem 3).

def linear_transformer(A, xs, ys):
    """Every layer's answer to the last query, minus Z's last entry, for A (L, d, d): (L, P)."""
    row, examples, answers = F.pad(ys[:, None, :-1], (0, 1)), xs[:, :-1], []  # Z's last row
    for layer in A:
        row = row - row[..., :-1] @ examples @ layer @ xs.mT / examples.shape[1]
        answers.append(-row[:, 0, -1])
    return torch.stack(answers)


def optimal_preconditioner(Sigma, n):
    """The best A (d, d) of one layer, for n examples x ~ N(0, Sigma), w ~ N(0, I) (Ahn, theorem 1).

    Sigma's eigenvectors, with 1 / ((n+1)/n lambda_i + (1/n) sum_k lambda_k) for its lambda_i.
    """
    eigenvalues, U = torch.linalg.eigh(Sigma)
    return U / ((n + 1) / n * eigenvalues + eigenvalues.sum() / n) @ U.mT


def train_preconditioners(layers, n, Sigma, w_covariance, lr, steps, seed):
    """A_1..A_L, trained by Muon on x ~ N(0, Sigma), w ~ N(0, w_covariance): (steps+1, L, d, d)."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    root, w_root = torch.linalg.cholesky(Sigma), torch.linalg.cholesky(w_covariance)
    A = (0.1 * draw(layers, *Sigma.shape)).requires_grad_()
    optimizer, history = Muon([A], lr, momentum=0.8), [A.detach().clone()]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        xs = draw(1000, n + 1, len(Sigma)) @ root.mT
        ys = times(xs, draw(1000, len(Sigma)) @ w_root.mT)
        optimizer.zero_grad()
        F.mse_loss(linear_transformer(A, xs, ys)[-1], ys[:, -1]).backward()
        optimizer.step()
        history.append(A.detach().clone())
    return torch.stack(history)


def preconditioners(config):
    """Ahn, theorems 1 and 3, figures 1 and 2, in Ahn's sizes: trained linear attention."""
    d, n, seed = 5, 20, config.seed
    U = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed))).Q
    spectrum = torch.tensor([1, 1, 1 / 4, 1 / 16, 1])
    Sigma, inverse, root = ((U * spectrum**power) @ U.mT for power in (1, -1, 0.5))
    closed = optimal_preconditioner(Sigma, n)
    one = train_preconditioners(1, n, Sigma, torch.eye(d), 0.06, 1000, seed)[-1, 0]
    A = train_preconditioners(3, n, Sigma, inverse, 0.4, 600, seed)  # (steps+1, 3, d, d)
    white, norm = root @ A @ root, torch.linalg.matrix_norm
    multiple = white.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * torch.eye(d)
    apart, off = norm(white - multiple) / norm(white), norm(one - closed) / norm(closed)
    paths = {f"whitened A, layer {i + 1}": (range(0, len(A), 10), apart[::10, i]) for i in range(3)}
    entries = {"(equal)": ([0, 1], [0, 1]), "Transformer": (closed.flatten(), one.flatten())}
    title = f"Linear attention is {off:.1%} off theorem 1, {apart[-1].max():.2f} off theorem 3"
    panels = [panel("one layer", entries, "entry of A in theorem 1", "as trained"),
              panel("three layers", paths, "training step", "distance to a multiple of I")]
    return title, panels, {"Ahn_one": measured(off), "Ahn_three": measured(apart[-1].max())}


# %% 16. Softmax attention learns in stages (Huang et al., arXiv 2310.05249)
# A token is one of K orthonormal features, v_k with probability p_k; its answer is w.v_k. One layer
# of softmax attention, with a matrix Q that starts at 0, averages a prompt's N answers:
#     yhat = sum_i softmax_i(x_i^T Q x_q) y_i = sum_n a_n w.v_n     a_n: attention on feature n
# For a query x_q = v_k, and E w w^T = I, the loss is 1/2 [(1 - a_k)^2 + sum_{n != k} a_n^2]. Its
# gradient moves A_k = Q[k,k] and B_{k,n} = Q[n,k]. If all p_k are equal, the A_k grow together,
# past log K, where one right feature balances K wrong. With p_1 = 1/2 feature 1 comes at once, but
# half of every other query's attention rests on it, too: first B_{k,1} falls, then A_k grows.

def train_attention(K, p_1, steps, seed, eta=2.0):
    """Gradient descent on Q, on fresh prompts of N = 10 K examples, queries weighted by p_k.

    Returns (4, steps): loss of feature 1; of the others; A_k and B_{k,1}; means over k > 1.
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
        with torch.no_grad():
            row = losses[0], losses[1:].mean(), Q.diagonal()[1:].mean(), Q[0, 1:].mean()
            path.append(torch.stack(row))
            Q -= eta * gradient
    return torch.stack(path, dim=1)


def stages(config):
    """Huang, section 3: balanced features are learned together, a dominant one first."""
    K, panels, found = 16, [], {}
    x = torch.tensor([round(1.1**i) for i in range(7, 84)])  # of 3000 steps
    for name, p_1 in (("p_1 = 1/16, like all", 1 / K), ("p_1 = 1/2", 1 / 2)):
        path = train_attention(K, p_1, 3000, config.seed)
        loss_1, loss_k, A, B = path[:, x - 1]
        losses = {"loss of feature 1": (x, loss_1), "loss of the others": (x, loss_k)}
        entries = {"A_k": (x, A), "B_{k,1}": (x, B), "(log K)": (x, 0 * x + math.log(K))}
        panels.append(panel(name, losses, "step", "loss", "xy"))
        panels.append(panel(name, entries, "step", "entries of Q", "x"))
        first, others = (path[:2] > 0.1 * path[:2, :1]).sum(1).tolist()  # steps above a tenth
        found[f"Huang_times: {name}"] = measured(others / first)
    title = f"A dominant feature is learned {others / first:.0f} times sooner than the others"
    return title, panels, found


# %% The run: pictures, table, command line. Nothing to learn here.
EXPERIMENTS = {f.__name__: f for f in (by_hand, rulers, convergence, heatmaps, rates, products,
               conditioning, linearity, preconditioners, stages)}
FU = dict(d=20, n=40, curriculum=25, prompts=640, figures="convergence,heatmaps,rates,products")
PRESETS = {
    "default": {},
    "quick": dict(d=3, n=6, layers=6, width=32, steps=500, muon_lr=0.02, adam_lr=0.02, prompts=256,
                  figures="by_hand,rulers,rates,products", out="figures/quick"),
    "laptop": FU | dict(width=128, heads=4, steps=5500, out="figures/d20"),
    "paper": FU | dict(layers=12, width=256, heads=8, steps=12_000, batch=256, out="figures/paper"),
}
CHOICES = {"preset": PRESETS, "recipe": ("muon", "fu"), "device": ("auto", "cpu", "cuda"),
           "figures": ["all", *EXPERIMENTS]}
COLOR = {"Transformer": "#D55E00", "Newton": "#0072B2", "GD": "#009E73", "CG": "#CC79A7",
         "Fu": "#888888", "": "#888888"}
STYLE = {"font.size": 9, "axes.grid": True, "axes.spines.top": False, "axes.spines.right": False,
         "grid.alpha": 0.25, "legend.fontsize": 7, "lines.markersize": 4}


@rc_context(STYLE)
def draw(title, panels):
    """The picture of an experiment, a matplotlib Figure."""
    columns = 2 if len(panels) in (2, 4) else min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    picture = Figure((4.4 * columns, 3.4 * rows + 0.4), dpi=130, layout="constrained")
    for place, part in enumerate(panels, start=1):
        ax = picture.add_subplot(rows, columns, place)
        if part["heat"] is not None:  # (steps, layers)
            steps, layers = map(range, part["heat"].shape)
            mesh = ax.pcolormesh([i + 1 for i in layers], steps, part["heat"], vmin=0.5, vmax=1)
            picture.colorbar(mesh, label="similarity of errors")
        for i, (label, c) in enumerate(part["curves"].items()):
            name = re.split(r"\W", label)[0]  # none for a label in parentheses: a reference
            color = COLOR.get(name, colormaps["viridis"](0.9 * i / len(part["curves"])))
            style = ["o-", "s--", "^:", "v-.", "D-"][i % 5] if name in COLOR else "-"
            ax.plot(c["x"], c["y"], style if name else style[1:], color=color, label=label)
            if c["bars"] is not None:
                ax.vlines(c["x"], *c["bars"], color=color, alpha=0.5)
        ax.set(title=part["title"], **part["axes"])
        ax.legend()
    picture.suptitle(title)
    return picture


def check(config):
    """Raise ValueError, in one line, for a configuration that cannot work."""
    least = dict(d=2, kappa=1, layers=FIRST_LAYER + 1, noise=0, tails=0, curriculum=0, seed=0,
                 muon_lr=TINY, adam_lr=TINY)
    for name, value in vars(config).items():
        if not isinstance(value, str) and not least.get(name, 1) <= value < math.inf:
            raise ValueError(f"--{name} is at least {least.get(name, 1)}, not {value}")
    for name, known in CHOICES.items():
        value = getattr(config, name)
        for word in value.split(",") if name == "figures" else [value]:
            if word not in known:
                raise ValueError(f"--{name}: not {word!r}, but {', '.join(known)}")
    for good, message in (
        (config.device != "cuda" or torch.cuda.is_available(), "--device cuda: no CUDA here"),
        (config.n >= config.d + 2, "--n is at least d + 2"),
        (config.width % config.heads == 0, "--heads must divide --width"),
        (config.steps > config.curriculum * (config.d - 2), "--steps end before the curriculum"),
    ):
        if not good:
            raise ValueError(message)


def parse_config(arguments):
    """Command line -> Config. Flags and help are the fields and comments of Config."""
    helps = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.MULTILINE))
    about = dict(description=__doc__.split("\n")[1], usage=argparse.SUPPRESS, allow_abbrev=False)
    parser = argparse.ArgumentParser("icl_newton.py", **about)
    for field in dataclasses.fields(Config):
        text = helps[field.name] + " (default: %(default)s)"
        parser.add_argument(f"--{field.name}", type=field.type, default=field.default, help=text)
    known, _ = parser.parse_known_args([a for a in arguments if a not in ("-h", "--help")])
    parser.set_defaults(**PRESETS.get(known.preset, {}))
    try:
        config = Config(**vars(parser.parse_args(arguments)))
        for folder in (config.out, config.checkpoints):
            Path(folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()  # writable?
    except (ValueError, OSError) as error:
        parser.error(str(error))  # exit status 2
    return config


def plain(z):
    """JSON for what json does not know: arrays, tensors and ranges, to four digits."""
    return [plain(row) if np.ndim(row) else float(f"{row:.4g}") for row in np.asarray(z).tolist()]


def run(config):
    """Make the figures; print and write the table of claims."""
    names = [name for name in EXPERIMENTS if {name, "all"} & set(config.figures.split(","))]
    out, figures, runs, start = Path(config.out), {}, [], time.perf_counter()
    print(f"Draws {', '.join(names)} into {out}/, training what they need.")
    for seed in range(config.seed, config.seed + config.seeds):
        runs.append({})
        for name in names:
            title, panels, found = EXPERIMENTS[name](dataclasses.replace(config, seed=seed))
            runs[-1] |= found
            if seed == config.seed:  # the first seed's pictures
                figures[name] = {"title": title, "panels": panels}
                save = functools.partial(draw(title, panels).savefig, format="png")
                write_file(out / f"{name}.png", save)
            print(f"{time.perf_counter() - start:5.0f} s  {name}, seed {seed}: {title}")
    record = {"settings": vars(config), "torch": torch.__version__,
              "claims": print_table(config, runs), "figures": figures}
    text = json.dumps(record, default=plain).replace('{"title"', '\n{"title"')
    write_file(out / "results.json", lambda path: path.write_text(text, "utf-8"))
    print(f"\nAll numbers: {out / 'results.json'}")


def main(arguments=None):
    """Run the command line; the exit status: 0, 1 (a run failed), 2 (bad input) or 130 (Ctrl-C)."""
    try:
        run(parse_config(sys.argv[1:] if arguments is None else arguments))
    except (NotImplementedError, FloatingPointError, ValueError, OSError) as error:
        print(f"icl_newton: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nicl_newton: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__" and "__file__" in globals():  # in a notebook: run(Config())
    sys.exit(main())
