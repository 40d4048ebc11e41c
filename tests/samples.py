"""Small image data sets, made up and written to disk in the layouts that users have."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = ("cat", "dog", "owl")


def pixels(n, height=6, width=5, channels=3, seed=0):
    """Return uint8 [n, H, W, C]."""
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, channels), dtype=np.uint8)


def encode(image, kind="PNG", **options):
    """Return the bytes of one image [H, W, C]."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(file, kind, **options)
    return file.getvalue()


def write_parquet(file, images, labels, *, image="image", label="label", classes=CLASSES, struct=True):
    """Write encoded images in the layout of the hub; without classes, without its metadata."""
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()}) if struct else pa.binary()
    column = pa.array([{"bytes": data, "path": None} for data in images] if struct else images, kind)
    features = {image: {"_type": "Image"}, label: {"names": classes, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if classes else None
    schema = pa.schema({image: kind, label: pa.int64()}, metadata)
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table([column, pa.array(labels, pa.int64())], schema), file)


def write_folder(root, images, labels, suffix="png"):
    """Write images [n, H, W, C] as root/<class>/<number>.png."""
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        file = root / CLASSES[label] / f"{i:03}.{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(image))
