"""Run directories ``runs/<name>``: ``config.yaml``, ``logs/``, ``checkpoints/``, ``model.safetensors``, ``report/``.

A directory belongs to one process at a time, which holds the lock on its ``.lock``. What was started and has no
checkpoint is no run: it goes with the process that made it, or is taken over by the next one of that name.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mambascope.models.weights import BEST_NAME, CHECKPOINT_DIR, CONFIG_DIR, LAST_NAME, LOG_DIR, RUN_CONFIG

_BY_NAME = {"last": LAST_NAME, "best": BEST_NAME}
_LOCK_NAME = ".lock"
_STARTED = {_LOCK_NAME, RUN_CONFIG, LOG_DIR, CHECKPOINT_DIR, "wandb"}  # what there is before the first checkpoint


@dataclass(frozen=True)
class _Lock:
    """A directory that this process works in: the descriptor of its lock, and what becomes of it without a result."""

    descriptor: int
    new: bool
    scratch: bool = False


_locks: dict[Path, _Lock] = {}


def _close_in_child() -> None:
    """A loader's worker that outlives a killed training must not keep its lock."""
    for lock in _locks.values():
        os.close(lock.descriptor)
    _locks.clear()


os.register_at_fork(after_in_child=_close_in_child)


def shipped_configs() -> dict[str, Path]:
    """The configs that come with the package, by name."""
    return {path.stem: path for path in sorted(CONFIG_DIR.glob("*.yaml"))}


def find_config(value: str) -> str:
    """A config's path: the file itself, or the shipped one of that name.

    Raises:
        ValueError: If there is neither; the message lists the shipped ones.
    """
    if Path(value).is_file():
        return value
    shipped = shipped_configs()
    name = Path(value).stem
    if name in shipped and Path(value).parent in (Path("."), Path("mambascope/configs"), Path("configs")):
        return str(shipped[name])
    raise ValueError(f"config {value!r} does not exist; the package has {', '.join(shipped)}")


def find_checkpoint(value: str, root: str, name: str | None) -> Path:
    """The checkpoint to resume from.

    Args:
        value: A file, or ``last`` or ``best`` of a run.
        root: Directory of all runs.
        name: The run; ``None`` for the one that was saved last.

    Raises:
        ValueError: If there is none.
    """
    if value not in _BY_NAME:
        if not Path(value).is_file():
            raise ValueError(f"ckpt_path {value!r} does not exist; accepted are a file, 'last', 'best' or 'auto'")
        return Path(value)
    pattern = f"{name or '*'}/{CHECKPOINT_DIR}/{_BY_NAME[value]}"
    checkpoints = sorted(Path(root).glob(pattern), key=lambda path: path.stat().st_mtime)
    if not checkpoints:
        where = f"run {Path(root) / name}" if name else f"run below {root}/"
        raise ValueError(
            f"ckpt_path {value!r}: no {where} has a {_BY_NAME[value]}; leave --ckpt_path out to start a new run"
        )
    return checkpoints[-1]


def run_of(checkpoint: Path) -> Path | None:
    """The run directory that a checkpoint lies in; ``None`` if it lies elsewhere."""
    run = checkpoint.parent.parent
    inside = checkpoint.parent.name == CHECKPOINT_DIR and (run / RUN_CONFIG).is_file()
    return run if inside else None


def new_run(root: str, name: str | None, configs: Sequence[str], claim: bool = True) -> Path:
    """A directory for a new run.

    Args:
        root: Directory of all runs.
        name: Its name; by default that of the last config, numbered if taken.
        configs: The config files.
        claim: Whether to make it, for this process alone until :func:`leave_runs`; only one process of a run does.

    Raises:
        ValueError: If a run of that name exists, or the directory cannot be made.
    """
    base = Path(root)
    if name is not None and (not name or Path(name).name != name):
        raise ValueError(f"run.name must be a plain directory name, got {name!r}; its parent is run.root")
    stem = name or name_of(configs)
    if not claim:
        return base / stem
    try:
        base.mkdir(parents=True, exist_ok=True)
        for number in range(1, 10_000):
            path = base / (stem if number == 1 else f"{stem}-{number}")
            taken = _take(path, configs)
            if taken is None:
                return path
            if name is not None:
                raise ValueError(taken)
    except OSError as error:
        raise ValueError(f"run.root {root!r} cannot be used: {error}") from None
    raise ValueError(f"run.root {root!r} has too many runs named {stem}; choose a --run.name")


def _take(path: Path, configs: Sequence[str]) -> str | None:
    """Makes the directory and holds it for this process; says why not, if it is taken."""
    # the config that is used may be the only one of its kind
    inside = any(Path(config).resolve().parent == path.resolve() for config in configs)
    while True:
        if path.exists() and not path.is_dir():
            return f"run directory {path} is a file; choose another --run.name"
        path.resolve().mkdir(exist_ok=True)
        try:
            if inside or not _is_free(path):
                break
            lock = hold_run(path, new=True)
        except FileNotFoundError:  # a run that could not start has just been removed
            continue
        if not lock:
            return in_use(path)
        if not _is_free(path):  # whoever held it got further
            _release(path)
            break
        _clear(path)
        return None
    if (path / CHECKPOINT_DIR / LAST_NAME).is_file():
        return f"run {path} exists; choose another --run.name, or continue it with --ckpt_path last"
    return f"run directory {path} exists, and holds no checkpoint to continue from; choose another --run.name"


def _is_free(path: Path) -> bool:
    """Whether a directory is empty, or holds no more than a run that did not come to its first checkpoint."""
    names = {entry.name for entry in path.iterdir() if not entry.name.startswith(f".{RUN_CONFIG}.")}
    return not names or (_LOCK_NAME in names and names <= _STARTED and not any(path.rglob("*.ckpt")))


def _clear(path: Path) -> None:
    """Removes what a run left in a free directory, but for its lock."""
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != _LOCK_NAME:
            entry.unlink(missing_ok=True)


def in_use(run: Path) -> str:
    """What to say of a run that another process holds."""
    return (
        f"run {run} is being trained by another process; wait for its end, or choose another --run.name (where that "
        f"process was killed and the file system has no locks, remove {run / _LOCK_NAME})"
    )


def hold_run(run: Path, new: bool = False) -> bool:
    """Keeps a run directory for this process until :func:`leave_runs`, also against processes of the same instant.

    Returns:
        False if another process holds it (or, for a new one, anybody).
    """
    run = run.resolve()
    if not new and run in _locks:
        return True
    path = run / _LOCK_NAME
    while True:
        made = True
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            made = False
            try:
                descriptor = os.open(path, os.O_RDWR)
            except FileNotFoundError:
                continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        except OSError:  # a file system without locks, where whoever made the file holds it
            if new and not made:
                os.close(descriptor)
                return False
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        os.close(descriptor)  # it is no longer that file
    _locks[run] = _Lock(descriptor, new)
    return True


def scratch_run() -> Path:
    """A directory outside of all runs, which goes with :func:`leave_runs`."""
    path = Path(tempfile.mkdtemp(prefix="mambascope-")).resolve()
    _locks[path] = _Lock(os.open(path, os.O_RDONLY), new=True, scratch=True)
    return path


def leave_runs() -> None:
    """Gives back the directories that this process holds; new ones without anything to keep are removed."""
    for run, lock in list(_locks.items()):
        if lock.scratch:
            shutil.rmtree(run, ignore_errors=True)
        leave = lock.new and not lock.scratch and run.is_dir() and _is_free(run)
        if leave:
            _clear(run)
            (run / _LOCK_NAME).unlink(missing_ok=True)  # last: from here on the directory is anybody's
        _release(run)
        if leave:
            with contextlib.suppress(OSError):  # somebody has taken it
                run.rmdir()


def _release(run: Path) -> None:
    os.close(_locks.pop(run.resolve()).descriptor)


def name_of(configs: Sequence[str]) -> str:
    """The name of a run that is given none: that of its last config."""
    if not configs:
        return "run"
    path = Path(configs[-1])
    return path.resolve().parent.name if path.name == RUN_CONFIG else path.stem
