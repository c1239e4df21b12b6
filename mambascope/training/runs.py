"""Run directories ``runs/<name>``: ``config.yaml``, ``logs/``, ``checkpoints/``, ``model.safetensors``, ``report/``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

CHECKPOINT_DIR = "checkpoints"
CONFIG_NAME = "config.yaml"
LAST_NAME = "last.ckpt"
CONFIG_DIR = Path(__file__).parent.parent / "configs"
_BY_NAME = ("last", "best")


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
            raise ValueError(f"ckpt_path {value!r} does not exist; accepted are a file, 'last' or 'best'")
        return Path(value)
    pattern = f"{name or '*'}/{CHECKPOINT_DIR}/{value}.ckpt"
    found = sorted(Path(root).glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        where = f"run {Path(root) / name}" if name else f"run below {root}/"
        raise ValueError(
            f"ckpt_path {value!r}: no {where} has a {value}.ckpt; leave --ckpt_path out to start a new run"
        )
    return found[-1]


def run_of(checkpoint: Path) -> Path | None:
    """The run directory that a checkpoint lies in; ``None`` if it lies elsewhere."""
    run = checkpoint.parent.parent
    inside = checkpoint.parent.name == CHECKPOINT_DIR and (run / CONFIG_NAME).is_file()
    return run if inside else None


def new_run(root: str, name: str | None, configs: Sequence[str], claim: bool = True) -> Path:
    """A directory for a new run.

    Args:
        root: Directory of all runs.
        name: Its name; by default that of the last config, numbered if taken.
        configs: The config files.
        claim: Whether to make it; only one process of a run does.

    Raises:
        ValueError: If a run of that name exists, or the directory cannot be made.
    """
    base = Path(root)
    if name is not None and (not name or Path(name).name != name):
        raise ValueError(f"run.name must be a plain directory name, got {name!r}; its parent is run.root")
    stem = name or _name_of(configs)
    if not claim:
        return base / stem
    try:
        base.mkdir(parents=True, exist_ok=True)
        for number in range(1, 10_000):
            path = base / (stem if number == 1 else f"{stem}-{number}")
            try:
                path.mkdir()
                return path
            except FileExistsError:
                if path.is_dir() and not any(path.iterdir()):
                    return path
                if name is not None:
                    raise ValueError(
                        f"run {path} exists; choose another --run.name, or continue it with --ckpt_path last"
                    ) from None
    except OSError as error:
        raise ValueError(f"run.root {root!r} cannot be used: {error}") from None
    raise ValueError(f"run.root {root!r} has too many runs named {stem}; choose a --run.name")


def _name_of(configs: Sequence[str]) -> str:
    if not configs:
        return "run"
    path = Path(configs[-1])
    return path.resolve().parent.name if path.name == CONFIG_NAME else path.stem
