"""COCO's categories numbered by their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmdet.evaluation.metrics import coco_metric


class CategoriesByName(COCO):
    """Gives category ids in the order of the names asked for, which is that of the config's classes.

    mmdet's own gives those that the file has, in the file's order, and takes their places for the classes' numbers:
    another order, or a file with some of the classes only, shifts every label.
    """

    def get_cat_ids(self, cat_names: Sequence[str] = (), sup_names: Any = (), cat_ids: Any = ()) -> list[int]:
        """One id for each name; a name that the file does not have gets an id that no box has."""
        if not cat_names or len(sup_names) or len(cat_ids):
            return super().get_cat_ids(cat_names, sup_names, cat_ids)
        numbers = {category["name"]: number for number, category in self.cats.items()}
        for name in cat_names:
            if name not in numbers:
                numbers[name] = min([0, *self.cats]) - 1
                self.cats[numbers[name]] = {"id": numbers[name], "name": name}
        return [numbers[name] for name in cat_names]


def number_by_name() -> None:
    """Makes mmdet's COCO data set and metric number classes by name."""
    CocoDataset.COCOAPI = CategoriesByName
    coco_metric.COCO = CategoriesByName
