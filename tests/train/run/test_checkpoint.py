"""Checkpoints: what is saved comes back, and damage never does."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from train.run import checkpoint
from train.run.checkpoint import FORMAT, Checkpoints
from train.run.checksums import checksums
from train.step.mesh import OWN, make_mesh, replicated


def tree(seed: float, mesh, width: int = 64):
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    whole = replicated(mesh)
    values = {
        "w": np.arange(width * 96, dtype=np.float32).reshape(width, 96) + seed,
        "half": np.full((width, 8), seed, jnp.bfloat16),
        "ids": np.arange(width, dtype=np.int4) if width < 8 else np.ones(width, jnp.int4),
    }
    params = {name: jax.device_put(value, split) for name, value in values.items()}
    rest = {
        "optimizer": (jax.device_put(jnp.full((5,), seed), whole), ()),
        "step": jax.device_put(jnp.int32(seed), whole),
        "key": jax.device_put(jax.random.key(int(seed)), whole),
        "params": None,
    }
    return params, rest


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def bits(state):
    def one(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.asarray(x).tobytes()

    return [one(leaf) for leaf in jax.tree.leaves(state)]


@pytest.fixture
def run(tmp_path: Path):
    """A folder with checkpoints of steps 10 and 20, and how to read it on any mesh."""
    mesh = make_mesh("fsdp=8")
    log: list[str] = []
    with Checkpoints(tmp_path / "run", 5, log.append, {}) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, *tree(step, mesh), {"position": [step, 3]})

    def read(layout: str | None = "fsdp=8", directory: Path = tmp_path / "run", width: int = 64):
        state = tree(0, make_mesh(layout), width)
        with Checkpoints(directory, 5, log.append, {}, read_only=True) as checkpoints:
            return checkpoints.restore(*map(abstract, state))

    return SimpleNamespace(read=read, log=log, directory=tmp_path / "run", mesh=mesh)


@pytest.mark.parametrize("layout", ["fsdp=8", "data=2,fsdp=4", None])
def test_a_checkpoint_comes_back_bit_for_bit_on_any_mesh(run, layout):
    step, params, rest, progress = run.read(layout)
    assert step == 20
    assert progress == {"position": [20, 3]}
    assert bits((params, rest)) == bits(tree(20, run.mesh))
    assert params["w"].sharding.mesh == make_mesh(layout)
    assert rest["optimizer"][1] == ()


def files_of(step: Path) -> list[Path]:
    return sorted(p for p in step.rglob("*") if p.is_file())


def damage_file(path: Path, damage: str) -> None:
    size = path.stat().st_size
    match damage:
        case "delete":
            path.unlink()
        case "truncate":
            os.truncate(path, size // 2)
        case "empty":
            os.truncate(path, 0)
        case "flip":
            content = bytearray(path.read_bytes())
            content[size // 2] ^= 1
            path.write_bytes(content)


@pytest.mark.parametrize("damage", ["delete", "truncate", "empty", "flip"])
def test_damage_to_any_file_is_passed_over_or_harmless_but_never_read_as_data(
    run, damage, tmp_path
):
    whole = {step: bits(tree(step, run.mesh)) for step in (10, 20)}
    fell_back = 0
    names = [p.relative_to(run.directory) for p in files_of(run.directory / "20")]
    for name in names:
        copy = tmp_path / "damaged"
        shutil.copytree(run.directory, copy)
        damage_file(copy / name, damage)
        step, params, rest, progress = run.read(directory=copy)
        assert bits((params, rest)) == whole[step], name
        assert progress == {"position": [step, 3]}, name
        fell_back += step == 10
        shutil.rmtree(copy)
    assert fell_back >= 5  # the files of arrays, at least
    assert len(run.log) == fell_back
    assert all("checkpoint 20 is damaged and passed over" in line for line in run.log)


@pytest.mark.parametrize("devices", [8, 4, 2])
def test_what_sums_in_8_bits_have_not_sent_stays_and_other_devices_share_its_sum(tmp_path, devices):
    unsent = np.random.default_rng(0).standard_normal((4, 5, 7), np.float32)

    def state(devices, values):
        mesh = make_mesh(f"data={devices}", jax.devices()[:devices])
        step = jax.device_put(jnp.int32(3), replicated(mesh))
        own = jax.device_put(values, NamedSharding(mesh, OWN))
        return {"w": step}, {"step": step, "unsent": (own,)}

    with Checkpoints(tmp_path, 1, print, {}) as checkpoints:
        checkpoints.save(3, *state(4, unsent), {})
        checkpoints.wait()
        wanted = abstract(state(devices, np.zeros((devices, 5, 7), np.float32)))
        _, _, found, _ = checkpoints.restore(*wanted)
    (got,) = found["unsent"]
    assert got.sharding == wanted[1]["unsent"][0].sharding
    if devices == 4:
        np.testing.assert_array_equal(got, unsent)
    else:
        same = np.broadcast_to(unsent.sum(0) / devices, got.shape)
        np.testing.assert_allclose(got, same, rtol=1e-5, atol=1e-6)


def test_no_memory_is_taken_for_devices_that_only_a_checkpoint_claims():
    at = NamedSharding(make_mesh("data=8"), OWN)
    unsent = (jax.ShapeDtypeStruct((8, 5, 7), np.float32, sharding=at),)
    claim = {"unsent/0": ("float32[80000000000, 5, 7]", 0)}
    with pytest.raises(ValueError, match=r"what 80000000000 devices had not sent .* more than the"):
        checkpoint.unsent_as_saved(Path("4"), unsent, claim)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "int4", "bool"])
def test_a_changed_bit_changes_the_checksum_on_any_mesh(dtype):
    array = jnp.arange(96).reshape(8, 12).astype(dtype)
    bit = jax.lax.bitcast_convert_type
    if dtype == "bool":
        other = array.at[3, 5].set(~array[3, 5])
    elif jnp.issubdtype(dtype, jnp.integer):
        other = array.at[3, 5].set(array[3, 5] ^ 1)
    else:
        kind = f"uint{8 * array.dtype.itemsize}"
        other = array.at[3, 5].set(bit(bit(array[3, 5], kind) ^ 1, array.dtype))
    placed = jax.device_put(array, NamedSharding(make_mesh("fsdp=8"), PartitionSpec("fsdp")))
    assert checksums({"x": placed}) == checksums({"x": array}) != checksums({"x": other})


def test_a_half_written_checkpoint_is_passed_over(run):
    # What a kill leaves: Orbax renames the folder when it is whole.
    (run.directory / "20").rename(run.directory / "20.orbax-checkpoint-tmp")
    assert run.read()[0] == 10


def test_a_checkpoint_of_another_model_is_refused_not_passed_over(run):
    with pytest.raises(
        ValueError, match=r"another model.*half is bfloat16\[64, 8\] there and .*\[32"
    ):
        run.read(width=32)


def test_a_checkpoint_of_other_random_numbers_is_refused(run):
    before = jax.config.jax_default_prng_impl
    jax.config.update("jax_default_prng_impl", "rbg")
    try:
        with pytest.raises(ValueError, match=r"key is key there and key<rbg> \(of JAX_DEFAULT"):
            run.read()
    finally:
        jax.config.update("jax_default_prng_impl", before)


@pytest.mark.parametrize("written", [1, FORMAT + 1])
def test_a_checkpoint_of_another_format_is_refused_with_both_numbers(run, monkeypatch, written):
    if written == 1:  # they had no number
        for step in (10, 20):
            file = run.directory / str(step) / "progress" / "metadata"
            progress = json.loads(file.read_text())
            assert progress.pop("format") == FORMAT
            assert progress.pop("checksum")
            file.write_text(json.dumps(progress))
    else:
        monkeypatch.setattr(checkpoint, "FORMAT", written)
        with Checkpoints(run.directory, 5, print, {}) as checkpoints:
            checkpoints.save(30, *tree(30, run.mesh), {"position": [30, 3]})
        monkeypatch.undo()
    message = rf"has checkpoint format {written}, this version reads format {FORMAT}: start a new"
    with pytest.raises(ValueError, match=message):
        run.read()
    with (
        Checkpoints(run.directory, 5, print, {}, read_only=True) as checkpoints,
        pytest.raises(ValueError, match=message),
    ):
        checkpoints.restore_params(abstract(tree(0, run.mesh)[0]))


def test_a_checkpoint_under_the_name_of_another_step_is_refused(run):
    """The learning rate and the end of the run would follow the name."""
    (run.directory / "10").rename(run.directory / "30")
    with pytest.raises(ValueError, match=r"run/30 is the checkpoint of step 10: rename it back"):
        run.read()


@pytest.mark.parametrize("part", ["params", "rest"])
def test_parts_of_two_checkpoints_are_not_mixed(run, part):
    shutil.rmtree(run.directory / "20" / part)
    shutil.copytree(run.directory / "10" / part, run.directory / "20" / part)
    assert run.read()[0] == 10
    (said,) = run.log
    assert said.startswith(f"checkpoint 20 is damaged and passed over ({part}/")
    assert said.endswith(" is not what was saved)")


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    mesh, made = make_mesh(None), {"alpha": 8.0, "seed": 0}
    with Checkpoints(tmp_path, 1, print, {}, run=made) as checkpoints:
        checkpoints.save(1, *tree(1, mesh), {})
    wanted = abstract(tree(0, mesh)[0])
    for run, message in (
        ({"alpha": 80.0, "seed": 0}, r"/1 is a checkpoint of another run: alpha is 8.0 there"),
        ({"compress_gradients": True}, r"compress_gradients is False there and True here"),
        ({"seed": 0, "text": "b"}, "text is None there and 'b' here"),
    ):
        with (
            Checkpoints(tmp_path, 1, print, {}, run=run, read_only=True) as checkpoints,
            pytest.raises(ValueError, match=message),
        ):
            checkpoints.restore_params(wanted)
    # Another tokenizer has another vocabulary, too: the cause is named, not the shape.
    with (
        Checkpoints(tmp_path, 1, print, {}, run={"text": "b"}, read_only=True) as checkpoints,
        pytest.raises(ValueError, match="text is None there and 'b' here"),
    ):
        checkpoints.restore_params({"w": jax.ShapeDtypeStruct((3,), np.float32)})
    with Checkpoints(
        tmp_path, 1, print, {}, run={"seed": 0, "compress_gradients": False}, read_only=True
    ) as checkpoints:
        assert bits(checkpoints.restore_params(wanted)[1]) == bits(tree(1, mesh)[0])


def test_a_checkpoint_of_another_text_is_refused_beside_the_newest(tmp_path):
    mesh = make_mesh(None)
    for step, text in ((1, "a"), (2, "b")):
        with Checkpoints(tmp_path / text, 1, print, {}, run={"text": text}) as checkpoints:
            checkpoints.save(step, *tree(step, mesh), {})
    shutil.copytree(tmp_path / "a" / "1", tmp_path / "b" / "1")
    with (
        Checkpoints(tmp_path / "b", 1, print, {1: 0.5}, read_only=True) as checkpoints,
        pytest.raises(ValueError, match="/1 is a checkpoint of another run: text is 'a' there"),
    ):
        checkpoints.restore_params(abstract(tree(0, mesh)[0]))


def test_where_no_checkpoint_can_be_read_the_run_does_not_start_anew(run):
    for step in (10, 20):
        (run.directory / str(step) / "progress" / "metadata").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read"):
        run.read()


def test_an_empty_folder_has_nothing_to_restore(run, tmp_path):
    (tmp_path / "empty").mkdir()
    assert run.read(directory=tmp_path / "empty") is None


def test_the_newest_and_the_best_are_kept_and_the_best_is_sampled_from(tmp_path):
    mesh = make_mesh(None)
    losses = {1: 3.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: None, 6: 2.5}
    evaluations = {}
    with Checkpoints(tmp_path, 2, print, evaluations) as checkpoints:
        for step, loss in losses.items():
            if loss is not None:
                evaluations[step] = loss
            checkpoints.save(step, *tree(step, mesh), {})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 5, 6]
        step, params = checkpoints.restore_params(abstract(tree(0, mesh)[0]))
        assert step == 2
        assert bits(params) == bits(tree(2, mesh)[0])


def test_a_step_that_is_evaluated_after_it_was_saved_can_be_the_best(tmp_path):
    mesh = make_mesh(None)
    with Checkpoints(tmp_path, 1, print, {}) as checkpoints:
        checkpoints.save(1, *tree(1, mesh), {})  # stopped while it evaluated
    evaluations = {1: 1.0}
    with Checkpoints(tmp_path, 1, print, evaluations) as checkpoints:
        for step in (2, 3):
            evaluations[step] = 1.0 + step
            checkpoints.save(step, *tree(step, mesh), {})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 3]
        assert checkpoints.best_first() == [1, 3]


def test_evaluations_that_the_run_never_made_do_not_choose_the_best(tmp_path):
    mesh = make_mesh(None)
    with Checkpoints(tmp_path, 5, print, {}) as checkpoints:
        for step, known in ((1, [(1, 3.0)]), (2, [(1, 3.0), (2, 1.0)]), (3, [(1, 3.0), (2, None)])):
            checkpoints.save(step, *tree(step, mesh), {"evaluations": known})
    lines = {1: 0.5, 2: 0.7, 3: 2.0}  # of another run, but for that of step 3, which was made last
    with Checkpoints(tmp_path, 1, print, lines, read_only=True) as checkpoints:
        assert checkpoints.best_first() == [3, 1, 2]
    shutil.rmtree(tmp_path / "3" / "progress")
    with Checkpoints(tmp_path, 1, print, lines, read_only=True) as checkpoints:
        assert checkpoints.best_first() == [2, 3, 1]


def test_what_prunes_nothing_leaves_that_to_the_next(tmp_path):
    mesh = make_mesh(None)
    with Checkpoints(tmp_path, 1, print, {}) as checkpoints:
        found = []
        for step, prune in ((1, True), (2, False), (3, False), (4, True)):
            checkpoints.save(step, *tree(step, mesh), {}, prune=prune)
            checkpoints.wait()
            found.append(checkpoints.steps())
    assert found == [[1], [1, 2], [1, 2, 3], [4]]


def test_a_step_that_overwrites_its_state_does_not_reach_the_checkpoint_being_written(tmp_path):
    mesh = make_mesh(None)
    advance = jax.jit(lambda x: jax.tree.map(lambda v: v + 1, x), donate_argnums=0)
    params = {"w": jax.device_put(jnp.zeros((1024, 4096)), replicated(mesh))}
    with Checkpoints(tmp_path, 2, print, {}) as checkpoints:
        checkpoints.save(1, params, {"step": jnp.int32(1)}, {})
        for _ in range(5):
            params = advance(params)
        checkpoints.wait()
        _, saved = checkpoints.restore_params(abstract(params))
    assert float(jnp.abs(saved["w"]).max()) == 0
    assert float(params["w"].max()) == 5


def test_a_damaged_step_can_be_saved_again(run):
    (run.directory / "20" / "progress" / "metadata").unlink()
    assert run.read()[0] == 10
    with Checkpoints(run.directory, 5, print, {}) as checkpoints:
        checkpoints.save(20, *tree(20, run.mesh), {"position": [20, 3]})
    assert run.read()[0] == 20


def test_a_step_before_a_damaged_one_can_be_saved(run):
    shutil.rmtree(run.directory / "20" / "params")  # the run went on from step 10 and stops at 15
    with Checkpoints(run.directory, 5, run.log.append, {}) as checkpoints:
        checkpoints.save(15, *tree(15, run.mesh), {"position": [15, 3]})
    assert run.read()[0] == 15
