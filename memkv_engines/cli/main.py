"""``memkv-engines``: look at the machine, at a configuration and at a tier; patch an engine.

Exit codes: 0 all is well, 1 something was found (the doctor: a problem; `tier verify`: damage; each command's help says
what), 2 the call or the configuration is wrong or a place cannot be reached, 130 interrupted.

What a command needs is imported when it runs: the doctor must print where dependencies are missing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from memkv_engines.cli import patch, tier
from memkv_engines.errors import MemKVError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except MemKVError as error:
        print(f"memkv-engines: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Who read our output has had enough. Python would complain once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="memkv-engines", description=__doc__.splitlines()[0] if __doc__ else "")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="what is here, which paths work, why others do not, what to do next")
    doctor.add_argument(
        "path", nargs="?", default="", help="tier directory, or several as a,b; measured with scratch files"
    )
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(run=_doctor)
    config = commands.add_parser("config", help="show every configuration key, its value and where it came from")
    config.add_argument("pairs", nargs="*", metavar="KEY=VALUE", help="as in the engine's extra config")
    config.add_argument("--json", action="store_true")
    config.set_defaults(run=_show_config)
    tier.add_parser(commands)
    patch.add_parser(commands)
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


if __name__ == "__main__":
    sys.exit(main())
