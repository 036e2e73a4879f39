"""``memkv-engines patch``: optional repairs of an engine's own files, one pinned release each (``patches/README.md``).

Standard library only: the engine is found, read and written, never imported.
"""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["ENGINES", "add_parser"]

ENGINES = ("vllm", "sglang")

_CODES = (
    "Exit codes: 0 all is well, 1 a patch conflicts with the engine's files (nothing of it was written), 2 the call is "
    "wrong, an engine cannot be found, or a file cannot be read or written."
)


def add_parser(commands: Any) -> None:
    """Add ``patch`` to a parser's subcommands."""
    text = "optional patches for the engines that are installed here: look, apply, take back"
    command: argparse.ArgumentParser = commands.add_parser("patch", help=text, description=f"{text}.", epilog=_CODES)
    what = command.add_mutually_exclusive_group()
    what.add_argument(
        "--check", dest="what", action="store_const", const="check", help="only tell (this is the default)"
    )
    what.add_argument("--apply", dest="what", action="store_const", const="apply", help="apply what applies")
    what.add_argument("--revert", dest="what", action="store_const", const="revert", help="take back what was applied")
    command.add_argument("--engine", choices=ENGINES, help="only this one; without it, those that are installed")
    command.add_argument(
        "--target", metavar="DIR", help="the folder that holds the engine's package, instead of the running Python's"
    )
    command.add_argument("--json", action="store_true")
    command.set_defaults(what="check", run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from memkv_engines.cli.patch import command

    return command.run(arguments.what, arguments.engine, arguments.target, as_json=arguments.json)
