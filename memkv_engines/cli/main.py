"""``memkv-engines``: look at the machine, at a configuration and at a tier.

Exit codes: 0 all is well, 1 the doctor found a problem or the tier holds damaged chunks, 2 the call or the
configuration is wrong.

What a command needs is imported when it runs: the doctor must print where dependencies are missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from memkv_engines.errors import MemKVError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        return code
    except MemKVError as error:
        print(f"memkv-engines: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="memkv-engines", description=__doc__.splitlines()[0] if __doc__ else "")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="what is here, which paths work, why others do not, what to do next")
    doctor.add_argument("path", nargs="?", default="", help="directory of the tier; measured with scratch files")
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(run=_doctor)
    config = commands.add_parser("config", help="show every configuration key, its value and where it came from")
    config.add_argument("pairs", nargs="*", metavar="KEY=VALUE", help="as in the engine's extra config")
    config.add_argument("--json", action="store_true")
    config.set_defaults(run=_show_config)
    tier = commands.add_parser("tier", help="look at a tier directory").add_subparsers(required=True, metavar="WHAT")
    for name, run, text in (
        ("stat", _tier_stat, "namespaces, chunks and bytes"),
        ("verify", _tier_verify, "read every chunk and check every digest"),
    ):
        command = tier.add_parser(name, help=text)
        command.add_argument("path")
        command.add_argument("--json", action="store_true")
        command.set_defaults(run=run)
    return parser


def _doctor(arguments: argparse.Namespace) -> int:
    from memkv_engines.cli import doctor

    return doctor.run(arguments.path, as_json=arguments.json)


def _show_config(arguments: argparse.Namespace) -> int:
    from memkv_engines.config import load_config

    config = load_config(dict(pair.partition("=")[::2] for pair in arguments.pairs))
    if arguments.json:
        body = dict(line.partition("=")[::2] for line in config.describe().splitlines())
        print(json.dumps(body, indent=2))
    else:
        print(config.describe())
    return 0


def _tier_stat(arguments: argparse.Namespace) -> int:
    from memkv_engines.cli.tier import stat_tier

    namespaces = stat_tier(arguments.path)
    if arguments.json:
        print(json.dumps(namespaces, indent=2))
        return 0
    for entry in namespaces:
        print(f"{entry['namespace']}  {entry['chunks']} chunks  {entry['bytes'] / 2**20:,.1f} MiB  {entry['identity']}")
    if not namespaces:
        print("no namespaces")
    return 0


def _tier_verify(arguments: argparse.Namespace) -> int:
    from memkv_engines.cli.tier import verify_tier

    report = verify_tier(arguments.path, progress=not arguments.json)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print(f"{report['chunks']} chunks, {report['bytes'] / 2**20:,.1f} MiB, {len(report['damaged'])} damaged")
        for entry in report["damaged"]:
            print(f"  {entry['kind']}: {entry['name']} ({entry['why']})")
    return 1 if report["damaged"] else 0


if __name__ == "__main__":
    sys.exit(main())
