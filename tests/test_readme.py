"""Every command that README.md shows is run by a test: here, in a scratch copy of what it speaks of, or elsewhere.

A new command needs a row in COMMANDS. A code block that shows no commands needs its first words in NO_COMMANDS.
"""

import ast
import contextlib
import gzip
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import train
from tests.conftest import TINY
from tests.test_preparation_documents import json_lines_of, write_parquet, zst

ROOT = Path(__file__).parent.parent
FENCED = re.compile(r"^```[^\n]*\n(.*?)^```", re.M | re.S)
INDENTED = re.compile(r"(?:(?<=\n\n)|^)(?: {4}.*\n(?:\n+(?= {4}))?)+", re.M)
# Between backticks in a line of prose: what begins like a command, and has arguments.
PROGRAMS = r"python3?|pip|bash|sbatch|srun|torchrun|Rscript|tail|\./\S+"
INLINE = re.compile(rf"`((?:{PROGRAMS}) [^`]+|[A-Z_]+=[^\s`]+ [^`]+)`")
NO_COMMANDS = ("4 ranks (", "output_dir/", "@software", "from pathlib")

SMALL = "--batch_size 2 --chunk_size 32 --train_steps 3 --val_every 0"


@dataclass(frozen=True)
class Here:
    """Run in the workshop: words replaced, arguments added, `absent` removed before; afterwards `makes` is there."""

    swap: dict[str, str] = field(default_factory=dict)
    add: str = ""
    absent: str = ""
    makes: str = ""
    statuses: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Elsewhere:
    """Run by a test of that name in a file; in a file that is no Python, by a line that holds these words."""

    file: str
    name: str


NEW_RUN = {"/path/to/data.txt": "data.txt", "--cuda": "--cpu", "1g": "60k", "2m": "60k"}
CLUSTERS, SLURM = "tests/test_clusters.py", "tests/test_slurm.py"
BY_HAND = Elsewhere(CLUSTERS, "test_ranks_by_hand_on_two_hosts_meet_without_a_shared_folder")
FIRST_RUN = Elsewhere(CLUSTERS, "test_train_local_trains_shows_the_ranks_and_lets_the_best_speak")

COMMANDS: dict[str, Here | Elsewhere] = {
    "./train.local.sh": Elsewhere(".ci/run", "./train.local.sh"),
    "./train.local.sh --data book.txt --max_minutes 30": FIRST_RUN,
    "RANKS=2 ./train.local.sh": FIRST_RUN,
    "./test.sh": Elsewhere(".ci/run", "./test.sh"),
    "pip install -r requirements-data.txt": Elsewhere("requirements-dev.txt", "-r requirements-data.txt"),
    # corpora
    "python prepare_data.py books/ 'papers/**/*.txt' --output corpus/library.txt": Here(
        absent="corpus", makes="corpus/library.txt"
    ),
    "python prepare_data.py crawl/*.jsonl.zst wiki.parquet --text_field text --output corpus/web.txt": Here(
        makes="corpus/web.txt"
    ),
    "python prepare_data.py --stats corpus/library.txt": Here(),
    # training
    "python train.py --data /path/to/data.txt --output output_dir --params 1g --cuda": Here(
        NEW_RUN, SMALL, absent="output_dir", makes="output_dir/best.pt"
    ),
    "python train.py --data /path/to/data.txt --output output_dir --params 2m": Here(
        NEW_RUN, SMALL, absent="output_dir", makes="output_dir/best.pt"
    ),
    "python train.py --help": Elsewhere("tests/test_train_flags.py", "test_help_lists_every_flag_with_its_default"),
    "python -m runtime.launch --ranks 4 -- train.py --data book.txt --output runs/book --params 2m": Elsewhere(
        "tests/test_population_run.py", "test_population_exchanges_and_accounts_for_it"
    ),
    "python -m runtime.launch --ranks 8 --max_restarts 5 -- train.py --data book.txt --output runs/book --params 2m":
        Elsewhere("tests/test_restart.py", "test_restart_of_a_rank_that_failed_once_ends_well"),
    # on a cluster
    "./check_gpus.sh": Elsewhere(CLUSTERS, "test_check_gpus_where_there_is_none_checks_the_rest"),
    "./train.cuda.sh --data corpus/library.txt --train_steps 200k": Elsewhere(
        CLUSTERS, "test_train_cuda_trains_with_the_settings_of_the_environment"
    ),
    "./train.frontier.sh": Elsewhere(CLUSTERS, "test_train_frontier_on_a_login_node_installs_torch_for_rocm"),
    "sbatch -A abc123 -N 8 -t 1:00:00 train.frontier.sh --data corpus/library.txt --train_steps 200k": Elsewhere(
        SLURM, "test_slurm_job_trains_each_rank_on_its_gpu_from_its_nodes_disk"
    ),
    "srun --nodes=2 --ntasks-per-node=4 --kill-on-bad-exit=0 --wait=0 python train.py --data book.txt "
    "--output runs/plain": Elsewhere(SLURM, "test_plain_srun_starts_a_population"),
    "torchrun --standalone --nproc-per-node 8 train.py --data book.txt --output runs/box": Elsewhere(
        CLUSTERS, "test_torchrun_starts_a_population"
    ),
    "export GRUBOROS_SECRET=...": BY_HAND,
    "export WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 RANK=0": BY_HAND,
    "python train.py ... --output runs/pair --no_filesystem_coordinator --gossip_host eth0 --gossip_port 29400 "
    "--gossip_peers host1:29400,host2:29400": BY_HAND,
    "./train.local.sh --resume output_dir": Elsewhere(CLUSTERS, "test_a_resumed_run_goes_on_as_it_was_started"),
    "python -m runtime.launch --ranks 4 -- train.py --resume output_dir": Elsewhere(
        "tests/test_population_run.py", "test_a_population_that_is_resumed_goes_on_with_every_rank"
    ),
    "python train.py --resume output_dir": Here(add="--train_steps 4"),
    "python train.py --resume output_dir --lr 1e-3 --train_steps 100k": Here(add="--train_steps 4"),
    "python train.py --init_from output_dir/best.pt --data other.txt --output finetuned": Here(
        add=f"{SMALL} --cpu", makes="finetuned/best.pt"
    ),
    # using what was trained
    'python generate.py --model path/to/checkpoint.pt --prompt "Your text here" --max_length 500': Here(
        add="--max_length 20"
    ),
    'echo "Once upon" | python generate.py --model checkpoint.pt --temperature 0.8 --top_k 50 --top_p 0.9': Here(
        add="--max_length 20"
    ),
    "tail -c 100000 book.txt > held_out.txt": Here(makes="held_out.txt"),
    "python generate.py --model output_dir --score held_out.txt": Here(),
    "python export.py --model output_dir --output exported/": Here(
        absent="exported", makes="exported/model.safetensors"
    ),
    "python export.py --model exported/ --output imported.pt": Here(makes="imported.pt"),
    "python export.py --average output_dir/elite_*.pt --output soup.pt --score held_out.txt": Here(makes="soup.pt"),
    "tail -f logs/train_*.log": Here({"-f": "-n1"}),
    "python watch.py output_dir": Here(add="--once"),
    "Rscript plot_train.R output_dir 1.2": Elsewhere(
        "tests/test_plot_train.py", "test_plot_train_draws_two_pages_as_png_and_pdf_without_a_display"
    ),
    # measurements
    "python -m bench": Elsewhere("tests/test_benches.py", "test_bench_measures_everything_and_writes_it_down"),
    "python -m bench training stall": Elsewhere(
        "tests/test_benches.py", "test_bench_runs_the_benchmarks_that_are_named"
    ),
    "python -m bench.evolution --data F": Elsewhere(
        "tests/test_evolution_bench.py", "test_evolution_finished_trials_are_never_run_again"
    ),
    "python -m bench.race --data F": Elsewhere(
        "tests/test_race.py", "test_race_runs_every_model_once_and_reports_each"
    ),
    "python -m bench.chaos": Elsewhere("tests/test_chaos.py", "test_chaos_measures_both_populations_alike"),
    "python -m bench.killing": Elsewhere(
        "tests/test_chaos.py", "test_killing_in_the_middle_of_phases_costs_no_whole_checkpoint"
    ),
    "python -m bench.fuzz decoders": Elsewhere("tests/test_fuzz.py", "test_decoder_fuzzing_writes_its_figures"),
    "python -m bench.fuzz strangers": Elsewhere(
        "tests/test_fuzz.py", "test_strangers_are_never_let_in_and_leave_nothing_behind"
    ),
    "python -m bench.soak": Here(  # what is measured in a few seconds may well grow: status 1
        add="--minutes 0.1 --ranks 2 --output soak.json", makes="soak.json", statuses=(0, 1)
    ),
}  # fmt: skip


def blocks(readme: str) -> list[str]:
    """The code blocks of a Markdown text, fenced or indented, without their indentation."""
    fenced = FENCED.findall(readme)
    return fenced + [textwrap.dedent(block) for block in INDENTED.findall(FENCED.sub("", readme))]


def commands(readme: str) -> list[str]:
    """Every command of a Markdown text once, on one line, without the comment behind it."""
    found = INLINE.findall(FENCED.sub("", readme))
    for block in blocks(readme):
        if not block.lstrip().startswith(NO_COMMANDS):
            lines = re.sub(r"\s*\\\n\s*", " ", block).splitlines()
            found += [re.split(r"\s+#\s", line)[0].strip() for line in lines if not line.lstrip().startswith("#")]
    return list(dict.fromkeys(filter(None, found)))


def test_readme_every_command_has_a_test():
    shown = commands((ROOT / "README.md").read_text())
    new = [command for command in shown if command not in COMMANDS]
    assert not new, f"in README.md, but without a test: give each a row in COMMANDS of {Path(__file__).name}: {new}"
    old = [command for command in COMMANDS if command not in shown]
    assert not old, f"in COMMANDS of {Path(__file__).name}, but not in README.md: {old}"


@pytest.mark.parametrize("command", [command for command, how in COMMANDS.items() if isinstance(how, Elsewhere)])
def test_readme_command_is_run_elsewhere(command):
    where = COMMANDS[command]
    source = (ROOT / where.file).read_text()
    if where.file.endswith(".py"):
        defined = [node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
        assert where.name in defined
    else:
        lines = [line for line in source.splitlines() if not line.lstrip().startswith("#")]
        assert any(where.name in line for line in lines)


def test_commands_of_a_text_are_all_found():
    text = """Prose with `python x.py --a b` and `train.py`, `RANKS=2 ./x.sh`, `--flag x`, `./x.sh 3`.

    ./first.sh    # a comment
    # a comment alone
    second a \\
        b

    output_dir/
      not commands

More:

    third 'a # b'

```bash
fourth
```
"""
    expected = ["python x.py --a b", "RANKS=2 ./x.sh", "./x.sh 3", "fourth", "./first.sh", "second a b"]
    assert commands(text.replace("    output_dir/", "Text:\n\n    output_dir/")) == [*expected, "third 'a"]


@contextlib.contextmanager
def undisturbed(folder: Path) -> Iterator[None]:
    """In that folder, on one thread, as nobody's rank; what train.py changes in this process is changed back."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    handlers, threads = {number: signal.getsignal(number) for number in numbers}, torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            ours = name.startswith(("SLURM_", "GRUBOROS_", "TORCHELASTIC_"))
            if ours or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
                patch.delenv(name)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        patch.chdir(folder)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            for number, handler in handlers.items():
                signal.signal(number, handler)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """What the README's commands speak of: texts of all kinds, a run, its checkpoint and its exported model."""
    folder = tmp_path_factory.mktemp("workshop")
    dice = random.Random(0)
    texts = [" ".join(dice.choices(["one", "two", "three"], k=200)) for _ in range(9)]
    for name in ("data.txt", "book.txt", "held_out.txt", "other.txt", "books/a.txt", "papers/deep/b.txt",
                 "corpus/library.txt"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("\x1e".join(texts))
    (folder / "books" / "c.gz").write_bytes(gzip.compress(b"c"))
    (folder / "crawl").mkdir()
    (folder / "crawl" / "a.jsonl.zst").write_bytes(zst(json_lines_of(texts)))
    write_parquet(folder / "wiki.parquet", texts)
    with undisturbed(folder):
        assert train.main([*TINY, "--data", "data.txt", "--output", "output_dir", "--train_steps", "3"]) == 0
    (folder / "path" / "to").mkdir(parents=True)
    for name in ("checkpoint.pt", "path/to/checkpoint.pt"):
        shutil.copy(folder / "output_dir" / "best.pt", folder / name)
    if not (folder / "output_dir" / "elite_01.pt").exists():
        (folder / "output_dir" / "elite_01.pt").symlink_to(os.readlink(folder / "output_dir" / "best.pt"))
    run_script(["export.py", "--model", str(folder / "checkpoint.pt"), "--output", str(folder / "exported")])
    return folder


def run_script(words: list[str]) -> int:
    """A script of the project with its arguments, as `python SCRIPT ...`, but without starting another Python."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        try:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        except SystemExit as exit_:
            return exit_.code or 0
    return 0


@pytest.mark.parametrize("command", [command for command, how in COMMANDS.items() if isinstance(how, Here)])
def test_readme_command_runs(workshop, tmp_path, command):
    how, folder = COMMANDS[command], tmp_path / "workshop"
    shutil.copytree(workshop, folder, symlinks=True)
    if how.absent:
        shutil.rmtree(folder / how.absent)
    line = " ".join([*(how.swap.get(word, word) for word in command.split(" ")), how.add]).strip()
    with undisturbed(folder):
        if re.match(r"python \w+\.py ", line) and "|" not in line:
            status = run_script(words_of(line)[1:])
        else:
            status = subprocess.run(["bash", "-o", "pipefail", "-c", in_the_project(line)]).returncode
    assert status in how.statuses
    assert not how.makes or (folder / how.makes).stat().st_size > 0


def test_readme_python_example_runs(workshop):
    (example,) = (block for block in blocks((ROOT / "README.md").read_text()) if block.startswith("from pathlib"))
    with undisturbed(workshop):
        found = {}
        exec(example, found)
    assert found["logits"].shape == (1, 7, 256) and found["info"]["step"] == 3
    logits, _ = found["model"](found["prompt"], found["state"])
    assert not logits.equal(found["logits"])


def words_of(line: str) -> list[str]:
    """The words of a command as a shell hands them over, globs expanded."""
    command = ["bash", "-c", f"printf '%s\\0' {line}"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return printed.split("\0")[:-1]


def in_the_project(line: str) -> str:
    """The scripts of a command line by their paths, for it runs in another folder."""
    return re.sub(r"(?<=python )(\w+\.py)", rf"{ROOT}/\1", line)
