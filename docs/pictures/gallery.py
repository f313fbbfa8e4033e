"""Makes the pictures of the documentation, small enough for a page: ``python docs/pictures/gallery.py``, by hand.

Runs the demo and every example in full, some minutes, and keeps what they draw at 1600 pixels' width and 256 colours.
"""

import importlib
import pkgutil
import tempfile
from pathlib import Path

from PIL import Image

from jactri import examples
from jactri.demo import run

HERE = Path(__file__).parent
WIDTH = 1600


def shrink(picture: Path, name: str) -> None:
    """Writes ``picture`` to ``name`` beside this file, at most `WIDTH` wide, with a palette."""
    image = Image.open(picture).convert("RGB")
    if image.width > WIDTH:
        image = image.resize((WIDTH, round(image.height * WIDTH / image.width)), Image.LANCZOS)
    image.quantize(256, dither=Image.Dither.NONE).save(HERE / name, optimize=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for module in pkgutil.iter_modules(examples.__path__, "jactri.examples."):
            if not module.name.endswith(".common"):
                importlib.import_module(module.name).main(["--output", folder])
        run(Path(folder))
        for picture in Path(folder).glob("*.png"):
            shrink(picture, picture.name)


if __name__ == "__main__":
    main()
