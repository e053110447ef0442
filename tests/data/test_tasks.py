"""Synthetic tasks against solvers that read the tokens alone, in NumPy and plain Python."""

import functools
import itertools
import re

import jax
import numpy as np
import pytest

from memjax.data import ByteTokenizer, tasks
from memjax.data.tokenizers import BPETokenizer

SIZE = 16
SMALL = {
    "mqar": tasks.MQAR(vocabulary=64, length=48, pairs=5),
    "mqar_noise": tasks.MQAR(vocabulary=64, length=48, pairs=5, noise=True),
    "mqar_full": tasks.MQAR(vocabulary=12, length=20, pairs=5, power=1.0),
    "joint_recall": tasks.JointRecall(vocabulary=48, length=64, contexts=3, keys=4),
    "joint_recall_full": tasks.JointRecall(vocabulary=16, length=3 + 36, contexts=3, keys=3),
    "selective_copying": tasks.SelectiveCopying(vocabulary=9, length=30, count=6),
    "copying_full": tasks.SelectiveCopying(vocabulary=3, length=8, count=4),
    "parity": tasks.Parity(length=37),
    "s3": tasks.Permutations(length=19, degree=3),
    "s5": tasks.Permutations(length=19, degree=5),
    "s5_swaps": tasks.Permutations(length=19, degree=5, moved=2),
    "s_niah_1": tasks.make("s_niah_1", {"length": 700}),
    "s_niah_2": tasks.make("s_niah_2", {"length": 800}),
    "s_niah_3": tasks.make("s_niah_3", {"length": 900}),
}
TEXT = ("s_niah_1", "s_niah_2", "s_niah_3")


@functools.cache
def rows(name, seed=0, size=SIZE):
    batch = jax.jit(SMALL[name].batch, static_argnums=1)(jax.random.key(seed), size)
    return tuple(np.asarray(x) for x in batch)


# Solvers: (task, tokens [T]) -> {position: answer}, from the definition and nothing else.


def solve_mqar(task, tokens):
    """Reads the pairs; every later even place that holds one of their keys is a query.

    With noise a key may also come up by chance: then the last of its places counts or any, and the
    caller compares only where the task scores.
    """
    known = {}
    for i in range(0, 2 * task.pairs, 2):
        key, value = int(tokens[i]), int(tokens[i + 1])
        assert 1 <= key < task.vocabulary // 2 <= value < task.vocabulary
        assert key not in known, "a key twice"
        assert value not in known.values(), "a value twice"
        known[key] = value
    later = range(2 * task.pairs, task.length, 2)
    return {t: known[int(tokens[t])] for t in later if int(tokens[t]) in known}


def solve_joint_recall(task, tokens):
    v = task.vocabulary

    def kind(token):
        return "blank" if token == 0 else ("context", "key", "value")[
            0 if token < v // 4 else 1 if token < v // 2 else 2
        ]  # fmt: skip

    known, answers, context, key = {}, {}, None, None
    keys_of = {}
    for t, token in enumerate(map(int, tokens)):
        if kind(token) == "context":
            context = token
        elif kind(token) == "key":
            key = token
            if (context, key) in known:
                answers[t] = known[context, key]
        elif kind(token) == "value":
            assert (context, key) not in known, "a cell twice"
            known[context, key] = token
            keys_of.setdefault(context, set()).add(key)
    assert len(known) == task.contexts * task.keys
    assert len(keys_of) == task.contexts
    assert len({frozenset(keys) for keys in keys_of.values()}) == 1, "all contexts share the keys"
    return answers


def solve_selective_copying(task, tokens):
    marker = task.vocabulary - 1
    data = [int(x) for x in tokens if 0 < x < marker]
    markers = [t for t, x in enumerate(tokens) if x == marker]
    assert markers == list(range(task.length - task.count, task.length))
    return dict(zip(markers, data, strict=True))


def solve_parity(task, tokens):
    answers, odd = {}, False
    assert tokens[0] == 2
    for t, token in enumerate(tokens[1:], 1):
        odd ^= {0: False, 1: True}[int(token)]
        answers[t] = int(odd)
    return answers


def solve_permutations(task, tokens):
    table = sorted(itertools.permutations(range(task.degree)))
    answers, state = {}, list(range(task.degree))
    assert tokens[0] == len(table)
    for t, token in enumerate(tokens[1:], 1):
        new = table[token]
        state = [new[j] for j in state]
        answers[t] = table.index(tuple(state))
    return answers


def solve_needle(task, tokens):
    """Reads the text: the value that the needle gives to the name in the question."""
    text = bytes(int(x) for x in tokens if x < 256).decode("utf-8", errors="replace")
    needle = r"One of the special magic (number|uuid)s for ([a-z]+-[a-z]+) is: ([0-9a-f-]+)\."
    ((kind, name, value),) = re.findall(needle, text)
    assert kind == task.value
    assert re.fullmatch(
        {"number": "[1-9][0-9]{6}", "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}"
         "-[89ab][0-9a-f]{3}-[0-9a-f]{12}"}[kind], value
    )  # fmt: skip
    question = f"The special magic {kind} for {name} mentioned in the provided text is"
    assert text.count(question) == 1
    # eos is one token that the text does not have
    start = len(text[: text.index(question) + len(question)].encode("utf-8"))
    return {start + i: ord(c) for i, c in enumerate(" " + value)}


SOLVERS = {
    tasks.MQAR: solve_mqar,
    tasks.JointRecall: solve_joint_recall,
    tasks.SelectiveCopying: solve_selective_copying,
    tasks.Parity: solve_parity,
    tasks.Permutations: solve_permutations,
    tasks.NeedleInText: solve_needle,
}


def wrong_rows(task, tokens, targets, weights):
    """Rows whose scored positions or targets are not those of the solver."""
    wrong = []
    for b in range(len(tokens)):
        answers = SOLVERS[type(task)](task, tokens[b])
        scored = np.flatnonzero(weights[b])
        if getattr(task, "noise", False):  # chance keys are not scored
            answers = {t: answers[t] for t in scored if t in answers}
        right = sorted(answers) == scored.tolist()
        if not right or any(targets[b, t] != answers[t] for t in scored):
            wrong.append(b)
    return wrong


@pytest.mark.parametrize("name", SMALL)
def test_contract(name):
    task = SMALL[name]
    assert isinstance(task, tasks.Task)
    tokens, targets, weights = rows(name)
    for x, dtype in ((tokens, np.int32), (targets, np.int32), (weights, np.float32)):
        assert (x.shape, x.dtype) == ((SIZE, task.length), dtype)
    assert np.isin(weights, [0, 1]).all()
    assert 0 <= tokens.min() <= tokens.max() < task.vocabulary
    assert 0 <= targets.min() <= targets.max() < task.vocabulary
    assert (targets[weights == 0] == 0).all()
    assert (weights.sum(1) == task.scored).all()
    assert type(task)(**tasks.options(task)) == task
    assert hash(task) == hash(type(task)(**tasks.options(task)))


@pytest.mark.parametrize("name", SMALL)
def test_an_independent_solver_agrees(name):
    assert wrong_rows(SMALL[name], *rows(name)) == []


@pytest.mark.parametrize("name", SMALL)
def test_the_solver_notices_a_wrong_target(name):
    tokens, targets, weights = (x.copy() for x in rows(name))
    t = np.flatnonzero(weights[3])[-1]
    targets[3, t] = (targets[3, t] + 1) % SMALL[name].vocabulary
    assert wrong_rows(SMALL[name], tokens, targets, weights) == [3]
    weights[5, np.flatnonzero(weights[5])[0]] = 0
    if not getattr(SMALL[name], "noise", False):
        assert wrong_rows(SMALL[name], tokens, targets, weights) == [3, 5]


@pytest.mark.parametrize("name", ["mqar", "parity", "s_niah_2"])
def test_the_key_decides_all(name):
    first = rows(name)
    eager = SMALL[name].batch(jax.random.key(0), SIZE)
    other = rows(name, seed=1)
    for x, y in zip(first, eager, strict=True):
        np.testing.assert_array_equal(x, y)
    assert (first[0] != other[0]).any(axis=1).all()
    assert len({row.tobytes() for row in first[0]}) == SIZE, "rows of a batch differ"


@pytest.mark.parametrize("name", ["mqar", "joint_recall", "selective_copying", *TEXT])
def test_the_answer_does_not_leak(name):
    """Where recall is scored, neither the token read nor the next one gives the answer.

    In a needle's row the right answer is read after each of its tokens was predicted: the next
    token is the target by construction, and what must not be there is the value elsewhere.
    """
    task = SMALL[name]
    tokens, targets, weights = rows(name)
    for b in range(SIZE):
        scored = np.flatnonzero(weights[b])
        if name in TEXT:
            text = ByteTokenizer().decode(tokens[b, : scored[0] + 1])
            value = "".join(map(chr, targets[b, scored])).strip()
            assert text.count(value) == 1
            assert value[:-1] in ByteTokenizer().decode(tokens[b, scored[0] :])
            assert (tokens[b, scored[-1] + 1 :] == ByteTokenizer.pad).all()
            continue
        assert (tokens[b, scored] != targets[b, scored]).all()
        first = {"mqar": 2 * getattr(task, "pairs", 0), "joint_recall": 27}.get(name, scored[0])
        assert not np.isin(tokens[b, first:], targets[b, scored]).any()


def chi_square(observed, expected):
    """How many standard deviations the statistic lies above its mean."""
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    return (statistic - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize("power", [0.01, 0.5, 1.0])
def test_queries_of_mqar_follow_the_power_law(power):
    """The first slot has probability p(i); the second sum_j p(j) p(i) / (1 - p(j)), i != j."""
    task = tasks.MQAR(vocabulary=64, length=36, pairs=4, power=power)
    slots, n = 14, 20_000
    tokens, _, weights = map(
        np.asarray, jax.jit(task.batch, static_argnums=1)(jax.random.key(5), n)
    )
    p = np.arange(1, slots + 1, dtype=np.float64) ** (power - 1)
    p /= p.sum()
    second = np.array(
        [sum(p[j] * p[i] / (1 - p[j]) for j in range(slots) if j != i) for i in range(slots)]
    )
    for pair, expected in ((0, p), (1, second)):
        keys = tokens[:, 2 * pair]
        places = ((tokens[:, 8:] == keys[:, None]) & (weights[:, 8:] > 0)).argmax(1)
        assert (places % 2 == 0).all()
        observed = np.bincount(places // 2, minlength=slots)
        assert abs(chi_square(observed, n * expected)) < 5
    if power < 1:
        assert chi_square(observed, n * p) > 5, "the law of the first would be rejected"


@pytest.mark.parametrize("power", [20.0, 60.0])
def test_a_large_power_of_mqar_does_not_overflow(power):
    task = tasks.MQAR(vocabulary=64, length=64, pairs=2, power=power)
    i = np.arange(1, 31)
    expected = (i / 30.0) ** (power - 1)
    np.testing.assert_allclose(task.probabilities, expected / expected.sum(), rtol=1e-4, atol=1e-30)
    weights = task.batch(jax.random.key(0), 50).weights
    assert len(np.unique(weights, axis=0)) > 1


def test_slots_of_mqar_are_drawn_where_their_chances_underflow():
    task = tasks.MQAR(vocabulary=64, length=64, pairs=8, power=2000.0)
    assert (task.probabilities == 0).sum() > 24 - 8
    rows = task.batch(jax.random.key(0), 20)
    np.testing.assert_array_equal(rows.weights[:, 64 - 16 :: 2], 1)  # the last slots, all likelier


@pytest.mark.parametrize("power", [True, "2", np.inf, np.nan, -1.0])
def test_a_power_of_mqar_that_is_no_number_above_0_is_named(power):
    task = tasks.MQAR()
    object.__setattr__(task, "power", power)  # past the type checks of the tests
    with pytest.raises(ValueError, match=f"power {power!r} must be a finite number above 0"):
        task.__post_init__()


def test_draws_are_uniform():
    n = 20_000
    task = tasks.SelectiveCopying(vocabulary=5, length=9, count=3)
    tokens = np.asarray(jax.jit(task.batch, static_argnums=1)(jax.random.key(2), n).tokens)
    sets = (tokens[:, :6] > 0) @ (1 << np.arange(6))
    counts = np.unique(sets, return_counts=True)[1]
    assert len(counts) == 20
    assert chi_square(counts, np.full(20, n / 20)) < 5
    first = tokens[np.arange(n), (tokens[:, :6] > 0).argmax(1)]
    assert chi_square(np.bincount(first)[1:], np.full(3, n / 3)) < 5

    task = tasks.MQAR(vocabulary=10, length=8, pairs=2)
    tokens = np.asarray(jax.jit(task.batch, static_argnums=1)(jax.random.key(3), n).tokens)
    pairs = np.unique(tokens[:, [0, 2]], axis=0, return_counts=True)[1]
    assert len(pairs) == 12  # ordered pairs of the keys 1 .. 4
    assert chi_square(pairs, np.full(12, n / 12)) < 5


def test_swaps_are_the_permutations_that_move_two_things_or_none():
    tokens = tasks.make("s5_swaps").batch(jax.random.key(0), 64).tokens[:, 1:]
    table = list(itertools.permutations(range(5)))
    drawn = {table[int(token)] for token in np.unique(tokens)}
    assert drawn == {p for p in table if sum(i != x for i, x in enumerate(p)) in (0, 2)}


def test_needles_stand_anywhere_and_rows_are_full():
    task = tasks.make("s_niah_1", {"length": 900})
    tokens, _, weights = map(np.asarray, task.batch(jax.random.key(0), 200))
    places = [ByteTokenizer().decode(row).index("\nOne of the special") for row in tokens]
    assert len(set(places)) > 4
    sentence = len("\nThe grass is green. The sky is blue. The sun is yellow. Here we go. ") + 21
    unused = task.length - 1 - np.array([np.flatnonzero(w)[-1] for w in weights])
    assert (unused < sentence).all()


def test_needles_in_any_text_with_any_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text("Der Mond ist aufgegangen. Die Sternlein prangen! Wer? " * 80)
    text = (tmp_path / "a.txt").read_text() + "One of the special magic numbers 0123456789 for"
    BPETokenizer.train([text], 384).save(tmp_path / "bpe.json")
    tokenizer = BPETokenizer.load(tmp_path / "bpe.json")
    task = tasks.NeedleInText(
        length=400,
        haystack="text",
        source=str(tmp_path / "a.txt"),
        tokenizer=str(tmp_path / "bpe.json"),
    )
    tokens, targets, weights = map(np.asarray, task.batch(jax.random.key(0), 8))
    assert task.vocabulary == tokenizer.vocab
    assert (weights.sum(1) <= task.scored).all()
    for b in range(8):
        scored = np.flatnonzero(weights[b])
        read = tokenizer.decode(tokens[b, : scored[0] + 1])
        assert "Sternlein prangen!" in read
        (value,) = re.findall(r"is: (\d{7})\.", read)
        assert tokenizer.decode(targets[b, scored]) == " " + value
        np.testing.assert_array_equal(targets[b, scored[:-1]], tokens[b, scored[1:]])


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("mqar", {"length": 65}, "length 65 must be even"),
        ("mqar", {"pairs": 17}, "make it at least 68, or pairs at most 16"),
        ("mqar", {"pairs": 0}, "MQAR: pairs 0 must be an integer of at least 1"),
        ("mqar", {"vocabulary": 8, "pairs": 4}, "make it at least 10"),
        ("mqar", {"power": 0.0}, "MQAR: power 0.0 must be a finite number above 0"),
        ("mqar", {"pair": 2}, "has no 'pair'; did you mean 'pairs'"),
        ("joint_recall", {"contexts": 8}, "make it at least 136"),
        ("joint_recall", {"vocabulary": 16}, "has 3 contexts to draw 4 from; make it at least 20"),
        ("selective_copying", {"length": 20}, "make it at least 32"),
        ("parity", {"length": 1}, "length 1 must be an integer of at least 2"),
        ("permutations", {"degree": 7}, "5,040 permutations; make it at most 6"),
        ("permutations", {"degree": 3, "moved": 4}, "moved 4 must be at most the degree 3"),
        ("permutations", {"moved": 1}, "moved 1 must be an integer of at least 2"),
        ("s5", {"degree": 4}, "degree is fixed by the task 's5'"),
        ("s_niah_1", {"length": 200}, "make it at least"),
        ("s_niah_2", {"source": "no/such/text"}, "does not exist"),
        ("mqra", {}, "unknown task 'mqra'; did you mean 'mqar'"),
        ("zzz", {}, "valid: mqar, joint_recall"),
    ],
)
def test_bad_settings_are_explained(name, settings, message):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        tasks.make(name, settings)


def test_unknown_haystacks_are_explained():
    with pytest.raises(ValueError, match="haystack must be one of"):
        tasks.NeedleInText(haystack="essay")


@pytest.mark.parametrize("name", TEXT)
def test_the_least_length_does(name):
    """The length that the error asks for makes rows for any name and value."""
    with pytest.raises(ValueError, match="make it at least") as error:
        tasks.make(name, {"length": 100})
    least = int(str(error.value).split()[-1])
    task = tasks.make(name, {"length": least})
    assert wrong_rows(task, *map(np.asarray, task.batch(jax.random.key(1), 32))) == []
