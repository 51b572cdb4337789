"""`SoftmaxClassifierCV`: scikit-learn's contract, and paths over the folds."""

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from scipy import sparse
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import ShuffleSplit, StratifiedKFold, cross_val_score
from sklearn.utils.estimator_checks import parametrize_with_checks

from torch_softmax.estimator import SoftmaxClassifier, SoftmaxClassifierCV
from torch_softmax.optim import Rows


@parametrize_with_checks([SoftmaxClassifierCV(Cs=2, cv=2)])
def test_contract_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def iris():
    return load_iris(return_X_y=True)


def test_scores_are_those_of_single_fits(iris):
    folds = StratifiedKFold(4, shuffle=True, random_state=0)
    classifier = SoftmaxClassifierCV([10.0, 0.01, 1.0], cv=folds).fit(*iris)
    np.testing.assert_array_equal(classifier.Cs_, [0.01, 1.0, 10.0])
    for number, C in enumerate(classifier.Cs_):
        expected = cross_val_score(LogisticRegression(C=C, max_iter=1000), *iris, cv=folds)
        np.testing.assert_allclose(classifier.scores_[:, number], expected)


def test_the_best_is_fitted_to_all_examples(iris):
    classifier = SoftmaxClassifierCV([1e-4, 1.0]).fit(*iris)
    assert classifier.C_ == 1.0
    assert (classifier.n_iter_ > 0).all()
    alone = SoftmaxClassifier(C=1.0, tol=1e-9).fit(*iris)
    np.testing.assert_allclose(classifier.coef_, alone.coef_, atol=1e-3)
    assert classifier.score(*iris) == alone.score(*iris)


def test_without_a_refit_coefficients_are_the_mean_of_the_folds(iris):
    X, y = iris
    folds = list(StratifiedKFold(3).split(X, y))
    classifier = SoftmaxClassifierCV([1.0], cv=folds, refit=False, tol=1e-9).fit(X, y)
    each = [SoftmaxClassifier(tol=1e-9).fit(X[train], y[train]).coef_ for train, _ in folds]
    np.testing.assert_allclose(classifier.coef_, np.mean(each, 0), atol=1e-6)


def test_a_tenth_held_out_once(iris):
    held_out = ShuffleSplit(1, test_size=0.1, random_state=0)
    classifier = SoftmaxClassifierCV(np.geomspace(1e-6, 1e5, 45), cv=held_out).fit(*iris)
    assert classifier.scores_.shape == (1, 45)


def test_scores_by_name_and_weights(iris):
    X, y = iris
    weight = np.random.default_rng(0).integers(1, 3, len(y))
    classifier = SoftmaxClassifierCV([0.1, 1.0], scoring="neg_log_loss", cv=3)
    classifier.fit(X, y, sample_weight=weight)
    assert (classifier.scores_ < 0).all()
    assert classifier.score(X, y) < 0


@pytest.mark.parametrize(
    "make",
    [torch.tensor, lambda X: Rows(X), sparse.csr_array, sparse.coo_matrix],
    ids=["tensor", "rows", "csr", "coo"],
)
def test_tensors_rows_and_sparse_matrices_go_in(iris, make):
    X, y = iris
    expected = SoftmaxClassifierCV([0.1, 1.0]).fit(X, y)
    classifier = SoftmaxClassifierCV([0.1, 1.0]).fit(make(X), y)
    np.testing.assert_allclose(np.asarray(classifier.coef_), expected.coef_, rtol=1e-9)
    np.testing.assert_array_equal(classifier.scores_, expected.scores_)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_every_C_is_scored_where_penalties_can_not_be_told_apart(iris):
    classifier = SoftmaxClassifierCV([1e308, np.inf, 1.0], cv=3).fit(iris[0][50:], iris[1][50:])
    assert (classifier.scores_ > 0.5).all()
    assert (classifier.n_iter_[:, 0] > 0).all()


def test_a_score_that_is_no_number_is_refused(iris):
    classifier = SoftmaxClassifierCV([0.1, 1.0], scoring=lambda *_: np.nan)
    with pytest.raises(ValueError, match=r"scoring must give numbers, got nan at C=0\.1"):
        classifier.fit(*iris)


def test_a_fit_that_fails_leaves_the_one_before(iris):
    X, y = iris
    classifier = SoftmaxClassifierCV([0.1, 1.0], cv=3).fit(X, y)
    before = vars(classifier).copy()
    with pytest.raises(ValueError, match="n_splits=3 cannot"):
        classifier.fit(X[:, :3], np.arange(150) % 75)
    assert vars(classifier) == before


def test_a_weight_may_be_one_number(iris):
    weighted = SoftmaxClassifierCV([0.1, 1.0], cv=3).fit(*iris, sample_weight=2.0)
    alone = SoftmaxClassifierCV([0.2, 2.0], cv=3).fit(*iris)
    np.testing.assert_array_equal(weighted.scores_, alone.scores_)


@pytest.mark.parametrize(
    ("cv", "message"),
    [
        ([], "cv must give at least one fold"),
        ([(np.arange(0), np.arange(150))], "cv must give folds that train on examples"),
    ],
    ids=["no fold", "nothing to train on"],
)
def test_folds_that_are_none_are_refused(iris, cv, message):
    with pytest.raises(ValueError, match=message):
        SoftmaxClassifierCV([1.0], cv=cv).fit(*iris)


def test_a_score_of_tensors_is_that_of_arrays(iris):
    X, y = iris
    classifier = SoftmaxClassifierCV([1.0], scoring="neg_log_loss").fit(X, y)
    score = classifier.score(torch.tensor(X), torch.tensor(y), torch.ones(150))
    assert score == pytest.approx(classifier.score(X, y))


def test_a_C_that_is_no_list_is_named(iris):
    with pytest.raises(TypeError, match=r"Cs must be a number of them or some numbers, got 1\.0"):
        SoftmaxClassifierCV(1.0).fit(*iris)


def test_a_progress_bar_is_shown_where_it_is_asked_for(iris, capsys):
    SoftmaxClassifierCV([1.0], cv=2).fit(*iris)
    assert capsys.readouterr().err == ""
    SoftmaxClassifierCV([1.0], cv=2, verbose=1).fit(*iris)
    assert "2/2" in capsys.readouterr().err


def test_what_went_wrong_is_told_once(iris):
    with pytest.warns(ConvergenceWarning) as caught:
        SoftmaxClassifierCV([np.inf], cv=3).fit(iris[0][:100], iris[1][:100])
    assert len({str(warning.message) for warning in caught}) == len(caught) == 1


@pytest.mark.parametrize(
    ("Cs", "message"),
    [
        ([], "Cs must hold at least one number"),
        ([1.0, 0.0], "Cs must be above 0, got 0"),
        (0, "Cs must be at least 1"),
    ],
)
def test_values_of_C_that_are_none_are_refused(iris, Cs, message):
    with pytest.raises(ValueError, match=message):
        SoftmaxClassifierCV(Cs).fit(*iris)
