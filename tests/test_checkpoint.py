"""Checkpoints: an unfinished one is passed over and said; they are restored on other devices and by other processes."""

import json
import os
import subprocess
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from processes import run, together

from natsjax.errors import UserError, first_line
from natsjax.model import sharding
from natsjax.runs.checkpoint import Checkpoints

KILLED_WHILE_SAVING = """
import os, pathlib, sys
import jax.numpy as jnp
from natsjax.runs.checkpoint import Checkpoints

checkpoints = Checkpoints(pathlib.Path(sys.argv[1]))
if len(sys.argv) > 2:
    checkpoints.save(5, {"w": jnp.arange(3.0)})
    checkpoints.wait()
os.rename = os.replace = lambda *_, **__: os._exit(9)  # all is written; what makes it complete is not done any more
checkpoints.save(10, {"w": jnp.ones(3)})
checkpoints.wait()
"""


def killed_while_saving(folder, *earlier):
    assert run("-c", KILLED_WHILE_SAVING, folder, *earlier).returncode == 9
    assert [path.name for path in folder.glob("10*")] == ["10.orbax-checkpoint-tmp"]


def test_an_unfinished_checkpoint_is_passed_over_and_said(tmp_path, capfd):
    killed_while_saving(tmp_path, "earlier")
    capfd.readouterr()
    reader = Checkpoints(tmp_path, read_only=True)
    assert reader.latest_step() == 5
    assert [path.name for path in tmp_path.glob("10*")]  # who only reads leaves everything as it is
    reader.close()
    checkpoints = Checkpoints(tmp_path)
    assert capfd.readouterr().err == (
        f"the checkpoint of step 10 in {tmp_path} is unfinished: a process was killed while it saved; the newest "
        "complete one is of step 5\n"
    )
    state = checkpoints.restore({"w": jax.ShapeDtypeStruct((3,), jnp.float32)})
    np.testing.assert_array_equal(state["w"], np.arange(3.0))
    checkpoints.save(10, {"w": jnp.ones(3)})
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["10"]


def test_the_first_one_unfinished(tmp_path, capfd):
    killed_while_saving(tmp_path)
    capfd.readouterr()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_step() is None
    assert capfd.readouterr().err.endswith("a process was killed while it saved; there is no complete one\n")
    checkpoints.close()


def test_unfinished_ones_are_said_in_their_order(tmp_path, capfd):
    for step in (100, 5, 10):
        (tmp_path / f"{step}.orbax-checkpoint-tmp").mkdir()
    Checkpoints(tmp_path).close()
    assert f"the checkpoint of step 5, 10, 100 in {tmp_path} is unfinished" in capfd.readouterr().err
    assert not list(tmp_path.glob("*orbax*"))


def flip(path, at, mask=1):
    """Changes one bit of a byte; what the file was."""
    data = path.read_bytes()
    changed = bytearray(data)
    changed[at] ^= mask
    path.write_bytes(changed)
    return data


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_a_flipped_bit_of_any_file_is_noticed_or_does_nothing(tmp_path, capfd):
    state = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((64, 32)), jnp.float32), "step": jnp.int32(5)}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, state)
    checkpoints.close()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    noticed = set()
    for path in files:
        size = path.stat().st_size
        for at, mask in ((0, 1), (size // 2, 0x80), (size - 1, 4)):
            data = flip(path, at, mask)
            try:
                reader = Checkpoints(tmp_path, read_only=True)
                found = reader.restore(abstract)
                reader.close()
                assert all(np.array_equal(found[name], value) for name, value in state.items()), path
            except UserError as error:
                if str(path) in str(error) or path.name == "SHA256SUMS.0":
                    noticed.add(str(path.relative_to(tmp_path)))
            path.write_bytes(data)
    # Orbax writes these beside what is read, and takes no numbers from them.
    assert {str(path.relative_to(tmp_path)) for path in files} - noticed == {
        "5/_CHECKPOINT_METADATA",
        "5/commit_success.txt",
    }
    capfd.readouterr()


@pytest.mark.parametrize("damage", ["flipped", "missing", "all missing", "sums", "pointer"])
def test_a_checkpoint_that_is_not_what_was_saved_is_passed_over(tmp_path, capfd, damage):
    if damage != "all missing":
        (tmp_path / "10.unreadable/of_an_earlier_start").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path, max_to_keep=2)
    for step in (5, 10):
        checkpoints.save(step, {"w": jnp.full(3000, float(step))})
    checkpoints.wait()
    path = tmp_path / "10/SHA256SUMS.0" if damage == "sums" else largest(tmp_path / "10/default")
    if "missing" in damage:
        path.unlink()
        numbers = [file for file in tmp_path.glob("10/default/*/**/*") if file.is_file() and damage != "missing"]
        for file in numbers:
            file.unlink()
    elif damage == "pointer":
        path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 12345\n")
    else:
        flip(path, path.stat().st_size // 2)
    state = checkpoints.restore({"w": jax.ShapeDtypeStruct((3000,), jnp.float32)})
    np.testing.assert_array_equal(state["w"], np.full(3000, 5.0))
    said = capfd.readouterr().err.splitlines()
    assert said[0].startswith(f"the checkpoint of step 10 in {tmp_path} cannot be read: {tmp_path / '10'}")
    assert said[0].endswith("fetch the file itself with `git lfs pull`.") == (damage == "pointer")
    assert said[1:] == ["going back to step 5"]
    assert checkpoints.latest_step() == 5
    assert (tmp_path / f"10.unreadable{'' if damage == 'all missing' else 2}/default").exists()
    checkpoints.close()


def test_one_without_checksums_is_read_and_that_is_said(tmp_path, capfd):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, {"w": jnp.ones(3)})
    checkpoints.wait()
    sums = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS.0"]  # which the tool of that name reads
    subprocess.run(sums, cwd=tmp_path / "5", check=True)
    (tmp_path / "5/SHA256SUMS.0").unlink()
    np.testing.assert_array_equal(checkpoints.restore({"w": jax.ShapeDtypeStruct((3,), jnp.float32)})["w"], np.ones(3))
    (said,) = capfd.readouterr().err.splitlines()
    assert f"step 5 in {tmp_path} is read without a check: it has no checksums" in said
    checkpoints.close()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Exception("no index (3). See details: <bound method spec of Store({\n  'a': 1})>"), "no index (3)"),
        (ValueError("a.b <function f at 0x7f> is no shape"), "a.b"),
        (ValueError("\n\n first.\nsecond"), "first"),
        (OSError(28, "No space left on device", "x"), "No space left on device"),
        (RuntimeError(""), "RuntimeError"),
        (ValueError("x" * 1000), "x" * 300 + "…"),
    ],
)
def test_of_what_a_library_says_a_sentence_has_the_first_line_without_reprs(error, said):
    assert first_line(error) == said


def steps_in(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def test_the_last_ones_are_kept_and_multiples_for_ever(tmp_path):
    checkpoints = Checkpoints(tmp_path, max_to_keep=2, keep_every=20)
    for step in range(5, 60, 5):
        checkpoints.save(step, {"w": jnp.full(3, float(step))})
    checkpoints.close()
    assert steps_in(tmp_path) == [20, 40, 50, 55]
    later = Checkpoints(tmp_path, max_to_keep=1, keep_every=40)  # as a resumed run that was told otherwise
    later.save(56, {"w": jnp.ones(3)})
    later.close()
    assert steps_in(tmp_path) == [40, 56]
    reader = Checkpoints(tmp_path, read_only=True)
    assert reader.latest_step() == 56
    reader.close()
    few = Checkpoints(tmp_path / "few", max_to_keep=3)
    for step in range(5, 60, 5):
        few.save(step, {"w": jnp.ones(3)})
    few.close()
    assert steps_in(tmp_path / "few") == [45, 50, 55]


def test_a_save_goes_on_in_the_background_and_the_next_one_waits_for_it(tmp_path, monkeypatch):
    """What is saved may be changed at once: the state is copied before ``save`` returns."""
    release = threading.Event()
    real = os.rename
    monkeypatch.setattr(os, "rename", lambda *a, **k: (release.wait(30), real(*a, **k))[1])
    checkpoints = Checkpoints(tmp_path)
    state = {"w": jnp.arange(3.0)}
    checkpoints.save(5, state)
    state["w"].delete()
    assert steps_in(tmp_path) == []  # it is written, but not there yet
    assert checkpoints.latest_step() is None
    release.set()
    checkpoints.wait()
    assert steps_in(tmp_path) == [5]
    restored = checkpoints.restore({"w": jax.ShapeDtypeStruct((3,), jnp.float32)})
    np.testing.assert_array_equal(restored["w"], np.arange(3.0))
    checkpoints.close()


# Restores the state if there is one, compares every shard, and saves it as that of the next step; nothing is compiled.
HAND_ON = """
import json, pathlib, sys
import jax, numpy as np
from natsjax.runs.checkpoint import Checkpoints
from natsjax.runtime.flags import join_processes, run_command
from natsjax.config import Config
from natsjax.train.step import Trainer

def main():
    join_processes(sys.argv)
    trainer = Trainer(Config.from_dict(json.loads(sys.argv[1])), 16)
    abstract = trainer.abstract_state()
    count = iter(range(1000))
    values = jax.tree.map(
        lambda x: (1000 * next(count) + np.arange(x.size)).reshape(x.shape).astype(x.dtype), abstract
    )
    checkpoints = Checkpoints(pathlib.Path(sys.argv[2]), max_to_keep=1)
    latest = checkpoints.latest_step()
    if latest is None:
        latest = 0
        def put(x, value):
            return jax.make_array_from_callback(x.shape, x.sharding, lambda index: value[index])

        state = jax.tree.map(put, abstract, values)
    else:
        state = checkpoints.restore(abstract)
    assert jax.tree.map(lambda x: x.sharding, state) == trainer.shardings
    for x, value in zip(jax.tree.leaves(state), jax.tree.leaves(values), strict=True):
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(shard.data, value[shard.index])
    checkpoints.save(latest + 1, state)
    checkpoints.close()
    print(latest, len(state.parameters["embedding"].sharding.device_set), jax.process_count())

run_command(main)
"""


def hand_on(folder, *, processes, devices, **mesh):
    """``step devices processes`` of what was restored, in each process."""
    config = tiny.config(mesh=dict.fromkeys(sharding.AXES, 1) | mesh, train={"batch_size": 8})
    running = together(processes, "-c", HAND_ON, json.dumps(config.to_dict()), folder, devices=devices)
    outputs = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0] * processes, outputs
    return [out.split()[-3:] for out, _ in outputs]


def test_the_state_travels_across_devices_and_processes(tmp_path):
    """All of it, optimizer and KV penalty too: 2 devices, 1, 8, two processes of 2, and one process again."""
    assert hand_on(tmp_path, processes=1, devices=2, fsdp=2) == [["0", "2", "1"]]
    assert hand_on(tmp_path, processes=1, devices=1) == [["1", "1", "1"]]
    assert hand_on(tmp_path, processes=1, devices=8, fsdp=4, tensor=2) == [["2", "8", "1"]]
    assert hand_on(tmp_path, processes=1, devices=1) == [["3", "1", "1"]]
    assert hand_on(tmp_path, processes=2, devices=2, fsdp=2, tensor=2) == [["4", "4", "2"]] * 2
    assert hand_on(tmp_path, processes=1, devices=2, data=2) == [["5", "2", "1"]]
