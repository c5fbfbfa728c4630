"""Flags in either spelling, and mistakes as one line."""

import pytest

from runtime.arguments import ArgumentParser, normalise_flags, run_main
from runtime.errors import UserError


def test_normalise_flags_changes_only_names():
    given = ["--top-k", "a-b", "--out-file=x-y/--z", "-n", "-1", "--", "--left-alone"]
    assert normalise_flags(given) == ["--top_k", "a-b", "--out_file=x-y/--z", "-n", "-1", "--", "--left-alone"]
    assert given[0] == "--top-k"


def test_normalise_flags_leaves_values_that_only_look_like_flags():
    """As argparse does, to whom a word with a space in it is a value."""
    given = ["--prompt", "--dry-run means", "--a-b=--c-d e", "--1-2", "--", "--x-y"]
    assert normalise_flags(given) == ["--prompt", "--dry-run means", "--a_b=--c-d e", "--1-2", "--", "--x-y"]


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("HIP out of memory. Tried to allocate\nmore")], ids=["python", "torch"]
)
def test_run_main_says_in_one_line_that_memory_is_out(capsys, error):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as exit_:
        run_main(main)
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        exit_.value.code == 1
        and "out" in line
        and line.endswith(": ask for less at once, or end what else takes memory")
    )


def test_parser_raises_one_line_and_takes_no_abbreviation():
    parser = ArgumentParser()
    parser.add_argument("--value", type=int)
    for argv in (["--value", "x"], ["--val", "1"]):
        with pytest.raises(UserError, match="see --help"):
            parser.parse_args(argv)


def test_run_main_reports_a_user_error(capsys):
    def main(argv):
        raise UserError("expected a, got b: do c")

    with pytest.raises(SystemExit) as exit_:
        run_main(main)
    assert exit_.value.code == 2 and capsys.readouterr().err == "error: expected a, got b: do c\n"


def test_run_main_ends_quietly_on_ctrl_c(capsys):
    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit_:
        run_main(main)
    assert exit_.value.code == 130 and capsys.readouterr().err == ""


@pytest.mark.parametrize("status, code", [(None, 0), (0, 0), (130, 130)])
def test_run_main_exits_with_the_status(status, code):
    with pytest.raises(SystemExit) as exit_:
        run_main(lambda argv: status)
    assert exit_.value.code == code
