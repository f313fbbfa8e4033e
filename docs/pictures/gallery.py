"""Makes the pictures of the documentation, small enough for a page: ``python docs/pictures/gallery.py``, by hand.

Runs the demo and every example in full, some minutes, and keeps what they draw at 1200 pixels' width and 256 colours.
"""

import dataclasses
import importlib
import pkgutil
import tempfile
from pathlib import Path

from PIL import Image

from jactri import examples
from jactri.demo import run
from jactri.examples import kalman

HERE = Path(__file__).parent
WIDTH = 1200


def shrink(picture: Path, name: str, width: int = WIDTH) -> None:
    """Writes ``picture`` to ``name`` beside this file, at most ``width`` wide, with a palette."""
    image = Image.open(picture).convert("RGB")
    if image.width > width:
        image = image.resize((width, round(image.height * width / image.width)), Image.LANCZOS)
    # of the most different colours, not the most frequent ones: a colour bar is small
    few = image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(HERE / name, optimize=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for module in pkgutil.iter_modules(examples.__path__, "jactri.examples."):
            if not module.name.endswith(".common"):
                importlib.import_module(module.name).main(["--output", folder])
        # times of one machine are no part of a page
        found = dataclasses.replace(kalman.main(["--no-plot"]), microseconds={})
        kalman.draw(found).savefig(Path(folder) / "kalman.png", dpi=110)
        run(Path(folder))
        for picture in Path(folder).glob("*.png"):
            shrink(picture, picture.name)


if __name__ == "__main__":
    main()
