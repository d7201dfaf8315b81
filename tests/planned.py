"""A plan, and the program that it was read off."""

import dataclasses

import pytest

from natsjax.plan import topologies, train_step
from natsjax.runtime import chips

CHIP = dataclasses.replace(chips.CHIPS["v5e"], name="test")


def here():
    """This machine's device, as if it were a chip that is known."""
    return dataclasses.replace(topologies.topology("local"), chip=CHIP)


def check_total(memory, compiled):
    found = compiled.memory_analysis()
    whole = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    assert memory.total == whole + found.temp_size_in_bytes + found.generated_code_size_in_bytes
    assert min(memory) >= 0


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
