import dataclasses
import re

import pytest

from runtime.arguments import parse_size
from runtime.errors import UserError
from training.option_values import parse_delimiter
from training.options import DEVICES, Options, parse_arguments, resolve_options


@pytest.mark.parametrize(
    ("text", "size"),
    [("512", 512), ("2k", 2048), ("1.5K", 1536), ("15m", 15 * 1024**2), ("1g", 1024**3), ("7G", 7 * 1024**3)],
)
def test_parse_size_reads_suffixes_as_powers_of_1024(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "k", "12x", "-3", "0", "1.3", "nan", "inf", "1e400", "0.0001k"])
def test_parse_size_refuses_what_is_no_size(text):
    with pytest.raises(UserError, match="expected a size"):
        parse_size(text)


@pytest.mark.parametrize(("text", "value"), [("1e", 0x1E), ("0x0a", 10), ("none", None), ("FF", 255)])
def test_parse_delimiter_reads_hexadecimal(text, value):
    assert parse_delimiter(text) == value


@pytest.mark.parametrize("text", ["100", "xy", "", "-1"])
def test_parse_delimiter_refuses_what_is_no_byte(text):
    with pytest.raises(UserError, match="hexadecimal"):
        parse_delimiter(text)


def test_parse_arguments_returns_only_what_was_given_in_either_spelling():
    given = parse_arguments(
        ["--batch-size", "4", "--chunk_size=2k", "--no-schedulefree", "--no-filesystem-coordinator"], ""
    )
    assert given == {"batch_size": 4, "chunk_size": 2048, "schedulefree": False, "filesystem_coordinator": False}


def test_every_switch_of_a_resumed_run_can_be_turned_either_way(capsys):
    switches = {
        option.name
        for group in dataclasses.fields(Options)
        for option in dataclasses.fields(group.default_factory)
        if isinstance(option.default, bool) and option.name not in DEVICES
    }
    assert {"compile", "checkpoint_layers", "schedulefree"} <= switches
    for name in switches:
        assert parse_arguments([f"--{name}", f"--no_{name}"], "") == {name: False}
    stored = resolve_options({"compile": True}).to_dict()
    assert not resolve_options(parse_arguments(["--no_compile"], ""), stored).compute.compile
    with pytest.raises(SystemExit):
        parse_arguments(["--help"], "")
    assert re.findall(r"--no_compile|--no_checkpoint_layers", capsys.readouterr().out) == ["--no_compile"]


@pytest.mark.parametrize(
    "argv",
    [
        ["--lr", "0"],
        ["--lr", "fast"],
        ["--batch_size", "0"],
        ["--gossip_recombination_alpha", "1.5"],
        ["--gossip_mixing_rate", "-0.1"],
        ["--params", "12q"],
        ["--params", "1e16"],
        ["--gossip_merge_method", "marriage"],
        ["--dropout", "1"],
        ["--val_fraction", "1"],
        ["--sf_beta", "1"],
        ["--max_minutes", "nan"],
        ["--batch_size", "1000000000000000000"],
        ["--lane_groups", "1000000000000000000"],
        ["--chunk_size", "3g"],
        ["--gossip_heartbeat", "1e10"],
        ["--probe_every", "9" * 400],
        ["--lrr", "1"],
        ["--batch", "2"],  # no abbreviations: a later flag must not change what an old command means
    ],
    ids=" ".join,
)
def test_parse_arguments_refuses_bad_values_in_one_line(argv):
    with pytest.raises(UserError) as caught:
        parse_arguments(argv, "")
    assert "\n" not in str(caught.value)


def test_parse_arguments_says_what_a_number_may_be():
    for flag, text in (("--lr", "inf"), ("--max_minutes", "-1")):
        with pytest.raises(UserError, match=f"expected a number above 0, and finite, got {text}: choose another"):
            parse_arguments([flag, text], "")
    with pytest.raises(UserError, match=r"expected a number in \[0, 1\), got 1: choose another"):
        parse_arguments(["--dropout", "1"], "")


def test_every_option_has_help_and_every_group_a_title():
    for group in dataclasses.fields(Options):
        assert group.default_factory.__doc__
        for option in dataclasses.fields(group.default_factory):
            assert option.metadata["help"], option.name


def test_resolve_options_puts_flags_over_stored_over_defaults():
    stored = {"optimizer": {"lr": 0.5, "weight_decay": 0.25}, "data": {"batch_size": 3}}
    options = resolve_options({"lr": 0.125}, stored)
    assert (options.optimizer.lr, options.optimizer.weight_decay, options.data.batch_size) == (0.125, 0.25, 3)
    assert options.data.chunk_size == Options().data.chunk_size


def test_resolve_options_round_trips_through_its_dict():
    options = resolve_options({"dim": 64, "data": ["a"], "document_delimiter": None})
    assert resolve_options({}, options.to_dict()) == options


@pytest.mark.parametrize(
    "flag", ["dim", "depth", "params", "seed", "sf_beta", "expansion_factor", "gossip_fitness", "probe_budget"]
)
def test_resolve_options_refuses_to_change_what_is_fixed_beside_resume(flag):
    stored = resolve_options({flag: 0.5 if flag == "sf_beta" else 2}).to_dict()
    assert resolve_options({flag: 0.5 if flag == "sf_beta" else 2}, stored)  # the same value is no change
    with pytest.raises(UserError, match=f"--{flag}"):
        resolve_options({flag: 0.75 if flag == "sf_beta" else 4}, stored)


@pytest.mark.parametrize("flag", ["lr", "weight_decay", "batch_size", "chunk_size", "train_steps", "save_every"])
def test_resolve_options_lets_rates_sizes_and_budgets_change_beside_resume(flag):
    stored = resolve_options({flag: 2}).to_dict()
    options = resolve_options({flag: 4}, stored).to_dict()
    assert 4 in [value for group in options.values() for name, value in group.items() if name == flag]


def test_max_minutes_are_of_one_launch_and_train_steps_of_the_run_until_they_are_lifted():
    stored = resolve_options({"train_steps": 2, "max_minutes": 3.0}).to_dict()
    again = resolve_options({}, stored).run
    assert (again.train_steps, again.max_minutes) == (2, None)
    lifted = resolve_options(parse_arguments(["--train_steps", "none", "--max_minutes", "4"], ""), stored).run
    assert (lifted.train_steps, lifted.max_minutes) == (None, 4.0)


@pytest.mark.parametrize("flag", ["--data", "--val_data", "--evolve", "--gossip_peers"])
def test_a_list_grows_by_each_time_that_its_flag_is_given(flag):
    given = parse_arguments([flag, "/a", "/b", flag, "/c"], "")
    assert given == {flag[2:]: ["/a", "/b", "/c"]}
    assert parse_arguments([flag, "/d"], "") == {flag[2:]: ["/d"]}  # and not by those of another command line
