"""Tests of icl_newton.py, and the grader of its exercises: python -m pytest -k test_ex (or ex04).

Data are drawn anew in every run; a failing test prints ICL_SEED, and setting it repeats the run."""

import functools
import os
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import icl_newton

SEED = int(os.environ.get("ICL_SEED", torch.seed() % 10**6))

EXERCISES = {  # number: function, points
    1: ("sample_prompts", 10), 2: ("gradient_descent", 10), 3: ("newton_start", 5), 4: ("newton", 15),
    5: ("interleave", 5), 6: ("least_squares_readout", 10), 7: ("similarity_of_errors", 10),
    8: ("linear_heads", 5), 9: ("newton_layer", 15), 10: ("optimal_preconditioner", 15)}
pytest_plugins = __name__  # makes pytest call this file's hooks, the two functions below


def pytest_configure(config):
    """Exercises are reported in the summary's single lines, not in tracebacks."""
    if "ex" in config.option.keyword and config.option.tbstyle == "auto":
        config.option.tbstyle = "no"
        config.pluginmanager.get_plugin("terminalreporter").reportchars = ""


def pytest_terminal_summary(terminalreporter):
    """A line for every exercise that was run: its points, and the first thing that is wrong."""
    reports = [z for k in ("failed", "error", "passed") for z in terminalreporter.stats.get(k, [])]
    got = most = 0
    for number, (name, points) in EXERCISES.items():
        if mine := [z for z in reports if f"test_ex{number:02}" in z.nodeid]:
            crash = getattr(mine[0].longrepr, "reprcrash", None)
            said, score = crash and crash.message.splitlines()[0], 0 if crash else points
            terminalreporter.write_line(f"  ex{number:02} {name:<24}{score:>3} of {points:<3} {said or ''}".rstrip())
            got, most = got + score, most + points
    if most:
        terminalreporter.write_line(f"  {got} of {most} points (to repeat: ICL_SEED={SEED})")


@pytest.fixture(autouse=True)
def icl(tmp_path, monkeypatch):
    """The program. Every test starts from the run's seed, in an empty folder."""
    print(f"ICL_SEED={SEED}")
    torch.manual_seed(SEED)
    monkeypatch.chdir(tmp_path)
    yield icl_newton
    mock.patch.stopall()


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
    assert error <= tolerance, f"{message} (largest relative error {error:.1e}{': float32 or an eps inside?' if error < 1e-4 else ''})"


def check_standard(z, message, tolerance, fourth=3):
    """z (samples, d), float64, must have mean 0, covariance I and a normal's fourth moment."""
    z1 = F.pad(z, (0, 1), value=1.0)  # the last row and column hold the mean
    close(z1.mT @ z1 / len(z), torch.eye(z1.shape[1]), f"{message}: mean or covariance", tolerance)
    assert abs((z**4).mean() / fourth - 1) < 1.5 * tolerance, f"{message}: not a normal distribution"


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
        (2, (), 1, 0, "one S, d = 1"), (0, (2,), 2, 0, "no step: step 0 alone")):
        S, b, values, U = planted_moments(*batch, d=d, zeros=zeros)
        found = torch.stack([1 - left(values, k) for k in range(steps + 1)]) / values.clamp_min(1e-9)
        expected = torch.einsum("...ij,k...j,...lj,...l->k...i", U, found, U, b)
        result = call(solver, S, b, steps=steps, **options)
        close(result[:1], expected[:1], "step 0: w = 0 for GD, alpha S b for Newton (an alpha of 0 is a number, too)")
        close(result, expected, f"(steps+1, ..., d): {why}")


def test_ex01_shapes_and_generator(icl):
    for P, n, d, law in ((3, 4, 2, dict(kappa=7.0)), (2, 1, 1, {}), (1, 5, 3, dict(noise=0.1))):
        g, again = (torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(SEED) for _ in range(2))
        a, b, c, (xs, ys) = (icl.sample_prompts(P, n, d, generator=z, **law) for z in (g, again, g, None))
        check_form(xs, (P, n + 1, d), "xs (prompts, n+1, d)", torch.float32)
        check_form(ys, (P, n + 1), "ys (prompts, n+1)", torch.float32)
        assert all(map(torch.equal, a, b)), "same seed, other prompts: pass the generator to every draw"
        assert not any(map(torch.equal, a, c)), "the next draws from a generator gave the same prompts"
        assert ys.device.type == "cpu" and a[0].device.type == g.device.type, "prompts must be on the generator's device"


def test_ex01_covariance(icl):
    why = "trace d; d//2 eigenvalues are kappa times the others, and x scales by their *roots*"
    for d, kappa in ((4, 1.0), (5, 30.0), (2, 7.0), (1, 9.0)):
        values = torch.tensor([1.0] * (d - d // 2) + [kappa] * (d // 2))
        for x in icl.sample_prompts(2, 20_000, d, kappa=kappa)[0].double():
            z = x @ torch.linalg.eigh(x.mT @ x)[1] * (values.mean() / values).sqrt()
            check_standard(z, why, 0.12)
    first, query = F.normalize(icl.sample_prompts(15_000, 1, 3, kappa=1e4)[0].double(), dim=-1).unbind(1)
    assert ((first * query).sum(1).abs() > 0.9).double().mean() > 0.9, "the query has the examples' covariance"
    check_standard(3**0.5 * first, "a prompt has its own x's, its own uniform eigenbasis: of *normal* numbers", 0.05, fourth=1.8)


def test_ex01_rule_and_noise(icl):
    """One w* explains a prompt; what the same draws gain with more noise is the noise."""
    for kappa in (1.0, 25.0):
        laws = [(kappa, z, torch.Generator().manual_seed(SEED)) for z in (0.0, 0.4, 1.4)]
        (x, y), (_, less), (_, more) = (icl.sample_prompts(3000, 7, 3, *law) for law in laws)
        x, y, noise = x.double(), y.double(), more.double() - less.double()
        w = torch.linalg.pinv(x) @ y[..., None]
        close((x @ w)[..., 0], y, "without noise y = w*.x, for one w* and the x returned", 1e-3)
        check_standard(w[..., 0], "w* ~ N(0, I), one a prompt; y comes from the *finished* x", 0.18)
        check_standard(noise, "noise: *standard deviation*; every y, the last too, its own", 0.18)
        assert (noise[..., None] * x).mean((0, 1)).abs().max() < 0.1, "noise must not depend on x"


def test_ex02_gradient_descent(icl):
    mock.patch.object(icl, "gradient_descent_after", side_effect=AssertionError("take the steps one by one")).start()
    check_solver(icl.gradient_descent, lambda z, k: (1 - z / z[..., -1:].clamp_min(1e-9)) ** k)


def test_ex03_newton_start(icl):
    for batch, d, scale in (((), 3, 1), ((4,), 1, 1e-3), ((2, 3), 4, 1e3)):
        S, _, values, _ = planted_moments(*batch, d=d)
        alpha = call(icl.newton_start, S * scale)
        check_form(alpha, (*batch, 1, 1), "an alpha for each S")
        size = alpha[..., 0] * (scale * values[..., -1:]) ** 2
        assert (size <= 1 + 1e-5).all(), "alpha lambda_max^2 above 1: R_0 is negative"
        assert (size >= 0.9 / d**2).all(), "alpha is too small: the square forgotten, an eps added, one for all S?"
        check_form(icl.newton_start(0 * S), (*batch, 1, 1), "a finite alpha for S = 0, too")


def test_ex04_newton(icl):
    for alpha in (4.0, 0.0):  # 0 is a number like any other: only None means the default
        check_solver(icl.newton, lambda z, k: (1 - alpha * z**2) ** (2.0**k), alpha=alpha)
    S, b, values, U = planted_moments(5, d=4)
    scale = torch.tensor([0, 1, 1e-6, 1e6, 3]).double()[:, None]
    goal = torch.einsum("pij,pj,plj,pl->pi", U, 1 / values, U, b) * (scale > 0)
    S, b = S * scale[..., None], b * scale
    safe = lambda S: 0.7 / ((S @ S).diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] + 1e-30)
    with mock.patch.object(icl, "newton_start", safe):
        run = call(icl.newton, S, b, steps=30)
    close(run[0], (safe(S) * S @ b[..., None])[..., 0], "alpha defaults to newton_start(S), one for each prefix")
    close(run[-1], goal, "the default alpha must suit each prefix, S = 0 too", 1e-6)


def test_ex05_interleave(icl):
    for P, n, d, dtype in ((3, 4, 3, torch.double), (2, 3, 1, torch.float), (1, 0, 2, torch.float)):
        xs, ys = draws(P, n + 1, d).to(dtype), draws(P, n + 1).to(dtype)
        tokens = call(icl.interleave, xs, ys)
        check_form(tokens, (P, 2 * n + 1, d), "(P, 2n+1, d), of xs's dtype: the last y is left out", dtype)
        assert torch.equal(tokens[:, ::2], xs), "x_1, x_2, ... stand at the even positions"
        assert torch.equal(tokens[:, 1::2], F.pad(ys[:, :n, None], (0, d - 1))), "y_t follows x_t: y, 0, ..., 0"


def test_ex06_least_squares_readout(icl):
    """H = B U diag(sizes) rows, y = B (1, ..., 1) + something orthogonal to H: r is known."""
    sizes, all_six = torch.tensor([1e-3, 1, 2, 3, 4, 5]).double(), torch.eye(6).double()
    six_of_nine = torch.eye(9).double()[torch.rand(5, 8, 9).argsort()[..., :6]]
    for batch, samples, rows, why in (
        ((), 60, all_six, "no ridge, all in float64, small columns count"),
        ((5, 8), 60, six_of_nine, "columns of zeros: not for inv, nor lstsq's default driver"),
        ((40,), 6, orthonormal(9, 6).mT, "fewer samples than columns; columns that depend on others")):
        B, U = orthonormal(samples, min(samples, 7)), orthonormal(*batch, 6, 6)
        r = call(icl.least_squares_readout, B[:, :6] @ (U * sizes) @ rows, B.sum(1))
        close(r, (rows.mT @ (U.sum(-2) / sizes)[..., None])[..., 0], f"the shortest r of least ||H r - y||: {why}", 1e-6)


def test_ex07_similarity_of_errors(icl):
    why = "mean over prompts of the cosine of prediction - y over t = 1..n; 0 for an error of 0"
    for A, B, P, n, dtype, size in ((3, 2, 4, 5, torch.double, 1e-4), (1, 4, 3, 1, torch.float, 1)):
        a, b, ys = draws(A, P, n + 1), draws(B, P, n + 1), 10 * draws(P, n + 1)
        a, b = (z / z[..., 1:].norm(dim=-1, keepdim=True) for z in (a, b))
        a[:, 0] = b[:, -1] = 0
        expected = torch.stack([(one * b)[..., 1:].sum(-1) for one in a]).mean(-1)
        size = size * torch.arange(1.0, P + 1)[:, None]
        inputs = [z.to(dtype) for z in (size * a + ys, size * b + ys, ys)]
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
        added = icl.relu_attention(h, [one, two], (torch.arange(n + 1) < n).double()) - h
        mlp = (h @ up.mT).relu() @ down.mT
        assert not added[:, d:].any() and not mlp[:, d:].any(), "write into the top block only"
        close(2 * added[:, :d], -X @ (T @ S @ T).mT, "attention adds -1/2 T S T x: V's sign and "
              "factor, the second head's -Q *and* -V; scores are <x_j, T x_t>: <T x_j, x_t> makes T S T^T")
        close(mlp[:, :d], h[:, :d], "the MLP must double the top block: ReLU(a) - ReLU(-a) = a")


def test_ex10_optimal_preconditioner(icl):
    for d, n, dtype in ((3, 4, torch.float64), (5, 11, torch.float32), (1, 2, torch.float64)):
        U, values = orthonormal(d, d), torch.linspace(0.3, 2, d).double()
        A = call(icl.optimal_preconditioner, ((U * values) @ U.mT).to(dtype), n=n)
        check_form(A, (d, d), "one matrix A (d, d)", None)
        inside = U.mT @ A.double() @ U
        close(inside, inside.diagonal().diag(), "A must have Sigma's eigenvectors", 1e-4)
        rest = (1 / inside.diagonal() - (n + 1) / n * values) / values.sum()  # should be 1/n
        close(rest, torch.full((d,), 1 / n), "where the derivative of the expected loss is 0: E S^2 "
              "is not (E S)^2, it has the trace of Sigma; n + 1 and n", 1e-3)


# For lecturers (the student's copy ends above). Homework: python test_icl_newton.py FOLDER

import inspect
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

PROGRAM = Path(__file__).resolve().with_name("icl_newton.py")
TEXTS, STUBS = {}, {}  # of each exercise: the function; the same to its docstring's end
for number, (name, *_) in EXERCISES.items():
    TEXTS[name] = inspect.getsource(getattr(icl_newton, name))
    head, docstring, _ = TEXTS[name].split('"""')
    STUBS[name] = f'{head}"""{docstring}"""\n    raise NotImplementedError("exercise {number}: {name}")\n'


@pytest.mark.parametrize("number, name", [(number, name) for number, (name, _) in EXERCISES.items()])
def test_an_exercise_needs_no_other_and_is_not_empty(number, name):
    alone, empty = (SimpleNamespace(**vars(icl_newton)) for _ in range(2))
    exec("".join((STUBS | {name: TEXTS[name]}).values()), vars(alone))
    exec(STUBS[name], vars(empty))
    for test in [z for key, z in globals().items() if f"test_ex{number:02}" in key]:
        test(alone)
        with pytest.raises(NotImplementedError):
            test(empty)


SHEETS = """# Three sheets: how Transformers solve regressions

Predict before you read on. Write what emptied functions promise, on the edges too: S = 0, d = 1, n = 0, t < d, 0 steps.
`python -m pytest -k test_ex` grades: 100 points (`-k ex04 --tb=short`: one, and where it crashed); each paragraph 5 more.

## 1. How fast does Newton converge? Exercises 1 to 4 (30, 25, 15, 30 minutes)

Read sections 1 to 3 (25 minutes), to derive why Newton's digits double and why gradient descent needs more steps.

- Predict: for condition number 100 of S, not 1, how many more steps do Newton and GD take to find *all* directions?
  > GD 100 times as many; Newton 2 log2 100 = 13 more: 2^k = kappa^2. For a large error fewer.
- A paragraph: R_k is squared in every step, yet the first steps hardly lower the error. What do they gain?
  > Directions: those above lambda_max 2^(-k/2) are found after k steps. Digits double once all are.

## 2. What does a layer know? Exercises 5 to 7 (15, 20, 20 minutes)

Read sections 4 to 7, and of 8 and 9 the comments (35 minutes), to say what each of two rulers cannot tell.

- Predict, before section 8: a layer's errors have similarity .97 with a Newton step's. Is the layer a Newton step?
  > At t < d most of an error no method can avoid; deviations shuffled over prompts score nearly so.
- A paragraph: by your `--preset quick --figures rates,products` (rough: neighbours' differ), is a layer a Newton step?
  > Looked for: both rulers, CG (two runs: 3.6 > 3.3, 3.3 > 3; by size 2.5 > 2.2, 2.16 > 2.11), that a rate is no proof.

## 3. Weights by hand, weights by theory. Exercises 8 to 10 (15, 45, 45 minutes)

Read sections 11 to 13 (25 minutes), to write Newton's method as weights, and to derive what linear attention learns.

- Predict: with a causal mask token j would see tokens 1..j only. What would a layer add in place of T S T x?
  > Every x_j would carry its own prefix's T, so the sums are not T S T of one S.
- A paragraph: derive exercise 10's A from the expected loss. Given: E x x^T x x^T = 2 Sigma^2 + tr(Sigma) Sigma.
  > E (w.x_q - x_q^T A^T S w / n)^2 is quadratic in A; E S^2 = n (n+1) Sigma^2 + n tr(Sigma) Sigma.
"""


def write_homework(folder):
    """The student's folder, and <folder>-LECTURERS.md beside it. ValueError if there is work."""
    path = Path(folder).resolve()
    lecturers = path.with_name(path.name + "-LECTURERS.md")
    if folder.startswith("-") or lecturers.exists() or path.exists() and (path.is_file() or any(path.iterdir())):
        raise ValueError("usage: python test_icl_newton.py FOLDER, an empty one, without FOLDER-LECTURERS.md")
    program = PROGRAM.read_text("utf-8")
    for name, text in TEXTS.items():
        program = program.replace(text, STUBS[name])
    tests = Path(__file__).read_text("utf-8").split("\n# For lecturers")[0].rstrip("-# \n") + "\n"
    sheets = "\n".join(z for z in SHEETS.split("\n") if not z.startswith("  >"))
    path.mkdir(parents=True, exist_ok=True)
    for name, text in (PROGRAM.name, program), ("test_icl_newton.py", tests), ("SHEETS.md", sheets):
        (path / name).write_text(text, "utf-8")
    lecturers.write_text("\n\n".join([SHEETS, "```python", *TEXTS.values(), "```\n"]), "utf-8")


def shell(folder, *command):
    return subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)


def test_homework(tmp_path):
    week, grade = tmp_path / "week1", "-m pytest -q -p no:cacheprovider -k test_ex".split()
    assert shell(tmp_path, __file__, "week1").returncode == 0
    everything, lecturers = ("".join(path.read_text("utf-8") for path in tmp_path.glob(z)) for z in ("*/*", "*.md"))
    answers = [z.split('"""')[2] for z in TEXTS.values()] + [z for z in SHEETS.split("\n") if z[:3] == "  >"]
    assert all(z in lecturers and z not in everything for z in answers) and "lecturers" not in everything
    result = shell(week, *grade).stdout
    assert "  0 of 100 points" in result and result.count("exercise 4: newton") == 1 and "Trace" not in result
    (week / "icl_newton.py").write_text(PROGRAM.read_text("utf-8"), "utf-8")
    assert "  100 of 100 points" in (result := shell(week, *grade).stdout), result[-2000:]
    for bad in ("week1", "week1-LECTURERS.md", "--help", ""):  # work in it; a file; no folder
        run = shell(tmp_path, __file__, *bad.split())
        assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
    assert len(list(tmp_path.iterdir())) == 2, "nothing else is written"


# Everything but the exercises

import dataclasses
import json

import numpy as np

lib, near = icl_newton, functools.partial(close, dtype=None)


def tiny(**changes):
    small = dict(d=3, n=6, layers=4, width=8, heads=2, steps=12, tuning=5, batch=8, curriculum=0)
    return lib.Config(**small | dict(prompts=32, device="cpu") | changes)


def some(count=60, n=6, d=3):
    xs = draws(count, n + 1, d) * 0.6 ** torch.arange(d)
    return xs, (xs @ draws(count, d, 1))[..., 0]


def plant(name, function):
    """Put the function in the program's place until the test ends; returns its calls."""
    return mock.patch.object(lib, name, side_effect=function).start().call_args_list


def test_moments_and_solvers():
    xs, ys = orthonormal(4, 7, 3, 3).flatten(1, 2)[:, :7] / torch.tensor([1, 2, 5]), draws(4, 7)
    seen = torch.ones(7, 7).tril(-1).double()  # [t, i]: x_i is known after t examples
    for ridge in (0, 0.7):
        S, b = lib.prefix_moments(xs, ys, ridge)
        slow = torch.einsum("ti,pij,pik->ptjk", seen, xs, xs) + ridge * torch.eye(3).double()
        near(S, slow, "S before x_{t+1}, + ridge I")
        near(b, torch.einsum("ti,pij,pi->ptj", seen, xs, ys), "b before y_{t+1}")
        w, K = [0 * b], F.normalize(b, dim=-1)[..., None]  # its columns: an orthonormal basis
        for _ in range(3):  # the best w in the span of b, S b, ...
            w.append((K @ torch.linalg.pinv(K.mT @ S @ K, rtol=1e-11) @ (K.mT @ b[..., None]))[..., 0])
            new = S @ K[..., -1:]
            K = torch.cat([K, F.normalize(new - K @ (K.mT @ new), dim=-2, eps=1e-7)], -1)
        near(lib.conjugate_gradient(S, b, 5), torch.stack([*w, w[-1], w[-1]]), "CG")
        near(lib.predict(lib.ols(S, b), xs), (w[-1] * xs).sum(-1), "w.x of least squares")
        near(lib.gradient_descent_after(S, b, [0, 1, 7, 64]), lib.gradient_descent(S, b, 64)[[0, 1, 7, 64]], "GD")
    small = torch.tensor([[1, 0], [0, 1e-8]]).double()
    near(lib.ols(small, small.sum(1)), [1, 1], "1e-8 is no rounding", 1e-6)


def test_correction_1_the_printed_alpha_stalls():
    S, b, *_ = planted_moments(60, d=3)
    for alpha, stalls in ((2 / torch.linalg.matrix_norm(S @ S, 2)[:, None, None], True), (None, False)):
        miss = (lib.newton(S, b, 40, alpha)[-1] - torch.linalg.solve(S, b)).abs().median()
        assert (miss > 1e-4) == stalls, "2/||S S^T||_2 stalls, the default does not"


def test_correction_2_heads_of_equal_value():
    one, h = torch.ones(1, 1).double(), torch.tensor([[2.0], [-3.0]]).double()
    added = lib.relu_attention(h, [(one, one, one), (-one, one, one)], one) - h
    near(added[:, 0], [-10, -15], "two heads of value V add |s| V; of V and -V (exercise 8) s V")


def test_correction_3_printed_order():
    (xs, ys), real = some(16, 10), lib.newton_layer
    S, b = (z[:, -1] for z in lib.prefix_moments(xs, ys))
    alpha = lib.newton_start(S).min()
    exact = (lib.newton(S, b, 40, alpha)[-1] * xs[:, -1]).sum(-1)
    plant("newton_layer", lambda d: ([(K, Q, V) for Q, K, V in real(d)[0]], real(d)[1]))
    assert (lib.construction(xs, ys, 40, alpha)[-1] - exact).abs().max() > 1e-7, "T S T^T doubles rounding"


def test_correction_4_gd_off_the_span():
    (xs, ys), start = some(300, 20, 9), torch.rand(300, 9, 1).double()
    for shift, capped in (((xs @ start)[..., 0], True), (0, False)):  # of y, as w_0 is one of w
        S, b = lib.prefix_moments(xs, ys - shift)
        run = lib.predict(lib.gradient_descent_after(S, b, [2**30]), xs) + shift
        alike = lib.similarity_of_errors(run, lib.predict(lib.ols(*lib.prefix_moments(xs, ys)), xs)[None], ys)
        assert alike < 0.97 if capped else alike > 0.999, "GD becomes OLS from w_0 = 0 alone"


def test_transformer_head_by_head():
    norm = lambda z: (z - z.mean(-1, True)) / (z.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    model, (xs, ys) = lib.Transformer(tiny(n=8)).double().requires_grad_(False), some()
    model.read_out.normal_()
    h = lib.interleave(xs, ys) @ model.read_in.mT + model.positions[:13]
    states, future = [norm(h[:, ::2])], torch.ones(13, 13).triu(1).bool()
    for (Q, K, V, O), (up, down) in zip(model.attention, model.mlp):
        q, k, v = (torch.stack((norm(h) @ M.mT).split(4, -1)) for M in (Q, K, V))
        scores = (norm(q) @ norm(k).mT / 2).masked_fill(future, -torch.inf)
        h = h + torch.cat([*(scores.softmax(-1) @ v)], -1) @ O.mT
        h = h + (a := norm(h) @ up.mT) * a.sigmoid() @ down
        states.append(norm(h[:, ::2]))
    near(model.states(xs, ys), torch.stack(states), "heads, mask, norms, residuals, x tokens")
    near(model(xs, ys), states[-1] @ model.read_out, "read out of the last state")


def test_initial_weights_and_optimizers():
    model = lib.Transformer(tiny(d=4, n=40, width=64)).requires_grad_(False)
    (*qkv, out), (up, down) = model.attention.unbind(1), model.mlp.unbind(1)
    for W, size in ((model.read_in, 6.9), (torch.cat(qkv), 1), (up, 1), (out, 0.5), (down, 0.5)):
        near(W.std() * 192**0.5 / size, 1, f"standard deviation of {tuple(W.shape)}", 0.2)
    angles = torch.arange(81)[:, None] * torch.logspace(0, -2, 32).double()
    near(model.positions / 0.3, torch.cat([angles.sin(), angles.cos()], 1), "sinusoids", 1e-4)
    for config, steps in ((tiny(recipe="fu"), [1e-4]), (tiny(muon_lr=0.5), [0.005, 0.5])):
        assert [z.defaults["lr"] for z in lib.make_optimizers(model, config)] == steps


def test_training_stays_on_its_device():
    model, *data = (z.float().to("meta") for z in (lib.Transformer(tiny()), *some()))
    plant("sample_prompts", lambda *args: data)
    lib.training_step(model, lib.make_optimizers(model, tiny()), tiny(), 0, None)
    assert model.states(*data).is_meta, "a tensor was made on the CPU"


def test_muon():
    p, average = torch.nn.Parameter(draws(7, 5, 3)), 0
    optimizer, slow = lib.Muon([p], dict(lr=0.1, momentum=0.8)), p.detach().clone()
    for _ in range(2):
        p.grad = draws(7, 5, 3)
        average = 0.8 * average + 0.2 * p.grad
        U, s, V = torch.linalg.svd(0.2 * p.grad + 0.8 * average, full_matrices=False)
        s = s / s.norm(dim=1, keepdim=True)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        slow -= 0.1 * 0.2 * 5**0.5 * U * s[:, None] @ V
        optimizer.step()
        near(p.detach(), slow, "average, look ahead, .2 lr sqrt(larger side)")


@pytest.mark.parametrize("recipe", ["muon", "fu"])
def test_training_step_by_hand(recipe):
    model, config, (xs, ys) = torch.nn.Module(), tiny(recipe=recipe, steps=300), some(58)
    xs[:, 4] = ys[:, 4] = 0  # no error at all
    model.w, x = torch.nn.Parameter(draws(7)), xs[..., 0]
    model.forward = lambda xs, ys: model.w * xs[..., 0]
    calls = plant("sample_prompts", lambda *args: (xs, ys))
    for step, factor in ((7, 0.08), (98, 0.99), (99, 1), (150, 1), (225, 0.5), (299, 2 / 300)):
        w = model.w.detach().clone()
        e = w * x - ys
        root = torch.cat([(z.abs().pow(1.5).mean(0) + 1e-40).sqrt().expand_as(z) for z in e.split(15)])  # four parts
        slope = 0.75 * e.sign() * e.abs().sqrt() * x / root
        slope, factor = (2 * e * x, 1) if recipe == "fu" else (slope, factor)
        near(lib.training_step(model, [torch.optim.SGD([model.w], 0.5)], config, step, 0), e, "errors before")
        near(model.w.detach(), w - 0.5 * factor * slope.mean(0) / 7, "root of mean |e|^1.5; fu: squares")
    assert calls[0].args == (8, 6, 3, 1.0, 0.0, 0), "batch, n, d, kappa, noise, generator"
    for step, n, d in ((9, 6, 2), (10, 8, 3), (29, 8, 4), (30, 8, 5), (98, 8, 5)):
        lib.training_step(model, [], tiny(d=5, n=8, curriculum=10, steps=99), step, 0)
        assert calls[-1].args[1:3] == (n, d), "two dimensions and 2d + 2 examples, then more"


def test_training_resumes_to_the_bit():
    config, real, tried = tiny(steps=320), lib.training_step, [0, 160, 319]
    with mock.patch.object(lib, "THREADS", SimpleNamespace(map=map)):  # one part after the other
        whole = lib.train(tiny(steps=320, checkpoints="whole"))
    calls = plant("training_step", lambda *args: real(*args) if len(calls) != 304 else 1 / 0)
    with pytest.raises(ZeroDivisionError):  # at step 301: three rehearsals come first
        lib.train(config)
    for model in lib.train(config), lib.train(config):
        assert all(map(torch.equal, whole.parameters(), model.parameters())), "not the same to the bit"
    assert not model.mlp.requires_grad and os.listdir("whole") == os.listdir("checkpoints")
    assert [c.args[3] for c in calls[304:]] == [*tried, *range(250, 320), *tried], "goes on at the checkpoint"
    plant("training_step", lambda *args: real(*args) * torch.nan)
    with pytest.raises(FloatingPointError, match="step 12"):
        lib.train(tiny(checkpoints="nan"))
    assert not os.path.exists("nan"), "a failed run is not saved"


def test_training_at_kappa_goes_on_from_kappa_1():
    calls, config = plant("training_step", lib.training_step), tiny(kappa=9.0, curriculum=2)
    hard, easy = lib.train(config), lib.train(dataclasses.replace(config, kappa=1.0))
    laws = [(z.kappa, z.curriculum, muon.defaults["lr"]) for _, (_, muon), z, *_ in (c.args for c in calls)]
    assert laws == [(1, 2, 0.018)] * (4 + 12) + [(9, 0, 0.009)] * (3 + 5) + [(1, 2, 0.018)] * 4, "4 or 3 rehearsals, then steps"
    assert 0 < (hard.attention - easy.attention).abs().max() < 0.2, "goes on from the network of kappa 1"
    untrained = lib.train(tiny(kappa=9.0, muon_lr=1e-9, steps=0, tuning=0, checkpoints="none"))
    torch.manual_seed(1)
    assert untrained.mlp.equal(lib.Transformer(tiny()).mlp) and not os.path.exists("none")


def test_checkpoint_names():
    def files(**changes):
        lib.train(tiny(**{"n": 9} | changes))
        return len(os.listdir("checkpoints"))

    other = dict(d=4, n=8, kappa=2.0, noise=0.1, layers=5, width=10, heads=1, recipe="fu", steps=9,
                 batch=9, muon_lr=0.02, curriculum=1, seed=2)
    assert files() == files(seeds=2, prompts=9, figures="rates", device="auto", out="x", tuning=9) == 1
    for count, (key, value) in enumerate(other.items(), start=2):
        assert files(**{key: value}) == count, f"{key} decides the weights"
    count, real = files(d=5, curriculum=2), lib.sample_prompts  # the last change: while d = 3 alone
    for place, value in (("torch.__version__", "9"), ("icl_newton.orthogonalize", lambda G: G),
                         ("icl_newton.sample_prompts", lambda P, n, d, *z: real(P, n - (d == 3), d, *z))):
        with mock.patch(place, value):
            assert files(d=5, curriculum=2) == (count := count + 1), f"{place} decides the weights"


def test_damaged_checkpoints():
    lib.train(tiny())
    (path,) = Path("checkpoints").iterdir()
    good = path.read_bytes()
    torch.save(torch.load(path, weights_only=True) | {"done": 3}, path)
    for bad in (path.read_bytes(), b"", good[:99], good[:-1], good[:500] + b"x" + good[501:]):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=f"{path.name} is damaged: delete it"):
            lib.train(tiny())
    with mock.patch.object(Path, "replace", side_effect=OSError(28, "full")), pytest.raises(OSError, match=f"{path}: full"):
        lib.write_file(path, good)
    assert path.read_bytes() == bad and len(os.listdir("checkpoints")) == 1, "whole or not there"


L = 8
ORACLES = {  # name: its weights after 0..L steps
    "Newton": lambda S, b: lib.newton(S, b, L), "GD": lambda S, b: lib.gradient_descent(S, b, L),
    "CG": lambda S, b: lib.conjugate_gradient(S, b, L), "OLS": lambda S, b: lib.ols(S, b).expand(L + 1, *b.shape),
    "zeros": lambda S, b: b.expand(L + 1, *b.shape) * 0, "noise": lambda S, b: draws(L + 1, *b.shape)}


@pytest.mark.parametrize("name", ORACLES)
def test_planted_learners(name):
    """Every experiment, with a learner whose numbers are known in the layers' place."""
    plant("train", lambda config: None)
    sampled = plant("sample_prompts", lib.sample_prompts)
    plant("study", functools.cache(lib.study.__wrapped__))
    calls = plant("read_layers", lambda model, fitting, judging: lib.predict(
        ORACLES[name](*lib.prefix_moments(*judging)), judging[0]))
    config, z = tiny(d=9, n=18, layers=L, prompts=300), {}
    for experiment in (lib.rates, lib.convergence, lib.heatmaps, lib.products, lib.conditioning):
        axes, _, numbers = experiment(config, functools.cache(lib.make_sheet))
        assert experiment is lib.heatmaps or "Transformer" in [line.get_label() for line in axes[0].get_lines()]
        z |= {key: np.asarray(number, dtype=float).tolist() for key, number in numbers.items()}
    this, rough, other = (lib.study(dataclasses.replace(config, **z)) for z in ({}, dict(noise=0.1), dict(seed=0)))
    _, (X, _), (xs, ys) = calls[0].args
    assert len(torch.cat([X, xs, other.xs]).flatten(1).unique(dim=0)) == 1200 + 300 + 300, "prompts are shared"
    assert {z.args[1:5] for z in sampled} == {(18, 9, 1, 0), (18, 9, 100, 0), (18, 9, 1, 0.1)}, "n, d, kappa, noise"
    ridged = lib.predict(lib.ols(*lib.prefix_moments(rough.xs, rough.ys, 0.01)), rough.xs)
    near(rough.least_squares, ridged, "ridge is noise^2")
    layers, runs = this.runs["Transformer"], this.runs
    errors = (layers - ys).square().mean(1).clamp_min(1e-300)  # (L+1, n+1)
    newton, gd = (lib.similarity_of_errors(layers[-1:], runs[k], ys)[0] for k in ("Newton", "GD"))
    digits, step = -errors[:, 18].log10().diff(), runs["Newton"][newton.argmax()]
    moved = torch.stack([step[i] + layers[-1, i - 1] - step[i - 1] for i in range(300)])[None]
    expected = {"last": [newton.max(), gd.max(), lib.similarity_of_errors(moved, step[None], ys)],
                "like_newton": [1 - gd.max(), 1 - newton.max()], "error": errors[-1, 18] / 9,
                "superlinear": [digits[5:].mean(), max(digits[2:5].mean(), 0.1)]}  # layers 6-8, 3-5
    for key, steps, order in (("newton_line", "newton_steps", 1), ("gd_exponential", "gd_steps", -1)):
        expected[key] = [lib.line_fit(y)[1] for y in (z[steps], np.log2(np.maximum(z[steps], 1)))][::order]
    for key, t in (("products_d", 9), ("products_n", 18)):
        expected[key] = lib.equal_error_steps(errors[-1, t], range(129), lib.polynomial_errors(config, t)), L
    for key, i in (("newton_rate", 0), ("equal_rate", 2)):
        cg, ours = (lib.climb(config, learner)[i] for learner in ("CG", "Transformer"))
        expected[key] = lib.line_fit(ours)[0], lib.line_fit(cg, 1)[0]  # the control: all its steps
    for key, numbers in expected.items():
        near(z[key], numbers, key, 1e-6)
    holds = lib.table({key: [number] for key, number in z.items()})[1]
    holds, last, worth, kappas = {key for key in holds if holds[key]}, z["last"], z["worth"], z["kappas"]
    if name == "Newton":
        near([*z["newton_steps"], z["equal_rate"][0], last[0], last[2]], [*range(1, 9), 1, 1, 1], "itself", 1e-6)
        near([worth[0], kappas[0], kappas[2]], [L, L, L], "it errs as its own step", 1e-6)
        assert {"newton_line", "like_newton"} <= holds
    elif name == "GD":
        near([*np.array(z["gd_steps"])[[0, 1, 3, 7]], *z["kappa_gd"]], [1, 2, 4, 8, L, 4 * L], "itself", 1e-6)
        assert worth[2] < L + 1e-6 and z["products_n"][0] < L + 0.1 and last[1] > 1 - 1e-9, "GD is worth one product a step, or less"
        assert not {"like_newton", "newton_rate", "equal_rate", "products_n", "kappa_gd"} & holds
    elif name == "CG":
        near(worth[1], L, "CG matches itself", 1e-6)
        assert z["products_d"][0] > L, "CG's sizes suit the prompt"
    elif name == "OLS":
        assert z["products_d"][0] > 99 and z["error"] < 1e-10 and 0.4 < z["like_ols"][0] <= 1
    else:
        assert not holds and z["products_n"][0] < 0.5 and z["newton_rate"][0] == 0, holds


def test_an_untrained_network_passes_no_claim_about_layers():
    figures = "rates,convergence,heatmaps,products,conditioning"
    holds = lib.run(tiny(d=5, n=10, layers=6, width=32, steps=0, tuning=0, prompts=300, figures=figures))
    assert len(holds) == 10 and not any(holds.values()), holds


def test_rulers_by_hand():
    errors, run = torch.tensor([0.3, 9, 1e-9, 0.02, 0.1]), torch.tensor([1.0, 0.1, 0.5, 0.01, 0.01])
    found = lib.equal_error_steps(errors, [0, 1, 2, 4, 8], run)
    near(found, [np.log10(1 / 0.3), 0, 4, 1 + 3 * np.log10(5), 1], "log-linear, by steps that gain", 1e-6)
    y, z = np.array([99, -7, 3, 5, 7, 9.0]), np.random.default_rng(0).normal(size=9)
    near([*lib.line_fit(y), *lib.line_fit(y[2:], 1)], [2, 1, 2, 1], "from layer 3 on")
    near(lib.line_fit(z)[1], np.corrcoef(np.arange(7), z[2:])[0, 1] ** 2, "R^2")
    assert lib.line_fit(np.ones(9))[1] == 0 == lib.line_fit([3], 1)[1], "a constant is no line"
    near(lib.doublings([0, 0.5, 1, 8]), [0, 0, 0, 3], "at least one step")


def test_layers_are_read_by_fitted_lines():
    model = SimpleNamespace(read_out=torch.zeros(1), states=lambda xs, ys: xs[None] ** 3)
    (X, Y), (x, _) = prompts = [(xs.float(), ys.float() + 5) for xs, ys in (some(40), some(9))]
    line = np.linalg.lstsq(np.c_[X.flatten(0, 1) ** 3, np.ones(40 * 7)], Y.flatten(), rcond=None)[0]
    near(lib.read_layers(model, *prompts)[0], x.double() ** 3 @ line[:3] + line[3], "a line and a constant", 1e-4)


def test_best_polynomials():
    fit, judge = some(200), some()
    plant("fresh_prompts", lambda *args, purpose: fit)
    plant("study", lambda config: SimpleNamespace(xs=judge[0], ys=judge[1]))
    found, powers = lib.polynomial_errors(tiny(), 5), []
    for xs, ys in (fit, judge):
        S, b = (z[:, 5] for z in lib.prefix_moments(xs, ys))
        S, b = S / (size := torch.linalg.matrix_norm(S, 2)[:, None, None]), b / size[..., 0]
        powers.append(torch.stack([(xs[:, 5] * lib.times(S.matrix_power(j), b)).sum(1) for j in range(3)], 1))
    for D in range(4):
        weights = torch.linalg.pinv(powers[0][:, :D]) @ fit[1][:, 5]
        near(found[D], (powers[1][:, :D] @ weights - judge[1][:, 5]).square().mean(), f"{D} steps", 1e-6)


def test_softmax_attention_token_by_token():
    p, Q = torch.tensor([0.4, 0.2, 0.2, 0.2]), torch.zeros(4, 4, requires_grad=True)
    generator, path = torch.Generator().manual_seed(SEED), []
    for _ in range(5):
        x = F.one_hot(torch.multinomial(p.expand(32, 4), 40, True, generator=generator), 4).float()
        answers = (x @ Q).softmax(1).mT @ x  # (32, k, 4): of a query for feature k, in the w.v_n
        losses = (answers - torch.eye(4)).square().sum(2).mean(0) / 2
        path.append([losses[0].item(), losses[1:].mean().item()])
        Q.data -= 0.7 * torch.autograd.grad(p @ losses, Q)[0]
    near(lib.train_attention(4, 0.4, 5, SEED, eta=0.7), torch.tensor(path).T, "losses, step by step", 1e-4)


def test_theory_experiments():
    for experiment, key in ((lib.by_hand, "by_hand"), (lib.preconditioners, "ahn_one")):
        found, bound = experiment(tiny(), functools.cache(lib.make_sheet))[2][key]
        assert found < bound < 0.05
    path = torch.ones(2, 50) * 0.01  # above a tenth of 1: feature 1 for 5 steps, the others for 45
    path[0, :5], path[1, :40], path[1, 40:45] = 1, 1, 0.2
    plant("train_attention", lambda *args: path)
    assert lib.stages(tiny(), functools.cache(lib.make_sheet))[2]["huang"] == (9, 5)


def test_a_run_of_several_seeds(capsys, monkeypatch):
    def stub(config, sheet):
        axes = sheet("panel")
        lib.curve(axes[0], "CG late", [config.seed])
        assert [z.get_color() for z in axes[0].get_lines()] == [lib.LOOK["CG"][0]] * (config.seed - 1)
        return axes, "{like_ols[0]:.2f} and {error:.0f}", {
            "like_ols": (config.seed / 4, 0.975), "equal_rate": (2, config.seed), "error": 3.0}

    monkeypatch.setattr(lib, "EXPERIMENTS", {"rates": stub})
    holds = lib.run(tiny(figures="rates", seed=2, seeds=3))
    rows, printed = Path("figures/table.md").read_text().split("\n")[2:], capsys.readouterr().out
    assert rows[0].endswith("| 2 > 2 3 4 | 0 of 3 |") and rows[1].endswith("| 0.5 0.75 1 > 0.975 | 1 of 3 |")
    assert "rates: 0.75 and 3" in printed and all(row in printed for row in rows)
    record = json.loads(Path("figures/results.json").read_text())
    assert record["measured"]["error"] == [3, 3, 3] and record["settings"]["seeds"] == 3
    assert record["holds"] == holds == {"equal_rate": 0, "like_ols": 1}
    lines, holds = lib.table({key: [(1.0, 1.0)] for key in lib.CLAIMS})
    assert len(lines) <= 18 and max(map(len, lines)) <= 100 and not any(holds.values()), "equal: no"


def test_input_and_exit_statuses(capsys):
    plant("run", AssertionError("bad input was run"))
    Path("a_file").write_text("mine")
    for bad in """figures x|no_such 1|d 1|n 6|steps x|noise -1|kappa .5|muon_lr nan|heads 3|d 9e9|width 1e3
            |preset x|device x|recipe x|layers 3|batch 0|curriculum 200|muon_lr inf|seeds 0|prompts 1|seed 1e3
            |preset quick,small|out a_file/x|checkpoints a_file|seed -1|curriculum -1|muon_lr 0|steps 216
            |seed 9237203685|seed 1000000000 --seeds 2|kappa 1e39|noise 1e30|tuning -1|figures rates,""".split("|"):
        with pytest.raises(SystemExit, match="2"):
            lib.main(f"--{bad.strip()}".split())
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and (bad.split()[0] in err or "a_file" in err), f"--{bad}: {err}"
    assert Path("a_file").read_text() == "mine"
    c = lib.parse("--preset quick --d 2 --n 4 --layers 4 --width 2 --curriculum 0 --seed 0".split())[1]
    assert (c.d, c.prompts, c.out, lib.parse([])[1]) == (2, 256, "figures/quick", lib.Config())
    for error in (FloatingPointError, ValueError, OSError, KeyboardInterrupt, MemoryError):
        plant("run", error("x"))
        assert lib.main(["--figures", "rates"]) == (130 if error is KeyboardInterrupt else 1)
        assert capsys.readouterr().err.strip().count("\n") == 0
    with mock.patch.object(os, "access", return_value=False), pytest.raises(SystemExit, match="2"):
        lib.main([])


@pytest.mark.parametrize("law", [dict(kappa=1e6), dict(seed=10**9), dict(noise=1e3, prompts=2), dict(d=2, n=4)])
def test_numbers_at_the_edge_work_to_the_end(law):
    lib.run(tiny(figures="rates,convergence,heatmaps,products,conditioning,by_hand", **law))
    assert len(list(Path("figures").glob("*.png"))) == 6


def test_the_program_runs_without_its_file(tmp_path):
    text = f"{PROGRAM.read_text('utf-8')}\nrun(Config(**{vars(tiny(figures='rates'))}))"
    assert (done := shell(tmp_path, "-c", f"exec({text!r})")).returncode == 0 and "rates:" in done.stdout, done.stderr


def test_the_readme_has_the_committed_table():
    readme, folder = PROGRAM.with_name("README.md").read_text("utf-8"), PROGRAM.with_name("figures")
    assert (folder / "three_seeds" / "table.md").read_text("utf-8") in readme
    for path in folder.glob("three_seeds*/results.json"):  # your own runs write elsewhere
        m = json.loads(path.read_text("utf-8"))["measured"]
        row = (" ".join(f"{z:.2g}" for z in row) for row in ([pair[0] for pair in m["newton_rate"]], m["error"]))
        assert f"| {' | '.join(row)} |" in readme, path.parent.name


if __name__ == "__main__":
    try:
        write_homework(sys.argv[1] if len(sys.argv) == 2 else "-")
    except ValueError as error:
        sys.exit(print(error, file=sys.stderr) or 2)
