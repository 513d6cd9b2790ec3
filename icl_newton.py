# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy", "torch==2.13.0", "matplotlib"]
# ///
"""
Do Transformers that learn linear regression in context run Newton's method, layer by layer?

Give a Transformer a prompt x_1, y_1, ..., x_{n+1} whose answers come from a hidden rule y = w*.x
that is new in every prompt. Trained on enough prompts, it solves a *new* regression in one forward
pass. By which algorithm? Fu, Chen, Jia and Sharan (arXiv 2310.17086, "Fu") say: each layer is worth
a fixed number of steps of Iterative Newton; gradient descent would need exponentially many. This
file trains such a network in about a minute, reads a prediction out of every layer, lays it beside
Newton and gradient descent, and asks whether the evidence could have said no.

    python icl_newton.py                    figures/*.png, figures/results.json, a table of claims
    python icl_newton.py --preset quick     a first look in half a minute: all shrunk, verdicts too
    python icl_newton.py --figures rates    one figure; --help lists every setting

What it finds (README has the numbers). From layer 3 on each layer is worth about 1.5 times as many
products with X^T X as the one before, in the end more, after d examples, than any first-order
method with steps fixed in advance makes in as many steps. But nothing singles out Newton. By the
paper's ruler a layer adds three Newton steps; so does a step of conjugate gradient at d = 5. By
equal error it is half as many. The straight line does not beat its rivals, and similarity is mostly
error that no method can avoid.

One idea carries the file: **every learner is a trajectory of predictions** (steps, prompts, n+1).
A method's steps, a network's layers: the same comparisons serve them all.

What differs from Fu's setting, and why:
    d = 5, n = 10, 8 layers     not 20, 40, 12: the same in a minute (`--preset laptop`: Fu's d, n)
    Muon, log of the error      not Adam on the error: 2,000 steps, not 500,000 (`--recipe fu`)
    GD's step 1/lambda_max(S)   not 0.01: the textbook's safe step, prefix by prefix
    one norm before all probes  their code normalises only the last layer's state

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
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from torch import nn

# %% [markdown]
# # Part I. The paper's claim
#
# ## 1. Settings: the fields are the command line's flags, the comments their help

# %%
@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run. Raises ValueError, in one line, for a value that cannot work."""

    d: int = 5  # dimension of x and of the hidden rule w*
    n: int = 10  # examples in a prompt
    kappa: float = 1.0  # condition number of the covariance of x (Fu's other value: 100)
    noise: float = 0.0  # standard deviation of the noise on y (Fu's other value: 0.1)
    tails: int = 0  # inputs with Student's t of so many degrees of freedom; 0: Gaussian
    model: str = "transformer"  # transformer or lstm
    layers: int = 8  # its layers
    width: int = 64  # width of its residual stream
    heads: int = 2  # attention heads per layer; must divide the width
    recipe: str = "muon"  # muon, or fu: the paper's Adam at a constant 1e-4, mean squared error
    steps: int = 2000  # training steps
    batch: int = 64  # fresh prompts per step
    muon_lr: float = 0.007  # Muon's step size, for the matrices of the blocks
    adam_lr: float = 0.01  # AdamW's step size, for embedding, positions and readout
    curriculum: int = 0  # steps per added dimension, starting at 2; 0: all d from the start
    seed: int = 1  # of initial weights and of all prompts
    seeds: int = 1  # how many seeds to run, from `seed` on; verdicts then rest on their spread
    probes: int = 2048  # prompts that fit the readouts of the layers
    prompts: int = 512  # fresh prompts on which all comparisons are made
    preset: str = "default"  # default, quick (shrunk), laptop (Fu's problem) or paper (for CUDA)
    figures: str = "all"  # which figures to make, by name, separated by commas
    device: str = "auto"  # cpu, cuda, or auto: CUDA where there is one
    out: str = "figures"  # folder for pictures and results.json
    checkpoints: str = "checkpoints"  # folder for trained models and for those in training
    save_every: int = 250  # steps between checkpoints

    def __post_init__(self):
        check(self)  # near the end of the file, where it stands in nobody's way


# %% [markdown]
# ## 2. Prompts (Fu, section 3)
#
# w* ~ N(0, I_d), x_i ~ N(0, Sigma), y_i = w*.x_i + noise. A new w* for every prompt: nothing about
# w* can be memorised, so whatever predicts y_{t+1} must be an algorithm that runs on the prompt.

# %%
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


# %% [markdown]
# ## 3. Three classical learners (Fu, section 3.1)
#
# They see a prefix only through S = X^T X and b = X^T y, all prefixes at once, in float64. Under
# noise of variance s^2 the best linear predictor has S + s^2 I in place of S: that is `ridge`.
#
#     least squares       w = pinv(S) b               the answer; of minimum norm while t < d
#     gradient descent    w <- w - eta (S w - b)      O(kappa log 1/eps) steps to error eps
#     Iterative Newton    M <- 2M - M S M,  w = M b   O(log kappa + log log 1/eps) steps
#
# Newton looks for the inverse of S. Let R_k = I - S M_k be what is missing from it. Then
#
#     R_{k+1} = I - S (2 M_k - M_k S M_k) = (I - S M_k)^2 = R_k^2,
#
# so 10^-3 becomes 10^-6, then 10^-12: digits double. Without noise, and since M_k commutes with S,
# w* - w_k = R_k w*. Along an eigenvector with eigenvalue lambda, k steps of Newton from M_0 = alpha
# S leave (1 - alpha lambda^2)^(2^k) of the error; m steps of GD leave (1 - eta lambda)^m. So there
# are two phases. At first no digit doubles, only Newton's *reach*: k steps have found directions
# with lambda > lambda_max 2^(-k/2), m steps of GD those with lambda > lambda_max/m. Once all are
# found, digits double. The figures below mostly measure the first phase.
#
# Newton converges for alpha < 2/lambda_max(S)^2. Fu print the edge, alpha = 2/||S S^T||_2: one
# eigenvalue of R is -1 there, and its square never shrinks. The order of factors matters, too:
# M S M forgets rounding errors; S M M or M M S doubles them in every step.

# %%
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
    """The counts of a trajectory: an int s means 0..s. ValueError unless they increase."""
    counts = list(range(steps + 1)) if isinstance(steps, int) else [int(k) for k in steps]
    if not counts or counts[0] < 0 or counts != sorted(set(counts)):
        raise ValueError(f"steps must be a count or increasing counts, not {steps}")
    return counts


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

    lr, a number, defaults to the textbook's safe step 1/lambda_max(S), prefix by prefix. Along an
    eigenvector one step multiplies the error by 1 - lr lambda: k steps are one power. (A start w_0
    is a shift of y: descend on y - w_0.x, and add w_0.x to the predictions.)
    """
    S, b = prefix_moments(xs, ys, ridge)
    eigenvalues, U = torch.linalg.eigh(S)  # ascending; eigenvectors are the columns of U
    lr = 1 / eigenvalues[..., -1:].clamp_min(TINY) if lr is None else lr
    spanned = eigenvalues > RANK_TOLERANCE * eigenvalues[..., -1:]
    solution = torch.where(spanned, times(U.mT, b) / eigenvalues, 0.0)
    k = torch.tensor(step_counts(steps), dtype=torch.float64)[:, None, None, None]
    found = 1 - (1 - lr * eigenvalues) ** k  # (steps, prompts, n+1, d): share of the solution
    return predict(found * solution, times(U.mT, xs.double()))  # w.x is the same in every basis


def newton_start(S):
    """A safe alpha for M_0 = alpha S, each S (..., d, d): 1/||S S^T||_F, as (..., 1, 1).

    Any alpha below 2/lambda_max(S)^2 converges. Finite for S = 0.
    """
    return 1 / torch.linalg.matrix_norm(S @ S.mT, keepdim=True).clamp_min(TINY)


def newton(xs, ys, steps, alpha=None, ridge=0.0):
    """Iterative Newton, M <- 2M - M S M from M_0 = alpha S, w_k = M_k b (Fu, section 3.1).

    A trajectory (len(steps), prompts, n+1), float64; step 0 is M_0. alpha, a number, defaults to
    newton_start(S), prefix by prefix. steps as in step_counts; ridge as in prefix_moments.
    """
    counts = step_counts(steps)
    S, b = prefix_moments(xs, ys, ridge)
    M = (newton_start(S) if alpha is None else alpha) * S
    weights = [times(M, b)]
    for _ in range(counts[-1]):
        M = 2 * M - M @ S @ M
        weights.append(times(M, b))
    return predict(torch.stack(weights)[counts], xs)


# %% [markdown]
# ## 4. The Transformer
#
# A GPT-2-like decoder on the tokens x_1, y_1, ..., x_{n+1}: pre-norm blocks of causal attention and
# an MLP, each adding to the residual stream. It predicts y_{t+1} at the token x_{t+1}. Normalised
# queries and keys keep large step sizes stable. The matrices of all layers live in one tensor.

# %%
def interleave(xs, ys):
    """Prompts (prompts, n+1, d), (prompts, n+1) -> tokens (prompts, 2n+1, d): x_1, y_1, ...

    y is zero-padded to d entries, and the last y, the answer, is left out (Fu, section 3).
    """
    y_tokens = F.pad(ys[..., None], (0, xs.shape[-1] - 1))  # (prompts, n+1, d): y, 0, ..., 0
    return torch.stack([xs, y_tokens], dim=2).flatten(1, 2)[:, :-1]


def normalize(h):
    """The one normalisation of the networks, over the last axis: mean 0, variance 1."""
    return F.layer_norm(h, h.shape[-1:])


def causal_attention(q, k, v):
    """softmax(q k^T / sqrt(D) + mask) v for q, k, v (..., T, D): token i sees tokens 0..i."""
    T, D = q.shape[-2:]
    scores = q @ k.mT / math.sqrt(D)  # (..., T, D) x (..., D, T) -> (..., T, T)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v


class Network(nn.Module):
    """Embedding, layers and readout; sizes from the Config. A subclass has layer(i, h)."""

    def __init__(self, config, x_scale, position_scale):
        super().__init__()
        self.config, W, T = config, config.width, 2 * config.n + 1
        self.read_in = nn.Parameter(x_scale * torch.randn(W, config.d) / math.sqrt(config.d))
        self.positions = nn.Parameter(position_scale * torch.randn(T, W))
        self.read_out = nn.Parameter(torch.zeros(W))

    def states(self, xs, ys):
        """What probes see: normalised x tokens of embedding and layers, (L+1, prompts, n+1, W)."""
        h = interleave(xs, ys) @ self.read_in.mT
        streams = [h + self.positions[: h.shape[1]]]
        for i in range(self.config.layers):
            streams.append(self.layer(i, streams[-1]))
        return torch.stack([normalize(h[:, ::2]) for h in streams])

    def forward(self, xs, ys):
        """Predictions (prompts, n+1) of ys: entry t is made at the token x_{t+1}."""
        return self.states(xs, ys)[-1] @ self.read_out


class Transformer(Network):
    """Decoder-only Transformer."""

    def __init__(self, config):
        super().__init__(config, x_scale=0.3, position_scale=0.02)
        L, W = config.layers, config.width
        # Standard deviations 1/sqrt(3 W), as torch.nn.Linear's.
        self.attention = nn.Parameter(torch.randn(L, 4, W, W) / math.sqrt(3 * W))  # Q, K, V, O
        self.mlp = nn.Parameter(torch.randn(L, 2, 2 * W, W) / math.sqrt(3 * W))  # up, down^T
        with torch.no_grad():  # what writes into the residual stream starts small
            self.attention[:, 3] /= 2
            self.mlp[:, 1] /= 2

    def layer(self, i, h):
        """Layer i: h (prompts, T, W) -> (prompts, T, W)."""
        h = h + self.attend(i, normalize(h))
        up, down = self.mlp[i]
        return h + F.gelu(normalize(h) @ up.mT) @ down

    def attend(self, i, h):
        """Multi-head causal attention of layer i on h (prompts, T, W)."""
        P, T, W = h.shape
        qkv = F.linear(h, self.attention[i, :3].flatten(0, 1))
        q, k, v = qkv.view(P, T, 3, self.config.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = causal_attention(normalize(q), normalize(k), v)  # (prompts, heads, T, W/heads)
        return mixed.transpose(1, 2).reshape(P, T, W) @ self.attention[i, 3].mT


NETWORKS = {"transformer": Transformer}  # Part II adds another

# %% [markdown]
# ## 5. Training
#
# The paper's Adam takes hundreds of thousands of steps. Two changes make it thousands (`--recipe
# fu` undoes both). Each prefix counts by the *logarithm* of its mean squared error: late errors are
# a thousand times smaller than early ones, hardly count in a plain mean, yet show the algorithm's
# rate. And Muon (Keller Jordan, 2024) replaces each matrix's momentum by the nearest orthogonal
# matrix: all directions are learned at one speed. To find it, Muon iterates X <- (a I + b X X^T
# + c (X X^T)^2) X, a relative of Newton's iteration.

# %%
def orthogonalize(G):
    """Roughly the nearest orthogonal matrix to each of (..., rows, columns).

    Five steps with Muon's coefficients: they push singular values up fast, into 0.7..1.2, not to 1.
    """
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


def learning_rate_factor(step, steps, warmup=100):
    """Linear warm-up, and linear decay to zero."""
    return min((step + 1) / warmup, 1) * (steps - step) / steps


def training_prompts(config, step, generator):
    """The fresh prompts of one training step: xs (batch, n+1, d), ys (batch, n+1).

    A curriculum (Garg et al., 2022) starts with 2 active dimensions and 2d + 2 examples, and grows
    both up to d and n; inactive dimensions are 0. Training at d = 20 does not start without it.
    """
    d = min(2 + step // config.curriculum, config.d) if config.curriculum else config.d
    n = config.n if d == config.d else min(2 * d + 2, config.n)
    xs, ys = draw_prompts(config, config.batch, generator, n, d)
    return F.pad(xs, (0, config.d - d)), ys


def make_optimizers(model, config):
    """AdamW, and Muon for the stacks of matrices in the blocks; or the paper's Adam alone."""
    if config.recipe == "fu":
        return [torch.optim.Adam(model.parameters(), 1e-4)]
    blocks = [p for p in model.parameters() if p.ndim > 2]
    rest = [p for p in model.parameters() if p.ndim <= 2]
    adam = torch.optim.AdamW(rest, config.adam_lr, (0.9, 0.99), weight_decay=0)
    return [adam, Muon(blocks, config.muon_lr)] if blocks else [adam]


def training_step(model, optimizers, config, step, generator):
    """One step on fresh prompts. Returns their mean squared error, a tensor on the device."""
    xs, ys = training_prompts(config, step, generator)
    error = (model(xs, ys) - ys).square().mean(0)  # (n+1,), prefix by prefix
    loss, factor = error.clamp_min(TINY).log().mean(), learning_rate_factor(step, config.steps)
    if config.recipe == "fu":
        loss, factor = error.mean(), 1.0
    loss.backward()
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * factor
        optimizer.step()
    model.zero_grad()
    return error.mean().detach()


def checkpoint_path(config, device):
    """The file of this training; its name has a hash of all that decides the weights, code too."""
    code = [Network, NETWORKS[config.model], sample_prompts, draw_prompts, training_prompts,
            interleave, causal_attention, normalize, orthogonalize, Muon, learning_rate_factor,
            make_optimizers, training_step]  # fmt: skip
    names = """d n kappa noise tails model layers width heads recipe steps batch muon_lr adam_lr
               curriculum seed"""
    settings = [getattr(config, name) for name in names.split()]
    try:
        text = "".join(map(inspect.getsource, code)) + f"{settings}{device}"
    except (OSError, TypeError):  # a notebook has no source to show: nothing is found again
        text = os.urandom(8).hex()
    key = hashlib.sha256(text.encode()).hexdigest()[:10]
    return Path(config.checkpoints) / f"{config.model}-d{config.d}-seed{config.seed}-{key}.pt"


def load_checkpoint(path, parts, generator):
    """Restore the state_dicts of `parts` and the generator; returns the steps done, 0 if new."""
    if not path.exists():
        return 0
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        for part, state in zip(parts, saved["parts"], strict=True):
            part.load_state_dict(state)
        generator.set_state(saved["generator"])
    except Exception as error:  # torch.load raises half a dozen kinds for damaged files
        raise ValueError(f"{path} is damaged ({type(error).__name__}): delete it") from None
    return saved["done"]


def write_file(path, write):
    """write(temporary path), then move it to `path`: a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write(temporary)
    temporary.replace(path)


def train(config):
    """The trained network of `config`; a killed run goes on at its checkpoint, to the same bits.

    FloatingPointError: the loss is not finite. ValueError: the checkpoint is damaged.
    """
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed)
    model = NETWORKS[config.model](config).to(device)
    parts = [model, *make_optimizers(model, config)]
    generator = torch.Generator(device).manual_seed(config.seed)
    path = checkpoint_path(config, device)
    first = load_checkpoint(path, parts, generator)
    start = time.perf_counter()
    for done in range(first + 1, config.steps + 1):
        error = training_step(model, parts[1:], config, done - 1, generator)
        if done % 10 == 0 or done == config.steps:  # reading a number makes a GPU wait
            pace = (time.perf_counter() - start) / (done - first)
            show_progress(config, done, error.item(), pace)
        if done % config.save_every == 0 or done == config.steps:
            states = [part.state_dict() for part in parts]
            saved = dict(done=done, parts=states, generator=generator.get_state())
            write_file(path, functools.partial(torch.save, saved))
    return model.requires_grad_(False)


def show_progress(config, done, error, pace):
    """A line at every tenth of the training; on a terminal it is rewritten every 10 steps."""
    if not math.isfinite(error):
        raise FloatingPointError(f"no finite loss at step {done}: try smaller --muon_lr, --adam_lr")
    tenth = done % max(config.steps // 10, 1) < 10 or done == config.steps
    if tenth or sys.stdout.isatty():
        line = f"  {config.model} step {done:>6}/{config.steps}  error/d {error / config.d:.4f}"
        left = (config.steps - done) * pace
        print(f"{line}  {left:4.0f} s left", end="\n" if tenth else "\r", flush=True)


# %% [markdown]
# ## 6. What does each layer know? (Fu, section 4.1)
#
# Fit, for every layer of the frozen network, the linear readout that predicts best from its state,
# on other prompts than those on which it is judged: what has the layer computed, wherever it is?

# %%
def fresh_prompts(config, count, purpose):
    """Prompts that training never saw, on the CPU; another purpose, a number, other prompts."""
    generator = torch.Generator().manual_seed(1_000_003 * config.seed + purpose)
    return draw_prompts(config, count, generator)


@torch.no_grad()
def probe_features(model, xs, ys, chunk=512):
    """All layers' states and a constant 1, chunk by chunk: (layers+1, chunk, n+1, width+1)."""
    device = next(model.parameters()).device
    for x, y in zip(xs.split(chunk), ys.split(chunk)):
        yield F.pad(model.states(x.to(device), y.to(device)).double().cpu(), (0, 1), value=1.0)


def least_squares_readout(H, y):
    """The r that minimises ||H r - y||: H (..., samples, width), y (samples,) -> (..., width).

    Of all best r the shortest, since a layer leaves directions of its state unused. All float64.
    """
    return times(torch.linalg.pinv(H.mT @ H, hermitian=True, rtol=1e-12), times(H.mT, y))


def fit_readouts(model, xs, ys):
    """The least-squares readout of every layer, over all prefixes at once: (layers+1, width+1)."""
    H = torch.cat([features.flatten(1, 2) for features in probe_features(model, xs, ys)], dim=1)
    return least_squares_readout(H, ys.double().flatten())


def layer_predictions(model, readouts, xs, ys):
    """Every layer's predictions as a trajectory (layers+1, prompts, n+1); 0 is the embedding."""
    chunks = probe_features(model, xs, ys)
    return torch.cat([torch.einsum("lptw,lw->lpt", H, readouts) for H in chunks], dim=1)


# %% [markdown]
# ## 7. Comparing two learners
#
# Two rulers. *Similarity* (Fu, section 4.1): the cosine between the error vectors that two learners
# make on a prompt, over the prefixes t = 1..n. (At t = 0 nobody knows anything; the authors' code
# counts it.) Which step of Newton is a layer most like? *Equal error*: after how many steps is
# Newton as good as the layer, after t examples?

# %%
def error_cosines(traj_a, traj_b, ys):
    """Cosines of errors, prediction - y over t = 1..n, of all pairs, prompt by prompt, in float64.

    (A, prompts, n+1), (B, prompts, n+1) -> (A, B, prompts); 0 where an error is 0.
    """
    a, b = (F.normalize((z.double() - ys)[..., 1:], dim=-1) for z in (traj_a, traj_b))
    return torch.einsum("apt,bpt->abp", a, b)


def similarity_of_errors(traj_a, traj_b, ys):
    """SimE, the mean of error_cosines over prompts: (A, B)."""
    return error_cosines(traj_a, traj_b, ys).mean(-1)


def best_match(similarity):
    """For each step of a, the index of the most similar step of b: (..., A, B) -> (..., A)."""
    return similarity.argmax(-1)


def equal_error(errors, curve, counts):
    """Where `curve` (..., K), at counts (K,), falls to errors (..., A): (..., A), in log scale."""
    falling = -curve.cummin(-1).values.clamp_min(TINY).log().contiguous()
    wanted = -errors.log().contiguous()
    right = torch.searchsorted(falling, wanted).clamp(1, len(counts) - 1)
    low, high = falling.gather(-1, right - 1), falling.gather(-1, right)
    share = ((wanted - low) / (high - low).clamp_min(TINY)).clamp(0, 1)
    return counts[right - 1] + share * (counts[right] - counts[right - 1])


def bootstrap(values, rounds=1000):
    """Means over resampled prompts, the same in every call: (..., prompts) -> (rounds, ...)."""
    prompts = values.shape[-1]
    drawn = torch.randint(prompts, (rounds, prompts), generator=torch.Generator().manual_seed(0))
    counts = torch.stack([row.bincount(minlength=prompts) for row in drawn])
    return torch.einsum("rp,...p->r...", counts.to(values) / prompts, values)


def interval(samples):
    """The middle 95% of samples (rounds, ...): (2, ...)."""
    return samples.double().quantile(torch.tensor([0.025, 0.975]).double(), dim=0)


def line_fit(x, y):
    """Least-squares line through (x, y) along the last axis: slope and R^2, each (...)."""
    dx, dy = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    slope = (dx * dy).sum(-1) / dx.square().sum(-1).clamp_min(TINY)
    return slope, slope * (dx * dy).sum(-1) / dy.square().sum(-1).clamp_min(TINY)


def mean_and_bootstrap(values):
    """Means over the prompts, (..., prompts) -> (...), and over resampled ones, (rounds, ...)."""
    return values.mean(-1), bootstrap(values)


def climb(layers, run, counts, ys, t=None, measure=error_cosines):
    """The steps (L,) of a run (K, P, n+1), at counts (K,), that layers 1..L of (L+1, P, n+1) match.

    By similarity, or by equal error after t examples. A pair, with resampled prompts' (rounds, L).
    """
    counts = torch.as_tensor(counts).double()
    if t is None:
        similarities = mean_and_bootstrap(measure(layers[1:], run, ys))  # (L, K), (rounds, L, K)
        return [counts[best_match(similarity)] for similarity in similarities]
    squares, run_squares = ((z[..., t] - ys[:, t]).square() for z in (layers[1:], run))
    pairs = zip(mean_and_bootstrap(squares), mean_and_bootstrap(run_squares))
    return [equal_error(errors, curve, counts) for errors, curve in pairs]


# %% [markdown]
# ## 8. At which rate do the layers converge?
#
# Through the best-matching steps of layers 3, 4, ... goes a line: its slope is the number of Newton
# steps that a layer is worth. For GD the log2 of the steps should lie on a line: they double from
# layer to layer. An experiment returns data; `draw`, at the end, makes the picture of it.

# %%
FIRST_LAYER = 3  # rates start here, as in the paper, whose layers 1 and 2 both match step 1
NEWTON_STEPS = list(range(33))  # float64 is safe for about 40: off the span rounding doubles
GD_STEPS = sorted({round(2 ** (k / 2)) for k in range(33)})  # 1, 2, 3, 4, 6, 8, 11, ..., 65536
PAPER = {  # Fu's Transformer (d = 20, n = 40): best matches of layers 1..12, figures 8 and 10
    "Newton": [1, 1, 2, 5, 8, 10, 14, 16, 20, 20, 21, 21],
    "GD": [1, 1, 4, 8, 32, 64, 256, 512, 1024, 4096, 4096, 4096],
}
EXPERIMENTS = {}  # name -> function: Config -> (title, panels, {claim: measured})


def experiment(function):
    """Register an experiment under its name."""
    EXPERIMENTS[function.__name__] = function
    return function


def panel(title, curves, xlabel="layer", ylabel="", log="", heat=None, **axes):
    """One panel of a picture: {label: (x, y), or a climb}, or a heat map; log: logarithmic axes."""
    data = {}
    for label, (x, y) in curves.items():
        data[label] = {"x": x, "y": y}
        if getattr(y, "ndim", 1) == 2:  # a climb
            low, high = interval(y)
            data[label] = {"x": range(1, len(x) + 1), "y": x, "low": low, "high": high}
    axes |= {"xlabel": xlabel, "ylabel": ylabel} | {f"{axis}scale": "log" for axis in log}
    return {"title": title, "curves": data, "heat": heat, "axes": axes}


def measured(value, samples=None, note=""):
    """A number with its 95% interval over prompts, from samples (rounds,), if there are any."""
    low, high = (value, value) if samples is None else interval(samples)
    return {"value": float(value), "low": float(low), "high": float(high), "note": note}


def rate(points, log2=False):
    """Steps, or doublings of steps, per layer of a climb."""
    x = torch.arange(FIRST_LAYER, len(points[0]) + 1).double()
    late = (p[..., FIRST_LAYER - 1 :] for p in points)
    return measured(*(line_fit(x, p.clamp_min(1).log2() if log2 else p)[0] for p in late))


@functools.cache
def study(config):
    """A trained network, and the runs (counts, trajectory) of the others on the same prompts."""
    model, ridge = train(config), config.noise**2
    readouts = fit_readouts(model, *fresh_prompts(config, config.probes, purpose=1))
    learner = functools.partial(layer_predictions, model, readouts)
    xs, ys = fresh_prompts(config, config.prompts, purpose=2)
    runs = {"Newton": (NEWTON_STEPS, newton(xs, ys, NEWTON_STEPS, ridge=ridge)),
            "GD": (GD_STEPS, gradient_descent(xs, ys, GD_STEPS, ridge=ridge)),
            "OLS": ([0], ols(xs, ys, ridge))}  # fmt: skip
    return SimpleNamespace(learner=learner, xs=xs, ys=ys, layers=learner(xs, ys), runs=runs)


@experiment
def rates(config):
    """Fu, figure 3, by both rulers: the steps of Newton and of GD that the layers match."""
    s, panels, found = study(config), [], {}
    for name, shape, unit in (("Newton", "line", "steps"), ("GD", "exponential", "doublings")):
        counts, run = s.runs[name]
        curves = {"Fu: d = 20, 12 layers": (range(1, 13), PAPER[name])}
        for ruler, t in (("similarity", None), ("error_n", config.n), ("error_d", config.d)):
            points = climb(s.layers, run, counts, s.ys, t)
            found[f"{name}_{ruler}"] = worth = rate(points, log2=name == "GD")
            by = ruler if t is None else f"error, t = {t}"
            curves[f"{name} by {by}: {worth['value']:.1f} {unit} a layer"] = points
            if t is None:
                found[f"{name}_shape"] = evidence(shape, points)
        panels.append(panel(f"steps of {name}", curves, log="y" if name == "GD" else ""))
    by_similarity, by_error = found["Newton_similarity"]["value"], found["Newton_error_n"]["value"]
    title = f"A layer adds {by_similarity:.1f} Newton steps by similarity, {by_error:.1f} by error"
    return title, panels, found


# %% [markdown]
# # Part II. Evidence that can say no
#
# ## 9. Claims, verdicts, rulers
#
# Every claim, with its rule, before anything is measured: `.98 ..` reads: at least .98. A claim
# *agrees* if the whole 95% interval obeys the rule, *fails* if the whole interval breaks it, and is
# *undecided* else. The interval is over prompts for one seed, over seeds for several. `shape` is a
# contest, explained below: won above 1.3, lost below -1.3.

# %%
CLAIMS = """
Newton_shape       | fig. 3  | best-matching Newton steps lie on a line        | yes  | shape
Newton_shape_paper | fig. 8  | the same, the paper's own table, layers 3-12    | yes  | shape
GD_shape           | fig. 3  | best-matching GD steps grow exponentially       | yes  | shape
GD_shape_paper     | fig. 10 | the same, the paper's own table, layers 3-12    | yes  | shape
Newton_similarity  | fig. 3  | Newton steps per layer, by similarity           | 2.93 |
Newton_error_n     | open    | the same by error after n examples              | -    |
Newton_error_d     | open    | the same by error after d examples              | -    |
GD_similarity      | fig. 3  | doublings of GD steps per layer, by similarity  | 1.42 |
GD_error_n         | open    | the same by error after n examples              | -    |
GD_error_d         | open    | the same by error after d examples              | -    |
CG_5               | control | Newton steps per CG step, by similarity, d = 5  | -    |
CG_20              | control | Newton steps per CG step, by similarity, d = 20 | -    |
superlinear        | fig. 2  | later layers' digits per layer minus earlier's  | > 0  | 0 ..
like_OLS           | tab. 1  | last layer's similarity to least squares        | .957 | .98 ..
like_Newton        | tab. 1  | similarity to Newton minus to GD, at their best | > 0  | 0 ..
like_null          | open    | similarity to Newton minus a shuffled null's    | -    |
like_beyond_d      | open    | similarity to Newton, prefixes t > d alone      | -    |
products           | open    | products with S worth the last layer, t = n     | -    | L ..
products_d         | open    | the same, t = d                                 | -    | L ..
products_d2        | open    | the same, t = d + 2                             | -    | L ..
products_growth    | open    | factor by which a layer multiplies them         | -    |
products_shape     | open    | they grow exponentially with the layer          | -    | shape
kappa_Newton       | fig. 4  | kappa 100: times Newton's steps, by similarity  | 1.0  | .. 1.5
kappa_Newton_error | fig. 4  | the same by error after n examples              | 1.0  | .. 1.5
kappa_GD           | fig. 4  | kappa 100: times the GD steps, by similarity    | > 2  | 4 ..
kappa_GD_error     | fig. 4  | the same by error after n examples              | > 2  | 4 ..
LSTM_layers        | fig. 7c | error of an LSTM's layer 1 over that of layer 2 | 1.0  | .. 1.1
LSTM_OGD           | tab. 1  | LSTM: similarity to OGD minus to Newton or GD   | .034 | 0 ..
Transformer_OGD    | tab. 1  | Transformer: similarity to Newton minus to OGD  | .185 | 0 ..
linear_in_x        | open    | last layer's error: share not linear in x_q     | -    |
linear_in_y        | open    | last layer's error: share not linear in y       | -    |
by_hand            | thm 5.1 | Newton in k + 2 hand-written layers: difference | 0    | .. 1e-6
Ahn_one            | Ahn 1   | one layer: relative distance to the closed form | 0    | .. .03
Ahn_three          | Ahn 3   | three, whitened: distance to a multiple of I    | 0    | .. .1
Huang_first        | Huang   | time of other features over the dominant one's  | > 1  | 1 ..
Huang_switch       | Huang   | exponent of K in the time of the switch         | 2    | 1.75 .. 2.25
"""
STUDENT_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # 97.5%, by seeds


def claims(config):
    """The table as {key: [where, claim, paper, rule]}; L in a rule is the number of layers."""
    rows = [[cell.strip() for cell in line.split("|")] for line in CLAIMS.strip().splitlines()]
    return {key: [*row, rule.replace("L", str(config.layers))] for key, *row, rule in rows}


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
    values = torch.tensor([run["value"] for run in runs]).double()
    mean, half = values.mean().item(), STUDENT_T.get(len(runs), 2.3) * values.std().item()
    half /= math.sqrt(len(runs))
    return {"value": mean, "low": mean - half, "high": mean + half, "note": runs[0]["note"]}


def print_table(config, runs):
    """Print the claims that were measured. Returns {claim: numbers, seeds' values, verdict}."""
    results = {}
    print(f"\n{'verdict':<11}{'measured':>9}  [95%]  rule; paper; claim")
    for key, (where, text, paper, rule) in claims(config).items():
        if key in runs[0]:
            m = over_seeds([run[key] for run in runs])
            outcome = verdict(rule, m["low"], m["high"])
            results[key] = m | {"seeds": [run[key]["value"] for run in runs], "verdict": outcome}
            trained = key != "by_hand" and not key.endswith("_paper")
            if len(runs) == 1 and trained and outcome in ("agrees", "fails"):
                outcome += "?"
            ends = f"[{m['low']:.3g}, {m['high']:.3g}]"
            print(f"{outcome:<11}{m['value']:>9.3g}  {ends:<18} {rule:<12} {paper:<5} "
                  f"{text}, {where} {m['note']}".rstrip())  # fmt: skip
    if len(runs) == 1:
        print("?: rests on one trained network; another seed may say otherwise (--seeds 3).")
    return results


# %% [markdown]
# **Is it a line?** R^2 says little: six points of a logarithm score .98 on a line. So a shape must
# beat its rivals, each a line through transformed points with Gaussian residuals: its likelihood is
# (mean squared residual)^(-points/2), of residuals in units of y (Box and Cox: times the geometric
# mean of y, where log y is fitted). The number is the log10 of how much likelier the shape is than
# its best rival: 1.3 is twenty times.

# %%
SHAPES = {  # steps against layers: how y, and how x, is transformed
    "line": (torch.clone, torch.clone),
    "square root": (torch.clone, torch.sqrt),
    "square": (torch.clone, torch.square),
    "logarithm": (torch.clone, torch.log),
    "exponential": (torch.log, torch.clone),
    "power law": (torch.log, torch.log),
}


def lead_over_rivals(shape, steps):
    """log10 likelihood ratio of a shape and its best rival, steps (..., layers 3, ...)."""
    y, fits = steps.double().clamp_min(1), {}
    x = torch.arange(FIRST_LAYER, FIRST_LAYER + y.shape[-1]).double()
    for name, (transform, of_layer) in SHAPES.items():
        unit = y.log().mean(-1).exp() if transform is torch.log else 1.0
        _, r_squared = line_fit(of_layer(x), transform(y))
        unexplained = (1 - r_squared).clamp_min(1e-3)  # whole steps cannot show R^2 > .999
        residual = unexplained * transform(y).var(-1) * unit**2
        fits[name] = -len(x) / 2 * residual.clamp_min(TINY).log10()
    return fits.pop(shape) - torch.stack(list(fits.values())).amax(0)


def evidence(shape, points):
    """The lead of a shape in a climb, from FIRST_LAYER on."""
    return measured(*(lead_over_rivals(shape, p[..., FIRST_LAYER - 1 :]) for p in points))


# %% [markdown]
# **Rulers before results.** Put known algorithms in the place of the layers. The control is CG,
# conjugate gradient, the best w in the span of b, S b, S^2 b, ...: a first-order method, exact
# after d steps, one product with S a step, whose step sizes adapt to the prompt. At d = 5 it climbs
# three Newton steps a step by similarity, as the paper's Transformer does: **at d = 5 this ruler
# cannot tell second order from first.** At d = 20 it can: CG climbs one a step there.

# %%
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


@experiment
def rulers(config):
    """Known learners in the place of the layers, both rulers, d = 5 and 20. Trains nothing."""
    panels, found = [], {}
    for d in (5, 20):
        xs, ys = sample_prompts(512, 2 * d, d, generator=torch.Generator().manual_seed(config.seed))
        known = {"Newton": newton(xs, ys, 12), "GD": gradient_descent(xs, ys, 12),
                 "CG": conjugate_gradient(xs, ys, min(d - 1, 12))}  # fmt: skip
        target = newton(xs, ys, NEWTON_STEPS)
        for by, t in (("similarity", None), (f"error, t = {2 * d}", 2 * d)):
            curves = {name: climb(run, target, NEWTON_STEPS, ys, t) for name, run in known.items()}
            panels.append(panel(f"d = {d}, by {by}", curves, "its own step", "Newton step"))
            if t is None:
                x = torch.arange(len(curves["CG"][0])).double()
                found[f"CG_{d}"] = measured(*(line_fit(x, p)[0] for p in curves["CG"]))
    for name, shape in (("Newton", "line"), ("GD", "exponential")):
        found[f"{name}_shape_paper"] = evidence(shape, [torch.tensor(PAPER[name])])
    title = "By similarity CG climbs {:.1f} Newton steps a step at d = 5, {:.1f} at d = 20"
    return title.format(found["CG_5"]["value"], found["CG_20"]["value"]), panels, found


# %% [markdown]
# ## 10. Errors, layer by layer, and what similarity is made of
#
# Most of an error vector is error that no method can avoid: at t < d the examples do not determine
# w*. So similarity has a *null*: give a layer's deviations from its best Newton step to other
# prompts, with random signs, and measure again. And similarity can be asked for t > d alone.

# %%
@experiment
def convergence(config):
    """Fu, figure 2: squared error of layers, of Newton's steps, and of GD's."""
    s, d, n, panels = study(config), config.d, config.n, []
    runs = {"Transformer": (range(config.layers + 1), s.layers)} | s.runs
    for name, log in (("Transformer", "y"), ("Newton", "y"), ("GD", "xy")):
        counts, run = runs[name]
        error = (run - s.ys).square().mean(1).clamp_min(1e-7 * d) / d  # (steps, n+1)
        curves = {f"t = {t}": (counts, error[:, t]) for t in sorted({d - 1, d, d + 2, n})}
        panels.append(panel(name, curves, "layer or step", "squared error / d", log))
    squares = (s.layers[FIRST_LAYER - 1 :, :, n] - s.ys[:, n]).square()  # layers 2..L
    gains = [-error.log10().diff() for error in mean_and_bootstrap(squares)]  # digits, layers 3..L
    half = (len(squares) - 1) / 2
    sign = (torch.arange(2 * half) - half + 0.5).sign()  # -1: earlier half, 1: later half
    found = {"superlinear": measured(*((gain * sign).sum(-1) / half for gain in gains))}
    title = f"After {n} examples the last layer's error / d is {squares[-1].mean() / d:.1e}"
    return title, panels, found


def null_similarity(layers, steps, ys):
    """SimE (L,) of layers (L, P, n+1) with steps (L, P, n+1) when deviations are shuffled."""
    generator = torch.Generator().manual_seed(0)
    others = torch.randperm(len(ys), generator=generator)
    signs = 2 * torch.randint(2, (len(ys), 1), generator=generator) - 1
    shuffled = steps + (layers - steps)[:, others] * signs
    return similarity_of_errors(shuffled, steps, ys).diagonal()


@experiment
def heatmaps(config):
    """Fu, figures 3, 8, 10: similarity of errors; and what its null and t > d alone score."""
    s, d, x = study(config), config.d, range(1, config.layers + 1)
    layers, panels, rows, last, matches = s.layers[1:], [], {}, {}, {}
    for name, (counts, run) in s.runs.items():
        alike = error_cosines(layers, run, s.ys)  # (L, K, P)
        similarity = alike.mean(-1)
        rows[name] = x, similarity.amax(-1)
        last[name] = similarity[-1].amax(-1), bootstrap(alike[-1]).amax(-1)
        matches[name] = best_match(similarity)
        dots = {"Transformer's best match": (x, matches[name])}
        ticks = dict(yticks=range(0, len(counts), 8), yticklabels=counts[::8])
        panels.append(panel(name, dots, ylabel="step", heat=similarity.T, **ticks))
    steps = s.runs["Newton"][1]
    null = null_similarity(layers, steps[matches["Newton"]], s.ys)
    late = similarity_of_errors(layers[..., d:], steps[..., d:], s.ys[:, d:]).amax(-1)
    rows |= {"(shuffled null)": (x, null), "Newton, t > d alone": (x, late)}
    del rows["OLS"], panels[2]  # of one step only
    panels.append(panel("similarity at the best step", rows))
    to_newton = last["Newton"][0]
    found = {"like_OLS": measured(*last["OLS"]), "like_beyond_d": measured(late[-1]),
             "like_Newton": measured(*(a - b for a, b in zip(last["Newton"], last["GD"]))),
             "like_null": measured(to_newton - null[-1])}  # fmt: skip
    title = f"The last layer's similarity to Newton: {to_newton:.3f}; shuffled: {null[-1]:.3f}"
    return title, panels, found


# %% [markdown]
# ## 11. How many products with S is a layer worth?
#
# A ruler that can say no. A first-order method multiplies a vector by S once a step. Let its step
# sizes and momenta be fixed in advance, or depend on lambda_max(S) alone. Each step adds b, or a
# product with S, to what was there: after D steps from 0, w = p(S/lambda_max) b/lambda_max, with p
# a polynomial of degree D - 1, the same for all prompts. So the p that is best on average over
# prompts is at least as good as *every* such method; and least squares finds it, for each D and t.
# D*(l) is the D whose best p is as good as layer l. A network that makes one such step a layer has
# D*(l) <= l. Not covered is CG: its step sizes are inner products of the prompt's own vectors, so D
# of its steps may be worth more. A smaller class fixes all for all prompts: polynomials in S/t.

# %%
def polynomial_features(xs, ys, t, degree, per_prefix):
    """x_q^T T_j(S/size) b/size, with Chebyshev polynomials T_0, T_1, ...: (prompts, degree)."""
    X, x_q = xs[:, :t].double(), xs[:, t].double()
    eigenvalues, U = torch.linalg.eigh(X.mT @ X)
    size, top = (eigenvalues[:, -1:], 1.0) if per_prefix else (t, 4.0)
    weight = times(U.mT, x_q) * times(U.mT, times(X.mT, ys[:, :t].double())) / size
    T = np.polynomial.chebyshev.chebvander((2 * eigenvalues / size / top - 1).numpy(), degree - 1)
    return np.einsum("pd,pdj->pj", weight.numpy(), T)


def best_polynomials(fitting, prompts, t, per_prefix=True, degree=64):
    """Answers after t examples of the best methods of D = 0..degree products: (degree+1, P)."""
    fit, test = (polynomial_features(*p, t, degree, per_prefix) for p in (fitting, prompts))
    Q, R = np.linalg.qr(fit)  # one orthonormal basis serves all degrees
    parts = np.linalg.solve(R.T, test.T) * (Q.T @ fitting[1][:, t].double().numpy())[:, None]
    return torch.from_numpy(np.vstack([0 * parts[:1], parts.cumsum(0)]))


def worth_in_products(config, layers, xs, ys, t, per_prefix=True):
    """D*, the products with S that layers (L+1, P, n+1) are worth after t examples: a climb."""
    run = best_polynomials(fresh_prompts(config, 20_000, purpose=4), (xs, ys), t, per_prefix)
    return climb(layers, run[..., None].expand(-1, -1, ys.shape[1]), range(len(run)), ys, t)


@experiment
def products(config):
    """D* of the layers, of Newton's steps and of CG's, for t = d, d + 2 and n."""
    s, d, L, panels, found = study(config), config.d, config.layers, [], {}
    runs = {"Transformer": s.layers, "Newton": s.runs["Newton"][1][: L + 1],
            "CG": conjugate_gradient(s.xs, s.ys, min(d - 1, L), config.noise**2)}  # fmt: skip
    x = torch.arange(1, L + 1)
    for key, t in (("products_d", d), ("products_d2", d + 2), ("products", config.n)):
        curves = {"(l)": (x, x), "(2^l)": (x, 2.0**x), "(3^l)": (x, 3.0**x)}
        for name, run in runs.items():
            curves[name] = worth_in_products(config, run, s.xs, s.ys, t)
        fixed = worth_in_products(config, s.layers, s.xs, s.ys, t, per_prefix=False)
        panels.append(panel(f"after t = {t} examples", curves | {"Transformer, S/t": fixed},
                            "layer l, or step", "products with S", "y", ylim=(0.5, 80)))
        worth = curves["Transformer"]
        found[key] = measured(*(p[..., -1] for p in worth))  # of the last layer
    growth = {key: 2**value for key, value in rate(worth, log2=True).items() if key != "note"}
    found["products_growth"] = growth | {"note": ""}
    found["products_shape"] = evidence("exponential", worth)
    title = "The last layer is worth {:.0f} products with S; a layer multiplies them by {:.2f}"
    return title.format(worth[0][-1], growth["value"]), panels, found


# %% [markdown]
# ## 12. Ill-conditioned data, and a network without attention
#
# Condition number 100 costs GD up to a hundred times the steps, Newton at most 2 log2 100 more. An
# LSTM reads the examples once, in order, into a state of fixed size. So does online gradient
# descent (OGD): each step projects w onto the w's that fit the newest example.

# %%
@experiment
def conditioning(config):
    """Fu, figures 4, 16: what kappa = 100 costs, by similarity, by error, in products with S."""
    curves, panels, found = {}, [], {}
    for kappa in (1.0, 100.0):
        c = dataclasses.replace(config, kappa=kappa)
        s = study(c)
        climbs = {"products with S": worth_in_products(c, s.layers, s.xs, s.ys, c.d + 2)}
        for name in ("Newton", "GD"):
            counts, run = s.runs[name]
            climbs[name] = climb(s.layers, run, counts, s.ys)
            climbs[f"{name}_error"] = climb(s.layers, run, counts, s.ys, c.n)
        for key, points in climbs.items():
            curves.setdefault(key, {})[f"{key.split('_')[0]}, kappa = {kappa:g}"] = points
    for key, pair in curves.items():
        ruler = key.replace("_", " by ") if key[0] == "p" or "_" in key else f"{key} by similarity"
        scale = dict(log="y", ylim=(0.8, None)) if key[0] != "N" else {}
        panels.append(panel(ruler, pair, **scale))
        if key != "products with S":
            ratios = (hard[..., -1] / easy[..., -1] for easy, hard in zip(*pair.values()))
            found[f"kappa_{key}"] = measured(*ratios)
    title = "Condition number 100 costs, by error, {:.1f} times Newton's steps, {:.1f} times GD's"
    costs = [found[f"kappa_{name}_error"]["value"] for name in ("Newton", "GD")]
    return title.format(*costs), panels, found


class LSTM(Network):
    """A stack of LSTM layers on the Transformer's tokens."""

    def __init__(self, config):
        super().__init__(config, x_scale=1.0, position_scale=1.0)  # else it cannot tell x from y
        W = config.width
        self.stack = nn.ModuleList(nn.LSTM(W, W, batch_first=True) for _ in range(config.layers))
        with torch.no_grad():
            for lstm in self.stack:
                lstm.bias_ih_l0[W : 2 * W] = 1  # forget gates start open

    def layer(self, i, h):
        """Layer i: h (prompts, T, W) -> (prompts, T, W)."""
        return self.stack[i](h)[0]


NETWORKS["lstm"] = LSTM


def online_gradient_descent(xs, ys):
    """OGD: w <- w + x_i (y_i - w.x_i) / ||x_i||^2, example by example, once: (1, prompts, n+1)."""
    xs, ys = xs.double(), ys.double()
    weights = [torch.zeros_like(xs[:, 0])]
    for x, y in zip(xs.unbind(1), ys.unbind(1)):  # the algorithm itself is a loop over examples
        miss = y - (weights[-1] * x).sum(-1)
        weights.append(weights[-1] + x * (miss / x.square().sum(-1).clamp_min(TINY))[:, None])
    return predict(torch.stack(weights[:-1], dim=1)[None], xs)


@experiment
def lstm(config):
    """Fu, figure 7c and table 1: do an LSTM's layers improve? Whom is it like?"""
    errors, whom, best, n = {}, {}, {}, config.n
    # Two layers: deeper LSTMs do not get off the ground in the same number of steps.
    small = dataclasses.replace(config, model="lstm", layers=2, adam_lr=0.008)
    for name, c in (("Transformer", config), ("LSTM", small)):
        s = study(c)
        squares = mean_and_bootstrap((s.layers[1:, :, n] - s.ys[:, n]).square())
        errors[name] = range(1, c.layers + 1), squares[0] / c.d
        runs = [s.runs["Newton"][1], s.runs["GD"][1], online_gradient_descent(s.xs, s.ys)]
        alike = [mean_and_bootstrap(error_cosines(s.layers[-1:], run, s.ys)[0]) for run in runs]
        best[name] = [torch.stack([z.amax(-1) for z in pair]) for pair in zip(*alike)]
        whom[name] = range(3), best[name][0]
    found = {"LSTM_layers": measured(*(error[..., 0] / error[..., 1] for error in squares)),
             "LSTM_OGD": measured(*(z[2] - z[:2].amax(0) for z in best["LSTM"])),
             "Transformer_OGD": measured(*(z[0] - z[2] for z in best["Transformer"]))}  # fmt: skip
    title = "An LSTM's second layer is {value:.1f} times better than its first"
    ticks = dict(xticks=range(3), xticklabels=["Newton", "GD", "OGD"])
    panels = [panel("error by layer", errors, ylabel="squared error / d", log="y"),
              panel("similarity of the last layer", whom, xlabel="", **ticks)]  # fmt: skip
    return title.format(**found["LSTM_layers"]), panels, found


# %% [markdown]
# ## 13. Is an answer linear in the query, and in the answers before it?
#
# All of Newton's and GD's are, in both: to answers (y_a + y_b)/sqrt 2 they respond with (yhat_a +
# yhat_b)/sqrt 2. CG's are linear in the query, but not in y: its step sizes depend on it.

# %%
def not_linear(learner, xs, ys):
    """Shares (steps,) of the squared error after n examples that are not linear: in x_q, in y."""
    y_b = times(xs, torch.randn(len(xs), xs.shape[-1], generator=torch.Generator().manual_seed(0)))
    x_b, x_mixed = xs.clone(), xs.clone()
    x_b[:, -1] = xs[:, -1].roll(1, 0)  # another prompt's query
    x_mixed[:, -1] = (xs[:, -1] + x_b[:, -1]) / math.sqrt(2)
    prompts = [(xs, ys), (x_b, ys), (x_mixed, ys), (xs, y_b), (xs, (ys + y_b) / math.sqrt(2))]
    a, of_x_b, of_x, of_y_b, of_y = (learner(*prompt)[..., -1].double() for prompt in prompts)
    error = 2 * (a - ys[:, -1]).square().mean(-1).clamp_min(TINY)
    return [(both - (a + b) / math.sqrt(2)).square().mean(-1) / error
            for both, b in ((of_x, of_x_b), (of_y, of_y_b))]  # fmt: skip


@experiment
def linearity(config):
    """New: are a layer's answers linear in the query and in y? Newton's and GD's are."""
    s, last = study(config), min(config.d - 1, config.layers)
    learners = {"Transformer": s.learner, "CG": functools.partial(conjugate_gradient, steps=last)}
    shares = {name: not_linear(learner, s.xs, s.ys) for name, learner in learners.items()}
    panels = []
    for i, of in enumerate(("the query", "the answers y")):
        curves = {name: (range(1, len(share[i])), share[i][1:]) for name, share in shares.items()}
        panels.append(panel(f"not linear in {of}", curves, "layer or step", "share of the error"))
    of_x, of_y = (share[-1] for share in shares["Transformer"])
    found = {"linear_in_x": measured(of_x),
             "linear_in_y": measured(of_y, note=f"CG {shares['CG'][1][-1]:.2f}")}  # fmt: skip
    title = f"Of the last layer's error {of_x:.0%} is not linear in the query, {of_y:.0%} not in y"
    return title, panels, found


# %% [markdown]
# # Part III. Theory that runs
#
# ## 14. Newton's weights, written by hand (Fu, theorem 5.1)
#
# Each example is one token [T x_j ; x_j ; y_j]. T, Newton's M, is stored nowhere: T x_j is enough.
# Attention has ReLU in place of softmax; two heads of opposite sign pass a score on unchanged,
# ReLU(s) - ReLU(-s) = s. (The printed proof gives both values one sign, which makes |s|; and its
# scores <T x_j, x_t> make T S T^T, which doubles antisymmetric rounding.) With j over the examples:
#
#     first layer      T = alpha S         adds  alpha sum_j x_j <x_j, x_t>  to the top block
#     Newton layer     T <- 2T - T S T     adds  -1/2 T S T x_t  to it, and the MLP doubles it
#     readout layer    x_q^T T b           adds  sum_j y_j <T x_j, x_q>  to the query's empty y
#
# So k steps take k + 2 layers of width 2d + 1; Fu's proof spends k + 8. Two costs: alpha is a
# weight, one number for all prompts. And every example must see all others: under a causal mask,
# such as our Transformer's, key j holds its own prefix's T, and the iteration goes astray.

# %%
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


def construction(xs, ys, steps, alpha, causal=False):
    """Newton in ReLU attention (Fu, theorem 5.1): step k after 1 + k layers: (steps+1, P, n+1)."""
    (_, T, d), trajectory = xs.shape, []
    Tx, x, y = token_blocks(d)
    readout, (heads, (up, down)) = linear_heads(Q=x, K=Tx, V=y.mT @ y), newton_layer(d)
    # Every prefix t is a sequence of its own: its examples are the tokens j < t, its query token t.
    known = torch.ones(T, T, dtype=torch.float64).tril(-1)  # [t, j]
    mask = known[:, None] * (torch.ones(T, T).tril() if causal else 1)  # [prefix, token, key]
    h = torch.cat([0 * xs, xs, ys[..., None]], -1).double()[:, None].repeat(1, T, 1, 1)
    h[..., -1] *= known  # h (prompts, prefix, token, 2d+1): the query's y is to be filled in
    h = relu_attention(h, linear_heads(Q=x, K=x, V=alpha * Tx.mT @ x), mask)
    for _ in range(steps + 1):
        answers = relu_attention(h, readout, mask)[..., -1]  # (prompts, prefix, token)
        trajectory.append(answers.diagonal(dim1=1, dim2=2))
        h = relu_attention(h, heads, mask)
        h = h + (h @ up.mT).relu() @ down.mT
    return torch.stack(trajectory)


@experiment
def by_hand(config):
    """Fu, theorem 5.1: hand-written weights against Newton, and under a causal mask."""
    n, k = config.n, NEWTON_STEPS[-1]
    count = max(4, min(64, 25_000 // n**2))  # few: each prefix is a sequence of its own
    xs, ys = (z[:count] for z in fresh_prompts(config, config.prompts, purpose=2))
    alpha = newton_start(prefix_moments(xs, ys)[0]).min()
    runs = {"Newton": newton(xs, ys, k, alpha),
            "Transformer by hand": construction(xs, ys, k, alpha),
            "(under a causal mask)": construction(xs, ys, k, alpha, causal=True)}  # fmt: skip
    curves = {}
    for label, answers in runs.items():
        error = (answers[..., n] - ys[:, n]).square().mean(1) / config.d
        curves[label] = NEWTON_STEPS, error.nan_to_num(1e3).clamp(1e-18, 1e3)
    apart = (runs["Transformer by hand"] - runs["Newton"]).abs().amax((1, 2))
    apart = apart / ys.square().mean().sqrt()
    gap = {"by hand": (NEWTON_STEPS[1:], apart[1:])}
    panels = [panel("error", curves, "layer or step k", "squared error / d", "y"),
              panel("largest difference from Newton", gap, "k", "over the size of y", "y")]
    title = f"Hand-written attention is Newton, to {apart.max():.0e}; not under a causal mask"
    return title, panels, {"by_hand": measured(apart.max())}


# %% [markdown]
# ## 15. Linear attention is preconditioned gradient descent (Ahn et al., arXiv 2306.00297)
#
# Without the softmax, what a trained layer does can be read off its weights. A prompt is a matrix,
# one token a column; M = diag(I_n, 0), so that the query is no example; e = (0, ..., 0, 1):
#
#     Z = [ x_1 ... x_n  x_q ]      Z <- Z + (1/n) P Z M (Z^T Q Z)
#         [ y_1 ... y_n   0  ]      P = e e^T      Q = -blockdiag(A, 0)
#
# Only the last row changes, y_j <- y_j - (1/n) sum_{i<=n} y_i x_i^T A x_j. It holds y_j - w.x_j,
# with w = 0 at first, and 0 - w.x_q under the query. So a layer subtracts (A^T r).x_j, where r =
# (1/n) sum_i (y_i - w.x_i) x_i: w grows by A^T r. And -r is the gradient of R(w) = (1/2n) sum_i
# (w.x_i - y_i)^2: for a symmetric A, w <- w - A grad R(w) (lemma 1). What is left to learn is A.
#
# - One layer, w ~ N(0, I) (theorem 1). The loss is quadratic in A: a convex problem. With endless
#   examples the best A is a Newton step, Sigma^-1; with few it moves less along small eigenvalues.
# - Many layers, w ~ N(0, Sigma^-1) (theorem 3). For Sigma^-1/2 x and Sigma^1/2 w no direction is
#   special: A_l should be a multiple of I there, and a_l Sigma^-1 here.

# %%
def linear_attention(Z, P, Q):
    """One layer, Z + (1/n) P Z M (Z^T Q Z), on Z (prompts, d+1, n+1); P, Q (d+1, d+1)."""
    n = Z.shape[-1] - 1
    values, keys = (P @ Z)[..., :n], Z[..., :n]  # M: every token but the query
    return Z + values @ keys.mT @ (Q / n) @ Z  # from the left: no (n+1) x (n+1) matrix is needed


def linear_transformer(A, xs, ys):
    """Every layer's answer to the last query, -[Z]_{d+1,n+1}, for A (L, d, d): (L, prompts)."""
    Z = torch.cat([xs.mT, F.pad(ys[:, None, :-1], (0, 1))], dim=1)  # the query's answer left out
    d, predictions = A.shape[-1], []
    P = F.pad(A.new_ones(1, 1), (d, 0, d, 0))
    for layer in A.unbind():
        Z = linear_attention(Z, P, F.pad(-layer, (0, 1, 0, 1)))
        predictions.append(-Z[:, -1, -1])
    return torch.stack(predictions)


def optimal_preconditioner(Sigma, n):
    """The best A (d, d) of one layer, for n examples x ~ N(0, Sigma), w ~ N(0, I) (Ahn, theorem 1).

    Sigma's eigenvectors, with 1 / ((n+1)/n lambda_i + (1/n) sum_k lambda_k) for its lambda_i.
    """
    eigenvalues, U = torch.linalg.eigh(Sigma)
    return U / ((n + 1) / n * eigenvalues + eigenvalues.sum() / n) @ U.mT


def correlated_prompts(prompts, n, Sigma, w_covariance, generator):
    """x ~ N(0, Sigma), w ~ N(0, w_covariance), y = w.x: xs (prompts, n+1, d), ys (prompts, n+1)."""
    draw, root = functools.partial(torch.randn, generator=generator), torch.linalg.cholesky
    xs = draw(prompts, n + 1, len(Sigma)) @ root(Sigma).mT
    return xs, (xs @ (root(w_covariance) @ draw(prompts, len(Sigma), 1))).squeeze(-1)


def train_preconditioners(layers, n, Sigma, w_covariance, lr=0.4, batch=1000, steps=600, seed=1):
    """A_1..A_L trained on fresh prompts by Muon; P and Q keep their form: (steps+1, L, d, d)."""
    generator = torch.Generator().manual_seed(seed)
    A = (0.1 * torch.randn(layers, *Sigma.shape, generator=generator)).requires_grad_()
    optimizer, history = Muon([A], lr, momentum=0.8), [A.detach().clone()]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        xs, ys = correlated_prompts(batch, n, Sigma, w_covariance, generator)
        optimizer.zero_grad()
        F.mse_loss(linear_transformer(A, xs, ys)[-1], ys[:, -1]).backward()
        optimizer.step()
        history.append(A.detach().clone())
    return torch.stack(history)


def distance_to_identity(M):
    """Dist(M, I) = min_a ||M - a I||_F / ||M||_F of M (..., d, d) (Ahn, section 5)."""
    multiple = M.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * torch.eye(M.shape[-1])
    return torch.linalg.matrix_norm(M - multiple) / torch.linalg.matrix_norm(M)


@experiment
def preconditioners(config):
    """Ahn, theorems 1 and 3, figures 1 and 2, in Ahn's sizes: trained linear attention."""
    d, n, seed = 5, 20, config.seed
    U = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed))).Q
    spectrum = torch.tensor([1, 1, 1 / 4, 1 / 16, 1])
    Sigma, inverse, root = ((U * spectrum**power) @ U.mT for power in (1, -1, 0.5))
    closed = optimal_preconditioner(Sigma, n)
    # Theorem 1's A is smaller than those of theorem 3: smaller training steps, and more.
    one = train_preconditioners(1, n, Sigma, torch.eye(d), lr=0.06, steps=1000, seed=seed)[-1, 0]
    A = train_preconditioners(3, n, Sigma, inverse, seed=seed)  # (steps+1, 3, d, d)
    white = distance_to_identity(root @ A @ root)
    off = torch.linalg.matrix_norm(one - closed) / torch.linalg.matrix_norm(closed)
    x = range(0, len(A), 20)
    paths = {f"whitened A, layer {i + 1}": (x, white[::20, i]) for i in range(3)}
    entries = {"(equal)": ([0, 1], [0, 1]), "Transformer": (closed.flatten(), one.flatten())}
    title = f"Linear attention is {off:.1%} off theorem 1, {white[-1].max():.2f} off theorem 3"
    panels = [panel("one layer", entries, "entry of A in theorem 1", "as trained"),
              panel("three layers", paths, "training step", "distance to a multiple of I")]
    return title, panels, {"Ahn_one": measured(off), "Ahn_three": measured(white[-1].max())}


# %% [markdown]
# ## 16. How softmax attention learns to look things up (Huang et al., arXiv 2310.05249)
#
# A token is one of K orthonormal features, v_k with probability p_k; its answer is w.v_k. One layer
# of softmax attention, with a matrix Q that starts at 0, averages a prompt's N answers:
#
#     yhat = sum_i softmax_i(x_i^T Q x_q) y_i = sum_n a_n w.v_n     a_n: attention on feature n
#
# For a query x_q = v_k, and E w w^T = I, the loss is 1/2 [(1 - a_k)^2 + sum_{n != k} a_n^2]. Its
# gradient moves the query's column of Q: A_k = Q[k,k], which only grows, and B_{k,n} = Q[n,k].
# If all p_k = 1/K, the loss converges when A_k passes log K: one right feature outweighs K wrong
# ones. With p_1 = 1/2 feature 1 is learned at once, but half of every other query's attention rests
# on it too: first B_{k,1} falls, then the lead passes to A_k. When? Once B is clearly negative, a_1
# is about e^B and a_k about e^A / K, and the gradient gives dB = -eta e^(2B) / (2K), dA = eta e^A /
# (2 K^2): equally fast at t = 2/3 K^2 / eta, for K without end.

# %%
def query_losses(Q, counts):
    """Loss 1/2 E_w (yhat - w.x_q)^2 of each feature as query, (K,): Q (K, K), counts (P, K)."""
    attention = (counts.log()[:, :, None] + Q).softmax(1)  # (prompts, n, k); log 0 hides the absent
    return (attention - torch.eye(len(Q))).square().sum(1).mean(0) / 2


def train_attention(K, p_1, steps, *, eta=2.0, seed=1):
    """Gradient descent on Q, on fresh prompts of N = 10 K examples; queries weighted by p_k.

    Returns (steps, 4): loss of feature 1; of the others; A_k and B_{k,1}, their means over k > 1.
    """
    p = torch.tensor([p_1] + [(1 - p_1) / (K - 1)] * (K - 1))
    prompts = p.expand(max(512 // K, 1), K)  # fewer prompts at large K: more is averaged
    generator, path = torch.Generator().manual_seed(seed), []
    Q = torch.zeros(K, K, requires_grad=True)
    for _ in range(steps):
        tokens = torch.multinomial(prompts, 10 * K, replacement=True, generator=generator)
        losses = query_losses(Q, F.one_hot(tokens, K).sum(1).float())
        (gradient,) = torch.autograd.grad(p @ losses, Q)
        with torch.no_grad():
            row = losses[0], losses[1:].mean(), Q.diagonal()[1:].mean(), Q[0, 1:].mean()
            path.append(torch.stack(row))
            Q -= eta * gradient
    return torch.stack(path)


def steps_above(share, loss, p_k, N):
    """How many steps a loss (steps,) has more than a share of its first excess over the floor."""
    excess = loss - 0.5 * (1 - p_k) ** N  # what the prompt lacks cannot be looked up
    return (excess >= share * excess[0]).sum().item()


@experiment
def stages(config):
    """Huang: one layer of softmax attention learns in stages when one feature dominates."""
    K, seed, panels = 16, config.seed, []
    x = torch.tensor([round(1.1**i) for i in range(7, 84)])
    ends, logs = x[[0, -1]], math.log(K)
    for name, p_1 in (("balanced: all p = 1/16", 1 / K), ("imbalanced: p_1 = 1/2", 1 / 2)):
        path = train_attention(K, p_1, 3000, seed=seed)
        loss_1, loss_k, A, B = path[x - 1].T
        curves = {"loss of feature 1": (x, loss_1), "loss of the others": (x, loss_k)}
        panels.append(panel(name, curves, "step", "loss", "xy"))
        entries = {"A_k": (x, A), "B_{k,1}": (x, B), "(log K)": (ends, [logs, logs]),
                   "(-1/2 log K)": (ends, [-logs / 2, -logs / 2])}  # fmt: skip
        panels.append(panel(name, entries, "step", "entries of Q", "x"))
    first = steps_above(0.1, path[:, 0], 1 / 2, 10 * K)
    others = steps_above(0.1, path[:, 1], 1 / 2 / (K - 1), 10 * K)
    # The lead passes where B falls as fast as A grows: A + B is lowest.
    sizes = torch.tensor([8, 12, 16, 24, 32, 48, 64]).double()
    paths = [train_attention(k, 1 / 2, k * k, seed=seed) for k in sizes.int().tolist()]
    switch = torch.stack([path[:, 2:].sum(1).argmin() for path in paths]).double()
    local = switch.log().diff() / sizes.log().diff()  # exponents between neighbouring K
    exponent, _ = line_fit(sizes.log(), switch.log())
    note = f"local {local[0]:.2f} to {local[-1]:.2f}"
    found = {"Huang_first": measured(others / first), "Huang_switch": measured(exponent, note=note)}
    curves = {"measured": (sizes, switch), "(2/3 K^2/eta)": (sizes, sizes**2 / 3)}
    panels.append(panel("when does the lead pass to A_k?", curves, "K", "step", "xy"))
    return f"A dominant feature is learned {others / first:.0f} times sooner", panels, found


# %% [markdown]
# # The run: pictures, table, command line. Nothing to learn here.

# %%
COLOR = {"Transformer": "#D55E00", "Newton": "#0072B2", "GD": "#009E73", "CG": "#CC79A7",
         "LSTM": "#E69F00", "Fu": "#888888", "": "#888888"}  # fmt: skip
STYLE = {"font.size": 9, "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.grid": True,
         "axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.25,
         "legend.fontsize": 7, "lines.markersize": 4}  # fmt: skip
NO_TRAINING = ("rulers", "by_hand")  # made first: a picture within seconds
FU = dict(d=20, n=40, curriculum=25, probes=512, prompts=320,
          figures="convergence,heatmaps,rates,products")  # fmt: skip
PRESETS = {
    "default": {},
    "quick": dict(d=3, n=6, layers=6, width=32, steps=500, muon_lr=0.02, adam_lr=0.02, probes=512,
                  prompts=256, out="figures/quick"),
    "laptop": FU | dict(width=128, heads=4, steps=4600, out="figures/d20"),
    "paper": FU | dict(layers=12, width=256, heads=8, steps=12_000, batch=256, out="figures/paper"),
}  # fmt: skip
CHOICES = {"preset": PRESETS, "model": NETWORKS, "recipe": ("muon", "fu"),
           "device": ("auto", "cpu", "cuda"), "figures": ["all", *EXPERIMENTS]}  # fmt: skip


@rc_context(STYLE)
def draw(title, panels):
    """The picture of an experiment, a matplotlib Figure."""
    columns = 2 if len(panels) in (2, 4) else min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    picture = Figure((4.4 * columns, 3.4 * rows + 0.4), dpi=130, layout="constrained")
    for place, part in enumerate(panels, start=1):
        ax = picture.add_subplot(rows, columns, place)
        ax.set(title=part["title"], **part["axes"])
        for i, (label, c) in enumerate(part["curves"].items()):
            name = re.split(r"\W", label)[0]
            color = COLOR.get(name, colormaps["viridis"](0.9 * i / len(part["curves"])))
            style = ["o-", "s--", "^:", "v-.", "D-"][i % 5] if name in COLOR else "-"
            style = style if name else "--"  # a label in parentheses is there for reference
            ax.plot(c["x"], c["y"], style, color=color, label=label)
            if "low" in c:
                ax.vlines(c["x"], c["low"], c["high"], color=color, alpha=0.5)
        if part["heat"] is not None:
            steps, layers = part["heat"].shape
            extent = (0.5, layers + 0.5, -0.5, steps - 0.5)
            image = ax.imshow(part["heat"], "cividis", vmin=0.5, vmax=1, origin="lower",
                              aspect="auto", extent=extent)  # fmt: skip
            picture.colorbar(image, label="similarity of errors")
        ax.legend()
    picture.suptitle(title)
    return picture


def check(config):
    """Raise ValueError, in one line, for a configuration that cannot work."""
    for name, value in vars(config).items():
        optional = name in ("noise", "tails", "curriculum", "seed")
        if not isinstance(value, str) and not (0 <= value < math.inf and (value or optional)):
            raise ValueError(f"--{name} must be {'0 or ' * optional}a positive number, not {value}")
    for name, known in CHOICES.items():
        chosen = getattr(config, name)
        for word in chosen.split(",") if name == "figures" else [chosen]:
            if word not in known:
                raise ValueError(f"--{name}: not {word!r}, but {', '.join(known)}")
    rest = config.width % config.heads or config.width == config.heads
    for wrong, message in (
        (config.device == "cuda" and not torch.cuda.is_available(), "--device cuda: no CUDA here"),
        (config.kappa < 1, "--kappa is at least 1"),
        (config.d < 2 or config.n < config.d + 2, "--d is at least 2, --n at least d + 2"),
        (config.layers <= FIRST_LAYER and config.model != "lstm", "--layers is at least 4"),
        (rest, "--heads must divide --width, and be smaller"),
        (config.steps <= config.curriculum * (config.d - 2), "--steps end before the curriculum"),
    ):
        if wrong:
            raise ValueError(message)


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a mistake on the command line raises ValueError with one line."""

    def error(self, message):
        raise ValueError(message)


def parse_config(arguments):
    """Command line -> Config. Flags and help are the fields and comments of Config."""
    helps = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.MULTILINE))
    parser = OneLineParser("icl_newton.py", description=__doc__.split("\n")[1], allow_abbrev=False)
    for field in dataclasses.fields(Config):
        text = helps[field.name] + " (default: %(default)s)"  # of the preset, if one is chosen
        parser.add_argument(f"--{field.name}", type=field.type, default=field.default, help=text)
    known, _ = parser.parse_known_args([a for a in arguments if a not in ("-h", "--help")])
    parser.set_defaults(**PRESETS.get(known.preset, {}))
    return Config(**vars(parser.parse_args(arguments)))


def plain(z):
    """JSON for what json does not know: arrays, tensors and ranges, to four digits."""
    return [plain(row) if np.ndim(row) else float(f"{row:.4g}") for row in np.asarray(z).tolist()]


def run(config):
    """Make the figures that the configuration asks for; print and write the table of claims."""
    names = [name for name in EXPERIMENTS if {"all", name} & set(config.figures.split(","))]
    names.sort(key=lambda name: name not in NO_TRAINING)
    out, figures, runs, start = Path(config.out), {}, [], time.perf_counter()
    print(f"Draws {', '.join(names)} into {out}/, training the networks that they need.")
    for seed in range(config.seed, config.seed + config.seeds):
        runs.append({})
        for name in names:
            title, panels, found = EXPERIMENTS[name](dataclasses.replace(config, seed=seed))
            runs[-1] |= found
            if seed == config.seed:  # the first seed's pictures
                save = functools.partial(draw(title, panels).savefig, format="png")
                write_file(out / f"{name}.png", save)
                figures[name] = {"title": title, "panels": panels}
            print(f"{time.perf_counter() - start:5.0f} s  {out / name}.png, seed {seed}: {title}")
    results = print_table(config, runs)
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(Config)
                if getattr(config, f.name) != f.default}  # fmt: skip
    record = {"settings": settings, "torch": torch.__version__, "claims": results,
              "seconds": round(time.perf_counter() - start), "figures": figures}  # fmt: skip
    text = json.dumps(record, default=plain)
    strict = json.loads(text, parse_constant=lambda name: None)  # NaN and Infinity become null
    text = json.dumps(strict, allow_nan=False).replace('{"title"', '\n{"title"')
    write_file(out / "results.json", lambda path: path.write_text(text, "utf-8"))
    print(f"\nAll numbers: {out / 'results.json'}")


def main(arguments=None):
    """Run the command line; the exit status: 0, 1 (a run failed), 2 (bad input) or 130 (Ctrl-C)."""
    status = 2
    try:
        config = parse_config(sys.argv[1:] if arguments is None else arguments)
        for folder in (Path(config.out), Path(config.checkpoints)):
            write_file(folder / ".writable", Path.touch)
            (folder / ".writable").unlink()
        status = 1  # the input is good: what fails from here on is the run
        run(config)
    except (NotImplementedError, FloatingPointError, ValueError, OSError) as error:
        print(f"icl_newton: {error}", file=sys.stderr)
        return status
    except KeyboardInterrupt:
        print("\nicl_newton: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__" and "__file__" in globals():  # in a notebook: run(Config())
    sys.exit(main())
