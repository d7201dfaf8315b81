"""A trained run, ready to be used."""

import dataclasses
import os
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from natsjax.config import Config, MeshConfig
from natsjax.errors import UserError
from natsjax.model import sharding
from natsjax.model.transformer import Transformer, model_structure
from natsjax.runs.checkpoint import Checkpoints
from natsjax.runs.data import RunData, find_data
from natsjax.runs.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """Contents of a workdir or an export.

    Attributes:
      workdir: its folder.
      config: of the run.
      structure: with ``parameters``, what ``nnx.merge`` makes the model of.
      parameters: nested dict of arrays (``model.param_dtype``), divided along the mesh.
      step: optimizer steps that the parameters have had.
      data: what it learned from; ``data.vocabulary`` is the tokenizer. An export away from its corpus has no more.
      mesh: of the parameters.
    """

    workdir: Workdir
    config: Config
    structure: nnx.GraphDef
    parameters: Any
    step: int
    data: RunData
    mesh: Mesh

    @property
    def model(self) -> Transformer:
        """The model, ``model(Batch(…))``; on several devices it is called under ``jax.set_mesh(run.mesh)``."""
        parameters = self.parameters
        if self.mesh.size == 1:  # then an ordinary function on that device
            parameters = jax.device_put(parameters, jax.sharding.SingleDeviceSharding(self.mesh.devices.flat[0]))
        return nnx.merge(self.structure, parameters)

    @property
    def tokenizer(self):
        """The tokenizer (or the recall task's vocabulary)."""
        return self.data.vocabulary


def load(
    path: str | os.PathLike[str],
    *,
    prepared_dir: str | os.PathLike[str] | None = None,
    mesh_config: MeshConfig | None = None,
    checkpoint: str | int = "newest",
) -> LoadedRun:
    """Loads a checkpoint of a run, or an export (``natsjax.export``), which does not need the corpus.

    Args:
      path: the workdir, or the export.
      prepared_dir: where the prepared corpus is now; None: beside the run, or where the run had it
        (``natsjax.runs.paths``). Nothing is prepared, and nothing written.
      mesh_config: how parameters are divided among the devices here; None: as the run was trained, where the devices
        are as many, else all along ``fsdp``.
      checkpoint: "newest"; "best", that of the lowest held-out loss (``train.eval_every``); or its step.

    Raises:
      UserError: there is no run, no such checkpoint, or the data is gone.

    Example:
      >>> run = natsjax.load("runs/quickstart")
      >>> tokens = run.tokenizer.encode("Fellow citizens")
    """
    workdir = Workdir(path)
    config = workdir.read_config()
    if not workdir.has_checkpoint():
        raise UserError(f"{workdir.path} holds no checkpoint yet: train it with train.py first.")
    if workdir.is_export:
        workdir.read_export()  # whether this natsjax reads it
    data = find_data(config, workdir, prepared_dir=prepared_dir)
    if config.data.source != "none":  # an imported model may be measured on any corpus of its tokens
        workdir.compare_data(data.fingerprint, to_train=False)
    mesh = _mesh(config, mesh_config)
    sharding.check_arrays(config, data.vocabulary.vocab_size, mesh)
    model = model_structure(config, data.vocabulary.vocab_size)
    parameters = jax.tree.map(
        lambda x, axes: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=sharding.named_sharding(mesh, sharding.storage_spec(axes))
        ),
        model.parameters,
        model.axes,
    )
    step, loaded = read_parameters(workdir, config, parameters, checkpoint)
    return LoadedRun(workdir, config, model.structure, loaded, step, data, mesh)


def read_parameters(
    workdir: Workdir, config: Config, abstract: Any, checkpoint: str | int = "newest"
) -> tuple[int, Any]:
    """Reads the parameters that a run serves: the average where it has one (``optimizer.ema_decay``).

    Args:
      workdir: of the run, or an export.
      config: of it.
      abstract: nested dict of ``jax.ShapeDtypeStruct``, of all parameters or some.
      checkpoint: as in ``load``.

    Returns:
      ``(step, parameters)``.

    Raises:
      UserError: there is no such checkpoint, or it cannot be read.
    """
    step = _step_of(workdir, checkpoint)
    name = "average" if config.optimizer.serves_average and not workdir.is_export else "parameters"
    checkpoints = Checkpoints(workdir.checkpoints, read_only=True)
    try:
        state = checkpoints.restore({"step": jax.ShapeDtypeStruct((), "int32"), name: abstract}, step)
    finally:
        checkpoints.close()
    return int(state["step"]), state[name]


def _step_of(workdir: Workdir, checkpoint: str | int) -> int | None:
    """Returns the step that ``checkpoint`` of ``load`` names; None for the newest."""
    if checkpoint == "newest":
        return None
    if checkpoint == "best":
        step = workdir.best_step()
        if step is None:
            raise UserError(
                f"--checkpoint=best: {workdir.path} has no held-out loss by step; train with train.eval_every, or name "
                "a step."
            )
        return step
    try:
        return int(checkpoint)
    except ValueError as error:
        raise UserError(f"--checkpoint={checkpoint}: newest, best or a step was expected.") from error


def _mesh(config: Config, asked: MeshConfig | None) -> Mesh:
    """Makes the mesh asked for, or the run's own where the devices are as many, or one that divides parameters."""
    if asked is not None:
        return sharding.make_mesh(asked)
    try:
        return sharding.make_mesh(config.mesh)
    except UserError:
        return sharding.make_mesh(MeshConfig())
