"""Build hook: compiles the native core in ``csrc/`` into ``src/bs_kernels/_native/``.

The core is optional. Without a working compiler the package installs all the same, with the compiler's message in
``_native/build.json`` for ``explain_backends``. ``BS_KERNELS_NATIVE=require`` makes that an error, ``off`` skips the
build; ``CXX`` and ``CXXFLAGS`` are honoured. Run this file as a script to build in place.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface  # pyright: ignore[reportMissingImports]
except ImportError:  # run as a script
    BuildHookInterface = object

FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
AVX512_BF16 = (*AVX512, "-mavx512bf16")
#: Flags of each instruction set's translation unit, csrc/isa_<name>.cpp. Another one is a file, an entry here and
#: a slot in dispatch.cpp.
ISA_FLAGS = {
    "portable": (),
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": AVX512_BF16,
    "amx_bf16": (*AVX512_BF16, "-mamx-tile", "-mamx-bf16"),
    "amx_bf16_emulated": (),
}
#: Built for every processor; the others are for `X86`.
ANYWHERE = ("portable", "amx_bf16_emulated")
X86 = ("x86_64", "amd64")


class BuildError(RuntimeError):
    """The core could not be built; the message is the compiler's."""


def find_compiler() -> list[str]:
    """The C++ compiler's command."""
    if asked := os.environ.get("CXX"):
        return shlex.split(asked)
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise BuildError("no C++ compiler found (looked for $CXX, c++, g++, clang++)")


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()][:20]
        raise BuildError(f"{shlex.join(command)}\n" + "\n".join(lines))


def compile_core(sources: Path, library: Path, scratch: Path, main: Path | None = None) -> dict[str, Any]:
    """Compile and link the core.

    Instruction sets that the compiler does not know, and OpenMP, are left out with a note; the portable engine is not.

    Args:
        sources: the ``csrc`` directory.
        library: where the shared library goes; replaced in one step.
        scratch: an empty directory for object files.
        main: a source with ``main``; then the core is linked with it into a program instead of a library.

    Returns:
        ``compiler``, ``isa`` (names built in), ``openmp`` and ``notes`` (what was left out, and why).

    Raises:
        BuildError: with the compiler's message.
    """
    compiler = find_compiler()
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    notes: dict[str, str] = {}

    probe = scratch / "probe.cpp"
    probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
    openmp = ["-fopenmp"]
    try:
        _run([*compiler, *openmp, str(probe), "-o", str(scratch / "probe")])
    except BuildError as error:
        notes["openmp"] = str(error)
        openmp = []
    _run([*compiler, "--version"])

    def build(name: str, flags: tuple[str, ...]) -> Path:
        target = scratch / f"{name}.o"
        _run([*compiler, *FLAGS, *openmp, *flags, *extra, "-c", str(sources / f"{name}.cpp"), "-o", str(target)])
        return target

    names = [name for name in ISA_FLAGS if name in ANYWHERE or platform.machine().lower() in X86]
    objects, isa = [], []
    with ThreadPoolExecutor(max_workers=min(len(names), os.cpu_count() or 1)) as pool:
        jobs = {name: pool.submit(build, f"isa_{name}", ISA_FLAGS[name]) for name in names}
    for name, job in jobs.items():
        try:
            objects.append(job.result())
            isa.append(name)
        except BuildError as error:
            if name == "portable":
                raise
            notes[name] = str(error)
    objects.append(build("dispatch", tuple(f"-DBSA_WITH_{name.upper()}" for name in isa)))

    partial = library.with_name(library.name + ".partial")
    kind = ["-shared"] if main is None else ["-std=c++17", str(main)]
    _run([*compiler, *kind, *openmp, *extra, *map(str, objects), "-o", str(partial)])
    partial.replace(library)
    return {"compiler": shlex.join(compiler), "isa": isa, "openmp": bool(openmp), "notes": notes}


def source_digest(sources: Path) -> str:
    """Changes with anything that could change the built core."""
    content = hashlib.sha256()
    for path in [Path(__file__), *sorted(p for p in sources.glob("*") if p.is_file())]:
        content.update(path.name.encode() + path.read_bytes())
    for name in ("CXX", "CXXFLAGS"):
        content.update(os.environ.get(name, "").encode() + b"\0")
    content.update(platform.platform().encode())
    return content.hexdigest()


def build_in_place(root: Path) -> Path | None:
    """Build the core of the package at ``root`` unless it is up to date.

    Args:
        root: the directory that holds ``csrc`` and ``src``.

    Returns:
        The library, or None when there is none; ``_native/build.json`` then says why.

    Raises:
        BuildError: the build failed and ``BS_KERNELS_NATIVE=require``.
    """
    sources, target = root / "csrc", root / "src" / "bs_kernels" / "_native"
    target.mkdir(exist_ok=True)
    library = target / {"darwin": "libbs_native.dylib", "win32": "bs_native.dll"}.get(sys.platform, "libbs_native.so")
    record = target / "build.json"
    mode = os.environ.get("BS_KERNELS_NATIVE", "")
    if mode == "off":
        library.unlink(missing_ok=True)
        record.write_text(json.dumps({"error": "it was installed with BS_KERNELS_NATIVE=off"}))
        return None
    digest = source_digest(sources)
    if library.exists() and record.exists() and json.loads(record.read_text()).get("digest") == digest:
        return library
    with tempfile.TemporaryDirectory() as scratch:
        try:
            built = compile_core(sources, library, Path(scratch))
        except BuildError as error:
            library.unlink(missing_ok=True)
            record.write_text(json.dumps({"error": str(error)}, indent=2))
            if mode == "require":
                raise
            return None
    record.write_text(json.dumps({"digest": digest, **built}, indent=2))
    return library


class CustomBuildHook(BuildHookInterface):  # pyright: ignore[reportGeneralTypeIssues]
    """Runs for wheels and for editable installs."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the core and, when there is one, make the wheel a platform wheel for any Python 3."""
        library = build_in_place(Path(self.root))
        build_data["artifacts"].append("src/bs_kernels/_native/*")
        if library is None:
            self.app.display_warning("bs-kernels: built without the native core, see bs_kernels/_native/build.json")
            return
        build_data["pure_python"] = False
        tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{tag}"


if __name__ == "__main__":
    path = build_in_place(Path(__file__).resolve().parent)
    print(path or "not built, see src/bs_kernels/_native/build.json")
    sys.exit(path is None)
