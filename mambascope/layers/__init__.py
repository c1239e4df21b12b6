"""Building blocks of the encoders: norm, mixer, block, patch and position embedding, stem, feature reuse, rows."""

from mambascope.layers.block import VimBlock
from mambascope.layers.look import LookOffsets
from mambascope.layers.mixer import BidirectionalMamba
from mambascope.layers.norm import RMSNorm
from mambascope.layers.patch_embed import PatchEmbed, pad_to
from mambascope.layers.pos_embed import cls_index, insert_cls, remove_cls, resample_pos_embed
from mambascope.layers.reuse import FeatureReuse
from mambascope.layers.rows import flat_rows, gather_rows
from mambascope.layers.stem import ConvStem, conv_half, stem_convs
from mambascope.layers.trace import BlockTrace

__all__ = [
    "BidirectionalMamba",
    "BlockTrace",
    "ConvStem",
    "FeatureReuse",
    "LookOffsets",
    "PatchEmbed",
    "RMSNorm",
    "VimBlock",
    "cls_index",
    "conv_half",
    "flat_rows",
    "gather_rows",
    "insert_cls",
    "pad_to",
    "remove_cls",
    "resample_pos_embed",
    "stem_convs",
]
