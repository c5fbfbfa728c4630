import os
import pty
import signal
import subprocess
import sys

import pytest

from runtime.launch import default_threads, exit_status, rank_environment, usable_cores
from runtime.ranks import Identity, identity_from_environment
from runtime.relay import RepeatFilter
from tests.launch_helpers import LISTENER, ROOT, expect_lines, launcher


@pytest.fixture
def launch(tmp_path):
    """Starts the launcher on a script of the test's own, without restarts: those have test_restart.py."""
    with launcher(tmp_path) as start:
        yield lambda *words, options=(), **extra: start(*words, options=["--max_restarts", "0", *options], **extra)


WHO = """
import os, sys
names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"]
words = [*(os.environ[name] for name in names), *sys.argv[1:], f"{os.getsid(0) == os.getpid()}\\n"]
os.write(1, " ".join(words).encode())
"""


def test_launch_tells_each_rank_who_it_is(launch):
    process = launch(WHO, "--flag", "a b", "--", ranks=3, options=["--threads-per-rank", "5"])
    output, errors = process.communicate()
    assert sorted(output.splitlines()) == [
        "0 0 3 3 5 --flag a b -- True",
        "[rank 1] 1 1 3 3 5 --flag a b -- True",
        "[rank 2] 2 2 3 3 5 --flag a b -- True",
    ]
    assert (process.returncode, errors) == (0, "")


def test_launch_takes_the_cores_of_several_flags(launch):
    first, *_, last = sorted(os.sched_getaffinity(0))
    source = "import os; os.write(1, f'{sorted(os.sched_getaffinity(0))}\\n'.encode())"
    process = launch(source, options=["--cores", str(first), "--cores", str(last)])
    expect_lines(process, f"[{first}]", f"[rank 1] [{last}]")


def test_default_threads_shares_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))
    monkeypatch.setattr("runtime.launch.usable_cores", lambda: 16)
    assert [default_threads(ranks) for ranks in (1, 4, 5, 64)] == [16, 4, 3, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert default_threads(4) == 7


def test_rank_environment_is_understood_by_ranks():
    identity = Identity(2, 1, 4, 2, "environment")
    assert identity_from_environment(rank_environment(identity, 1)) == identity
    again = Identity(2, 1, 4, 2, "environment", restarts=3, launcher=4711, began=12345.678)
    assert identity_from_environment(rank_environment(again, 1)) == again


@pytest.mark.parametrize("sent, heard", [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGHUP", "SIGTERM")])
def test_launch_passes_a_signal_once_to_each_rank_and_a_second_again(launch, sent, heard):
    process = launch(LISTENER, 2)
    expect_lines(process, "ready", "[rank 1] ready")
    process.send_signal(signal.Signals[sent])
    expect_lines(process, heard, f"[rank 1] {heard}")
    process.send_signal(signal.Signals[sent])
    expect_lines(process, *(prefix + line for prefix in ("", "[rank 1] ") for line in (heard, "pending 0")))
    assert process.wait() == 0


def test_launch_passes_sigusr1_and_goes_on(launch):
    process = launch(LISTENER, 2)
    expect_lines(process, "ready", "[rank 1] ready")
    process.send_signal(signal.SIGUSR1)
    expect_lines(process, "SIGUSR1", "[rank 1] SIGUSR1")
    process.send_signal(signal.SIGINT)
    expect_lines(process, "SIGINT", "[rank 1] SIGINT", "pending 0", "[rank 1] pending 0")
    assert process.wait() == 0


def test_launch_ctrl_c_in_a_terminal_reaches_each_rank_once(tmp_path):
    terminal, side = pty.openpty()
    take_terminal = (
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    )
    (tmp_path / "listener.py").write_text(LISTENER)
    command = [sys.executable, "-m", "runtime.launch", "--ranks", "2", "--", str(tmp_path / "listener.py"), "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", take_terminal, *command],
        cwd=ROOT,
        text=True,
        stdin=side,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    with process:
        expect_lines(process, "ready", "[rank 1] ready")
        os.write(terminal, b"\x03")
        expect_lines(process, "SIGINT", "[rank 1] SIGINT", "pending 0", "[rank 1] pending 0")
    assert process.returncode == 0
    os.close(terminal)
    os.close(side)


def test_launch_rank_0_keeps_the_terminal_without_its_input(launch):
    terminal, side = pty.openpty()
    source = "import os, sys; os.write(2, f'{sys.stdin.read()!r} {os.isatty(2)} {os.isatty(0)}\\n'.encode())"
    process = launch(source, stderr=side, stdin=side)
    assert process.wait() == 0
    os.close(side)
    assert sorted(os.read(terminal, 4096).decode().split("\r\n")) == ["", "'' True False", "[rank 1] '' False False"]
    os.close(terminal)


def test_launch_one_death_does_not_end_the_others(launch):
    source = """
import os, signal
signal.alarm(20)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
os.write(1, b"ready\\n")
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
signal.sigwait([signal.SIGTERM])
os.write(1, b"done\\n")
"""
    process = launch(source, ranks=3)
    expect_lines(process, "ready", "[rank 1] ready", "[rank 2] ready")
    assert process.stderr.readline() == "rank 1 was killed by SIGKILL\n"
    process.send_signal(signal.SIGTERM)
    expect_lines(process, "done", "[rank 2] done")
    assert process.wait() == 128 + 9
    assert process.stderr.read() == ""


@pytest.mark.parametrize(
    "failures, status", [([], 0), ([3, 137], 3), ([137, 3], 137), ([3, 2], 2)], ids=["none", "3", "killed", "usage"]
)
def test_exit_status_is_of_the_first_to_fail_unless_a_user_erred(failures, status):
    assert exit_status(failures) == status


def test_launch_says_how_each_rank_failed_and_exits_with_2_if_any_did(launch):
    process = launch("import os; os._exit([0, 7, 2][int(os.environ['RANK'])])", ranks=3)
    _, errors = process.communicate()
    assert sorted(errors.splitlines()) == [
        "rank 1 exited with status 7",
        "rank 2 exited with status 2: not restarted, since that would not help",
    ]
    assert process.returncode == 2


def test_launch_tells_of_a_mistake_of_all_ranks_in_one_line_and_of_that_of_one_at_once(launch):
    _, errors = launch("import os; os._exit(2)", ranks=3).communicate()
    assert errors == "ranks 0, 1, 2 exited with status 2: not restarted, since that would not help\n"
    process = launch("import os, signal; signal.pause() if os.environ['RANK'] == '0' else os._exit(2)", ranks=2)
    assert process.stderr.readline() == "rank 1 exited with status 2: not restarted, since that would not help\n"
    process.send_signal(signal.SIGTERM)
    process.communicate()


def test_launch_shows_an_error_of_many_ranks_once(launch):
    source = """
import os
if os.environ["RANK"] != "0":
    os.write(2, f"expected a file, got none\\nmine is {os.environ['RANK']}\\n".encode())
"""
    _, errors = launch(source, ranks=4).communicate()
    lines = sorted(line.split("] ") for line in errors.splitlines())
    assert [said for _, said in lines].count("expected a file, got none") == 1
    assert [(tag, said) for tag, said in lines if "mine" in said] == [(f"[rank {r}", f"mine is {r}") for r in (1, 2, 3)]


def test_repeat_filter_lets_a_rank_repeat_itself():
    news = RepeatFilter()
    said = [(1, b"a"), (2, b"a"), (1, b"a"), (2, b"a"), (2, b"a"), (1, b"b"), (1, b"a")]
    assert [news.is_news(rank, line) for rank, line in said] == [True, False, True, False, True, True, False]


def test_launch_relays_endless_lines_and_bytes_that_are_no_text(launch, tmp_path):
    source = "import os; os.environ['RANK'] == '1' and os.write(2, b'\\xff' * 200_000 + b'\\nend')"
    with open(tmp_path / "errors", "wb") as errors:
        assert launch(source, stderr=errors).wait() == 0
    content = (tmp_path / "errors").read_bytes()
    assert content.count(b"\xff") >= 65536 and content.endswith(b"[rank 1] end\n")


def test_launch_drains_ranks_when_its_own_reader_is_gone(launch):
    source = """
import os
if os.environ["RANK"] == "1":
    for line in range(50_000):
        os.write(2, b"%d\\n" % line)
"""
    reader, writer = os.pipe()
    process = launch(source, stderr=writer)
    os.close(reader)
    os.close(writer)
    assert process.wait() == 0


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--ranks", "many", "--", __file__], "--ranks: expected a whole number, got 'many'"),
        (["--ranks", "0", "--", __file__], "--ranks: expected a whole number of at least 1, got 0"),
        (["--ranks", "2", "--threads_per_rank", "0", "--", __file__], "_rank: expected a whole number of at least 1"),
        (["--ranks", "2", "--max_restarts", "-1", "--", __file__], "_restarts: expected a whole number of at least 0"),
        (["--ranks", "2", "--restart_seconds", "nan", "--", __file__], "--restart_seconds of at least 0, got nan"),
        (["--ranks", "2", "--", "absent.py"], "script after --, got 'absent.py'"),
        (["--ranks", "2"], "script after --, got nothing"),
        (["--ranks", "2", "train.py", "--lr", "1"], "expected -- before the script and its flags, got none"),
        (["--ranks", "1", "--cores", "60000", "--", __file__], "this process may use, "),
        (["--ranks", "1", "--cores", "a", "--", __file__], "--cores: expected a list of cores such as 0-3,8, got 'a'"),
        (["--ranks", "2", "--follow", "1", "--", __file__], "--follow with the process that started this one, got 1"),
        ([], "--ranks --task is required"),
    ],
    ids=[
        "words",
        "no-ranks",
        "no-threads",
        "no-restarts",
        "no-pause",
        "no-file",
        "no-script",
        "no-dashes",
        "no-cores",
        "letters",
        "stranger",
        "nothing",
    ],
)
def test_launch_refuses_bad_input_with_status_2(arguments, said):
    command = [sys.executable, "-m", "runtime.launch", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and said in done.stderr


STARTER = """
import os, subprocess, sys
subprocess.run([sys.executable, "-m", "runtime.launch", "--ranks", "2", "--follow", str(os.getpid()), *sys.argv[1:]])
"""


def test_launch_stops_its_ranks_when_the_process_that_it_follows_is_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(LISTENER)
    command = [sys.executable, "-c", STARTER, "--", str(script), "1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as starter:
        expect_lines(starter, "ready", "[rank 1] ready")
        starter.kill()
        expect_lines(starter, "SIGTERM", "[rank 1] SIGTERM", "pending 0", "[rank 1] pending 0")
        assert starter.stdout.read() == ""  # the launcher has ended, and with it the last who could write


# A rank that says when it was asked to leave, and leaves at the third time.
LEAVER = """
import os, time
from runtime.signals import SignalFlags
flags = SignalFlags().install()
os.write(1, b"%d\\n" % os.getpid())
for _ in range(3):
    while not flags.stop:
        time.sleep(0.01)  # not signal.pause(): a signal before it would be waited for in vain
    flags.stop = False
    os.write(1, b"asked\\n")
"""


def test_launch_of_a_task_passes_on_what_does_no_harm_if_it_came_already(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(LEAVER)
    told = {**os.environ, "PYTHONPATH": str(ROOT), "SLURM_PROCID": "5", "SLURM_NPROCS": "8", "SLURM_LOCALID": "1"}
    command = [sys.executable, "-m", "runtime.launch", "--task", "--", str(script)]
    with subprocess.Popen(command, cwd=ROOT, env=told, stdout=subprocess.PIPE, text=True) as process:
        try:
            rank = int(process.stdout.readline())
            os.kill(rank, signal.SIGTERM)  # as Slurm may send it to every process of a task
            expect_lines(process, "asked")
            for number in (signal.SIGTERM, signal.SIGUSR2):
                process.send_signal(number)
                expect_lines(process, "asked")
            assert process.wait(20) == 0
        finally:
            process.kill()
