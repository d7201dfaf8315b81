"""Search over rematerialization policies, each with the fewest microbatches that fit."""

import dataclasses
from collections.abc import Iterator, Sequence

from natsjax.config import Config
from natsjax.plan.train_step import CompilerCrashed, Plan, plan_apart
from natsjax.runtime.chips import GIB
from natsjax.runtime.tables import text_table


def search(config: Config, name: str, num_slices: int = 1) -> Iterator[Plan]:
    """Yields a plan for every rematerialization policy, with the fewest microbatches that fit, or the most possible.

    Raises:
      UserError: see ``train_step.plan_apart``.
    """
    for remat in ("none", "dots", "full"):
        model = dataclasses.replace(config.model, remat=remat)
        shards, made = 1, None
        for count in range(1, config.train.batch_size + 1):
            if config.train.batch_size % (count * shards):
                continue
            train = dataclasses.replace(config.train, gradient_accumulation_steps=count)
            try:
                made = plan_apart(dataclasses.replace(config, model=model, train=train), name, num_slices)
            except CompilerCrashed as crash:
                print(f"model.remat = {remat}, train.gradient_accumulation_steps = {count}: {crash}\n", flush=True)
                continue
            shards = made.mesh.get("data", 1) * made.mesh.get("fsdp", 1)
            if made.fits is not False:
                break
        if made is not None:
            yield made


def search_table(plans: Sequence[Plan]) -> str:
    """Formats a table of the plans, the fastest first."""

    def seconds(made: Plan) -> float:
        return made.roofline.seconds if made.roofline is not None and made.fits else float("inf")

    names = ("--config.model.remat", "--config.train.gradient_accumulation_steps")
    lines = [[*names, "GiB per device", "seconds per step, at least"]]
    for made in sorted(plans, key=seconds):
        config, roofline = made.config, made.roofline
        lines.append(
            [
                config.model.remat,
                str(config.train.gradient_accumulation_steps),
                f"{made.memory.total / GIB:.2f}" + (": does not fit" if made.fits is False else ""),
                "-" if roofline is None else f"{roofline.seconds:.4f} ({roofline.bound})",
            ]
        )
    return text_table(lines)
