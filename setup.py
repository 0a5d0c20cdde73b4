"""Builds csrc/ into the shared library rmx_kernels/librmx_cpu, with setuptools and a C++17 compiler alone.

The library knows neither torch nor Python, so its wheel fits every Python 3 of the platform. Where it cannot be built
the installation goes on without it and says so; ``rmx_kernels.backends()`` names the reason again.
"""

import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, CompileError, ExecError, PlatformError

FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    "-ffp-contract=off",  # the same bits with and without fused multiply-add
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
]
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS.append("-mprefer-vector-width=512")  # read by the AVX-512 clones alone; 1.5 x 256 bits on Zen 4


class BuildNative(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        *package, name = fullname.split(".")
        return str(Path(*package, f"{name}.so"))

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # no PyInit function: ctypes loads it

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except (CCompilerError, CompileError, ExecError, PlatformError) as fault:
            bar = "*" * 100
            print(
                f"{bar}\nrmx: the native CPU kernels were NOT built: {fault}\n"
                "rmx: everything works without them, but on a CPU several times slower. Install a C++17 compiler\n"
                f"rmx: (Debian and Ubuntu: apt install g++) and install rmx again.\n{bar}",
                file=sys.stderr,
                flush=True,
            )
            raise  # setuptools goes on without an optional extension


class AnyPython3(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """Of the platform with the library in it; of any platform without."""
        library = self.get_finalized_command("build_ext").get_ext_fullpath("rmx_kernels.librmx_cpu")
        return "py3", "none", super().get_tag()[2] if Path(library).exists() else "any"


setup(
    ext_modules=[
        Extension(
            "rmx_kernels.librmx_cpu",
            sources=[
                "csrc/decode_attention.cpp",
                "csrc/decoder_layer.cpp",
                "csrc/divergence.cpp",
                "csrc/entropy_topk.cpp",
                "csrc/gated_contrastive_loss.cpp",
                "csrc/library.cpp",
                "csrc/packed_attention.cpp",
            ],
            depends=["csrc/rmx_cpu.h", "csrc/divergence.h", "csrc/rows.h", "csrc/parallel.h", "csrc/vec_math.h"],
            extra_compile_args=FLAGS,
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPython3},
)
