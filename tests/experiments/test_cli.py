"""The command lines: configs, overrides, errors in one line, and the scripts end to end."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from memjax import models
from memjax.models import mixers
from memjax.training import cli, complete
from memjax.training import help as help_lib
from memjax.training import run as run_lib
from memjax.training.config import SECTIONS, plain
from tests.training import helpers

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
BLOCKS = ("mac", "mag", "mal", "lmm", "transformer")


def flag(name):
    return f"--config={CONFIGS / name}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.train.lrr=1"], r"unknown field --config.train.lrr: did you mean 'train.lr'"),
        (["--config.train.stepps", "3"], r"did you mean 'train.steps'"),
        (["--noconfig.train.resum"], r"did you mean 'train.resume'"),
        (["--config.train.learning_rate=1"], r"did you mean 'train.lr'\?$"),
        (["--config.train.dim=8"], r"did you mean 'model.dim'\?$"),
        (["--config.train.zzzz=8"], r"valid keys: train.accumulate, "),
        (["--config.mash.data=8"], r"did you mean 'mesh.data'"),
        (["--config.model.memory.chunks=8"], r"did you mean 'model.memory.chunk'"),
    ],
)
def test_unknown_overrides_name_the_nearest(arguments, message):
    with pytest.raises(ValueError, match=message):
        cli.check(["train.py", flag("quickstart.py"), *arguments])


MIXER = """
from memjax.models import mixers
from memjax.training import complete


@mixers.register("my_swa")
def my_swa(config, rngs):
    return mixers.build("swa", config, rngs)


def get_config(variant=""):
    return complete({"model": {"pattern": ("my_swa",)}})
"""


def test_a_config_file_runs_once(tmp_path):
    """The checks before the flags, the flag and a caller all load it; it may register a mixer."""
    path = tmp_path / "my.config.py"
    path.write_text(MIXER)
    first, second = (cli.load_config(f"{path}{variant}") for variant in ("", ":x"))
    assert first == second
    assert first is not second, "what one of them overrides is not the other's"
    builder = mixers.registry._builders["my_swa"]
    cli.check(["train.py", f"--config={os.path.relpath(path)}"])
    assert mixers.registry._builders["my_swa"] is builder
    # Changed, it runs again, and its mixer takes the place of the old one.
    path.write_text(MIXER.replace("complete({", "complete({'seed': 5, "))
    os.utime(path, ns=(1, 1))
    assert cli.load_config(str(path)).seed == 5
    assert mixers.registry._builders["my_swa"] is not builder
    # Another file may not take the name.
    other = tmp_path / "other.py"
    other.write_text(MIXER)
    with pytest.raises(ValueError, match=r"'my_swa' is registered already, by memjax_c"):
        cli.load_config(str(other))


def test_an_import_that_fails_names_the_file(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("import nowhere_at_all\n")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"bad.py cannot be loaded: No module .*nowhere"):
            cli.load_config(str(path))


def test_known_overrides_pass():
    cli.check(
        [
            "train.py",
            "--config",
            str(CONFIGS / "quickstart.py") + ":smoke",
            "--config.train.lr=1e-3",
            "--noconfig.train.resume",
            "--config.model.head_dim=8",
            "--config.mesh.data=8",
            "--config.seed=1",
        ]
    )
    cli.check(["generate.py", "--workdir=runs/x"])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            str(CONFIGS / "quikstart.py"),
            r"quikstart.py' does not exist: did you mean .*quickstart.py",
        ),
        ("nowhere/at_all.py", r"does not exist: give the path"),
        (str(CONFIGS / "quickstart.py") + ":smok", r"no variant 'smok'; there is :smoke"),
        (str(CONFIGS / "compare.py") + ":mic", r"no variant 'mic'; there are mac"),
        (str(CONFIGS / "titans.py") + ":mac_35m", r"mac_3?40m|mac_"),
        (str(ROOT / "tests" / "conftest.py"), r"no function get_config"),
    ],
)
def test_bad_config_files_are_named(argument, message):
    with pytest.raises(ValueError, match=message):
        cli.load_config(argument)


def test_overrides_need_a_file():
    with pytest.raises(ValueError, match=r"--config\.train\.lr needs --config=FILE"):
        cli.check(["train.py", "--config.train.lr=1"])


@pytest.mark.parametrize(
    "name",
    [
        "quickstart.py:smoke",
        "titans.py:smoke",
        "compare.py:smoke",
        "ablation.py:smoke",
        "tnt.py:smoke",
        "tnt.py",
        "quickstart.py",
    ],
)
def test_configs_describe_runs(name):
    run = run_lib.build(cli.load_config(str(CONFIGS / name)))
    assert run.parameters > 0
    assert run.model.vocab == 384
    assert run.abstract_state.params is not None


def test_every_ablation_takes_a_part_away():
    """Each variant is built, and differs from the full one in what its name says."""
    names = ("full", "linear", "no_conv", "no_momentum", "no_decay", "no_persistent")
    models = {
        name: run_lib.build(cli.load_config(f"{CONFIGS / 'ablation.py'}:{name}_smoke")).model
        for name in names
    }
    rules = {name: model.memory.build() for name, model in models.items()}
    assert [name for name, rule in rules.items() if rule == rules["full"]] == [
        "full", "no_conv", "no_persistent"
    ]  # fmt: skip
    assert rules["linear"].structure.depth == 1
    assert not rules["no_momentum"].learner.needs_momentum
    assert not rules["no_decay"].retention.needs_retain
    assert models["no_conv"].conv == 0 < models["full"].conv
    assert models["no_persistent"].persistent == 0 < models["full"].persistent


def test_compared_models_have_equal_parameters():
    counts = {
        block: run_lib.build(cli.load_config(f"{CONFIGS / 'compare.py'}:{block}")).parameters
        for block in BLOCKS
    }
    for block, count in counts.items():
        assert count == pytest.approx(counts["mac"], rel=0.002), block


@pytest.mark.parametrize("size", ["170m", "340m", "760m", "1.3b"])
def test_the_papers_training_length(size):
    config = plain(cli.load_config(f"{CONFIGS / 'titans.py'}:mac_{size}"))
    tokens = config["train"]["steps"] * config["train"]["batch"] * config["model"]["context"]
    wanted = {"170m": 15e9, "340m": 15e9, "760m": 30e9, "1.3b": 30e9}[size]
    assert tokens == pytest.approx(wanted, rel=1e-3)
    model = {**config["model"], "vocab": 32000}
    assert models.LanguageModelConfig.from_dict(model) == models.preset(f"mac_{size}", remat="full")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A tiny config file, a work directory, and a function that runs a script on them."""
    folder = tmp_path_factory.mktemp("scripts")
    values = helpers.config(helpers.write_corpus(folder / "corpus"))
    (folder / "tiny.py").write_text(
        "from memjax.training import complete\n"
        f"def get_config():\n    return complete({values!r})\n"
    )
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-scripts"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }

    def script(name, *arguments):
        return subprocess.run(
            [sys.executable, str(ROOT / "experiments" / name), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    return script, folder


STOPPED = """
import runpy, sys, types
from memjax import training
path, name = sys.argv[1:3]
training.train = lambda *_: types.SimpleNamespace(stopped=name)
sys.argv = [path, *sys.argv[3:]]
runpy.run_path(path, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("script", "arguments", "name", "status"),
    [
        ("compare.py", ["--smoke", "--variants=mac"], "SIGINT", 130),
        ("chunks.py", ["--config=configs/tnt.py:smoke", "--chunks=8"], "SIGTERM", 143),
    ],
)
def test_a_stopped_run_leaves_with_the_status_of_its_signal(
    tmp_path, script, arguments, name, status
):
    path = str(ROOT / "experiments" / script)
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, path, name, *arguments, f"--workdir={tmp_path}"],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == status, done.stderr
    assert f"stopped by {name}; run the same command again to go on" in done.stdout


def test_the_whole_way(setting):
    """quickstart.py trains, stops, resumes, samples; the other scripts read its model."""
    script, folder = setting
    config, workdir = f"--config={folder / 'tiny.py'}", f"--workdir={folder / 'run'}"
    done = script("quickstart.py", config, workdir, "--length=12", "--config.train.lr=1e-3")
    assert done.returncode == 0, done.stderr
    assert "6 (3 before the stop)" in done.stdout
    assert (folder / "run" / "report" / "loss.png").stat().st_size > 5000
    bits = done.stdout.split(" bits per byte")[0].split()[-1]
    assert 6 < float(bits) < 9

    found = script("evaluate.py", workdir)
    assert found.returncode == 0, found.stderr
    line = next(x for x in found.stdout.splitlines() if x.startswith("bits_per_byte"))
    assert float(line.split()[-1]) == pytest.approx(float(bits), abs=1e-3)
    assert (folder / "run" / "evaluation-6.json").exists()

    wider = ("--config.evaluate.batches=1", config)
    assert "evaluation-6-2.json" in script("evaluate.py", workdir, *wider[::-1]).stdout
    out = folder / "wide.json"
    assert script("evaluate.py", workdir, *wider[::-1], f"--out={out}").returncode == 0
    assert json.loads(out.read_text())["config"]["evaluate"]["batches"] == 1

    text = [script("generate.py", workdir, "--prompt=é", "--length=8", "--seed=1") for _ in "ab"]
    assert text[0].returncode == 0, text[0].stderr
    assert text[0].stdout.startswith("é")
    assert text[0].stdout == text[1].stdout
    again = script("train.py", config, workdir, "--config.train.progress=true")
    assert again.returncode == 0, again.stderr
    assert "was finished already" in again.stdout
    assert "tokens/s" not in again.stdout
    assert " validation: " in again.stderr
    assert "compiling" not in again.stderr
    other = script("evaluate.py", config, workdir, "--config.model.dim=32")
    assert other.returncode == 1
    assert "error: checkpoint" in other.stderr
    assert "model.dim = 16, but this run has 32" in other.stderr
    assert "Traceback" not in other.stderr


def test_a_mixer_of_ones_own(setting):
    """Its config file registers it, for training and for all that reads the model afterwards."""
    script, folder = setting
    values = helpers.config(folder / "corpus", model={"pattern": "my_swa"}, train={"steps": 2})
    text = MIXER.replace('{"model": {"pattern": ("my_swa",)}}', repr(values))
    (folder / "mixer.py").write_text(text)
    config, workdir = f"--config={folder / 'mixer.py'}", f"--workdir={folder / 'mixer'}"
    done = script("train.py", config, workdir)
    assert done.returncode == 0, done.stderr
    assert "step 2: validation loss" in done.stdout
    done = script("evaluate.py", workdir)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the checkpoint of step 2 in ")
    assert "the mixer 'my_swa', which nothing has registered here: give --config" in done.stderr
    done = script("generate.py", config, workdir, "--length=4", "--prompt=a")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("a")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["train.py", "--config.train.lrr=1"], 2, "did you mean 'train.lr'"),
        (["train.py", "--config.train.lr=abc"], 2, "could not convert string to float: 'abc'"),
        (["train.py", "--config.train.clip=abc"], 1, "train.clip must be a number or None"),
        (["train.py", "--wrkdir=runs/x"], 2, "Did you mean: workdir"),
        (["train.py", "--config.mesh.data=3"], 1, "data=3"),
        (["train.py", "--workdir=FILE", "--config.train.clip=None"], 1, "File exists"),
        (["generate.py", "--workdir=nowhere"], 1, "does not exist: train first"),
        (["evaluate.py"], 1, "give --workdir"),
        (["train.py"], 1, "titans.py"),
        (["benchmarks/layer_memjax.py", "--help"], 1, "child process"),
    ],
)
def test_errors_are_one_line(setting, arguments, status, message):
    script, folder = setting
    name, *rest = arguments
    if any(x.startswith("--config.") for x in rest):
        rest = [f"--config={folder / 'tiny.py'}", f"--workdir={folder / 'unused'}", *rest]
    rest = [x.replace("FILE", str(folder / "tiny.py")) for x in rest]
    done = script(name, *rest)
    assert done.returncode == status
    assert done.stdout == ""
    lines = [x for x in done.stderr.splitlines() if x]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ") or name.startswith("benchmarks/")
    assert message in lines[0]


@pytest.mark.parametrize("name", ["train.py", "evaluate.py", "generate.py", "quickstart.py"])
def test_help_helps(setting, name):
    script, _ = setting
    text = script(name, "--help").stdout
    assert f"python experiments/{name}" in text
    assert "--config: config file" in text
    assert "--workdir" in text
    assert "\n  --config.train.lr=0.001\n    peak learning rate.\n" in text
    assert "\n  --config.model.pattern=transformer\n" in text


def test_help_shows_the_values_of_a_file(setting):
    script, folder = setting
    done = script("train.py", "--help", f"--config={folder / 'tiny.py'}")
    assert done.returncode == 0
    assert f"as in {folder / 'tiny.py'}:" in done.stdout
    assert "\n  --config.model.dim=16\n    model dimension.\n" in done.stdout


def test_every_field_is_described():
    values = plain(complete({}))
    lines = help_lib.fields(complete({})).splitlines()
    for section, cls in {**SECTIONS, "model.memory": models.MemoryConfig}.items():
        for field in dataclasses.fields(cls):
            if field.name != "memory":
                flag = f"  --config.{section}.{field.name}="
                (at,) = (i for i, line in enumerate(lines) if line.startswith(flag))
                assert lines[at + 1].startswith("    "), flag
    assert "  --config.train.lr=0.001" in lines
    assert f"  --config.seed={values['seed']}" in lines
    assert all(len(line) <= 100 for line in lines)
