"""Two runs cannot share a work directory."""

import os

import pytest

from memjax.training.lock import exclusive


def test_a_second_run_is_refused_and_names_the_first(tmp_path):
    refused = pytest.raises(ValueError, match=f"in use by another run .process {os.getpid()}")
    with exclusive(str(tmp_path)), refused, exclusive(str(tmp_path)):
        pass
    with exclusive(str(tmp_path)):
        pass
