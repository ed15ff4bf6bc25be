"""The implementations that ours are measured against, imported as they are."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def import_open_clip() -> ModuleType:
    """open_clip itself. Its models, losses and tokenizer need no torchvision, its transforms do:
    where torchvision cannot be installed, the tests' stand-in gives the names it imports."""
    if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "train"))
        import torchvision_stand_in

        torchvision_stand_in.install()
    import open_clip

    module: ModuleType = open_clip
    return module
