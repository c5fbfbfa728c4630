"""The two faces that strangers see, attacked: the decoders with mutated input, a rank in training with hostile calls.

    python -m bench.fuzz decoders --inputs 1000000
    python -m bench.fuzz strangers --connections 10000

Only loopback is called.
"""

import argparse
import asyncio
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import fuzz_decoders, fuzz_strangers
from bench.evidence import RESULTS, write_result
from bench.population import make_corpus
from runtime.arguments import ArgumentParser, normalise_flags, run_main
from runtime.stderr import say

COSTS = {"training_cpu": "training thread, CPU", "process_cpu": "whole process, CPU", "seconds": "on the clock"}


def main(arguments: list[str]) -> int:
    """The command line: 1 if a promise was broken."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    decoders = parts.add_parser("decoders", help="mutated input for every decoder")
    decoders.add_argument("--inputs", type=int, default=1_000_000, help="distinct ones to feed (default: %(default)s)")
    decoders.add_argument("--seed", type=int, default=0, help="of the first round (default: %(default)s)")
    strangers = parts.add_parser("strangers", help="hostile calls to a rank in training")
    strangers.add_argument("--connections", type=int, default=10_000, help="in all (default: %(default)s)")
    strangers.add_argument("--rate", type=float, default=50, help="connections a second (default: %(default)s)")
    strangers.add_argument("--seconds", type=float, default=20, help="of a phase (default: %(default)s)")
    strangers.add_argument("--data", type=Path, help="bytes to train on (default: the Python standard library, 4 MiB)")
    for name, part in (("decoders", decoders), ("strangers", strangers)):
        output = RESULTS / f"fuzz_{name}.json"
        part.add_argument("--output", type=Path, default=output, help="figures (default: %(default)s)")
    options = parser.parse_args(normalise_flags(arguments))
    broken, figures = (fuzz_the_decoders if options.part == "decoders" else call_a_rank)(options)
    if figures:
        write_result(options.output, "fuzz", figures | {"hypothesis": version("hypothesis")})
    return int(broken)


def fuzz_the_decoders(options: argparse.Namespace) -> tuple[bool, dict[str, Any]]:
    """Whether a decoder broke its promise, and the figures if none did."""
    try:
        figures = fuzz_decoders.fuzz(options.inputs, options.seed)
    except fuzz_decoders.Broken as error:
        say(f"error: {error}")
        return True, {}
    print(decoders_table(figures))
    return False, figures


def call_a_rank(options: argparse.Namespace) -> tuple[bool, dict[str, Any]]:
    """Whether a stranger was let in, and the figures."""
    data = (options.data or make_corpus()).resolve()
    with tempfile.TemporaryDirectory(prefix="fuzz_") as folder:
        work = fuzz_strangers.measure(Path(folder), data, options.connections, options.rate, options.seconds)
        figures = asyncio.run(work)
    print(strangers_table(figures))
    return any(figures["accepted"].values()), figures


def decoders_table(figures: dict[str, Any]) -> str:
    """The figures as lines for a person."""
    lines = [
        f"{figures['inputs']:,} inputs in {figures['seconds']:,} s, {figures['inputs_per_second']:,} a second; "
        f"{figures['accepted']:,} accepted; at most {figures['largest_read']:,} bytes asked of the wire at once",
        f"{'decoder':16s}{'inputs':>9s}{'accepted':>9s}{'peak, bytes':>13s}  refused",
    ]
    for name, part in figures["decoders"].items():
        refused = ", ".join(f"{count:,} {fault}" for fault, count in part["faults"].items())
        counts = f"{part['inputs']:9,}{part['accepted']:9,}{part['largest_peak']:13,}"
        lines.append(f"{name:16s}{counts}  {refused}")
    return "\n".join(lines)


def strangers_table(figures: dict[str, Any]) -> str:
    """The figures as lines for a person."""
    kinds = (
        f"{kind} {counts['connections']} ({counts['closed_by_the_rank']} closed by the rank)"
        for kind, counts in figures["by_kind"].items()
    )
    lines = [
        f"{figures['connections']:,} connections, {figures['connections_per_second']:g} a second, in phases of "
        f"{figures['phase_seconds']:g} s; {figures['unreached']} did not connect",
        ", ".join(kinds),
        *(f"accepted: {count} {what}" for what, count in figures["accepted"].items()),
        f"{figures['failures_counted']:,} failures counted, {figures['lines_logged']} lines logged",
        f"{'ms per step':28s}{'calm':>9s}{'decoy':>9s}{'hostile':>9s}   hostile to calm, to decoy (quartiles)",
    ]
    for name, cost in figures["costs"].items():
        medians = "".join(f"{cost[mode]:9.3f}" for mode in ("calm", "decoy", "hostile"))
        ratios = (cost[f"hostile_to_{mode}"] for mode in ("calm", "decoy"))
        shown = ", ".join("{:.3f} ({:.3f}-{:.3f})".format(ratio["median"], *ratio["quartiles"]) for ratio in ratios)
        lines.append(f"{COSTS[name]:28s}{medians}   {shown}")
    lines.append(f"{'':28s}{'before':>9s}{'peak':>9s}{'after':>9s}")
    for name, scale, title in (
        ("rss", 1e6, "resident MB"),
        ("descriptors", 1, "descriptors"),
        ("threads", 1, "threads"),
    ):
        shown = "".join(f"{figures['resources'][when][name] / scale:9.1f}" for when in ("before", "peak", "after"))
        lines.append(f"{title:28s}{shown}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
