"""The loop: resumed runs are the run without a stop, bit for bit; every way to stop; the report."""

import errno
import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from memjax.training import checkpoint, disk, loop, metrics, report
from memjax.training import run as run_lib
from memjax.training.checkpoint import Checkpoints
from memjax.training.metrics import NonFiniteError
from tests.training import helpers

ROOT = pathlib.Path(__file__).resolve().parents[2]


def last_checkpoint(config, workdir):
    """The newest checkpoint of a run: state and data state."""
    run = run_lib.build(config)
    checkpoints = Checkpoints(
        str(workdir / "checkpoints"), identity=run.identity, config=run.config
    )
    return checkpoints.restore(run.abstract_state)


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory):
    """Six steps in one go, with a loss that draws from the step's key."""
    workdir = tmp_path_factory.mktemp("straight")
    config = helpers.config(corpus)
    summary = loop.train(config, str(workdir), forward=helpers.noisy_forward)
    return config, workdir, summary


def test_a_resumed_run_is_the_run_without_a_stop(straight, tmp_path):
    config, workdir, _ = straight
    first = loop.train(config, str(tmp_path), until=3, forward=helpers.noisy_forward)
    assert (first.step, first.stopped, first.resumed) == (3, "until", 0)
    assert first.report is None
    second = loop.train(config, str(tmp_path), forward=helpers.noisy_forward)
    assert (second.step, second.stopped, second.resumed) == (6, "finished", 3)
    expected, expected_data = last_checkpoint(config, workdir)
    state, data_state = last_checkpoint(config, tmp_path)
    helpers.assert_same(state, expected)
    assert data_state == expected_data
    assert data_state["batches"] == 6
    lines = {x["step"]: x for x in metrics.read(str(workdir))["train"]}
    for line in metrics.read(str(tmp_path))["train"]:
        if line["step"] in lines and line["step"] != 4:  # step 4 averages over 2 or 1 steps
            assert line["gradient_norm"] == lines[line["step"]]["gradient_norm"]


@pytest.mark.parametrize("lost", ["data", "key", "opt_state"])
def test_every_part_of_the_checkpoint_matters(straight, tmp_path, monkeypatch, lost):
    """Planted faults: a resume that forgets one part does not give the same parameters."""
    config, workdir, _ = straight
    loop.train(config, str(tmp_path), until=3, forward=helpers.noisy_forward)
    restore = Checkpoints.restore

    def forgetful(self, like, **options):
        state, data_state = restore(self, like, **options)
        if lost == "data":
            data_state = {**data_state, "batches": 0}
        elif lost == "key":
            state = state._replace(key=jax.random.key(99))
        else:
            state = state._replace(opt_state=jax.tree.map(lambda x: 0 * x, state.opt_state))
        return state, data_state

    monkeypatch.setattr(Checkpoints, "restore", forgetful)
    loop.train(config, str(tmp_path), forward=helpers.noisy_forward)
    monkeypatch.undo()
    expected, _ = last_checkpoint(config, workdir)
    state, _ = last_checkpoint(config, tmp_path)
    assert helpers.differs(state.params, expected.params)


def test_a_finished_run_is_left_as_it_is(straight):
    config, workdir, summary = straight
    before = sorted(os.listdir(workdir / "checkpoints"))
    again = loop.train(config, str(workdir), forward=helpers.noisy_forward)
    assert (again.step, again.resumed, again.stopped) == (6, 6, "finished")
    assert again.validation.loss == summary.validation.loss
    assert sorted(os.listdir(workdir / "checkpoints")) == before


def test_checkpoints_are_not_overwritten_without_resume(straight):
    config, workdir, _ = straight
    config = {**config, "train": {**config["train"], "resume": False}}
    with pytest.raises(ValueError, match=r"checkpoints up to step 6 .*another --workdir"):
        loop.train(config, str(workdir))


def test_other_data_are_refused(straight):
    config, workdir, _ = straight
    with pytest.raises(ValueError, match="seed was 3, is 4"):
        loop.train({**config, "seed": 4}, str(workdir))
    with pytest.raises(ValueError, match="batch was 4, is 8"):
        loop.train({**config, "train": {**config["train"], "batch": 8}}, str(workdir))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": {"source": "nothere/"}}, "'nothere/' does not exist"),
        ({"train": {"optimizer": "adam"}}, "did you mean 'adamw'"),
    ],
)
def test_an_error_of_the_configuration_leaves_nothing_behind(corpus, tmp_path, fields, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        loop.train(helpers.config(corpus, **fields), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_an_odd_share_of_held_out_text_is_told(corpus, tmp_path):
    def warning(source, **fields):
        run = run_lib.build(helpers.config(corpus, data={"source": str(source), **fields}))
        return loop.held_out_warning(run, run.training_data(), run.validation_data())

    assert warning(corpus) is None
    (tmp_path / "out.txt").write_text("memory " * 3)
    few = warning(corpus, validation_source=str(tmp_path / "out.txt"))
    assert few.startswith("validation has 21 bytes, 22 tokens, which is less than four rows of 16")
    share = warning(corpus, validation_fraction=0.001)
    assert "holds 7.3% of the bytes although data.validation_fraction is 0.1%" in share


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(corpus, tmp_path):
    config = helpers.config(corpus, train={"log_every": 1})
    loop.train(config, str(tmp_path), until=2)
    good, _ = last_checkpoint(config, tmp_path)
    config["train"]["lr"] = 1e38  # the parameters after step 3 overflow, so does the loss of step 4
    with pytest.raises(
        NonFiniteError,
        match=r"(loss|gradient_norm) is (nan|inf) at step \d.*of step 2 is kept.*train\.lr",
    ):
        loop.train(config, str(tmp_path))
    state, _ = last_checkpoint(config, tmp_path)
    helpers.assert_same(state, good)


def test_a_state_that_is_not_finite_is_never_saved(corpus, tmp_path):
    """The loss of step 3 is fine but the parameters after it are not, and a checkpoint is due."""
    config = helpers.config(corpus, train={"log_every": 1})
    loop.train(config, str(tmp_path), until=2)
    config["train"] |= {"lr": float("inf"), "checkpoint_every": 1}
    with pytest.raises(NonFiniteError, match=r"params/.* not finite at step 3.*of step 2 is kept"):
        loop.train(config, str(tmp_path))
    state, _ = last_checkpoint(config, tmp_path)
    assert int(state.step) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"warmup or a smaller --config.train.clip; if"),
        ({"clip": None}, r"warmup or --config.train.clip=1.0; if"),
    ],
)
def test_the_advice_knows_the_configuration(corpus, fields, message):
    run = run_lib.build(helpers.config(corpus, train=fields))
    assert re.search(message, loop._advice(run))
    run = run_lib.build(helpers.config(corpus, train=fields, model={"dtype": "bfloat16"}))
    assert " or --config.model.dtype=float32; if" in loop._advice(run)


def test_a_full_disk_is_explained(corpus, tmp_path, monkeypatch):
    """Where the metrics go, and where a checkpoint does: Orbax has errors of its own for it."""
    config = helpers.config(corpus)
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / metrics.FILE).symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"disk of .*/metrics: make room and run the same command"):
        loop.train(config, str(tmp_path / "metrics"))

    def full(*args, **options):
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write 9 bytes: No space left on device")

    loop.train(config, str(tmp_path / "run"), until=2)
    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.CheckpointManager.save", full)
        with pytest.raises(OSError, match=r"disk of .*/run/checkpoints: make room .*train.keep=1"):
            loop.train(config, str(tmp_path / "run"))
    assert loop.train(config, str(tmp_path / "run")).resumed == 2


def test_only_a_full_disk_is_explained():
    with pytest.raises(ValueError, match=r"^another$"), disk.explained("runs/x", "make room"):
        raise ValueError("another")
    full = RuntimeError("the writer died")
    full.__cause__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    assert disk.is_full(full)
    assert not disk.is_full(OSError(errno.EACCES, "Permission denied"))


# Sends itself SIGTERM while it prepares batch 4, then does what experiments/train.py does.
SCRIPT = """
import os, runpy, signal, sys
from memjax.training import loop
place, calls, signal_at = loop.place, [], int(sys.argv[1])

def interrupted(*args):
    calls.append(1)
    if len(calls) == signal_at:
        os.kill(os.getpid(), signal.SIGTERM)
    return place(*args)

loop.place = interrupted
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_sigterm_saves_and_the_rest_of_the_run_is_the_same(corpus, tmp_path):
    settings = helpers.config(corpus)
    file = tmp_path / "config.py"
    file.write_text(
        "from memjax.training import complete\n"
        f"def get_config():\n    return complete({settings!r})\n"
    )
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-scripts"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }

    def run(signal_at, workdir):
        command = [sys.executable, "-c", SCRIPT, str(signal_at), str(ROOT / "experiments/train.py")]
        command += [f"--config={file}", f"--workdir={workdir}"]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=300
        )

    straight = run(0, tmp_path / "straight")
    assert straight.returncode == 0, straight.stderr
    assert "step 6: validation loss" in straight.stdout
    stopped = run(4, tmp_path / "stopped")
    assert stopped.returncode == 143, stopped.stderr
    assert "stopped by SIGTERM after step 4, which is saved" in stopped.stdout
    state, data_state = last_checkpoint(settings, tmp_path / "stopped")
    assert int(state.step) == data_state["batches"] == 4
    resumed = run(0, tmp_path / "stopped")
    assert resumed.returncode == 0, resumed.stderr
    expected = last_checkpoint(settings, tmp_path / "straight")
    found = last_checkpoint(settings, tmp_path / "stopped")
    helpers.assert_same(found[0], expected[0])
    assert found[1] == expected[1]


def png(path):
    content = path.read_bytes()
    return content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) > 5000


def test_the_report(straight):
    config, workdir, summary = straight
    folder = workdir / "report"
    assert summary.report == str(folder)
    assert png(folder / "loss.png")
    assert png(folder / "position.png")
    text = (folder / "report.md").read_text()
    assert "![Bits per byte during training](loss.png)" in text
    assert f"| validation bits per byte | {summary.validation.bits_per_byte:.3f} |" in text
    assert f"| validation tokens | {summary.validation.tokens:,.0f} |" in text
    assert f"| parameters | {run_lib.build(config).parameters:,} |" in text
    time = loop.training_time(summary)
    assert re.fullmatch(r"\d+ s, with compiling, evaluating and saving", time)
    assert loop.describe(run_lib.build(config), summary)["training_time"] == time
    content = json.loads((folder / "report.json").read_text())
    assert content["validation_loss"] == pytest.approx(summary.validation.loss)
    assert [step for step, _ in content["bits_per_byte_curve"]["train"]] == [2, 4, 6]
    tokens = sum(x[3] for x in content["loss_by_position"])
    assert tokens == summary.validation.tokens
    assert (workdir / "config.json").exists()
    assert list((workdir / "tensorboard").iterdir())
    line = metrics.read(str(workdir))["train"][-1]
    assert {"loss", "bits_per_byte", "gradient_norm", "update_norm", "parameter_norm"} <= set(line)
    assert line["learning_rate"] == pytest.approx(
        float(run_lib.build(config).learning_rate(5)), rel=1e-5
    )


def test_the_report_without_matplotlib(straight, tmp_path, monkeypatch, caplog):
    _, workdir, summary = straight
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / metrics.FILE).write_bytes((workdir / metrics.FILE).read_bytes())
    folder = pathlib.Path(
        report.write(str(tmp_path), {"name": "run", **summary.validation.scalars()})
    )
    assert sorted(p.name for p in folder.iterdir()) == ["report.json", "report.md"]
    assert 'pip install "memjax[plot]"' in (folder / "report.md").read_text()
    assert 'pip install "memjax[plot]"' in caplog.text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1312048, "1,312,048"),
        (2.81, "2.810"),
        (16.6149, "16.61"),
        (32256.0, "32,256"),
        (7974.4, "7,974"),
        (12.0, "12"),
        (1e-5, "1.000e-05"),
        (float("nan"), "nan"),
        (True, "True"),
        ("a, b", "a, b"),
    ],
)
def test_numbers_of_the_report(value, text):
    assert report.number(value) == text


def test_evaluations_of_other_settings_are_kept(tmp_path):
    def path(config, step=6):
        return pathlib.Path(report.evaluation_path(str(tmp_path), step, config))

    first = {"evaluate": {"context": None}, "model": {"pattern": ("mac",)}}
    second = {**first, "evaluate": {"context": 1024}}
    assert path(first).name == "evaluation-6.json"
    path(first).write_text(json.dumps({"config": first}))
    assert path(first).name == "evaluation-6.json", "the same again"
    assert path(second).name == "evaluation-6-2.json"
    path(second).write_text("{")
    assert path(second).name == "evaluation-6-3.json", "what is damaged is kept"
    path(second).write_text(json.dumps({"config": second}))
    assert path(second).name == "evaluation-6-3.json"
    assert path(first).name == "evaluation-6.json"
    assert path(second, step=7).name == "evaluation-7.json"


def test_stretches_of_positions_average_by_tokens():
    loss, count = np.array([4.0, 2.0, 1.0, np.nan]), np.array([1.0, 3.0, 1.0, 0.0])
    stretches = report.buckets(loss, count, most=2)
    assert [x[:2] for x in stretches] == [(0, 1), (1, 4)]
    assert stretches[1][2] == pytest.approx((2.0 * 3 + 1.0) / 4)
    assert sum(x[3] for x in report.buckets(loss, count)) == 5.0
    assert [report.seen(*x[:2]) for x in stretches] == ["1", "2-4"]


def test_superseded_lines_are_dropped(tmp_path):
    """A run that was cut off at step 5 and went on from its checkpoint of step 2."""
    with metrics.Writer(str(tmp_path)) as writer:
        for step in (1, 3, 5):
            writer.write("train", step, {"loss": 1.0})
    with open(tmp_path / metrics.FILE, "a") as file:
        file.write('{"kind": "train", "st')
        file.write("\n")
    with metrics.Writer(str(tmp_path), 2) as writer:
        writer.write("train", 3, {"loss": 2.0, "gradient_norm": float("inf")})
    lines = metrics.read(str(tmp_path))["train"]
    assert [(x["step"], x["loss"]) for x in lines] == [(1, 1.0), (3, 2.0)]
    assert lines[1]["gradient_norm"] == "inf"
    assert metrics.read(str(tmp_path / "nowhere")) == {"train": [], "validation": []}


def test_the_meter_adds_up_and_checks():
    meter = metrics.Meter()

    def step(nats, tokens, size, **others):
        values = {"nats": nats, "tokens": tokens, "bytes": size, "loss": nats / tokens}
        return {
            k: jax.numpy.float32(v) for k, v in {**values, "gradient_norm": 1, **others}.items()
        }

    meter.push(1, step(8.0, 4.0, 2.0, learning_rate=0.5))
    meter.push(2, step(1.0, 1.0, 1.0, learning_rate=0.25))
    values = meter.take()
    assert values["loss"] == pytest.approx(9 / 5)
    assert values["bits_per_byte"] == pytest.approx(9 / 3 / np.log(2))
    assert values["learning_rate"] == 0.25
    assert "nats" not in values
    meter.push(3, step(1.0, 1.0, 1.0))
    meter.push(4, step(float("nan"), 1.0, 1.0))
    with pytest.raises(NonFiniteError, match="loss is nan at step 4"):
        meter.take()


def test_a_run_on_eight_devices_with_accumulation(straight, tmp_path):
    """Another mesh and microbatches: the same losses, and the checkpoint goes on there."""
    config, workdir, _ = straight
    config = {**config, "mesh": {"data": 2, "fsdp": 2, "tensor": 2}}
    loop.train(helpers.config(config["data"]["source"]), str(tmp_path / "one"), until=3)
    summary = loop.train(config, str(tmp_path / "one"))
    assert summary.resumed == 3
    alone = loop.train(helpers.config(config["data"]["source"]), str(tmp_path / "two"))
    assert summary.validation.loss == pytest.approx(alone.validation.loss, rel=1e-4)
    assert checkpoint.read_config(str(workdir / "checkpoints"))[0] == 6


TWO_HOSTS = """
import os, signal, sys
import jax
port, rank, signal_at, workdir, config = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(rank))
from memjax.training import cli, loop
place, calls = loop.place, []

def interrupted(*args):
    calls.append(1)
    if rank == "1" and len(calls) == int(signal_at):
        os.kill(os.getpid(), signal.SIGTERM)
    return place(*args)

loop.place = interrupted
summary = loop.train(cli.load_config(config), workdir)
print("RESULT", summary.step, summary.stopped, summary.validation and summary.validation.loss)
"""


@pytest.mark.slow
def test_two_hosts_are_one_and_stop_together(corpus, tmp_path):
    """Two processes train as one would; a SIGTERM to one of them stops both after the same step."""
    settings = helpers.config(corpus, mesh={"data": 1, "fsdp": 2})

    def run(name, signal_at, settings):
        file = tmp_path / f"{name}.py"
        file.write_text(
            "from memjax.training import complete\n"
            f"def get_config():\n    return complete({settings!r})\n"
        )
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-c", TWO_HOSTS, str(port)]
        hosts = [
            subprocess.Popen(
                [*command, str(rank), str(signal_at), str(tmp_path / name), str(file)],
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        found = [host.communicate(timeout=300) for host in hosts]
        for out, error in found:
            assert "RESULT" in out, error
        return [out.split("RESULT ")[1].split() for out, _ in found]

    first, second = run("whole", 0, settings)
    assert first == second
    assert first[:2] == ["6", "finished"]
    alone = loop.train(settings, str(tmp_path / "alone"))
    assert float(first[2]) == pytest.approx(alone.validation.loss, rel=1e-6)

    settings["train"]["steps"] = 5000
    first, second = run("stopped", 3, settings)
    assert first == second
    assert first[1] == "SIGTERM"
    state, data_state = last_checkpoint(settings, tmp_path / "stopped")
    assert int(state.step) == data_state["batches"] == int(first[0]) < 5000
