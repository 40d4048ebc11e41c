"""All plots below a folder of runs on one picture, to be looked at: `python contact_sheet.py runs sheet.png [WIDTH]`.

Plots are WIDTH pixels wide (600), as on a page; of plots with one name the first two are shown.
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw


def main(runs: str, sheet: str, width: str = "600") -> None:
    size = int(width)
    files = sorted(Path(runs).glob("*/*/plots/*.png"))
    names = [file.name for file in files]
    shown = [file for place, file in enumerate(files) if names[:place].count(file.name) < 2]
    across = 1920 // size
    pictures = [Image.open(file).convert("RGB") for file in shown]
    pictures = [picture.resize((size, picture.height * size // picture.width), Image.LANCZOS) for picture in pictures]
    pitch = max(picture.height for picture in pictures) + 20
    canvas = Image.new("RGB", (across * size, -(-len(shown) // across) * pitch), "#303134")
    for place, (file, picture) in enumerate(zip(shown, pictures, strict=True)):
        x, y = place % across * size, place // across * pitch
        canvas.paste(picture, (x, y + 20))
        ImageDraw.Draw(canvas).text((x + 4, y + 4), "/".join(file.parts[-4:]), "white")
    canvas.save(sheet)


if __name__ == "__main__":
    main(*sys.argv[1:])
