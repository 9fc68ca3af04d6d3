"""The patch-embedding system with an error for each entry, and clients that took a step of Adam."""

import copy
import dataclasses
import functools

import pytest
import torch
from attacked import db, make
from torch import nn

import aprillab as al
from aprillab.attacks.closed_forms.linear_algebra import thin_svd
from aprillab.attacks.closed_forms.patch_embedding import most_probable, solve_patches
from aprillab.attacks.closed_forms.weighted_patches import Weighted, most_probable_weighted, stacked, with_bias
from aprillab.federation import LocalTraining, train_locally, update_of

GREY = torch.zeros(12, dtype=torch.float64), 1.0


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def system(G, X, in_G, in_dW, seed=0):
    """Gᵀ X = dW with normal errors of these sizes, told."""
    n, d = G.shape
    dW = G.T @ X
    noisy_G, noisy_dW = G + in_G * normal(n, d, seed=seed), dW + in_dW * normal(*dW.shape, seed=seed + 1)
    never = torch.full((d,), torch.inf, dtype=torch.float64)
    return Weighted(noisy_dW, in_dW.expand_as(dW), noisy_G, in_G.expand_as(G), never, torch.full_like(never, 1e300))


# --- Its steps: tensors in, tensors out -----------------------------------------------------------


def test_with_one_size_of_errors_the_patches_are_those_of_least_squares():
    G, X = normal(5, 30), normal(5, 12, seed=1)
    told = torch.tensor(1e-9, dtype=torch.float64)
    given = system(G, X, told * 1e-6, told)
    U, s, Vt = thin_svd(given.G.T)
    expected = solve_patches(U.T @ given.dW, s, Vt)
    torch.testing.assert_close(most_probable_weighted(given, GREY).X, expected, rtol=0, atol=1e-13)


def test_the_errors_are_foreseen_and_the_weights_pay():
    """Errors of entries spread over four orders: 60 draws, the mean square within a fifth."""
    n, d, p = 6, 40, 12
    weighted, plain, foreseen, misfits = [], [], [], []
    for seed in range(60):
        G, X = normal(n, d, seed=9 * seed), normal(n, p, seed=9 * seed + 1)
        spread = [10 ** (4 * torch.rand(s, generator=torch.Generator().manual_seed(seed)).double() - 5)
                  for s in ((n, d), (d, p))]  # fmt: skip
        given = system(G, X, *spread, seed=9 * seed + 2)
        found = most_probable_weighted(given, GREY)
        weighted.append(float((found.X - X).square().mean()))
        foreseen.append(found.mse)
        misfits.append(found.misfit)
        alike = most_probable(given.dW, given.G, 1e-2, 1e-2, GREY)
        plain.append(float((alike.X - X).square().mean()))
    mean = sum(weighted) / len(weighted)
    assert mean < 0.1 * sum(plain) / len(plain)
    assert sum(foreseen) / len(foreseen) == pytest.approx(mean, rel=0.3)
    assert sum(misfits) / len(misfits) == pytest.approx(1.0, rel=0.2)


@pytest.mark.parametrize("factor", [0.5, 30.0])
def test_errors_that_were_told_wrong_are_measured(factor):
    G, X = normal(6, 60), normal(6, 12, seed=1)
    size = torch.tensor(1e-3, dtype=torch.float64)
    given = system(G, X, 1e-6 * size, size)
    told = Weighted(given.dW, given.dW_error / factor, given.G, given.G_error / factor, given.total, given.scale)
    found = most_probable_weighted(told, GREY)
    assert found.misfit == pytest.approx(factor**2, rel=0.15)
    assert found.mse == pytest.approx(float((found.X - X).square().mean()), rel=0.4)


def test_entries_of_which_nothing_is_known_do_not_count():
    G, X = normal(5, 30), normal(5, 12, seed=1)
    tiny = torch.tensor(1e-9, dtype=torch.float64)
    given = system(G, X, tiny, tiny)
    error = given.dW_error.clone()
    lost = torch.rand(error.shape, generator=torch.Generator().manual_seed(3)) < 0.4
    error[lost] = torch.inf
    dW = torch.where(lost, 1e6, given.dW)
    found = most_probable_weighted(Weighted(dW, error, given.G, given.G_error, given.total, given.scale), GREY)
    torch.testing.assert_close(found.X, X, rtol=0, atol=1e-6)
    nothing = torch.full_like(error, torch.inf)
    blank = most_probable_weighted(Weighted(dW, nothing, given.G, given.G_error, given.total, given.scale), GREY)
    assert not blank.X.any()
    assert (blank.known, blank.mse) == (0.0, pytest.approx(1.0))


def test_more_patches_than_equations_are_not_known_however_precise_they_are():
    """What the update does not show must not pass for known, where squares exceed float64's range."""
    G, X = normal(12, 9), normal(12, 12, seed=1)
    tiny = torch.tensor(1e-15, dtype=torch.float64)
    found = most_probable_weighted(system(G, X, tiny, tiny), GREY)
    assert found.known == pytest.approx(9, abs=0.5)
    error = float((found.X - X).square().mean())
    assert 0.4 * error < found.mse < 3 * error
    unseen = X - torch.linalg.pinv(G.T) @ (G.T @ X)
    assert error > 0.3 * float(unseen.square().mean())


def test_the_bias_tells_a_column_of_the_embedding():
    """A picture that is bright on the whole carries G's errors; their sum is known by the bias."""
    G, X = normal(5, 30), 2 + 0.1 * normal(5, 12, seed=1)
    in_G, in_dW = (torch.tensor(size, dtype=torch.float64) for size in (1e-3, 1e-9))
    given = system(G, X, in_G, in_dW)
    without = most_probable_weighted(given, GREY)
    zero = torch.zeros(30, dtype=torch.float64)
    found = most_probable_weighted(with_bias(given, G.sum(0), zero), GREY)
    assert float((found.X - X).square().mean()) < 0.02 * float((without.X - X).square().mean())
    assert found.mse < 0.05 * without.mse


def test_two_rounds_are_worth_more_than_one():
    X = normal(6, 12, seed=1)
    size = torch.tensor(1e-3, dtype=torch.float64)
    rounds = [system(normal(6, 4, seed=20 + k), X, 1e-3 * size, size, seed=30 + k) for k in (0, 5)]
    both = most_probable_weighted(stacked(rounds), GREY)
    assert both.known > 5.9
    assert most_probable_weighted(rounds[0], GREY).known < 4.1


# --- Clients that take a step of Adam -------------------------------------------------------------

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket")


def client(model, pixels, optimizer=torch.optim.AdamW, *, labels=(3,), lr=1e-3, eps=1e-6, clip=1.0, steps=1, **more):
    run_model = copy.deepcopy(model)
    run = optimizer(run_model.parameters(), lr=lr, eps=eps, **more)
    for _ in range(steps):
        run.zero_grad()
        nn.functional.cross_entropy(run_model(al.HALF.to_input(pixels)), torch.tensor(labels)).backward()
        nn.utils.clip_grad_norm_(run_model.parameters(), clip)
        run.step()
    return run_model.state_dict()


def victim(seed=0, **changes):
    return make(
        dtype=torch.float32, seed=seed, **{"image_size": 32, "patch_size": 8, "width": 192, "depth": 4, **changes}
    )


def undone(model, after, *, lr=1e-3, eps=1e-6, how="adamw", decay=0.01, steps=1):
    return al.update_from_states(
        model.state_dict(), after, learning_rate=lr, eps=eps, optimizer=how, weight_decay=decay, local_steps=steps
    )


def attacked(seed, name, **options):
    model, pixels = victim(seed), al.load_victim(name, 32)[None]
    said = {key: value for key, value in options.items() if key in ("lr", "eps", "steps")}
    update = undone(model, client(model, pixels, weight_decay=0.01, **options), **said)
    result = al.invert(model, update)
    assert result.attack == "embedding_closed_form"
    return result, db(result, pixels)


@pytest.mark.parametrize(("lr", "eps", "goal"), [(1e-3, 1e-8, 25), (1e-2, 1e-8, 42), (1e-3, 1e-6, 63)])
def test_a_first_step_of_adamw_gives_the_picture(lr, eps, goal):
    """float32 weights, decay 0.01, clipped to norm 1; each prediction within a few dB."""
    seeds = (0, 1) if eps == 1e-6 else (0,)
    found = [attacked(seed, name, lr=lr, eps=eps) for name in PHOTOGRAPHS for seed in seeds]
    values = sorted(value for _, value in found)
    assert values[len(values) // 2] > goal + 3
    for result, value in found:
        assert abs(result.predicted_psnr - value) < 5
        assert not result.exact or value > 58.9
    if eps == 1e-6:
        assert sum(result.exact for result, _ in found) >= 5
        assert all("client's first step is one-to-one" in r.reason for r, _ in found if r.exact)


@pytest.mark.parametrize(
    ("how", "optimizer", "decay"),
    [
        ("adam", torch.optim.Adam, 0.01),
        ("adamw", functools.partial(torch.optim.AdamW, amsgrad=True), 0.01),
        ("adagrad", torch.optim.Adagrad, 0.0),
        ("rmsprop", torch.optim.RMSprop, 0.0),
    ],
)
def test_its_kin_alike(how, optimizer, decay):
    model, pixels = victim(), al.load_victim("chelsea", 32)[None]
    update = undone(model, client(model, pixels, optimizer, weight_decay=decay), how=how, decay=decay)
    result = al.embedding_closed_form(model, update)
    assert result.exact, result.reason
    assert db(result, pixels) > 70
    assert result.labels.tolist() == [3]


def test_float64_weights_hide_nothing():
    model, pixels = victim().double(), al.load_victim("coffee", 32)[None].double()
    update = undone(model, client(model, pixels, weight_decay=0.01, eps=1e-8), eps=1e-8)
    result = al.embedding_closed_form(model, update)
    assert result.exact, result.reason
    assert db(result, pixels) > 150


def test_a_saturated_step_says_nothing_and_is_not_called_a_picture():
    """Unclipped, ε = 1e-8: nine entries of ten are known by their sign alone."""
    result, _ = attacked(0, "chelsea", eps=1e-8, clip=1e9)
    assert not result.determined
    assert result.predicted_psnr < 15


@pytest.mark.parametrize(("lr", "eps"), [(1e-3, 1e-8), (1e-2, 1e-6)])
def test_a_batch_is_not_called_one_picture(lr, eps):
    model = victim()
    pixels = torch.stack([al.load_victim(name, 32) for name in ("astronaut", "coffee")])
    after = client(model, pixels, labels=(3, 5), weight_decay=0.01, lr=lr, eps=eps)
    result = al.embedding_closed_form(model, undone(model, after, lr=lr, eps=eps))
    one = next(c for c in result.conditions if c.name == "one image")
    assert one.state == "contradicted", one.text
    assert not result.exact
    assert result.predicted_psnr < 20


@pytest.mark.parametrize(("steps", "eps"), [(2, 1e-6), (5, 1e-3), (20, 1e-6)])
def test_several_steps_are_never_exact_and_promise_little(steps, eps):
    result, value = attacked(0, "coffee", eps=eps, steps=steps)
    assert not result.exact
    assert not result.determined
    assert result.predicted_psnr < value + 8
    assert "as if they were all the first" in result.reason


def test_a_wrong_eps_does_not_matter():
    model, pixels = victim(), al.load_victim("chelsea", 32)[None]
    after = client(model, pixels, weight_decay=0.01)
    right, wrong = (al.embedding_closed_form(model, undone(model, after, eps=eps)) for eps in (1e-6, 1e-8))
    torch.testing.assert_close(wrong.pixels, right.pixels, rtol=0, atol=1e-6)
    assert wrong.exact, wrong.reason


def test_another_picture_in_the_weights_is_seen_by_the_replay():
    """The system needs no weights; the replay does, and must not say yes to others."""
    model, pixels = victim(), al.load_victim("chelsea", 32)[None]
    update = undone(model, client(model, pixels, weight_decay=0.01))
    result = al.embedding_closed_form(victim(seed=7), update)
    assert result.replay.state == "contradicted"
    assert not result.exact
    assert db(result, pixels) > 70


def test_two_rounds_of_one_client():
    model, pixels = victim(), al.load_victim("rocket", 32)[None]
    first = client(model, pixels, weight_decay=0.01, eps=1e-8)
    second_model = copy.deepcopy(model)
    second_model.load_state_dict(first)
    updates = [
        undone(model, first, eps=1e-8),
        undone(second_model, client(second_model, pixels, weight_decay=0.01, eps=1e-8), eps=1e-8),
    ]
    rounds = [al.Round(m, u) for m, u in zip((model, second_model), updates, strict=True)]
    both = al.invert(model, rounds)
    alone = [al.invert(m, u) for m, u in zip((model, second_model), updates, strict=True)]
    assert [note["used"] for note in both.diagnostics["rounds"]] == [True, True]
    assert db(both, pixels) > max(db(one, pixels) for one in alone)


def test_the_others_refuse_in_words():
    pixels = al.load_victim("chelsea", 32)[None]
    for attack, block in (("april", "april"), ("span", "prenorm"), ("span_then_match", "prenorm")):
        model = make(block, dtype=torch.float32, image_size=32, patch_size=8)
        update = undone(model, client(model, pixels, weight_decay=0.01))
        with pytest.raises(al.AttackNotApplicable, match=r"errors of their own.*only the patch-embedding system"):
            al.invert(model, update, attack=attack)


def test_what_nobody_undid_is_refused_with_the_way_to_undo_it():
    model, pixels = victim(), al.load_victim("chelsea", 32)[None]
    update = al.update_from_states(model.state_dict(), client(model, pixels), learning_rate=1e-3)
    with pytest.raises(al.AttackNotApplicable, match=r"optimizer='adamw', weight_decay=…, eps=…\) undoes it"):
        al.embedding_closed_form(model, update)


@pytest.mark.parametrize(("labels", "said", "state"), [((3,), None, "not checked"), ((3, 5), 2, "contradicted")])
def test_what_later_steps_leave_is_no_proof_of_several_pictures(labels, said, state):
    """One picture's steps miss the system as a batch does: only the client's own number
    contradicts one image.
    """
    model = victim()
    pixels = torch.stack([al.load_victim(name, 32) for name in PHOTOGRAPHS[: len(labels)]])
    after = client(model, pixels, labels=labels, weight_decay=0.01, steps=5)
    update = undone(model, after, steps=5)
    result = al.embedding_closed_form(model, dataclasses.replace(update, batch_size=said))
    one = next(c for c in result.conditions if c.name == "one image")
    assert one.state == state, one.text
    assert ("client says" in one.text) == (said is not None)
    assert not result.exact


def test_a_forward_pass_in_half_precision_is_not_called_exact():
    """bfloat16 rounds the pixels themselves, to 57 dB or so: that shows, how much does not."""
    model, pixels = victim(), al.load_victim("astronaut", 32)[None]
    how = LocalTraining("adamw", 1e-3, weight_decay=0.01, eps=1e-6, clip_norm=1.0, autocast="bfloat16")
    after = train_locally(model, al.HALF.to_input(pixels), torch.tensor([3]), how)
    result = al.embedding_closed_form(model, update_of(model.state_dict(), after, how))
    assert not result.exact
    assert 50 < db(result, pixels) < 58.9
    assert next(c for c in result.conditions if c.name == "errors are as told").state == "contradicted"


def test_the_sums_tell_how_far_several_steps_are_from_a_gradient():
    """With small steps some of the patches seem known; the prediction does not follow."""
    model, pixels = victim(), al.load_victim("astronaut", 32)[None]
    how = LocalTraining("adamw", 1e-5, 5, weight_decay=0.01, eps=1e-6, clip_norm=1.0)
    after = train_locally(model, al.HALF.to_input(pixels), torch.tensor([3]), how)
    result = al.embedding_closed_form(model, update_of(model.state_dict(), after, how))
    assert result.predicted_psnr < db(result, pixels) + 5
