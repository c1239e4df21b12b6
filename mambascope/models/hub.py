"""Models as folders and on the Hugging Face Hub: ``from_pretrained``, ``save_pretrained``, ``push_to_hub``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, hf_hub_download
from huggingface_hub.errors import HFValidationError

from mambascope.models.preprocessing import make_transform, stored_value_range
from mambascope.models.weights import WEIGHTS

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")

_CARD = """---
library_name: mambascope
pipeline_tag: image-classification
license: apache-2.0
tags:
- mambascope
- vision-mamba
---

# {title}

{architecture} with {parameters:,} parameters for images of {size}. Weights: `{weights}`.

```python
import mambascope

model = mambascope.load("{weights}")  # or {class_name}.from_pretrained("this folder or its hub id")
transform, labels = model.transform(), model.labels
```
{figures}"""


class HubMixin(ModelHubMixin):
    """Saves and loads a model together with its config, transform, labels, threshold and figures.

    Attributes:
        description: What the weights file says besides the config: ``labels``, ``transform``, ``report``, ...
    """

    description: dict[str, Any]

    @property
    def labels(self) -> list[str] | None:
        """Class names, if the file has them."""
        return self.description.get("labels")

    def transform(self, is_training: bool = False) -> Callable[[Any], Any]:
        """The preprocessing stored with the weights, else the model's default, as ``tools/predict.py`` does it.

        Args:
            is_training: With timm's random crop, flip and colours.

        Returns:
            From an image to the tensor [C, H, W] that the model takes. The image is a path, a Pillow image of any mode,
            or an array [H, W] or [H, W, C]; only by the path all of a 16-bit colour image, or of one with more than
            four channels, is seen.
        """
        return make_transform(self, is_training, stored_value_range(self))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Loads a folder written by :meth:`save_pretrained`, or a hub id.

        Args:
            pretrained_model_name_or_path: The folder, or the id on the hub.
            **kwargs: Of the hub: ``cache_dir``, ``force_download``, ``local_files_only``, ``revision``, ``token``.

        Raises:
            CheckpointError: If there is no such folder or hub model, or its weights belong to another class.
            ValueError: If another argument is given: sizes and options of the model come from its file.
        """
        from mambascope.models.checkpoint import CheckpointError

        unknown = sorted(set(kwargs) - set(_HUB_OPTIONS))
        if unknown:
            raise ValueError(
                f"from_pretrained does not accept {', '.join(unknown)}, only {', '.join(_HUB_OPTIONS)}; the model is "
                "as its file describes it, and alpha, threshold, input size or classifier are changed afterwards"
            )
        options: dict[str, Any] = {**dict.fromkeys(_HUB_OPTIONS), "force_download": False, "local_files_only": False}
        try:
            # not through the mixin's own method: it would believe what a config.json says
            return cls._from_pretrained(model_id=str(pretrained_model_name_or_path), **{**options, **kwargs})
        except CheckpointError:
            raise
        except (OSError, HFValidationError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{pretrained_model_name_or_path} is neither a folder with {WEIGHTS} nor a model on the hub ({reason})"
            ) from None

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **model_kwargs: Any,  # none: the weights file says all
    ) -> Any:
        from mambascope.models.checkpoint import CheckpointError, load_model

        path = Path(model_id) / WEIGHTS
        if not Path(model_id).is_dir():
            path = Path(
                hf_hub_download(
                    model_id,
                    WEIGHTS,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            )
        model = load_model(path)
        if not isinstance(model, cls):
            raise CheckpointError(f"{path} holds a {type(model).__name__}, not a {cls.__name__}")
        return model

    def _save_pretrained(self, save_directory: Path) -> None:
        from mambascope.models.checkpoint import describe, save_safetensors
        from mambascope.utils import atomic_path

        save_safetensors(self, save_directory / WEIGHTS)
        with atomic_path(save_directory / "config.json") as temporary:
            temporary.write_text(json.dumps(describe(self), indent=2))
        with atomic_path(save_directory / "README.md") as temporary:
            temporary.write_text(self._card(save_directory.resolve().name), encoding="utf-8", errors="replace")

    def _card(self, title: str) -> str:
        """The model card, with the figures of the report if there is one."""
        rows = self.description.get("report", {}).get("table", [])
        figures = ""
        if rows:
            columns = list(rows[0])
            lines = [columns, ["---"] * len(columns), *([str(row.get(c, "")) for c in columns] for row in rows)]
            figures = "\n## Figures\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
        image_hw = getattr(self.config, "image_hw", None)  # type: ignore[attr-defined]
        return _CARD.format(
            title=title,
            architecture=type(self).__name__,
            class_name=type(self).__name__,
            parameters=sum(p.numel() for p in self.parameters()),  # type: ignore[attr-defined]
            size="any size" if image_hw is None else "{}x{} pixels".format(*image_hw),
            weights=WEIGHTS,
            figures=figures,
        )
