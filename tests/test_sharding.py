"""One config, any mesh: the same losses on one device, on eight in four arrangements, and in two processes."""

import dataclasses
import json
import shutil
import signal

import numpy as np
import pytest
import tiny
from processes import SLOW, json_lines, together, wait_for

from natsjax.config import Config, MeshConfig
from natsjax.errors import UserError
from natsjax.model import sharding
from natsjax.runs.workdir import HELD_OUT_LOSS, read_metrics

MESHES = ("fsdp=4,tensor=2", "context=2,fsdp=4")
if SLOW:
    MESHES = ("fsdp=8", "data=2,fsdp=2,tensor=2", *MESHES)
TOLERANCE = {"dense": 1e-5, "nats": 1e-4}  # a rounding can flip a role
NUM_STEPS = 50


def config_of(attention, mesh="fsdp=-1", **train):
    """The tiny config, with heads, width and batch that eight devices can share."""
    sizes = dict.fromkeys(sharding.AXES, 1) | {
        name: int(size) for name, size in (part.split("=") for part in mesh.split(","))
    }
    return tiny.config(
        model={"layer_types": attention},
        mesh=sizes,
        train={"num_steps": NUM_STEPS, "batch_size": 8} | train,
        checkpoint={"save_every": 10},
    )


CURVES = """
import json, sys
import jax, numpy as np
from natsjax.model import sharding
from natsjax.config import Config
from natsjax.data import RecallTask
from natsjax.train.step import Trainer

configs = [Config.from_dict(values) for values in json.load(sys.stdin)]
for config in configs:
    task = RecallTask(config.data.context_length, 2, 5, 5, 5)
    count = 1 if config.mesh == configs[0].mesh else 8
    trainer = Trainer(config, task.vocab_size, sharding.make_mesh(config.mesh, jax.devices()[:count]))
    state, losses, size = trainer.init(), [], config.train.batch_size
    for step in range(config.train.num_steps):
        state, metrics = trainer.step(state, task.rows(step * size, size))
        losses.append(float(metrics["loss"]))
    print(json.dumps([repr(dict(trainer.mesh.shape)), losses]), flush=True)
"""


@pytest.mark.larger
@pytest.mark.parametrize("attention", [pytest.param("dense", marks=pytest.mark.slow), "nats"])
def test_every_mesh_gives_the_losses_of_one_device(attention):
    configs = [config_of(attention)] + [config_of(attention, mesh) for mesh in MESHES]
    # One of them with activations recomputed.
    configs[-1] = Config.from_dict(
        configs[-1].to_dict() | {"model": configs[-1].to_dict()["model"] | {"remat": "full"}}
    )
    (_, expected), *others = json_lines(CURVES, [config.to_dict() for config in configs], devices=8)
    assert expected[-1] < 0.8 * expected[0]  # something was learned, so that a wrong gradient would show
    assert len(others) == len(MESHES)
    for mesh, losses in others:
        np.testing.assert_allclose(losses, expected, rtol=TOLERANCE[attention], err_msg=mesh)


# The command, without the evaluation at its end.
TRAIN = """
import json, sys
from natsjax import evaluate, train
from natsjax.runtime import distributed
from natsjax.runtime.flags import join_processes, run_command
from natsjax.config import Config

def main():
    join_processes(sys.argv)
    with distributed.fail_together():
        config = Config.from_dict(json.loads(sys.argv[1]))
        evaluate.run = lambda *a, **k: None
        train.run(config, sys.argv[2])

run_command(main)
"""


def start(workdir, config, *, processes, devices):
    """``train.run`` in that many processes."""
    return together(processes, "-c", TRAIN, json.dumps(config.to_dict()), workdir, devices=devices)


def finish(running, status=0):
    errors = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [status] * len(running), errors
    return errors


def losses_of(workdir):
    return [(line["step"], line["loss"], line["kv_fraction"]) for line in read_metrics(workdir / "metrics.jsonl")]


def test_two_processes_train_as_one_and_go_on_after_a_kill(tmp_path):
    config = config_of("nats", "data=2,fsdp=2,tensor=2")
    whole, cut, alone = (tmp_path / name for name in ("whole", "cut", "alone"))
    _, silent = finish(start(whole, config, processes=2, devices=4))
    assert "parameters" not in silent  # process 0 speaks for both
    expected = losses_of(whole)
    assert [step for step, *_ in expected] == list(range(1, NUM_STEPS + 1))

    running = start(cut, config, processes=2, devices=4)
    wait_for((cut / "checkpoints/10").exists, *running)
    running[1].send_signal(signal.SIGKILL)
    for process in running:
        process.communicate(timeout=120)
    assert running[0].returncode != 0
    shutil.copytree(cut, alone)

    errors = finish(start(cut, config, processes=2, devices=4))
    assert "resuming from step" in errors[0]
    assert losses_of(cut) == expected  # bit for bit

    one_device = config_of("nats")
    errors = finish(start(alone, one_device, processes=1, devices=1))
    assert "resuming from step" in errors[0]
    np.testing.assert_allclose(losses_of(alone), expected, rtol=TOLERANCE["nats"])


def test_two_processes_evaluate_while_they_train_and_save_by_the_clock(tmp_path):
    held_out = {}
    for name, processes, devices, mesh in (("two", 2, 2, "data=2,fsdp=2"), ("one", 1, 1, "fsdp=-1")):
        config = config_of("nats", mesh, num_steps=9, eval_every=3)
        saved = dataclasses.replace(config.checkpoint, save_every=10_000, save_every_minutes=1e-6, max_to_keep=20)
        workdir = tmp_path / name
        finish(start(workdir, dataclasses.replace(config, checkpoint=saved), processes=processes, devices=devices))
        lines = [line for line in read_metrics(workdir / "metrics.jsonl") if HELD_OUT_LOSS in line]
        held_out[name] = [(line["step"], line[HELD_OUT_LOSS], line["held_out_kv_fraction"]) for line in lines]
        # Every logged step is a minute late: process 0 says so to both.
        assert {int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()} == set(
            range(1, 10)
        )
    assert [step for step, *_ in held_out["two"]] == [3, 6, 9]
    np.testing.assert_allclose(held_out["two"], held_out["one"], rtol=TOLERANCE["nats"])


def test_sigterm_at_one_of_two_processes_leads_to_a_save_in_both(tmp_path):
    running = start(tmp_path, config_of("dense", "fsdp=2", num_steps=100_000), processes=2, devices=1)
    wait_for(lambda: len(losses_of(tmp_path)) >= 3, *running)
    running[1].send_signal(signal.SIGTERM)
    errors = finish(running, 130)
    last = losses_of(tmp_path)[-1][0]
    assert f"asked to stop on another host: saved step {last}; run the same command again to resume" in errors[0]
    assert (tmp_path / f"checkpoints/{last}").exists()


@pytest.mark.parametrize(
    ("mesh", "devices", "message"),
    [
        ({"fsdp": 3}, 8, "mesh.data = 1, mesh.fsdp = 3, .* make 3 devices, and there are 8"),
        ({"fsdp": -1, "tensor": 3}, 8, "3 does not divide the number of devices, 8"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(mesh, devices, message):
    with pytest.raises(UserError, match=message):
        sharding.mesh_sizes(MeshConfig(**mesh), devices)


def test_the_rest_is_what_the_others_leave():
    assert sharding.mesh_sizes(MeshConfig(), 8) == (1, 8, 1, 1)
    assert sharding.mesh_sizes(MeshConfig(data=-1, fsdp=2, tensor=2), 8) == (2, 2, 2, 1)


class FakeMesh:
    def __init__(self, **sizes):
        self.shape = dict.fromkeys(sharding.AXES, 1) | sizes


@pytest.mark.parametrize(
    ("mesh", "changes", "message"),
    [
        ({"fsdp": 8}, {"train": {"batch_size": 4}}, "train.batch_size = 4 sequences .* a multiple of 8"),
        (
            {"fsdp": 4},
            {"train": {"batch_size": 8, "gradient_accumulation_steps": 4}},
            r"train.batch_size / train.gradient_accumulation_steps = 2 .* a multiple of 16",
        ),
        ({"tensor": 4}, {}, "model.num_kv_heads = 2 cannot be divided by mesh.tensor = 4; .* divides it is 2"),
        ({"fsdp": 4}, {"model": {"embed_dim": 18}}, "model.embed_dim = 18 .* mesh.fsdp = 4; .* divides it is 3"),
        ({"context": 8}, {}, "data.context_length = 24 must be a multiple of 2 . mesh.context = 16"),
    ],
)
def test_what_cannot_be_divided_is_named(mesh, changes, message):
    config = tiny.config(**changes)
    with pytest.raises(UserError, match=message):
        sharding.check(config, tiny.VOCAB_SIZE, FakeMesh(**mesh))


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """One of a slice or node that only a network joins to others."""

    id: int
    slice_index: int
    platform: str
    coords: tuple[int, ...]
    process_index: int = 0
    core_on_chip: int = 0
    device_kind: str = "fake"


def fake_devices(platform):
    """Two slices of 2x2 chips, or nodes."""
    return [FakeDevice(index, index // 4, platform, (index % 2, index % 4 // 2, 0)) for index in range(8)]


def test_slices_lie_along_data():
    devices = fake_devices("tpu")
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices)
    assert [{device.slice_index for device in replica.flat} for replica in mesh.devices] == [{0}, {1}]
    with pytest.raises(UserError, match=r"mesh.data = 1 cannot be divided among 2 slices; make it a multiple"):
        sharding.make_mesh(MeshConfig(fsdp=8), devices)


def test_nodes_of_gpus_may_share_parameters():
    mesh = sharding.make_mesh(MeshConfig(fsdp=8), fake_devices("gpu"))
    assert [device.id for device in mesh.devices.flat] == list(range(8))
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4), fake_devices("gpu"))
    assert [{device.slice_index for device in replica.flat} for replica in mesh.devices] == [{0}, {1}]
