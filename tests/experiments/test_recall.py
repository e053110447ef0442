"""Sweeps over tasks: the script end to end, going on after a stop, the table, the errors."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from memjax.models import mixers
from memjax.training import cli, sweep
from memjax.training.config import plain
from memjax.training.sweep import runs
from memjax.training.sweep.runs import duration

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "recall.py"


def script(*arguments):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-scripts"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    return subprocess.run(
        [sys.executable, str(ROOT / "experiments" / "recall.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def config(**changes):
    """One attention layer on parity of two bits: two runs."""
    values = {
        "tasks": {"parity": {"length": 3}},
        "models": {"small": {"pattern": ("transformer",)}},
        "model": {"layers": 1, "heads": 1, "feed_forward": "none", "dtype": "float32"},
        "dims": (4,),
        "lrs": (1e-2, 1e-3),
        "mesh": {"data": 1},
        "train": {"steps": 2, "batch": 4, "warmup": 0, "log_every": 1},
        "score": {"rows": 8, "batch": 8, "every": 2},
    }
    return {**values, **changes}


def run(workdir, **changes):
    return sweep.run(sweep.read(config(**changes)), str(workdir), progress=False)


def test_the_whole_way(tmp_path):
    """The smoke sweep, and again after one of its runs is gone: only that one is made anew."""
    arguments = (f"--config={CONFIG}:smoke", f"--workdir={tmp_path}")
    done = script(*arguments)
    assert done.returncode == 0, done.stderr
    assert "4 runs, 0 of them finished already" in done.stderr
    assert re.search(r"\[1/4\] mqar lmm-ttt d8 s0 lr 0.01: accuracy 0\.\d+ \(4 steps", done.stderr)
    assert re.search(r"\[4/4\] mqar transformer d8 s0 lr 0.001: .*; 0 s left", done.stderr)
    assert "\r" not in done.stderr, "no bar in a log file"
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert [line.split("|")[2].strip() for line in table[2:]] == ["lmm-ttt", "transformer"]
    assert (tmp_path / "recall.png").stat().st_size > 5000
    assert table[2] in (tmp_path / "recall.md").read_text()
    content = json.loads((tmp_path / "recall.json").read_text())
    assert len(content["runs"]) == 4
    assert content["rows"][0]["model"] == "lmm-ttt"
    assert {"memjax", "jax", "device"} <= content["versions"].keys()

    files = sorted((tmp_path / "runs" / "mqar").iterdir())
    assert len(files) == 4
    files[0].unlink()
    kept = [file.stat().st_mtime_ns for file in files[1:]]
    again = script(*arguments)
    assert again.returncode == 0, again.stderr
    assert "4 runs, 3 of them finished already" in again.stderr
    assert [file.stat().st_mtime_ns for file in files[1:]] == kept
    assert json.loads((tmp_path / "recall.json").read_text())["rows"] == content["rows"]
    assert [x for x in again.stdout.splitlines() if x.startswith("|")] == table


def test_a_sweep_that_is_stopped_goes_on(tmp_path, monkeypatch):
    """SIGTERM in the second run: the first is kept, nothing is left of the second."""
    from memjax.training.tasks import TaskTrainer

    whole, _ = run(tmp_path / "whole")
    started = []
    train = TaskTrainer.run

    def interrupted(self, seed, lr, **options):
        started.append(lr)
        if len(started) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return train(self, seed, lr, **options)

    with monkeypatch.context() as patch:
        patch.setattr(TaskTrainer, "run", interrupted)
        found, stopped = run(tmp_path / "cut")
    assert stopped == "SIGTERM"
    assert [one.lr for one, _ in found] == [1e-2]
    (file,) = (tmp_path / "cut" / "runs" / "parity").iterdir()
    assert file.name == "small-d4-s0-lr0.01.json"

    with monkeypatch.context() as patch:
        patch.setattr(TaskTrainer, "run", lambda *a, **k: started.append("again") or train(*a, **k))
        found, stopped = run(tmp_path / "cut")
    assert (stopped, started) == (None, [1e-2, 1e-3, "again"])
    assert [r._replace(seconds=0) for _, r in found] == [r._replace(seconds=0) for _, r in whole]


def test_a_log_file_tells_how_far_a_run_is(tmp_path, monkeypatch, capsys):
    train = {"steps": 4, "batch": 4, "warmup": 0, "log_every": 2}
    one = config(train=train, lrs=(1e-2,))
    sweep.run(sweep.read(one), str(tmp_path / "quick"))
    assert "step" not in capsys.readouterr().err.replace("4 steps", "")
    monkeypatch.setattr(runs, "LOG_SECONDS", 0)
    sweep.run(sweep.read(one), str(tmp_path / "slow"))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 + 2  # what a sweep says anyway; after 2 and 4 steps
    assert re.fullmatch(r"parity small d4 s0 lr 0.01: step 2 of 4, loss \d+\.\d{3}", lines[1])


def test_results_of_other_settings_are_not_mixed(tmp_path):
    run(tmp_path, lrs=(1e-2,))
    train = {**config()["train"], "steps": 3}
    with pytest.raises(ValueError, match=r"lr0.01.json is of a run with train.steps = 2, .* has 3"):
        run(tmp_path, lrs=(1e-2,), train=train)
    # but more of the same is added to what is there
    found, _ = run(tmp_path, lrs=(1e-2, 1e-1))
    assert len(found) == 2


def test_a_rate_that_solves_a_task_is_enough(tmp_path):
    easy = {**config()["score"], "stop": 1e-6}
    found, stopped = run(tmp_path, seeds=(0, 1), score=easy)
    assert stopped is None
    assert [(one.seed, one.lr) for one, _ in found] == [(0, 1e-2), (1, 1e-2)]
    assert all(record.accuracy > 0 for _, record in found)
    assert len(run(tmp_path, seeds=(0, 1), score=easy)[0]) == 2, "nothing more to do"
    found, _ = run(tmp_path / "hard", seeds=(0, 1), score={**easy, "stop": 2.0})
    assert len(found) == 4


def test_a_result_older_than_a_field_counts_as_having_its_default(tmp_path):
    settings = {"lrs": (1e-2,), "models": {"small": {"memory": {"lr_max": 0.1}}}}
    run(tmp_path, **settings)
    (path,) = tmp_path.glob("runs/*/*.json")
    content = json.loads(path.read_text())
    del content["run"]["model"]["memory"]["lr_max"]
    path.write_text(json.dumps(content))
    assert len(run(tmp_path, **settings)[0]) == 1
    assert json.loads(path.read_text()) == content, "not run again"
    settings["models"]["small"]["memory"] = {"lr_max": 0.2}
    with pytest.raises(ValueError, match=r"model.memory.lr_max = 0.1, but this sweep has 0.2"):
        run(tmp_path, **settings)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", '{"run": {}, "result": {"accuracy": 1}}', "\x00\xff"]
)
def test_damaged_files_are_named(tmp_path, text):
    one = sweep.read(config()).runs(str(tmp_path))[1]
    os.makedirs(os.path.dirname(one.path))
    pathlib.Path(one.path).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=re.escape(one.path) + " is not the result of a run"):
        run(tmp_path)
    assert os.listdir(os.path.dirname(one.path)) == [os.path.basename(one.path)], "before any work"


@pytest.mark.parametrize("accuracy", [None, "0.5", float("nan"), 1.5])
def test_results_that_are_no_share_are_named(tmp_path, accuracy):
    run(tmp_path, lrs=(1e-2,))
    (file,) = (tmp_path / "runs" / "parity").iterdir()
    content = json.loads(file.read_text())
    content["result"]["accuracy"] = accuracy
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{file.name} is not the result of a run"):
        run(tmp_path, lrs=(1e-2,))
    file.unlink()
    file.mkdir()
    with pytest.raises(ValueError, match=f"{file.name} is not the result of a run .IsADirectory"):
        run(tmp_path, lrs=(1e-2,))


def record(accuracy, **changes):
    values = {"accuracy": accuracy, "exact": accuracy / 2, "loss": 1.0, "rows": 8, "steps": 2}
    values |= {"seconds": 1.0, "diverged": None, "parameters": 10, "state_bytes": 100}
    return sweep.Record(**{**values, **changes})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("exact", True),
        ("loss", "1"),
        ("loss", float("inf")),
        ("rows", -1),
        ("steps", "x"),
        ("steps", -1),
        ("seconds", None),
        ("seconds", -1.0),
        ("diverged", 1.5),
        ("parameters", None),
        ("parameters", 10.0),
        ("state_bytes", -1),
    ],
)
def test_every_field_of_a_result_is_checked(tmp_path, field, value):
    one = sweep.read(config()).runs(str(tmp_path))[0]
    os.makedirs(os.path.dirname(one.path))

    def write(result):
        content = {"run": one.identity(), "result": result._asdict()}
        pathlib.Path(one.path).write_text(json.dumps(content))

    for good in (record(0.5), record(0.0, loss=None, diverged=1, rows=0)):
        write(good)
        assert runs.finished(one) == good
    write(record(0.5, **{field: value}))
    message = f"{re.escape(one.path)} is not the result of a run .ValueError: {field} "
    with pytest.raises(ValueError, match=message):
        runs.finished(one)


def test_the_table_takes_the_best_rate_of_each_seed(tmp_path):
    grid = sweep.read(config(seeds=(0, 1), dims=(4, 8)))
    accuracies = [0.5, 0.75, 1.0, 0.0, 0.25, 0.25, 0.5, 0.125]  # dim, seed, lr
    found = list(zip(grid.runs("x"), map(record, accuracies), strict=True))
    found[3] = (found[3][0], record(0.0, loss=None, diverged=2))
    small, large = sweep.best(found)
    assert (small.dim, small.accuracies, small.lrs) == (4, (0.75, 1.0), (1e-3, 1e-2))
    assert (small.accuracy, small.exacts, small.diverged) == (0.875, (0.375, 0.5), 1)
    assert (large.dim, large.accuracies, large.lrs) == (8, (0.25, 0.5), (1e-3, 1e-2))
    assert (
        "| parity | small | 4 | 10 | 100 | 0.875 | 0.750, 1.000 | 0.438 | 0.001, 0.01 | 2, 2 | 1 |"
        in sweep.table([small, large])
    )
    text = sweep.write(str(tmp_path), found, "a command")
    assert "a command" in (tmp_path / "recall.md").read_text()
    assert text in (tmp_path / "recall.md").read_text()
    assert (tmp_path / "recall.png").exists()


def test_the_table_has_what_other_commands_of_the_config_finished(tmp_path):
    models = {"a": {"pattern": ("transformer",)}, "b": {"pattern": ("swa",)}}
    values = config(models=models, lrs=(1e-2,))
    for name in models:
        sweep.run(sweep.read(values, only_models=[name]), str(tmp_path), progress=False)

    def names():
        return [one.cell.model_name for one, _ in sweep.kept(sweep.read(values), str(tmp_path))]

    assert names() == ["a", "b"]
    values["models"]["a"]["qk_norm"] = True
    assert names() == ["b"], "a file of other settings"


def test_without_matplotlib_the_table_is_written_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("memjax.training.report.figure_class", lambda: None)
    sweep.write(str(tmp_path), [(sweep.read(config()).runs("x")[0], record(0.5))], "c")
    assert sorted(os.listdir(tmp_path)) == ["recall.json", "recall.md"]
    assert "png" not in (tmp_path / "recall.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": {"x": {"pattern": ("gated_deltanett",)}}}, r"models.x: unknown mixer 'gated_d"),
        ({"models": {"x": {"pattern": ("lm",)}}}, r"models.x: unknown mixer 'lm'; .*'lmm'"),
        ({"models": {"x": {"patern": ("lmm",)}}}, r"models.x: unknown key patern; .*'pattern'"),
        ({"models": {"x": {"dim": 8}}}, r"models.x: dim comes from dims: leave it out"),
        ({"models": {"a/b": {}}}, r"models: 'a/b' names files"),
        ({"models": {}}, r"a sweep needs models"),
        ({"tasks": {"p": {"task": "parety"}}}, r"tasks.p: unknown task 'parety'; .*'parity'"),
        ({"tasks": {"parity": {"size": 2}}}, r"tasks.parity: the task 'parity' has no 'size'"),
        ({"tasks": {"parity": 3}}, r"tasks.parity must be a mapping"),
        (
            {"tasks": {"permutations": {"degree": 2, "test": {"degree": 3}}}},
            r"tasks.permutations: the test has 7 tokens, training 3",
        ),
        ({"seeds": 3}, r"seeds must be a tuple of different numbers.*config.seeds='\(1,\)'"),
        ({"seeds": (True,)}, r"seeds must be"),
        (
            {"seeds": (2**70,)},
            r"each at least 0 and at most 4294967295, got",
        ),
        ({"lrs": (1e-3, 1e-3)}, r"lrs must be a tuple of different numbers"),
        ({"lrs": (float("inf"),)}, r"lrs must be"),
        ({"models": {"x": None}}, r"models.x must be a mapping of LanguageModelConfig's fields"),
        ({"dims": (0,)}, r"each at least 1"),
        ({"train": {"lr": 1e-3}}, r"unknown key train.lr"),
        ({"score": {"row": 3}}, r"unknown key score.row: did you mean 'rows'"),
        ({"seed": 3}, r"unknown section seed: did you mean 'seeds'"),
        ({"model": {"heads": 3, "layers": 1}}, r"dim 4 must be a multiple of heads 3"),
    ],
)
def test_bad_configurations_are_explained(changes, message):
    with pytest.raises(ValueError, match=message):
        sweep.read(config(**changes))


def test_parts_of_a_sweep_by_name():
    values = config(models={"a": {}, "b": {"qk_norm": True}})
    grid = sweep.read(values, only_models=["b"], only_tasks=["parity"])
    assert [(cell.task_name, cell.model_name) for cell in grid.cells] == [("parity", "b")]
    with pytest.raises(ValueError, match=r"no model 'c': valid keys: a, b"):
        sweep.read(values, only_models=["c"])
    with pytest.raises(ValueError, match=r"none of the models was chosen: there are a, b"):
        sweep.read(values, only_models=[])
    near = sweep.read(config(lrs=(0.01, 0.0100000001)))
    assert len({one.path for one in near.runs("x")}) == 2


@pytest.mark.parametrize("variant", ["mqar", "joint", "copying", "parity", "s5", "niah", "smoke"])
def test_every_variant_describes_runs(variant):
    values = cli.load_config(f"{CONFIG}:{variant}")
    models = plain(values)["models"]
    if variant != "smoke":
        assert models.keys() == {*mixers.registry.names(), "lmm+swa"} - {"attention"}
    grid = sweep.read(values)
    assert len(grid.cells) == len(values.tasks) * len(models) * len(values.dims)
    names = [one.path for one in grid.runs("x")]
    assert len(set(names)) == len(names)


def test_every_model_of_the_sweep_can_be_built():
    grid = sweep.read(cli.load_config(f"{CONFIG}:parity"))
    assert all(cell.trainer.parameters > 0 for cell in grid.cells if cell.dim == 64)


def test_a_model_takes_what_it_does_not_say_from_the_shared_one():
    values = config(
        models={"a": {"memory": {"expansion": None}}, "b": {}},
        model={**config()["model"], "memory": {"chunk": 4, "expansion": 2}},
    )
    memories = [cell.trainer.model.memory for cell in sweep.read(values).cells]
    assert [(m.chunk, m.expansion) for m in memories] == [(4, None), (4, 2)]


def test_unknown_variants_and_overrides_are_explained():
    with pytest.raises(ValueError, match="no variant 'mqr'; there are mqar, joint"):
        cli.load_config(f"{CONFIG}:mqr")
    with pytest.raises(ValueError, match=r"did you mean 'train.steps'"):
        cli.check(["recall.py", f"--config={CONFIG}:smoke", "--config.train.stepps=3"])


def test_help_helps():
    text = script("--help").stdout
    assert "python experiments/recall.py --config=configs/recall.py:mqar" in text
    assert "--config: config file" in text
    assert "--models" in text


@pytest.mark.parametrize(
    ("seconds", "words"), [(8.4, "8 s"), (200.0, "3 min 20 s"), (7500.0, "2 h 5 min")]
)
def test_durations(seconds, words):
    assert duration(seconds) == words
