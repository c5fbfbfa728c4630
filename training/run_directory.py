"""A run's folder: what is where in it, who may start in it, and config.json, which says what the run is."""

import fcntl
import json
import os
import platform
import socket
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

from mingru.minLM import ModelConfig
from runtime.errors import UserError
from runtime.files import atomic_write, write_once
from runtime.ranks import Identity
from runtime.stderr import say
from training.checkpoint import list_checkpoints
from training.fitness import DESCRIPTIONS
from training.metrics import MetricsFile
from training.options import Options
from training.succession import Launch, claim_launch, newest_launch


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one rank in one run. Logs lie beside the runs, in the working directory, named after the run."""

    path: Path
    rank: int

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def population(self) -> Path:
        return self.path / "population"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics" / f"rank_{self.rank:04d}.tsv"

    @property
    def log(self) -> Path:
        return Path("logs") / f"train_{self.name}_rank_{self.rank:04d}.log"

    @property
    def event_log(self) -> Path:
        return Path("gossip_logs") / f"{self.name}_rank_{self.rank:04d}.tsv"

    def claim(self, identity: Identity) -> None:
        """Take this rank's place in a new run. Raises UserError if the folder already holds a run.

        The first rank to come writes down the launch; a rank that finds another one there, or its own metrics, is not
        part of this run, unless it was restarted: then the metrics are its own, of before. Raises UserError as well if
        such a rank's log tells of a run of which nothing is there: under a filesystem that is not mounted none begins.
        """
        gone = identity.restarts and newest_launch(self.population) is None
        if gone and self.log.exists() and self.log.stat().st_size > 0:
            raise UserError(
                f"expected the run that {self.log} tells of, got none in {self.path}: mount its filesystem, or remove "
                "that log to begin anew"
            )
        taken = UserError(
            f"expected a new or empty run directory, got {self.path}, which already holds a run: --resume "
            f"{self.path}, or choose another --output"
        )
        try:
            self.population.mkdir(parents=True, exist_ok=True)
            files = list_checkpoints(self.path)  # before the launch, which a rank of this run writes before it saves
            described = self.config.exists()  # likewise
            launch = newest_launch(self.population)
            if files and (launch is None or identity.restarts):  # of a run whose config.json is gone
                raise taken
            if launch is None and described and not identity.restarts:
                raise UserError(
                    f"expected a new or empty run directory, got {self.path} with a config.json of something else: "
                    "choose another --output"
                )
            first = Launch(identity.world_size, sources={}, known=())
            if (launch or claim_launch(self.population, first)) != first:
                raise taken
            MetricsFile(self.metrics).create()
        except FileExistsError:
            if not identity.restarts:
                raise taken from None
        except OSError as error:
            raise UserError(
                f"expected a writable --output, got {self.path}: {error.strerror}; choose another or mend it"
            ) from None

    def lock(self) -> BinaryIO:
        """Hold this rank until the returned file is closed, at the latest when the process ends.

        Raises UserError if another process of this run is that rank, or if the folder cannot be written. On a
        filesystem without locks nothing is held.
        """
        try:
            self.population.mkdir(parents=True, exist_ok=True)
            file = open(self.population / f"rank_{self.rank:04d}.lock", "wb")
        except OSError as error:
            raise UserError(f"expected a writable run directory, got {self.path}: {error.strerror}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(
                f"expected rank {self.rank} of {self.path} to be free, got a process that is running it: end that first"
            ) from None
        except OSError as error:
            say(f"warning: {self.path} has no file locks ({error.strerror}): start each rank once only")
        return file

    def stored_options(self) -> dict[str, dict[str, Any]]:
        """The options in config.json of a run to resume. Raises UserError if there is no such run."""
        try:
            options = json.loads(self.config.read_bytes())["options"]
            return {group: dict(values) for group, values in options.items()}
        except (FileNotFoundError, NotADirectoryError):
            got, advice = "which is no folder", "check the path"
            if os.path.isdir(self.path):
                got, advice = "without config.json", "check the path, or start a new run with --output"
            elif os.path.isfile(self.path.parent / self.config.name):
                advice = f"give its folder, {self.path.parent}"
            raise UserError(f"expected a run directory to resume, got {self.path}, {got}: {advice}") from None
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"expected a readable config.json in {self.path}, got {error}: mend the file") from None

    def write_config(
        self, options: Options, model: ModelConfig, parameters: int, identity: Identity, device: str, is_new: bool
    ) -> None:
        """Write config.json: all options resolved, the model, and what is needed to repeat the run. A new run's is
        whichever rank's comes first: they agree on all that matters, and any of them may be the first to fail.

        Raises UserError where a new run's cannot be written; a run that goes on has one, and goes on with that.
        """
        content = {
            "run": self.name,
            "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": sys.argv,
            "world_size": identity.world_size,
            "parameters": parameters,
            "model": model.to_dict(),
            "fitness": DESCRIPTIONS[options.population.gossip_fitness],
            "options": options.to_dict(),
            "git": git_revision(),
            "versions": {"python": platform.python_version()}
            | {package: version(package) for package in ("torch", "numpy", "schedulefree", "blake3")},
            "host": socket.gethostname(),
            "working_directory": os.getcwd(),  # where logs/ and gossip_logs/ are
            "device": device,
        }
        # As UTF-8, which other tools read without a parser; bytes of a path that are none, as escapes.
        text = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
        try:
            if is_new:
                write_once(self.config, text)
            else:
                atomic_write(self.config, text)
        except OSError as error:
            if is_new:
                raise UserError(f"expected a writable --output, got {self.path}: {error.strerror}") from None
            say(f"warning: {self.config} stays as it was ({error.strerror}); training goes on")


def git_revision() -> str | None:
    """The commit of this source tree, with "-dirty" if it was changed; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
