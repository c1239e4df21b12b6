"""Ids and names of COCO's 80 categories (the numbers between 1 and 90 that the data set uses)."""

from __future__ import annotations

_NAMES = {
    1: "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant",
    13: "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe",
    27: "backpack,umbrella",
    31: "handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,"
    "tennis racket,bottle",
    46: "wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,"
    "chair,couch,potted plant,bed",
    67: "dining table",
    70: "toilet",
    72: "tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator",
    84: "book,clock,vase,scissors,teddy bear,hair drier,toothbrush",
}

COCO_CATEGORIES: dict[int, str] = {
    first + offset: name for first, names in _NAMES.items() for offset, name in enumerate(names.split(","))
}
