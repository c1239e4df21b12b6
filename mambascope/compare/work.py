"""Trains and evaluates the entries of a list; every finished piece is a file and is not made again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from mambascope.compare.changes import rebuilt, resized, with_control
from mambascope.compare.lists import CELLS, Comparison, merged
from mambascope.compare.results import Result
from mambascope.compare.sources import Point, Source, digest, fingerprint, make_source
from mambascope.compare.trainings import Training, Trainings
from mambascope.data.datamodule import ResumableDataModule
from mambascope.data.digits_datamodule import ScopeDigitsDataModule
from mambascope.data.errors import DataError
from mambascope.data.modules import open_data, run_config, run_module
from mambascope.evaluation.collect import collect
from mambascope.models.checkpoint import load_model, read_state_dict
from mambascope.models.flop_count import costs_of
from mambascope.models.two_stage import is_two_stage
from mambascope.models.weights import RUN_CONFIG
from mambascope.training.args import ModelArgs
from mambascope.utils import unpack

DEFAULT_LENGTH = 1000  # validation images where the data section does not say it
SET_STRIDE = 100_000  # images of one seed do not reach into those of the next


class Work:
    """The evaluations of a list in one folder.

    Args:
        plan: The list.
        folder: Where its trainings and results are kept.
        device: Of evaluation and timing.
        progress: Whether to show progress bars.

    Attributes:
        trainings: What the list trains.
    """

    def __init__(self, plan: Comparison, folder: Path, device: torch.device, progress: bool = False) -> None:
        self.plan, self.folder, self.device, self.progress = plan, folder, device, progress
        self.trainings = Trainings(plan, folder)
        self._modules: dict[str, ResumableDataModule] = {}
        self._fingerprints: dict[Path, str] = {}
        self._sources: dict[tuple[str, str], Source] = {}
        self._sections: dict[Path, dict[str, Any]] = {}

    def points(self) -> Iterator[Point]:
        """Everything that is evaluated; weights that do not depend on the seed once, unless seeds have own images."""
        for name, entry in self.plan.entries.items():
            for setting in entry.settings:
                several = self.plan.image_sets or make_source(self.plan, name, setting).seeded
                for seed in self.plan.seeds if several else self.plan.seeds[:1]:
                    yield Point(name, setting, seed)

    def source(self, point: Point) -> Source:
        """Where the point's weights come from."""
        name = point.entry, point.setting.label
        if name not in self._sources:
            self._sources[name] = make_source(self.plan, point.entry, point.setting)
        return self._sources[name]

    def weights(self, point: Point) -> Path | None:
        """The file that holds the point's weights; ``None`` where timm has them."""
        weights = self.trainings.weights(self.source(point), point.seed)
        if weights is not None and not weights.is_file():
            raise ValueError(f"entries.{point.entry}: {weights} does not exist")
        return weights

    # ---- models and data -----------------------------------------------------------------------------------------

    def data_section(self, point: Point) -> dict[str, Any]:
        """The data section of the point's training, or of the list or the weights' run, with the setting's changes."""
        source = self.source(point)
        if source.trained:
            config = self.trainings.run_dir(Training(source, point.seed)) / RUN_CONFIG
            section = yaml.safe_load(config.read_text(encoding="utf-8"))["data"]
        elif "class_path" in self.plan.data:
            section = self.plan.data
        else:
            section = merged(self._run_section(point), self.plan.data)
        section = merged(section, {"init_args": point.setting.data})
        if not self._image_set(point):
            return section
        if str(section["class_path"]).rpartition(".")[2] != ScopeDigitsDataModule.__name__:
            raise DataError(f"image_sets need ScopeDigits; entries.{point.entry} has {section['class_path']}")
        length = section["init_args"].get("val_length", DEFAULT_LENGTH)
        return merged(section, {"init_args": {"val_length": SET_STRIDE * point.seed, "calibration_length": length}})

    def _run_section(self, point: Point) -> dict[str, Any]:
        """The data section of the run that the point's weights lie in."""
        weights = self.weights(point)
        config = None if weights is None else run_config(weights)
        if config is None:
            raise DataError(f"entries.{point.entry}: {weights} does not lie in a run; the list needs data")
        if config not in self._sections:
            run_module(config)  # refuses what weights from elsewhere must not name
            self._sections[config] = yaml.safe_load(config.read_text(encoding="utf-8"))["data"]
        return self._sections[config]

    def _image_set(self, point: Point) -> bool:
        """Whether the point has images of its seed; those of seed 0 are the data's first ones."""
        return self.plan.image_sets and point.seed > 0 and not self.source(point).trained

    def data(self, point: Point) -> ResumableDataModule:
        """The data module that the point is evaluated with."""
        section = self.data_section(point)
        name = digest(section)
        if name not in self._modules:
            self._modules[name] = open_data(section, f"entry {point.entry}")
        return self._modules[name]

    def loader(self, point: Point) -> Iterable[Any]:
        """The point's evaluation images and labels."""
        data = self.data(point)
        images = data.calibration_dataloader() if self._image_set(point) else data.val_dataloader()
        assert images is not None
        return images

    def images(self, point: Point, index: np.ndarray) -> Tensor:
        """The evaluation images [K, C, H, W] at these places, in this order."""
        rows: dict[int, Tensor] = {}
        places, seen = set(index.tolist()), 0
        for batch in self.loader(point):
            images, _ = unpack(batch)
            rows |= {seen + i: image for i, image in enumerate(images) if seen + i in places}
            seen += len(images)
            if len(rows) == len(places):
                break
        return torch.stack([rows[i] for i in index.tolist()])

    def model(self, point: Point, data: ResumableDataModule) -> Any:
        """The point's model on its device, in evaluation mode.

        Raises:
            ValueError: If weights, setting and data do not fit together.
        """
        net, weights = self.source(point).net, self.weights(point)
        model: Any
        if "name" in net:
            from mambascope.training.module import build_model

            args = {"num_classes": data.num_classes, "in_chans": data.in_chans, **net.get("args", {})}
            checkpoint = None if weights is None else str(weights)
            model = build_model(ModelArgs(net["name"], args, checkpoint), verbose=False)
        else:
            assert weights is not None
            model = load_model(weights)
        where = f"entries.{point.entry}, setting {point.setting.label!r}"
        try:
            model = resized(rebuilt(model, point.setting.model), data.img_size)
            data.fit_channels(model.config.in_chans)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if model.num_classes != data.num_classes:
            raise ValueError(f"{where}: the model has {model.num_classes} classes, the data {data.num_classes}")
        return with_control(model.to(self.device).eval(), point.setting.cells, point.seed)

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def key(self, point: Point) -> str:
        """Names the weights, the setting and the data of a point."""
        weights, setting = self.weights(point), point.setting
        name: Any
        if weights is None:
            name = self.source(point).net
        elif (name := self._fingerprints.get(weights)) is None:
            name = self._fingerprints[weights] = fingerprint(weights)
        control = [] if setting.cells == CELLS[0] else [setting.cells, point.seed]
        return digest(name, setting.model, self.data_section(point), *control)

    def _path(self, point: Point, key: str) -> Path:
        return self.folder / "results" / f"{point.entry}-{key}-seed{point.seed}.npz"

    def stored(self, point: Point) -> Result | None:
        """The result, if it is there."""
        path = self._path(point, self.key(point))
        return Result.read(path) if path.is_file() else None

    def evaluate(self, point: Point) -> Result:
        """The result of a point, which is made if it is not there."""
        if (result := self.stored(point)) is not None:
            return result
        data, loader = self.data(point), self.loader(point)
        model = self.model(point, data)
        label = f"{point.entry}, {point.setting.label}"
        collected = collect(model, loader, keep=1, progress=self.progress, description=label)
        costs = costs_of(model, tuple(collected.images.shape[-2:]), batches=loader)
        threshold = model.threshold if is_two_stage(model) else None
        key = self.key(point)
        result = Result(key, collected.record, costs, is_two_stage(model), self._epochs(point), threshold)
        result.write(self._path(point, key))
        return result

    def _epochs(self, point: Point) -> int | None:
        """Epochs of all trainings in the chain, as the weights' files say."""
        total = 0
        for link in self.source(point).chain():
            weights = self.trainings.weights(link, point.seed)
            epochs = None if weights is None else read_state_dict(weights)[1].get("epochs")
            if epochs is None:
                return None
            total += int(epochs)
        return total
