"""Trains and evaluates the entries of a list; every finished piece is a file and is not made again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from mambascope.compare.ablation import fingerprint
from mambascope.compare.lists import Entry, FrontierList, Setting, digest, merged
from mambascope.data.datamodule import ResumableDataModule
from mambascope.data.modules import open_data
from mambascope.evaluation.collect import collect
from mambascope.evaluation.sweep import StageRecord
from mambascope.models.architectures import architecture_of, configured
from mambascope.models.checkpoint import load_model, read_state_dict
from mambascope.models.cost import StageCost
from mambascope.models.flop_count import costs_of
from mambascope.models.meaning import differences
from mambascope.models.scope import MambaScope
from mambascope.models.vim import VisionMamba
from mambascope.models.weights import RUN_CONFIG, find_weights
from mambascope.training.args import ModelArgs
from mambascope.training.runs import find_config
from mambascope.training.trainings import Group, finish_training, finished_weights
from mambascope.utils import atomic_path, unpack

_QUIET = {"run": {"report": False, "loggers": ["csv"]}}  # the comparison is the report


@dataclass(frozen=True)
class Point:
    """A setting of an entry with the weights of one seed."""

    entry: str
    setting: Setting
    seed: int


@dataclass(frozen=True)
class Result:
    """What a point gave on the evaluation images.

    Attributes:
        key: Names the weights, the setting and the data.
        record: Answers on N images; for a one-stage model both stages are the same.
        costs: Per convention, multiply-adds of the stages.
        two_stage: Whether it is a MambaScope.
        epochs: Epochs of training behind the weights, with those of the entries they started from; ``None`` if unknown.
    """

    key: str
    record: StageRecord
    costs: dict[str, StageCost]
    two_stage: bool
    epochs: int | None

    def write(self, path: Path) -> None:
        """Writes one ``.npz`` file, under a temporary name first."""
        facts = {
            "key": self.key,
            "costs": {name: asdict(cost) for name, cost in self.costs.items()},
            "two_stage": self.two_stage,
            "epochs": self.epochs,
        }
        arrays = {f.name: getattr(self.record, f.name) for f in fields(StageRecord)}
        arrays = {name: array for name, array in arrays.items() if array is not None}
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, facts=np.array(json.dumps(facts)), **arrays)

    @classmethod
    def read(cls, path: Path) -> Result:
        """Reads what :meth:`write` wrote."""
        with np.load(path, allow_pickle=False) as file:
            facts = json.loads(str(file["facts"]))
            record = StageRecord(**{f.name: file[f.name] for f in fields(StageRecord) if f.name in file})
        costs = {name: StageCost(**cost) for name, cost in facts["costs"].items()}
        return cls(facts["key"], record, costs, facts["two_stage"], facts["epochs"])


class Work:
    """The trainings and evaluations of a list in one folder.

    Args:
        plan: The list.
        folder: Where its trainings and results are kept.
        device: Of evaluation and timing.
        progress: Whether to show progress bars.
    """

    def __init__(self, plan: FrontierList, folder: Path, device: torch.device, progress: bool = False) -> None:
        self.plan, self.folder, self.device, self.progress = plan, folder, device, progress
        self._modules: dict[str, ResumableDataModule] = {}
        self._fingerprints: dict[Path, str] = {}
        self._recipes: dict[str, str] = {}

    # ---- what there is to do -------------------------------------------------------------------------------------

    def trainings(self) -> list[tuple[str, int]]:
        """Entry and seed of every training, each after the one it starts from; all entries of a seed, then the next."""
        order = dict.fromkeys(link for name in self.plan.entries for link in self.plan.chain(name))
        return [(name, seed) for seed in self.plan.seeds for name in order if self.plan.entries[name].trained]

    def points(self) -> Iterator[Point]:
        """Everything that is evaluated."""
        for name, entry in self.plan.entries.items():
            for setting in entry.settings:
                for seed in self.seeds(name):
                    yield Point(name, setting, seed)

    def seeds(self, name: str) -> tuple[int, ...]:
        """The seeds of an entry: weights that do not depend on it are evaluated once."""
        first = self.plan.entries[self.plan.chain(name)[0]]
        fixed = bool(first.net) and "{seed}" not in str(first.net.get("checkpoint"))
        return self.plan.seeds[:1] if fixed and not self._trained_link(name) else self.plan.seeds

    def _trained_link(self, name: str) -> bool:
        return any(self.plan.entries[link].trained for link in self.plan.chain(name))

    # ---- trainings -----------------------------------------------------------------------------------------------

    def config(self, name: str) -> dict[str, Any]:
        """The whole training config of an entry."""
        entry = self.plan.entries[name]
        assert entry.config is not None
        base = yaml.safe_load(Path(find_config(entry.config)).read_text(encoding="utf-8"))
        return merged(base, self.plan.options, entry.options, _QUIET)

    def _recipe(self, name: str) -> str:
        """Names the config of a training and of those that it starts from."""
        if name not in self._recipes:
            entry = self.plan.entries[name]
            own = self.config(name) if entry.trained else entry.net
            self._recipes[name] = digest(own, None if entry.start is None else self._recipe(entry.start))
        return self._recipes[name]

    def run_dir(self, name: str, seed: int) -> Path:
        """Run directory of a training; another config means another directory."""
        return self.folder / "trainings" / f"{name}-{self._recipe(name)}-seed{seed}"

    def is_trained(self, name: str, seed: int) -> bool:
        """Whether the training has ended."""
        return finished_weights(self.run_dir(name, seed)) is not None

    def train_all(self, jobs: int, threads: int) -> None:
        """Trains what is not trained yet, several at a time, each after the one it starts from.

        Ctrl-C lets all of them save their state first; so does the failure of one.

        Args:
            jobs: How many at a time, at most.
            threads: CPU threads of all of them.

        Raises:
            CommandError: If one fails.
        """
        numbered = list(enumerate(self.trainings(), 1))
        left = [(number, name, seed) for number, (name, seed) in numbered if not self.is_trained(name, seed)]
        jobs = max(1, min(jobs, len(left)))
        group = Group(max(1, threads // jobs))
        running: set[Future[Path]] = set()
        with ThreadPoolExecutor(jobs) as pool:
            try:
                while left or running:
                    ready = [job for job in left if self._can_start(*job[1:])][: jobs - len(running)]
                    for job in ready:
                        number, name, seed = job
                        left.remove(job)
                        print(f"[{number}/{len(numbered)}] training {name}, seed {seed}", flush=True)
                        label = f"{name}, seed {seed}" if jobs > 1 else ""
                        running.add(pool.submit(self.train, name, seed, group, label))
                    ended, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in ended:
                        future.result()
            except BaseException:
                self._stop(group, running)
                raise

    @staticmethod
    def _stop(group: Group, running: set[Future[Path]]) -> None:
        """Waits until all have saved and stopped; every further Ctrl-C is passed on to them."""
        while True:
            try:
                group.interrupt()
                wait(running)
                return
            except KeyboardInterrupt:
                continue

    def _can_start(self, name: str, seed: int) -> bool:
        start = self.plan.entries[name].start
        links = [] if start is None else self.plan.chain(start)
        return all(self.is_trained(link, seed) for link in links if self.plan.entries[link].trained)

    def train(self, name: str, seed: int, group: Group | None = None, label: str = "") -> Path:
        """Weights of a training, begun, resumed or finished long ago.

        Args:
            name: Entry.
            seed: Of the training.
            group: Trainings that run at the same time.
            label: Put before what it prints.

        Raises:
            CommandError: If it fails.
        """
        run, entry = self.run_dir(name, seed), self.plan.entries[name]
        path = self.folder / "configs" / f"{name}-{self._recipe(name)}.yaml"
        with atomic_path(path) as temporary:
            temporary.write_text(yaml.safe_dump(self.config(name), sort_keys=False))
        options = ["--config", str(path), f"--seed_everything={seed}"]
        if entry.start is not None:
            options += ["--model.net.checkpoint", str(self.weights(entry.start, seed))]
        return finish_training(run, options, group, label)

    # ---- models and data -----------------------------------------------------------------------------------------

    def weights(self, name: str, seed: int) -> Path | None:
        """The file that holds an entry's weights; ``None`` where timm has them."""
        entry = self.plan.entries[name]
        if entry.trained:
            return finished_weights(self.run_dir(name, seed))
        if entry.start is not None:
            return self.weights(entry.start, seed)
        given = entry.net.get("checkpoint")
        return None if given is None else find_weights(str(given).replace("{seed}", str(seed)))

    def _source(self, name: str) -> Entry:
        """The entry that an entry's weights and data are taken from as they are."""
        entry = self.plan.entries[name]
        return self._source(entry.start) if entry.start is not None and not entry.trained else entry

    def data_section(self, point: Point) -> dict[str, Any]:
        """The data section of the point's training, or of the list, with the setting's changes."""
        trained = next((n for n in reversed(self.plan.chain(point.entry)) if self.plan.entries[n].trained), None)
        section = self.plan.data
        if trained is not None:
            run = self.run_dir(trained, point.seed)
            section = yaml.safe_load((run / RUN_CONFIG).read_text(encoding="utf-8"))["data"]
        return merged(section, {"init_args": point.setting.data})

    def data(self, point: Point) -> ResumableDataModule:
        """The data module that the point is evaluated with."""
        section = self.data_section(point)
        name = digest(section)
        if name not in self._modules:
            self._modules[name] = open_data(section, f"entry {point.entry}")
        return self._modules[name]

    def model(self, point: Point, data: ResumableDataModule) -> Any:
        """The point's model on its device, in evaluation mode.

        Raises:
            ValueError: If weights, setting and data do not fit together.
        """
        entry, weights = self._source(point.entry), self.weights(point.entry, point.seed)
        model: Any
        if "name" in entry.net:
            from mambascope.training.module import build_model

            args = {"num_classes": data.num_classes, "in_chans": data.in_chans, **entry.net.get("args", {})}
            checkpoint = None if weights is None else str(weights)
            model = build_model(ModelArgs(entry.net["name"], args, checkpoint), verbose=False)
        else:
            assert weights is not None
            model = load_model(weights)
        where = f"entries.{point.entry}, setting {point.setting.label!r}"
        try:
            model = _changed(model, point.setting.model)
            _resize(model, data.img_size)
            data.fit_channels(model.config.in_chans)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if model.num_classes != data.num_classes:
            raise ValueError(f"{where}: the model has {model.num_classes} classes, the data {data.num_classes}")
        return model.to(self.device).eval()

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def key(self, point: Point) -> str:
        """Names the weights, the setting and the data of a point."""
        weights = self.weights(point.entry, point.seed)
        source: Any
        if weights is None:
            source = self._source(point.entry).net
        elif (source := self._fingerprints.get(weights)) is None:
            source = self._fingerprints[weights] = fingerprint(weights)
        return digest(source, point.setting.model, self.data_section(point))

    def _path(self, point: Point, key: str) -> Path:
        return self.folder / "results" / f"{point.entry}-{key}-seed{point.seed}.npz"

    def known(self, point: Point) -> Result | None:
        """The result, if it is there."""
        path = self._path(point, self.key(point))
        return Result.read(path) if path.is_file() else None

    def evaluate(self, point: Point) -> Result:
        """The result of a point, which is made if it is not there."""
        if (result := self.known(point)) is not None:
            return result
        data = self.data(point)
        model = self.model(point, data)
        loader = data.val_dataloader()
        label = f"{point.entry}, {point.setting.label}"
        found = collect(model, loader, keep=1, progress=self.progress, description=label)
        costs = costs_of(model, tuple(found.images.shape[-2:]), batches=loader)
        key = self.key(point)
        result = Result(key, found.record, costs, isinstance(model, MambaScope), self._epochs(point))
        result.write(self._path(point, key))
        return result

    def _epochs(self, point: Point) -> int | None:
        """Epochs of all trainings in the chain, as the weights' files say."""
        total = 0
        for name in self.plan.chain(point.entry):
            entry, weights = self.plan.entries[name], self.weights(name, point.seed)
            if entry.trained or entry.net:
                known = None if weights is None else read_state_dict(weights)[1].get("epochs")
                if known is None:
                    return None
                total += int(known)
        return total

    def images(self, point: Point, index: np.ndarray) -> Tensor:
        """The evaluation images [K, C, H, W] at these places, in this order."""
        found: dict[int, Tensor] = {}
        wanted, seen = set(index.tolist()), 0
        for batch in self.data(point).val_dataloader():
            images, _ = unpack(batch)
            found |= {seen + i: image for i, image in enumerate(images) if seen + i in wanted}
            seen += len(images)
            if len(found) == len(wanted):
                break
        return torch.stack([found[i] for i in index.tolist()])


def _changed(model: Any, changes: dict[str, Any]) -> Any:
    """The model with fields of its config changed, and the same weights."""
    if not changes:
        return model
    if not isinstance(model, VisionMamba):
        raise ValueError(f"model changes are for Vim and MambaScope, not for {type(model).__name__}")
    config = asdict(model.config)
    changed = configured(model.config, {k: v for k, v in merged(config, changes).items() if k in changes})
    if meant := differences(config, asdict(changed)):
        raise ValueError(
            f"the weights were trained with {meant[0].argument}, got {meant[0].model!r}; an entry of its own can be "
            "trained with that"
        )
    new = architecture_of(changed).build(changed)
    try:
        new.load_state_dict(model.state_dict())
    except RuntimeError:
        raise ValueError(f"the weights do not fit the model with {changes}") from None
    new.description = model.description
    return new


def _resize(model: Any, size: tuple[int, int]) -> None:
    """Makes a model that is built for a size fit the images."""
    if tuple(model.config.image_hw) != tuple(size) and hasattr(model, "set_input_size"):
        model.set_input_size(tuple(size))
