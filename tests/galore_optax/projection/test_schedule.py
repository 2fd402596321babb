"""When subspaces are refreshed: at a gap, staggered, or rarer where they have stopped turning."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galore_optax import Adaptive, GaLoreDimensionNumbers, Staggered, galore
from galore_optax.projection.schedule import SIMILARITIES, first_cosine, overlap

N, M, RANK = 8, 12, 2


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def orthonormal(seed, n, rank):
    return np.linalg.qr(normal(seed, n, rank))[0]


# Similarity.


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 9), rank=st.integers(1, 9), seed=st.integers(0, 999))
def test_overlap_is_of_subspaces_whatever_their_vectors(n, rank, seed):
    rank = min(n, rank)
    old, new = orthonormal(seed, n, rank), orthonormal(seed + 1, n, rank)
    random = np.random.default_rng(seed)
    signs, order = random.choice([-1, 1], rank).astype(np.float32), random.permutation(rank)
    turned = new @ orthonormal(seed + 2, rank, rank)
    expected = np.linalg.norm(old.T @ new) ** 2 / rank
    for other in (new, (new * signs)[:, order], turned):
        np.testing.assert_allclose(
            overlap(jnp.asarray(old), jnp.asarray(other)), expected, atol=1e-5
        )
    assert 0 <= expected <= 1 + 1e-5
    np.testing.assert_allclose(overlap(jnp.asarray(old), jnp.asarray(-old)), 1, atol=1e-5)


def test_subspaces_with_nothing_in_common_have_no_overlap():
    both = jnp.asarray(orthonormal(0, 8, 6))
    assert overlap(both[:, :3], both[:, 3:]) < 1e-10
    np.testing.assert_allclose(overlap(both[:, :3], both[:, 2:5]), 1 / 3, atol=1e-6)


def test_the_published_similarity_is_the_cosine_of_the_first_vectors_sign_included():
    old, new = normal(0, 8, 3), normal(1, 8, 3)
    a, b = old[:, 0].astype(float), new[:, 0].astype(float)
    cosine = a @ b / np.sqrt(a @ a * (b @ b))  # torch's cosine_similarity
    np.testing.assert_allclose(first_cosine(jnp.asarray(old), jnp.asarray(new)), cosine, rtol=1e-5)
    np.testing.assert_allclose(
        first_cosine(jnp.asarray(-old), jnp.asarray(new)), -cosine, rtol=1e-5
    )
    assert first_cosine(jnp.zeros((8, 3)), jnp.asarray(new)) == 0


# Gaps.


def steady(step):
    """Of one subspace, in other numbers at every step."""
    return normal(0, N, RANK) @ normal(step + 1, RANK, M)


def turning(step):
    """A subspace orthogonal to that of the step before."""
    grad = np.zeros((N, M), np.float32)
    first = RANK * (step % (N // RANK))
    grad[first : first + RANK] = normal(step, RANK, M)
    return grad


def half(step):
    """One direction stays, the other is a new one at every step."""
    grad = np.zeros((N, M), np.float32)
    grad[[0, 1 + step % (N - 1)]] = normal(step, RANK, M)
    return grad


def run(grads, **options):
    """The steps of the refreshes of each matrix, and the last state."""
    numbers = GaLoreDimensionNumbers(-2, -1)
    usual = dict(subspace="svd", update_proj_gap=2, weight_dimension_numbers=numbers)
    tx = galore(RANK, optax.sgd(0.1), **usual | options)
    params = jnp.zeros(grads[0].shape)
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    found = [[] for _ in state.refreshes]
    for step, grad in enumerate(grads):
        before = state
        _, state = update(jnp.asarray(grad), state, params)
        for own, more in zip(found, state.refreshes - before.refreshes, strict=True):
            own += [step] * int(more)
    return found, state


def expected(similarities, steps, gap, adaptive):
    """The rule, written anew: the steps of the refreshes, given each comparison's similarity."""
    found, at, factor, window = [], 0, 1, []
    while at < steps:
        if found:
            window = [*window, similarities(at)][-adaptive.window :]
            full = len(window) == adaptive.window
            if full and np.mean(window) >= adaptive.threshold:
                factor, window = min(2 * factor, adaptive.max_factor), []
        found.append(at)
        at += gap * factor
    return found


ADAPTIVE = Adaptive(2, window=3, max_factor=4)


@pytest.mark.parametrize("options", [{}, {"side": "both"}, {"projection_bits": 4}])
def test_the_gap_doubles_up_to_its_cap_where_the_subspace_stays(options):
    grads = [steady(step) for step in range(60)]
    if options.get("side") == "both":  # the other side too
        grads = [steady(0) * (1 + step) for step in range(60)]
    (found,), state = run(grads, update_proj_gap=ADAPTIVE, **options)
    # The first basis took the place of a random one, with which nothing is compared.
    assert found == [0, 2, 4, 6, 10, 14, 18, 26, 34, 42, 50, 58]
    assert found == expected(lambda step: 1.0, 60, 2, ADAPTIVE)
    assert state.refreshes.tolist() == [len(found)]
    assert state.adaptation.factor.tolist() == [4]


@pytest.mark.parametrize(("grads", "similar"), [(turning, 0.0), (half, 0.5)])
@pytest.mark.parametrize("threshold", [0.4, 0.6])
def test_the_gap_stays_where_the_subspace_turns_too_far(grads, similar, threshold):
    # A gap of one, since after two steps a subspace may be back.
    adaptive = Adaptive(1, threshold=threshold, window=3, max_factor=4)
    (found,), state = run([grads(i) for i in range(9)], update_proj_gap=adaptive)
    assert found == expected(lambda step: similar, 9, 1, adaptive)
    assert (found == list(range(9))) == (similar < threshold)
    comparable = [s for s in state.adaptation.recent[0].tolist() if s]
    np.testing.assert_allclose(comparable, similar, atol=1e-5)


def test_the_window_is_emptied_when_the_gap_doubles():
    adaptive = Adaptive(2, window=2, max_factor=8)
    # Similar until the first doubling at step 4: what came before no longer counts.
    grads = [steady(step) if step <= 4 else turning(step // 4) for step in range(24)]
    (found,), state = run(grads, update_proj_gap=adaptive)
    assert found == [0, 2, 4, 8, 12, 16, 20]
    assert state.adaptation.factor.tolist() == [2]
    # Its numbers at the doubling: none is counted as seen.
    _, state = run(grads[:5], update_proj_gap=adaptive)
    assert state.adaptation.seen.tolist() == [0]
    assert state.next_refresh.tolist() == [8]


def test_each_matrix_of_a_stack_has_its_own_gap_as_if_it_were_alone():
    kinds = (steady, turning, half)
    options = dict(update_proj_gap=Adaptive(1, threshold=0.45, window=2, max_factor=4))
    together, stack = run([np.stack([k(i) for k in kinds]) for i in range(12)], **options)
    for i, kind in enumerate(kinds):
        alone, state = run([kind(j) for j in range(12)], **options)
        assert together[i] == alone[0]
        for name in ("factor", "seen"):
            one = getattr(state.adaptation, name)
            np.testing.assert_array_equal(getattr(stack.adaptation, name)[i : i + 1], one)
        # To float32's rounding of two compilations.
        np.testing.assert_allclose(
            stack.adaptation.recent[i], state.adaptation.recent[0], atol=1e-5
        )
    assert [len(steps) for steps in together] == [6, 12, 6]


def test_the_published_measure_is_used_where_asked_for():
    # The leading direction stays, with a sign of its own, and all others turn.
    def grad(step):
        strong = np.outer(np.eye(N)[0], np.ones(M)) * 100
        return (strong + turning(step)).astype(np.float32)

    cosine = Adaptive(1, threshold=0.9, window=3, max_factor=4, similarity="first_cosine")
    grads = [grad(step) for step in range(8)]
    (found,), _ = run(grads, update_proj_gap=cosine)
    assert found == [0, 1, 2, 3, 5, 7]
    same = Adaptive(1, threshold=0.9, window=3, max_factor=4)
    (found,), _ = run(grads, update_proj_gap=same)
    assert found == [*range(8)]


def test_a_refresh_that_found_nothing_is_not_counted():
    grads = [steady(step) for step in range(8)]
    grads[2] = grads[3] = np.zeros((N, M), np.float32)
    grads[4] = np.full((N, M), np.nan, np.float32)
    (found,), state = run(grads, update_proj_gap=ADAPTIVE)
    assert found == [0, 5, 7]
    assert state.adaptation.seen.tolist() == [2]
    np.testing.assert_allclose(state.adaptation.recent, [[0, 1, 1]], atol=1e-5)


def test_gaps_by_schedule_and_staggered_ones_double_as_well():
    grads = [steady(step) for step in range(40)]
    gap = lambda step: jnp.where(step < 10, 2, 3)  # noqa: E731
    (found,), _ = run(grads, update_proj_gap=Adaptive(gap, window=3, max_factor=4))
    assert found == [0, 2, 4, 6, 10, 16, 22, 34]
    staggered = Adaptive(Staggered(4), window=3, max_factor=4)
    (found,), _ = run(grads, update_proj_gap=staggered)
    assert found == [0, 4, 8, 12, 20, 28, 36]


def test_without_it_refreshes_are_counted_and_nothing_is_compared():
    (found,), state = run([steady(step) for step in range(9)])
    assert found == [0, 2, 4, 6, 8]
    assert state.adaptation == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": float("nan")}, "threshold=nan: give a finite number"),
        ({"threshold": "high"}, "threshold='high' is no number; give one, such as 0.4"),
        ({"window": 0}, "window=0 is no whole number of at least 1"),
        ({"window": 2.5}, "window=2.5 is no whole number"),
        ({"window": 2**20}, "window=1048576 is too large; give less than 1048576"),
        ({"similarity": ["overlap"]}, r"similarity=\['overlap'\] is unknown"),
        ({"max_factor": True}, "max_factor=True is no whole number"),
        ({"similarity": "cosine"}, f"similarity='cosine' is unknown; .* {', '.join(SIMILARITIES)}"),
    ],
)
def test_what_is_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Adaptive(200, **options)


@pytest.mark.parametrize("form", [Staggered, Adaptive, lambda gap: Adaptive(Staggered(gap))])
@pytest.mark.parametrize("gap", [0, 2.5, True, "often"])
def test_a_gap_that_is_none_is_refused_in_every_form(form, gap):
    with pytest.raises(ValueError, match=f"update_proj_gap={gap!r}"):
        form(gap)


@pytest.mark.parametrize("form", [Staggered, Adaptive, lambda gap: gap])
def test_a_gap_by_a_function_is_tried_at_init(form):
    with pytest.raises(ValueError, match="update_proj_gap: at step 0 it gives 0"):
        galore(2, optax.sgd(0.1), update_proj_gap=form(lambda step: 0)).init(jnp.ones((8, 12)))


def test_numbers_of_numpy_are_numbers():
    assert Adaptive(200, threshold=np.float32(0.5), window=np.int64(3)).window == 3


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_with_float64_at_hand(dtype):
    with jax.enable_x64(True):
        params = {"w": jnp.ones((8, 12), dtype), "s": jnp.ones((2, 8, 12), dtype)}
        numbers = {"w": GaLoreDimensionNumbers(), "s": GaLoreDimensionNumbers(1, 2)}
        tx = galore(
            3, optax.adam(0.1), update_proj_gap=Adaptive(1), weight_dimension_numbers=numbers
        )  # fmt: skip
        state = tx.init(params)
        for _ in range(2):
            _, state = tx.update(params, state, params)
        assert (state.refreshes == 2).all()


def test_staggered_refreshes_are_spread_over_the_gap():
    params = {"stack": normal(0, 3, 8, 12), "one": normal(1, 8, 12)}
    numbers = {"stack": GaLoreDimensionNumbers(1, 2), "one": GaLoreDimensionNumbers()}
    tx = galore(4, optax.sgd(0.1), update_proj_gap=Staggered(8), weight_dimension_numbers=numbers)
    state, refreshes = tx.init(params), []
    for step in range(29):
        before = state.bases
        grads = jax.tree.map(lambda x, step=step: normal(step, *x.shape), params)
        _, state = tx.update(grads, state)
        moved = [before["one"] != state.bases["one"], *(before["stack"] != state.bases["stack"])]
        refreshes.append([bool(m.any()) for m in moved])
    steps = [[step for step, moved in enumerate(refreshes) if moved[i]] for i in range(4)]
    assert steps == [[0, 5, 13, 21], [0, 7, 15, 23], [0, 9, 17, 25], [0, 11, 19, 27]]
