"""What installing SGLang for a CPU needs beyond pip; runs with the interpreter of the environment being built.

python sglang_packages.py requirements         # prints the requirement list, from the wheel's own metadata
python sglang_packages.py install-shim FOLDER  # makes the modules in FOLDER importable, and the plugin among them known
python sglang_packages.py check                # imports the engine, and compiles what its first start would compile
"""

import importlib.metadata
import os
import re
import sys
import sysconfig
from pathlib import Path

import engine_env

# torch and torchvision are installed first. The rest is for CUDA (kernels and their compilers), or serves images,
# sound, video, model hubs, remote files, structured output and gRPC, which a text model in these tests does not use.
NOT_NEEDED = re.compile(
    r"(torch|torchaudio|torchvision|torchcodec|av|decord2|timm|tml-renderers"
    r"|cuda-python|flash-attn-4|flashinfer_python|humming-kernels|kernels|numba|nvidia-cutlass-dsl|nvidia-mathdx"
    r"|nvshmem4py-cu13|quack-kernels|sgl-deep-ep|sgl-deep-gemm|sgl-flash-mla|sglang-kernel|tilelang"
    r"|anthropic|blobfile|build|deepseek-recipe|easydict|modelscope|openai-harmony|outlines|py-spy|smg-grpc-servicer)"
    r"(?![\w.-])"
)
# What the wheel imports without declaring it, or declares through packages that are left out above.
UNDECLARED = ("cloudpickle", "dill", "opentelemetry-api", "triton")

SHIM = "memkv_sglang_cpu_shim"
SHIM_VERSION = "1"
SHIM_PLUGIN = "[sglang.srt.plugins]\nmemkv_cpu_hicache = memkv_cpu_hicache:activate\n"
SHIM_AT_START = "memkv_cpu_torchvision"


def requirements() -> list[str]:
    """Returns SGLang's declared requirements, less extras and what is not needed, and what it does not declare."""
    declared = importlib.metadata.requires("sglang") or []
    return [line for line in declared if "extra ==" not in line and not NOT_NEEDED.match(line)] + list(UNDECLARED)


def install_shim(folder: str) -> None:
    """Records the shim as a distribution that lives in another folder; `pip uninstall` removes the record."""
    site = Path(sysconfig.get_paths()["purelib"])
    info = site / f"{SHIM}-{SHIM_VERSION}.dist-info"
    info.mkdir(exist_ok=True)
    files = {
        f"{SHIM}.pth": f"{folder}\nimport {SHIM_AT_START}\n",
        f"{info.name}/METADATA": f"Metadata-Version: 2.1\nName: {SHIM}\nVersion: {SHIM_VERSION}\n",
        f"{info.name}/entry_points.txt": SHIM_PLUGIN,
        f"{info.name}/INSTALLER": "pip\n",
    }
    for name, text in files.items():
        (site / name).write_text(text)
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in (*files, f"{info.name}/RECORD")))


def check() -> None:
    """Imports the engine, and lets it compile the extension that names pages (it needs g++ and OpenSSL's headers).

    Raises:
        RuntimeError: SGLang would run on something else, or did not load the shim.
    """
    os.environ.update(engine_env.engine_settings() | engine_env.sglang_settings())
    sys.dont_write_bytecode = False
    from sglang import Engine  # noqa: F401 - the import is the check
    from sglang.srt.managers import scheduler  # noqa: F401 - what the engine's second process imports
    from sglang.srt.mem_cache.pool_host import mha
    from sglang.srt.mem_cache.utils import get_hash_str
    from sglang.srt.models.registry import ModelRegistry
    from sglang.srt.plugins import load_plugins
    from sglang.srt.utils import is_cpu

    load_plugins()
    ModelRegistry.get_supported_archs()
    if not is_cpu() or not hasattr(mha, "transfer_kv_direct"):
        raise RuntimeError("SGLang does not run on the CPU, or without the plugin that it needs there")
    print("SGLang", importlib.metadata.version("sglang"), "on the CPU; first page's name", get_hash_str([1, 2, 3]))


if __name__ == "__main__":
    if sys.argv[1] == "requirements":
        print("\n".join(requirements()))
    elif sys.argv[1] == "install-shim":
        install_shim(sys.argv[2])
    elif sys.argv[1] == "check":
        check()
    else:
        raise SystemExit(__doc__)
