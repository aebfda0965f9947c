"""From C sources to binaries: the compiler and the cache of what it made."""

from colonnade.build.cache import Cache
from colonnade.build.toolchain import CompileError, Toolchain, host

__all__ = ["Cache", "CompileError", "Toolchain", "host"]
