import fcntl
import os
import re
import signal
import subprocess
import sys

import pytest

from bench.injection import Injection
from runtime.supervise import REPLACED, Lives, RestartPolicy
from tests.launch_helpers import ROOT, expect_lines, launcher

# A rank that says who it is in which of its lives, and then does what the words of its argument say.
LIVES = """
import os, signal, sys
signal.alarm(20)  # no orphan outlives a failed test
stops = [signal.SIGINT, signal.SIGTERM]
signal.pthread_sigmask(signal.SIG_BLOCK, [*stops, signal.SIGUSR1])
say = lambda line: os.write(1, f"{line}\\n".encode())  # whole lines: rank 0 shares its pipe with the launcher
rank, life = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
say(f"{rank} lives {life} as {os.getpid()}")
exec(sys.argv[1])
"""
QUICKLY = ["--restart_seconds", "0.01"]


@pytest.fixture
def launch(tmp_path):
    """Starts the launcher on ranks whose lives do what the words say; restarts are quick but for other options."""
    with launcher(tmp_path) as start:
        yield lambda words, options=QUICKLY, **extra: start(LIVES, words, options=options, **extra)


def next_lives(process, *expected):
    """Read the next lines of standard output, one for each expected (rank, life); returns their process ids by rank."""
    lines = [process.stdout.readline() for _ in expected]
    found = [re.fullmatch(r"(?:\[rank \d\] )?(\d) lives (\d+) as (\d+)\n", line) for line in lines]
    assert all(found), f"expected lives {expected}, got {lines}"
    assert sorted((int(match[1]), int(match[2])) for match in found) == sorted(expected)
    return {int(match[1]): int(match[3]) for match in found}


def lives_said(output):
    return [tuple(map(int, found)) for found in re.findall(r"(\d) lives (\d+) as", output)]


@pytest.fixture
def clock():
    """A clock that a test moves: clock.now."""

    class Clock:
        now = 1000.0

        def __call__(self):
            return self.now

    return Clock()


def pause(lives, clock, status=1, lived=0.0):
    """Let the process begin, and end after so many seconds: the seconds until the next, None if there is to be none."""
    lives.begin()
    clock.now += lived
    lives.end(status)
    return None if lives.due is None else lives.due - clock.now


def test_lives_pauses_double_up_to_a_minute_and_then_the_rank_is_given_up(clock):
    lives = Lives(RestartPolicy(max_restarts=8), clock, dice=lambda: 0.0)
    pauses = [pause(lives, clock) for _ in range(9)]
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, None]
    assert lives.restarts == 8


def test_lives_pauses_are_spread_over_their_latter_half(clock):
    assert [pause(Lives(RestartPolicy(), clock, dice=lambda d=d: d), clock) for d in (0.0, 0.5, 1.0)] == [
        1.0,
        0.75,
        0.5,
    ]


def test_lives_a_healthy_one_begins_a_new_row_and_the_count_of_restarts_goes_on(clock):
    lives = Lives(RestartPolicy(max_restarts=2, healthy_seconds=600.0), clock, dice=lambda: 0.0)
    lived = [0.0, 599.9, 600.0, 0.0, 0.0]
    assert [pause(lives, clock, lived=seconds) for seconds in lived] == [1.0, 2.0, 1.0, 2.0, None]
    assert lives.restarts == 4


@pytest.mark.parametrize(
    "status, again, later",
    [(0, False, False), (1, True, True), (2, False, True), (REPLACED, False, False), (137, True, True)],
)
def test_lives_begin_again_where_that_may_help(clock, status, again, later):
    """later: of a rank that was restarted before, whose command line is no mistake."""
    assert (pause(Lives(RestartPolicy(), clock), clock, status) is not None) == again
    lives = Lives(RestartPolicy(), clock)
    assert pause(lives, clock, 137) is not None
    assert (pause(lives, clock, status) is not None) == later


def test_lives_asked_to_stop_never_begin_again(clock):
    running, waiting = Lives(RestartPolicy(), clock), Lives(RestartPolicy(), clock)
    assert pause(waiting, clock) is not None
    running.begin()
    assert (running.stop(), waiting.stop(), waiting.stop()) == (False, True, False)
    assert running.end(137) == "" and running.due is None and waiting.due is None


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.injects(Injection.RESTART)
def test_restart_of_a_rank_that_failed_once_ends_well(launch, rank):
    process = launch(f"os._exit(7 if (rank, life) == ({rank}, 0) else 0)")
    output, errors = process.communicate()
    assert sorted(lives_said(output)) == sorted([(0, 0), (1, 0), (rank, 1)])
    assert re.fullmatch(rf"rank {rank} exited with status 7: restart 1 of at most 5 in 0\.0 s\n", errors)
    assert process.returncode == 0


@pytest.mark.injects(Injection.KILL, Injection.RESTART)
def test_restart_of_a_killed_rank_alone_and_signals_reach_its_new_process(launch):
    process = launch("while signal.sigwait([*stops, signal.SIGUSR1]) == signal.SIGUSR1: say('SIGUSR1')")
    first = next_lives(process, (0, 0), (1, 0))
    process.send_signal(signal.SIGUSR1)  # asks for a save, not for an end
    expect_lines(process, "SIGUSR1", "[rank 1] SIGUSR1")
    os.kill(first[1], signal.SIGKILL)
    assert process.stderr.readline() == "rank 1 was killed by SIGKILL: restart 1 of at most 5 in 0.0 s\n"
    next_lives(process, (1, 1))
    process.send_signal(signal.SIGUSR1)
    expect_lines(process, "SIGUSR1", "[rank 1] SIGUSR1")
    process.send_signal(signal.SIGTERM)
    assert process.communicate() == ("", "")
    assert process.returncode == 0


def test_restart_and_signals_do_not_wait_for_a_reader_that_stops_reading(launch):
    reader, writer = os.pipe()
    filled = os.write(writer, b"x" * fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096))
    process = launch("life == 0 and os._exit(7); signal.sigwait(stops); say('asked')", ranks=1, stderr=writer)
    os.close(writer)
    next_lives(process, (0, 0), (0, 1))
    process.send_signal(signal.SIGTERM)
    expect_lines(process, "asked")
    with open(reader) as errors:
        assert errors.read(filled) == "x" * filled
        assert errors.read() == "rank 0 exited with status 7: restart 1 of at most 5 in 0.0 s\n"
    assert process.wait() == 0


@pytest.mark.injects(Injection.CRASH_LOOP)
def test_restart_gives_up_a_crash_loop_and_the_others_go_on(launch):
    process = launch("rank == 1 and os._exit(7); signal.sigwait(stops); os._exit(3)", [*QUICKLY, "--max_restarts", "2"])
    said = [process.stderr.readline() for _ in range(3)]
    assert said == [
        "rank 1 exited with status 7: restart 1 of at most 2 in 0.0 s\n",
        "rank 1 exited with status 7: restart 2 of at most 2 in 0.0 s\n",
        "rank 1 exited with status 7: given up, restart 2 of at most 2 did not help\n",
    ]
    process.send_signal(signal.SIGINT)  # ends rank 0, which waits for it
    output, errors = process.communicate()
    assert sorted(lives_said(output)) == [(0, 0), (1, 0), (1, 1), (1, 2)]
    assert (process.returncode, errors) == (7, "rank 0 exited with status 3\n")  # that of the first to be lost


@pytest.mark.injects(Injection.CRASH_LOOP)
def test_restart_never_gives_up_a_rank_that_lives_healthily_in_between(launch):
    options = [*QUICKLY, "--max_restarts", "1", "--healthy_seconds", "0"]
    process = launch("os._exit(0 if life == 3 else 7)", options, ranks=1)
    output, errors = process.communicate()
    assert lives_said(output) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert (process.returncode, len(errors.splitlines())) == (0, 3)


def test_restart_is_not_for_a_users_mistake(launch):
    process = launch("os._exit(2 if rank == 0 else 0)")
    output, errors = process.communicate()
    assert sorted(lives_said(output)) == [(0, 0), (1, 0)]
    assert errors == "rank 0 exited with status 2: not restarted, since that would not help\n"
    assert process.returncode == 2


def test_restart_of_a_rank_whose_script_is_away_for_a_while_ends_well(launch, tmp_path):
    """Python's own status for a script that it cannot open is that of a user's mistake."""
    words = "life == 0 and (os.rename(sys.argv[0], sys.argv[0] + '.away') or os._exit(7))"
    process = launch(words, ["--restart_seconds", "0.5"], ranks=1)
    said = [process.stderr.readline() for _ in range(3)]
    assert re.match(r"rank 0 exited with status 7: restart 1 of at most 5 in", said[0])
    assert "can't open file" in said[1]
    assert re.match(r"rank 0 exited with status 2: restart 2 of at most 5 in", said[2])
    os.rename(tmp_path / "script.py.away", tmp_path / "script.py")
    output, _ = process.communicate()
    assert lives_said(output)[0] == (0, 0) and lives_said(output)[-1][1] >= 2
    assert process.returncode == 0


def test_restart_of_a_rank_that_is_never_found_again_ends_with_its_status(launch):
    process = launch("os.remove(sys.argv[0]); os._exit(7)", [*QUICKLY, "--max_restarts", "2"], ranks=1)
    _, errors = process.communicate()
    assert errors.splitlines()[-1] == "rank 0 exited with status 2: given up, restart 2 of at most 2 did not help"
    assert "not restarted" not in errors and process.returncode == 2


def test_restart_is_not_for_a_rank_whose_place_was_taken(launch):
    process = launch(f"rank == 1 and os._exit({REPLACED} if life else 7)")
    output, errors = process.communicate()
    assert sorted(lives_said(output)) == [(0, 0), (1, 0), (1, 1)]
    assert (
        errors.splitlines()[1] == f"rank 1 exited with status {REPLACED}: not restarted, another process is this rank"
    )
    assert process.returncode == REPLACED


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda stop: stop.name)
def test_restart_is_cancelled_by_a_stop_and_delays_no_signal(launch, stop):
    words = "rank == 1 and os._exit(7); signal.sigwait([signal.SIGUSR1]); say('SIGUSR1'); signal.sigwait(stops)"
    process = launch(words, ["--restart_seconds", "60"])
    next_lives(process, (0, 0), (1, 0))
    assert re.match(
        r"rank 1 exited with status 7: restart 1 of at most 5 in [345]\d\.\d s\n", process.stderr.readline()
    )
    process.send_signal(signal.SIGUSR1)
    expect_lines(process, "SIGUSR1")
    process.send_signal(stop)
    output, errors = process.communicate(timeout=20)
    assert (output, errors) == ("", "rank 1: restart cancelled, asked to stop\n")
    assert process.returncode == 7


@pytest.mark.parametrize("how", ["os._exit(7)", "os.kill(os.getpid(), signal.SIGKILL)"], ids=["fails", "killed"])
def test_restart_is_not_for_a_rank_that_dies_when_asked_to_stop(launch, how):
    process = launch(f"signal.sigwait(stops); rank == 1 and {how}")
    next_lives(process, (0, 0), (1, 0))
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()
    assert output == "" and "restart" not in errors
    assert process.returncode == (7 if "exit" in how else 128 + 9)


def test_restart_of_a_rank_that_could_not_be_started():
    source = """
from runtime.launch import Launcher
from runtime.ranks import Identity
from runtime.supervise import RestartPolicy
policy = RestartPolicy(max_restarts=1, restart_seconds=0.01)
raise SystemExit(Launcher(["/absent/python"], [Identity(0, 0, 1, 1, "launcher")], 1, policy).run())
"""
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 126
    first, second = done.stderr.splitlines()
    assert "could not be started" in first and "restart 1 of at most 1" in first and "given up" in second
