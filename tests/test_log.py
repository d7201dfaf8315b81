"""Lines of the logger are printed by the first process as they are, and a file gets them with their times."""

import logging
import re

import pytest

from natsjax.errors import UserError
from natsjax.runtime import distributed
from natsjax.runtime.log import EVERY_PROCESS, also_to, logger


@pytest.mark.parametrize("is_first", [True, False])
def test_lines_are_printed_by_the_first_process_unless_each_speaks_for_itself(monkeypatch, capsys, is_first):
    monkeypatch.setattr(distributed, "is_main", lambda: is_first)
    logger.info("100 % of one")
    logging.getLogger("natsjax.data.somewhere").warning("two of %d", 2)
    logger.warning("stuck", extra=EVERY_PROCESS)
    assert capsys.readouterr().err.splitlines() == [*["100 % of one", "two of 2"] * is_first, "stuck"]


def _logs_and_raises(path, error):
    with also_to(path):
        logger.info("a line, köln")
        raise error


def test_a_file_gets_them_with_their_times_and_what_ended_the_run(tmp_path, capsys):
    path = tmp_path / "log.txt"
    endings = [UserError("it is wrong."), KeyboardInterrupt("SIGINT"), ZeroDivisionError("by zero")]
    for error in endings:
        with pytest.raises(type(error)):
            _logs_and_raises(path, error)
    logger.info("after it")
    assert capsys.readouterr().err.splitlines() == ["a line, köln"] * 3 + ["after it"]
    text = path.read_text()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ a line, köln$", text.splitlines()[i]) for i in (0, 2, 4))
    assert "Z error: it is wrong.\n" in text
    assert "Z interrupted\n" in text
    assert text.endswith("ZeroDivisionError: by zero\n")
    assert "after it" not in text


def test_a_file_that_is_full_costs_one_line_and_one_that_is_a_folder_is_a_mistake(tmp_path, capsys):
    with also_to("/dev/full"):
        logger.info("one")
        logger.info("two")
    assert capsys.readouterr().err.splitlines() == [
        "one",
        "/dev/full gets no more lines: No space left on device",
        "two",
    ]
    with pytest.raises(UserError, match="cannot be written: Is a directory"), also_to(tmp_path):
        pass


def test_file_names_that_are_not_utf8_reach_every_handler_as_text(caplog):
    logger.info("read %s", "caf\udce9")
    assert caplog.messages == [r"read caf\udce9"]
