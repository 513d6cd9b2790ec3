"""
Tests of icl_newton.py, and the grader of its exercises.

    python -m pytest                      everything
    python -m pytest -k test_ex           the exercises: one line each, with points
    python -m pytest -k ex04              one exercise

Data are drawn anew in every run; a failing test prints ICL_SEED, and setting it repeats the run.
"""

import functools
import os
import re
from unittest import mock

import pytest
import torch

import icl_newton

SEED = int(os.environ.get("ICL_SEED", torch.seed() % 10**6))
torch.set_num_threads(1)  # small tensors: a second thread would only wait

EXERCISES = {  # number, function: minutes, points
    (1, "sample_prompts"): (30, 10), (2, "gradient_descent"): (25, 10), (3, "newton_start"): (15, 5),
    (4, "newton"): (30, 15), (5, "interleave"): (15, 5), (6, "least_squares_readout"): (20, 10),
    (7, "similarity_of_errors"): (20, 10), (8, "linear_heads"): (15, 5), (9, "newton_layer"): (45, 15),
    (10, "optimal_preconditioner"): (45, 15)}
pytest_plugins = __name__  # makes pytest call this file's hooks, the two functions below


def pytest_configure(config):
    """Exercises are reported in the summary's single lines, not in tracebacks."""
    if "ex" in config.option.keyword and config.option.tbstyle == "auto":
        config.option.tbstyle = "no"
        config.pluginmanager.get_plugin("terminalreporter").reportchars = ""


def pytest_terminal_summary(terminalreporter):
    """A line for every exercise that was run: its points, and the first thing that is wrong."""
    score = {}  # {number: [] or what is wrong}
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            for number in re.findall(r"test_ex(\d\d)", report.nodeid):
                crash = getattr(report.longrepr, "reprcrash", None)
                said = crash.message.splitlines()[0] if crash else outcome
                score.setdefault(int(number), []).extend([said] * (outcome != "passed"))
    rows = [(*key, points, score[key[0]]) for key, (_, points) in EXERCISES.items() if key[0] in score]
    for number, name, points, wrong in rows:
        line = f"  ex{number:02} {name:<24}{0 if wrong else points:>3} of {points:<3} {' '.join(wrong[:1])}"
        terminalreporter.write_line(line.rstrip())
    got, most = sum(row[2] for row in rows if not row[3]), sum(row[2] for row in rows)
    terminalreporter.write_line(f"  {got} of {most} points (to repeat: ICL_SEED={SEED})" if rows else "")


@pytest.fixture(autouse=True)
def icl():
    """The program. Every test starts from the run's seed, so that ICL_SEED repeats it alone."""
    print(f"ICL_SEED={SEED}")
    torch.manual_seed(SEED)
    return icl_newton


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


def planted_moments(*batch, d, zeros=0):
    """Moments S and b of known eigenvalues (..., d), some of them 0, and eigenvectors U."""
    U, values = orthonormal(*batch, d, d), torch.linspace(0.1, 0.3, d).double()
    values = values * (1 + torch.rand(*batch, 1))
    values[..., :zeros] = 0
    S = (U * values[..., None, :]) @ U.mT
    return S, (S @ draws(*batch, d, 1))[..., 0], values, U


def check_solver(solver, left, **options):
    """Check a trajectory; left(eigenvalues, k): the shares of the way that k steps leave."""
    for steps, batch, d, zeros, why in (
        (5, (3, 2), 4, 0, "sign, factor, size of a step, or in-place"),
        (300, (2,), 3, 0, "rounding grew: float32, or the order of M S M"),
        (6, (2,), 5, 2, "fewer examples than dimensions"),
        (3, (2, 2), 3, 3, "no example: S = 0 and b = 0"),
        (2, (), 1, 0, "one S, d = 1"), (0, (2,), 2, 0, "no step: step 0 alone"),
    ):
        S, b, values, U = planted_moments(*batch, d=d, zeros=zeros)
        inverse = torch.where(values > 0, 1 / values, 0)
        shares = torch.stack([1 - left(values, k) for k in range(steps + 1)])
        expected = torch.einsum("...ij,k...j,...lj,...l->k...i", U, shares * inverse, U, b)
        close(call(solver, S, b, steps=steps, **options), expected, f"(steps+1, ..., d): {why}")


def test_ex01_shapes_and_generator(icl):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for P, n, d, law in ((3, 4, 2, {}), (2, 1, 1, dict(kappa=7.0)), (1, 5, 3, dict(noise=0.1))):
        xs, ys = icl.sample_prompts(P, n, d, **law)
        check_form(xs, (P, n + 1, d), "xs (prompts, n+1, d)", torch.float32)
        check_form(ys, (P, n + 1), "ys (prompts, n+1)", torch.float32)
        assert not torch.equal(xs, icl.sample_prompts(P, n, d, **law)[0]), "two calls, same prompts"
        g, again = (torch.Generator(device).manual_seed(SEED) for _ in range(2))
        a, b, c = (icl.sample_prompts(P, n, d, generator=z, **law)[1] for z in (g, again, g))
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
    x = icl.sample_prompts(15_000, 1, 3, kappa=1e4)[0][:, 0].double()  # along the basis' first axis
    u = x / x.norm(dim=1, keepdim=True)
    why = "each prompt needs its own eigenbasis, and a uniform one: made of *normal* numbers"
    check_standard(3**0.5 * u, why, 0.05)
    assert abs((u**4).sum(-1).mean() - 0.6) < 0.008, why


def test_ex01_rule_and_noise(icl):
    """One w* explains a prompt; what the same draws gain with more noise is the noise."""
    for kappa in (1.0, 25.0):
        (x, y), (_, less), (_, more) = ([z.double() for z in icl.sample_prompts(
            3000, 7, 3, kappa, noise, torch.Generator().manual_seed(SEED))]
            for noise in (0.0, 0.4, 1.4))  # fmt: skip
        w = torch.linalg.pinv(x) @ y[..., None]
        missed = ((x @ w)[..., 0] - y).abs().amax(1) / y.abs().amax(1)
        assert missed.max() < 1e-3, "without noise y = w*.x, one w* a prompt, for the x returned"
        check_standard(w[..., 0], "w* ~ N(0, I), one a prompt; y comes from the *finished* x", 0.18)
        assert abs((w**4).mean() - 3) < 0.7, "w* is not normal"
        noise = more - less
        check_standard(noise, "noise: *standard deviation*; every y, the last too, its own", 0.18)
        far = noise[x.norm(dim=-1) > x.norm(dim=-1).median()]
        assert abs(far.square().mean() - 1) < 0.1, "noise must not depend on x"


def test_ex02_trajectories(icl):
    check_solver(icl.gradient_descent, lambda z, k: (1 - z / z[..., -1:].clamp_min(1e-9)) ** k)


def test_ex03_each_matrix_has_its_safe_alpha(icl):
    for batch, d, scale, dtype in (((), 3, 1, torch.float64), ((4,), 1, 1e-3, torch.float32),
                                   ((2, 3), 4, 1e3, torch.float64)):  # fmt: skip
        X = scale * draws(*batch, d + 9, d)
        X[0] = 0  # the empty prefix, if there is a batch
        S = (X.mT @ X).to(dtype)
        alpha = call(icl.newton_start, S)
        check_form(alpha, (*batch, 1, 1), "a finite alpha for each S, S = 0 too", dtype)
        S, alpha = S[S[..., 0, 0] > 0].double(), alpha[S[..., 0, 0] > 0].double()
        largest = torch.linalg.eigvalsh(S)[..., -1:, None]
        assert (alpha * largest**2 <= 1 + 1e-5).all(), "alpha lambda_max^2 above 1: R_0 is negative"
        assert (alpha * largest**2 >= 0.9 / d**2).all(), "too small: every halving costs a step"


def test_ex04_trajectories(icl):
    for alpha in (4.0, 0.0):  # 0 is a number like any other: only None means the default
        check_solver(icl.newton, lambda z, k: (1 - alpha * z**2) ** (2.0**k), alpha=alpha)
    with mock.patch.object(icl, "newton_start", lambda S: 0.7 / ((S @ S).diagonal(
            dim1=-2, dim2=-1).sum(-1)[..., None, None] + 1e-30)):  # fmt: skip
        S, b, values, U = planted_moments(5, d=4)
        scale = torch.tensor([0, 1, 1e-6, 1e6, 3]).double()[:, None]
        run = call(icl.newton, S * scale[..., None], b * scale, steps=30)
        goal = torch.einsum("pij,pj,plj,pl->pi", U, 1 / values, U, b) * (scale > 0)
        close(run[-1], goal, "the default alpha must suit each prefix, S = 0 too", 1e-6)


def test_ex05_tokens(icl):
    for P, n, d, dtype in ((3, 4, 3, torch.double), (2, 3, 1, torch.float), (1, 0, 2, torch.float)):
        xs, ys = draws(P, n + 1, d).to(dtype), draws(P, n + 1).to(dtype)
        tokens = call(icl.interleave, xs, ys)
        check_form(tokens, (P, 2 * n + 1, d), "(P, 2n+1, d): the last y is left out", dtype)
        assert torch.equal(tokens[:, ::2], xs), "x_1, x_2, ... stand at the even positions"
        assert torch.equal(tokens[:, 1::2, 0], ys[:, :n]), "y_t follows x_t, in the first entry"
        assert not tokens[:, 1::2, 1:].any(), "y is padded with zeros"


def test_ex06_planted_readout(icl):
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


def test_ex07_cosines(icl):
    for A, B, P, n, dtype, size in ((3, 2, 4, 5, torch.double, 1e-4), (1, 4, 3, 1, torch.float, 1)):
        a, b, ys = draws(A, P, n + 1), draws(B, P, n + 1), 10 * draws(P, n + 1)
        a, b = (z / z[..., 1:].norm(dim=-1, keepdim=True) for z in (a, b))
        a[:, 0] = 0
        expected = torch.stack([(one * b)[..., 1:].sum(-1) for one in a]).mean(-1)
        size = size * torch.arange(1.0, P + 1)[:, None]
        inputs = [z.to(dtype) for z in (size * a + ys, size * b + ys, ys)]
        why = "mean over prompts of the cosine of prediction - y over t = 1..n; 0 for an error of 0"
        close(call(icl.similarity_of_errors, *inputs), expected, why, 5e-4)


def test_ex08_linear_heads(icl):
    Q, K, V, h = draws(2, 3), draws(2, 3), draws(3, 3), draws(5, 3)
    added = icl.relu_attention(h, icl.linear_heads(Q, K, V), torch.ones(5, 5).double()) - h
    close(added, (h @ Q.mT) @ (h @ K.mT).mT @ (h @ V.mT), "two heads add s V, sign and all")


def test_ex09_newton_layer(icl):
    for n, d, width in ((7, 3, 7), (3, 5, 11), (3, 1, 3)):
        with mock.patch.object(icl, "linear_heads", lambda Q, K, V: [(Q, K, V), (-Q, K, -V)]):
            (one, two), (up, down) = icl.newton_layer(d)
        shapes = [(d, width), (d, width), (width, width)] * 2 + [(2 * d, width), (width, 2 * d)]
        for matrix, shape in zip([*one, *two, up, down], shapes, strict=True):
            check_form(matrix, shape, "two heads (Q, K, V), then mlp = (up, down)")
        X, T, y = draws(n + 1, d), draws(d, d), draws(n + 1, 1)
        h, S = torch.hstack([X @ T.mT, X, y]), X[:n].mT @ X[:n]  # the last token is a query
        mask = (torch.arange(n + 1) < n).double()
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
            (0, "the trace of Sigma is missing: it comes from E S^2"),
            (1, "the trace of Sigma goes over n"),
            (1 / n - values / n / values.sum(), "n, not n+1: E S^2 is not (E S)^2"),
        ):
            assert (rest - wrong).abs().max() > 1e-4, mistake
        close(rest, torch.full((d,), 1 / n), "where the derivative of the expected loss is 0", 1e-3)


# ------------------------------------------------------------------------------------------------
# For lecturers (the student's copy ends above). Homework: python test_icl_newton.py FOLDER

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

PROGRAM = Path(__file__).with_name("icl_newton.py")
TEXT = PROGRAM.read_text("utf-8")
NUMBERS = {name: number for number, name in EXERCISES}
HEADS, ANSWERS, STUBS = {}, {}, {}  # of each function: to the docstring's end; the rest; no answer
for f in ast.parse(TEXT).body:
    if (name := getattr(f, "name", None)) in NUMBERS:
        lines, start = TEXT.splitlines(keepends=True), f.body[0].end_lineno
        HEADS[name] = "".join(lines[f.lineno - 1 : start])
        ANSWERS[name] = "".join(lines[start : f.end_lineno])
        STUBS[name] = f'    raise NotImplementedError("exercise {NUMBERS[name]}: {name}")\n'

WRONG = [  # function, what stands in its answer, what a wrong answer has there
    ("sample_prompts", ".sqrt()) @ basis", ") @ basis"),
    ("sample_prompts", "draw(prompts, d, d)", "draw(1, d, d)"),
    ("sample_prompts", "noise * draw(prompts, n + 1)", "noise * draw(prompts, 1)"),
    ("gradient_descent", "- eta * (times(S, weights[-1]) - b)", "- eta * times(S, weights[-1]) + b"),
    ("gradient_descent", "eigvalsh(S)[..., -1:]", "eigvalsh(S).max()"),
    ("newton_start", "return 1", "return 2 * S.shape[-1]"),
    ("newton_start", "S @ S.mT", "S"),
    ("newton_start", ".clamp_min(TINY)", ""),
    ("newton", "M @ S @ M", "S @ M @ M"),
    ("newton", "newton_start(S) if alpha is None else alpha", "alpha or newton_start(S)"),
    ("newton", "2 * M", "1.9 * M"),
    ("newton", "newton_start(S) if", "newton_start(S).min() if"),
    ("interleave", "[:, :-1]", ""),
    ("interleave", "(0, xs.shape[-1] - 1)", "(xs.shape[-1] - 1, 0)"),
    ("least_squares_readout", "H.mT @ H,", "H.mT @ H + 1e-8 * torch.eye(H.shape[-1]).to(H),"),
    ("least_squares_readout", "times(H.mT, y)", "times(H.mT, y - y.mean())"),
    ("similarity_of_errors", "[..., 1:]", ""),
    ("similarity_of_errors", "z.double() - ys", "z.double()"),
    ("similarity_of_errors", "/ ys.shape[0]", "/ ys.shape[1]"),
    ("linear_heads", "(-Q, K, -V)", "(-Q, K, V)"),
    ("newton_layer", "V=-0.5", "V=0.5"),
    ("newton_layer", "Q=Tx, K=x", "Q=x, K=Tx"),
    ("newton_layer", "[Tx, -Tx]", "[Tx, 0 * Tx]"),
    ("optimal_preconditioner", "(n + 1) / n *", "1 *"),
    ("optimal_preconditioner", "eigenvalues.sum() / n", "eigenvalues.sum()")]
RIGHT = [
    ("newton_start", "torch.linalg.matrix_norm(S @ S.mT, keepdim=True)", "(S @ S).abs().sum((-2, -1), True)"),
    ("newton", "2 * M - M @ S @ M", "M @ (2 * torch.eye(S.shape[-1]).to(S) - S @ M)"),
    ("least_squares_readout", "ols(H.mT @ H, times(H.mT, y))", "times(torch.linalg.pinv(H), y)"),
    ("newton_layer", "return heads,", "return heads[::-1],"), *((name, "", "") for name in NUMBERS)]


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


@pytest.mark.parametrize("change", WRONG + RIGHT, ids=lambda change: " ".join(change)[:60])
def test_wrong_answers_fail_and_right_ones_pass(change):
    name, old, new = change
    assert old in ANSWERS[name], "nothing changes"
    found = failure(NUMBERS[name], STUBS | {name: ANSWERS[name].replace(old, new)})
    assert (found is None) == (change in RIGHT), found


SHEETS = {  # title: (exercises, what to read, text); lines that begin with > are for lecturers
    "1. How fast does Newton converge?": ((1, 4), "sections 1 to 3 of icl_newton.py (25 minutes)", """
Afterwards you can sample regressions of any condition number, derive why Newton's digits double,
and say how many more steps gradient descent needs and why. Predict, in a line each, before you begin:

1. Halve alpha in Newton's start, and eta in GD. How many more steps does each need?
> Newton about one, whatever the number: 2^k takes the factor in a step. GD twice as many.
2. S has condition number 100 in place of 1, and *every* direction must be found. By which factor
   grow GD's steps, and by how many steps grow Newton's?
> GD's 100 times, Newton's by 2 log2 100 = 13: 2^k = kappa^2. For a large error fewer.

One paragraph (5 points, graded by hand): Newton's R_k is squared in every step, yet the first steps
hardly lower the error. Explain with eigenvalues what the first steps do gain.
> The share left is (1 - alpha lambda^2)^(2^k), about 1 while 2^k alpha lambda^2 << 1. Each step widens
> the set of directions found, lambda > lambda_max 2^(-k/2); digits double once all are found.
"""),
    "2. What does a layer know?": ((5, 7), "sections 4 to 9 (35 minutes; sheet 1 is needed)", """
Afterwards you can build a prompt of tokens, read a prediction out of every layer, compare two
learners by two rulers, and say what each cannot tell. When all of sheets 1 and 2 pass, run
`python icl_newton.py --preset quick`, then `--figures rates,heatmaps,products`. Predict before you run:

1. A layer's errors have similarity .97 with a Newton step's. Is the layer a Newton step?
> At t < d most of an error no method can avoid; deviations shuffled over prompts score nearly so.
2. Put conjugate gradient in the layers' place. Which Newton step does its step 4 match at d = 20?
> About 8, though it is first-order; later its steps are worth less and less: its curve is concave.

One paragraph (5 points, graded by hand): from `rates` and `products` of your own run, is a layer a
Newton step? Name one number for it, one against it, and what a second seed would have to show.
> Looked for: both rulers, the control CG, and that a rate alone does not identify an algorithm.
"""),
    "3. Weights by hand, weights by theory": ((8, 10), "sections 11 to 13 (25 minutes)", """
Afterwards you can write weights of attention that run Newton's method, and derive what one layer of
linear attention learns. When all pass, run `--figures by_hand,preconditioners,stages`. Predict first:

1. With a causal mask, what goes wrong in the hand-written layers?
> Every x_j would carry its own prefix's T, so the sums are not T S T of one S.
2. With n = 20 examples, does the best one-layer A stretch small eigenvalues of Sigma as 1/lambda does?
> Less: the trace of Sigma, over n, is added to each eigenvalue before the inverse.

One paragraph (5 points, graded by hand): derive the A of exercise 10 from the expected loss.
> E (w.x_q - x_q^T A^T S w / n)^2 is quadratic in A; E S^2 = n (n+1) Sigma^2 + n tr(Sigma) Sigma.
""")}


def sheet_text(title):
    """A sheet in Markdown, lecturers' lines too."""
    (first, last), reading, text = SHEETS[title]
    rows = [(number, name, *z) for (number, name), z in EXERCISES.items() if first <= number <= last]
    table = "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)
    return f"""# {title}\n\nRead {reading}.\n{text}
## Exercises {first} to {last}

Where icl_newton.py raises NotImplementedError, write what the docstring promises, for every argument
and on the edges: no example yet (S = 0), fewer than d, d = 1, 0 steps. No exercise needs another.
`python -m pytest -k test_ex` grades all, a line each, `python -m pytest -k ex{first:02}` one.

| number | function | minutes | points |
|---|---|---|---|
{table}"""


def write_homework(folder):
    """The student's folder, and <folder>-LECTURERS.md beside it. ValueError if there is work."""
    folder = Path(folder).resolve()
    lecturers = folder.with_name(folder.name + "-LECTURERS.md")
    if lecturers.exists() or folder.is_file() or folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} has work in it, or {lecturers.name} exists: nothing is written")
    tests = Path(__file__).read_text("utf-8").split("\n# For lecturers")[0].rstrip("-# \n") + "\n"
    files = {"icl_newton.py": TEXT, "test_icl_newton.py": tests}
    for name, head in HEADS.items():
        files["icl_newton.py"] = files["icl_newton.py"].replace(head + ANSWERS[name], head + STUBS[name])
    for title in SHEETS:
        files[f"SHEET{title[0]}.md"] = re.sub("(?m)^> .*\n", "", sheet_text(title))
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, "utf-8")
    solutions = "\n\n".join(HEADS[name] + ANSWERS[name] for name in HEADS)
    everything = "\n".join(map(sheet_text, SHEETS))
    lecturers.write_text(f"{everything}\n```python\n{solutions}```\n", "utf-8")


def shell(folder, *command):
    return subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)


def test_homework(tmp_path):
    week, grade = tmp_path / "week1", "-m pytest -q -p no:cacheprovider -k test_ex".split()
    assert shell(tmp_path, __file__, "week1").returncode == 0
    everything = "".join(path.read_text("utf-8") for path in week.iterdir())
    lecturers = (tmp_path / "week1-LECTURERS.md").read_text("utf-8")
    hidden = re.findall("(?m)^> .*", "".join(text for *_, text in SHEETS.values()))
    for answer in [*ANSWERS.values(), *hidden]:
        assert answer in lecturers and answer not in everything, answer
    assert all(stub in everything for stub in STUBS.values()) and len(STUBS) == 10
    assert "WRONG" not in everything and "lecturers" not in everything
    result = shell(week, *grade).stdout
    assert "  0 of 100 points" in result and " passed" not in result, result[-2000:]
    assert "Traceback" not in result and result.count("exercise 4: newton") == 1, result
    (week / "icl_newton.py").write_text(TEXT, "utf-8")
    assert "  100 of 100 points" in (result := shell(week, *grade).stdout), result[-2000:]
    for bad in ("week1", "week1-LECTURERS.md", "--help", ""):  # work in it; a file; no folder
        run = shell(tmp_path, __file__, *bad.split())
        assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert len(list(tmp_path.iterdir())) == 2, "nothing else is written"


# --------------------------------------------------------------------------------------------------
# Everything but the exercises

import dataclasses
import json
import math
import runpy

import numpy as np
import torch.nn.functional as F

lib, near = icl_newton, functools.partial(close, dtype=None)


def tiny(**changes):
    small = dict(d=3, n=6, layers=4, width=8, heads=2, steps=12, tuning=5, batch=8, curriculum=0)
    return lib.Config(**small | dict(prompts=32, device="cpu") | changes)


def some(count=60, n=6, d=3):
    xs = draws(count, n + 1, d) * 0.6 ** torch.arange(d)
    return xs, (xs @ draws(count, d, 1))[..., 0]


@pytest.fixture
def plant(monkeypatch):
    """plant(name, function) puts it in the program's place and returns its calls."""

    def plant(name, function=None):
        stand_in = mock.Mock(side_effect=function or getattr(lib, name))
        monkeypatch.setattr(lib, name, stand_in)
        return stand_in.call_args_list

    return plant


def test_fresh_prompts():
    law = dict(n=30, noise=0.5, kappa=1e4)
    xs, ys = lib.fresh_prompts(tiny(**law), 200, 1)
    for seed, purpose in ((1, 2), (2, 1)):
        other = lib.fresh_prompts(tiny(seed=seed, **law), 200, purpose)[0]
        assert torch.isin(xs, other).float().mean() < 0.01, "purposes and seeds share prompts"
    rest = ys[..., None] - xs @ torch.linalg.pinv(xs) @ ys[..., None]
    near(rest.square().sum() / 200 / 28, 0.25, "noise", 0.1)
    assert torch.linalg.cond(xs).median() > 20, "kappa"


def test_moments_and_solvers():
    xs, ys = orthonormal(4, 7, 3, 3).flatten(1, 2)[:, :7] / torch.tensor([1, 2, 5]), draws(4, 7)
    for ridge in (0, 0.7):
        S, b = lib.prefix_moments(xs, ys, ridge)
        for t in range(7):
            X, y = xs[:, :t], ys[:, :t, None]
            near(S[:, t] + 9, X.mT @ X + ridge * torch.eye(3).double() + 9, "S before x_{t+1}, + ridge I")
            near(b[:, t] + 9, (X.mT @ y)[..., 0] + 9, "b before y_{t+1}")
        w, K = [0 * b], b[..., None]
        for _ in range(3):  # the best w in the span of b, S b, ...
            w.append((K @ torch.linalg.pinv(K.mT @ S @ K, rtol=1e-11) @ (K.mT @ b[..., None]))[..., 0])
            K = torch.cat([K, S @ K[..., -1:]], -1)
        near(lib.conjugate_gradient(S, b, 5), torch.stack([*w, w[-1], w[-1]]), "CG", 1e-6)
        near(lib.ols(S, b), w[-1], "least squares", 1e-6)
        near(lib.predict(lib.ols(S, b), xs), (w[-1] * xs).sum(-1), "w.x", 1e-6)
        gd = lib.gradient_descent(S, b, 64)[[0, 1, 2, 7, 64]]
        near(lib.gradient_descent_after(S, b, [0, 1, 2, 7, 64]), gd, "GD after some counts of steps")
    small = torch.diag(torch.tensor([1, 1e-8])).double()
    near(lib.ols(small, small.sum(1)), [1, 1], "1e-8 is no rounding", 1e-6)


def last_prefix(xs, ys):
    """S and b after n examples, and the answers of weights (..., prompts, d) to the last query."""
    S, b = (z[:, -1] for z in lib.prefix_moments(xs, ys))
    return S, b, lambda weights: (weights * xs[:, -1]).sum(-1)


def test_correction_1_the_printed_alpha_stalls():
    xs, ys = some()
    S, b, answer = last_prefix(xs, ys)
    edge = 2 / torch.linalg.matrix_norm(S @ S, 2)[:, None, None]
    for alpha, stalls in ((edge, True), (None, False)):
        miss = (answer(lib.newton(S, b, 40, alpha)[-1]) - ys[:, -1]).abs().median()
        assert (miss > 1e-4) == stalls, "2/||S S^T||_2 stalls, the default does not"


def test_correction_2_heads_of_equal_value():
    one, h = torch.ones(1, 1).double(), torch.tensor([[2.0], [-3.0]]).double()
    printed = [(one, one, one), (-one, one, one)]  # both heads with the same value
    for heads, added in ((lib.linear_heads(one, one, one), [26, -39]), (printed, [-10, -15])):
        near((lib.relu_attention(h, heads, one) - h)[:, 0], added, "V, -V: s; V, V: |s|")


def test_correction_3_printed_order(plant):
    (xs, ys), real = some(16, 10), lib.newton_layer
    S, b, answer = last_prefix(xs, ys)
    alpha = lib.newton_start(S).min()
    exact = answer(lib.newton(S, b, 40, alpha))
    near(lib.construction(xs, ys, 40, alpha) + 9, exact + 9, "step k after k + 2 layers", 1e-9)
    plant("newton_layer", lambda d: ([(K, Q, V) for Q, K, V in real(d)[0]], real(d)[1]))
    gap = lib.construction(xs, ys, 40, alpha)[-1] - exact[-1]
    assert gap.abs().max() > 1e-7, "T S T forgets rounding, T S T^T doubles it"


def test_correction_4_gd_off_the_span():
    (xs, ys), start = some(300, 20, 9), torch.rand(300, 9, 1).double()
    goal = lib.predict(lib.ols(*lib.prefix_moments(xs, ys)), xs)[None]
    for shift, capped in (((xs @ start)[..., 0], True), (0, False)):  # of y, as w_0 is one of w
        S, b = lib.prefix_moments(xs, ys - shift)
        run = lib.predict(lib.gradient_descent_after(S, b, [2**30]), xs) + shift
        alike = lib.similarity_of_errors(run, goal, ys)
        assert alike < 0.97 if capped else alike > 0.999, "GD becomes OLS from w_0 = 0 alone"


def test_transformer_head_by_head():
    def norm(z):
        return (z - z.mean(-1, True)) / (z.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()

    model, (xs, ys) = lib.Transformer(tiny(n=8)).double().requires_grad_(False), some()
    model.read_out.normal_()
    h = lib.interleave(xs, ys) @ model.read_in.mT + model.positions[:13]
    states, future = [norm(h[:, ::2])], torch.ones(13, 13).triu(1).bool()
    for (Q, K, V, O), (up, down) in zip(model.attention, model.mlp):
        q, k, v = (torch.stack((norm(h) @ M.mT).split(4, -1)) for M in (Q, K, V))
        scores = (norm(q) @ norm(k).mT / 2).masked_fill(future, -math.inf)
        h = h + torch.cat([*(scores.softmax(-1) @ v)], -1) @ O.mT
        a = norm(h) @ up.mT
        h = h + a * a.sigmoid() @ down
        states.append(norm(h[:, ::2]))
    near(model.states(xs, ys), torch.stack(states), "heads, mask, norms, residuals, x tokens")
    near(model(xs, ys), states[-1] @ model.read_out, "read out of the last state")


def test_initial_weights_and_optimizers():
    model = lib.Transformer(tiny(d=4, n=40, width=64)).requires_grad_(False)
    one, (*qkv, out), (up, down) = 192**-0.5, model.attention.unbind(1), model.mlp.unbind(1)
    sizes = (model.read_in, 0.5), (torch.cat(qkv), one), (up, one), (out, one / 2), (down, one / 2)
    for W, size in sizes:
        near(W.std() / size, 1, f"standard deviation of {tuple(W.shape)}", 0.2)
    angles = torch.arange(81)[:, None] * torch.logspace(0, -2, 32).double()
    near(model.positions / 0.3, torch.cat([angles.sin(), angles.cos()], 1), "sinusoids", 1e-4)
    (adam,) = lib.make_optimizers(model, tiny(recipe="fu"))
    assert adam.defaults["lr"] == 1e-4 and len(adam.param_groups[0]["params"]) == 5
    assert [z.defaults["lr"] for z in lib.make_optimizers(model, tiny(muon_lr=0.5))] == [0.005, 0.5]


def test_training_stays_on_its_device(plant):
    model, *data = (z.float().to("meta") for z in (lib.Transformer(tiny()), *some()))
    plant("sample_prompts", lambda *args: data)
    lib.training_step(model, lib.make_optimizers(model, tiny()), tiny(), 0, None)
    assert model.states(*data).is_meta, "a tensor was made on the CPU"


@pytest.mark.parametrize("shape", [(7, 5, 3), (7, 3, 3)])
def test_muon(shape):
    p, average = torch.nn.Parameter(draws(*shape)), 0
    optimizer, slow = lib.Muon([p], dict(lr=0.1, momentum=0.8)), p.detach().clone()
    for _ in range(2):
        p.grad = draws(*shape)
        average = 0.8 * average + 0.2 * p.grad
        U, s, V = torch.linalg.svd(0.2 * p.grad + 0.8 * average, full_matrices=False)
        s = s / s.norm(dim=1, keepdim=True)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        slow -= 0.1 * 0.2 * math.sqrt(shape[1]) * U * s[:, None] @ V
        optimizer.step()
        near(p.detach(), slow, "average, look ahead, .2 lr sqrt(larger side)")


@pytest.mark.parametrize("recipe", ["muon", "fu"])
def test_training_step_by_hand(recipe, plant):
    model, config, (xs, ys) = torch.nn.Module(), tiny(recipe=recipe, steps=300), some()
    xs[:, 4] = ys[:, 4] = 0  # no error at all
    model.w, x = torch.nn.Parameter(draws(7)), xs[..., 0]
    model.forward = lambda xs, ys: model.w * xs[..., 0]
    calls = plant("sample_prompts", lambda *args: (xs, ys))
    for step, factor in ((7, 0.08 * 293 / 300), (98, 0.99 * 202 / 300), (299, 1 / 300)):
        w = model.w.detach().clone()
        e = w * x - ys
        slope = 0.75 * e.sign() * e.abs().sqrt() * x / (e.abs().pow(1.5).mean(0) + 1e-40).sqrt()
        slope, factor = (2 * e * x, 1) if recipe == "fu" else (slope, factor)
        returned = lib.training_step(model, [torch.optim.SGD([model.w], 0.5)], config, step, 0)
        near(returned, e, "returns the errors before the step")
        near(model.w.detach(), w - 0.5 * factor * slope.mean(0) / 7, "root of mean |e|^1.5; fu: squares")
    assert calls[0].args == (8, 6, 3, 1.0, 0.0, 0), "batch, n, d, kappa, noise, generator"
    for step, n, d in ((9, 6, 2), (10, 8, 3), (29, 8, 4), (30, 8, 5), (98, 8, 5)):
        lib.training_step(model, [], tiny(d=5, n=8, curriculum=10, steps=99), step, 0)
        assert calls[-1].args[1:3] == (n, d), "two dimensions and 2d + 2 examples, then more"


def test_training_resumes_to_the_bit(tmp_path, plant, monkeypatch):
    def step(*args):
        if len(calls) == 301 + 2:  # two rehearsals come first
            raise KeyboardInterrupt
        return real(*args)

    config = tiny(steps=320, checkpoints=str(tmp_path / "a"), device="auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    whole = lib.train(dataclasses.replace(config, checkpoints=str(tmp_path / "b")))
    real, calls = lib.training_step, plant("training_step", lambda *args: step(*args))
    with pytest.raises(KeyboardInterrupt):
        lib.train(config)
    first = len(calls)
    for model in lib.train(config), lib.train(config):
        for a, b in zip(whole.parameters(), model.parameters()):
            assert a.equal(b) and not b.requires_grad, "not bit for bit the same"
    steps = [c.args[3] for c in calls[first:]]
    assert steps == [0, 319, *range(250, 320), 0, 319], "goes on at the checkpoint; then at the end"
    plant("training_step", lambda *args: real(*args) * math.nan)
    with pytest.raises(FloatingPointError, match="step 12"):
        lib.train(tiny(checkpoints=str(tmp_path / "c")))
    assert not (tmp_path / "c").exists(), "a failed run is not saved"


def test_training_at_kappa_goes_on_from_kappa_1(tmp_path, plant):
    calls, config = plant("training_step"), tiny(kappa=9.0, checkpoints=str(tmp_path))
    hard, easy = lib.train(config), lib.train(dataclasses.replace(config, kappa=1.0))
    kappas = [c.args[2].kappa for c in calls]  # two of each training's are rehearsals
    assert kappas.count(1.0) == 2 + 12 + 2 and kappas.count(9.0) == 2 + 5, "once, then for `tuning`"
    assert 0 < (hard.attention - easy.attention).abs().max() < 0.2, "goes on from the network of kappa 1"
    untrained = lib.train(tiny(kappa=9.0, steps=0, tuning=0, checkpoints=str(tmp_path / "none")))
    torch.manual_seed(1)
    assert untrained.mlp.equal(lib.Transformer(tiny()).mlp) and not (tmp_path / "none").exists()


def test_checkpoint_names():
    def name(**changes):
        config = tiny(**{"n": 9} | changes)
        torch.manual_seed(config.seed)
        model, generator = lib.Transformer(config), torch.Generator().manual_seed(config.seed)
        return lib.Checkpoint(config, model, lib.make_optimizers(model, config), generator).path.name

    same = dict(seeds=2, prompts=9, figures="rates", device="auto", out="x", checkpoints="y")
    assert name() == name(**same), "these do not decide the weights"
    other = dict(d=4, n=8, kappa=2.0, noise=0.1, layers=5, width=10, heads=1, recipe="fu", steps=9,
                 tuning=9, batch=9, muon_lr=0.02, curriculum=1, seed=2)  # fmt: skip
    names = [name()] + [name(**{key: value}) for key, value in other.items()]
    for module, thing, value in (
        (torch, "__version__", "9"), (torch, "get_num_threads", lambda: 99),
        (lib, "causal_attention", lambda q, k, v: v), (lib, "orthogonalize", lambda G: G),
    ):  # fmt: skip
        with mock.patch.object(module, thing, value):
            names.append(name())
    assert len(set(names)) == len(names), "settings, torch, threads and code make another name"


def test_damaged_checkpoints(tmp_path):
    config = tiny(checkpoints=str(tmp_path))
    lib.train(config)
    (path,) = tmp_path.iterdir()
    good, saved = path.read_bytes(), torch.load(path, weights_only=True)
    torch.save(saved | {"done": 3}, path)
    for bad in (path.read_bytes(), b"", good[:99], good[:-1], good[:500] + b"x" + good[501:]):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=f"{path.name} is damaged: delete it"):
            lib.train(config)
    path.write_bytes(good)
    lib.train(config)


def test_files_are_whole_or_not_there(tmp_path):
    path = tmp_path / "new" / "deep" / "file"
    lib.write_file(path, b"old")
    with mock.patch.object(Path, "replace", side_effect=OSError(28, "No space left")):
        with pytest.raises(OSError, match="cannot write .*file: No space left"):
            lib.write_file(path, b"new")
    assert path.read_bytes() == b"old" and len(list(path.parent.iterdir())) == 1
    script = "ulimit -f 20; trap '' XFSZ; exec $0 $1 --preset quick --steps 30 --width 64"
    command = ["bash", "-c", script, sys.executable, PROGRAM]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and "cannot write" in run.stderr
    assert not [name for *_, names in os.walk(tmp_path) for name in names if name[0] == "."]


def test_the_sheet_is_shared_and_the_curves_have_one_look():
    sheet = functools.cache(lib.make_sheet)
    for label in ("GD", "GD", "Newton, late"):
        axes = sheet("a", "b", ylabel="y")
        lib.curve(axes[0], label, [1, 5])
    colors = [z.get_color() for z in axes[0].get_lines()]
    assert colors == [lib.LOOK[k][0] for k in ("GD", "GD", "Newton")]
    assert lib.draw(axes, "title")[1:4] == b"PNG"
    (legend,) = axes[0].figure.legends
    assert [z.get_text() for z in legend.get_texts()] == ["GD", "Newton, late"], "once a label"


L = 5
ORACLES = {  # name: its weights after 0..L steps
    "Newton": lambda S, b: lib.newton(S, b, L),
    "GD": lambda S, b: lib.gradient_descent(S, b, L),
    "CG": lambda S, b: lib.conjugate_gradient(S, b, L),
    "zeros": lambda S, b: torch.zeros(L + 1, *b.shape, dtype=torch.float64),
    "noise": lambda S, b: draws(L + 1, *b.shape)}  # fmt: skip


@pytest.mark.parametrize("name", ORACLES)
def test_planted_learners(name, plant):
    """Every experiment, with a learner whose numbers are known in the layers' place."""

    def layers(model, fitting, prompts):
        return lib.predict(ORACLES[name](*lib.prefix_moments(*prompts)), prompts[0])

    plant("train", lambda config: None)
    calls = plant("read_layers", layers)
    lib.study.cache_clear()
    config, found = tiny(d=8, n=16, layers=L, prompts=300), {}
    for experiment in (lib.rates, lib.convergence, lib.heatmaps, lib.products, lib.conditioning):
        axes, title, numbers = experiment(config, functools.cache(lib.make_sheet))
        drawn = [z for z in axes[0].get_lines() if z.get_label() == "Transformer"]
        assert drawn or experiment is lib.heatmaps, "the layers are not drawn"
        found |= {key: np.asarray(z, dtype=float) for key, z in numbers.items()}
        title.format(**found)
    _, (fitting, _), (judged, _) = calls[0].args
    assert len(fitting) == 4 * len(judged) == 1200 and not torch.equal(fitting[:300], judged)

    s, hard = lib.study(config), lib.study(dataclasses.replace(config, kappa=100.0))
    run = s.runs["Transformer"]

    def worth(s, t, learner, last=run[-1:]):  # of the last layer, in steps
        a, b = (((z[..., t] - s.ys[:, t]) ** 2).mean(1) for z in (last, s.runs[learner]))
        return lib.equal_error_steps(a, lib.STEPS[learner], b)

    error = [((z[:, 16] - s.ys[:, 16]) ** 2).mean().clamp_min(1e-300) for z in run]
    near(found["error"], error[-1] / 8, "the last layer's error after n examples")
    near(found["worth"], [worth(s, 16, k)[0] for k in ("Newton", "CG", "GD")], "it errs as these steps")
    digits = [torch.log10(error[i] / error[i + 1]) for i in (4, 2)]
    near(found["superlinear"], [digits[0], max(digits[1], 0.1)], "digits of late, early layers")
    alike = lib.similarity_of_errors(run[-1:], s.least_squares[None], s.ys)
    near(found["like_ols"], [alike, 0.975], "similarity to least squares")
    slow = np.polyfit([3, 4, 5], worth(s, 16, "Newton", run[3:]), 1)[0]
    near(found["equal_rate"][0], slow, "equal error after n examples, layers 3..L", 1e-6)
    for key, t in (("products_d", 8), ("products_n", 16)):
        a, best = ((run[-1:, :, t] - s.ys[:, t]) ** 2).mean(1), lib.polynomial_errors(config, t)
        near(found[key], [lib.equal_error_steps(a, range(129), best)[0], L], "products; layers", 1e-6)
    for key, learner, share in (("kappa_newton", "Newton", 1.5), ("kappa_gd", "GD", 4)):
        easy, hard_one = worth(s, 16, learner)[0], worth(hard, 16, learner, hard.runs["Transformer"][-1:])[0]
        near(found[key], [hard_one, share * max(easy, 0 if share < 2 else 1)], "hard; share of easy", 1e-6)
    for key, steps in (("newton_line", found["newton_steps"]), ("gd_exponential", found["gd_steps"])):
        fits = [lib.line_fit(z)[1] for z in (steps, lib.doublings(steps))]
        near(found[key], fits if key == "newton_line" else fits[::-1], "R^2: its shape, its rival")
    holds = {key for key, z in lib.table({k: [z.tolist()] for k, z in found.items()})[1].items() if z}
    if name == "Newton":
        near(found["newton_steps"], np.arange(1, L + 1), "Newton matches itself")
        near([found["newton_rate"][0], found["equal_rate"][0], found["newton_line"][0]], [1, 1, 1], "slope 1", 1e-6)
        near([found["like_newton"][0], found["null"]], [1, 1], "no deviation, nothing to shuffle")
        assert {"newton_line", "like_newton", "kappa_newton"} <= holds
    elif name == "GD":
        near(found["gd_steps"][[0, 1, 3]], [1, 2, 4], "steps 1, 2 and 4 match themselves")
        assert found["products_n"][0] <= L + 0.1, "GD is worth one product a step, or less"
        assert not {"like_newton", "newton_rate", "equal_rate", "products_n"} & holds
    elif name == "CG":
        rates = [lib.line_fit(lib.climb(config, "CG")[i])[0] for i in (0, 2)]
        near([found["newton_rate"][0], found["equal_rate"][0]], rates, "CG in both places")
    else:
        assert not holds - {"kappa_newton"}, holds
        assert found["products_n"][0] < 0.5 and found["newton_rate"][0] == 0
    lib.study.cache_clear()


def test_an_untrained_network_passes_no_claim_about_layers(tmp_path):
    holds = lib.run(tiny(d=5, n=10, layers=6, width=32, steps=0, tuning=0, prompts=300, out=str(tmp_path),
                         figures="rates,convergence,heatmaps,products,conditioning"))  # fmt: skip
    assert not any(holds.values()), holds


def test_rulers_by_slow_loops():
    errors, counts = torch.tensor([0.3, 9, 1e-9, 0.05]), [0, 1, 2, 3]
    found = lib.equal_error_steps(errors, counts, torch.tensor([1.0, 0.1, 0.5, 0.01]))
    near(found, [math.log10(1 / 0.3), 0, 3, 2 + math.log10(2)], "log-linear; clamped; the least so far", 1e-6)
    found = lib.equal_error_steps(torch.tensor([0.2]), [0, 4, 8], torch.tensor([1, 0.4, 0.1]).double())
    near(found, [6], "counts, not indices", 1e-6)
    y = np.array([99, -7, 3, 5, 7, 9.0])
    near([*lib.line_fit(y), *lib.line_fit(y[2:], 1)], [2, 1, 2, 1], "from layer 3 on")
    z = np.random.default_rng(0).normal(size=9)
    near(lib.line_fit(z)[1], np.corrcoef(np.arange(7), z[2:])[0, 1] ** 2, "R^2")
    assert lib.line_fit(np.ones(9))[1] == 0, "a constant is no line"
    near(lib.doublings([0, 0.5, 1, 8]), [0, 0, 0, 3], "at least one step")


def test_the_null_gives_deviations_to_other_prompts():
    ys, error = draws(2000, 5), draws(1, 2000, 5)
    newton = torch.cat([ys + error, ys + draws(1, 2000, 5)])
    for size, least, most in ((0.001, 0.999, 1.001), (0.5, 0.85, 0.95)):  # cos = 1/sqrt(1 + size^2)
        found = lib.null_similarity(ys + error * (1 + size), newton, ys)
        assert least < found < most, "its own deviation would score 1: take another prompt's"


def test_layers_are_read_by_fitted_lines():
    model = SimpleNamespace(read_out=torch.zeros(1), states=lambda xs, ys: torch.stack([xs, xs**3]))
    prompts = [(xs.float(), (xs.sum(-1) + 5).float()) for xs, _ in (some(40), some(9))]
    found = lib.read_layers(model, *prompts)
    close(found[0], prompts[1][1].double(), "y = 5 + a line of the state: the constant counts", 1e-5)
    assert found.shape == (2, 9, 7) and (found[1] - prompts[1][1]).abs().max() > 0.1


def test_best_polynomials(plant):
    (X, Y), (xs, ys) = prompts = some(200), some()
    plant("fresh_prompts", lambda *args, purpose: (X, Y))
    plant("study", lambda config: SimpleNamespace(xs=xs, ys=ys))
    found, powers = lib.polynomial_errors(tiny(), 5), []
    for x, y in prompts:
        S, b = (z[:, 5] for z in lib.prefix_moments(x, y))
        size = torch.linalg.matrix_norm(S, 2, keepdim=True)
        S, w = S / size, b[..., None] / size
        powers.append((x[:, 5, None] @ torch.cat([w, S @ w, S @ S @ w], 2))[:, 0])
    for D in (0, 1, 2, 3):
        fit, test = (z[:, :D] for z in powers)
        slow = (test @ torch.linalg.pinv(fit) @ Y[:, 5] - ys[:, 5]).square().mean()
        near(found[D], slow, f"{D} products", 1e-6)


def test_softmax_attention_by_huangs_formula():
    """Two steps of gradient descent from Q = 0, with the gradient that Huang's formulas give."""
    K, p = 4, torch.tensor([0.4, 0.2, 0.2, 0.2])
    runs = [lib.train_attention(K, 0.4, 2, seed, eta=0.7) for seed in range(300)]
    shares = torch.multinomial(p.expand(50_000, K), 10 * K, True)
    a = F.one_hot(shares, K).double().mean(1)[:, :, None].expand(-1, K, K)  # [prompt, n, k]
    expected = []
    for _ in range(2):
        loss = (a - torch.eye(K)).square().sum(1).mean(0) / 2
        expected.append([loss[0], loss[1:].mean()])
        right = a.diagonal(dim1=1, dim2=2)[:, None]  # a_k
        others = a.square().sum(1, keepdim=True) - right**2
        moves = a * (others - a - right * (1 - right))  # B_{k,n}; and A_k on the diagonal
        moves = torch.where(torch.eye(K).bool(), right * ((1 - right) ** 2 + others), moves)
        a = (a.log() + 0.7 * p * moves.mean(0)).softmax(1)
    near(torch.stack(runs).mean(0).T, torch.tensor(expected), "losses, step by step", 0.01)


def test_theory_experiments(plant):
    for experiment, key in ((lib.by_hand, "by_hand"), (lib.preconditioners, "ahn_one")):
        found, bound = experiment(tiny(), functools.cache(lib.make_sheet))[2][key]
        assert found < bound < 0.05
    path = torch.ones(2, 50) * 0.01  # above a tenth of 1: feature 1 for 5 steps, the others for 40
    path[0, :5] = path[1, :40] = 1
    plant("train_attention", lambda *args: path)
    assert lib.stages(tiny(), functools.cache(lib.make_sheet))[2]["huang"] == (8, 5)


def test_the_table_and_several_seeds(capsys, tmp_path, monkeypatch):
    def stub(config, sheet):
        axes = sheet("panel")
        lib.curve(axes[0], "CG", [config.seed])
        numbers = {"like_ols": (config.seed / 4, 0.975), "equal_rate": (2, config.seed), "error": 3.0}
        return axes, "{like_ols[0]:.2f} and {error:.0f}", numbers

    monkeypatch.setattr(lib, "EXPERIMENTS", {"rates": stub})
    holds = lib.run(tiny(figures="rates", seed=2, seeds=3, out=str(tmp_path)))
    rows = (tmp_path / "table.md").read_text().split("\n")[2:]
    assert rows[0].endswith("| 2 > 2 3 4 | 0 of 3 |") and rows[1].endswith("| 0.5 0.75 1 > 0.975 | 1 of 3 |")
    printed = capsys.readouterr().out
    assert "rates: 0.75 and 3" in printed and all(row in printed for row in rows)
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["measured"]["error"] == [3, 3, 3] and record["settings"]["seeds"] == 3
    assert record["holds"] == holds == {"equal_rate": 0, "like_ols": 1}
    lines, holds = lib.table({key: [(1.0, 1.0)] for key in lib.CLAIMS})
    assert len(lines) <= 18 and max(map(len, lines)) <= 100 and not any(holds.values()), "equal is not more"


def test_bad_input(tmp_path, monkeypatch, capsys, plant):
    monkeypatch.chdir(tmp_path)
    plant("run", AssertionError("bad input was run"))
    Path("a_file").write_text("mine")
    for bad in """figures x|no_such 1|d 1|n 6|steps x|noise -1|kappa .5|muon_lr nan|heads 3
            |preset x|device x|recipe x|layers 3|batch 0|curriculum 200|muon_lr inf|seeds 0
            |preset quick,small|out a_file/x|checkpoints a_file|seed -1|curriculum -1|muon_lr 0
            |seed 92233720368547|kappa 1e39|noise 1e30|width 1e3|prompts 1|steps 9|d 9e9
            |muon_lr 1e300|tuning -1|figures rates,|seed 1e3""".split("|"):
        with pytest.raises(SystemExit, match="2"):
            lib.main(f"--{bad}".split())
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1, f"{bad}: {err}"
        assert bad.split()[0] in err or "a_file" in err, f"{err} does not name --{bad}"
    assert Path("a_file").read_text() == "mine"


def test_good_input_and_exit_statuses(monkeypatch, tmp_path, capsys, plant):
    monkeypatch.chdir(tmp_path)
    least = "--d 2 --n 4 --layers 4 --width 2 --kappa 1 --noise 0 --curriculum 0 --seed 0"
    line, c = lib.parse(f"{least} --preset quick".split())
    assert (c.d, c.width, c.prompts, c.out, c.seed) == (2, 2, 256, "figures/quick", 0)
    assert "not to be trusted" in line and lib.parse([])[1] == lib.Config()
    for error in (FloatingPointError, ValueError, OSError, KeyboardInterrupt, MemoryError):
        plant("run", error("x"))
        assert lib.main(["--figures", "rates"]) == (130 if error is KeyboardInterrupt else 1)
        assert capsys.readouterr().err.strip().count("\n") == 0


@pytest.mark.parametrize("law", [dict(kappa=1e6), dict(seed=10**9), dict(noise=1e3), dict(prompts=2)])
def test_numbers_at_the_edge_work_to_the_end(law, tmp_path):
    plain = "rates,convergence,heatmaps,products,conditioning,by_hand"
    lib.run(tiny(figures=plain, out=str(tmp_path), checkpoints=str(tmp_path), **law))
    assert len(list(tmp_path.glob("*.png"))) == 6


def test_the_program_runs_without_its_file(tmp_path, monkeypatch):
    """In a notebook, by exec or from standard input: nothing needs the source text."""
    monkeypatch.chdir(tmp_path)
    small = "d=3, n=6, layers=4, width=8, steps=3, tuning=2, prompts=32, curriculum=0, figures='rates'"
    for scope in ({}, {"__name__": "__main__"}):
        exec(TEXT, scope)
        assert "newton_rate" in eval(f"run(Config({small}))", scope)
    assert runpy.run_path(str(PROGRAM))["Config"]().d == 20
    command = f"{TEXT}\nrun(Config({small}))\n"
    done = subprocess.run([sys.executable, "-"], input=command, capture_output=True, text=True)
    assert done.returncode == 0 and "rates:" in done.stdout, done.stderr


def test_the_readme_has_the_committed_table():
    readme, folder = PROGRAM.with_name("README.md").read_text("utf-8"), PROGRAM.with_name("figures")
    assert (folder / "three_seeds" / "table.md").read_text("utf-8") in readme
    for path in folder.glob("three_seeds*/results.json"):  # your own runs write elsewhere
        m = json.loads(path.read_text("utf-8"))["measured"]
        rate, error = (" ".join(f"{z:.2g}" for z in row) for row in (
            [pair[0] for pair in m["newton_rate"]], m["error"]))  # fmt: skip
        assert f"| {rate} | {error} |" in readme, f"{path.parent.name}: | {rate} | {error} |"


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(print("usage: python test_icl_newton.py FOLDER", file=sys.stderr) or 2)
    try:
        write_homework(sys.argv[1])
    except ValueError as error:
        sys.exit(print(error, file=sys.stderr) or 2)
