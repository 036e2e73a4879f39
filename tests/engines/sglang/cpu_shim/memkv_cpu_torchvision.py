"""Lets a torchvision wheel that was built for CUDA be imported beside a torch for CPUs.

SGLang's model configurations import torchvision, also for text models, and not every package index has a CPU build of
it. The compiled part of the default build does not load without CUDA, and then the import ends at two operators that
this part should have declared. So they are declared just before; nothing calls them. A `.pth` file imports this module
when Python starts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

OPERATORS = ("nms", "qnms")
ARGUMENTS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class DeclareOperators(MetaPathFinder):
    """Finds nothing; declares the operators when torchvision is looked for the first time."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        """Leaves the module to the finders that follow."""
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            # The declarations last as long as this object.
            self.library = torch.library.Library("torchvision", "FRAGMENT")
            for name in OPERATORS:
                self.library.define(name + ARGUMENTS)


FINDER = DeclareOperators()
sys.meta_path.insert(0, FINDER)
