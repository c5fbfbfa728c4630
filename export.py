"""Take a model out of a run, bring one in, or average several.

    python export.py --model output_dir --output exported/     # model.safetensors and config.json
    python export.py --model exported/ --output imported.pt    # back: for generate.py and train.py --init_from
    python export.py --average output_dir/elite_*.pt --output soup.pt --score held_out.txt

Only the averaged weights travel, those that one uses: nothing to resume training with. An output that ends in .pt
becomes a checkpoint, any other a folder. --score prints the bits per byte of a file, as generate.py --score does, first
of what went in, then of what was written, read back. The average of models that are no close relatives is worth
nothing: score it.
"""

import runtime.packages  # noqa: F401  # isort: skip

import argparse
import sys
from pathlib import Path

from runtime.arguments import ArgumentParser, as_argument, normalise_flags, run_main
from runtime.devices import check_triton, choose_device
from runtime.errors import UserError
from runtime.stdout import writing_to_stdout
from training.checkpoint import build_model
from training.exported import Model, read_model, refuse_existing, write_model
from training.option_values import parse_delimiter
from training.scoring import score
from training.soup import average


def main(arguments: list[str]) -> None:
    """The command line."""
    options = _parser().parse_args(normalise_flags(arguments))
    if (options.model is None) == (options.average is None):
        raise UserError("expected --model or --average, got both or neither: give one of them")
    refuse_existing(options.output)
    if options.score is not None:  # what it converts never leaves the CPU
        device = choose_device(options.cuda, options.rocm, options.cpu)
        check_triton(device)

    def show(model: Model, path: Path) -> None:
        if options.score is not None:
            built = build_model(model.config, model.weights, device).eval()
            delimiter = getattr(options, "document_delimiter", model.document_delimiter)
            bits = score(built, options.score, delimiter)
            with writing_to_stdout():
                print(f"{bits:.4f} bits per byte, {path}")

    if options.average is None:
        model = read_model(options.model)
        show(model, options.model)
    else:
        _refuse_repeats(options.average)
        models = [read_model(path) for path in options.average]
        model = average(models, options.average)
        for one, path in zip(models, options.average, strict=True):
            show(one, path)
    try:
        write_model(model, options.output)
    except OSError as error:
        raise UserError(f"expected to write {options.output}, got {error.strerror}: choose another --output") from None
    show(read_model(options.output), options.output)
    parameters = sum(tensor.numel() for tensor in model.weights.values())
    print(f"{options.output}: {parameters:,} parameters, step {model.step}", file=sys.stderr)


def _refuse_repeats(paths: list[Path]) -> None:
    seen: dict[Path, Path] = {}
    for path in paths:
        best = path / "best.pt"  # of a run directory
        other = seen.setdefault((best if best.exists() else path).resolve(), path)
        if other is not path:
            raise UserError(f"expected different models to average, got {other} and {path}, one file: leave one out")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, metavar="PATH", help="a checkpoint, a run directory (its best.pt) or an exported folder")
    add(
        "--average", type=Path, nargs="+", action="extend", metavar="PATH",
        help="average these instead; each like --model",
    )  # fmt: skip
    add("--output", type=Path, required=True, metavar="PATH", help="new checkpoint, NAME.pt, or new folder")
    add("--score", type=Path, metavar="FILE", help="print its bits per byte before and after")
    add(
        "--document_delimiter", type=as_argument(parse_delimiter), default=argparse.SUPPRESS, metavar="N",
        help="of --score: byte at which a document ends, in hexadecimal, or none (default: as the model was trained)",
    )  # fmt: skip
    add("--cuda", action="store_true", help="score on an NVIDIA GPU (default: the best device there is)")
    add("--rocm", action="store_true", help="score on an AMD GPU")
    add("--cpu", action="store_true", help="score on the CPU")
    return parser


if __name__ == "__main__":
    run_main(main)
