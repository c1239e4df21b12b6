"""What a point gave on the evaluation images, kept in one file each, so that nothing is evaluated twice."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from mambascope.evaluation.sweep import StageRecord
from mambascope.models.cost import StageCost
from mambascope.utils import atomic_path


@dataclass(frozen=True)
class Result:
    """Answers and cost of a point.

    Attributes:
        key: Names the weights, the setting and the data.
        record: Answers on N images; for a one-stage model both stages are the same.
        costs: Per convention, multiply-adds of the stages.
        two_stage: Whether it is a MambaScope.
        epochs: Epochs of training behind the weights, with those of the entries they started from; ``None`` if unknown.
        threshold: η that the model would use; ``None`` for a one-stage model.
    """

    key: str
    record: StageRecord
    costs: dict[str, StageCost]
    two_stage: bool
    epochs: int | None
    threshold: float | None = None

    def write(self, path: Path) -> None:
        """Writes one ``.npz`` file, under a temporary name first."""
        facts = {
            "key": self.key,
            "costs": {name: asdict(cost) for name, cost in self.costs.items()},
            "two_stage": self.two_stage,
            "epochs": self.epochs,
            "threshold": self.threshold,
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
        costs = {name: StageCost(**cost) for name, cost in facts.pop("costs").items()}
        return cls(record=record, costs=costs, **facts)
