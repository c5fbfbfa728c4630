import json
import math
import os
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from tests.synthetic_run import ASYMPTOTE, HELD_OUT, write_run

SCRIPT = Path(__file__).parent.parent / "plot_train.R"
PACKAGES = ("ggplot2", "minpack.lm")


@pytest.fixture(scope="module", autouse=True)
def real_r():
    if shutil.which("Rscript") is None:
        pytest.skip("Rscript is missing: install r-base-core, r-cran-ggplot2 and r-cran-minpack.lm")
    for name in PACKAGES:
        if subprocess.run(["Rscript", "-e", f"find.package('{name}')"], capture_output=True).returncode:
            pytest.skip(f"the R package {name} is missing: install r-cran-{name}")


def plot(*arguments, cwd=None):
    environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
    command = ["Rscript", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def drawn(done):
    """What was printed, of a plot that went well and without a warning."""
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("four") / "runs" / "four", ranks=4, mixes=40, method="average")


@pytest.fixture(scope="module")
def output(run):
    return drawn(plot(run, 1.6))


def png_size(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    return struct.unpack(">II", content[16:24])


def asymptote(text):
    return float(re.search(r"better by AIC: .*asymptote (\S+)", text)[1])


def test_plot_train_draws_two_pages_as_png_and_pdf_without_a_display(run, output):
    for page in ("loss", "lineage"):
        path = run / f"plot_train_{page}.png"
        assert png_size(path) == (1800, 1200) and path.stat().st_size > 20_000
        assert str(path) in output
    pdf = (run / "plot_train.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and len(re.findall(rb"/Type /Page\b", pdf)) == 2


def test_plot_train_fits_the_law_that_the_losses_follow(tmp_path):
    output = drawn(plot(write_run(tmp_path / "runs" / "lawful", ranks=2, steps=6000, mixes=4, spread=0.0), 1.55))
    assert re.search(r"^  power law .*AIC", output, re.M) and re.search(r"^  exponential .*AIC", output, re.M)
    assert "best held-out loss from step" in output and "better by AIC: power law" in output
    assert asymptote(output) == pytest.approx((ASYMPTOTE + HELD_OUT) / math.log(2), abs=0.05)
    steps = int(re.search(r"target 1.55 at step ([\d,]+)", output)[1].replace(",", ""))
    assert 7000 < steps < 13000  # the law that was written down comes to it at 9,560


def test_plot_train_counts_an_average_of_two_as_one_mix(output):
    assert "4 ranks, 3,000 steps, 40 mixes" in output


def descent(*ends, alpha=0.3):
    """Each founder's share of the population after mixes (receiver, sender, exchange, mean, whole) of three ranks."""
    columns = [f"c({', '.join(map(str, column))})" for column in zip(*ends, strict=True)]
    table = "data.frame(hours = 1, receiver = {}, sender = {}, exchange = {}, mean = {} == 1, whole = {} == 1)"
    table = table.format(*columns)
    source = f"source('plotting/summary.R'); cat(descent(0:2, {table}, {alpha}, 2)$means)"
    done = subprocess.run(["Rscript", "-e", source], cwd=SCRIPT.parent, capture_output=True, text=True)
    return [float(word) for word in drawn(done).split()]


def test_descent_is_not_changed_by_means_in_which_both_ends_give_as_much_as_they_take():
    means = (0, 1, 7, 1, 0), (1, 0, 7, 1, 0), (2, 1, 8, 1, 0), (1, 2, 8, 1, 0)
    assert descent(*means) == pytest.approx([1 / 3] * 3)
    assert descent((0, 1, 7, 0, 0)) == pytest.approx([0.7 / 3, 1.3 / 3, 1 / 3])
    assert descent((0, 1, 7, 0, 1)) == pytest.approx([0, 2 / 3, 1 / 3])  # who adopts keeps nothing of its own


def test_plot_train_tells_how_to_call_it():
    assert "Rscript plot_train.R RUN_DIR|FILE.tsv [target]" in drawn(plot("--help"))


def test_plot_train_says_of_a_target_below_the_asymptote_that_it_is(run):
    single = run / "metrics" / "rank_0002.tsv"
    printed = drawn(plot(single, 0.5))
    assert "target 0.5 is below the asymptote" in printed and ": 1 rank, " in printed
    assert png_size(single.with_name("rank_0002_loss.png")) == (1800, 1200)


def test_plot_train_shows_512_ranks(tmp_path):
    run = write_run(tmp_path / "runs" / "many", ranks=512, steps=500, mixes=1500)
    assert "512 ranks, 500 steps, 1,500 mixes" in drawn(plot(run))


def test_plot_train_finds_the_files_of_a_run_whatever_its_name(tmp_path):
    run = write_run(tmp_path / "runs" / "rate[0.1]*", ranks=2, steps=400, mixes=6)
    assert "2 ranks, 400 steps, 6 mixes" in drawn(plot(run))
    started = tmp_path / 'l\\ä"uft, hier}'
    started.mkdir()
    (tmp_path / "runs" / "gossip_logs").rename(started / "gossip_logs")
    stored = json.loads((run / "config.json").read_text()) | {"working_directory": str(started)}
    (run / "config.json").write_text(json.dumps(stored, ensure_ascii=False))
    assert "2 ranks, 400 steps, 6 mixes" in drawn(plot(cwd=tmp_path))


def test_plot_train_finds_the_newest_run(tmp_path):
    for age, name in ((0, "new"), (3600, "old")):
        for path in (write_run(tmp_path / "runs" / name, ranks=1, steps=200) / "metrics").iterdir():
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
    shutil.rmtree(tmp_path / "runs" / "gossip_logs")
    said = drawn(plot(cwd=tmp_path))
    sought = [tmp_path / folder / "gossip_logs" / "new_rank_0000.tsv" for folder in ("runs", ".")]
    assert said.startswith("new: ") and f"no mixes known: there is no {sought[0]} nor {sought[1]}\n" in said


def test_plot_train_reads_columns_by_name_and_whole_rows_only(tmp_path):
    """A run that is still being written, by a version with more columns, in another order, that was resumed."""
    run = write_run(tmp_path / "runs" / "torn", ranks=2, steps=400)
    expected = drawn(plot(run)).splitlines()[:4]
    path = run / "metrics" / "rank_0000.tsv"
    header, *rows = path.read_text().splitlines()
    again = [re.sub(r"^0\t\d+\t(\S+)\t\S+\t\S+", rf"0\t{step}\t\1\t0.001\t0.001", rows[20]) for step in (220, 500)]
    assert "\t500\t" in again[1]
    table = ["\t".join(reversed([*line.split("\t"), extra])) for line, extra in zip(
        [header, *rows[:21], *again, *rows[21:]], ["probe_loss", *["NA"] * 100], strict=False)]  # fmt: skip
    table.insert(5, "cut in the mid")
    path.write_text("\n".join(table) + "\n0.1\tNA\t12")
    assert drawn(plot(run)).splitlines()[:4] == expected


def test_plot_train_counts_no_merge_that_was_undone_or_failed(tmp_path):
    run = write_run(tmp_path / "runs" / "undone", ranks=2, steps=200, mixes=6)
    logs = [tmp_path / "runs" / "gossip_logs" / f"undone_rank_{rank:04d}.tsv" for rank in (0, 1)]
    texts = [log.read_text() for log in logs]
    assert sum(text.count("\tmerged\t") for text in texts) == 6
    receiver = 0 if "\tmerged\t" in texts[0] else 1
    logs[receiver].write_text(texts[receiver].replace("\tmerged\t", "\trolled_back\t", 1))
    assert "2 ranks, 200 steps, 5 mixes" in drawn(plot(run))
    logs[receiver].unlink()  # then the sender's word has to do
    assert f"2 ranks, 200 steps, {texts[1 - receiver].count(chr(9) + 'sent' + chr(9))} mixes" in drawn(plot(run))


def test_plot_train_counts_the_merges_of_steps_that_were_taken_again_once(tmp_path):
    run = write_run(tmp_path / "runs" / "again", ranks=2, steps=400, mixes=8)
    logs = (tmp_path / "runs" / "gossip_logs").glob("again_rank_*.tsv")
    log = max(logs, key=lambda path: path.read_text().count("\tmerged\t"))  # of the rank that lost most
    lines = log.read_text().splitlines()
    merged = [line for line in lines if "\tmerged\t" in line]
    assert len(merged) > 1
    log.write_text("\n".join([*lines, merged[0]]) + "\n\0\0")  # killed, and back before all of them; a lost write
    assert f"2 ranks, 400 steps, {8 - len(merged) + 2} mixes" in drawn(plot(run))


def test_plot_train_says_a_mistake_in_one_line(run, tmp_path):
    (tmp_path / "empty").mkdir()
    other, fresh, young = (tmp_path / name for name in ("other.tsv", "fresh.tsv", "young.tsv"))
    header, row = (run / "metrics" / "rank_0001.tsv").read_text().splitlines()[:2]
    other.write_text("a\tb\n1\t2\n")
    fresh.write_text(f"{header}\n")
    young.write_text(f"{header}\n{row}\n")
    for arguments, words in (
        ((tmp_path / "absent",), "does not exist"),
        ((tmp_path / "empty",), "without metrics/"),
        ((), "expected a run under runs/"),
        ((run, "low"), "expected a target loss above 0"),
        ((run, 1, 2), "got 3 arguments"),
        ((other,), "expected the column rank"),
        ((fresh,), "got none yet"),
        ((young,), "expected two rows"),
    ):
        done = plot(*arguments, cwd=tmp_path)
        assert done.returncode == 2 and done.stdout == "", arguments
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and words in done.stderr, done.stderr
