"""Monitors without a trainer, and steps for them; tests share them."""

import types

import numpy as np
import tiny

from natsjax.model import sharding
from natsjax.runs.workdir import Workdir
from natsjax.train.logs.monitor import Monitor
from natsjax.train.logs.wall_time import WallTime


def make(tmp_path, config, start=0):
    """Makes a monitor without a trainer."""
    devices = types.SimpleNamespace(vocab_size=tiny.VOCAB_SIZE, mesh=sharding.make_mesh(config.mesh), program=str)
    wall_time = WallTime()
    wall_time.close()
    wall_time.begin_steps()
    tmp_path.mkdir(parents=True, exist_ok=True)
    return Monitor(config, Workdir(tmp_path), devices, start, wall_time)


def go(watch, config, steps, **changes):
    """Reports steps whose metrics are those of ``tiny.step_metrics``."""
    for step in steps:
        watch.before(step, np.zeros(1))
        watch.finished(step, tiny.step_metrics(config, **changes))
