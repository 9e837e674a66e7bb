"""Kernels that TensorRT-RTX compiled for this GPU, kept in memory for all contexts and, if asked for, in a file."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffship.core.atomic import write_file
from diffship.core.errors import ConfigError

_FILE_BYTES = 1 << 30
_SAMPLE = 1 << 16


class JitCache:
    """The runtime cache of one engine.

    The library refuses a blob that is damaged or of another GPU, driver or version, and compiles again; so does this
    class, without a word. A cache that cannot be written costs seconds at the next start and stops nothing.
    """

    def __init__(self, config: Any, file: Path | None) -> None:
        """Loads `file` if there is one, and puts the cache into the runtime config."""
        self._cache = config.create_runtime_cache()
        self._file = file
        self._saved = b""
        if file is not None:
            self._load(file)
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write the file, whole or not at all, if there is something new."""
        if self._file is None:
            return
        host = self._cache.serialize()
        blob = bytes(memoryview(host)) if host is not None else b""
        if blob and blob != self._saved:
            with suppress(OSError):  # a full disk, say
                write_file(self._file, blob)
                self._saved = blob

    def _load(self, file: Path) -> None:
        with suppress(OSError):
            if file.stat().st_size <= _FILE_BYTES:
                blob = file.read_bytes()
                if blob and self._cache.deserialize(blob):
                    self._saved = blob


def cache_file(folder: str, plan: Path, capability: int) -> Path | None:
    """Where the kernels of `plan` are kept, named by its part, GPU and content; None for no folder.

    The content is sampled (size, both ends), because plans have gigabytes and the library checks each kernel itself.

    Raises:
        ConfigError: the folder cannot be made.
    """
    if not folder:
        return None
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise ConfigError(f"runtime_cache {folder} is no folder: {fault.strerror or fault}") from None
    digest = hashlib.sha256(str(plan.stat().st_size).encode())
    with open(plan, "rb") as file:
        digest.update(file.read(_SAMPLE))
        file.seek(max(0, plan.stat().st_size - _SAMPLE))
        digest.update(file.read(_SAMPLE))
    return Path(folder) / f"{plan.parent.name}-sm{capability}-{digest.hexdigest()[:24]}.jit"
