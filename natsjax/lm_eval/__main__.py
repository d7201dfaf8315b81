"""The command ``python -m natsjax.lm_eval``: tasks of lm-evaluation-harness on a run."""

import importlib.util
import json
import os
from collections.abc import Sequence

from natsjax.errors import UserError
from natsjax.generate.flags import policy_forms
from natsjax.runtime.files import write_text_file
from natsjax.runtime.flags import Parser, run_command
from natsjax.runtime.log import logger


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command.

    Raises:
      UserError: a flag does not fit, a task does not exist, or the harness is not installed.
    """
    parser = Parser(
        prog="python -m natsjax.lm_eval",
        description="Runs tasks of EleutherAI's lm-evaluation-harness (pip install 'natsjax[lm_eval]') on a run, under "
        "any policy of the KV cache and any budget, and prints their table. --make_tasks writes four tasks from the "
        "run's own held-out text, for which nothing is downloaded.",
    )
    add = parser.add_argument
    add("--workdir", required=True, metavar="DIR", help="the run, as given to train.py, or an export")
    parser.add_checkpoint()
    add("--tasks", metavar="NAME,…", help="the harness's names of tasks")
    add("--include_path", metavar="DIR", help="a folder with further tasks, YAML files")
    add("--make_tasks", metavar="DIR", help="write the offline tasks there; without --tasks they are run")
    add("--num_examples", type=int, default=100, metavar="N", help="of each offline task (default: 100)")
    add("--num_fewshot", type=int, metavar="N", help="examples before each question (default: as the task says)")
    add("--limit", type=int, metavar="N", help="documents of each task, at most")
    add("--batch_size", type=int, default=8, metavar="N", help="requests at a time (default: 8)")
    add("--max_length", type=int, metavar="N", help="tokens that are read at once (default: data.context_length)")
    bos = parser.add_mutually_exclusive_group()
    begins = "(default: as transformers does with the exported model)"
    bos.add_argument("--bos", action="store_true", help=f"begin every text with BOS {begins}")
    bos.add_argument("--no_bos", action="store_true", help="do not begin every text with BOS")
    add(
        "--policy",
        metavar="NAME",
        help=f"which keys live (default: nats, or full for a dense run): {', '.join(policy_forms())}",
    )
    add("--role_bias", type=float, metavar="F", help="of a nats run: above 0 keeps more keys, below fewer (default: 0)")
    add("--kv_budget", type=float, metavar="F", help="KV fraction: finds the role bias, or the policy's numbers")
    add("--max_kv", type=int, metavar="N", help="the most keys of a head, hard")
    add("--prepared_dir", metavar="DIR", help="where the prepared corpus is now (default: where natsjax finds it)")
    add("--output", metavar="FILE", help="also write the harness's results, JSON")
    flags = parser.parse_args(argv)
    if flags.tasks is None and flags.make_tasks is None:
        raise UserError("there is no task: give --tasks=NAME,…, or --make_tasks=DIR for those of the run's own text.")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is not installed; pip install 'natsjax[lm_eval]'.")
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap would fork, which JAX's threads do not survive
    import lm_eval  # here: --help needs nothing slow
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    from natsjax.lm_eval.adapter import NatsjaxLM
    from natsjax.lm_eval.offline_tasks import write_tasks

    model = NatsjaxLM(
        flags.workdir,
        checkpoint=flags.checkpoint,
        policy=flags.policy,
        role_bias=flags.role_bias,
        kv_budget=flags.kv_budget,
        max_kv=flags.max_kv,
        batch_size=flags.batch_size,
        max_length=flags.max_length,
        add_bos_token=True if flags.bos else False if flags.no_bos else None,
        prepared_dir=flags.prepared_dir,
    )
    logger.info(f"policy: {model.decoder.policy}")
    names, paths = [] if flags.tasks is None else flags.tasks.split(","), [flags.include_path]
    if flags.make_tasks is not None:
        made = write_tasks(model.run, flags.make_tasks, num_examples=flags.num_examples)
        names, paths = names or made, [*paths, flags.make_tasks]
    folders = [path for path in paths if path is not None]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folders)  # the harness's own tasks are thousands of files
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise UserError(
            f"--tasks={flags.tasks}: the harness has no task {', '.join(unknown)}; `lm-eval ls tasks` lists them."
        )
    results = lm_eval.simple_evaluate(
        model, tasks=names, task_manager=manager, num_fewshot=flags.num_fewshot, limit=flags.limit
    )
    print(make_table(results))
    if flags.output is not None:
        write_text_file(flags.output, json.dumps(results, indent=2, default=str) + "\n")


if __name__ == "__main__":
    run_command(main)
