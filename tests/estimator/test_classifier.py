"""`SoftmaxClassifier`: scikit-learn's contract, its optimum, and what goes in and comes out."""

import pickle
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from scipy import sparse
from sklearn.base import clone
from sklearn.datasets import load_iris, load_wine
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from torch_softmax.estimator import SoftmaxClassifier


@parametrize_with_checks([SoftmaxClassifier()])
def test_contract_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def iris():
    return load_iris(return_X_y=True)


def objective(classifier, X, y, C, sample_weight=None):
    """C Σ w L + ½‖W‖², by the probabilities that an estimator gives."""
    z = classifier.decision_function(X).astype(np.longdouble)
    if z.ndim == 1:
        z = np.stack([np.zeros_like(z), z], 1)
    index = np.searchsorted(classifier.classes_, y)
    top = z.max(1, keepdims=True)
    losses = np.log(np.exp(z - top).sum(1)) + top[:, 0] - z[np.arange(len(z)), index]
    weight = 1 if sample_weight is None else sample_weight
    return (
        C * (weight * losses).sum() + 0.5 * np.square(classifier.coef_, dtype=np.longdouble).sum()
    )


def few_of_many(iris):
    """Fewer examples than features, with columns that are the same or constant."""
    generator = np.random.default_rng(0)
    X = generator.normal(size=(30, 50))
    return np.hstack([X, X[:, :3], np.ones((30, 1)), np.zeros((30, 1))]), iris[1][::5]


def rare_class(_):
    generator = np.random.default_rng(0)
    X = generator.normal(size=(10_000, 3))
    y = (X[:, 0] + generator.normal(size=10_000) > 0).astype(int)
    y[17] = 2
    return X, y


PROBLEMS = {
    "iris": lambda iris: iris,
    "wine": lambda _: load_wine(return_X_y=True),
    "two classes": lambda iris: (iris[0][50:], iris[1][50:]),
    "few of many": few_of_many,
    "rare class": rare_class,
}


@pytest.mark.parametrize("C", [1e-6, 1e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_objective_is_at_least_as_low_as_any_solver_of_scikit_learn(iris, problem, C):
    X, y = PROBLEMS[problem](iris)
    ours = objective(SoftmaxClassifier(C=C).fit(X, y), X, y, C)
    solvers = ["newton-cholesky", "lbfgs"] if len(X) < 1000 else ["newton-cholesky"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = [
            LogisticRegression(C=C, solver=solver, tol=1e-10, max_iter=1000).fit(X, y)
            for solver in solvers
        ]
    best = min(objective(classifier, X, y, C) for classifier in theirs)
    assert ours <= best * (1 + 1e-8)


@pytest.mark.parametrize("C", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("problem", ["iris", "two classes", "few of many"])
def test_coefficients_are_right_at_the_default_tolerance(iris, problem, C):
    X, y = PROBLEMS[problem](iris)
    X = StandardScaler().fit_transform(X)
    rough, exact = (SoftmaxClassifier(C=C, tol=tol).fit(X, y) for tol in (1e-4, 1e-9))
    assert np.linalg.norm(rough.coef_ - exact.coef_) <= 1.01e-4 * np.linalg.norm(exact.coef_)


def test_two_classes_have_one_vector_as_in_scikit_learn(iris):
    X, y = PROBLEMS["two classes"](iris)
    ours = SoftmaxClassifier(C=0.5, tol=1e-9).fit(X, y)
    theirs = LogisticRegression(C=0.5, tol=1e-12, max_iter=1000, solver="newton-cholesky").fit(X, y)
    assert ours.coef_.shape == (1, 4)
    assert ours.intercept_.shape == (1,)
    for name in ("coef_", "intercept_"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-6)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), rtol=1e-6)
    np.testing.assert_allclose(ours.predict_log_proba(X), np.log(ours.predict_proba(X)))


def test_no_intercept(iris):
    X, y = iris
    ours = SoftmaxClassifier(fit_intercept=False, tol=1e-9).fit(X, y)
    theirs = LogisticRegression(fit_intercept=False, tol=1e-9, solver="newton-cg").fit(X, y)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-5)
    np.testing.assert_array_equal(ours.intercept_, np.zeros(3))


# Labels and weights


@pytest.mark.parametrize(
    "names", [["b", "a", "c"], [-3, 10, 4], [False, True, True]], ids=["strings", "gaps", "bools"]
)
def test_labels_of_any_kind(iris, names):
    X, y = iris
    labels = np.array(names)[y]
    classifier = SoftmaxClassifier().fit(X, labels)
    np.testing.assert_array_equal(classifier.classes_, np.unique(labels))
    assert classifier.predict(X).dtype == labels.dtype
    assert classifier.score(X, labels) > 0.9


@pytest.mark.parametrize("class_weight", ["balanced", {0: 3, 2: 0.5}])
def test_weights_of_classes_are_those_of_scikit_learn(iris, class_weight):
    X, y = iris[0][:120], iris[1][:120]
    options = {"class_weight": class_weight, "tol": 1e-9}
    theirs = LogisticRegression(**options, solver="newton-cholesky").fit(X, y)
    ours = SoftmaxClassifier(**options).fit(X, y)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-6)


def test_integer_weights_are_repeated_examples(iris):
    X, y = iris
    weight = np.random.default_rng(0).integers(0, 4, len(y))
    weighted = SoftmaxClassifier(tol=1e-9).fit(X, y, sample_weight=weight)
    repeated = SoftmaxClassifier(tol=1e-9).fit(X.repeat(weight, 0), y.repeat(weight))
    np.testing.assert_allclose(weighted.coef_, repeated.coef_, rtol=0, atol=1e-7)


@pytest.mark.parametrize("by", ["sample_weight", "class_weight"])
@pytest.mark.parametrize("problem", ["iris", "two classes", "one class left"])
def test_a_class_without_weight_is_what_it_is_in_scikit_learn(iris, problem, by):
    X, y = PROBLEMS["two classes" if problem == "two classes" else "iris"](iris)
    without = [1, 2] if problem == "one class left" else [1]
    options = {"class_weight": dict.fromkeys(without, 0.0)} if by == "class_weight" else {}
    weight = None if options else (~np.isin(y, without)).astype(float)
    ours = SoftmaxClassifier(tol=1e-6, **options).fit(X, y, weight)
    theirs = LogisticRegression(solver="newton-cholesky", tol=1e-10, **options).fit(X, y, weight)
    np.testing.assert_array_equal(ours.classes_, theirs.classes_)
    np.testing.assert_array_equal(ours.predict(X), theirs.predict(X))
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-6)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=1e-6)


def test_a_class_without_weight_is_told_of_where_that_is_why_it_ends(iris):
    X, y = iris
    with pytest.warns(ConvergenceWarning, match="not converged .* leave out the class 1, which"):
        SoftmaxClassifier(tol=1e-12).fit(X, y, sample_weight=(y != 1).astype(float))


def test_weights_of_classes_that_are_not_there_are_of_no_account_where_all_have_one(iris):
    ours = SoftmaxClassifier(class_weight={0: 1, 1: 1, 2: 1, 7: 2}).fit(*iris)
    np.testing.assert_array_equal(ours.coef_, SoftmaxClassifier(class_weight={}).fit(*iris).coef_)


# What goes in and comes out


def test_a_copy_begins_anew_and_a_pickle_goes_on(iris):
    X, y = iris
    classifier = SoftmaxClassifier(C=3.0).fit(X, y)
    assert not hasattr(clone(classifier), "coef_")
    again = pickle.loads(pickle.dumps(classifier))
    np.testing.assert_array_equal(again.predict_proba(X), classifier.predict_proba(X))


def test_pipelines_searches_and_cross_validation(iris):
    X, y = iris
    pipeline = make_pipeline(StandardScaler(), SoftmaxClassifier())
    search = GridSearchCV(pipeline, {"softmaxclassifier__C": [0.01, 1.0]}, cv=3).fit(X, y)
    assert search.best_params_ == {"softmaxclassifier__C": 1.0}
    assert cross_val_score(pipeline, X, y, cv=3).mean() > 0.9


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_frames_are_known_by_the_names_of_their_columns(iris, library):
    frames = pytest.importorskip(library)
    X, y = iris
    frame = frames.DataFrame({f"column {i}": X[:, i] for i in range(4)})
    classifier = SoftmaxClassifier().fit(frame, frames.Series(y))
    np.testing.assert_allclose(classifier.coef_, SoftmaxClassifier().fit(X, y).coef_, rtol=1e-9)
    assert list(classifier.feature_names_in_) == list(frame.columns)
    with pytest.raises(ValueError, match="feature names"):
        classifier.predict(frame[list(frame.columns)[::-1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_go_in_and_come_out(iris, dtype):
    X, y = torch.tensor(iris[0], dtype=dtype), torch.tensor(iris[1])
    classifier = SoftmaxClassifier().fit(X, y)
    expected = SoftmaxClassifier().fit(X.numpy(), iris[1])
    for name in ("coef_", "intercept_"):
        value = getattr(classifier, name)
        assert value.dtype == dtype
        np.testing.assert_allclose(value.numpy(), getattr(expected, name), rtol=1e-5)
    for name in ("predict", "predict_proba", "predict_log_proba", "decision_function"):
        value = getattr(classifier, name)(X)
        assert isinstance(value, torch.Tensor)
        np.testing.assert_allclose(value.numpy(), getattr(expected, name)(X.numpy()), rtol=1e-5)
    assert classifier.score(X, y) == expected.score(X.numpy(), iris[1])


@pytest.mark.parametrize("dtype", ["float16", "uint8", "int64", "float32", ">f8"])
def test_arrays_of_any_dtype(iris, dtype):
    X, y = (10 * iris[0]).astype(dtype), iris[1]
    classifier = SoftmaxClassifier().fit(X, y)
    expected = SoftmaxClassifier(tol=1e-9).fit(X.astype(np.float64), y)
    np.testing.assert_allclose(classifier.coef_, expected.coef_, rtol=0, atol=1e-3)
    is_narrow = dtype in ("float16", "float32")
    assert classifier.coef_.dtype == (np.float32 if is_narrow else np.float64)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int8", "longdouble"])
@pytest.mark.parametrize("layout", ["csr_matrix", "csc_array", "coo_array"])
def test_sparse_matrices_are_what_they_are_as_arrays(iris, layout, dtype):
    X, y = np.where(iris[0] > 3, 10 * iris[0], 0).astype(dtype), iris[1]
    matrix = getattr(sparse, layout)(X)
    classifier = SoftmaxClassifier(tol=1e-6, dtype="float64")
    expected = clone(classifier).fit(X, y)
    classifier.fit(matrix, y)
    np.testing.assert_allclose(classifier.coef_, expected.coef_, atol=1e-6)
    for name in ("predict", "predict_proba", "decision_function"):
        actual = getattr(classifier, name)(matrix)
        np.testing.assert_array_equal(actual, getattr(classifier, name)(X))


def test_sparse_matrices_are_made_dense_a_few_rows_at_a_time(monkeypatch):
    rows, features = 5000, 1000
    matrix = sparse.random_array((rows, features), density=1e-3, format="csr", rng=0)
    made, toarray = [], sparse.csr_matrix.toarray
    monkeypatch.setattr(
        sparse.csr_matrix, "toarray", lambda part: made.append(part.shape[0]) or toarray(part)
    )
    SoftmaxClassifier(C=1e-3).fit(matrix, np.arange(rows) % 3)
    assert 0 < max(made) < rows


def test_numbers_of_a_sparse_matrix_are_finite(iris):
    X = sparse.csr_array(np.where(iris[0] == iris[0][7, 0], np.nan, 0))
    with pytest.raises(ValueError, match="Input X contains NaN"):
        SoftmaxClassifier().fit(X, iris[1])


def test_the_module_of_a_classifier_has_its_probabilities(iris):
    for X, y in (iris, PROBLEMS["two classes"](iris)):
        classifier = SoftmaxClassifier().fit(X, y)
        probability = classifier.to_linear().predict_proba(torch.from_numpy(X))
        np.testing.assert_allclose(probability.detach(), classifier.predict_proba(X), rtol=1e-12)


def test_a_warm_start_needs_no_steps(iris):
    classifier = SoftmaxClassifier(warm_start=True).fit(*iris)
    assert classifier.n_iter_[0] > 0
    assert classifier.fit(*iris).n_iter_[0] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_low_precision_go_in(iris, dtype):
    weight = torch.linspace(1, 2, 150).to(dtype)
    classifier = SoftmaxClassifier().fit(*iris, sample_weight=weight)
    expected = SoftmaxClassifier().fit(*iris, sample_weight=weight.double())
    np.testing.assert_array_equal(classifier.coef_, expected.coef_)


def test_labels_of_another_byte_order_are_predicted_for_tensors(iris):
    X, y = torch.tensor(iris[0]), iris[1]
    classifier = SoftmaxClassifier().fit(X, y.astype(">i4"))
    assert (classifier.predict(X).numpy() == SoftmaxClassifier().fit(X, y).predict(X).numpy()).all()


def test_dtypes_of_numpy_are_known(iris):
    X = iris[0].astype(np.float32)
    assert SoftmaxClassifier(dtype=np.float64).fit(X, iris[1]).coef_.dtype == np.float64


def test_tiny_weights_are_the_same_as_a_tiny_C(iris):
    X, y = iris[0].astype(np.float32), iris[1]
    weight = np.full(150, 1e-46)
    scaled = SoftmaxClassifier(C=1e46).fit(X, y, sample_weight=weight)
    np.testing.assert_allclose(scaled.coef_, SoftmaxClassifier().fit(X, y).coef_, atol=1e-3)


# What a user is told


@pytest.mark.parametrize("method", ["predict", "predict_proba", "decision_function"])
def test_examples_beyond_the_dtype_are_refused(iris, method):
    classifier = SoftmaxClassifier().fit(iris[0].astype(np.float32), iris[1])
    with pytest.raises(ValueError, match=r"logits are finite in torch\.float32"):
        getattr(classifier, method)(1e60 * iris[0])


def test_a_fit_that_fails_leaves_the_one_before(iris):
    X, y = iris
    classifier = SoftmaxClassifier().fit(X, y)
    expected = classifier.predict_proba(X)
    with pytest.raises(ValueError, match="at least 2 classes"):
        classifier.fit(X[:, :3], np.zeros(150))
    np.testing.assert_array_equal(classifier.predict_proba(X), expected)


def test_no_steps_leave_the_start(iris):
    with pytest.warns(ConvergenceWarning, match="not converged"):
        classifier = SoftmaxClassifier(max_iter=0).fit(*iris)
    assert classifier.n_iter_[0] == 0
    np.testing.assert_array_equal(classifier.predict_proba(iris[0]), np.full((150, 3), 1 / 3))


def test_too_few_steps_are_told_of(iris):
    with pytest.warns(ConvergenceWarning, match=r"not converged .* raise max_iter or tol"):
        SoftmaxClassifier(max_iter=2).fit(*iris)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_separable_classes_without_a_penalty_are_told_of(iris, dtype):
    X, y = iris[0][:100].astype(dtype), iris[1][:100]
    with pytest.warns(ConvergenceWarning, match="no finite optimum: choose a finite C"):
        classifier = SoftmaxClassifier(C=np.inf).fit(X, y)
    assert np.isfinite(classifier.coef_).all()
    assert classifier.score(X, y) == 1.0


def test_no_penalty_on_classes_that_overlap():
    X, y = rare_class(None)
    X, y = X[y < 2], y[y < 2]
    ours = SoftmaxClassifier(C=np.inf).fit(X, y)
    theirs = LogisticRegression(C=np.inf, tol=1e-10, solver="newton-cholesky").fit(X, y)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-6)


def test_what_float32_can_not_keep_is_told_of(iris):
    X, y = (iris[0] + 2000).astype(np.float32), iris[1]
    with pytest.warns(ConvergenceWarning, match="or pass dtype='float64'"):
        classifier = SoftmaxClassifier(C=100.0).fit(X, y)
    assert classifier.n_iter_[0] <= 30
    assert SoftmaxClassifier(C=100.0, dtype="float64").fit(X, y).result_.converged


def test_float32_stops_where_rounding_does_without_a_warning(iris):
    X, y = iris[0].astype(np.float32), iris[1]
    classifier = SoftmaxClassifier(C=1e4).fit(X, y)
    assert classifier.result_.gradient_norm <= 1e-4
    assert classifier.n_iter_[0] < classifier.max_iter


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"C": 0}, ValueError, "C must be above 0"),
        ({"C": "1"}, TypeError, "C must be a float"),
        ({"tol": -1.0}, ValueError, "tol must be a finite number above 0"),
        ({"max_iter": -1}, ValueError, "max_iter must be at least 0"),
        ({"device": "foo"}, ValueError, "device must be 'auto' or one of torch's, got 'foo'"),
        ({"dtype": "float16"}, ValueError, "dtype must be 'auto', 'float32' or 'float64'"),
        (
            {"class_weight": {0: -1.0}},
            ValueError,
            "class_weight must be a finite number of at least",
        ),
        ({"class_weight": dict.fromkeys(range(3), 0)}, ValueError, "class_weight must leave"),
        ({"class_weight": "heavy"}, ValueError, "class_weight must be a dict"),
        ({"class_weight": {0: 1, 7: 2}}, ValueError, r"classes, \[1, 2\], are not in class_weight"),
    ],
)
def test_an_unfit_parameter_is_named(iris, options, error, message):
    with pytest.raises(error, match=message):
        SoftmaxClassifier(**options).fit(*iris)


def test_weights_that_are_all_0_are_refused(iris):
    with pytest.raises(ValueError, match=r"(?i)sample.weight.* must "):
        SoftmaxClassifier().fit(*iris, sample_weight=np.zeros(150))


def test_sparse_tensors_are_refused_with_what_to_do(iris):
    with pytest.raises(TypeError, match="to_dense"):
        SoftmaxClassifier().fit(torch.tensor(iris[0]).to_sparse(), iris[1])
