"""
Tests of icl_newton.py, and the grader of its exercises.

    python -m pytest                everything, about a minute and a half on two cores
    python -m pytest -k test_ex     the ten exercises, a summary with points at the end
    python -m pytest -k ex03        one exercise

Every test compares with something that cannot share its bugs: numpy.linalg, a slow obvious loop over prompts and
prefixes, an identity, or an answer planted in the data. Shapes and seeds are drawn anew in every run; a failing test
prints its seed, and ICL_SEED=that repeats it.
"""

import inspect
import json
import math
import os
import random
import re
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import icl_newton

HERE = Path(__file__).parent
SEED = int(os.environ.get("ICL_SEED", random.SystemRandom().randrange(10**6)))


@pytest.fixture(autouse=True)
def fresh_randomness():
    """Every test starts from the run's seed, so that ICL_SEED repeats it alone."""
    print(f"ICL_SEED={SEED}")
    random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture
def icl():
    return icl_newton


class Points:
    """After a run with exercises in it: which passed, and for how many points."""

    def __init__(self):
        self.passed = {}

    def pytest_runtest_logreport(self, report):
        if found := re.search(r"test_ex(\d\d)", report.nodeid):
            number = int(found[1])
            self.passed[number] = self.passed.get(number, True) and not report.failed

    def pytest_terminal_summary(self, terminalreporter):
        rows = [row for row in icl_newton.EXERCISES if row[0] in self.passed]
        if rows:
            terminalreporter.section("exercises")
        for number, name, *_, points in rows:
            ok = self.passed[number]
            terminalreporter.write_line(
                f"  ex{number:02} {name:<24} {'passed' if ok else 'FAILED'} {points * ok:>3} of {points}"
            )
        if rows:
            done = [row for row in rows if self.passed[row[0]]]
            terminalreporter.write_line(
                f"  {len(done)} of {len(rows)} exercises passed: {sum(row[-1] for row in done)} of "
                f"{sum(row[-1] for row in rows)} points"
            )


@pytest.fixture(scope="session", autouse=True)
def summary_of_points(request):
    request.config.pluginmanager.register(Points())


# ---------------------------------------------------------------------------------------------------------------------
# Slow, obvious oracles


def some_prompts(prompts=None, n=None, d=None, scales=None):
    """Random prompts without any help from the file under test: xs (P, n+1, d), ys (P, n+1), float64."""
    prompts, d = prompts or random.randint(2, 4), d or random.randint(2, 5)
    n = n or random.randint(d + 1, 2 * d + 2)
    xs = torch.randn(prompts, n + 1, d, dtype=torch.float64)
    if scales is not None:
        xs = xs * torch.as_tensor(scales, dtype=torch.float64)
    return xs, torch.einsum("ptd,pd->pt", xs, torch.randn(prompts, d, dtype=torch.float64))


def loop_over_prefixes(xs, ys, solve):
    """[k, b, t] = x_{t+1} . w_k for w_0, w_1, ... = solve(X, y) of the first t examples, one prefix at a time."""
    rows = []
    for x, y in zip(xs.double().numpy(), ys.double().numpy()):
        rows.append([[w @ x[t] for w in solve(x[:t], y[:t])] for t in range(len(x))])
    return torch.tensor(np.array(rows)).permute(2, 0, 1)


def slow_gd(steps, lr=None, w0=None, ridge=0.0):
    def solve(X, y):
        S, b, w = X.T @ X + ridge * np.eye(X.shape[1]), X.T @ y, np.zeros(X.shape[1]) if w0 is None else w0.copy()
        eta = lr if lr is not None else 1 / max(np.linalg.eigvalsh(S)[-1], 1e-30)
        path = [w]
        for _ in range(steps):
            path.append(w := w - eta * (S @ w - b))
        return path

    return solve


def slow_newton(steps, alpha=None, ridge=0.0):
    def solve(X, y):
        S, b = X.T @ X + ridge * np.eye(X.shape[1]), X.T @ y
        M = S / max(np.linalg.norm(S @ S.T), 1e-30) if alpha is None else alpha * S
        path = [M @ b]
        for _ in range(steps):
            M = 2 * M - M @ S @ M
            path.append(M @ b)
        return path

    return solve


def close(actual, expected, message, tolerance=1e-9):
    """Equal shapes, and equal entries up to a tolerance relative to the largest."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    shapes = tuple(actual.shape), tuple(expected.shape)
    assert shapes[0] == shapes[1], f"shape {shapes[0]}, expected {shapes[1]}: {message}"
    bad = (~actual.isfinite()).nonzero().tolist()
    assert not bad, f"{len(bad)} entries are nan or infinite, the first at index {bad[0]}: {message}"
    scale = max(expected.abs().max().item(), 1e-3)
    error = (actual.double() - expected.double()).abs().max().item() / scale
    assert error <= tolerance, f"{message} (largest relative error {error:.1e})"


def slow_attention(q, k, v):
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=v.dtype)
    for index in np.ndindex(*q.shape[:-2]):
        for i in range(q.shape[-2]):
            scores = torch.stack([q[index][i] @ k[index][j] for j in range(i + 1)]) / math.sqrt(q.shape[-1])
            out[index][i] = scores.softmax(0) @ v[index][: i + 1]
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Exercises


def test_ex01_shapes_and_noiseless_answers(icl):
    P, d = random.randint(3, 6), random.randint(2, 6)
    n = d + random.randint(1, 5)
    xs, ys = icl.sample_prompts(P, n, d)
    assert xs.shape == (P, n + 1, d) and ys.shape == (P, n + 1), (
        f"xs is (prompts, n+1, d), ys (prompts, n+1); got {xs.shape}, {ys.shape}"
    )
    assert xs.dtype == ys.dtype == torch.float32, "prompts are float32"
    rules = []
    for x, y in zip(xs.double().numpy(), ys.double().numpy()):
        w, *_ = np.linalg.lstsq(x, y, rcond=None)
        assert np.abs(x @ w - y).max() < 1e-4, "without noise one w* must explain all n+1 answers of a prompt"
        rules.append(w)
    assert np.abs(rules[0] - rules[1]).max() > 1e-3, "every prompt needs its own w*"


def test_ex01_randomness_comes_from_the_generator(icl):
    draw = lambda seed: icl.sample_prompts(3, 4, 2, kappa=5.0, noise=0.3, generator=torch.Generator().manual_seed(seed))
    first, again, other = draw(SEED), draw(SEED), draw(SEED + 1)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]), (
        "the same seed must give the same prompts: pass the generator to every draw"
    )
    assert not torch.equal(first[0], other[0]), "another seed must give other prompts"


def test_ex01_condition_number(icl):
    d, kappa = 5, random.uniform(5, 50)
    xs, _ = icl.sample_prompts(2, 40_000, d, kappa=kappa)
    spectra = [np.linalg.eigvalsh(x.double().numpy().T @ x.double().numpy() / len(x)) for x in xs]
    for s in spectra:
        s, high = s[::-1], d // 2
        large = int((s > math.sqrt(s[0] * s[-1])).sum())
        assert large == high, f"{large} of {d} eigenvalues are large, expected d//2 = {high}"
        ratio = s[:high].mean() / s[high:].mean()
        assert abs(ratio / kappa - 1) < 0.1, (
            f"condition number {ratio:.1f}, expected {kappa:.1f}: eigenvalues of the covariance scale x by their roots"
        )
        assert abs(s.sum() / d - 1) < 0.1, f"the covariance has trace {s.sum():.2f}, expected d = {d}: rescale"
    moments = [(x.T @ x / len(x)).double() for x in xs]
    assert (moments[0] - moments[1]).abs().max() > 0.05, "each prompt needs its own random eigenbasis"
    assert (moments[0] - torch.diag(moments[0].diagonal())).abs().max() > 0.02, (
        "the eigenbasis must be rotated, not the axes"
    )


def test_ex01_noise_and_moments(icl):
    noise = random.uniform(0.2, 0.6)
    xs, ys = icl.sample_prompts(400, 60, 3, noise=noise)
    residuals = [
        np.linalg.lstsq(x, y, rcond=None)[1][0] / (61 - 3) for x, y in zip(xs.double().numpy(), ys.double().numpy())
    ]
    assert abs(np.sqrt(np.mean(residuals)) / noise - 1) < 0.05, "noise is the standard deviation of what is added to y"
    xs, ys = icl.sample_prompts(4000, 4, 3)
    assert abs(xs.square().mean().item() - 1) < 0.06 and abs(xs.mean().item()) < 0.03, "x ~ N(0, I) when kappa = 1"
    assert abs(ys.square().mean().item() / 3 - 1) < 0.1, "w* ~ N(0, I_d): then y has variance d"


def test_ex02_default_step_size(icl):
    xs, ys = some_prompts()
    K = random.randint(3, 9)
    expected = loop_over_prefixes(xs, ys, slow_gd(K))
    actual = icl.gradient_descent(xs, ys, K)
    close(actual[:1], expected[:1], "step 0 must be the start, w_0 = 0: have you taken a step too many?")
    close(
        actual,
        expected,
        "w <- w - lr (S w - b) with lr = 1/lambda_max of each prefix (the empty one has S = 0); does a prefix include the example it predicts?",
    )


def test_ex02_given_step_size_and_counts(icl):
    xs, ys = some_prompts()
    counts = sorted(random.sample(range(0, 40), 4))
    lr = random.uniform(0.002, 0.01)
    expected = loop_over_prefixes(xs, ys, slow_gd(counts[-1], lr))[counts]
    close(
        icl.gradient_descent(xs, ys, counts, lr=lr),
        expected,
        "entry [i] must be the prediction after steps[i] steps; the gradient is S w - b, not its mean over examples",
    )


def test_ex02_given_start(icl):
    xs, ys = some_prompts()
    w0, lr = torch.randn(xs.shape[-1], dtype=torch.float64), 0.01
    expected = loop_over_prefixes(xs, ys, slow_gd(6, lr, w0.numpy()))
    kept = w0.clone()
    close(
        icl.gradient_descent(xs, ys, 6, lr=lr, w0=w0), expected, "off the span of the examples w_0 must stay as it is"
    )
    assert torch.equal(w0, kept), "w0 was changed in place"


def test_ex02_ridge(icl):
    xs, ys = some_prompts()
    expected = loop_over_prefixes(xs, ys, slow_gd(6, 0.01, ridge=0.5))
    message = "`ridge` adds ridge I to S: hand it on to spectral_trajectory or prefix_moments"
    close(icl.gradient_descent(xs, ys, 6, lr=0.01, ridge=0.5), expected, message)


def test_ex03_newton_start_is_safe_and_scales(icl):
    d = random.randint(2, 6)
    X = torch.randn(random.randint(2, 4), 3, d + random.randint(0, 4), d, dtype=torch.float64)
    S = X.mT @ X
    alpha = icl.newton_start(S)
    assert alpha.shape == (*S.shape[:-2], 1, 1), (
        "one alpha for each S, as (..., 1, 1): have you taken one norm of all matrices?"
    )
    expected = torch.tensor([[1 / np.linalg.norm(s @ s.T) for s in row] for row in S.numpy()])
    close(icl.newton_start(10 * S), alpha / 100, "alpha shrinks with the square of S: the norm is of S S^T, not of S")
    assert ((alpha.squeeze() * torch.linalg.matrix_norm(S, 2) ** 2) < 1.999).all(), (
        "alpha lambda_max^2 must be below 2, or (1 - alpha lambda^2)^(2^k) never shrinks"
    )
    close(alpha[..., 0, 0], expected, "alpha = 1/||S S^T||_F, the Frobenius norm")


def test_ex03_newton_start_of_nothing(icl):
    assert icl.newton_start(torch.zeros(2, 3, 3, dtype=torch.float64)).isfinite().all(), (
        "the empty prefix has S = 0: keep 1/0 away"
    )


def test_ex04_steps(icl):
    xs, ys = some_prompts()
    alpha, K = random.uniform(1e-4, 4e-4), random.randint(3, 8)
    expected = loop_over_prefixes(xs, ys, slow_newton(K, alpha))
    actual = icl.newton(xs, ys, K, alpha=alpha)
    close(actual[:1], expected[:1], "step 0 must be M_0 = alpha S, w_0 = M_0 b: have you taken a step too many?")
    close(actual, expected, "M <- 2M - M S M with w = M b; does a prefix include the example it predicts?")


def test_ex04_counts_in_a_sequence(icl):
    xs, ys = some_prompts()
    counts = sorted(random.sample(range(0, 12), 3))
    expected = loop_over_prefixes(xs, ys, slow_newton(counts[-1], 3e-4))[counts]
    close(icl.newton(xs, ys, counts, alpha=3e-4), expected, "entry [i] must be the prediction after steps[i] steps")


def test_ex04_digits_double(icl):
    """R_{k+1} = R_k^2: the error of a prompt with S = lambda I is (1 - alpha lambda^2)^(2^k), exactly."""
    d, scale, alpha = random.randint(2, 5), random.uniform(0.8, 1.2), 0.3
    xs = torch.cat([scale * torch.eye(d, dtype=torch.float64), torch.randn(1, d, dtype=torch.float64)])[None]
    w = torch.randn(d, dtype=torch.float64)
    ys = xs @ w
    predictions = icl.newton(xs, ys, 6, alpha=alpha)[:, 0, d]
    expected = (1 - (1 - alpha * scale**4) ** (2.0 ** torch.arange(7, dtype=torch.float64))) * ys[0, d]
    close(predictions, expected, "the residual I - S M must be squared by every step", 1e-10)


def test_ex04_float64_to_the_end(icl):
    """Examples from two orthonormal bases: every S_t has eigenvalues 0, 1 and 2 only, and 0 among them while t < d."""
    d = random.randint(3, 5)
    X = torch.linalg.qr(torch.randn(2, 2, d, d, dtype=torch.float64)).Q.flatten(1, 2)  # (prompts, 2d, d)
    xs = torch.cat([X, torch.randn(2, 1, d, dtype=torch.float64)], dim=1).float()
    ys = (xs @ torch.randn(2, d, 1)).squeeze(-1)
    last = icl.newton(xs, ys, 40, alpha=0.2)[-1]
    expected = loop_over_prefixes(xs, ys, lambda X, y: [np.linalg.lstsq(X, y, rcond=1e-6)[0]])[0]
    assert last.dtype == torch.float64, (
        "solve in float64: in float32 rounding leaks out of the span and doubles each step"
    )
    close(last, expected, "40 steps must reach the minimum-norm least-squares solution", 1e-2)


def test_ex04_default_alpha_and_ridge(icl, monkeypatch):
    def start(S):  # the grader's own, so that exercise 3 does not matter here
        return 1 / (S @ S).square().sum((-2, -1), keepdim=True).sqrt().clamp_min(1e-30)

    monkeypatch.setattr(icl, "newton_start", start)
    xs, ys = some_prompts()
    expected = loop_over_prefixes(xs, ys, slow_newton(5))
    close(icl.newton(xs, ys, 5), expected, "without alpha, each prefix starts from its own newton_start(S)")
    expected = loop_over_prefixes(xs, ys, slow_newton(5, ridge=0.5))
    close(icl.newton(xs, ys, 5, ridge=0.5), expected, "`ridge` adds ridge I to S: hand it on to prefix_moments")


def test_ex05_tokens(icl):
    P, n, d = random.randint(2, 4), random.randint(2, 6), random.randint(2, 5)
    xs, ys = torch.randn(P, n + 1, d), torch.randn(P, n + 1)
    tokens = icl.interleave(xs, ys)
    assert tokens.shape == (P, 2 * n + 1, d), (
        f"tokens are (prompts, 2n+1, d); got {tuple(tokens.shape)}. The last y, the answer, is left out"
    )
    for t in range(n + 1):
        assert torch.equal(tokens[:, 2 * t], xs[:, t]), (
            "x_1, x_2, ... stand at the even positions: interleave in time, not in features"
        )
    for t in range(n):
        assert torch.equal(tokens[:, 2 * t + 1, 0], ys[:, t]), "y_t stands right after x_t, in the first entry"
        assert not tokens[:, 2 * t + 1, 1:].any(), "y is padded with zeros"


def test_ex05_one_dimension(icl):
    xs, ys = torch.randn(2, 3, 1), torch.randn(2, 3)
    assert torch.equal(
        icl.interleave(xs, ys)[0, :, 0], torch.stack([xs[0, 0, 0], ys[0, 0], xs[0, 1, 0], ys[0, 1], xs[0, 2, 0]])
    ), "d = 1 needs no padding"


def test_ex06_against_a_loop(icl):
    shape = (random.randint(1, 3), random.randint(2, 3), random.randint(3, 7), random.randint(2, 5))
    q, k, v = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    close(
        icl.causal_attention(q, k, v),
        slow_attention(q, k, v),
        "token i averages v_0..v_i with softmax weights of q_i.k_j / sqrt(D): check mask, axis and scale",
        1e-6,
    )


def test_ex06_the_future_is_invisible(icl):
    q, k, v = (torch.randn(2, 6, 4) for _ in range(3))
    before = icl.causal_attention(q, k, v)
    k, v = k.clone(), v.clone()
    k[:, 4:], v[:, 4:] = 7.0, -7.0
    after = icl.causal_attention(q, k, v)
    assert after.isfinite().all(), "a row of scores is all -inf: a token must see itself"
    assert torch.allclose(before[:, :4], after[:, :4]), (
        "a later token changed an earlier output: mask the future before the softmax"
    )
    assert not torch.allclose(before[:, 4:], after[:, 4:]), "a token must see itself and what came before"


def test_ex07_readout(icl):
    L, samples, width = random.randint(2, 4), random.randint(40, 80), random.randint(3, 8)
    H, y = torch.randn(L, samples, width, dtype=torch.float64), torch.randn(samples, dtype=torch.float64)
    expected = torch.stack([torch.tensor(np.linalg.lstsq(h, y.numpy(), rcond=None)[0]) for h in H.numpy()])
    close(icl.least_squares_readout(H, y), expected, "r = (H^T H)^+ H^T y for every layer", 1e-8)


def test_ex07_unused_directions(icl):
    H = torch.randn(60, 5, dtype=torch.float64)
    H = torch.cat(
        [H, H[:, :2] @ torch.randn(2, 3, dtype=torch.float64), torch.zeros(60, 1, dtype=torch.float64)], dim=1
    )
    y = torch.randn(60, dtype=torch.float64)
    r = icl.least_squares_readout(H, y)
    assert r.isfinite().all() and r.abs().max() < 1e3, "H^T H can be singular: use a pseudo-inverse, not an inverse"
    expected = torch.tensor(H.numpy() @ np.linalg.lstsq(H.numpy(), y.numpy(), rcond=None)[0])
    close(H @ r, expected, "the readout must predict as well as numpy's least squares", 1e-6)


def test_ex08_cosines(icl):
    A, B, P, n = random.randint(2, 4), random.randint(2, 4), random.randint(2, 5), random.randint(3, 7)
    a, b, ys = (
        torch.randn(A, P, n + 1, dtype=torch.float64),
        torch.randn(B, P, n + 1, dtype=torch.float64),
        torch.randn(P, n + 1, dtype=torch.float64),
    )
    expected = torch.zeros(A, B, P, dtype=torch.float64)
    for i, j, p in np.ndindex(A, B, P):
        u, v = (a[i, p] - ys[p])[1:], (b[j, p] - ys[p])[1:]
        expected[i, j, p] = (u @ v) / (u.norm() * v.norm())
    close(
        icl.error_cosines(a, b, ys),
        expected,
        "the cosine of (prediction - y) over t = 1..n, t = 0 left out, prompt by prompt",
    )
    close(
        icl.similarity_of_errors(a, b, ys),
        expected.mean(-1),
        "SimE is the mean of the prompts' cosines, not the cosine of all prompts together",
    )


def test_ex08_best_match(icl):
    similarity = torch.rand(random.randint(2, 5), random.randint(6, 9))
    expected = torch.tensor([int(np.argmax(row)) for row in similarity.numpy()])
    assert torch.equal(icl.best_match(similarity), expected), (
        "for each step of a (a row), the index of b's most similar step"
    )
    batch = torch.rand(3, 2, 7)
    assert torch.equal(icl.best_match(batch), torch.stack([icl.best_match(s) for s in batch])), (
        "leading axes are batches"
    )


def loop_attention(h, heads, mask):
    """ReLU attention with residual for one sequence h (T, D), token by token."""
    out = h.copy()
    for Q, K, V in heads:
        for t in range(len(h)):
            for j in range(len(h)):
                out[t] += mask[t, j] * max((Q @ h[t]) @ (K @ h[j]), 0.0) * (V @ h[j])
    return out


def loop_newton_layer(icl, h, d, mask):
    """One layer with the weights of newton_layer(d), by loops."""
    heads, (up, down) = icl.newton_layer(d)
    heads = [[np.asarray(matrix) for matrix in head] for head in heads]
    h = loop_attention(h, heads, mask)
    return h + np.stack([np.asarray(down) @ np.maximum(np.asarray(up) @ token, 0.0) for token in h])


def test_ex09_shapes(icl):
    heads, (up, down) = icl.newton_layer(4)
    assert [[tuple(m.shape) for m in head] for head in heads] == [[(4, 9), (4, 9), (9, 9)]] * 2, "two heads (Q, K, V)"
    assert (up.shape, down.shape) == ((8, 9), (9, 8)), "the MLP's matrices are up (2d, 2d+1) and down (2d+1, 2d)"
    assert all(m.dtype == torch.float64 for m in (*heads[0], *heads[1], up, down)), "all weights are float64"


def test_ex09_attention_alone(icl):
    d = random.randint(2, 4)
    X, T = (torch.randn(rows, d, dtype=torch.float64).numpy() for rows in (2 * d + 1, d))
    h = np.concatenate([X @ T.T, X, X[:, :1]], axis=1)
    heads = [[np.asarray(matrix) for matrix in head] for head in icl.newton_layer(d)[0]]
    added, S = loop_attention(h, heads, np.ones((len(h), len(h)))) - h, X.T @ X
    right = -0.5 * X @ (T @ S @ T).T
    assert not added[:, d:].any(), "attention must write into the top block only: see V's rows"
    for wrong, mistake in (
        (-right, "attention adds +1/2 T S T: the sign of V"),
        (2 * right, "attention adds -T S T, and the MLP will double it: V needs -1/2"),
        (-0.5 * X @ (T @ S @ T.T).T, "scores are <x_j, T x_t>, query T x_t and key x_j; <T x_j, x_t> makes T S T^T"),
        (-0.5 * X @ (T @ S).T, "the score is <x_j, x_t>: the query must read T x_t"),
        (-0.5 * X @ (S @ T).T, "the value is x_j: V must read T x_j"),
        (0.0 * right, "the two heads cancel, or V is 0: the second head needs -Q and -V"),
    ):
        assert np.abs(added[:, :d] - wrong).max() > 1e-9, mistake
    assert np.abs(added[:, :d] - right).max() < 1e-9, "it must add -1/2 T S T x_t; two heads, ReLU(s) V - ReLU(-s) V"


def test_ex09_mlp_alone(icl):
    d = random.randint(2, 4)
    up, down = icl.newton_layer(d)[1]
    h = torch.randn(6, 2 * d + 1, dtype=torch.float64)
    added = (h @ up.mT).relu() @ down.mT
    assert not added[:, d:].any(), "the MLP must leave x and y alone"
    message = "the MLP must add the top block to itself, negative entries too: ReLU(a) - ReLU(-a) = a"
    assert (added[:, :d] - h[:, :d]).abs().max() < 1e-9, message


@pytest.mark.parametrize("n, d, symmetric", [(3, 1, True), (6, 3, True), (3, 5, True), (6, 3, False), (3, 5, False)])
def test_ex09_newton_layer(icl, n, d, symmetric):
    rng = np.random.default_rng(SEED)
    X, y, T = rng.normal(size=(n + 1, d)), rng.normal(size=n + 1), rng.normal(size=(d, d))
    T = T + T.T if symmetric else T
    S = X[:n].T @ X[:n]  # the last token is a query
    mask = np.ones((n + 1, n + 1)) * (np.arange(n + 1) < n)
    h = loop_newton_layer(icl, np.concatenate([X @ T.T, X, y[:, None]], axis=1), d, mask)
    assert np.allclose(h[:, d:], np.concatenate([X, y[:, None]], axis=1)), "the layer must leave x and y alone"
    half, double = X @ (T - 0.5 * T @ S @ T).T, X @ (2 * T - T @ S @ T).T
    assert not np.allclose(h[:, :d], half), "T - 1/2 T S T is right, but the MLP must double it"
    assert not np.allclose(h[:, :d], X @ (2 * T - 2 * T @ S @ T).T), "the MLP doubles the attention too: V needs -1/2"
    if not symmetric:
        why = "this is 2T - T S T^T, right only for symmetric T; with scores <x_j, T x_t> rounding dies out"
        assert not np.allclose(h[:, :d], X @ (2 * T - T @ S @ T.T).T), why
    assert np.allclose(h[:, :d], double), "the whole layer does not give (2T - T S T) x"


def some_covariance(d=None):
    """A random symmetric positive matrix (d, d), float64, with eigenvalues between 1/16 and 2."""
    d = d or random.randint(2, 5)
    U = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    return U * torch.empty(d, dtype=torch.float64).uniform_(1 / 16, 2) @ U.mT


def second_moment(Sigma, n):
    """E[H^2] of H = (1/n) sum_i x_i x_i^T, from Isserlis' E[abcd] = E[ab]E[cd] + E[ac]E[bd] + E[ad]E[bc]: (d, d)."""
    S, d, result = Sigma.numpy(), len(Sigma), np.zeros(Sigma.shape)
    for i in range(d):
        for k in range(d):
            for j in range(d):  # (H^2)_ik = sum_j H_ij H_jk; two different examples are independent
                same = S[i, j] * S[j, k] + S[i, j] * S[j, k] + S[i, k] * S[j, j]
                result[i, k] += (n * same + n * (n - 1) * S[i, j] * S[j, k]) / n**2
    return torch.from_numpy(result)


def test_ex10_optimal_preconditioner_is_stationary(icl):
    Sigma, n = some_covariance(), random.randint(2, 30)
    A, trace = icl.optimal_preconditioner(Sigma, n), Sigma.trace()
    assert A.shape == Sigma.shape, "A is a (d, d) matrix: put the eigenvalues back between Sigma's eigenvectors"
    one = torch.eye(len(Sigma), dtype=torch.float64)
    for wrong, mistake in (
        ((n + 1) / n * Sigma + trace / n * one, "this is A's inverse"),
        (torch.linalg.inv(Sigma + trace / n * one), "factor (n+1)/n missing"),
        (torch.linalg.inv((n + 1) / n * Sigma), "the term with the sum of all eigenvalues is missing"),
        (torch.linalg.inv((n + 1) / n * Sigma + trace * one), "the sum of the eigenvalues is to be divided by n"),
        (torch.linalg.inv((n + 1) / n * Sigma + 1 / n * one), "sum of the eigenvalues missing, only its 1/n is there"),
        (
            torch.diag(torch.linalg.eigvalsh(torch.linalg.inv((n + 1) / n * Sigma + trace / n * one)).flip(0)),
            "right eigenvalues, but not between Sigma's eigenvectors: U diag(a) U^T",
        ),
    ):
        assert (A - wrong).abs().max() > 1e-9, mistake
    # d/dA of E |x_q - H A x_q|^2 = tr(Sigma) - 2 tr(Sigma A Sigma) + tr(A^T E[H^2] A Sigma)
    gradient = 2 * (second_moment(Sigma, n) @ A - Sigma) @ Sigma
    close(gradient, torch.zeros_like(Sigma), "the gradient of the expected loss is not 0 at this A")


def test_ex10_loss_of_the_optimum(icl):
    """At theorem 1's A the loss is sum_i lambda_i (1 - lambda_i a_i): against simulated prompts."""
    Sigma, n, prompts = some_covariance(3), 12, 100_000
    A, rng = icl.optimal_preconditioner(Sigma, n).numpy(), np.random.default_rng(SEED)
    X = rng.multivariate_normal(np.zeros(3), Sigma.numpy(), size=(prompts, n + 1))
    w = rng.standard_normal((prompts, 3))
    y = np.einsum("pid,pd->pi", X, w)
    step = np.einsum("pi,pid->pd", y[:, :n], X[:, :n]) @ A / n
    errors = (np.einsum("pd,pd->p", step, X[:, n]) - y[:, n]) ** 2
    lambdas = np.linalg.eigvalsh(Sigma.numpy())
    a = 1 / ((n + 1) / n * lambdas + lambdas.sum() / n)
    off = abs(errors.mean() - (lambdas * (1 - lambdas * a)).sum()) / (errors.std() / math.sqrt(prompts))
    assert off < 5, f"the simulated loss of A is {off:.1f} standard errors from the closed form"


# ---------------------------------------------------------------------------------------------------------------------
# Solvers: what the exercises do not cover


def test_ols_is_the_minimum_norm_solution():
    xs, ys = some_prompts()
    expected = loop_over_prefixes(xs, ys, lambda X, y: [np.linalg.lstsq(X, y, rcond=None)[0]])
    close(icl_newton.ols(xs, ys), expected, "pinv(S) b, of minimum norm while t < d", 1e-6)


def test_ridge_is_added_to_every_solver():
    xs, ys = some_prompts(d=3, n=7)
    ridge = random.uniform(0.05, 0.5)
    solution = loop_over_prefixes(xs, ys, lambda X, y: [np.linalg.solve(X.T @ X + ridge * np.eye(3), X.T @ y)])[0]
    runs = {
        "ols": icl_newton.ols(xs, ys, ridge=ridge),
        "newton": icl_newton.newton(xs, ys, 30, ridge=ridge),
        "gd": icl_newton.gradient_descent(xs, ys, [20_000], ridge=ridge),
        "cg": icl_newton.conjugate_gradient(xs, ys, 4, ridge=ridge),
        "chebyshev": icl_newton.chebyshev(xs, ys, [2000], ridge=ridge),
    }
    for name, trajectory in runs.items():
        close(trajectory[-1], solution, f"{name} must solve (S + ridge I) w = b", 1e-7)


def test_no_learner_sees_its_own_answer_or_what_follows():
    xs, ys = some_prompts(prompts=2, n=6, d=3)
    t = random.randint(1, 5)
    changed = ys.clone()
    changed[:, t:] += 1.0
    model = tiny_model()
    learners = {
        "ols": icl_newton.ols,
        "gd": lambda x, y: icl_newton.gradient_descent(x, y, 5),
        "newton": lambda x, y: icl_newton.newton(x, y, 5),
        "ogd": icl_newton.online_gradient_descent,
        "cg": lambda x, y: icl_newton.conjugate_gradient(x, y, 3),
        "chebyshev": lambda x, y: icl_newton.chebyshev(x, y, 5),
        "transformer": lambda x, y: icl_newton.layer_predictions(model, x.float(), y.float()),
    }
    for name, learner in learners.items():
        before, after = learner(xs, ys), learner(xs, changed)
        assert torch.allclose(before[..., : t + 1], after[..., : t + 1], atol=1e-9), (
            f"{name}: prefix t must not see y_{{t+1}}"
        )
        assert not torch.allclose(before[..., t + 1 :], after[..., t + 1 :]), f"{name}: later prefixes must see it"


def test_newton_residuals_square():
    """I - S M_{k+1} = (I - S M_k)^2, from the predictions alone: query with every unit vector."""
    d, alpha = 4, 1e-3
    X = np.random.default_rng(SEED).normal(size=(9, d))
    S = X.T @ X
    xs = torch.tensor(np.stack([np.vstack([X, e]) for e in np.eye(d)]))
    for w in np.eye(d):  # y = X w: the prediction for query e is e . M_k S w
        M_S = icl_newton.newton(xs, xs @ torch.tensor(w), 6, alpha=alpha)[:, :, -1].numpy()  # column M_k S w
        R = np.eye(d) - alpha * S @ S
        for k in range(7):
            assert np.allclose(w - M_S[k], R @ w, atol=1e-9), (
                f"step {k}: the residual is not the square of the one before"
            )
            R = R @ R


def test_correction_1_the_printed_alpha_stalls():
    """With alpha = 2/||S S^T||_2 the error along the top eigenvector never shrinks."""
    xs, ys = icl_newton.sample_prompts(20, 40, 20, generator=torch.Generator().manual_seed(SEED))
    xs, ys = (
        xs[:, 10:].double(),
        torch.einsum("ptd,pd->pt", xs[:, 10:].double(), torch.randn(20, 20, dtype=torch.float64)),
    )
    S, _ = icl_newton.prefix_moments(xs, ys)
    edge = 2 / torch.linalg.matrix_norm(S[:, -1] @ S[:, -1], 2)[:, None, None, None]
    error = (icl_newton.newton(xs, ys, 40, alpha=edge)[..., -1] - ys[:, -1]).square().mean(1)
    assert error[40] > 1e-4 and error[40] > 0.5 * error[20], "alpha at the edge must stall"
    error = (icl_newton.newton(xs, ys, 40)[..., -1] - ys[:, -1]).square().mean(1)
    assert error[40] < 1e-12, "the default alpha must converge"


def test_correction_4_float32_newton_decays_again():
    """For t < d rounding leaks out of the span of the examples and doubles at every step."""
    X, w = np.random.default_rng(SEED).normal(size=(10, 20)).astype(np.float32), np.ones(20, np.float32)
    errors = {}
    for dtype in (np.float32, np.float64):
        S = (X.T @ X).astype(dtype)
        M = (S / np.linalg.norm(S @ S)).astype(dtype)
        truth = np.linalg.pinv(S.astype(np.float64), rcond=1e-5) @ S.astype(np.float64) @ w
        errors[dtype] = [np.linalg.norm((M := 2 * M - M @ S @ M) @ (S @ w.astype(dtype)) - truth) for _ in range(40)]
    assert errors[np.float32][39] > 100 * min(errors[np.float32]), "float32 must drift away again"
    assert errors[np.float64][32] < 1e-4, "float64 must stay for the 32 steps that the figures use"


def test_correction_5_gd_off_the_span_is_capped():
    """From w_0 off the span GD's similarity to Newton stays below 1; from 0 it reaches 1."""
    xs, ys = icl_newton.sample_prompts(200, 40, 20, generator=torch.Generator().manual_seed(SEED))
    target = icl_newton.ols(xs, ys)
    start = torch.rand(200, 1, 20, generator=torch.Generator().manual_seed(SEED))
    caps = [
        icl_newton.similarity_of_errors(icl_newton.gradient_descent(xs, ys, [10**6], w0=w0), target, ys).item()
        for w0 in (None, start / 20**0.5, start)
    ]
    assert caps[0] > 0.9995 and abs(caps[1] - 0.991) < 0.004 and 0.8 < caps[2] < 0.92, f"caps {caps}"


@pytest.mark.parametrize("steps", [-1, [], [3, 3], [5, 2]])
def test_steps_must_increase(steps):
    with pytest.raises(ValueError, match="increasing"):
        icl_newton.newton(*some_prompts(), steps)


def test_online_gradient_descent_fits_the_newest_example():
    xs, ys = some_prompts()
    t = random.randint(1, xs.shape[1] - 1)
    xs[:, t] = xs[:, t - 1]  # ask again at once
    close(
        icl_newton.online_gradient_descent(xs, ys)[0, :, t],
        ys[:, t - 1],
        "after its update OGD must fit example t exactly",
    )

    def slow(X, y):
        w = np.zeros(X.shape[1])
        for x, target in zip(X, y):
            w = w + x * (target - w @ x) / (x @ x)
        return [w]

    close(icl_newton.online_gradient_descent(xs, ys), loop_over_prefixes(xs, ys, slow), "one pass over the prefix")


def test_conjugate_gradient_is_exact_after_d_steps():
    xs, ys = some_prompts(d=4, n=9)
    runs = icl_newton.conjugate_gradient(xs, ys, 12)
    solution = loop_over_prefixes(xs, ys, lambda X, y: [np.linalg.lstsq(X, y, rcond=None)[0]])[0]
    close(runs[4][:, 6:], solution[:, 6:], "CG solves d equations in d steps", 1e-7)
    close(runs[12], solution, "and stays at the solution", 1e-5)


def test_bfgs_with_exact_line_search_makes_cg_steps():
    rng = np.random.default_rng(SEED)
    X, w_star = rng.normal(size=(8, 4)), rng.normal(size=4)
    S, b = X.T @ X, X.T @ X @ w_star
    w, H, path = np.zeros(4), np.eye(4), [np.zeros(4)]
    for _ in range(4):
        g = S @ w - b
        p = -H @ g
        s = p * -(g @ p) / (p @ S @ p)
        y = S @ s
        V = np.eye(4) - np.outer(s, y) / (s @ y)
        H, w = V @ H @ V.T + np.outer(s, s) / (s @ y), w + s
        path.append(w)
    query = rng.normal(size=4)
    xs, ys = torch.tensor(np.vstack([X, query]))[None], torch.tensor(np.append(X @ w_star, 0.0))[None]
    close(
        icl_newton.conjugate_gradient(xs, ys, 4)[:, 0, -1], torch.tensor([w @ query for w in path]), "BFGS = CG", 1e-7
    )


def test_chebyshev_solves_prefixes_shorter_than_d():
    """While t < d some eigenvalues of S are 0. They take no part: the minimum-norm solution is reached all the same."""
    xs, ys = some_prompts(prompts=3, n=4, d=5)
    expected = slow_solution_weights(xs, ys, lambda X, y: np.linalg.pinv(X) @ y if len(X) else np.zeros(5))
    answers = torch.einsum("ptd,ptd->pt", expected, xs)
    close(icl_newton.chebyshev(xs, ys, [10**6])[0], answers, "the smallest eigenvalue is the smallest above 0", 1e-6)


def test_chebyshev_rate_on_a_planted_spectrum():
    """After k steps the worst error is 1/T_k(z_0), and it is attained at both ends of the spectrum."""
    d, k = 4, random.randint(2, 12)
    X = np.diag(np.sqrt([1.0, 2.0, 5.0, 9.0]))
    w = np.random.default_rng(SEED).normal(size=d)
    bound = 1 / np.cosh(k * np.arccosh((9 + 1) / (9 - 1)))
    for i, z in ((0, 1.0), (1, 1 - 2 * 1 / 8), (2, 0.0), (3, -1.0)):
        xs, ys = torch.tensor(np.vstack([X, np.eye(d)[i]]))[None], torch.tensor(np.append(X @ w, 0.0))[None]
        left = 1 - icl_newton.chebyshev(xs, ys, [k])[0, 0, -1].item() / w[i]
        assert abs(left - np.cos(k * np.arccos(z)) * bound) < 1e-9, f"eigenvalue {i}: wrong Chebyshev residual"


# ---------------------------------------------------------------------------------------------------------------------
# Transformer, training, probes


def tiny_config(**changes):
    return icl_newton.Config(
        **(dict(d=3, n=6, layers=2, width=16, heads=2, steps=12, batch=8, probes=64, prompts=16) | changes)
    )


def tiny_model(**changes):
    torch.manual_seed(SEED)
    model = icl_newton.MODELS[changes.get("model", "transformer")](tiny_config(**changes))
    with torch.no_grad():
        model.read_out.normal_()
    return model


def test_transformer_heads_split_the_width():
    """The block's attention against a head-by-head computation with plain matrices."""
    model, h = tiny_model(), torch.randn(2, 5, 16)
    Q, K, V, O = model.attention[0].detach()
    heads = []
    for i in range(2):
        rows = slice(8 * i, 8 * i + 8)
        q, k, v = ((h @ M.T)[..., rows] for M in (Q, K, V))
        q, k = (
            ((z - z.mean(-1, keepdim=True)) / (z.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()) for z in (q, k)
        )
        heads.append(slow_attention(q, k, v))
    close(model.attend(h, model.attention[0]).detach(), torch.cat(heads, -1) @ O.T, "multi-head attention", 1e-4)


def test_predictions_are_made_at_the_x_tokens():
    model, (xs, ys) = tiny_model(), some_prompts(prompts=3, n=6, d=3)
    xs, ys = xs.float(), ys.float()
    h = model.residual_streams(xs, ys)[-1]
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    expected = torch.stack([h[:, 2 * t] @ model.read_out for t in range(7)], dim=1)
    close(model(xs, ys).detach(), expected.detach(), "entry t is read at token x_{t+1}", 1e-5)
    close(
        model(xs[:, :4], ys[:, :4]).detach(),
        expected[:, :4].detach(),
        "a shorter prompt must give the same answers",
        1e-5,
    )


def test_orthogonalize_keeps_singular_vectors_and_levels_singular_values():
    G = torch.randn(2, 3, 12, random.choice([5, 12, 30]))
    for slow, fast in zip(G.flatten(0, 1), icl_newton.orthogonalize(G).flatten(0, 1)):
        U, s, Vh = torch.linalg.svd(slow, full_matrices=False)
        inner = U.T @ fast @ Vh.T
        assert (inner - torch.diag(inner.diagonal())).abs().max() < 1e-3, "the singular vectors must stay"
        strong = s > 0.05 * s[0]
        assert ((inner.diagonal()[strong] > 0.4) & (inner.diagonal()[strong] < 1.4)).all(), "singular values near 1"


def test_readouts_recover_a_planted_layer_readout():
    """Plant y = a linear function of one layer's state: that layer, and no earlier one, must predict it exactly."""
    model, (xs, ys) = tiny_model(), icl_newton.sample_prompts(200, 6, 3)
    planted = (model.states(xs, ys)[1] @ torch.randn(16)).detach() + 0.7
    H = torch.cat(list(icl_newton.probe_features(model, xs, ys, chunk=64)), dim=1)
    assert H.shape == (3, 200, 7, 17) and (H[..., -1] == 1).all(), "features of all layers with a constant beside them"
    r = icl_newton.least_squares_readout(H.flatten(1, 2), planted.double().flatten())
    errors = [(h.flatten(0, 1) @ w - planted.flatten()).abs().max().item() for h, w in zip(H, r)]
    assert errors[1] < 1e-4 < errors[0], f"errors by layer {errors}"
    fitted = icl_newton.fit_readouts(model, xs, ys)
    predictions = icl_newton.layer_predictions(model, xs, ys, fitted)
    expected = np.stack(
        [
            h.numpy() @ np.linalg.lstsq(h.reshape(-1, 17).numpy(), ys.flatten().double().numpy(), rcond=1e-7)[0]
            for h in H
        ]
    )
    close(predictions, torch.tensor(expected), "each layer predicts with its own least-squares readout", 1e-3)


def test_probes_comparisons_and_training_never_share_prompts():
    config = tiny_config()
    drawn = [icl_newton.fresh_prompts(config, 8, seed=k)[0] for k in (1, 2)]
    drawn += [icl_newton.fresh_prompts(tiny_config(seed=2), 8, seed=1)[0]]
    drawn += [icl_newton.training_prompts(config, 0, torch.Generator().manual_seed(k))[0] for k in (1, 2)]
    assert len({round(xs[0, 0, 0].item(), 9) for xs in drawn}) == 5, "the same prompts were drawn twice"
    assert torch.equal(drawn[0], icl_newton.fresh_prompts(config, 8, seed=1)[0]), "the same seed, the same prompts"


def test_curriculum_grows_to_the_whole_problem():
    config = tiny_config(d=5, n=10, curriculum=3)
    active = []
    for step in (0, 3, 8, 9, 50):
        xs, ys = icl_newton.training_prompts(config, step, torch.Generator().manual_seed(1))
        assert xs.shape[2] == 5 and xs.shape[:2] == ys.shape
        active.append((int(xs.abs().amax((0, 1)).count_nonzero()), xs.shape[1] - 1))
    assert active == [(2, 6), (3, 8), (4, 10), (5, 10), (5, 10)]


def test_training_lowers_the_loss(tmp_path, capsys):
    model = icl_newton.train(tiny_config(d=2, n=4, steps=300, batch=32, width=32, checkpoints=str(tmp_path)))
    assert model.losses.shape == (300, 5), "one error for each step and prefix"
    assert model.losses[-20:].mean() < 0.75 * model.losses[:20].mean(), "300 steps must have learned something"
    assert model.losses[-20:, 4].mean() < 0.5 * model.losses[-20:, 0].mean(), "more examples, smaller error"
    assert "300/300" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["muon", "fu"])
def test_a_training_step_descends_the_recipes_loss(recipe):
    """Fu's recipe makes Adam's first step on the mean squared error; ours descends the mean of its logarithms."""
    config = tiny_config(recipe=recipe, adam_lr=0.01, steps=200)
    model, slow = tiny_model(recipe=recipe), tiny_model(recipe=recipe)
    xs, ys = icl_newton.training_prompts(config, 0, torch.Generator().manual_seed(SEED))
    losses = [(slow(xs, ys)[:, t] - ys[:, t]).pow(2).mean() for t in range(7)]
    (sum(losses) if recipe == "fu" else sum(torch.log(x) for x in losses)).div(7).backward()
    optimizers = icl_newton.make_optimizers(model, config)
    error = icl_newton.training_step(model, optimizers, config, 0, torch.Generator().manual_seed(SEED))
    close(error, torch.stack(losses).detach(), "the squared error of every prefix", 1e-5)
    size = 1e-4  # constant; or the first of 100 steps that warm up to 0.01
    named = dict(slow.named_parameters())
    for name, p in model.named_parameters():
        moved = p.detach() - named[name].detach()
        gradient = named[name].grad
        if recipe == "muon" and p.ndim > 2:
            continue
        clear = gradient.abs() > 1e-5  # Adam's first step has one size, against the gradient's sign
        assert clear.any() and torch.allclose(moved[clear], -size * gradient[clear].sign(), rtol=0.02), name


def test_what_is_remembered_is_forgotten_when_the_file_changes(tmp_path, monkeypatch):
    config, calls = tiny_config(checkpoints=str(tmp_path)), []

    def experiment(steps, seed):
        calls.append(steps)
        return {"path": torch.arange(3) * steps, "seed": seed}

    first, again = (icl_newton.remember(config, experiment, 5, 1) for _ in range(2))
    assert calls == [5] and torch.equal(first["path"], again["path"]) and again["seed"] == 1
    assert icl_newton.remember(config, experiment, 6, 1)["path"][1] == 6, "other arguments, other result"
    monkeypatch.setattr(icl_newton, "CODE", b"the student changed a line")
    icl_newton.remember(config, experiment, 5, 1)
    assert calls == [5, 6, 5], "a result of other code must not be used"
    for path in tmp_path.iterdir():
        path.write_bytes(b"damaged")
    assert icl_newton.remember(config, experiment, 5, 1)["path"][2] == 10


class Killed(BaseException):
    pass


def test_a_killed_run_ends_with_the_same_weights(tmp_path, monkeypatch, capsys):
    whole = icl_newton.train(tiny_config(checkpoints=str(tmp_path / "a"), save_every=5))
    config, real, calls = tiny_config(checkpoints=str(tmp_path / "b"), save_every=5), icl_newton.training_prompts, []

    def prompts_until_killed(config, step, generator):
        calls.append(step)
        if len(calls) == 8:
            raise Killed
        return real(config, step, generator)

    monkeypatch.setattr(icl_newton, "training_prompts", prompts_until_killed)
    with pytest.raises(Killed):
        icl_newton.train(config)
    resumed = icl_newton.train(config)
    assert calls[8] == 5, "the second run must go on from the checkpoint of step 5"
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(a, b), "a resumed run must end with the same weights, bit for bit"
    assert torch.equal(whole.losses, resumed.losses)
    calls.clear()
    icl_newton.train(config)
    assert not calls, "a third run must train nothing"


def test_a_kill_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.pt"
    path.write_text("old")

    def killed_halfway(temporary):
        temporary.write_text("ne")
        raise Killed

    with pytest.raises(Killed):
        icl_newton.save_atomically(killed_halfway, path)
    assert path.read_text() == "old", "write beside the file, then move"


def test_a_damaged_checkpoint_is_kept_and_reported(tmp_path, capsys):
    config = tiny_config(checkpoints=str(tmp_path))
    good = icl_newton.train(config)
    path = icl_newton.checkpoint_path(config)
    other = icl_newton.checkpoint_path(tiny_config(seed=2, checkpoints=str(tmp_path)))
    path.rename(other)
    path.write_bytes(b"not a checkpoint")
    assert (
        icl_newton.load_checkpoint(config) is None
        and icl_newton.load_checkpoint(tiny_config(seed=2, checkpoints=str(tmp_path))) is None
    )
    lines = capsys.readouterr().err.splitlines()
    assert (
        len(lines) == 2 and str(path) in lines[0] and str(other) in lines[1] and "another configuration" in lines[1]
    ), lines
    assert any(p.read_bytes() == b"not a checkpoint" for p in tmp_path.iterdir()), "the damaged file must be kept"
    again = icl_newton.train(config)
    assert all(torch.equal(a, b) for a, b in zip(good.parameters(), again.parameters())), "and training starts anew"


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    real = icl_newton.training_prompts

    def poisoned(config, step, generator):
        xs, ys = real(config, step, generator)
        return xs, ys * (math.nan if step == 6 else 1)

    monkeypatch.setattr(icl_newton, "training_prompts", poisoned)
    with pytest.raises(FloatingPointError, match="at step 7"):
        icl_newton.train(tiny_config(checkpoints=str(tmp_path), save_every=5))


# ---------------------------------------------------------------------------------------------------------------------
# Comparison


def test_line_fit_and_its_r2():
    x, y = torch.arange(6.0, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    slope, intercept, r2 = icl_newton.line_fit(x, y)
    for i in range(3):
        expected = np.polyfit(x.numpy(), y[i].numpy(), 1)
        assert np.allclose([slope[i], intercept[i]], expected)
        assert abs(r2[i] - np.corrcoef(x.numpy(), y[i].numpy())[0, 1] ** 2) < 1e-9, "R^2 is the squared correlation"


def test_bootstrap_intervals_cover_a_planted_mean():
    covered, rounds = 0, 200
    for _ in range(rounds):
        low, high = icl_newton.interval(icl_newton.bootstrap(torch.randn(1, 100, dtype=torch.float64) + 3.0, 400))
        covered += bool(low[0] <= 3.0 <= high[0])
    assert 0.87 <= covered / rounds <= 0.99, f"95% intervals cover the truth in {covered} of {rounds}"


def test_bootstraps_of_two_learners_are_paired():
    """Two learners that differ by a constant on every prompt: the difference of their bootstraps has no spread."""
    values = torch.randn(50, dtype=torch.float64)
    difference = icl_newton.bootstrap(values + 0.01, 100) - icl_newton.bootstrap(values, 100)
    assert (difference - 0.01).abs().max() < 1e-12, "each call must draw the same resamples"


def test_match_layers_finds_planted_steps():
    """A network whose layer l is Newton's step 2l must be matched at 2l, with slope 2, R^2 1 and no spread."""
    xs, ys = icl_newton.sample_prompts(64, 8, 4)
    steps = icl_newton.newton(xs, ys, 14)
    match = icl_newton.match_layers(steps[::2], steps, range(15), ys)
    assert match.best.tolist() == [2, 4, 6, 8, 10, 12, 14] and torch.equal(match.best_interval[0], match.best)
    assert abs(match.slope - 2) < 1e-9 and match.r2 > 1 - 1e-9 and match.is_line
    two = icl_newton.match_layers(steps[:7:2], steps, range(15), ys)
    assert two.best.tolist() == [2, 4, 6] and two.is_line is None, "two points always lie on a line"
    counts = [2**k for k in range(12)]
    descent = icl_newton.gradient_descent(xs, ys, counts)
    match = icl_newton.match_layers(descent[1::2], descent, counts, ys, log2=True)
    assert abs(match.slope - 2) < 1e-9, "doublings per layer: the line is fitted to log2 of the steps"
    match = icl_newton.match_layers(steps[::2], steps, range(15), ys, measure=icl_newton.negative_distance)
    assert match.best.tolist() == [2, 4, 6, 8, 10, 12, 14], "the L2 distance must find itself, too"


@pytest.mark.parametrize("name", ["Newton", "GD"])
def test_the_papers_tables_agree_with_its_best_matches(name):
    """Copied digits: the largest entry of each layer's column must stand at the step that the paper calls best."""
    counts, text = icl_newton.PAPER_SIMILARITY[name]
    table = np.array([[int(row[i : i + 3]) for i in range(0, 36, 3)] for row in text.split()])
    assert table.shape == (len(counts), 12)
    best = [max(c for c, x in zip(counts, column) if x == column.max()) for column in table.T]
    first = [min(c for c, x in zip(counts, column) if x == column.max()) for column in table.T]
    assert all(a <= b <= c for a, b, c in zip(first, icl_newton.PAPER[name], best)), "a digit was copied wrongly"


def test_squared_error_of_predicting_zero_is_one():
    xs, ys = icl_newton.sample_prompts(4000, 6, 3)
    error = icl_newton.squared_error(torch.zeros(1, 4000, 7), ys, 3)
    assert error.shape == (1, 7) and (error - 1).abs().max() < 0.1


def slow_solution_weights(xs, ys, solve):
    return torch.tensor(
        np.array([[solve(x[:t], y[:t]) for t in range(len(x))] for x, y in zip(xs.numpy(), ys.numpy())])
    )


def test_induced_weights_of_a_solver_are_its_weights():
    xs, ys = some_prompts()
    weights, r2 = icl_newton.induced_weights(lambda x, y: icl_newton.newton(x, y, [0, 3], alpha=2e-4), xs, ys)
    expected = slow_solution_weights(xs, ys, lambda X, y: np.array(slow_newton(3, 2e-4)(X, y))[[0, 3]])
    close(weights, expected.permute(2, 0, 1, 3), "fit w to the answers after the same t examples", 1e-8)
    assert (r2[:, 1:] > 1 - 1e-9).all(), "a linear rule has R^2 = 1"


def test_a_learner_that_is_not_linear_in_the_query_is_found_out():
    """answer = |x_q|_1-like part beside a linear part of the same size: R^2 must be what numpy says."""
    xs, ys = some_prompts(prompts=3)
    w, queries = torch.randn(xs.shape[-1], dtype=torch.float64), torch.randn(50, xs.shape[-1])
    answer = lambda x: x @ w + x.abs().sum(-1)
    weights, r2 = icl_newton.induced_weights(lambda x, y: answer(x.double())[None], xs, ys, queries)
    Q, a = queries.double().numpy(), answer(queries.double()).numpy()
    fit = np.linalg.lstsq(Q, a, rcond=None)[0]
    close(weights[0, 0, 0], torch.tensor(fit), "least squares over the queries", 1e-8)
    assert abs(r2[0, 0].item() - (1 - ((a - Q @ fit) ** 2).sum() / (a**2).sum())) < 1e-9 and r2.max() < 0.95


def test_similarity_of_weights_is_a_mean_cosine():
    a, b = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randn(3, 3, 5, 4, dtype=torch.float64)
    expected = [
        [
            np.mean(
                [
                    a[i, p, t] @ b[j, p, t] / (a[i, p, t].norm() * b[j, p, t].norm())
                    for p in range(3)
                    for t in range(1, 5)
                ]
            )
            for j in range(3)
        ]
        for i in range(2)
    ]
    close(icl_newton.similarity_of_weights(a, b), torch.tensor(expected), "mean over prompts and prefixes t = 1..n")


def test_spectral_filter_equals_the_closed_forms():
    d, lr, alpha = 3, 0.02, 1e-3
    spectrum = torch.tensor([1.0, 3.0, 8.0], dtype=torch.float64)  # planted: X^T X = U diag(spectrum) U^T at t = d
    U = torch.linalg.qr(torch.randn(4, d, d, dtype=torch.float64)).Q
    xs = torch.cat([spectrum.sqrt()[:, None] * U.mT, torch.randn(4, 1, d, dtype=torch.float64)], dim=1)
    ys = torch.einsum("ptd,pd->pt", xs, torch.randn(4, d, dtype=torch.float64))
    edges = torch.tensor([0.5, 2.0, 5.0, 10.0], dtype=torch.float64)
    for learner, closed in (
        (
            lambda x, y: icl_newton.gradient_descent(x, y, [0, 5, 40], lr=lr),
            [1 - (1 - lr * spectrum) ** k for k in (0, 5, 40)],
        ),
        (
            lambda x, y: icl_newton.newton(x, y, [0, 2, 6], alpha=alpha),
            [1 - (1 - alpha * spectrum**2) ** (2**k) for k in (0, 2, 6)],
        ),
    ):
        weights, _ = icl_newton.induced_weights(learner, xs, ys)
        last = icl_newton.spectral_filter(weights, xs, ys, edges, prefixes=[d])
        close(last, torch.stack(closed), "the filter must be its closed form", 1e-7)


def test_forgetting_asks_old_examples_again():
    xs, ys = some_prompts(prompts=3, n=6, d=4)
    slow = np.zeros(6)
    for x, y in zip(xs.numpy(), ys.numpy()):
        w = np.zeros(4)
        for xi, yi in zip(x[:6], y[:6]):
            w = w + xi * (yi - w @ xi) / (xi @ xi)
        slow += (x[:6] @ w - y[:6]) ** 2 / 3 / 4
    close(
        icl_newton.forgetting_error(icl_newton.online_gradient_descent, xs, ys),
        torch.tensor(slow),
        "error on x_i after all n examples",
    )
    assert slow[-1] < 1e-9, "the newest example is never forgotten"


# ---------------------------------------------------------------------------------------------------------------------
# The hand-written network (Fu, theorem 5.1)


def prompts(count, n, d, kappa=1.0, noise=0.0, seed=0):
    return icl_newton.sample_prompts(
        count, n, d, kappa=kappa, noise=noise, generator=torch.Generator().manual_seed(seed)
    )


def loop_newton(xs, ys, steps, alpha):
    """Newton for one prompt and one prefix at a time: (steps+1, prompts, n+1)."""
    xs, ys = xs.double().numpy(), ys.double().numpy()
    out = np.zeros((steps + 1, *ys.shape))
    for p in range(len(ys)):
        for t in range(ys.shape[1]):
            X, y = xs[p, :t], ys[p, :t]
            S = X.T @ X
            M = alpha * S
            for k in range(steps + 1):
                out[k, p, t] = xs[p, t] @ M @ X.T @ y
                M = 2 * M - M @ S @ M
    return torch.from_numpy(out)


def safe_alpha(xs):
    """0.9/||S||^2 for the largest S of these prompts, by a route of its own."""
    X = xs.double().numpy()
    return 0.9 / max(np.linalg.norm(x.T @ x, 2) for x in X[:, :-1]) ** 2


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("kappa", [1.0, 100.0])
@pytest.mark.parametrize("n, d", [(1, 2), (4, 1), (6, 3), (10, 5), (7, 8)])
def test_construction_is_newton(n, d, kappa, noise):
    xs, ys = prompts(3, n, d, kappa if d > 1 else 1.0, noise)
    alpha = safe_alpha(xs)
    ours, target = icl_newton.construction(xs, ys, 20, alpha=alpha), loop_newton(xs, ys, 20, alpha)
    scale = ys.square().mean().sqrt()
    assert ours.shape == (21, 3, n + 1) and ours.dtype == torch.float64
    apart = (ours - target).abs().amax((1, 2)) / scale
    assert apart[0] < 1e-12, "step 0 is wrong: check the first layer, the readout, and that the query is no key"
    assert apart[1] < 1e-12, "one Newton layer is wrong: is the -1/2 there, does the MLP double the top block only?"
    assert apart.max() < 1e-11, (
        f"right at first, {apart.max():.0e} off after {apart.argmax()} layers. An error that doubles in every layer "
        "comes from scores <T x_j, x_t>, which make T S T^T; <x_j, T x_t> makes T S T and forgets rounding"
    )


def test_default_alpha_is_one_safe_number_and_steps_can_be_chosen():
    xs, ys = prompts(8, 10, 5)
    xs[0] *= 2  # prompts of unequal size need unequal alphas; the network has only one
    X = xs[:, :-1].double()
    alpha = 1 / torch.stack([torch.linalg.matrix_norm(x.T @ x @ x.T @ x) for x in X]).max()
    chosen = icl_newton.construction(xs, ys, [0, 3, 17])
    assert chosen.shape == (3, 8, 11), "entries are the steps asked for, in order"
    target = loop_newton(xs, ys, 17, alpha.item())[[0, 3, 17]]
    assert (chosen - target).abs().max() < 1e-9, "alpha must be one constant: 1/max ||S S^T||_F over these prompts"
    assert (chosen - icl_newton.newton(xs, ys, [0, 3, 17], alpha=alpha)).abs().max() < 1e-9, "differs from newton()"


def test_relu_attention_matches_loops():
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=generator)
    rows = [(2, 2, 5), (3, 3, 5)]  # of Q, K, V in two heads
    heads = [tuple(torch.randn(r, 5, dtype=torch.float64, generator=generator) for r in head) for head in rows]
    mask = (torch.rand(3, 4, 4, generator=generator) < 0.6).double()
    ours = icl_newton.relu_attention(h, heads, mask)
    arrays = [[m.numpy() for m in head] for head in heads]
    target = np.stack([[loop_attention(h[a, b].numpy(), arrays, mask[b].numpy()) for b in range(3)] for a in range(2)])
    assert np.allclose(ours, target, atol=1e-12), "mask[t, j] is about query t and key j; the residual h is added once"


def test_correction_2_equal_heads_make_the_size_of_the_score():
    one = torch.ones(1, 1, dtype=torch.float64)
    h = torch.tensor([[2.0], [-3.0]], dtype=torch.float64)  # scores <h_t, h_j>: 4, -6; -6, 9
    mask = torch.ones(2, 2, dtype=torch.float64)

    def added(heads):
        return (icl_newton.relu_attention(h, heads, mask) - h).flatten().tolist()

    signed, sizes = [4 * 2 + -6 * -3, -6 * 2 + 9 * -3], [4 * 2 + 6 * -3, 6 * 2 + 9 * -3]
    assert added(icl_newton.linear_heads(one, one, one)) == signed, (
        "ReLU(s) - ReLU(-s) = s: the second head's value is -V"
    )
    assert added([(one, one, one), (-one, one, one)]) == sizes, "ReLU(s) + ReLU(-s) = |s|, as in the printed proof"


def test_nothing_leaks_into_a_prefix():
    xs, ys = prompts(4, 8, 3)
    alpha, t = safe_alpha(xs) / 100, 5
    before = icl_newton.construction(xs, ys, 6, alpha=alpha)
    other_ys, other_xs = ys.clone(), xs.clone()
    other_ys[:, t:] += 7
    after = icl_newton.construction(xs, other_ys, 6, alpha=alpha)
    assert torch.equal(after[..., : t + 1], before[..., : t + 1]), "a prediction saw its answer: the query's y is 0"
    other_xs[:, t + 1 :] += 1
    after = icl_newton.construction(other_xs, other_ys, 6, alpha=alpha)
    assert torch.equal(after[..., : t + 1], before[..., : t + 1]), "a prediction saw a later example"
    other_xs[:, t] *= 3  # Newton's prediction is linear in the query, unless the query is among the keys
    after = icl_newton.construction(other_xs, other_ys, 6, alpha=alpha)
    assert torch.allclose(after[..., t], 3 * before[..., t]), "not linear in x_q: mask the query as a key"
    assert (before[..., 0] == 0).all(), "without examples the prediction is 0"


def test_a_causal_mask_breaks_the_identity():
    xs, ys = prompts(16, 10, 5)
    ours, causal = icl_newton.construction(xs, ys, 12), icl_newton.construction(xs, ys, 12, causal=True)
    gap = (causal - ours).abs().amax(1) / ys.square().mean().sqrt()  # (steps, n+1)
    assert gap[0, 1] == 0 and gap[0, 2:].max() < 1, "a single example is its own whole prefix"
    assert gap[1:, 10].min() > 1e-2, "the causal variant agrees with Newton: is the mask used in every layer?"


def test_correction_3_printed_order_doubles_rounding():
    """Both orders against Newton's own iteration: only the printed one lets its rounding grow."""
    (xs, ys), steps = prompts(16, 10, 5), [0, 30]
    alpha = safe_alpha(xs)
    target = icl_newton.newton(xs, ys, steps, alpha=alpha)
    for printed in (False, True):
        answers = icl_newton.construction(xs, ys, steps, alpha=alpha, printed=printed)
        gap = (answers - target).abs().amax((1, 2)) / ys.square().mean().sqrt()
        assert gap[0] < 1e-14, "before the first Newton layer there is no T x to take in the wrong order"
        if printed:
            assert 1e-9 < gap[1] < 1e-4, "T S T^T is T S T until 2^30 times the rounding error shows"
        else:
            assert gap[1] < 1e-9, "T S T forgets an antisymmetric error"


# ---------------------------------------------------------------------------------------------------------------------
# Linear attention (Ahn)


def gaussian_prompts(prompts, n, d):
    """xs (prompts, n+1, d) ~ N(0, I) and ys = w.x with w ~ N(0, I), float64, without help from the file under test."""
    xs = torch.randn(prompts, n + 1, d, dtype=torch.float64)
    return xs, (xs @ torch.randn(prompts, d, 1, dtype=torch.float64)).squeeze(-1)


def test_linear_attention_is_the_printed_formula(icl):
    d, n = random.randint(2, 4), random.randint(3, 8)
    Z = torch.randn(3, d + 1, n + 1, dtype=torch.float64)
    P, Q = torch.randn(2, d + 1, d + 1, dtype=torch.float64)  # any weights, not only those of gradient descent
    M = np.diag([1.0] * n + [0.0])
    expected = np.stack([z + P.numpy() @ z @ M @ (z.T @ Q.numpy() @ z) / n for z in Z.numpy()])
    unmasked = np.stack([z + P.numpy() @ z @ (z.T @ Q.numpy() @ z) / n for z in Z.numpy()])
    output = icl.linear_attention(Z, P, Q)
    assert (output - torch.from_numpy(unmasked)).abs().max() > 1e-9, "query used as an example: mask missing"
    close(output, torch.from_numpy(expected), "not Z + (1/n) P Z M (Z^T Q Z); is it 1/n, n without the query?")


@pytest.mark.parametrize("symmetric", [True, False])
def test_layers_are_steps_of_preconditioned_gradient_descent(icl, symmetric):
    """Lemma 1. For an A that is not symmetric, the layer's step is preconditioned by A^T."""
    d, n, L = random.randint(2, 5), random.randint(3, 12), random.randint(2, 6)
    xs, ys = gaussian_prompts(1, n, d)
    ys = ys + torch.randn_like(ys)  # no rule fits: the identity does not need one
    A = 0.3 * torch.randn(L, d, d, dtype=torch.float64)
    A = A + A.mT if symmetric else A
    w, expected = np.zeros(d), []
    for layer in A.numpy():
        gradient = np.zeros(d)
        for x, y in zip(xs[0, :n].numpy(), ys[0, :n].numpy()):
            gradient += (w @ x - y) * x / n
        w = w - layer.T @ gradient
        expected.append(w @ xs[0, n].numpy())
    predictions = icl.linear_transformer(A, xs, ys)[:, 0]
    expected = torch.tensor(expected, dtype=torch.float64)
    assert (predictions + expected).abs().max() > 1e-9, "sign: the prediction is minus the last entry of Z"
    close(predictions, expected, "the layers are not w <- w - A grad R(w), R(w) = (1/2n) sum (w.x_i - y_i)^2", 1e-10)


def test_the_right_preconditioner_solves_a_prompt_in_one_layer(icl):
    d = random.randint(2, 4)
    xs, ys = gaussian_prompts(1, 3 * d, d)
    H = xs[0, :-1].mT @ xs[0, :-1] / (3 * d)
    close(icl.linear_transformer(torch.linalg.inv(H)[None], xs, ys)[0], ys[:, -1], "A = H^-1 is one step of Newton")


def test_the_answer_to_the_query_does_not_leak(icl):
    d, n = random.randint(2, 4), random.randint(3, 8)
    (xs, ys), A = gaussian_prompts(4, n, d), torch.randn(3, d, d, dtype=torch.float64)
    other = ys.clone()
    other[:, -1] += 100
    close(icl.linear_transformer(A, xs, other), icl.linear_transformer(A, xs, ys), "the query's own answer is used", 0)
    Z = torch.randn(2, d + 1, n + 1, dtype=torch.float64)
    moved = Z.clone()
    moved[..., -1] += 1
    P, Q = torch.randn(2, d + 1, d + 1, dtype=torch.float64)
    examples, expected = icl.linear_attention(moved, P, Q)[..., :n], icl.linear_attention(Z, P, Q)[..., :n]
    close(examples, expected, "query used as an example: mask missing")


def test_correlated_prompts_have_their_covariances(icl):
    Sigma, W = some_covariance(3).float(), some_covariance(3).float()
    generator = torch.Generator().manual_seed(SEED)
    xs, ys = (z.double() for z in icl.correlated_prompts(50_000, 8, Sigma, W, generator))
    w = torch.linalg.lstsq(xs[:, :8], ys[:, :8, None]).solution.squeeze(-1)  # (prompts, d): eight answers give w away
    close(torch.einsum("pd,pd->p", xs[:, 8], w), ys[:, 8], "y is not w.x with one w per prompt", 1e-4)
    close(xs[:, 0].mT.cov(), Sigma, "covariance of x", 0.05)
    scale = torch.linalg.inv(torch.linalg.cholesky(W.double()))
    close((w @ scale.mT).mT.cov(), torch.eye(3), "covariance of w", 0.05)


def test_distance_to_identity_is_a_minimum(icl):
    M = torch.randn(4, 3, 3)
    grid = torch.linspace(-4, 4, 8001)[:, None, None, None]
    slow = ((M - grid * torch.eye(3)).square().sum((-1, -2)).sqrt() / M.square().sum((-1, -2)).sqrt()).amin(0)
    close(icl.distance_to_identity(M), slow, "not min_a ||M - a I|| / ||M||", 1e-4)
    close(icl.distance_to_identity(-2.5 * torch.eye(4)), 0.0, "a multiple of I is at distance 0", 1e-6)


def test_tuned_descent_has_the_best_step_sizes(icl):
    """The fit over combinations, which could beat real step sizes, against one and two steps of all sizes on a grid."""
    prompts, inverse = gaussian_prompts(500, 8, 3), some_covariance(3)
    losses = icl.tuned_descent(inverse, 2, prompts, prompts)
    xs, ys = prompts
    H, b = xs[:, :-1].mT @ xs[:, :-1] / 8, (xs[:, :-1].mT @ ys[:, :-1, None]) / 8

    def loss(*sizes):
        w = torch.zeros_like(b)
        for size in sizes:
            w = w - size * inverse @ (H @ w - b)
        return ((xs[:, -1] * w.squeeze(-1)).sum(-1) - ys[:, -1]).square().mean().item()

    sizes = np.geomspace(0.1, 20, 60)
    close(losses[0], min(loss(s) for s in sizes), "one step: not the best size", 0.01)
    best = min(loss(s, r) for s in sizes for r in sizes if s >= r)
    assert best >= losses[1] - 1e-9, "some two steps beat the fit"
    close(losses[1], best, "two steps: not the best sizes", 0.01)


def test_training_finds_the_optimum_of_a_small_problem(icl):
    history = icl.train_preconditioners(2, 6, torch.eye(2), torch.eye(2), lr=0.1, batch=64, steps=150, seed=SEED)
    again = icl.train_preconditioners(2, 6, torch.eye(2), torch.eye(2), lr=0.1, batch=64, steps=150, seed=SEED)
    assert history.shape == (151, 2, 2, 2) and torch.equal(history, again)
    xs, ys = (z.float() for z in gaussian_prompts(20_000, 6, 2))
    first, last = ((icl.linear_transformer(A, xs, ys)[-1] - ys[:, -1]).square().mean() for A in history[[0, -1]])
    (_, best) = icl.tuned_descent(torch.eye(2), 2, (xs, ys), (xs, ys))
    assert last < first / 2 and last < 1.3 * best, f"loss {first:.3f} -> {last:.3f}; the best steps reach {best:.3f}"
    assert (history[-1, 0] - history[-1, 1]).abs().max() > 0.05, "two steps of the same size are not the best two"


# ---------------------------------------------------------------------------------------------------------------------
# Softmax attention in stages (Huang)


K, N, PROMPTS = 5, 12, 6


def example(seed=0):
    """A nonzero Q (K, K), tokens (PROMPTS, N), their counts (PROMPTS, K) and unequal p (K,), all float64."""
    g = torch.Generator().manual_seed(seed)
    Q = torch.randn(K, K, generator=g, dtype=torch.float64)
    tokens = torch.randint(K, (PROMPTS, N), generator=g)
    tokens[0][tokens[0] == 2] = 3  # feature 2 is missing from prompt 0
    counts = torch.stack([(tokens == k).sum(1) for k in range(K)], dim=1).double()
    return Q, tokens, counts, torch.tensor([0.4, 0.3, 0.1, 0.15, 0.05], dtype=torch.float64)


def token_attention(Q, tokens, k):
    """Softmax attention of query v_k on single tokens, in a rotated feature basis: weights (N,), inputs xs, x_q."""
    V = torch.linalg.qr(torch.randn(7, K, generator=torch.Generator().manual_seed(9), dtype=torch.float64)).Q
    xs, x_q, Q_in_space = V.T[tokens], V[:, k], V @ Q @ V.T  # features are any orthonormal vectors of R^7
    scores = torch.stack([x @ Q_in_space @ x_q for x in xs])
    return scores.exp() / scores.exp().sum(), xs, x_q


def closed_form(Q, tokens, k):
    """Minus the gradient by Q[:, k] for one prompt with query k, from the formulas of the chapter: (K,)."""
    weights, _, _ = token_attention(Q, tokens, k)
    a = [weights[tokens == n].sum().item() for n in range(K)]
    others = sum(a[m] ** 2 for m in range(K) if m != k)
    return torch.tensor(
        [a[k] * ((1 - a[k]) ** 2 + others) if n == k else a[n] * (others - a[n] - a[k] * (1 - a[k])) for n in range(K)],
        dtype=torch.float64,
    )


def test_loss_on_counts_is_the_loss_on_tokens():
    Q, tokens, counts, _ = example()
    for k in range(K):
        slow = 0
        for prompt in tokens:
            weights, xs, x_q = token_attention(Q, prompt, k)
            slow += 0.5 * (weights @ xs - x_q).square().sum() / PROMPTS  # E (w.z)^2 = |z|^2
        fast = icl_newton.query_losses(Q, counts)[k]
        assert torch.isclose(fast, slow), (
            f"query {k}: {fast:.6f}, but {slow:.6f} on tokens. Softmax over features needs + log counts; the column "
            "of Q, not the row, is the query; prompts are averaged, features are not."
        )


def test_loss_is_the_expectation_over_w():
    Q, tokens, counts, _ = example()
    ws = torch.randn(40_000, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    k, prompt = 1, tokens[1]
    weights, xs, x_q = token_attention(Q, prompt, k)
    samples = 0.5 * ((ws @ xs.T) @ weights - ws @ x_q).square()  # answers y_i = w.x_i, prediction minus w.x_q
    error = samples.std() / math.sqrt(len(ws))
    difference = icl_newton.query_losses(Q, counts[1:2])[k] - samples.mean()
    assert difference.abs() < 4 * error, f"off by {difference / error:.1f} standard errors: is the factor 1/2 there?"


def test_gradient_is_the_closed_form():
    Q, tokens, counts, p = example()
    slow = torch.zeros(K, K, dtype=torch.float64)
    for prompt in tokens:
        for k in range(K):
            slow[:, k] -= p[k] * closed_form(Q, prompt, k) / PROMPTS
    Q.requires_grad_()
    (fast,) = torch.autograd.grad(p @ icl_newton.query_losses(Q, counts), Q)
    assert torch.allclose(fast.diagonal(), slow.diagonal()), "dA_k differs: is each query weighted by its p_k?"
    assert torch.allclose(fast, slow), "dB_{k,n} differs though dA_k agrees: are B's axes swapped?"


def test_only_the_columns_of_queries_move():
    Q, _, counts, p = example()
    p[3] = 0
    Q.requires_grad_()
    (gradient,) = torch.autograd.grad(p @ icl_newton.query_losses(Q, counts), Q)
    moved = gradient.abs().amax(0) > 0
    assert moved.tolist() == [True, True, True, False, True], (
        f"columns that move: {moved.tolist()}; feature 3 is never a query. If all move, softmax ran over queries."
    )
    assert gradient.sum(0).abs().max() < 1e-12, "softmax ignores a shift of a column: gradients sum to 0"


def test_an_absent_feature_gets_no_attention_and_the_floor():
    Q, _, counts, _ = example()
    Q[2, 2] = 50.0  # even an enormous A_2 cannot find what is not there
    Q.requires_grad_()
    loss = icl_newton.query_losses(Q, counts[:1])[2]
    (gradient,) = torch.autograd.grad(loss, Q)
    assert loss >= 0.5, f"loss {loss:.3f} for a feature missing from the prompt: log 0 must hide it"
    assert gradient.isfinite().all() and gradient[2, 2] == 0, "the logarithm of a zero count leaks into the gradient"


def test_first_step_of_training():
    """At Q = 0 attention is counts / N, so that the first step is known up to sampling noise."""
    size, p_1, eta = 4, 0.4, 3.0
    path = icl_newton.train_attention(size, p_1, 2, eta=eta, prompts=20_000)
    assert path[0, 2:].eq(0).all(), "Q starts at 0, and the path records it before the step"
    p = torch.tensor([p_1] + [0.2] * 3)
    torch.manual_seed(0)
    a = torch.distributions.Multinomial(10 * size, p).sample((100_000,)) / (10 * size)

    def expected(n, k):
        others = a.square().sum(1) - a[:, k] ** 2
        move = (1 - a[:, k]) ** 2 + others if n == k else others - a[:, n] - a[:, k] * (1 - a[:, k])
        return (eta * p[k] * a[:, n] * move).mean()

    for column, name, slow in ((2, "A_1", expected(0, 0)), (3, "A_k", expected(1, 1)), (4, "B_{k,1}", expected(0, 1))):
        assert torch.isclose(path[1, column], slow, rtol=0.01), (
            f"{name} moves by {path[1, column]:.4f}, not {slow:.4f}: check eta, p_k = (1 - p_1) / (K - 1) and the sign"
        )


def test_until_switch_only_stops_early():
    short = icl_newton.train_attention(8, 0.5, 200, until_switch=True)
    long = icl_newton.train_attention(8, 0.5, 200)
    assert len(short) < 100 and torch.equal(short, long[: len(short)]), "stopping changed the path, or never happened"
    assert 0 < icl_newton.lead_steps(short)[1] < len(short) - 1, (
        "it must stop after the switch, where A + B is lowest, not at it"
    )
    assert icl_newton.lead_steps(short)[1] == icl_newton.lead_steps(long)[1], (
        "the switch is found at another step in the longer run"
    )


def test_balanced_features_are_alike():
    path = icl_newton.train_attention(8, 1 / 8, 300)
    assert icl_newton.lead_steps(path)[1] == 0, "balanced, A_k leads from the first step"
    assert (path[-1, 2] - path[-1, 3]).abs() < 0.1, "balanced, feature 1 must not differ from the others"


def test_steps_above_takes_the_floor_away():
    floor = 0.5 * 0.9**20
    loss = floor + 0.5 ** torch.arange(10.0)  # an excess of 1, 1/2, 1/4, ...
    assert icl_newton.steps_above(0.1, loss, 0.1, 20) == 4, (
        "1, 1/2, 1/4 and 1/8 are above a tenth: the floor was not subtracted"
    )
    assert icl_newton.steps_above(0.001, loss, 0.1, 20) == 10, "never below the share: all steps"


def test_lead_steps_compare_speeds():
    t = torch.arange(100.0)
    path = torch.stack([0 * t, 0 * t, 0 * t, 0.1 * t, -torch.log(t + 10)], dim=1)  # dA = 0.1, -dB = 1 / (t + 10)
    assert icl_newton.lead_steps(path)[:2] == [0, 0], "B never leads here"
    path[:, 4] = -torch.log(t + 1)  # -dB = 1 / (t + 1) is 0.2, 0.1 and 0.05 at t = 4, 9 and 19
    assert icl_newton.lead_steps(path) == [4, 9, 19], (
        f"{icl_newton.lead_steps(path)}: not B 2:1 until 4, even at 9, A 2:1 from 19"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The program


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--figures", "nonsense"], "nonsense"),
        (["--no_such_flag", "1"], "no_such_flag"),
        (["--d", "0"], "--d"),
        (["--n", "-3"], "--n"),
        (["--steps", "many"], "--steps"),
        (["--noise", "-1"], "--noise"),
        (["--kappa", "0.5"], "--kappa"),
        (["--muon_lr", "nan"], "--muon_lr"),
        (["--width", "30", "--heads", "4"], "--heads"),
        (["--preset", "huge"], "huge"),
        (["--device", "tpu"], "tpu"),
        (["--model", "mamba"], "mamba"),
        pytest.param(
            ["--device", "cuda"], "CUDA", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
        ),
        (["--out", "{tmp}/a_file/x"], "cannot write"),
    ],
)
def test_bad_input_gets_one_line_and_status_2(arguments, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").write_text("mine")
    monkeypatch.setattr(icl_newton, "run", lambda config: pytest.fail("bad input was taken for good"))
    status = icl_newton.main([a.format(tmp=tmp_path) for a in arguments])
    out, err = capsys.readouterr()
    assert status == 2 and err.count("\n") == 1 and word in err, f"status {status}, stderr {err!r}"
    assert not out and [p.name for p in tmp_path.iterdir()] == ["a_file"], "nothing may be done or written"


@pytest.mark.parametrize("preset", icl_newton.PRESETS)
def test_presets_are_valid_and_have_an_ill_conditioned_variant(preset, monkeypatch):
    config = icl_newton.parse_config(["--preset", preset, "--device", "cpu", "--seed", "7"])
    assert config.seed == 7 and all(getattr(config, k) == v for k, v in icl_newton.PRESETS[preset].items())
    study = icl_newton.Study(config)
    assert study.variant(kappa=100.0).config.kappa == 100 and study.variant(kappa=1.0) is study
    monkeypatch.setattr(icl_newton, "fresh_prompts", lambda c, count, seed: icl_newton.sample_prompts(8, c.n, c.d))
    _, numbers, _ = icl_newton.FIGURES["solvers"](study)
    assert numbers["Newton_error_kappa_100"][-1] < 1e-6, "the first figure, at the preset's size"


def test_every_setting_has_a_flag_and_help(capsys):
    with pytest.raises(SystemExit) as stop:
        icl_newton.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for field in icl_newton.dataclasses.fields(icl_newton.Config):
        assert f"--{field.name} " in text, field.name


def test_a_quick_run_as_a_user_starts_it(tmp_path):
    """The whole program in a fresh process and folder; a second run trains nothing and ends with the same numbers."""
    command = [sys.executable, str(HERE / "icl_newton.py"), "--preset", "quick"]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    out = tmp_path / "figures" / "quick"
    results = json.loads((out / "results.json").read_text())
    assert set(results["figures"]) == set(icl_newton.FIGURES) - icl_newton.ON_DEMAND
    for name in results["figures"]:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
    for key in (
        "seconds",
        "claims",
        "config",
        "training_flops_per_second",
        "cpu_matrix_product_flops_per_second",
        "peak_memory_bytes",
    ):
        assert results[key], key
    assert "500/500" in first.stdout and len(results["claims"]) == first.stdout.count("\n          paper ")
    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    again = json.loads((out / "results.json").read_text())
    assert second.returncode == 0 and "steps/s" not in second.stdout, "the second run must find its checkpoints"
    assert again["figures"]["rates"] == results["figures"]["rates"]
    outcomes = [[(c["claim"], c["here"], c["holds"]) for c in r["claims"]] for r in (results, again)]
    assert outcomes[0] == outcomes[1], "the same seed must give the same table"


# ---------------------------------------------------------------------------------------------------------------------
# For lecturers: the homework, and the grader's own examination. The student's copy of this file ends above.


@pytest.fixture(scope="module")
def assignment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("homework") / "week1"
    assert icl_newton.main(["--homework", str(folder)]) == 0
    return folder


def test_the_assignment_has_no_answers_but_all_else(assignment):
    stub, sheet = (assignment / "icl_newton.py").read_text(), (assignment / "ASSIGNMENT.md").read_text()
    names = [name for _, name, *_ in icl_newton.EXERCISES]
    assert not re.search(r"^ *# (BEGIN|END) SOLUTION$", stub, re.MULTILINE), "no solution may be left"
    assert all(stub.count(f': {name}")') == 1 for name in names), "one stub for each exercise"
    assert all(f"| {name} |" in sheet for name in names) and all(question in sheet for question in icl_newton.QUESTIONS)
    for text in (stub, sheet, (assignment / "test_icl_newton.py").read_text()):
        assert not any(answer[:40] in text for answer in icl_newton.ANSWERS) and "WRONG" not in text
    lecturers = assignment.with_name("week1-LECTURERS.md").read_text()
    assert all(answer in lecturers for answer in icl_newton.ANSWERS)
    marks = re.findall(r"^ *# (BEGIN|END) SOLUTION$", (HERE / "icl_newton.py").read_text(), re.MULTILINE)
    assert marks == ["BEGIN", "END"] * (len(marks) // 2), "markers must alternate"


def test_the_assignment_runs_and_says_what_is_missing(assignment):
    run = subprocess.run([sys.executable, "icl_newton.py"], cwd=assignment, capture_output=True, text=True)
    first = "icl_newton: still to be written: exercise 1: sample_prompts"
    assert run.returncode == 1 and run.stderr.startswith(first + ", exercise 2: ") and run.stderr.count("\n") == 1
    some = [sys.executable, "icl_newton.py", "--figures", "solvers"]
    run = subprocess.run(some, cwd=assignment, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr == first + "\n", run.stderr
    grade = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "test_ex"]
    run = subprocess.run(grade, cwd=assignment, capture_output=True, text=True)
    assert "0 of 10 exercises passed: 0 of 100 points" in run.stdout, run.stdout[-2000:]
    (assignment / "icl_newton.py").write_text((HERE / "icl_newton.py").read_text())
    run = subprocess.run(grade, cwd=assignment, capture_output=True, text=True)
    assert "10 of 10 exercises passed: 100 of 100 points" in run.stdout, run.stdout[-2000:]


def test_the_assignment_does_not_overwrite_work(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("work")
    assert icl_newton.main(["--homework", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


# Typical wrong answers, as replacements in the solution: (exercise, function, what is wrong, right, wrong).
WRONG = [
    (1, "sample_prompts", "scaled by eigenvalues, not their roots", "eigenvalues.sqrt()", "eigenvalues"),
    (1, "sample_prompts", "trace is not d", "        eigenvalues *= d / eigenvalues.sum()\n", ""),
    (1, "sample_prompts", "one basis for the batch", "draw(prompts, d, d)", "draw(1, d, d)"),
    (1, "sample_prompts", "no rotation", " @ basis.mT", ""),
    (1, "sample_prompts", "one w for all prompts", "draw(prompts, d, 1)", "draw(1, d, 1)"),
    (1, "sample_prompts", "noise is a variance", "noise * draw", "noise**2 * draw"),
    (1, "sample_prompts", "one large eigenvalue instead of d//2", "[: d // 2]", "[:1]"),
    (1, "sample_prompts", "generator ignored", "generator=generator, device", "generator=None, device"),
    (1, "sample_prompts", "half rounded up", "d // 2", "(d + 1) // 2"),
    (1, "sample_prompts", "uniform in place of normal", "torch.randn", "torch.rand"),
    (2, "gradient_descent", "wrong sign", "1 - step_size", "1 + step_size"),
    (2, "gradient_descent", "a step too many", "** k", "** (k + 1)"),
    (2, "gradient_descent", "factor 2 in the gradient", "step_size * eigenvalues", "step_size * 2 * eigenvalues"),
    (2, "gradient_descent", "smallest eigenvalue", "[..., -1:]", "[..., :1]"),
    (2, "gradient_descent", "given step size ignored", " if lr is None else lr", ""),
    (2, "gradient_descent", "start ignored", "steps, w0, ridge", "steps, None, ridge"),
    (2, "gradient_descent", "mean in place of sum", "step_size * eigenvalues", "step_size / len(ys[0]) * eigenvalues"),
    (
        2,
        "gradient_descent",
        "prefix includes its own example",
        "(xs, ys, residual",
        "(xs.roll(-1, 1), ys.roll(-1, 1), residual",
    ),
    (2, "gradient_descent", "ridge ignored", "w0, ridge)", "w0)"),
    (
        2,
        "gradient_descent",
        "input changed",
        "    return spectral",
        "    w0 is None or w0.mul_(2)\n    return spectral",
    ),
    (
        3,
        "newton_start",
        "the printed alpha",
        "return 1 / torch.linalg.matrix_norm(S @ S.mT,",
        "return 2 / torch.linalg.matrix_norm(S @ S.mT, 2,",
    ),
    (3, "newton_start", "norm of S, not of S S^T", "S @ S.mT", "S"),
    (3, "newton_start", "no axes kept", ", keepdim=True", ""),
    (3, "newton_start", "empty prefix divides by zero", ".clamp_min(TINY)", ""),
    (
        3,
        "newton_start",
        "one number for all matrices",
        "torch.linalg.matrix_norm(S @ S.mT, keepdim=True)",
        "(S @ S.mT).norm().expand(*S.shape[:-2], 1, 1)",
    ),
    (4, "newton", "factor 2 missing", "2 * M - M @ S @ M", "M - M @ S @ M"),
    (4, "newton", "wrong sign", "2 * M - M @ S @ M", "2 * M + M @ S @ M"),
    (4, "newton", "S and M exchanged", "2 * M - M @ S @ M", "2 * M - S @ M @ S"),
    (4, "newton", "a step too many", "if k > 0", "if k >= 0"),
    (4, "newton", "starts from alpha I", " * S, []", " * torch.eye(S.shape[-1]).double().expand_as(S), []"),
    (4, "newton", "given alpha ignored", "(newton_start(S) if alpha is None else alpha)", "newton_start(S)"),
    (4, "newton", "default alpha ignored", "(newton_start(S) if alpha is None else alpha)", "(alpha or 1e-3)"),
    (4, "newton", "ridge ignored", "(xs, ys, ridge)", "(xs, ys)"),
    (4, "newton", "counts ignored", "if k in counts", "if k < len(counts)"),
    (
        4,
        "newton",
        "float32",
        "S, b = prefix_moments(xs, ys, ridge)",
        "S, b = (z.float() for z in prefix_moments(xs, ys, ridge))",
    ),
    (
        4,
        "newton",
        "prefix includes its own example",
        "prefix_moments(xs, ys,",
        "prefix_moments(xs.roll(-1, 1), ys.roll(-1, 1),",
    ),
    (5, "interleave", "the answer is shown", "[:, :-1]", ""),
    (5, "interleave", "y before x", "[xs, y_tokens]", "[y_tokens, xs]"),
    (
        5,
        "interleave",
        "first all x, then all y",
        "torch.stack([xs, y_tokens], dim=2).flatten(1, 2)",
        "torch.cat([xs, y_tokens], dim=1)",
    ),
    (5, "interleave", "y in the last entry", "(0, xs.shape[-1] - 1)", "(xs.shape[-1] - 1, 0)"),
    (5, "interleave", "y in every entry", "F.pad(ys[..., None], (0, xs.shape[-1] - 1))", "ys[..., None].expand_as(xs)"),
    (6, "causal_attention", "not causal", ".masked_fill(future, -math.inf)", ""),
    (6, "causal_attention", "blind to itself", ".triu(1)", ".triu(0)"),
    (6, "causal_attention", "looks at the future only", ".triu(1)", ".tril(-1)"),
    (6, "causal_attention", "softmax over queries", ".softmax(-1)", ".softmax(-2)"),
    (6, "causal_attention", "no scale", " / math.sqrt(D)", ""),
    (6, "causal_attention", "scale D", "math.sqrt(D)", "D"),
    (
        6,
        "causal_attention",
        "masked after the softmax",
        ".masked_fill(future, -math.inf).softmax(-1)",
        ".softmax(-1).masked_fill(future, 0)",
    ),
    (6, "causal_attention", "zero in place of -inf", "-math.inf", "0.0"),
    (
        7,
        "least_squares_readout",
        "inverse of a singular matrix",
        "torch.linalg.pinv(H.mT @ H, hermitian=True, rtol=1e-12)",
        "torch.linalg.inv_ex(H.mT @ H).inverse",
    ),
    (7, "least_squares_readout", "no inverse", "torch.linalg.pinv(H.mT @ H, hermitian=True, rtol=1e-12) @ ", ""),
    (
        7,
        "least_squares_readout",
        "float32",
        "torch.linalg.pinv(H.mT @ H, hermitian=True, rtol=1e-12)",
        "torch.linalg.pinv((H.mT @ H).float()).double()",
    ),
    (7, "least_squares_readout", "a large ridge", "pinv(H.mT @ H,", "pinv(H.mT @ H + torch.eye(H.shape[-1]),"),
    (
        7,
        "least_squares_readout",
        "mean in one place, sum in the other",
        "(H.mT @ y[..., None])",
        "(H.mT @ y[..., None]) / len(y)",
    ),
    (
        8,
        "error_cosines",
        "not normalised",
        "F.normalize((trajectory.double() - ys.double())[..., 1:], dim=-1)",
        "(trajectory.double() - ys.double())[..., 1:]",
    ),
    (8, "error_cosines", "t = 0 included", "[..., 1:]", ""),
    (8, "error_cosines", "predictions in place of errors", " - ys.double()", ""),
    (8, "error_cosines", "normalised over prompts", "dim=-1)", "dim=-2)"),
    (8, "similarity_of_errors", "sum in place of mean", ".mean(-1)", ".sum(-1)"),
    (8, "best_match", "least similar", "argmax", "argmin"),
    (8, "best_match", "wrong axis", "argmax(-1)", "argmax(0)"),
    (9, "newton_layer", "wrong sign", "-0.5 * Tx.mT", "0.5 * Tx.mT"),
    (9, "newton_layer", "1/2 missing", "-0.5 * Tx.mT", "-Tx.mT"),
    (
        9,
        "newton_layer",
        "equal heads: |s|",
        "linear_heads(Q=Tx, K=x, V=-0.5 * Tx.mT @ Tx)",
        "[(Tx, x, -0.5 * Tx.mT @ Tx), (-Tx, x, -0.5 * Tx.mT @ Tx)]",
    ),
    (9, "newton_layer", "query and key exchanged: T S T^T", "Q=Tx, K=x", "Q=x, K=Tx"),
    (9, "newton_layer", "the MLP loses the negative half", "[Tx, -Tx]", "[Tx, Tx * 0]"),
    (
        9,
        "newton_layer",
        "float32",
        "return heads,",
        "heads = [tuple(m.float() for m in head) for head in heads]\n    return heads,",
    ),
    (9, "newton_layer", "the MLP doubles x", "torch.cat([Tx, -Tx])", "torch.cat([x, -x])"),
    (9, "newton_layer", "values are x", "Tx.mT @ Tx)", "Tx.mT @ x)"),
    (10, "optimal_preconditioner", "n in place of n+1", "(n + 1) / n", "n / n"),
    (10, "optimal_preconditioner", "trace not over n", "eigenvalues.sum() / n", "eigenvalues.sum()"),
    (10, "optimal_preconditioner", "trace missing", " + eigenvalues.sum() / n", ""),
    (10, "optimal_preconditioner", "not inverted", "U / (", "U * ("),
    (10, "optimal_preconditioner", "transposes exchanged", "@ U.mT", "@ U"),
    (10, "optimal_preconditioner", "eigenvalues, but no matrix", "return U / (", "return torch.eye(len(U)) / ("),
]

# Right answers, written as a student might.
RIGHT = [
    (
        2,
        "gradient_descent",
        """
        S, b = prefix_moments(xs, ys, ridge)
        if lr is None:
            lr = 1 / torch.linalg.eigvalsh(S)[..., -1:].clamp_min(1e-30)
        w = torch.zeros_like(b) if w0 is None else w0.double().expand_as(b)
        path = []
        for k in range(step_counts(steps)[-1] + 1):
            if k:
                w = w - lr * (torch.einsum("ptij,ptj->pti", S, w) - b)
            if k in step_counts(steps):
                path.append(w)
        return predict(torch.stack(path), xs)""",
    ),
    (
        3,
        "newton_start",
        """
        return 1 / ((S @ S) ** 2).sum((-2, -1), keepdim=True).sqrt().clamp_min(1e-20)""",
    ),
    (
        4,
        "newton",
        """
        S, b = prefix_moments(xs, ys, ridge)
        M = (newton_start(S) if alpha is None else alpha) * S
        I = torch.eye(S.shape[-1]).double()
        everything = [torch.einsum("ptij,ptj->pti", M, b)]
        for _ in range(step_counts(steps)[-1]):
            M = M @ (2 * I - S @ M)
            everything.append(torch.einsum("ptij,ptj->pti", M, b))
        return predict(torch.stack([everything[k] for k in step_counts(steps)]), xs)""",
    ),
    (
        5,
        "interleave",
        """
        P, N, d = xs.shape
        tokens = torch.zeros(P, 2 * N, d)
        tokens[:, 0::2] = xs
        tokens[:, 1::2, 0] = ys
        return tokens[:, : 2 * N - 1]""",
    ),
    (
        6,
        "causal_attention",
        """
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)""",
    ),
    (
        7,
        "least_squares_readout",
        """
        return torch.linalg.lstsq(H, y.expand(H.shape[:-1])[..., None], driver="gelsd").solution.squeeze(-1)""",
    ),
    (
        8,
        "error_cosines",
        """
        a, b = (traj_a - ys)[..., 1:].double(), (traj_b - ys)[..., 1:].double()
        return F.cosine_similarity(a[:, None], b[None], dim=-1)""",
    ),
    (
        9,
        "newton_layer",
        """
        Q, K, V = torch.zeros(d, 2 * d + 1), torch.zeros(d, 2 * d + 1), torch.zeros(2 * d + 1, 2 * d + 1)
        Q[:, :d], K[:, d : 2 * d], V[:d, :d] = torch.eye(d), torch.eye(d), torch.eye(d)
        up = torch.cat([Q, -Q]).double()
        return [(Q.double(), K.double(), -V.double() / 2), (Q.double(), -K.double(), V.double() / 2)], (up, up.T)""",
    ),
    (
        10,
        "optimal_preconditioner",
        """
        return torch.linalg.inv((n + 1) / n * Sigma + torch.trace(Sigma) / n * torch.eye(len(Sigma)).to(Sigma))""",
    ),
]


def variant(name, change):
    """The module with the solution of `name` changed by a function of its text."""
    source = (HERE / "icl_newton.py").read_text()
    start = source.index("# BEGIN SOLUTION", source.index(f"def {name}("))
    end = source.index("# END SOLUTION", start)
    module = types.ModuleType("icl_variant")
    sys.modules["icl_variant"] = module  # dataclasses look themselves up there
    exec(compile(source[:start] + change(source[start:end]) + source[end:], f"wrong_{name}", "exec"), module.__dict__)
    return module


def failing_exercises(module):
    """Numbers of the exercises whose tests, run on the module, do not all pass."""
    failing = set()
    for name, test in list(globals().items()):
        if found := re.match(r"test_ex(\d\d)", name):
            cases = [{}]
            for mark in getattr(test, "pytestmark", []):
                names = mark.args[0].split(", ")
                cases = [dict(zip(names, values)) for values in mark.args[1]]
            for case in cases:
                with pytest.MonkeyPatch.context() as monkeypatch:
                    if "monkeypatch" in inspect.signature(test).parameters:
                        case = case | {"monkeypatch": monkeypatch}
                    try:
                        test(module, **case)
                    except Exception:
                        failing.add(int(found[1]))
    return failing


@pytest.mark.parametrize("number, name, what, right, wrong", WRONG, ids=[f"{w[1]}: {w[2]}" for w in WRONG])
def test_wrong_answers_fail_their_exercise_and_no_other(number, name, what, right, wrong):
    def spoil(solution):
        assert right in solution, "this wrong answer no longer changes anything"
        return solution.replace(right, wrong)

    assert failing_exercises(variant(name, spoil)) == {number}


@pytest.mark.parametrize("number, name, answer", RIGHT, ids=[r[1] for r in RIGHT])
def test_right_answers_written_differently_pass(number, name, answer):
    replacement = "\n" + textwrap.indent(textwrap.dedent(answer).strip(), "    ") + "\n    "
    assert failing_exercises(variant(name, lambda solution: replacement)) == set()
