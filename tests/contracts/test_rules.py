"""Every rule keeps every contract; rule by rule, so that its programs are dropped with it."""

import pytest

from tests.contracts import gradients, rules, scenes, streams, transforms, values
from tests.contracts.scenes import FORMS

WHICH = ("recurrent", "chunkwise", "step")
ALL = [pytest.param(case, id=case.name) for case in rules.CASES]
FEW = [pytest.param(case, id=case.name) for case in rules.FEW]


@pytest.fixture(scope="class", autouse=True)
def _forget():
    yield
    scenes.forget()


@pytest.mark.parametrize("case", ALL, scope="class")
class TestEveryRule:
    @pytest.mark.parametrize("which", WHICH)
    def test_equals_the_oracle(self, case, which):
        values.check_oracle(FORMS, case, which)

    def test_short(self, case):
        values.check_lengths(FORMS, case, "chunkwise")

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("which", WHICH)
    def test_precision(self, case, which, dtype):
        values.check_precision(FORMS, case, which, dtype)

    @pytest.mark.parametrize("which", WHICH)
    def test_dtypes(self, case, which):
        values.check_dtypes(FORMS, case, which)

    def test_read(self, case):
        values.check_read(FORMS, case)

    def test_surprise(self, case):
        values.check_surprise(FORMS, case)

    def test_shared_heads(self, case):
        values.check_shared_heads(FORMS, case)

    @pytest.mark.parametrize("which", ["chunkwise", "step"])
    def test_gradients(self, case, which):
        gradients.check_gradients(FORMS, case, which)

    @pytest.mark.parametrize("which", ["recurrent", "chunkwise"])
    def test_gradients_by_differences(self, case, which):
        gradients.check_differences(FORMS, case, which)

    def test_gradient_of_the_start(self, case):
        gradients.check_start_gradient(FORMS, case)

    @pytest.mark.parametrize("which", WHICH)
    def test_causality(self, case, which):
        streams.check_causality(FORMS, case, which)

    @pytest.mark.parametrize("which", WHICH)
    def test_isolation(self, case, which):
        streams.check_isolation(FORMS, case, which)

    @pytest.mark.parametrize("which", WHICH)
    def test_documents(self, case, which):
        streams.check_documents(FORMS, case, which)


@pytest.mark.parametrize("case", FEW, scope="class")
class TestTheEngine:
    @pytest.mark.parametrize("which", ["recurrent", "chunkwise"])
    def test_split_anywhere(self, case, which):
        streams.check_split(FORMS, case, which)

    def test_split_between_forms(self, case):
        streams.check_mixed_split(FORMS, case)

    def test_gradient_through_a_split(self, case):
        gradients.check_split_gradient(FORMS, case)

    @pytest.mark.parametrize(
        "option", [{"block": 2}, {"block": 3}, {"remat": 0}, {"remat": 3}], ids=str
    )
    def test_options_change_nothing(self, case, option):
        gradients.check_option(FORMS, case, **option)

    def test_vmap(self, case):
        transforms.check_vmap(FORMS, case)

    def test_checkpoint(self, case):
        transforms.check_checkpoint(FORMS, case)


def test_jit():
    transforms.check_jit(FORMS, rules.BY_NAME["titans"])
