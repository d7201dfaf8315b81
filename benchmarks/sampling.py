"""Effect of sampling the masked-out pairs on the gradient of a trained model's roles.

    python -m benchmarks.sampling --workdir=runs/recall [--draws=64] [--fractions=0.5,0.25,0.125,0.0625,0.03125]

Takes the newest checkpoint of a run and, for each draw, a training batch and Gumbel noise of its own; computes the
scorers' gradient with every masked-out pair ("exact"), with each sampled fraction, and with none of them ("visible"),
on the very same batch and noise. Prints a Markdown table:

* bias: root mean square, over the scorers' parameters, of the mean difference from exact in standard errors. 1 is what
  an unbiased estimate gives.
* added variance: mean squared difference from exact over the variance that exact has between draws, which training
  averages away in any case.
* cosine: between the mean gradient and exact's.
"""

import argparse
import dataclasses
import pathlib

import jax
import jax.flatten_util
import numpy as np

from natsjax.config import Config
from natsjax.data import iterate, train_dataset
from natsjax.model.inputs import Batch
from natsjax.runs.load import LoadedRun, load
from natsjax.runtime.flags import Parser, run_command
from natsjax.train import losses
from natsjax.train.step import Trainer


def scorer_gradients(run: LoadedRun, config: Config, draws: int) -> np.ndarray:
    """Returns the scorers' flattened gradients under a config, float64 ``[draws, parameters]``."""
    structure = Trainer(config, run.data.vocabulary.vocab_size).structure

    @jax.jit
    def gradient(batch, noise_key):
        gradients, _ = jax.grad(losses.loss, has_aux=True)(
            run.parameters, structure, config, batch, losses.batch_totals(batch), noise_key, 0.0
        )
        return jax.flatten_util.ravel_pytree(gradients["blocks"]["attention"]["scorer"])[0]

    dataset = train_dataset(run.data.source, batch_size=config.train.batch_size)
    batches = ((n, Batch.from_rows(rows)) for n, rows in zip(range(draws), iterate(dataset, run.step), strict=False))
    return np.stack([np.asarray(gradient(batch, jax.random.key(n)), np.float64) for n, batch in batches])


def with_mask_gradient(config: Config, mask_gradient: str, fraction: float = 1 / 8) -> Config:
    """Returns the config with another ``nats.mask_gradient``."""
    nats = dataclasses.replace(config.nats, mask_gradient=mask_gradient, sampled_fraction=fraction)
    return dataclasses.replace(config, nats=nats)


def row(name: str, exact: np.ndarray, other: np.ndarray) -> str:
    """Formats a line of the table."""
    difference = other - exact
    draws = len(difference)
    error = difference.std(0, ddof=1) / np.sqrt(draws)
    moves = error > 1e-9 * np.abs(exact).max()
    bias = np.sqrt(np.mean((difference.mean(0)[moves] / error[moves]) ** 2)) if moves.any() else 0.0
    added = np.mean(np.sum(difference**2, -1)) / np.sum(exact.var(0, ddof=1))
    mean, expected = other.mean(0), exact.mean(0)
    cosine = mean @ expected / np.sqrt((mean @ mean) * (expected @ expected))
    return f"| {name} | {bias:.2f} | {100 * added:.1f} % | {cosine:.4f} |"


def main() -> None:
    """Measures and prints."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="of a NAtS run")
    parser.add_argument("--fractions", default="0.5,0.25,0.125,0.0625,0.03125")
    parser.add_argument("--draws", type=int, default=64, help="batches, each with noise of its own")
    arguments = parser.parse_args()
    run = load(arguments.workdir)
    fractions = [float(text) for text in arguments.fractions.split(",")]
    configs = {"exact": with_mask_gradient(run.config, "exact")}
    configs |= {f"sampled {x:g}": with_mask_gradient(run.config, "sampled", x) for x in fractions}
    configs |= {"visible": with_mask_gradient(run.config, "visible")}
    found = {name: scorer_gradients(run, config, arguments.draws) for name, config in configs.items()}
    print("| masked-out pairs | bias (1: none) | added variance | cosine of the means |\n|---|---|---|---|")
    for name, gradients in found.items():
        if name != "exact":
            print(row(name, found["exact"], gradients))


if __name__ == "__main__":
    run_command(main)
