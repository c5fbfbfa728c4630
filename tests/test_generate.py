"""generate.py as a person runs it: real processes, real pipes."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import generate
from mingru import MinLM, ModelConfig
from mingru.sampling import SamplingOptions
from training import scoring
from training.checkpoint import checkpoint_name, load_for_use, save_checkpoint

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ModelConfig(dim=16, depth=2, conv_kernel_size=3)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run directory whose best.pt and latest.pt hold different weights."""
    folder = tmp_path_factory.mktemp("run")
    for step, link in ((1, "best.pt"), (2, "latest.pt")):
        torch.manual_seed(step)
        path = save_checkpoint(folder, 0, step, 1.0 / step, CONFIG, sharp_model().state_dict(), {})
        assert path.name == checkpoint_name(0, step, 1.0 / step)
        (folder / link).symlink_to(path.name)
    return folder


def sharp_model(config=CONFIG):
    """Fresh weights with logits far enough apart that the model prefers something."""
    model = MinLM(config).eval()
    with torch.no_grad():
        model.to_logits.weight.mul_(10)
    return model


def command(*arguments):
    return [sys.executable, str(ROOT / "generate.py"), "--cpu", *map(str, arguments)]


def run(*arguments, stdin=b""):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command(*arguments), input=stdin, capture_output=True, env=environment, timeout=60)


def main(*arguments):
    """In this process: the same path, without starting another Python."""
    return generate.main(["--cpu", *map(str, arguments)])


def test_generate_writes_exactly_the_bytes(run_dir):
    prompt = b"\x00\xffhi\n"
    done = run("--model", run_dir, "--max-length", 30, "--seed", 5, stdin=prompt)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(prompt) and len(done.stdout) == len(prompt) + 30
    assert b"best.pt" in done.stderr and b"seed 5" in done.stderr
    again = run("--model", run_dir, "--max_length=30", "--seed", 5, stdin=prompt)
    assert again.stdout == done.stdout


def test_generate_streams_each_byte(monkeypatch):
    """Before the model is asked for the next byte, the reader already has the last."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    arrived = []

    def continuation():
        for byte in (b"1", b"2", b"3"):
            arrived.append(os.read(reader, 100))
            yield byte

    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert generate.write_to_stdout(b"ab", continuation(), 1) == 0
    assert arrived == [b"ab", b"1", b"2"] and os.read(reader, 100) == b"3"
    os.close(reader)


@pytest.mark.parametrize(
    "flags", [["--prompt", "ab", "--max_length", "9"], ["--score", str(ROOT / "README.md")]], ids=["text", "score"]
)
def test_generate_says_in_one_line_that_its_output_cannot_be_written(run_dir, flags):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command("--model", run_dir, *flags), stdout=full, stderr=subprocess.PIPE, timeout=60)
    *_, last = done.stderr.decode().splitlines()
    assert last == "error: expected to write to standard output, got No space left on device: send it elsewhere"
    assert done.returncode == 2 and b"Traceback" not in done.stderr and b"Exception" not in done.stderr


def test_generate_ends_quietly_when_its_reader_goes(run_dir):
    """It would write for hours, but stops at the closed pipe."""
    process = subprocess.Popen(
        command("--model", run_dir, "--prompt", "ab", "--max_length", 10**9),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert len(process.stdout.read(10)) == 10
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=30) == 141
    assert b"Traceback" not in errors and b"Exception" not in errors


def test_generate_interrupted_ends_with_what_it_has(run_dir):
    process = subprocess.Popen(
        command("--model", run_dir, "--prompt", "ab", "--max_length", 10**9, "--num_samples", 2),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    head = process.stdout.read(6)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and b"Traceback" not in errors
    assert (head + rest).startswith(b"ab") and b"\x1eab" in rest


def test_generate_samples_follow_one_another(run_dir, capfdbinary):
    main("--model", run_dir, "--prompt", "ab", "--max_length", 20, "--num_samples", 3, "--seed", 1)
    out = capfdbinary.readouterr().out
    assert len(out) == 3 * 22 + 2
    samples = [out[start : start + 22] for start in (0, 23, 46)]
    assert out[22:23] == out[45:46] == b"\x1e"
    assert all(sample.startswith(b"ab") for sample in samples) and len(set(samples)) == 3
    main("--model", run_dir, "--prompt", "ab", "--max_length", 20, "--num_samples", 3, "--seed", 2)
    assert capfdbinary.readouterr().out != out


def test_generate_output_file_holds_what_stdout_would(run_dir, tmp_path, capfdbinary):
    flags = ["--model", run_dir, "--prompt", "ab", "--max_length", 20, "--seed", 1]
    main(*flags)
    expected = capfdbinary.readouterr().out
    main(*flags, "--output_file", tmp_path / "one.txt")
    assert (tmp_path / "one.txt").read_bytes() == expected
    main(*flags, "--num_samples", 2)
    both = capfdbinary.readouterr().out
    main(*flags, "--num_samples", 2, "--output_file", tmp_path / "two.txt")
    assert capfdbinary.readouterr().out == b""
    assert (tmp_path / "two_1.txt").read_bytes() + b"\x1e" + (tmp_path / "two_2.txt").read_bytes() == both


def test_generate_prompt_file_equals_prompt(run_dir, tmp_path, capfdbinary):
    (tmp_path / "prompt").write_text("naïve")
    main("--model", run_dir, "--prompt", "naïve", "--max_length", 8, "--seed", 1)
    expected = capfdbinary.readouterr().out
    main("--model", run_dir, "--prompt_file", tmp_path / "prompt", "--max_length", 8, "--seed", 1)
    assert capfdbinary.readouterr().out == expected


def test_generate_reads_foreign_weights(tmp_path, capfdbinary):
    from minGRU_pytorch.minLM import minLM

    torch.manual_seed(0)
    torch.save(minLM(num_tokens=256, dim=16, depth=1).state_dict(), tmp_path / "foreign.pt")
    assert main("--model", tmp_path / "foreign.pt", "--prompt", "x", "--max_length", 5, "--dtype", "bf16") == 0
    assert len(capfdbinary.readouterr().out) == 6


@pytest.mark.parametrize("chunk", [1, 2, 7, 2048])
def test_decode_is_greedy_over_the_whole_text(chunk, monkeypatch):
    """Prefill in any chunks and byte-by-byte decoding agree with one pass over everything, delimiters included."""
    torch.manual_seed(1)
    model, prompt = sharp_model(), b"some\x1ething \x1e\x1eto go on from"
    monkeypatch.setattr(generate, "CHUNK", chunk)
    logits, state = generate.prefill(model, prompt, 0x1E)
    greedy = SamplingOptions(temperature=0)
    text = prompt + b"".join(generate.decode(model, logits, state, 40, greedy, torch.Generator(), 0x1E))
    ids = torch.tensor([list(text)])
    with torch.no_grad():
        expected = model(ids, None, ids == 0x1E)[0].argmax(-1)[0]
    assert text[len(prompt) :] == bytes(expected[len(prompt) - 1 : -1].tolist())


def test_decode_starts_a_document_after_the_delimiter():
    """A lane that writes the delimiter forgets what came before it, and its neighbour does not."""
    torch.manual_seed(1)
    model = sharp_model()
    logits = torch.full((2, 256), -1e9)
    logits[0, 0x1E] = logits[1, 0x41] = 0.0
    _, state = generate.prefill(model, b"a long past", 0x1E)
    greedy = SamplingOptions(temperature=0)
    first, second = generate.decode(model, logits, state.lanes([0, 0]), 2, greedy, torch.Generator(), 0x1E)
    assert first == b"\x1eA"
    with torch.no_grad():
        fresh = model(torch.tensor([[0x1E]]))[0].argmax().item()
        going_on = model(torch.tensor([[0x41]]), state)[0].argmax().item()
    assert list(second) == [fresh, going_on]


def test_score_is_the_mean_loss_in_bits(run_dir, tmp_path, monkeypatch, capfd):
    torch.manual_seed(1)  # best.pt's
    model, text = sharp_model(), b"one document\x1eand another one, longer\x1e\x1e!"
    path = tmp_path / "text"
    path.write_bytes(text)
    ids = torch.tensor([list(text)])
    with torch.no_grad():
        logits, _ = model(ids[:, :-1], None, ids[:, :-1] == 0x1E)
    expected = F.cross_entropy(logits[0], ids[0, 1:]).item() / math.log(2)
    monkeypatch.setattr(scoring, "CHUNK", 5)
    assert main("--model", run_dir, "--score", path) == 0
    assert capfd.readouterr().out == f"{expected:.4f} bits per byte\n"
    assert scoring.score(model, path, None) != pytest.approx(expected, rel=1e-6)


def test_score_ends_documents_as_the_model_was_trained(tmp_path, capfd):
    text = tmp_path / "text"
    text.write_bytes(b"one document\nand another one, longer\n\n!\x1e?")
    said = {}
    for delimiter in (0x0A, None, 0x1E):
        torch.manual_seed(1)
        folder = tmp_path / str(delimiter)
        folder.mkdir()
        path = save_checkpoint(folder, 0, 1, 1.0, CONFIG, sharp_model().state_dict(), {}, delimiter)
        main("--model", path, "--score", text)
        said[delimiter] = capfd.readouterr().out
        model, _ = load_for_use(path, torch.device("cpu"))
        assert said[delimiter] == f"{scoring.score(model, text, delimiter):.4f} bits per byte\n"
        main("--model", path, "--score", text, "--document_delimiter", "none")  # said otherwise
        assert capfd.readouterr().out == f"{scoring.score(model, text, None):.4f} bits per byte\n"
    assert len(set(said.values())) == 3


def test_generate_starts_documents_as_the_model_was_trained(tmp_path, capfdbinary):
    spoken = []
    for delimiter, flags in ((0x0A, []), (0x1E, ["--document_delimiter", "0a"]), (0x1E, [])):
        torch.manual_seed(1)
        path = save_checkpoint(tmp_path, 0, 1, 1.0, CONFIG, sharp_model().state_dict(), {}, delimiter)
        main("--model", path, "--prompt", "a long past\n", "--max_length", 20, "--seed", 1, *flags)
        spoken.append(capfdbinary.readouterr().out)
    assert spoken[0] == spoken[1] != spoken[2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt", ""], "expected a prompt of at least one byte"),
        ([], "expected a prompt of at least one byte"),
        (["--prompt_file", "no/such/file"], "expected a readable prompt file"),
        (["--prompt", "x", "--prompt_file", "y"], "expected one prompt"),
        (["--prompt", "x", "--top_p", "0"], "expected for top_p a number in (0, 1]"),
        (["--prompt", "x", "--top_p", "1.1"], "expected for top_p a number in (0, 1]"),
        (["--prompt", "x", "--temperature", "-1"], "expected for temperature"),
        (["--prompt", "x", "--max_length", "-1"], "--max_length: expected a whole number"),
        (["--prompt", "x", "--seed", "9" * 30], "--seed: expected a whole number from 0 to 18446744073709551615"),
        (["--prompt", "x", "--cuda"], "expected one device"),
        (["--prompt", "x", "--output_file", "no/such/folder/file"], "expected to write no/such/folder/file"),
        (["--prompt", "x", "--output_file", ".", "--num_samples", "2"], "expected the name of a file"),
        (["--prompt", "x", "--model", "no/such/model"], "no such file"),
        (["--prompt", "x", "--model", __file__], "expected a whole checkpoint"),
        (["--prompt", "x", "--bogus"], "unrecognized arguments: --bogus"),
        (["--score", "no/such/file"], "expected a readable file of 2 bytes or more"),
        (["--score", __file__, "--prompt", "x"], "expected --score alone"),
        (["--score", os.devnull], "expected a readable file of 2 bytes or more"),
        (["--prompt", "x", "--model", "x" * 300], "File name too long"),
    ],
    ids=lambda value: " ".join(map(str, value)) or "empty stdin" if isinstance(value, list) else "",
)
def test_generate_refuses_bad_input(run_dir, arguments, message, monkeypatch, capsys):
    """One line on standard error and status 2; through run_main, as the script does."""
    monkeypatch.setattr(sys, "argv", ["generate.py", "--cpu", "--model", str(run_dir), *arguments])
    with open(os.devnull) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(SystemExit) as exit_:
            generate.run_main(generate.main)
    output = capsys.readouterr()
    errors = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert exit_.value.code == 2 and len(errors) == 1 and message in errors[0] and output.out == ""


def test_generate_says_what_is_wrong_with_the_scan_and_not_with_the_file_that_it_scores(run_dir, monkeypatch):
    monkeypatch.setenv("GRUBOROS_SCAN", "bogus")
    with pytest.raises(generate.UserError, match=r"^expected GRUBOROS_SCAN"):
        main("--model", run_dir, "--score", __file__)


def test_generate_says_in_one_line_that_so_many_samples_do_not_fit(run_dir):
    done = run("--model", run_dir, "--prompt", "x", "--num_samples", 2**63 - 1)
    *_, last = done.stderr.splitlines()
    assert done.returncode == 1 and last.startswith(b"error: ") and last.endswith(b"what else takes memory")
    assert b"Traceback" not in done.stderr and done.stdout == b""


def test_generate_refuses_broken_weights(tmp_path):
    model = sharp_model()
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    path = save_checkpoint(tmp_path, 0, 1, 1.0, CONFIG, model.state_dict(), {})
    with pytest.raises(generate.UserError, match="finite logits"):
        main("--model", path, "--prompt", "x")
    (tmp_path / "text").write_text("some text")
    with pytest.raises(generate.UserError, match="finite losses, got nan in the first 9 bytes"):
        main("--model", path, "--score", tmp_path / "text")
    # What breaks only after the prompt, as a narrow --dtype may.
    state, greedy = model.initial_state(1), SamplingOptions(temperature=0)
    continuation = generate.decode(model, torch.zeros(1, 256), state, 9, greedy, torch.Generator(), None)
    with torch.inference_mode(), pytest.raises(generate.UserError, match="finite logits"):
        list(continuation)


def test_generate_needs_a_prompt_from_a_terminal(run_dir):
    controller, terminal = os.openpty()
    done = subprocess.run(command("--model", run_dir), stdin=terminal, capture_output=True, timeout=60)
    os.close(controller)
    os.close(terminal)
    assert done.returncode == 2 and b"expected a prompt, got none" in done.stderr
