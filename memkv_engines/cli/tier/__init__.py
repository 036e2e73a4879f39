"""``memkv-engines tier``: look at tier directories, check them, mend them, make room, and set policies.

Standard library only here; what a command needs is imported when it runs.
"""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Callable
from typing import Any

__all__ = ["add_parser"]

_PATH = "tier directory; several as FIRST,SECOND, as in the configuration"
_FOUND = "Exit codes: 0 all is well, 1 findings, 2 the call is wrong or the directory cannot be reached."
_TOLD = (
    "Exit codes: 0 told, 1 told but parts of the directory or a policy could not be read, 2 the call is wrong or the "
    "directory cannot be reached."
)
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


def add_parser(commands: Any) -> None:
    """Add ``tier`` and what it can do to a parser's subcommands."""
    what = commands.add_parser("tier", help="look at a tier directory, check it, mend it, make room").add_subparsers(
        required=True, metavar="WHAT"
    )
    _add(
        what,
        "stat",
        "summary",
        "what a directory holds, over all namespaces",
        _TOLD,
    )
    show = _add(
        what,
        "ls",
        "summary",
        "namespaces with sizes, tokens and last use",
        _TOLD,
    )
    show.add_argument("--namespace", action="append", default=[], metavar="NAME", help="only these; a prefix will do")
    show.add_argument("--chunks", action="store_true", help="one line for each chunk")
    for name, text, outcome in (
        ("verify", "read every chunk and check every digest; changes nothing", _FOUND),
        (
            "repair",
            "verify, and remove what is damaged, cut off, stored under a wrong name or half written; "
            "count the bytes anew. Files that do not have the name, place and owner of ours are left alone, and so are "
            "chunks of a format this build does not know",
            "Exit codes: 0 nothing is wrong (any more), 1 something is left (with --dry-run: anything), 2 the call is "
            "wrong or the directory cannot be reached.",
        ),
    ):
        command = _add(what, name, "examine", text, outcome)
        command.add_argument("--namespace", action="append", default=[], metavar="NAME", help="only these namespaces")
        command.add_argument("--quick", action="store_true", help="names, sizes and headers only, not the payloads")
        command.add_argument(
            "--key-file", metavar="FILE", help="the key of protected chunks: check what authenticates them too"
        )
        command.set_defaults(repair=name == "repair", dry_run=False)
        if name == "repair":
            command.add_argument("--dry-run", action="store_true", help="only print what would be removed")
    _add_evict(what)
    _add_policy(what)


def _add_evict(what: Any) -> None:
    command = _add(
        what,
        "evict",
        "removal",
        "remove chunks: of namespaces, of a tenant, by age, or down to a size. Conditions narrow each other",
        "Exit codes: 0 what was asked for is removed, 1 some of it is not (pinned, or it cannot be removed), 2 the "
        "call is wrong or the directory cannot be reached.",
    )
    command.add_argument(
        "--namespace", action="append", default=[], metavar="NAME", help="a prefix will do; repeatable"
    )
    command.add_argument("--tenant", help="only the namespaces of this tenant")
    command.add_argument("--older-than", type=duration, metavar="AGE", help="written so long ago, as 90s, 12h or 7d")
    command.add_argument("--unused-for", type=duration, metavar="AGE", help="neither written nor loaded for so long")
    command.add_argument("--down-to", type=size, metavar="SIZE", help="stop when so much is left, as 500G or 0")
    command.add_argument("--all", action="store_true", help="everything")
    command.add_argument("--pinned", action="store_true", help="of pinned namespaces too")
    command.add_argument("--dry-run", action="store_true", help="only tell what would be removed")


def _add_policy(what: Any) -> None:
    command = _add(
        what,
        "policy",
        "decide",
        "show or set what is kept: pins, priorities and times to live of namespaces, quotas of tenants",
        "Exit codes: 0 done, 1 a policy cannot be read and is ignored, 2 the call is wrong or the directory cannot be "
        "reached or written. Engines see a change within ten seconds, their keepers at their next round.",
    )
    command.add_argument("--namespace", metavar="NAME", help="the namespace to decide about; a prefix will do")
    pin = command.add_mutually_exclusive_group()
    pin.add_argument("--pin", dest="pin", action="store_const", const=True, help="never evict its chunks (they expire)")
    pin.add_argument("--unpin", dest="pin", action="store_const", const=False)
    command.add_argument("--priority", type=int, help="-100 to 100: chunks of a lower one are evicted first")
    command.add_argument(
        "--ttl", type=_or_off(duration), metavar="AGE", help="remove chunks written so long ago; off for never"
    )
    command.add_argument("--tenant", help="the tenant to decide about")
    command.add_argument(
        "--quota", type=_or_off(size), metavar="SIZE", help="bytes it may hold in all directories; off for any number"
    )


def _add(what: Any, name: str, module: str, text: str, outcome: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = what.add_parser(name, help=text, description=f"{text}.", epilog=outcome)
    command.add_argument("path", help=_PATH)
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=lambda arguments: _run(module, name, arguments))
    return command


def _run(module: str, name: str, arguments: argparse.Namespace) -> int:
    code: int = getattr(importlib.import_module(f"memkv_engines.cli.tier.{module}"), name)(arguments)
    return code


def size(text: str) -> int:
    """Bytes from ``10G``, ``10GiB`` or ``10737418240``; units are powers of 1024."""
    match = re.fullmatch(r"(\d{1,18})\s*([kmgt]?)(?:i?b)?", text.strip().lower(), re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give 500G, 10GiB or a number of bytes")
    return int(match[1]) * _UNITS[match[2]]


def duration(text: str) -> int:
    """Seconds from ``90s``, ``15m``, ``12h``, ``7d`` or ``2w``."""
    match = re.fullmatch(r"(\d{1,12})\s*([smhdw])", text.strip().lower(), re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no age: give 90s, 15m, 12h, 7d or 2w")
    return int(match[1]) * _SECONDS[match[2]]


def _or_off(parse: Callable[[str], int]) -> Callable[[str], int]:
    """Where nothing may be asked for too: 0 from ``off``. Never for what is removed."""
    return lambda text: 0 if text == "off" else parse(text)
