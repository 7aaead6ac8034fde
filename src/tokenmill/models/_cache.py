"""Folders in the user's cache: built once, whole or not at all, and checked by checksum before each use."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def cache_dir() -> Path:
    """The user's cache: the environment variable ``TOKENMILL_CACHE``, else the platform's place for caches."""
    override = os.environ.get("TOKENMILL_CACHE")
    if override:
        return Path(override).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("tokenmill"))


def ensure(folder: Path, build: Callable[[Path], None], *, version: str) -> Path:
    """Return `folder` with the content that `build` writes, building it when it is missing, altered or outdated.

    `build` gets an empty folder beside the real one; when it returns, a manifest with the checksum of every file is
    added and the folder is renamed into place. A file lock lets one process build while others wait and then use
    the result. What an interrupted build leaves is removed by the next one.

    Args:
        folder: where the content belongs.
        build: writes it.
        version: names the way it is made; another version than the manifest's is rebuilt.
    """
    if is_intact(folder, version=version):
        return folder
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if is_intact(folder, version=version):  # another process has built it meanwhile
            return folder
        for stale in folder.parent.glob(f".{folder.name}.*"):  # only the owner of the lock builds
            shutil.rmtree(stale)
        workshop = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            fresh = workshop / "new"
            fresh.mkdir()
            build(fresh)
            _write_manifest(fresh, version)
            if folder.exists():
                folder.rename(workshop / "old")
            fresh.rename(folder)
        finally:
            shutil.rmtree(workshop)
    return folder


def is_intact(folder: Path, *, version: str) -> bool:
    """Whether every file of the manifest is there with its size and checksum, and the version is this one."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        files: dict[str, dict[str, Any]] = manifest["files"]
        if manifest["version"] != version or not files:
            return False
        if any((folder / name).stat().st_size != facts["size"] for name, facts in files.items()):
            return False
        with ThreadPoolExecutor() as pool:
            checksums = pool.map(checksum, [folder / name for name in files])
            return all(facts["sha256"] == found for facts, found in zip(files.values(), checksums, strict=True))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file so that a reader sees the old content or the new, never a part."""
    text = json.dumps(data, indent=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        Path(draft).replace(path)
    except OSError:
        Path(draft).unlink()
        raise


def _write_manifest(folder: Path, version: str) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": checksum(path)} for path in paths
    }
    write_json(folder / MANIFEST, {"version": version, "files": files})
