"""Configurations: defaults, unknown keys, bad values."""

import pytest
from absl import flags
from ml_collections import config_flags

from memjax import models
from memjax.training import config as config_lib
from memjax.training import run as run_lib
from tests.training import helpers


def test_complete_writes_every_default():
    config = config_lib.complete({"model": {"dim": 8}, "train": {"lr": 0.5}})
    assert config.train.lr == 0.5
    assert config.train.warmup == 100
    assert config.mesh.data == -1
    assert config.data.tokenizer == "byte"
    assert config.model.memory.lr_max == 0.1
    assert config.seed == 0


def test_fields_that_are_none_can_be_set():
    config = config_lib.complete({}).lock()
    config.train.context = 32
    config.evaluate.batches = 4
    assert config_lib.plain(config)["train"]["context"] == 32


def given(config, *overrides):
    """A configuration after a command line."""
    argv = ["train.py", *overrides]
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    values(argv)
    return holder.value


def test_nested_fields_can_be_none():
    """A rule that fixes a part of its memory needs the field of the config file to go."""
    file = {"model": {"memory": {"expansion": 2}}}
    config = given(
        config_lib.complete(file),
        "--config.model.memory.rule=ttt_linear",
        "--config.model.memory.expansion=None",
        "--config.train.clip=None",
    )
    assert config.model.memory.expansion is None
    assert config.model.memory.rule == "ttt_linear"
    assert config.train.clip is None
    memory = config_lib.plain(config)["model"]["memory"]
    assert models.MemoryConfig.from_dict(memory).build().structure.depth == 1
    config = given(config_lib.complete(file), "--config.model.memory.expansion=3")
    assert config.model.memory.expansion == 3


@pytest.mark.parametrize(
    "overrides",
    [
        ["--config.model.pattern=swa,transformer"],
        ["--config.model.pattern=('swa', 'transformer')"],
        ["--config.model.pattern=swa", "--config.model.pattern=transformer"],
    ],
)
@pytest.mark.parametrize("file", ["mac", ("mac",)])
def test_patterns_on_the_command_line(corpus, file, overrides):
    values = helpers.config(corpus, model={"pattern": file, "layers": 2})
    config = given(config_lib.complete(values), *overrides, "--config.model.feed_forward=none,none")
    run = run_lib.build(config)
    assert run.model.pattern == ("swa", "transformer")
    assert run.model.feed_forward == ("none", "none")
    assert run.config["model"]["pattern"] == ("swa", "transformer")


@pytest.mark.parametrize("chunks", ["4,8", "(4, 8)", "'4,8'"])
def test_numbers_on_the_command_line(corpus, chunks):
    """Also beside a list in the file; () is no local memory."""
    values = helpers.config(corpus, model={"memory": {"local_chunks": [2], "shard": 16}})
    name = "--config.model.memory.local_chunks"
    for flag, found in ((chunks, (4, 8)), ("4", (4,)), ("()", ())):
        run = run_lib.build(given(config_lib.complete(values), f"{name}={flag}"))
        assert run.model.memory.local_chunks == found


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trian": {}}, r"unknown section trian: did you mean 'train'"),
        ({"train": {"lrr": 1}}, r"unknown key train\.lrr: did you mean 'lr'"),
        ({"model": {"dimm": 1}}, r"unknown key model\.dimm: did you mean 'dim'"),
        ({"mesh": {"tensors": 1}}, r"unknown key mesh\.tensors: did you mean 'tensor'"),
        ({"data": {"tokeniser": 1}}, r"unknown key data\.tokeniser: did you mean 'tokenizer'"),
    ],
)
def test_unknown_keys_name_the_nearest(values, message):
    with pytest.raises(ValueError, match=message):
        config_lib.complete(values)


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        ("train", {"context": "abc"}, r"train.context must be an integer or None, got 'abc'"),
        ("train", {"clip": "off"}, r"train.clip must be a number or None, got 'off'"),
        ("train", {"steps": True}, r"train.steps must be an integer, got True"),
        ("mesh", {"data": 1.5}, r"mesh.data must be an integer, got 1.5"),
        ("data", {"align": "abc"}, r"align must be an integer or None, got 'abc'"),
        ("evaluate", 3, "section evaluate must be a mapping, got 3"),
        ("train", {"steps": 0}, "train.steps must be at least 1"),
        ("train", {"batch": 5, "accumulate": 2}, "multiple of train.accumulate 2"),
        ("train", {"warmup": 9}, "train.warmup 9 must lie between 0 and train.steps 6"),
        ("train", {"on_damage": "ignore"}, "train.on_damage must be"),
        ("evaluate", {"batches": 0}, "evaluate.batches must be at least 1"),
        ("model", {"memory": {"chunks": 3}}, "unknown key memory.chunks"),
        ("model", {"vocab": 100}, "model.vocab 100 is smaller than the 384 tokens"),
        ("mesh", {"data": 16}, "16 devices but there are 8"),
    ],
)
def test_bad_values_are_named(corpus, section, fields, message):
    with pytest.raises(ValueError, match=message):
        run_lib.build(helpers.config(corpus, **{section: fields}))


def test_a_mesh_that_does_not_divide_is_named(corpus):
    with pytest.raises(ValueError, match=r"train.batch / train.accumulate = 4 rows .* = 8"):
        run_lib.build(helpers.config(corpus, mesh={"data": 8})).training_data()
    with pytest.raises(ValueError, match=r"train.context = 16 tokens .* mesh.sequence = 3"):
        run_lib.build(helpers.config(corpus, mesh={"data": 1, "sequence": 3})).training_data()
    with pytest.raises(ValueError, match=r"parameter \[.*'heads', size 2.* tensor of size 4"):
        _ = run_lib.build(helpers.config(corpus, mesh={"data": 1, "tensor": 4})).abstract_state


def test_difference_names_the_first_field():
    a = {"model": {"dim": 1, "pattern": ["mac"]}}
    assert config_lib.difference(a, {"model": {"dim": 1, "pattern": ("mac",)}}) is None
    assert config_lib.difference(a, {"model": {"dim": 2, "pattern": ("mac",)}}) == (
        "model.dim",
        1,
        2,
    )
    assert config_lib.difference(a, {"model": {"dim": 1}}) == ("model.pattern", ["mac"], None)


def test_a_larger_vocabulary_has_bytes_for_the_known_tokens_only(corpus):
    run = run_lib.build(helpers.config(corpus, model={"vocab": 512}))
    assert run.byte_lengths.shape == (512,)
    assert run.byte_lengths.sum() == 256
