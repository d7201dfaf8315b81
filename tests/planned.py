"""A plan, and the program that it was read off."""

import pytest

from natsjax import planning


def plan_and_program(config, topology):
    """``(plan, compiled)`` of ``planning.plan_step``, compiled once."""
    programs = []
    compile_step = planning._compile

    def remember(trainer):
        result = compile_step(trainer)
        programs.append(result[0])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "_compile", remember)
        made = planning.plan_step(config, topology)
    return made, programs[0]
