"""Building blocks of the encoders: norm, mixer, block, patch and position embedding, stem, feature reuse, rows."""

from mambascope.layers.block import VimBlock
from mambascope.layers.cell_pool import CellPool
from mambascope.layers.mixer import BidirectionalMamba, ScoreOptions
from mambascope.layers.norm import RMSNorm
from mambascope.layers.patch_embed import PatchEmbed, pad_to
from mambascope.layers.pos_embed import cls_index, insert_cls, remove_cls, resample_pos_embed
from mambascope.layers.registers import insert_registers, remove_registers
from mambascope.layers.reuse import FeatureReuse
from mambascope.layers.rows import flat_rows, gather_rows
from mambascope.layers.stem import ConvStem, conv_half, stem_convs

__all__ = [
    "BidirectionalMamba",
    "CellPool",
    "ConvStem",
    "FeatureReuse",
    "PatchEmbed",
    "RMSNorm",
    "ScoreOptions",
    "VimBlock",
    "cls_index",
    "conv_half",
    "flat_rows",
    "gather_rows",
    "insert_cls",
    "insert_registers",
    "pad_to",
    "remove_cls",
    "remove_registers",
    "resample_pos_embed",
    "stem_convs",
]
