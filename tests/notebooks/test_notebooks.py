"""Notebooks run from top to bottom, and what they compute is what their text says."""

import json
import pathlib
import sys

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = pathlib.Path(__file__).resolve().parents[2]
PATH = ROOT / "notebooks" / "neural_memory.ipynb"

# Put in front: warnings raised from our own code or from a cell are errors, others are not ours.
STRICT = """
import warnings
warnings.filterwarnings("error", module=r"memjax|pallas_kernels|__main__")
"""

# Put behind: what the text of the notebook states, as numbers.
RESULTS = """
import json
print(json.dumps({
    "form_difference": form_difference,
    "recall": {
        name: {
            str(a): [float(curve[:8].mean()), float(curve[24:40].mean())]
            for a, curve in zip(RETAIN, curves)
        }
        for name, curves in zip(("matrix", "mlp", "titans"), recall.values())
    },
    "surprise": mean_surprise,
    "guessed": guessed,
    "recited": {name: float(np.mean(runs)) for name, runs in correct.items()},
    "pulse_difference": pulse_difference,
    "pulse": {name: column.tolist() for name, column in zip(settings, stored.T)},
    "retention": {"second": second, "fresh": fresh},
    "split_difference": split_difference,
    "packed_difference": packed_difference,
    "leak": leak,
    "reset_difference": reset_difference,
}))
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """A Jupyter kernel of the running interpreter, sharing the tests' compilation cache."""
    home = tmp_path_factory.mktemp("jupyter")
    spec = home / "kernels" / "this_python" / "kernel.json"
    spec.parent.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.write_text(
        json.dumps({"argv": command, "display_name": "this Python", "language": "python"})
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(home))
        patch.setenv("IPYTHONDIR", str(home / "ipython"))
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        patch.delenv("MPLBACKEND", raising=False)
        yield "this_python"


def execute(notebook, kernel, folder):
    """Runs all cells; raises CellExecutionError at the first that raises."""
    client = NotebookClient(
        notebook, kernel_name=kernel, timeout=1200, resources={"metadata": {"path": str(folder)}}
    )
    return client.execute()


def load():
    return nbformat.read(PATH, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def executed(kernel, tmp_path_factory):
    """The notebook as its cells leave it, run where no file of the repository is at hand."""
    notebook = load()
    notebook.cells.insert(0, nbformat.v4.new_code_cell(STRICT))
    notebook.cells.append(nbformat.v4.new_code_cell(RESULTS))
    return execute(notebook, kernel, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def results(executed):
    return json.loads(executed.cells[-1].outputs[0]["text"])


def claims(results):
    """Each statement of the notebook's text, and whether its numbers bear it out."""
    recall, surprise = results["recall"], results["surprise"]
    first, second = surprise["first reading"], surprise["second reading"]
    newest, old = 0, 1
    pulse = {name: np.array(column) for name, column in results["pulse"].items()}
    at_second, fresh = results["retention"]["second"], results["retention"]["fresh"]
    return {
        "chunkwise is recurrent": results["form_difference"] < 1e-5,
        "the MLP holds more than the matrix": recall["mlp"]["1.0"][old]
        > 1.1 * recall["matrix"]["1.0"][old],
        "decay in a matrix fades the past": recall["matrix"]["0.95"][old]
        < 0.7 * recall["matrix"]["1.0"][old],
        "decay in a matrix sharpens the present": recall["matrix"]["0.95"][newest]
        > 1.15 * recall["matrix"]["1.0"][newest],
        "decay hurts a plain MLP at once": recall["mlp"]["0.99"][newest]
        < 0.6 * recall["mlp"]["1.0"][newest],
        "decay in Titans' MLP sharpens the present": recall["titans"]["0.99"][newest]
        > 1.15 * recall["titans"]["1.0"][newest],
        "decay in Titans' MLP fades the past": recall["titans"]["0.99"][old]
        < 0.8 * recall["titans"]["1.0"][old],
        "at 0.95 little is left of it": recall["titans"]["0.95"][old] < 0.15,
        "the second reading is known": second < 0.5 * first,
        "new text is surprising again": surprise["new"] > 1.8 * second,
        "bytes are guessed at the second reading": results["guessed"]["second reading"] > 0.8
        and results["guessed"]["first reading"] < 0.45,
        "it recites further after the second reading": results["recited"]["second reading"]
        > 2 * results["recited"]["first reading"],
        "a pulse follows the closed form": results["pulse_difference"] < 1e-5,
        "a step stores at once": abs(pulse["step"][0] - 1) < 1e-5,
        "momentum goes on learning": pulse["momentum"][0] < 0.2 and pulse["momentum"][-1] > 0.99,
        "retention lets it fade": pulse["retention"][0] > 0.99 and pulse["retention"][-1] < 0.1,
        "what has decayed is surprising again": bool(np.all(np.diff(at_second) > 0)),
        "new text is hardly affected by decay": max(fresh) < 1.1 * min(fresh),
        "a split changes nothing": results["split_difference"] < 1e-4,
        "a packed document is as alone": results["packed_difference"] < 1e-4,
        "without a reset it is not": results["leak"] > 0.1,
        "a new document forgets": results["reset_difference"] < 1e-5,
    }


def test_results_bear_out_the_text(results):
    wrong = [claim for claim, holds in claims(results).items() if not holds]
    assert not wrong, f"the notebook says, but its numbers do not: {wrong}; {results}"


@pytest.mark.parametrize(
    ("fault", "claim"),
    [
        (lambda r: r["surprise"].update({"second reading": r["surprise"]["first reading"]}),
         "the second reading is known"),
        (lambda r: r.update(split_difference=r["leak"]), "a split changes nothing"),
        (lambda r: r.update(packed_difference=r["leak"]), "a packed document is as alone"),
        (lambda r: r["recall"].update(mlp=r["recall"]["matrix"]),
         "the MLP holds more than the matrix"),
        (lambda r: r["pulse"].update(momentum=r["pulse"]["step"]), "momentum goes on learning"),
    ],
)  # fmt: skip
def test_a_memory_that_does_not_do_it_is_caught(results, fault, claim):
    results = json.loads(json.dumps(results))
    fault(results)
    assert not claims(results)[claim]


@pytest.mark.parametrize(
    ("cell", "error"),
    [("1 / 0", "ZeroDivisionError"), ("warnings.warn('careful')", "UserWarning")],
)
def test_a_cell_that_raises_or_warns_is_caught(kernel, tmp_path, cell, error):
    cells = [nbformat.v4.new_code_cell(source) for source in (STRICT, cell)]
    with pytest.raises(CellExecutionError, match=error):
        execute(nbformat.v4.new_notebook(cells=cells), kernel, tmp_path)


def test_first_code_cell_installs_memjax():
    cells = load().cells
    assert "colab.research.google.com" in cells[0].source
    install, *others = code_cells(load())
    assert cells[1].source == install.source
    assert 'find_spec("memjax") is None' in install.source
    assert "memjax[plot]" in install.source
    assert not any("pip install" in cell.source for cell in others)


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def test_no_output_is_an_error_or_a_warning(executed):
    for output in outputs(executed) + outputs(load()):
        assert output.output_type != "error", output
        assert output.get("name") != "stderr", output["text"]


def pictures(notebook):
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def test_stored_outputs_are_those_of_a_full_run(executed):
    stored = load()
    assert PATH.stat().st_size < 600_000
    counts = [cell.execution_count for cell in code_cells(stored)]
    assert counts == list(range(1, len(counts) + 1)), "run all cells in order, then save"
    assert pictures(stored) == pictures(executed) == 4
