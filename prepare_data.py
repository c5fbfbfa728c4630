"""Join any files into one byte corpus for train.py, with byte 0x1e between documents.

    python prepare_data.py books/ 'notes/**/*.txt' --output corpus/mine.txt
    python prepare_data.py crawl/*.jsonl.zst wiki.parquet --text_field content --output corpus/web.txt
    python prepare_data.py --python_stdlib --output corpus/python_stdlib.txt
    python prepare_data.py --stats corpus/mine.txt

A file is one document, but each line of a .jsonl file and each row of a .parquet file is one: the text in --text_field.
.gz and .zst are decompressed. The files come in a random order of the seed's choosing, so that the end of the corpus,
which train.py holds out, is like the rest; documents of one file keep theirs. A byte 0x1e, in a file or in a text, is
what it means here, a boundary between documents, so it stays (corpora can be joined); documents without bytes are left
out. All is streamed, so memory does not grow with the files. After a kill the same command goes on where it was.
"""

import runtime.packages  # noqa: F401  # isort: skip

import argparse
import random
import sys
import sysconfig
from pathlib import Path

from preparation.joining import join
from preparation.partial import Tally, partial_paths
from preparation.statistics import measure, report
from runtime.arguments import ArgumentParser, normalise_flags, parse_size, run_main
from runtime.errors import UserError
from runtime.stdout import writing_to_stdout
from training.data import find_files


def main(arguments: list[str]) -> None:
    """The command line."""
    options = _parser().parse_args(normalise_flags(arguments))
    if options.stats is not None:
        if options.inputs or options.output is not None or options.python_stdlib:
            raise UserError("expected --stats alone, got inputs or --output beside it: keep one or the other")
        statistics = report(measure(options.stats))
        with writing_to_stdout():
            print(statistics)
        return
    if options.output is None:
        raise UserError("expected --output, the corpus to write, or --stats, got neither: see --help")
    if not options.inputs and not options.python_stdlib:
        raise UserError("expected files, folders or globs to join, got none: name some, or use --python_stdlib")
    max_bytes = None if options.max_bytes is None else parse_size(options.max_bytes)
    files = find_files(options.inputs) + (python_stdlib_files() if options.python_stdlib else [])
    own = {path.resolve() for path in partial_paths(options.output)}  # where the output is inside of an input folder
    files = [path for path in dict.fromkeys(files) if path not in own]
    random.Random(options.seed).shuffle(files)
    try:
        tally = join(files, options.output, options.text_field, max_bytes)
    except OSError as error:
        raise UserError(
            f"expected to write {options.output}, got {error.strerror}: mend it and give the same command again, or "
            "choose another --output"
        ) from None
    print(f"{options.output}: {summary(tally)}", file=sys.stderr)


def summary(tally: Tally) -> str:
    """One line about a corpus that was written."""
    words = [f"{tally.documents:,} documents", f"{tally.written:,} bytes"]
    if tally.delimiters:
        words.append(f"{tally.delimiters:,} bytes 0x1e found inside and kept as boundaries")
    if tally.empty:
        words.append(f"{tally.empty:,} documents without bytes left out")
    return ", ".join(words)


def python_stdlib_files() -> list[Path]:
    """The .py files of the running Python's standard library, its tests too, sorted; nothing that pip installed.

    A few of its tests are written in odd encodings on purpose; as bytes that are no UTF-8 they are left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = (path.relative_to(root) for path in root.rglob("*.py") if path.is_file())
    ours = (path for path in paths if not {"site-packages", "dist-packages"} & set(path.parts))
    return [root / path for path in sorted(ours) if _is_utf8(root / path)]


def _is_utf8(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="files, folders (all files in them) or quoted globs")
    add("--output", type=Path, metavar="FILE", help="the corpus to write; it must not exist")
    add("--text_field", default="text", metavar="NAME", help="where .jsonl and .parquet have it (default: text)")
    add("--python_stdlib", action="store_true", help="add the source files of the running Python's standard library")
    add("--max_bytes", metavar="SIZE", help="cut the corpus after so many bytes (10m; default: all)")
    add("--seed", type=int, default=0, metavar="N", help="of the order of the files (default: 0)")
    add("--stats", type=Path, metavar="CORPUS", help="instead of all that: print what a corpus is like")
    return parser


if __name__ == "__main__":
    run_main(main)
