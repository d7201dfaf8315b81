"""A plan, and the program that it was read off."""

import pytest

from natsjax.plan import train_step


def plan_and_program(config, topology, plan=train_step.plan_step):
    """``(plan, compiled)`` of ``plan``, compiled once."""
    programs = []
    compile_program = train_step.compile_program

    def remember(lowered):
        result = compile_program(lowered)
        programs.append(result[0])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_step, "compile_program", remember)
        made = plan(config, topology)
    return made, programs[0]
