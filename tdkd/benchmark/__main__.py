"""``python -m tdkd.benchmark``: ``tdkd bench`` without typer and rich, and a run's summary."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tdkd.benchmark import report
from tdkd.benchmark.run import Options, closing, run
from tdkd.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tdkd.benchmark", description=__doc__)
    defaults = Options()
    for option in ("suite", "op", "output", "name", "device"):
        parser.add_argument(f"--{option}", default=getattr(defaults, option))
    for option in ("vocab", "k"):
        parser.add_argument(f"--{option}", type=int, action="append", default=[])
    for option in ("dtype", "logits", "sets"):
        parser.add_argument(f"--{option}", action="append", default=[])
    for option in ("rows", "rounds", "threads"):
        parser.add_argument(f"--{option}", type=int)
    parser.add_argument("--budget", type=float, help="seconds after which no new case begins")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--show", help="instead: the summary of a run's JSON, and its picture")
    given = vars(parser.parse_args())
    show = given.pop("show")
    try:
        if show is not None:
            _show(Path(show))
            return 0
        done = run(Options(**given), _Tell())
    except UserError as error:
        print(f"tdkd: {error}", file=sys.stderr)
        return 2
    for measured in done.measured:
        print(report.table(measured))
    for line in closing(done):
        print(line, file=sys.stderr)
    return 0


class _Tell:
    """A line for every case, and for every rival when it is called first."""

    def __init__(self) -> None:
        self.told: set[str] = set()

    def __call__(self, count: int, total: int, what: str) -> None:
        if what not in self.told:
            self.told.add(what)
            print(f"{count}/{total} {what}", file=sys.stderr, flush=True)


def _show(path: Path) -> None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"show: expected the JSON of a run, got {path.name}: {error}") from error
    if content.get("schema") != report.SCHEMA:
        raise UserError(
            f"show: expected schema {report.SCHEMA}, got {content.get('schema')} in {path.name}"
        )
    print(report.summary(content))
    picture = path.with_suffix(".png")
    if not picture.exists():
        try:
            if not report.write_picture(picture, content):
                print("no picture: nothing was timed", file=sys.stderr)
        except (ModuleNotFoundError, UserError) as error:
            print(f"no picture: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
