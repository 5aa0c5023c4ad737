"""Makes the quantiser known to transformers in every process that imports both packages, in either order."""

import importlib.abc
import importlib.util
import sys

from fusedops.patch.quantizer import METHOD, FusedOpsConfig, config_class
from fusedops.patch.quantizer_loading import quantizer_class

REGISTRY = "transformers.quantizers.auto"


def register_with_transformers():
    """Register now if transformers has its registry loaded, otherwise as soon as it loads it.

    `from_pretrained` must know the quantiser before it meets a checkpoint of ours, and importing fusedops must not
    import transformers.
    """
    if REGISTRY in sys.modules:
        _register(sys.modules[REGISTRY])
    else:
        sys.meta_path.insert(0, _WhenLoaded())


class _WhenLoaded(importlib.abc.MetaPathFinder):
    """Finds the registry as everybody else does, and registers when it has been executed."""

    searching = False

    def find_spec(self, name, path=None, target=None):
        if name != REGISTRY or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register
        return spec


def _register(registry):
    """Add our config and quantiser to a registry that has none of this name."""
    if hasattr(registry, "register_quantizer") and METHOD not in registry.AUTO_QUANTIZER_MAPPING:
        registry.register_quantization_config(METHOD)(config_class(FusedOpsConfig))
        registry.register_quantizer(METHOD)(quantizer_class())
