"""
Tests of icl_newton.py, and the grader of its ten exercises.

    python -m pytest                      everything
    python -m pytest -k test_ex           the exercises, with points at the end
    python -m pytest -k ex04              one exercise

Data are drawn anew in every run; a failing test prints ICL_SEED, and setting it repeats the run.
"""

import functools
import os
import re
from unittest import mock

import numpy as np
import pytest
import torch

import icl_newton

SEED = int(os.environ.get("ICL_SEED", torch.seed() % 10**6))

EXERCISES = [  # number, function, idea, equation, minutes, difficulty, points
    (1, "sample_prompts", "data with a condition number", "x ~ N(0, Sigma)", 30, "easy", 5),
    (2, "gradient_descent", "a method is a trajectory", "w <- w - eta (S w - b)", 30, "easy", 10),
    (3, "newton_start", "why alpha matters", "alpha < 2 / lambda_max(S)^2", 15, "easy", 5),
    (4, "newton", "doubling the digits", "M <- 2M - M S M", 30, "medium", 15),
    (5, "interleave", "a prompt as tokens", "x_1, y_1, ..., x_{n+1}", 15, "easy", 5),
    (6, "causal_attention", "no future", "softmax(q k^T / sqrt(D) + mask) v", 25, "medium", 10),
    (7, "least_squares_readout", "what a layer knows", "least (H r - y)^2", 20, "medium", 10),
    (8, "similarity_of_errors", "like errors? (and error_cosines, best_match)",
     "mean of cos(e_a, e_b)", 30, "medium", 10),
    (9, "newton_layer", "Newton's weights, by hand", "T <- 2T - T S T", 60, "hard", 20),
    (10, "optimal_preconditioner", "linear attention learns it", "Ahn, theorem 1", 15, "easy", 10),
]  # fmt: skip


pytest_plugins = __name__  # makes pytest call this file's hook, the function below


def pytest_terminal_summary(terminalreporter):
    """Points for every exercise that was run, if all of its tests passed."""
    passed = {}
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            for number in re.findall(r"test_ex(\d\d)", report.nodeid):
                passed[int(number)] = outcome == "passed"
    rows = [(*row, row[-1] * passed[row[0]]) for row in EXERCISES if row[0] in passed]
    for number, name, *_, points, got in rows:
        terminalreporter.write_line(f"  ex{number:02} {name:<24}{got:>3} of {points}")
    if rows:
        got, points = (sum(row[i] for row in rows) for i in (-1, -2))
        terminalreporter.write_line(f"  {got} of {points} points")


@pytest.fixture(autouse=True)
def icl():
    """The program. Every test starts from the run's seed, so that ICL_SEED repeats it alone."""
    print(f"ICL_SEED={SEED}")
    torch.manual_seed(SEED)
    return icl_newton


# ------------------------------------------------------------------------------------------------
# What the tests share, and then the tests


def draws(*shape):
    """Standard normal numbers, float64."""
    return torch.randn(*shape, dtype=torch.float64)


def orthonormal(*shape):
    return torch.linalg.qr(draws(*shape)).Q


def call(function, *tensors, **options):
    """function(*tensors, **options), which must leave the tensors as they were."""
    before = [z.clone() for z in tensors]
    result = function(*tensors, **options)
    assert all(map(torch.equal, before, tensors)), "an input was changed in place: work on a copy"
    return result


def check_form(z, shape, message, dtype=torch.float64):
    """First the dtype (None: any), then the shape, then that all entries are finite."""
    assert z.dtype == (dtype or z.dtype), f"dtype {z.dtype}, not {dtype}: {message}"
    assert z.shape == shape, f"shape {tuple(z.shape)}, expected {tuple(shape)}: {message}"
    assert z.isfinite().all(), f"some entries are nan or infinite: {message}"


def close(actual, expected, message, tolerance=1e-9, dtype=torch.float64):
    """The form of `expected`, then its entries, relative to the largest."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    check_form(actual, expected.shape, message, dtype)
    error = (actual.double() - expected.double()).abs().max() / max(expected.abs().max(), 1e-9)
    assert error <= tolerance, f"{message} (largest relative error {error:.1e})"


def check_standard(z, message, tolerance):
    """z (samples, d), float64, must have mean 0 and covariance I."""
    close(z.mT @ z / len(z), torch.eye(z.shape[1]), f"{message}: covariance", tolerance)
    close(z.mean(0) + 1, torch.ones(z.shape[1]), f"{message}: the mean is not 0", tolerance)


def slow_answers(xs, ys, counts, left, ridge=0.0):
    """[k, p, t] = w_k.x_{t+1}; left(eigenvalue, all, k): share of the way to least squares left."""
    answers = np.zeros((len(counts), *ys.shape))
    for p, t in np.ndindex(*ys.shape):
        X, y, query = (z.double().numpy() for z in (xs[p, :t], ys[p, :t], xs[p, t]))
        values, U = np.linalg.eigh(X.T @ X + ridge * np.eye(len(query)))
        for value, u in zip(values, U.T):
            if value > 1e-9 * values[-1]:
                goal = (u @ X.T @ y) / value * (u @ query)
                answers[:, p, t] += [(1 - left(value, values, k)) * goal for k in counts]
    return answers


SOLVER_CASES = [  # steps; size of a step (None: the default); ridge; prompts, n, d
    (5, 10.0, 0, (3, 9, 4), "sign, factor, float32, or a prefix that holds what it predicts?"),
    (range(2, 7, 2), 10.0, 0, (3, 9, 4), "entry [i] is predicted after steps[i] steps"),
    (4, 40.0, 0, (3, 9, 4), "a large step, which overshoots: 1 - lr lambda < 0"),
    (3, 0.0, 0, (3, 9, 4), "0 is a size like any other: only None means the default"),
    (5, None, 0, (3, 9, 4), "the default: each prefix has its own, S = 0 too; no large guard"),
    (5, None, 0.03, (3, 9, 4), "`ridge` adds ridge I to S, also where the default is made"),
    ([0, 3, 300], None, 0.03, (2, 9, 4), "rounding grew: float32, or the order of M S M"),
    (3, None, 0, (1, 1, 1), "one prompt, one example, d = 1"),
    (3, None, 0, (1, 3, 5), "fewer examples than dimensions"),
]


def check_solver(solver, option, left):
    """Check a trajectory; left(size of a step or None, eigenvalue, all of them, k)."""
    for steps, size, ridge, (prompts, n, d), message in SOLVER_CASES:
        options = {"ridge": ridge} | ({} if size is None else {option: size})
        counts = range(steps + 1) if isinstance(steps, int) else steps
        for dtype in (torch.float32, torch.float64):
            xs = orthonormal(prompts, n + 1, d, d).flatten(1, 2)[:, : n + 1]  # well conditioned
            xs, ys = (xs / torch.linspace(4, 10, d)).to(dtype), draws(prompts, n + 1).to(dtype)
            expected = slow_answers(xs, ys, counts, functools.partial(left, size), ridge)
            close(call(solver, xs, ys, steps=steps, **options), expected, message)


def test_ex01_shapes_and_generator(icl):
    every = dict(kappa=7.0, noise=0.1, tails=3)
    for P, n, d, law in ((3, 4, 2, {}), (2, 1, 1, every), (1, 5, 3, every)):
        xs, ys = icl.sample_prompts(P, n, d, **law)
        check_form(xs, (P, n + 1, d), "xs (prompts, n+1, d)", torch.float32)
        check_form(ys, (P, n + 1), "ys (prompts, n+1)", torch.float32)
        assert not torch.equal(xs, icl.sample_prompts(P, n, d, **law)[0]), "two calls, same prompts"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    g, again = (torch.Generator(device).manual_seed(SEED) for _ in range(2))
    for a, b, c in zip(*(icl.sample_prompts(3, 4, 2, generator=z, **every) for z in (g, again, g))):
        assert torch.equal(a, b), "same seed, other prompts: pass the generator to every draw"
        assert not torch.equal(a, c), "the next draws from a generator gave the same prompts"
        assert a.device.type == device, "prompts must be on the generator's device"


def test_ex01_covariance(icl):
    why = "trace d; d//2 eigenvalues are kappa times the others, and x scales by their *roots*"
    for d, kappa in ((4, 1.0), (5, 30.0), (2, 7.0), (1, 9.0)):
        values = torch.tensor([1.0] * (d - d // 2) + [kappa] * (d // 2))
        for x in icl.sample_prompts(2, 20_000, d, kappa=kappa)[0].double():
            z = x @ torch.linalg.eigh(x.mT @ x)[1] * (values.mean() / values).sqrt()
            check_standard(z, why, 0.12)
            assert abs((z**4).mean() - 3) < 0.4, "x must be Gaussian"


def test_ex01_uniform_eigenbasis(icl):
    """With a huge kappa and d = 3 every x points along the first axis of its prompt's basis."""
    x = icl.sample_prompts(15_000, 1, 3, kappa=1e4)[0][:, 0].double()
    u = x / x.norm(dim=1, keepdim=True)
    why = "each prompt needs its own eigenbasis, and a uniform one: made of *normal* numbers"
    check_standard(3**0.5 * u, why, 0.05)
    assert abs((u**4).sum(-1).mean() - 0.6) < 0.008, why


def test_ex01_rule_and_noise(icl):
    """One w* explains a prompt; what the same draws gain with more noise is the noise."""
    for law in ({}, dict(kappa=25.0), dict(tails=2), dict(kappa=9.0, tails=3)):
        prompts = []
        for noise in (0.0, 0.4, 1.4):
            law |= dict(noise=noise, generator=torch.Generator().manual_seed(SEED))
            prompts.append([z.double() for z in icl.sample_prompts(3000, 7, 3, **law)])
        (x, y), noise = prompts[0], prompts[2][1] - prompts[1][1]
        w = torch.linalg.pinv(x) @ y[..., None]
        missed = ((x @ w)[..., 0] - y).abs().amax(1) / y.abs().amax(1)
        assert missed.max() < 1e-3, "without noise y = w*.x, one w* a prompt, for the x returned"
        check_standard(w[..., 0], "w* ~ N(0, I), one a prompt; y comes from the *finished* x", 0.18)
        assert abs((w**4).mean() - 3) < 0.7, "w* is not normal"
        check_standard(noise, "noise: *standard deviation*; every y, the last too, its own", 0.18)
        far = noise[x.norm(dim=-1) > x.norm(dim=-1).median()]
        assert abs(far.square().mean() - 1) < 0.1, "noise must not depend on x"


def test_ex01_tails(icl):
    """|x|^2 / (|x|^2 + tails) has a beta distribution: mean and variance are known."""
    for d, tails, kappa in ((4, 3, 1.0), (1, 5, 9.0)):
        r = icl.sample_prompts(250, 199, d, tails=tails, kappa=kappa)[0].double().square().sum(-1)
        mean = d / (d + tails)
        z = (r / (r + tails) - mean) / (2 * mean * (1 - mean) / (d + tails + 2)) ** 0.5
        why = "tails: each x_i, whole, over the root *mean* square of its own `tails` normals"
        close([z.mean() + 1, z.var(0).mean(), z.var(1).mean()], torch.ones(3), why, 0.05, None)


def test_ex02_trajectories(icl):
    def left(lr, value, values, k):
        return (1 - (1 / values[-1] if lr is None else lr) * value) ** k

    check_solver(icl.gradient_descent, "lr", left)


def test_ex03_each_matrix_has_its_alpha(icl):
    for batch, d, scale, dtype in (((), 3, 1, torch.float64), ((4,), 1, 1e-3, torch.float32),
                                   ((2, 3), 4, 1e3, torch.float64)):  # fmt: skip
        X = scale * draws(*batch, d + 9, d)
        X[0] = 0  # the empty prefix, if there is a batch
        S = (X.mT @ X).to(dtype)
        alpha = call(icl.newton_start, S)
        check_form(alpha, (*batch, 1, 1), "a finite alpha for each S, S = 0 too", dtype)
        norm = (alpha * (S @ S)).square().sum((-2, -1)).sqrt()
        why = "alpha S S^T must have Frobenius norm 1, for each S"
        close(norm, (S[..., 0, 0] > 0).to(dtype), why, 1e-5, dtype)


def test_ex04_trajectories(icl):
    def left(alpha, value, values, k):
        alpha = 0.7 / values.sum() ** 2 if alpha is None else alpha
        return (1 - alpha * value**2) ** (2.0**k)

    def start(S):  # a safe alpha, but not exercise 3's, which this one must not need
        return 0.7 / (torch.einsum("...ii", S)[..., None, None] ** 2 + 1e-30)

    with mock.patch.object(icl, "newton_start", start):
        check_solver(icl.newton, "alpha", left)


def test_ex05_tokens(icl):
    for P, n, d, dtype in ((3, 4, 3, torch.double), (2, 3, 1, torch.float), (1, 0, 2, torch.float)):
        xs, ys = draws(P, n + 1, d).to(dtype), draws(P, n + 1).to(dtype)
        tokens = call(icl.interleave, xs, ys)
        check_form(tokens, (P, 2 * n + 1, d), "(P, 2n+1, d): the last y is left out", dtype)
        assert torch.equal(tokens[:, ::2], xs), "x_1, x_2, ... stand at the even positions"
        assert torch.equal(tokens[:, 1::2, 0], ys[:, :n]), "y_t follows x_t, in the first entry"
        assert not tokens[:, 1::2, 1:].any(), "y is padded with zeros"


def test_ex06_causal_attention(icl):
    average = "token i averages v_0..v_i by a softmax of q_i.k_j / sqrt(D)"
    large = "scores of -1000 or 1000: mask by -inf, and let softmax do the exponentials"
    for *shape, scale, why in ((5, 3, 1, average), (2, 3, 5, 2, 1, average), (20, 4, 3, 40, large)):
        q, k, v = scale * draws(*shape), scale * draws(*shape), draws(*shape)
        expected = torch.zeros_like(v)
        for *batch, i in np.ndindex(*shape[:-1]):
            past = (*batch, slice(i + 1))
            scores = k[past] @ q[(*batch, i)] / shape[-1] ** 0.5
            expected[(*batch, i)] = (scores - scores.logsumexp(0)).exp() @ v[past]
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-2)):
            out = call(icl.causal_attention, q.to(dtype), k.to(dtype), v.to(dtype))
            close(out, expected, why, tolerance, dtype)


def test_ex07_planted_readout(icl):
    """H = B U diag(sizes) rows, y = B (1, ..., 1) + something orthogonal to H: r is known."""
    sizes, all_six = torch.tensor([1e-3, 1, 2, 3, 4, 5]).double(), torch.eye(6).double()
    six_of_nine = torch.eye(9).double()[torch.rand(5, 8, 9).argsort()[..., :6]]
    for batch, samples, rows, why in (
        ((), 60, all_six, "no ridge, all in float64, small columns count"),
        ((5, 8), 60, six_of_nine, "columns of zeros: not for inv, nor lstsq's default driver"),
        ((40,), 60, orthonormal(9, 6).mT, "columns that depend on others, up to rounding"),
        ((40,), 6, orthonormal(9, 6).mT, "fewer samples than columns"),
    ):
        B, U = orthonormal(samples, min(samples, 7)), orthonormal(*batch, 6, 6)
        r = call(icl.least_squares_readout, B[:, :6] @ (U * sizes) @ rows, B.sum(1))
        expected = (rows.mT @ (U.sum(-2) / sizes)[..., None])[..., 0]
        close(r, expected, f"the shortest r of least ||H r - y||: {why}", 1e-6)


def test_ex08_cosines(icl):
    for A, B, P, n, dtype, size in ((3, 2, 4, 5, torch.double, 1e-4), (1, 4, 3, 1, torch.float, 1)):
        a, b, ys = draws(A, P, n + 1), draws(B, P, n + 1), 10 * draws(P, n + 1)
        a, b = (z / z[..., 1:].norm(dim=-1, keepdim=True) for z in (a, b))
        a[:, 0] = 0
        expected = torch.stack([(one * b)[..., 1:].sum(-1) for one in a])
        size = size * torch.arange(1.0, P + 1)[:, None]
        inputs = [z.to(dtype) for z in (size * a + ys, size * b + ys, ys)]
        why = "cosines of prediction - y over t = 1..n; 0 for an error of 0, but not of 1e-4"
        close(call(icl.error_cosines, *inputs), expected, why, 5e-4)
        close(call(icl.similarity_of_errors, *inputs), expected.mean(-1), "mean over prompts", 5e-4)


def test_ex08_best_match(icl):
    for shape in ((3, 7), (7, 3), (2, 3, 5), (2, 2, 1, 4)):
        best = torch.randint(shape[-1], shape[:-1])
        similarity = -draws(*shape).abs().scatter(-1, best[..., None], -0.1)
        close(call(icl.best_match, similarity), best, "*index* of b's best step", 0, torch.int64)


def test_ex09_linear_heads(icl):
    Q, K, V, h = draws(2, 3), draws(2, 3), draws(3, 3), draws(5, 3)
    added = icl.relu_attention(h, icl.linear_heads(Q, K, V), torch.ones(5, 5).double()) - h
    close(added, (h @ Q.mT) @ (h @ K.mT).mT @ (h @ V.mT), "two heads add s V, sign and all")


def test_ex09_newton_layer(icl):
    for n, d, width in ((7, 3, 7), (3, 5, 11), (3, 1, 3)):
        (one, two), (up, down) = icl.newton_layer(d)
        shapes = [(d, width), (d, width), (width, width)] * 2 + [(2 * d, width), (width, 2 * d)]
        for matrix, shape in zip([*one, *two, up, down], shapes, strict=True):
            check_form(matrix, shape, "two heads (Q, K, V), then mlp = (up, down)")
        X, T, y = draws(n + 1, d), draws(d, d), draws(n + 1, 1)
        h, S = torch.hstack([X @ T.mT, X, y]), X[:n].mT @ X[:n]  # the last token is a query
        mask = (torch.arange(n + 1) < n).double().expand(n + 1, n + 1)
        added = icl.relu_attention(h, [one, two], mask) - h
        assert not added[:, d:].any(), "attention must write into the top block only: V's rows"
        for wrong, mistake in (
            (T @ S @ T, "attention adds +1/2 T S T: the sign of V"),
            (-2 * T @ S @ T, "attention adds -T S T, and the MLP will double it: V needs -1/2"),
            (0 * T, "the heads cancel, or V is 0: the second head needs -Q *and* -V"),
            (-T @ S @ T.mT, "scores are <x_j, T x_t>; <T x_j, x_t> makes T S T^T"),
            (-T @ S, "the score is <x_j, x_t>: the query must read T x_t"),
            (-S @ T, "the value is x_j: V must read T x_j"),
        ):
            assert d == 1 or (2 * added[:, :d] - X @ wrong.mT).abs().max() > 1e-6, mistake
        close(2 * added[:, :d], -X @ (T @ S @ T).mT, "attention adds -1/2 T S T x: heads V, -V")
        added = (h @ up.mT).relu() @ down.mT
        assert not added[:, d:].any(), "the MLP must leave x and y alone"
        close(added[:, :d], h[:, :d], "the MLP must double the top block: ReLU(a) - ReLU(-a) = a")


def test_ex10_optimal_preconditioner(icl):
    for d, n, dtype in ((3, 4, torch.float64), (5, 11, torch.float32), (1, 2, torch.float64)):
        U, values = orthonormal(d, d), torch.linspace(0.3, 2, d).double()
        A = call(icl.optimal_preconditioner, ((U * values) @ U.mT).to(dtype), n=n)
        check_form(A, (d, d), "one matrix A (d, d)", None)
        inside = U.mT @ A.double() @ U
        close(inside, inside.diagonal().diag(), "A must have Sigma's eigenvectors", 1e-4)
        rest = (1 / inside.diagonal() - (n + 1) / n * values) / values.sum()  # should be 1/n
        for wrong, mistake in (
            (0, "the sum of all eigenvalues is missing"),
            (1, "the sum of all eigenvalues goes over n"),
            (1 / n - values / n / values.sum(), "n, not n+1"),
        ):
            assert (rest - wrong).abs().max() > 1e-4, mistake
        close(rest, torch.full((d,), 1 / n), "(n+1)/n lambda_i + (1/n) sum of all, inverted", 1e-3)


# ------------------------------------------------------------------------------------------------
# For lecturers (the student's copy ends above). Homework: python test_icl_newton.py week1

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

PROGRAM = Path(__file__).with_name("icl_newton.py")
TEXT = PROGRAM.read_text("utf-8")
NUMBERS = {z[1]: z[0] for z in EXERCISES} | dict(error_cosines=8, best_match=8, linear_heads=9)
HEADS, ANSWERS, STUBS = {}, {}, {}  # of each function: to the docstring's end; the rest; no answer
for f in ast.parse(TEXT).body:
    if (name := getattr(f, "name", None)) in NUMBERS:
        lines, start = TEXT.splitlines(keepends=True), f.body[0].end_lineno
        HEADS[name] = "".join(lines[f.lineno - 1 : start])
        ANSWERS[name] = "".join(lines[start : f.end_lineno])
        STUBS[name] = f'    raise NotImplementedError("exercise {NUMBERS[name]}: {name}")\n'

# What is wrong | what stands in the answer (~: the rest of a line) | what replaces it; +: right
CHANGES = """
sample_prompts
scaled by eigenvalues, not their roots | eigenvalues.sqrt() | eigenvalues
trace is not d | eigenvalues *= d / eigenvalues.sum() | pass
one basis for the batch | draw(prompts, d, d) | draw(1, d, d)
scaled along the axes | (xs * eigenvalues.sqrt()) @ basis.mT | xs @ basis.mT * eigenvalues.sqrt()
basis of uniform numbers | draw(prompts, d, d) | torch.rand(prompts, d, d, generator=generator)
one w for all prompts | draw(prompts, d, 1) | draw(1, d, 1)
kappa forgotten in y | w_star = ~ | w_star = draw(prompts, d, 1) / kappa**0.5
tails after y | return xs, | return xs * (draw(prompts, n + 1, 1) if tails else 1),
tails: one factor a prompt | draw(prompts, n + 1, tails) | draw(prompts, 1, tails)
tails: entry by entry | draw(prompts, n + 1, tails)~ | (draw(tails, *xs.shape) ** 2).mean(0).rsqrt()
tails: one degree more | n + 1, tails | n + 1, tails + 1
noise is a variance | noise * draw | noise**0.5 * draw
last y without noise | noise * draw | noise * (torch.arange(n + 1) < n) * draw
one noise a prompt | noise * draw(prompts, n + 1) | noise * draw(prompts, 1)
noise grows with x | noise * draw | noise * xs.norm(dim=-1) / d**0.5 * draw
generator ignored in the noise | noise * draw(prompts, | noise * torch.randn(prompts,
always the same prompts | device = | generator = generator or torch.Generator(); device =
+ large ones last | [: d // 2] | [d - d // 2 :]
+ by Cholesky | xs = (~ | xs = xs @ torch.linalg.cholesky((basis * eigenvalues) @ basis.mT).mT

gradient_descent
a step too many | ** k | ** (k + 1)
lambda_max of the longest prefix | eigenvalues[..., -1:] | eigenvalues[:, -1:, -1:]
lr = 0 is not given | if lr is None | if not lr
ridge ignored | (xs, ys, ridge) | (xs, ys)
ridge not in the default lr | lr = 1 / eigenvalues | lr = 1 / (eigenvalues - ridge)
mean in place of sum | (1 - lr * | (1 - lr / len(ys[0]) *
prefix includes its own example | (xs, ys, ridge) | (xs.roll(-1, 1), ys.roll(-1, 1), ridge)
float32 | found = ~ | found = (1 - (1 - lr * eigenvalues).float() ** k.float()).double()
S = 0 | .clamp_min(TINY) |
large guard | .clamp_min(TINY) | .add(1e-8)
+ power by power | found = ~ | found = torch.stack([1 - (1 - lr * eigenvalues) ** z for z in k])
+ step by step | found = ~ | z = [0 * eigenvalues]; [z.append(z[-1] + lr * eigenvalues * \
(1 - z[-1])) for _ in range(300)]; found = torch.stack(z)[k.int().flatten()]

newton_start
twice as large | return 1 | return 2
norm of S | S @ S.mT | S
no axes kept | , keepdim=True |
division by zero | .clamp_min(TINY) |
one for all | matrix_norm(S @ S.mT, keepdim=True) | norm(S @ S).expand(*S.shape[:-2], 1, 1)
+ by hand | torch.linalg~ | (S @ S).square().sum((-2, -1), keepdim=True).sqrt().clamp_min(1e-20)
+ eigenvalues | 1 / torch.~ | torch.linalg.eigvalsh(S).norm(4, -1)[..., None, None].add(1e-15) ** -2

newton
the order S M M | M @ S @ M | S @ M @ M
the order M M S | M @ S @ M | M @ M @ S
S and M exchanged | M @ S @ M | S @ M @ S
a step too many | [counts] | [[k + (k < counts[-1]) for k in counts]]
starts from alpha I | alpha) * S | alpha) * torch.eye(len(S[0, 0])).to(S)
alpha = 0 is not given | newton_start(S) if alpha is None else alpha | alpha or newton_start(S)
ridge ignored | (xs, ys, ridge) | (xs, ys)
float32 | M @ S @ M | (M.float() @ S.float() @ M.float()).double()
+ factored | 2 * M - M @ S @ M | M @ (2 * torch.eye(S.shape[-1]).to(S) - S @ M)
+ residual | 2 * M - M @ S @ M | M + (torch.eye(S.shape[-1]) - M @ S) @ M

interleave
the answer is shown | [:, :-1] |
first all x, then all y | stack([xs, y_tokens], dim=2).flatten(1, 2) | cat([xs, y_tokens], dim=1)
y in the last entry | (0, xs.shape[-1] - 1) | (xs.shape[-1] - 1, 0)
float32 | [xs, | [xs.float(),
x changed | return | xs[..., 0] += 1; return
+ reshaped | torch.~ | torch.cat([xs, y_tokens], 2).reshape(len(xs), -1, xs.shape[-1])[:, :-1]
+ in place | return ~ | z = xs.repeat_interleave(2, 1); z[:, 1::2] = y_tokens; return z[:, :-1]

causal_attention
blind to itself | .triu(1) | .triu(0)
the mask transposed | masked_fill(future | masked_fill(future.mT
softmax over queries | .softmax(-1) | .softmax(-2)
scale D | math.sqrt(D) | D
masked after the softmax | scores.~ | scores.softmax(-1).masked_fill(future, 0) @ v
a small mask | -math.inf | -100.0
softmax by hand | scores.~ | F.normalize(scores.exp().tril(), p=1, dim=-1) @ v
q changed | scores = q @ k.mT / math.sqrt(D) | scores = q.div_(math.sqrt(D)) @ k.mT
+ torch's own | scores = ~ | return F.scaled_dot_product_attention(q, k, v, is_causal=True)
+ large negative mask | -math.inf | -1e9

least_squares_readout
inverse | pinv(H.mT @ H, hermitian=True, rtol=1e-12) | inv_ex(H.mT @ H).inverse
default driver | times(~ | torch.linalg.lstsq(H, y.expand(H.shape[:-1])[..., None])[0][..., 0]
float32 | pinv(H.mT @ H, hermitian=True, rtol=1e-12) | pinv((H.mT @ H).float()).double()
float32 at the end | y)) | y)).float()
tiny ridge | H.mT @ H, | H.mT @ H + 1e-8 * torch.eye(H.shape[-1]).to(H),
y centred | y)) | y - y.mean()))
+ SVD | times~ | torch.linalg.lstsq(H, y.expand(H.shape[:-1])[..., None], driver="gelsd")[0][..., 0]
+ pinv of H | return ~ | return times(torch.linalg.pinv(H), y)

error_cosines
t = 0 included | [..., 1:] |
predictions in place of errors | z.double() - ys | z.double()
large epsilon | dim=-1) | dim=-1, eps=1e-3)
nan for no error | return | a = a / a.norm(dim=-1, keepdim=True); return
float32 | z.double() - ys | z.float() - ys.float()
+ torch's own | return ~ | return F.cosine_similarity(a[:, None], b, dim=-1)

similarity_of_errors
mean over b | .mean(-1) | .mean(1)
pooled | error~ | F.normalize((traj_a - ys).flatten(1)) @ F.normalize((traj_b - ys).flatten(1)).mT

best_match
wrong axis | argmax(-1) | argmax(-2)
the value | argmax(-1) | amax(-1)
+ max | .argmax(-1) | .max(dim=-1).indices

newton_layer
wrong sign | V=-0.5 | V=0.5
1/2 missing | V=-0.5 * | V=-
equal heads | linear~ | [(Tx, x, -0.5 * Tx.mT @ Tx), (-Tx, x, -0.5 * Tx.mT @ Tx)]
query and key exchanged | Q=Tx, K=x | Q=x, K=Tx
values are x | Tx.mT @ Tx) | Tx.mT @ x)
negative half lost | [Tx, -Tx] | [Tx, Tx * 0]
float32 | (up, up.mT) | (up.float(), up.mT)
+ heads exchanged | return heads, | return heads[::-1],
+ scaled | heads = ~ | heads = [(2 * s * Tx, x, -s / 4 * Tx.mT @ Tx) for s in (1, -1)]

optimal_preconditioner
n in place of n+1 | (n + 1) / n * | 1 *
trace not over n | eigenvalues.sum() / n | eigenvalues.sum()
not inverted | U / ( | U * (
transposes exchanged | @ U.mT | @ U
Sigma changed | (Sigma) | (Sigma.mul_(1.5))
+ inverse | U / ~ | ((n + 1) / n * Sigma + Sigma.trace() / n * torch.eye(len(U)).to(U)).inverse()
+ float32 | U / ~ | ((n + 1) / n * Sigma + Sigma.trace() / n * torch.eye(len(U))).float().inverse()
"""
WRONG, RIGHT = [], []  # "function | what is wrong | what stands in its answer | what replaces it"
for section in CHANGES.strip().split("\n\n"):
    name, *lines = section.splitlines()
    for line in lines:
        (RIGHT if line[0] == "+" else WRONG).append(f"{name} | {line}")


def failure(number, answers):
    """What the tests of an exercise first find wrong if the functions have these answers."""
    module = SimpleNamespace(**vars(icl_newton))
    exec("".join(HEADS[name] + answers[name] for name in HEADS), vars(module))
    for name, test in list(globals().items()):
        if name.startswith(f"test_ex{number:02}"):
            torch.manual_seed(SEED)
            try:
                test(module)
            except Exception as error:
                return error


@pytest.mark.parametrize("change", WRONG + RIGHT, ids=lambda change: change[:60])
def test_wrong_answers_fail_and_right_ones_pass(change):
    name, _, old, new = re.split(r" \| ?", change, maxsplit=3)
    answer = re.sub(re.escape(old).replace(r"\~", ".*"), lambda _: new, ANSWERS[name])
    assert answer != ANSWERS[name], "nothing changes"
    found = failure(NUMBERS[name], ANSWERS | {name: answer})
    assert (found is None) == (change in RIGHT), found


@pytest.mark.parametrize("number", range(1, 11))
def test_no_exercise_needs_another(number):
    own = {name: ANSWERS[name] for name in NUMBERS if NUMBERS[name] == number}
    assert failure(number, STUBS | own) is None


SHEET = """# Which algorithm does a Transformer run?

Read icl_newton.py from the top. Where it raises NotImplementedError, write the answer that the
docstring promises: for every argument, on the edges too. No exercise needs another. Then

    python -m pytest -x --tb=short -k ex04    # one exercise; to repeat a run, set its ICL_SEED
    python -m pytest --tb=no -k test_ex       # all, with points
    python icl_newton.py                      # once all pass: the study itself

Predict before you run:

1. How many more steps do Newton and GD need at kappa = 100 to reach the last layer's *error*?
> GD up to 100 times as many, Newton at most 13 more: (1 - alpha lambda^2)^(2^k), 2^k = kappa^2.
2. What is the smallest squared error / d after t < d examples, at kappa = 1, without noise?
> 1 - t/d: the examples show t of the d directions of w*.
3. Halve alpha in Newton's start, and eta in GD. How many more steps does each need?
> Newton about one, whatever the number: 2^k takes the factor in a step. GD twice as many.
4. At d = 5 a step of conjugate gradient climbs about three Newton steps, by similarity. So?
> Three Newton steps a layer are no sign of Newton: one product with S a step makes them, too.
5. A layer's errors have similarity .97 with a Newton step's. Why does that say little?
> At t < d most of an error no method can avoid; deviations shuffled over prompts score the same.
6. D* products with S can equal a layer. What does D* > layer exclude, and why not CG?
> Methods with step sizes fixed, or from lambda_max. CG's depend on the prompt: other polynomials.

| number | function | idea | equation | minutes | difficulty | points |
|---|---|---|---|---|---|---|
"""


def write_homework(folder):
    """The student's folder, and <folder>-LECTURERS.md beside it. ValueError if there is work."""
    folder = Path(folder).resolve()
    lecturers = folder.with_name(folder.name + "-LECTURERS.md")
    if lecturers.exists() or folder.is_file() or folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} has work in it, or {lecturers.name} exists: nothing is written")
    student, solutions = TEXT, ""
    for name, head in HEADS.items():
        student = student.replace(head + ANSWERS[name], head + STUBS[name])
        solutions += f"\n\n{head}{ANSWERS[name]}"
    tests = Path(__file__).read_text("utf-8").split("\n# For lecturers")[0].rstrip("-# \n") + "\n"
    sheet = SHEET + "".join(f"| {' | '.join(map(str, row))} |\n" for row in EXERCISES)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "icl_newton.py").write_text(student, "utf-8")
    (folder / "test_icl_newton.py").write_text(tests, "utf-8")
    (folder / "ASSIGNMENT.md").write_text(re.sub("(?m)^> .*\n", "", sheet), "utf-8")
    lecturers.write_text(f"{sheet}\n```python{solutions}```\n", "utf-8")


def shell(folder, *command):
    return subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)


def test_homework(tmp_path):
    week, grade = tmp_path / "week1", "-m pytest -q --tb=no -p no:cacheprovider -k test_ex".split()
    write_homework(week)
    everything = "".join(path.read_text("utf-8") for path in week.iterdir())
    lecturers = (tmp_path / "week1-LECTURERS.md").read_text("utf-8")
    for answer in [*ANSWERS.values(), *re.findall("\n> .*", SHEET)]:
        assert answer in lecturers and answer not in everything, answer
    assert all(stub in everything for stub in STUBS.values()) and len(STUBS) == 13
    assert "WRONG" not in everything and "lecturers" not in everything
    result = shell(week, *grade).stdout
    assert "  0 of 100 points" in result and " passed" not in result, result[-2000:]
    (week / "icl_newton.py").write_text(TEXT, "utf-8")
    assert "  100 of 100 points" in (result := shell(week, *grade).stdout), result[-2000:]
    run = shell(tmp_path, __file__, "week1")  # there is work in it now
    assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
    assert (week / "icl_newton.py").read_text("utf-8") == TEXT
    with pytest.raises(ValueError, match="nothing is written"):
        write_homework(week.with_name("week1-LECTURERS.md"))


# --------------------------------------------------------------------------------------------------
# Everything but the exercises

import copy
import dataclasses
import json
import math
import random

lib = icl_newton


def near(actual, expected, message, tolerance=1e-9):
    """Same shape, and equal up to a tolerance relative to the largest entry."""
    actual, expected = (torch.as_tensor(z).double() for z in (actual, expected))
    assert actual.shape == expected.shape, f"{message} (shape {tuple(actual.shape)})"
    gap = ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-3)).item()
    assert gap <= tolerance, f"{message} (relative error {gap:.1e})"


def some(count=4, n=6, d=3, noise=0.0):
    """Prompts without help of the file under test: eigenvalues far apart, float64."""
    xs = torch.randn(count, n + 1, d).double() * 0.6 ** torch.arange(d)
    return xs, lib.times(xs, torch.randn(count, d).double()) + noise * torch.randn(count, n + 1)


def by_prefix(xs, ys, solve):
    """[p, t] = solve(X, y of the first t examples) . x_{t+1}, one prefix at a time, in numpy."""
    return torch.tensor([[solve(x[:t], y[:t]) @ x[t] for t in range(len(x))]
                         for x, y in zip(xs.numpy(), ys.numpy())])  # fmt: skip


def tiny(**changes):
    small = dict(d=2, n=4, layers=4, width=8, steps=12, batch=8, probes=64, prompts=32)
    return lib.Config(**small | dict(device="cpu") | changes)


def network(**changes):
    model = lib.NETWORKS[changes.get("model", "transformer")](tiny(**changes)).double()
    model.read_out.data.normal_()
    return model


def spy(monkeypatch, name, answer=None):
    """Record the calls of a function of the program; it answers as before unless told."""
    calls, real = [], getattr(lib, name)

    def recorded(*args, **kwargs):
        calls.append((args, kwargs))
        return (answer or real)(*args, **kwargs)

    monkeypatch.setattr(lib, name, recorded)
    return calls


def plant_study(monkeypatch, layers, runs_of=None, d=3, n=6):
    """study(config) without training: layers, a function of (config, xs, ys), is the network."""
    xs, ys = some(90, n, d)

    def study(config):
        counts = list(range(33))
        runs = {"Newton": (counts, lib.newton(xs, ys, counts)),
                "GD": (lib.GD_STEPS, lib.gradient_descent(xs, ys, lib.GD_STEPS)),
                "OLS": ([0], lib.ols(xs, ys))}  # fmt: skip
        learner = functools.partial(layers, config)
        return SimpleNamespace(learner=learner, xs=xs, ys=ys, layers=learner(xs, ys), runs=runs)

    monkeypatch.setattr(lib, "study", study)
    return xs, ys, study(tiny())


# Classical learners


def test_prefix_moments_and_counts():
    xs, ys = some(noise=0.3)
    S, b = lib.prefix_moments(xs, ys, 0.7)
    for t in range(7):
        slow = sum((np.outer(x, x) for x in xs[1, :t].numpy()), 0.7 * np.eye(3))
        near(S[1, t], slow, f"t = {t}: the sum over the t examples before, plus ridge I")
        near(b[1, t], ys[1, :t] @ xs[1, :t], f"b after t = {t}")
    assert lib.prefix_moments(xs.float(), ys)[0].dtype == torch.float64
    assert lib.step_counts(2) == [0, 1, 2] and lib.step_counts([0, 2, 5]) == [0, 2, 5]
    for wrong in ([], [2, 1], [1, 1], [-1, 0], -1):
        with pytest.raises(ValueError):
            lib.step_counts(wrong)


def test_every_solver_ends_at_least_squares():
    xs, ys = some(noise=0.3)
    norm = by_prefix(xs, ys, lambda X, y: np.linalg.lstsq(X, y, rcond=1e-10)[0])
    near(lib.ols(xs, ys)[0], norm, "ols: the least-squares solution of minimum norm")
    slow = by_prefix(xs, ys, lambda X, y: np.linalg.solve(X.T @ X + 0.7 * np.eye(3), X.T @ y))
    steps = {lib.ols: {}, lib.newton: dict(steps=[30]), lib.gradient_descent: dict(steps=[10**6]),
             lib.conjugate_gradient: dict(steps=[3])}  # fmt: skip
    for solver, step in steps.items():
        near(solver(xs, ys, ridge=0.7, **step)[0], slow, f"{solver.__name__}: S + ridge I", 1e-7)


def slow_cg(S, b, steps):
    """The textbook: the best w in the span of b, S b, ..., S^(k-1) b, for k = 0..steps."""
    path, basis = [0 * b], []
    for k in range(steps):
        basis.append(np.linalg.matrix_power(S, k) @ b)
        Q = np.linalg.qr(np.array(basis).T)[0]
        path.append(Q @ np.linalg.solve(Q.T @ S @ Q, Q.T @ b))
    return path


def test_conjugate_gradient():
    xs, ys = some(noise=0.3)
    run = lib.conjugate_gradient(xs, ys, 6)
    near(run[3:], lib.ols(xs, ys).expand(4, -1, -1), "exact after d steps, and then it stays", 1e-7)
    for p, t in ((0, 6), (3, 4)):
        X, y = xs[p, :t].numpy(), ys[p, :t].numpy()
        slow = [w @ xs[p, t].numpy() for w in slow_cg(X.T @ X, X.T @ y, 3)]
        near(run[:4, p, t], slow, "step k is the best in the span of b, S b, ..., S^(k-1) b", 1e-7)
    near(lib.conjugate_gradient(xs, ys, [1, 3]), run[[1, 3]], "steps may be counts")


def test_online_gradient_descent():
    def one_pass(X, y):
        w = np.zeros(3)
        for x, answer in zip(X, y):
            w = w + x * (answer - w @ x) / (x @ x)
        return w

    xs, ys = some(noise=0.3)
    near(lib.online_gradient_descent(xs, ys)[0], by_prefix(xs, ys, one_pass), "one pass, in order")


def all_learners():
    """Name -> (xs, ys) -> trajectory, for all solvers and both networks with random readouts."""
    solvers = {"gd": lib.gradient_descent, "newton": lib.newton, "cg": lib.conjugate_gradient,
               "by hand": functools.partial(lib.construction, alpha=1e-3)}  # fmt: skip
    learners = {name: functools.partial(f, steps=2) for name, f in solvers.items()}
    learners |= {"ols": lib.ols, "ogd": lib.online_gradient_descent}
    for name in lib.NETWORKS:
        model = network(model=name, d=3, n=6)
        learners[name] = lambda xs, ys, model=model: model(xs, ys)[None]
        readouts = torch.randn(5, 9).double()
        probe = functools.partial(lib.layer_predictions, model.requires_grad_(False), readouts)
        learners[f"{name}, probed"] = probe
    return learners


def test_nobody_sees_its_own_answer_or_what_follows():
    xs, ys = some(noise=0.3)
    for name, learner in all_learners().items():
        before, t = learner(xs, ys), random.randint(0, 5)
        other_xs, other_ys = xs.clone(), ys.clone()
        other_xs[:, t + 1 :] = torch.randn(4, 6 - t, 3).double()
        other_ys[:, t:] += torch.randn(4, 7 - t).double()
        after = learner(other_xs, other_ys)
        near(after[..., : t + 1], before[..., : t + 1], f"{name}, t = {t}: saw too much")
        later = learner(xs, other_ys)[-1, :, t + 1 :] - before[-1, :, t + 1 :]
        assert later.abs().amax(0).min() > 1e-9, f"{name}: later prefixes must see example {t + 1}"
        near(learner(xs[:1], ys[:1])[:, 0], before[:, 0], f"{name}: prompts know nothing of others")
        near(learner(xs[:, :4], ys[:, :4]), before[..., :4], f"{name}: a shorter prompt, the same")


def test_correction_1_the_printed_alpha_stalls():
    xs, ys = some(20, 9, 3)
    S = lib.prefix_moments(xs, ys)[0][:, -1]
    edge = 2 / torch.linalg.matrix_norm(S @ S, 2)[:, None, None, None]
    for alpha, stalls in ((edge, True), (None, False)):
        miss = (lib.newton(xs, ys, [20, 40], alpha)[..., -1] - ys[:, -1]).square().mean(1)
        good = miss[1] > 1e-6 and miss[1] > 0.5 * miss[0] if stalls else miss[1] < 1e-12
        assert good, f"alpha at 2/||S S^T||_2 stalls, the default converges: {miss.tolist()}"


def test_correction_5_gd_off_the_span_is_capped():
    xs, ys = lib.sample_prompts(200, 40, 20, generator=torch.Generator().manual_seed(SEED))
    xs, ys, target, caps = xs.double(), ys.double(), lib.ols(xs, ys), []
    for size in (0, 20**-0.5, 1):
        start = size * lib.times(xs, torch.rand(200, 20).double())  # a start is a shift of y
        run = lib.gradient_descent(xs, ys - start, [10**6]) + start
        caps.append(lib.similarity_of_errors(run, target, ys).item())
    assert caps[0] > 0.9995 and abs(caps[1] - 0.991) < 0.004 and 0.8 < caps[2] < 0.92, caps


# Networks


def slow_norm(z):
    return (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-5)


def slow_block(h, attention, mlp, heads):
    """A pre-norm Transformer block on one sequence h (T, W), head by head."""
    a, mixed = slow_norm(h), []
    Q, K, V = (np.split(a @ M.T, heads, axis=1) for M in attention[:3])
    for q, k, v in zip(Q, K, V):
        scores = slow_norm(q) @ slow_norm(k).T / math.sqrt(q.shape[1])
        weights = np.tril(np.exp(scores))
        mixed.append(weights / weights.sum(1, keepdims=True) @ v)
    h = h + np.hstack(mixed) @ attention[3].T
    up = slow_norm(h) @ mlp[0].T
    return h + up * (1 + np.vectorize(math.erf)(up / math.sqrt(2))) / 2 @ mlp[1]


def test_transformer_against_a_slow_one():
    model, (xs, ys) = network(d=3, n=6, heads=4).requires_grad_(False), some()
    h = np.zeros((13, 3))
    h[::2], h[1::2, 0] = xs[2], ys[2, :-1]
    h = h @ model.read_in.numpy().T + model.positions.numpy()
    states = [slow_norm(h[::2])]
    for attention, mlp in zip(model.attention.numpy(), model.mlp.numpy()):
        h = slow_block(h, attention, mlp, 4)
        states.append(slow_norm(h[::2]))
    near(model.states(xs, ys)[:, 2], np.array(states), "heads, norms, residuals, x tokens")
    near(model(xs, ys)[2], states[-1] @ model.read_out.numpy(), "read out of the last state")


def test_initial_weights():
    for name, x_scale, position_scale in (("transformer", 0.3, 0.02), ("lstm", 1, 1)):
        model = lib.NETWORKS[name](tiny(model=name, d=4, n=40, width=64)).requires_grad_(False)
        if name == "transformer":
            attention, mlp = model.attention, model.mlp
        near(model.read_in.std(), x_scale / 2, f"{name}: scale of the embedding", 0.2)
        near(model.positions.std(), position_scale, f"{name}: scale of the positions", 0.1)
        assert model.read_out.abs().max() == 0
    bias = model.stack[3].bias_ih_l0.view(4, 64)  # input, forget, cell, output
    assert bias[1].eq(1).all() and bias[[0, 2, 3]].abs().max() < 0.2, "forget gates start open"
    assert mlp.shape == (4, 2, 128, 64), "twice as wide as the stream"
    for W, scale in ((attention[:, :3], 2), (attention[:, 3], 1), (mlp[:, 0], 2), (mlp[:, 1], 1)):
        near(W.std(), scale / 2 / math.sqrt(192), "1/sqrt(3 W); what writes starts at half", 0.05)


def test_states_and_a_training_step_stay_on_their_device(monkeypatch):
    data = torch.zeros(8, 5, 2, device="meta"), torch.zeros(8, 5, device="meta")
    monkeypatch.setattr(lib, "training_prompts", lambda *args: data)
    for name in lib.NETWORKS:
        model = lib.NETWORKS[name](tiny(model=name)).to("meta")
        optimizers = lib.make_optimizers(model, tiny())
        lib.training_step(model, optimizers, tiny(), 0, None)
        assert model.states(*data).is_meta, f"{name}: a tensor was made on the CPU"


# Training


def slow_orthogonal(G):
    U, s, V = np.linalg.svd(G, full_matrices=False)
    s = s / np.sqrt((s**2).sum())
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return U * s @ V


def test_orthogonalize():
    for shape in ((6, 4), (4, 6)):
        G = torch.randn(3, *shape).double()
        expected = np.stack([slow_orthogonal(g) for g in G.numpy()])
        near(lib.orthogonalize(G), expected, f"{shape}: the polynomial acts on singular values")
    assert torch.equal(lib.orthogonalize(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_muon_against_a_slow_one():
    p, average = torch.nn.Parameter(torch.randn(2, 5, 3).double()), 0
    optimizer, slow = lib.Muon([p], 0.1, momentum=0.8), p.detach().numpy().copy()
    for _ in range(2):
        p.grad = torch.randn(2, 5, 3).double()
        g = p.grad.numpy().copy()
        average = 0.8 * average + 0.2 * g
        update = np.stack([slow_orthogonal(z) for z in 0.2 * g + 0.8 * average])
        slow = slow - 0.1 * 0.2 * math.sqrt(5) * update
        optimizer.step()
        near(p.detach(), slow, "average, look ahead, orthogonalise, lr .2 sqrt(larger side)")
    assert lib.Muon([p], 1).defaults["momentum"] == 0.9


def test_learning_rate_warms_up_and_decays_to_zero():
    factors = [lib.learning_rate_factor(step, 1000) for step in (0, 49, 99, 499, 999)]
    near(factors, [0.01, 0.5 * 0.951, 0.901, 0.501, 0.001], "warm-up over 100 steps, then to 0")


def test_curriculum_grows_to_the_whole_problem():
    config, seen = tiny(d=5, n=10, curriculum=10, steps=100), []
    for step in (0, 9, 10, 30, 99):
        xs, _ = lib.training_prompts(config, step, torch.Generator())
        seen.append([int((xs[..., i] != 0).any()) for i in range(5)] + [xs.shape[1] - 1])
    two, three = [1, 1, 0, 0, 0, 6], [1, 1, 1, 0, 0, 8]
    assert seen == [two, two, three, [1] * 5 + [10], [1] * 5 + [10]], "2 dimensions, 2d + 2"
    config = dataclasses.replace(config, curriculum=0)
    assert lib.training_prompts(config, 0, torch.Generator())[0].shape == (8, 11, 5)


def test_optimizers():
    model, config = network(), tiny(muon_lr=0.5, adam_lr=0.25)
    adam, muon = lib.make_optimizers(model, config)
    small, blocks = ([id(p) for p in o.param_groups[0]["params"]] for o in (adam, muon))
    assert small == [id(p) for p in (model.read_in, model.positions, model.read_out)]
    assert blocks == [id(model.attention), id(model.mlp)], "Muon is for the matrices of the blocks"
    assert muon.defaults == dict(lr=0.5, momentum=0.9)
    (fu,) = lib.make_optimizers(model, tiny(recipe="fu"))
    for optimizer, expected in ((adam, [0.25, (0.9, 0.99), 0]), (fu, [1e-4, (0.9, 0.999), 0])):
        assert [optimizer.defaults[k] for k in ("lr", "betas", "weight_decay")] == expected
    assert len(fu.param_groups[0]["params"]) == 5
    assert len(lib.make_optimizers(network(model="lstm"), config)) == 1


@pytest.mark.parametrize("recipe", ["muon", "fu"])
def test_a_training_step_descends_the_recipes_loss(recipe, monkeypatch):
    """A model of one weight a prefix, answers w_t x_1: gradients by hand, two steps."""
    model, config, (xs, ys) = torch.nn.Module(), tiny(recipe=recipe, steps=300), some(8, 4, 2)
    model.w = torch.nn.Parameter(torch.randn(5).double())
    model.forward = lambda xs, ys: model.w * xs[..., 0]
    w, x, y = model.w.detach().numpy().copy(), xs[..., 0].numpy(), ys.numpy()
    calls = spy(monkeypatch, "training_prompts", lambda *args: (xs, ys))
    optimizers = [torch.optim.SGD([model.w], 0.5)]
    for step in (7, 200):
        miss = w * x - y
        error, slope = (miss**2).mean(0), (2 * miss * x).mean(0) / 5
        factor = 1 if recipe == "fu" else min((step + 1) / 100, 1) * (300 - step) / 300
        w = w - 0.5 * factor * slope / (1 if recipe == "fu" else error)
        returned = lib.training_step(model, optimizers, config, step, "generator")
        near(returned, error.mean(), "returns the mean squared error")
        near(model.w.detach(), w, "muon: mean of logs, scheduled; fu: the mean, constant")
    assert [args[1:] for args, _ in calls] == [(7, "generator"), (200, "generator")]


def test_prompts_follow_the_configuration(monkeypatch):
    calls = spy(monkeypatch, "sample_prompts", lambda *args, **law: (args, law))
    law = dict(kappa=3.0, noise=0.5, tails=4)
    generator = torch.Generator()
    lib.draw_prompts(tiny(**law), 9, generator)
    lib.draw_prompts(tiny(**law), 9, generator, 7, 1)
    law["generator"] = generator
    assert calls == [((9, 4, 2), law), ((9, 7, 1), law)]


def same(a, b):
    return all(map(torch.equal, a.parameters(), b.parameters()))


def test_a_killed_run_ends_with_the_same_weights(tmp_path, monkeypatch):
    config = tiny(checkpoints=str(tmp_path / "a"), save_every=5)
    whole, killed = lib.train(config), dataclasses.replace(config, checkpoints=str(tmp_path / "b"))
    real, left = lib.training_prompts, [8]

    def prompts(config, step, generator):
        left.append(step)
        if len(left) == 9:
            raise KeyboardInterrupt
        return real(config, step, generator)

    monkeypatch.setattr(lib, "training_prompts", prompts)
    with pytest.raises(KeyboardInterrupt):
        lib.train(killed)
    assert same(lib.train(killed), whole), "bit for bit"
    assert left[9:] == list(range(5, 12)), "the second run goes on at the checkpoint of step 5"
    assert same(lib.train(killed), whole) and len(left) == 16, "a third run trains nothing"
    (path,) = (tmp_path / "b").iterdir()
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"{path.name}.*delete it"):
        lib.train(killed)


def test_training_lowers_the_loss_and_depends_on_the_seed(tmp_path):
    config = tiny(steps=300, batch=32, width=16, checkpoints=str(tmp_path))
    models = [lib.train(dataclasses.replace(config, seed=seed)) for seed in (1, 2)]
    xs, ys = some(500, 4, 2)
    errors = (models[0](xs.float(), ys.float()) - ys).square().mean(0)
    assert errors[4] < 0.8 * errors[0], f"{errors}"
    assert not same(*models), "another seed, other weights"


def test_prompts_never_coincide(tmp_path, monkeypatch):
    config, first = tiny(checkpoints=str(tmp_path), noise=0.5), set()
    for seed in (1, 2, 3):
        c, generator = dataclasses.replace(config, seed=seed), torch.Generator().manual_seed(seed)
        drawn = [lib.fresh_prompts(c, 64, purpose) for purpose in (1, 2, 4)]
        drawn += [lib.training_prompts(c, step, generator) for step in range(12)]
        first |= {xs[0, 0, 0].item() for xs, _ in drawn}
    assert len(first) == 45, "probes, comparisons, products, training and seeds share prompts"
    calls, batches = spy(monkeypatch, "fresh_prompts"), spy(monkeypatch, "training_prompts")
    s = lib.study.__wrapped__(config)
    lib.worth_in_products(config, s.layers, s.xs, s.ys, 4)
    purposes = [(args[1], law["purpose"]) for args, law in calls]
    assert purposes == [(64, 1), (32, 2), (20_000, 4)], "readouts are judged on other prompts"
    assert batches[0][0][2].initial_seed() == config.seed
    near(s.runs["Newton"][1], lib.newton(s.xs, s.ys, 32, ridge=0.25), "ridge: the noise's variance")
    near(s.runs["GD"][1][-1], lib.ols(s.xs, s.ys, 0.25)[0], "GD's too", 1e-3)
    near(s.runs["OLS"][1], lib.ols(s.xs, s.ys, 0.25), "and least squares'")


def test_checkpoints_name_all_that_decides_the_weights(monkeypatch):
    monkeypatch.setattr(lib.inspect, "getsource", functools.cache(lib.inspect.getsource))

    def name(**changes):
        return lib.checkpoint_path(tiny(**dict(n=6) | changes), "cpu")

    decisive = dict(d=3, n=5, kappa=2, noise=1, tails=3, model="lstm", layers=5, width=16, heads=4,
                    recipe="fu", steps=13, batch=9, muon_lr=1, adam_lr=1, curriculum=1,
                    seed=2)  # fmt: skip
    names = {name(), lib.checkpoint_path(tiny(n=6), "cuda")}
    names |= {name(**{key: value}) for key, value in decisive.items()}
    assert len(names) == 18, "a decisive setting is missing from the name"
    same_file = dict(out="x", figures="rates", prompts=9, probes=9, save_every=1, seeds=3)
    assert name(**same_file) == name(), "the file depends on what does not decide the weights"
    for code in ("causal_attention", "Muon", "training_step", "normalize", "sample_prompts"):
        with monkeypatch.context() as patch:
            patch.setattr(lib, code, near)
            names.add(name())
    assert len(names) == 23, "changed code must not find old weights"


def test_write_file_is_atomic(tmp_path):
    path = tmp_path / "new" / "file"
    lib.write_file(path, lambda p: p.write_text("old"))

    def killed(temporary):
        temporary.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lib.write_file(path, killed)
    assert path.read_text() == "old", "write beside the file, then move"


def test_readouts_recover_a_planted_layer():
    model, (xs, ys) = torch.nn.Linear(1, 1), some(20, 6, 3)
    model.states = lambda xs, ys: torch.stack([xs, xs.flip(-1) + 0 * ys[..., None]])
    planted = xs @ torch.tensor([1.0, 2, 3]).double() - 5
    readouts = lib.fit_readouts(model, xs, planted)
    near(readouts, [[1, 2, 3, -5], [3, 2, 1, -5]], "one readout per layer, with a constant", 1e-6)
    near(lib.layer_predictions(model, readouts, xs, ys), planted.expand(2, -1, -1), "answers", 1e-6)
    chunks = list(lib.probe_features(model, xs, ys, chunk=7))
    assert len(chunks) == 3, "chunks of 7, 7 and 6"
    near(torch.cat(chunks, 1), *lib.probe_features(model, xs, ys), "chunking changes nothing")


# Comparing


def test_equal_error():
    counts = torch.tensor([0, 1, 2, 4, 8]).double()
    curves = torch.stack([(-counts).exp(), (-2 * counts).exp()])
    errors = torch.tensor([[-3.0, 1, -99, -1], [-3, 1, -99, -12]]).double().exp()
    near(lib.equal_error(errors, curves, counts), [[3, 0, 8, 1], [1.5, 0, 8, 6]], "interpolated")
    bumpy = torch.tensor([1, 0.1, 0.5, 0.01]).double()
    found = lib.equal_error(torch.tensor([0.1, 0.1**1.5]).double(), bumpy, torch.arange(4).double())
    near(found, [1, 2.5], "the first time; a rise of the curve is ignored", 1e-6)


def test_bootstrap_and_interval():
    near(lib.interval(torch.linspace(0, 1, 1001)), [0.025, 0.975], "the middle 95%", 1e-6)
    a, b = torch.randn(2, 400, 60).double()
    samples = lib.bootstrap(a)
    assert samples.shape == (1000, 400)
    near(samples - lib.bootstrap(b), lib.bootstrap(a - b), "bootstraps are paired")
    low, high = lib.interval(samples)
    coverage = ((low < 0) & (0 < high)).double().mean()
    assert 0.9 < coverage < 0.985, f"95% intervals cover a planted mean in {coverage:.1%}"


@pytest.mark.parametrize("t", [None, 4])
def test_climb_finds_planted_steps(t):
    (xs, ys), counts = some(40), [0, 1, 2, 4, 8]
    run = lib.newton(xs, ys, counts)
    steps, samples = lib.climb(run[[0, 2, 1, 3]], run, counts, ys, t)
    near(steps, [2, 1, 4], "layers 1..L, in steps, not in indices", 1e-6)
    near(samples.median(0).values, steps, "the same for resamples", 1e-6)
    assert samples.shape == (1000, 3)
    if t is None:
        return
    noisy = run[1:3] + torch.randn(40, 7)
    steps, samples = lib.climb(noisy, run, counts, ys, 4)
    squares = (noisy[1, :, 4] - ys[:, 4]).square().mean()
    curve = (run[..., 4] - ys[:, 4]).square().mean(1)
    near(steps, lib.equal_error(squares[None], curve, torch.tensor(counts).double()), "at t")


def test_rate():
    points = torch.tensor([99.0, -7, 1, 3, 5]).double()
    both = points.exp2(), torch.stack([points, 2 * points]).exp2()
    for worth in (lib.rate((points, torch.stack([points, 2 * points]))), lib.rate(both, log2=True)):
        near([worth[k] for k in ("value", "low", "high")], [2, 2.05, 3.95], "layers from 3 on")


def slow_lead(shape, y):
    x, scores = np.arange(3.0, 3 + len(y)), {}
    for name in ("line", "square root", "square", "logarithm", "exponential", "power law"):
        u = {"square root": np.sqrt, "square": np.square, "logarithm": np.log, "power law": np.log}
        u, v = u.get(name, np.copy)(x), np.log(y) if name in ("exponential", "power law") else y
        rss = np.square(v - np.polyval(np.polyfit(u, v, 1), u)).sum()
        rss = max(rss, 0.001 * np.square(v - v.mean()).sum())
        rss *= np.exp(np.log(y).mean()) ** 2 if v is not y else 1
        scores[name] = -len(y) / 2 * np.log10(rss)
    return scores.pop(shape) - max(scores.values())


def test_shapes_beat_their_rivals():
    x = torch.arange(3, 13).double()
    truth = {"line": 3 * x - 5, "exponential": 1.7**x, "logarithm": 20 * x.log(), "power law": x**4,
             "square root": 30 * x.sqrt() - 40, "square": 3 * x**2 - 20}  # fmt: skip
    for shape, y in truth.items():
        leads = [lib.lead_over_rivals(name, y).item() for name in truth]
        near(leads, [slow_lead(name, y.numpy()) for name in truth], f"contest for a {shape}", 1e-6)
        assert max(leads) == leads[list(truth).index(shape)] > 0, f"{shape} must win: {leads}"
    low = 0.1 * x
    near(lib.lead_over_rivals("line", low), slow_lead("line", np.maximum(low, 1)), "from 1", 1e-6)
    run = torch.stack([99 + x, x * 0, x, x])[[0, 1, 2]].flatten()
    evidence = lib.evidence("line", (run, run.expand(2, -1)))
    near(evidence["value"], slow_lead("line", run[2:].clamp_min(1).numpy()), "layers from 3 on",
         1e-6)


def test_the_papers_tables(monkeypatch):
    monkeypatch.setattr(lib.bootstrap, "__defaults__", (20,))
    few = functools.partial(lib.sample_prompts, 50)
    spy(monkeypatch, "sample_prompts", lambda count, *args, **law: few(*args, **law))
    tables = {"Newton": ("line", [2, 5, 8, 10, 14, 16, 20, 20, 21, 21], -1.69),
              "GD": ("exponential", [4, 8, 32, 64, 256, 512, 1024, 4096, 4096, 4096],
                     -0.81)}  # fmt: skip
    found = lib.rulers(tiny())[2]
    for name, (shape, table, lead) in tables.items():
        near(slow_lead(shape, np.array(table, float)), lead, name, 0.01)
        near(found[f"{name}_shape_paper"]["value"], lead, f"{name}: the paper's own table", 0.01)
    assert 2 < found["CG_5"]["value"] < 4 and 0.6 < found["CG_20"]["value"] < 1.6, found


# Verdicts

LEAST = dict(Newton_shape=1.3, Newton_shape_paper=1.3, GD_shape=1.3, GD_shape_paper=1.3,
             superlinear=0, like_OLS=0.98, like_Newton=0, products=4, products_d=4,
             products_d2=4, products_shape=1.3,
             kappa_GD=4, kappa_GD_error=4, LSTM_OGD=0, Transformer_OGD=0,
             Huang_first=1, Huang_switch=1.75)  # fmt: skip
MOST = dict(kappa_Newton=1.5, kappa_Newton_error=1.5, LSTM_layers=1.1, by_hand=1e-6, Ahn_one=0.03,
            Ahn_three=0.1, Huang_switch=2.25)  # fmt: skip


def test_verdicts():
    for key, (_, text, _, rule) in lib.claims(tiny()).items():
        if key not in LEAST | MOST:
            assert lib.verdict(rule, -9, 9) == "answer", key
        for ends, sign in ((LEAST, 1), (MOST, -1)):
            if key in ends:
                inside, outside = ends[key] + sign * 1e-9, ends[key] - sign * 1e-9
                assert lib.verdict(rule, inside, inside) == "agrees", f"{key}: {text}"
                lost = outside - 2.6 if rule == "shape" else outside
                assert lib.verdict(rule, lost, lost) == "fails", f"{key}: {text}"
                low, high = sorted([inside, outside])
                assert lib.verdict(rule, low, high) == "undecided", key
    assert lib.verdict("shape", -1.2, -1) == lib.verdict("shape", -1.4, 9) == "undecided"
    assert lib.verdict("1 .. 2", 1, 2) == "agrees" and lib.verdict("1 .. 2", 2.1, 3) == "fails"
    assert lib.claims(tiny(layers=7))["products"][-1] == "7 .."


def test_the_table_and_several_seeds(capsys):
    run = {"like_OLS": lib.measured(0.99), "by_hand": lib.measured(0), "Ahn_one": lib.measured(1)}
    results = lib.print_table(tiny(), [run])
    lines = capsys.readouterr().out.split("\n")
    assert [line.split()[0] for line in lines[2:5]] == ["agrees?", "agrees", "fails?"], lines
    assert results["Ahn_one"]["verdict"] == "fails" and results["like_OLS"]["seeds"] == [0.99]
    lib.print_table(tiny(), [run] * 3)
    assert "?" not in capsys.readouterr().out
    m, half = lib.over_seeds([lib.measured(v) for v in (1, 2, 6)]), 4.30 * math.sqrt(7 / 3)
    near([m[k] for k in ("value", "low", "high")], [3, 3 - half, 3 + half], "mean, Student's t")
    assert lib.STUDENT_T == {2: 12.71, 3: 4.3, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}


# Experiments on planted studies


def test_null_similarity_gives_deviations_to_other_prompts():
    (xs, ys), far = some(400, 6, 3, noise=1), torch.randn(1, 400, 7).double()
    steps = lib.newton(xs, ys, [4])
    real = lib.similarity_of_errors(steps + far, steps, ys).squeeze(0)
    near(lib.null_similarity(steps + far, steps, ys), real, "no structure: the null is true", 0.1)
    shrunk = steps + 0.9 * (ys - steps) + 0.01 * far  # the same direction, a tenth of the size
    null, real = lib.null_similarity(shrunk, steps, ys), lib.similarity_of_errors(shrunk, steps, ys)
    assert null.shape == (1,) and null < 0.9 < real, "structure must not survive the shuffle"
    flip = lib.null_similarity(steps + 100, steps, ys)
    assert flip.abs() < 0.3, "signs are random: a constant deviation must not stay"


@pytest.mark.parametrize("L, power, gain", [(8, 2, 6.0), (7, 2, 4.8), (8, 1, 0)])
def test_convergence_on_planted_digits(monkeypatch, L, power, gain):
    def layers(config, xs, ys):
        digits = torch.arange(config.layers + 1.0).double() ** power / 8
        return ys + 10 ** (-digits / 2)[:, None, None] * torch.ones_like(ys)

    plant_study(monkeypatch, layers)
    found = lib.convergence(tiny(d=3, n=6, layers=L))[2]["superlinear"]
    near([found[k] for k in ("value", "low", "high")], [gain / 8] * 3, "late minus early", 1e-6)


def slow_alike(a, b, ys, first=1):
    a, b = ((z - ys)[:, first:].numpy() for z in (a, b))
    return np.mean([u @ v / math.sqrt(u @ u * (v @ v)) for u, v in zip(a, b)])


def test_heatmaps_and_rates_on_a_planted_study(monkeypatch):
    noise = torch.randn(5, 90, 7).double()

    def layers(config, xs, ys):
        run = lib.newton(xs, ys, [0, 1, 3, 5, 7])
        run[:-1, :, :4] += 0.02 * noise[:-1, :, :4]
        return run

    xs, ys, s = plant_study(monkeypatch, layers)
    config = tiny(d=3, n=6)
    found, last = lib.heatmaps(config)[2], s.layers[-1]
    gd = max(slow_alike(last, step, ys) for step in s.runs["GD"][1])
    near(found["like_Newton"]["value"], 1 - gd, "similarity to Newton minus to GD", 1e-6)
    near(found["like_OLS"]["value"], slow_alike(last, s.runs["OLS"][1][0], ys), "to OLS", 1e-6)
    # A prompt that is solved to the last digit has no error, hence no direction: it counts 0.
    assert 0.9 < found["like_beyond_d"]["value"] < 1 + 1e-9, "prefixes t > d alone"
    near(found["like_null"]["value"], 0, "an exact step has no deviation to shuffle", 1e-6)
    assert found["like_Newton"]["low"] < 1 - gd < found["like_Newton"]["high"]
    found = lib.rates(config)[2]
    for ruler in ("similarity", "error_n"):
        near(found[f"Newton_{ruler}"]["value"], 2, "Newton steps 3, 5, ...: two a layer", 1e-6)
    gd = lib.climb(s.layers, s.runs["GD"][1], s.runs["GD"][0], ys, 3)
    near(found["GD_error_d"]["value"], lib.rate(gd, log2=True)["value"], "doublings, after d")
    assert set(found) == {f"{a}_{b}" for a in ("Newton", "GD") for b in
                          ("similarity", "error_n", "error_d", "shape")}  # fmt: skip


@pytest.mark.parametrize("name, factor", [("Newton", 2), ("GD", 4)])
def test_conditioning_compares_hard_with_easy(monkeypatch, name, factor):
    def layers(config, xs, ys):
        easy = {"Newton": [0, 1, 2, 3, 4], "GD": [0, 1, 2, 4, 8]}[name]
        steps = [k * (factor if config.kappa == 100 else 1) for k in easy]
        return (lib.newton if name == "Newton" else lib.gradient_descent)(xs, ys, steps)

    xs, ys, s = plant_study(monkeypatch, layers)
    calls = spy(monkeypatch, "fresh_prompts", lambda *args, purpose: (xs, ys))
    found = lib.conditioning(tiny(d=3, n=6))[2]
    for key in (f"kappa_{name}", f"kappa_{name}_error"):
        near([found[key][k] for k in ("value", "low")], [factor, factor], "hard over easy", 1e-6)
    assert [args[0].kappa for args, _ in calls] == [1, 100] and len(found) == 4


def test_lstm_ratio_and_differences(monkeypatch):
    def layers(config, xs, ys):
        if config.model == "lstm":
            ogd = lib.online_gradient_descent(xs, ys)[0]
            return torch.stack([0 * ys, ys + 3 * (ogd - ys), ogd])
        return lib.newton(xs, ys, config.layers)

    xs, ys, s = plant_study(monkeypatch, layers)
    found, (ogd,) = lib.lstm(tiny(d=3, n=6))[2], lib.online_gradient_descent(xs, ys)
    near([found["LSTM_layers"][k] for k in ("value", "low")], [9, 9], "error of layer 1 over 2's")
    rivals = [*s.runs["Newton"][1], *s.runs["GD"][1]]
    rival = max(slow_alike(ogd, z, ys) for z in rivals)
    near(found["LSTM_OGD"]["value"], 1 - rival, "to OGD, minus to Newton or GD", 1e-6)
    alike = slow_alike(s.layers[-1], ogd, ys)
    near(found["Transformer_OGD"]["value"], 1 - alike, "to Newton, minus to OGD", 1e-6)


# Products with S


def test_best_polynomials():
    xs, ys = some(300)
    for per_prefix in (True, False):
        run = lib.best_polynomials((xs, ys), (xs, ys), 6, per_prefix, degree=8)
        assert run.shape == (9, 300) and run[0].abs().max() == 0, "no product, no answer"
        miss = (run - ys[:, 6]).square().mean(1)
        assert (miss.diff() < 0).all(), "more products, a better fit"
        S, b = (z[:, 6] for z in lib.prefix_moments(xs, ys))
        lr = 0.7 / (torch.linalg.eigvalsh(S)[:, -1:] if per_prefix else 6 * torch.ones(300, 1))
        w = torch.zeros(300, 3).double()
        for k in range(1, 9):
            w = w + lr * (b - lib.times(S, w))
            gd = ((w * xs[:, 6]).sum(1) - ys[:, 6]).square().mean()
            assert miss[k] <= gd * (1 + 1e-9), f"{k} steps of GD beat the best {k} products"
        first = lr[:, 0] * (b * xs[:, 6]).sum(1)  # D = 1: a multiple of the first step
        near(run[1], first * (first @ ys[:, 6]) / (first @ first), "one product")
    other = lib.best_polynomials((xs, ys), some(5), 6, degree=8)
    assert other.shape == (9, 5), "fitted on some prompts, asked on others"


def test_products_of_planted_layers(monkeypatch):
    def layers(config, xs, ys):
        run = lib.best_polynomials((xs, ys), (xs, ys), 6)
        return run[[0, 1, 2, 4, 8]][..., None].expand(-1, -1, 7)

    xs, ys, s = plant_study(monkeypatch, layers)
    spy(monkeypatch, "fresh_prompts", lambda *args, purpose: (xs, ys))
    worth, _ = lib.worth_in_products(tiny(), s.layers, xs, ys, 6)
    near(worth, [1, 2, 4, 8], "layers that are the best of D products", 1e-3)
    found = lib.products(tiny(d=3, n=6))[2]
    near([found[k]["value"] for k in ("products", "products_growth")], [8, 2], "last, growth", 1e-3)
    assert set(found) == {f"products{end}" for end in ("", "_d", "_d2", "_growth", "_shape")}


def test_not_linear():
    xs, ys = (z.float() for z in some(300))
    for solver in (lib.newton, lib.gradient_descent):
        near(torch.stack(lib.not_linear(functools.partial(solver, steps=3), xs, ys)),
             torch.zeros(2, 4), "Newton and GD are linear", 1e-9)  # fmt: skip
    in_x, in_y = lib.not_linear(functools.partial(lib.conjugate_gradient, steps=2), xs, ys)
    assert in_x[2] < 1e-9 < 1e-4 < in_y[2], "CG is linear in the query, not in y"
    u, (in_x, in_y) = xs[:, -1, 0], lib.not_linear(lambda xs, ys: xs[None, ..., 0] ** 2, xs, ys)
    v, error = u.roll(1), 2 * (u**2 - ys[:, -1]).square().mean()
    slow = ((u + v) ** 2 / 2 - (u**2 + v**2) / math.sqrt(2)).square().mean() / error
    near(in_x, slow[None], "x_a, x_b and (x_a + x_b)/sqrt 2", 1e-5)
    near(in_y, (u**4).mean()[None] * (1 - math.sqrt(2)) ** 2 / error, "y is ignored", 1e-5)


def test_linearity_asks_the_last_layer(monkeypatch):
    cg = lib.conjugate_gradient
    xs, ys, s = plant_study(monkeypatch, lambda config, xs, ys: cg(xs, ys, [0, 1, 2]))
    s.xs, s.ys = xs.float(), ys.float()
    monkeypatch.setattr(lib, "study", lambda config: s)
    found = lib.linearity(tiny(d=3, n=6))[2]
    expected = lib.not_linear(functools.partial(cg, steps=[2]), s.xs, s.ys)
    for key, share in zip(("linear_in_x", "linear_in_y"), expected):
        near(found[key]["value"], share.item(), f"{key}: the last layer's", 1e-6)
    assert found["linear_in_y"]["note"] == f"CG {expected[1].item():.2f}"


# Newton by hand


def test_construction_is_newton(monkeypatch):
    xs, ys = some(3, 6, 3, noise=0.3)
    run = lib.construction(xs, ys, 12, 0.01)
    near(run, lib.newton(xs, ys, 12, 0.01), "step k after 1 + k layers", 1e-11)
    causal = lib.construction(xs, ys, 12, 0.01, causal=True)
    assert (causal[:, :, 1] == run[:, :, 1]).all() and (causal - run)[1:, :, 6].abs().max() > 1e-3
    moved = xs.clone()
    moved[:, 6] *= 3
    near(lib.construction(moved, ys, 3, 0.01)[..., 6], 3 * run[:4, :, 6], "the query is no key")
    few = spy(monkeypatch, "fresh_prompts", lambda *args, purpose: (xs.float(), ys.float()))
    found = lib.by_hand(tiny(d=3, n=6))[2]["by_hand"]["value"]
    assert 0 < found < 1e-6 and few[0][1] == {"purpose": 2}


def test_correction_2_equal_heads_make_the_size_of_the_score():
    one, h = torch.ones(1, 1).double(), torch.tensor([[2.0], [-3.0]]).double()
    sizes = [(one, one, one), (-one, one, one)]  # as printed: both heads with the same value
    for heads, added in ((lib.linear_heads(one, one, one), [26, -39]), (sizes, [-10, -15])):
        near(lib.relu_attention(h, heads, one) - h, [[z] for z in added], "V, -V: s; V, V: |s|")


def test_correction_3_printed_order_doubles_rounding(monkeypatch):
    xs, ys = some(16, 10, 3)
    xs = xs / 0.6 ** torch.arange(3)
    ys = lib.times(xs, torch.randn(16, 3).double())
    target, real = lib.newton(xs, ys, [30], 1e-3)[0], lib.newton_layer
    gaps = [(lib.construction(xs, ys, 30, 1e-3)[30] - target).abs().max()]

    def printed(d):
        """Keys and queries change places: scores <T x_j, x_t>."""
        ((Q, K, V), _), mlp = real(d)
        return lib.linear_heads(K, Q, V), mlp

    monkeypatch.setattr(lib, "newton_layer", printed)
    gaps.append((lib.construction(xs, ys, 30, 1e-3)[30] - target).abs().max())
    assert gaps[0] < 1e-9 < gaps[1] < 1, f"T S T forgets rounding, T S T^T doubles it: {gaps}"


# Linear attention (Ahn), softmax attention (Huang)


def test_layers_are_steps_of_preconditioned_gradient_descent():
    (xs, ys), A = some(noise=1), torch.randn(3, 3, 3).double()

    def descend(layers, X, y):
        w = np.zeros(3)
        for a in A[:layers].numpy():
            w = w - a.T @ (X.T @ (X @ w - y)) / len(y)
        return w

    run = lib.linear_transformer(A, xs, ys)
    for p, L in np.ndindex(4, 3):
        w = descend(L + 1, xs[p, :-1].numpy(), ys[p, :-1].numpy())
        near(run[L, p], w @ xs[p, -1].numpy(), "w <- w - A^T grad R(w), without the query's answer")


def test_correlated_prompts_have_their_covariances():
    Sigma, W = ((B @ B.mT + torch.eye(3)) for B in torch.randn(2, 3, 3))
    generator = torch.Generator().manual_seed(SEED)
    xs, ys = (z.double() for z in lib.correlated_prompts(30_000, 5, Sigma, W, generator))
    w = torch.linalg.lstsq(xs[:, :5], ys[:, :5, None]).solution[..., 0]
    near(lib.times(xs, w)[:, 5], ys[:, 5], "y = w.x", 0.05)
    near(xs[:, 0].mT.cov(), Sigma, "covariance of x", 0.06)
    good = torch.linalg.cond(xs[:, :5]) < 1e3
    near(w[good].mT.cov(), W, "covariance of w", 0.06)


def test_preconditioners(monkeypatch):
    M, grid = torch.randn(2, 3, 3), torch.linspace(-4, 4, 4001)[:, None, None, None]
    slow = torch.linalg.matrix_norm(M - grid * torch.eye(3)).amin(0) / torch.linalg.matrix_norm(M)
    near(lib.distance_to_identity(M), slow, "min_a ||M - a I|| / ||M||", 1e-3)
    Sigma = torch.diag(torch.tensor([1, 0.5]))
    runs = [lib.train_preconditioners(1, 20, Sigma, torch.eye(2), lr=0.3, steps=80, seed=s)
            for s in (1, 1, 2)]  # fmt: skip
    assert torch.equal(*runs[:2]) and not torch.equal(*runs[1:]) and runs[0].shape == (81, 1, 2, 2)
    best = torch.diag(1 / (1.05 * Sigma.diagonal() + 1.5 / 20))
    near(runs[0][-1, 0], best, "training finds theorem 1's A", 0.1)
    moves = torch.linalg.matrix_norm(runs[0].diff(dim=0), 2).flatten()
    assert moves[0] > 10 * moves[-1], "the learning rate decays"
    U = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1))).Q
    root, inverse = ((U * torch.tensor([1, 1, 1 / 4, 1 / 16, 1]) ** k) @ U.mT for k in (0.5, -1))
    calls = spy(monkeypatch, "train_preconditioners",
                lambda L, n, *args, **kwargs: inverse.expand(2, L, 5, 5))  # fmt: skip
    found = lib.preconditioners(tiny())[2]
    assert found["Ahn_three"]["value"] < 1e-4, "A = Sigma^-1"
    closed = lib.optimal_preconditioner(root @ root, 20)
    near(found["Ahn_one"]["value"], (inverse - closed).norm() / closed.norm(), "distance", 1e-4)
    near(calls[0][0][3], torch.eye(5), "theorem 1: w ~ N(0, I)")
    near(calls[1][0][3], inverse, "theorem 3: w ~ N(0, Sigma^-1)", 1e-4)


def test_query_losses_against_tokens_and_their_gradient():
    Q, tokens = torch.randn(4, 4).double().requires_grad_(), torch.randint(4, (3, 9))
    tokens[0][tokens[0] == 2] = 1
    counts = torch.stack([(tokens == k).sum(1) for k in range(4)], 1).double()
    losses, eye = lib.query_losses(Q, counts), torch.eye(4).double()
    moves = 0 * eye
    for k in range(4):
        attention = torch.stack([Q[row, k].softmax(0) @ eye[row] for row in tokens])
        near(losses[k].detach(), (attention - eye[k]).square().sum(1).mean().detach() / 2, "tokens")
        for a in attention.detach():
            others, a_k = (a**2).sum() - a[k] ** 2, a[k]
            moves[:, k] += a * (others - a - a_k * (1 - a_k)) / 3  # dB
            moves[k, k] += a_k * ((1 - a_k) ** 2 + a_k + a_k * (1 - a_k)) / 3  # dA
    near(-torch.autograd.grad(losses.sum(), Q)[0], moves, "closed form of dA and dB")
    assert lib.query_losses(Q, counts[:1])[2] >= 0.5, "what is absent cannot be looked up"


def test_first_step_of_train_attention():
    """At Q = 0 attention is counts / N, so the first step is known up to sampling noise."""
    path = torch.stack([lib.train_attention(4, 0.4, 2, eta=3.0, seed=s) for s in range(10)]).mean(0)
    p = torch.tensor([0.4, 0.2, 0.2, 0.2])
    a = torch.distributions.Multinomial(40, p).sample((50_000,)) / 40
    others = [(a**2).sum(1) - a[:, k] ** 2 for k in range(4)]
    A = a[:, 1] * ((1 - a[:, 1]) ** 2 + others[1])
    B = a[:, 0] * (others[1] - a[:, 0] - a[:, 1] * (1 - a[:, 1]))
    near(path[1, 2:], [3 * 0.2 * A.mean(), 3 * 0.2 * B.mean()], "A_k and B_{k,1}, a step on", 0.05)
    start = [((1 - a[:, k]) ** 2 + others[k]).mean() / 2 for k in (0, 1)]
    near(path[0], start + [0, 0], "at Q = 0", 0.02)
    excess = 0.5 * 0.9**20 + 0.5 ** torch.arange(10.0)
    assert lib.steps_above(0.1, excess, 0.1, 20) == 4, "above its floor: 1, 1/2, 1/4, 1/8"


def test_stages_on_planted_paths(monkeypatch):
    def path(K, p_1, steps, seed):
        assert p_1 == 1 / 2 or (K, p_1) == (16, 1 / 16)
        t = torch.arange(steps, dtype=torch.float64)
        rows = 0.5 ** (t / 10), 0.5 ** (t / 50), t / 2, -t + (t - K**2 // 4).relu()
        return torch.stack(rows, 1)

    monkeypatch.setattr(lib, "train_attention", path)
    found = lib.stages(tiny())[2]
    near(found["Huang_switch"]["value"], 2, "A + B is lowest at K^2/4", 1e-6)
    near(found["Huang_first"]["value"], 5, "others over first", 0.1)


# The program


@pytest.mark.parametrize("bad", [
    "--figures nonsense", "--no_such_flag 1", "--d 0", "--n -3", "--steps many", "--noise -1",
    "--kappa 0.5", "--muon_lr nan", "--width 30 --heads 4", "--width 4 --heads 4", "--preset huge",
    "--device tpu", "--model mamba", "--recipe x", "--layers 3", "--steps 6 --curriculum 2",
    "--out a_file/x", "--checkpoints a_file", "--adam_lr inf", "--seeds 0",
])  # fmt: skip
def test_bad_input_gets_one_line_and_status_2(bad, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a_file").write_text("mine")
    calls = spy(monkeypatch, "run", print)
    assert lib.main(bad.split()) == 2 and not calls, "bad input was taken for good"
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1, err
    assert bad.split()[-2].strip("-") in err or "a_file" in err, f"{err} does not name the flag"
    assert bad[:5] == "--che" or os.listdir() == ["a_file"], "nothing may be written"


def test_good_settings_help_and_failures(monkeypatch, tmp_path, capsys):
    for preset, values in lib.PRESETS.items():
        config = lib.parse_config(["--preset", preset, "--device", "cpu", "--seed", "0"])
        assert vars(config).items() >= values.items() and config.seed == 0, preset
    tiny(noise=0.0, tails=0, model="lstm", layers=2, figures="rates,rulers", d=4, n=6,
         curriculum=2)
    with pytest.raises(SystemExit):
        lib.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{field.name} " in text for field in dataclasses.fields(lib.Config))
    monkeypatch.chdir(tmp_path)
    for error, status in ((NotImplementedError("x"), 1), (KeyboardInterrupt, 130)):
        spy(monkeypatch, "run", lambda config, error=error: (_ for _ in ()).throw(error))
        assert lib.main([]) == status and capsys.readouterr().err.strip().count("\n") == 0


def test_pictures_are_drawn(tmp_path):
    curves = {"Newton a": (range(1, 4), [1, 2, 3]), "CG": (torch.ones(3), torch.rand(9, 3))}
    part = lib.panel("title", curves, log="y", heat=torch.rand(3, 4))
    near(part["curves"]["CG"]["low"], lib.interval(curves["CG"][1])[0], "a climb has an interval")
    lib.draw("title", [part] * 5).savefig(tmp_path / "x.png")
    assert lib.plain(torch.tensor([[1.23456, 2]])) == [[1.235, 2]] and lib.plain(range(2)) == [0, 1]


def test_run_makes_what_is_asked_for_every_seed(tmp_path, monkeypatch, capsys):
    calls = []

    def stub(name, config):
        calls.append((name, config.seed))
        panels = [lib.panel("p", {"CG": ([1, 2], [3, config.seed])})]
        return name, panels, {name: lib.measured(config.seed)}

    names = ("like_OLS", "by_hand")
    monkeypatch.setattr(lib, "EXPERIMENTS", {n: functools.partial(stub, n) for n in names})
    lib.run(tiny(seed=3, seeds=2, out=str(tmp_path)))
    assert calls == [(n, seed) for seed in (3, 4) for n in names[::-1]], "quick ones first"
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["claims"]["like_OLS"]["seeds"] == [3, 4] and results["settings"]["d"] == 2
    assert results["figures"]["by_hand"]["panels"][0]["curves"]["CG"]["y"] == [3, 3], "first seed"
    assert {p.name for p in tmp_path.iterdir()} == {"like_OLS.png", "by_hand.png", "results.json"}
    lib.run(tiny(figures="by_hand", out=str(tmp_path)))
    assert calls[4:] == [("by_hand", 1)]


def test_the_program_from_end_to_end(tmp_path):
    command = [sys.executable, lib.__file__, *"""--preset quick --d 2 --n 4 --width 16 --steps 30
               --layers 4 --probes 64 --prompts 32 --figures rates""".split()]
    tables = []
    for again in (False, True):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and ("step     30/30" in done.stdout) != again, done.stderr
        tables.append(json.loads((tmp_path / "figures/quick/results.json").read_text()))
    table, again = tables
    assert table["claims"] == again["claims"] and table["figures"] == again["figures"]
    assert set(table["figures"]) == {"rates"} and table["settings"]["d"] == 2
    assert (tmp_path / "figures/quick/rates.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------------
# README: every number of its tables is in a committed file


def test_the_numbers_of_the_readme_are_those_of_the_committed_files():
    rows, seen = {}, set()
    for line in PROGRAM.with_name("README.md").read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and len(cells) in (6, 7):
            rows[cells[0]] = cells
    main = json.loads((PROGRAM.parent / "figures" / "results.json").read_text("utf-8"))["claims"]

    def number(m):
        return f"{m['value']:.3g} [{m['low']:.3g}, {m['high']:.3g}]"

    for key, cells in rows.items():
        if len(cells) == 7 and key in main:
            seen.add(key)
            said = cells[6].strip("*")
            assert cells[5] == number(main[key]), f"{key}: the file has {number(main[key])}"
            assert said == main[key]["verdict"].replace("answer", ""), f"{key}: verdict {said}"
        elif found := re.search(r"\((figures/[^)]*results.json)\)", cells[1]):
            side = json.loads((PROGRAM.parent / found[1]).read_text("utf-8"))["claims"]
            names = "Newton_similarity Newton_error_n products products_growth like_OLS".split()
            for name in names:
                if name in side:
                    seen.add(found[1] + name)
                    assert number(side[name]) in " ".join(cells), f"{key}: {name} in {found[1]}"
    assert set(main) <= seen, f"missing in the README: {set(main) - seen}"


if __name__ == "__main__":
    try:
        write_homework(*sys.argv[1:])
    except (TypeError, ValueError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
