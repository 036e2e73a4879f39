"""Compiles the plugin, once per content of its sources, and lays copies of it out as NIXL looks for them."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.fake_cuda.build import ROOT, compile_shared, digest_of

HERE = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "nixl_plugin"
HEADER, PLUGIN, PROBE = HERE / "nixl_abi.h", HERE / "vendor_plugin.cpp", HERE / "abi_probe.cpp"
FLAGS = ("-pthread", "-fvisibility=default")

# As its source says; each is a file of its own, since the loader knows files by inode.
BEHAVIOURS = (
    *("VENDOR", "ATONCE", "LATE", "FAILPOST", "FAILLATER", "THROWS", "SHORT"),
    *("NEWABI", "NULLINIT", "NOENGINE", "INITERROR", "RAISES", "NOFILES"),
)
# Those that no plugin's source could be made to behave like.
BROKEN = {
    "NOINIT": "int vendor_answer = 42;",
    "NOSYMBOL": 'extern "C" int vendor_runtime(); extern "C" void *nixl_plugin_init() { vendor_runtime(); return 0; }',
}


def compiled(source: Path) -> Path:
    """The library of one source here."""
    library = BUILD / f"{source.stem}-{digest_of(HEADER, source)}.so"
    return library if library.exists() else compile_shared(source, library, *FLAGS)


def plugin_folder(folder: Path) -> Path:
    """Fills a folder for ``NIXL_PLUGIN_DIR`` with the plugin under each of its names; returns it."""
    folder.mkdir(parents=True)
    for name in BEHAVIOURS:
        shutil.copy(compiled(PLUGIN), folder / f"libplugin_{name}.so")
    for name, text in BROKEN.items():
        source = folder / f"{name}.cpp"
        source.write_text(text)
        compile_shared(source, folder / f"libplugin_{name}.so")
    (folder / "libplugin_NOELF.so").write_text("not a library\n")
    return folder
