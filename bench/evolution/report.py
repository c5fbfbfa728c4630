"""Results as a table, a combined file and a plot."""

import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from bench.evolution.intervals import Interval, interval, paired

PLOT = Path(__file__).with_name("plot.R")


@dataclass(frozen=True)
class Row:
    """An arm over its seeds. loss: mean over the replicas; best: of the best one; soup: of the mean of their weights;
    over_mean and over_best: the loss against the named arm's mean and best replica at the same seeds, None for want of
    common ones; bytes: over those of DDP's fp32 all-reduce.
    """

    arm: str
    ranks: int
    loss: Interval
    best: Interval
    soup: Interval
    over_mean: Interval | None
    over_best: Interval | None
    bytes: float
    cpu_s: float


def rows_of(results: Sequence[dict], against: str) -> list[Row]:
    """One row an arm, all of its options alike, and number of ranks, the lowest loss first; results: of one setting.
    against: the label of an arm of as many ranks; where there are several of it, nobody is compared with them.
    """
    groups: list[_Group] = []
    for result in results:
        of = next((group for group in groups if group.takes(result)), None)
        if of is None:
            groups.append(of := _Group(result["arm"], result["ranks"], {}, {}))
        of.options |= result["options"]
        of.seeds[result["seed"]] = result
    rows = []
    for group in groups:
        seeds = group.seeds
        loss = {seed: result["loss"] for seed, result in seeds.items()}
        references = [of.seeds for of in groups if (of.arm, of.ranks) == (against, group.ranks)]
        reference = references[0] if len(references) == 1 else {}
        namesakes = [of.options for of in groups if (of.arm, of.ranks) == (group.arm, group.ranks)]
        own = [f"{name}={value}" for name, value in sorted(group.options.items())
               if any(options.get(name) != value for options in namesakes)]  # fmt: skip
        rows.append(Row(
            f"{group.arm} ({', '.join(own)})" if own else group.arm, group.ranks,
            interval(list(loss.values())),
            interval([result["best"] for result in seeds.values()]),
            interval([result["loss_of_mean"] for result in seeds.values()]),
            paired(loss, {seed: result["loss"] for seed, result in reference.items()}),
            paired(loss, {seed: result["best"] for seed, result in reference.items()}),
            sum(result["bytes_over_ddp"] for result in seeds.values()) / len(seeds),
            sum(result["cpu_s"] for result in seeds.values()) / len(seeds),
        ))  # fmt: skip
    return sorted(rows, key=lambda row: row.loss.mean)


@dataclass
class _Group:
    """Results of one arm, with all of the options that two of them name alike."""

    arm: str
    ranks: int
    options: dict[str, str]
    seeds: dict[int, dict]

    def takes(self, result: dict) -> bool:
        """Whether it is one more of them."""
        same = (self.arm, self.ranks) == (result["arm"], result["ranks"]) and result["seed"] not in self.seeds
        return same and all(self.options.get(name, value) == value for name, value in result["options"].items())


def by_setting(results: Sequence[dict]) -> dict[str, list[dict]]:
    """Results that may be compared with each other, under a text that names what they share."""
    groups = defaultdict(list)
    for result in results:
        groups[", ".join(f"{name} {value}" for name, value in result["setting"].items())].append(result)
    return groups


def table_of(rows: Sequence[Row], against: str) -> Table:
    """For a terminal."""
    caption = (
        "nats per byte, held-out, of the averaged weights; soup: of the mean of the replicas' weights; ± half a 95 % "
        "t-interval over seeds; bytes over DDP's ring all-reduce of gradients"
    )
    table = Table(box=box.SIMPLE_HEAD, caption=caption)
    for name in ("arm", "ranks", "seeds", "loss", "best replica", "soup", f"- {against}", f"- best of {against}",
                 "bytes, fp32", "bf16", "CPU min"):  # fmt: skip
        table.add_column(name, justify="left" if name == "arm" else "right")
    for row in rows:
        table.add_row(
            row.arm, str(row.ranks), str(row.loss.count), str(row.loss), str(row.best), str(row.soup),
            _signed(row.over_mean), _signed(row.over_best), f"{row.bytes:.3g}", f"{2 * row.bytes:.3g}",
            f"{row.cpu_s / 60:.1f}",
        )  # fmt: skip
    return table


def _signed(difference: Interval | None) -> str:
    return "" if difference is None else ("" if difference.mean < 0 else "+") + str(difference)


def markdown_of(rows: Sequence[Row], against: str) -> str:
    """The same, for a document."""
    lines = [f"| arm | seeds | loss | best replica | soup | - {against} | - best of {against} | bytes, fp32 | bf16 |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        name = row.arm if row.ranks == 4 else f"{row.arm}, {row.ranks} ranks"
        lines.append(
            f"| {name} | {row.loss.count} | {row.loss} | {row.best} | {row.soup} | {_signed(row.over_mean)} | "
            f"{_signed(row.over_best)} | {row.bytes:.3g} | {2 * row.bytes:.3g} |"
        )
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> str | None:
    """Draw bytes against loss into `path` (.svg, .pdf, .png); what was wrong, None if nothing was."""
    if shutil.which("Rscript") is None:
        return "no plot: Rscript is not installed"
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.tsv"
        lines = ["arm\tbytes\tloss\thalf\tseeds"]
        lines += [f"{r.arm}\t{r.bytes}\t{r.loss.mean}\t{r.loss.half}\t{r.loss.count}" for r in rows]
        data.write_text("\n".join(lines) + "\n")
        done = subprocess.run(["Rscript", str(PLOT), str(data), str(path)], capture_output=True, text=True)
    return f"no plot: {done.stderr.strip().splitlines()[-1]}" if done.returncode else None
