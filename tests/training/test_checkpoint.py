"""Checkpoints: exact, atomic, refused when wrong, and never lost."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.evaluation.placement import place
from memjax.training import checkpoint
from memjax.training import run as run_lib
from memjax.training import step as step_lib
from memjax.training.arrays import flatten
from memjax.training.checkpoint import Checkpoints, MismatchError
from memjax.training.metrics import NonFiniteError
from tests.training import helpers


def test_a_checkpoint_comes_back_exactly(saved, corpus):
    run, folder = saved
    state, data_state = helpers.open_checkpoints(run, folder).restore(run.abstract_state)
    helpers.assert_same(state, helpers.start(corpus, seed=2, step=2))
    assert data_state == {**helpers.DATA, "batches": 2}
    assert jnp.issubdtype(state.key.dtype, jax.dtypes.prng_key)
    older, _ = helpers.open_checkpoints(run, folder).restore(run.abstract_state, step=1)
    helpers.assert_same(older, helpers.start(corpus, seed=1, step=1))
    # Planted fault: the comparison tells the two apart.
    assert "params/embedding" in helpers.differs(state, older)


def test_without_checkpoints_there_is_nothing_to_restore(corpus, tmp_path):
    run = helpers.make_run(corpus)
    checkpoints = helpers.open_checkpoints(run, tmp_path / "new")
    assert checkpoints.steps() == []
    assert checkpoints.restore(run.abstract_state) is None
    with pytest.raises(ValueError, match=r"no checkpoint of step 4 in .*; there are \[\]"):
        checkpoints.restore(run.abstract_state, step=4)


def test_only_the_newest_are_kept(corpus, tmp_path):
    run = helpers.make_run(corpus)
    checkpoints = helpers.open_checkpoints(run, tmp_path, keep=2)
    for n in range(1, 5):
        checkpoints.save(helpers.start(corpus, step=n), helpers.DATA)
    checkpoints.wait()
    assert checkpoints.steps() == [3, 4]
    checkpoints.close()


def test_saving_is_not_disturbed_by_the_steps_that_follow(corpus, tmp_path):
    """The state is donated to the next step while its checkpoint is still being written."""
    run = helpers.make_run(corpus)
    take = step_lib.compile(
        step_lib.make(run.graphdef, run.optimizer, run.learning_rate, run.byte_lengths),
        run.abstract_state,
        run.mesh,
    )
    checkpoints = helpers.open_checkpoints(run, tmp_path)
    state, pipeline = helpers.start(corpus, seed=4), run.training_data()
    copies = {}
    with jax.set_mesh(run.mesh):
        for n in range(1, 4):
            state, _ = take(state, place(next(pipeline), run.mesh))
            copies[n] = helpers.leaves(jax.tree.map(jnp.copy, state))
            checkpoints.save(state, helpers.DATA)
            for _ in range(2):
                state, _ = take(state, place(next(pipeline), run.mesh))
            state = state._replace(step=jax.device_put(jnp.int32(n), state.step.sharding))
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2, 3]
    for n in (1, 2, 3):
        restored, _ = checkpoints.restore(run.abstract_state, step=n)
        for name, value in helpers.leaves(restored).items():
            np.testing.assert_array_equal(value, copies[n][name], err_msg=name)
    checkpoints.close()


@pytest.mark.parametrize("part", ["params", "opt_state"])
def test_a_state_that_is_not_finite_is_not_saved(saved, corpus, part):
    run, folder = saved
    checkpoints = helpers.open_checkpoints(run, folder)
    state = helpers.start(corpus, step=3)
    bad = jax.tree.map(
        lambda x: x.at[(0,) * x.ndim].set(jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        getattr(state, part),
    )
    with pytest.raises(NonFiniteError, match=rf"{part}/.* is not finite at step 3"):
        checkpoints.save(state._replace(**{part: bad}), helpers.DATA)
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]
    helpers.assert_same(
        checkpoints.restore(run.abstract_state)[0], helpers.start(corpus, seed=2, step=2)
    )


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"dim": 32}}, r"made with model.dim = 16, but this run has 32.*--workdir"),
        ({"model": {"window": 8}}, r"model.window = 512, but this run has 8"),
        ({"train": {"optimizer": "muon"}}, r"no array opt_state/.*optimiser"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(saved, corpus, sections, message):
    _, folder = saved
    other = run_lib.build(helpers.config(corpus, **sections))
    checkpoints = helpers.open_checkpoints(other, folder)
    with pytest.raises(MismatchError, match=message):
        checkpoints.restore(other.abstract_state, on_damage="previous")
    assert checkpoints.steps() == [1, 2]


def test_the_second_stage_of_tnt_goes_on_from_the_first(corpus):
    """Its local memories have other chunks and the same parameters; another number is refused."""

    def built(*chunks):
        memory = {"local_chunks": chunks, "shard": 8, "chunk": 8, "expansion": 1}
        return run_lib.build(helpers.config(corpus, model={"pattern": ("tnt",), "memory": memory}))

    first, second, other = built(4, 8), built(1, 2), built(2)
    assert first.identity == second.identity
    shapes = [
        sorted((name, x.shape) for name, x in flatten(run.shapes).items())
        for run in (first, second, other)
    ]
    assert shapes[0] == shapes[1]
    assert shapes[0] != shapes[2]


def test_a_field_that_is_newer_than_a_checkpoint_had_its_default(saved, corpus):
    run, folder = saved
    model = {name: value for name, value in run.identity["model"].items() if name != "window"}
    memory = {name: value for name, value in model["memory"].items() if name != "periods"}
    identity = run.identity | {"model": model | {"memory": memory}}
    old = folder.parent / "old"
    there = Checkpoints(str(old), identity=identity, config=run.config)
    there.save(helpers.start(corpus, step=1), helpers.DATA)
    there.close()
    state, _ = helpers.open_checkpoints(run, old).restore(run.abstract_state)
    helpers.assert_same(state, helpers.start(corpus, step=1))
    for changes in ({"window": 8}, {"memory": {"periods": (8,)}}):
        other = run_lib.build(helpers.config(corpus, model=changes))
        with pytest.raises(MismatchError, match=r"(window = 512|periods = .512, 2048.), but this"):
            helpers.open_checkpoints(other, old).restore(other.abstract_state)


@pytest.mark.parametrize("vocab", [384, 640])
def test_another_tokenizer_is_refused(saved, corpus, vocab):
    """The vocabulary follows from the tokenizer: the message names what the user changed."""
    run, folder = saved
    model = {**run.identity["model"], "vocab": vocab}
    identity = {"model": model, "data": {"tokenizer": "bpe-600-12345678"}}
    other = Checkpoints(str(folder), identity=identity, config=run.config)
    message = (
        r"made with the tokenizer 'byte' \(model.vocab = 384\), but this run has"
        rf" 'bpe-600-12345678' \(model.vocab = {vocab}\): give --config.data.tokenizer='byte' and"
    )
    with pytest.raises(MismatchError, match=message):
        other.restore(run.abstract_state)
    with pytest.raises(MismatchError, match=message):
        checkpoint.read_params(str(folder), run.abstract_params, identity=identity)


def test_a_tokenizer_file_is_named(corpus, tmp_path):
    run = helpers.make_run(corpus)
    config = {**run.config, "data": {**run.config["data"], "tokenizer": "my/bpe.json"}}
    identity = {**run.identity, "data": {"tokenizer": "bpe-384-12345678"}}
    there = Checkpoints(str(tmp_path), identity=identity, config=config)
    there.save(helpers.start(corpus, step=1), helpers.DATA)
    there.close()
    with pytest.raises(
        MismatchError, match=r"'bpe-384-12345678' .*tokenizer='my/bpe.json' \(that file"
    ):
        helpers.open_checkpoints(run, tmp_path).restore(run.abstract_state)


def test_another_vocabulary_alone_is_named(saved, corpus):
    _, folder = saved
    other = run_lib.build(helpers.config(corpus, model={"vocab": 512}))
    with pytest.raises(MismatchError, match=r"model.vocab = 384, but this run has 512: give --con"):
        helpers.open_checkpoints(other, folder).restore(other.abstract_state)


def test_arrays_of_another_shape_are_refused(saved, corpus):
    """The same configuration, but a model whose code has changed."""
    run, folder = saved
    like = run.abstract_state
    like = like._replace(
        params=jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*x.shape[:-1], 5), x.dtype, sharding=x.sharding),
            like.params,
        )
    )
    with pytest.raises(MismatchError, match=r"has params/.* of shape .* needs .*5\)"):
        helpers.open_checkpoints(run, folder).restore(like)


def test_how_it_computes_may_change(saved, corpus):
    _, folder = saved
    other = run_lib.build(helpers.config(corpus, model={"remat": "full", "dtype": "bfloat16"}))
    state, _ = helpers.open_checkpoints(other, folder).restore(other.abstract_state)
    helpers.assert_same(state, helpers.start(corpus, seed=2, step=2))


def test_a_save_that_was_cut_off_does_not_count(saved, corpus):
    """A directory in which the commit marker or everything is missing is no checkpoint."""
    run, folder = saved
    temporary = folder / "3.orbax-checkpoint-tmp-17"
    shutil.copytree(folder / "2", temporary)
    checkpoints = helpers.open_checkpoints(run, folder)
    assert checkpoints.steps() == [1, 2]
    state, _ = checkpoints.restore(run.abstract_state)
    assert int(state.step) == 2
    checkpoints.save(helpers.start(corpus, seed=3, step=3), helpers.DATA)
    checkpoints.wait()
    assert checkpoints.steps()[-1] == 3
    checkpoints.close()


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tensor": 2}, {"fsdp": 8}])
def test_a_checkpoint_moves_to_another_mesh_and_back(saved, corpus, tmp_path, sizes):
    run, folder = saved
    mesh = {"data": -1, **sizes}
    other = run_lib.build(helpers.config(corpus, mesh=mesh, train={"batch": 8}))
    state, _ = helpers.open_checkpoints(other, folder).restore(other.abstract_state)
    assert state.params["embedding"][...].sharding.mesh.size == 8
    assert not state.params["embedding"][...].sharding.is_fully_replicated
    helpers.assert_same(state, helpers.start(corpus, seed=2, step=2))
    there = helpers.open_checkpoints(other, tmp_path / "there")
    there.save(state, helpers.DATA)
    there.close()
    back, _ = helpers.open_checkpoints(run, tmp_path / "there").restore(run.abstract_state)
    assert back.params["embedding"][...].sharding.mesh.size == 1
    helpers.assert_same(back, state)


def test_parameters_alone(saved, corpus):
    run, folder = saved
    step, params = checkpoint.read_params(str(folder), run.abstract_params, identity=run.identity)
    assert step == 2
    helpers.assert_same(params, helpers.start(corpus, seed=2).params)
    step, params = checkpoint.read_params(
        str(folder), run.abstract_params, identity=run.identity, step=1
    )
    helpers.assert_same(params, helpers.start(corpus, seed=1).params)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 9 .* there are \[1, 2\]"):
        checkpoint.read_params(str(folder), run.abstract_params, identity=run.identity, step=9)
    with pytest.raises(FileNotFoundError, match="does not exist: train first"):
        checkpoint.read_config(str(folder / "nowhere"))
    assert checkpoint.read_config(str(folder))[1]["model"]["dim"] == 16


def test_parameters_of_another_model_are_refused(saved, corpus):
    _, folder = saved
    other = run_lib.build(helpers.config(corpus, model={"dim": 32}))
    with pytest.raises(MismatchError, match=r"model\.dim = 16"):
        checkpoint.read_params(str(folder), other.abstract_params, identity=other.identity)
