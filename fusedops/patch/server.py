"""transformers' server on patched models."""

import contextlib

from fusedops.patch.continuous import unsupported


@contextlib.contextmanager
def serving(**options):
    """Inside, every model that transformers' server loads is patched.

    ``with serving(): transformers.cli.serve.Serve("org/model", continuous_batching=True)`` is ``transformers serve
    org/model --continuous-batching`` on our operators. The server loads its models by name, so there is no instance to
    patch before: the method of its `ModelManager` is replaced as long as the context lasts. Models that it has loaded
    stay patched.

    Args:
        **options: As in `fusedops.patch.patch`.

    Raises:
        NotImplementedError: continuous batching is not supported with this transformers.
    """
    reason = unsupported()
    if reason is not None:
        raise NotImplementedError(f"serving: no continuous batching on patched models: {reason}")
    from transformers.cli.serving.model_manager import ModelManager

    from fusedops.patch import patch

    load = ModelManager._load_model

    def load_patched(manager, *args, **kwargs):
        model = load(manager, *args, **kwargs)
        patch(model, **options)
        return model

    ModelManager._load_model = load_patched
    try:
        yield
    finally:
        ModelManager._load_model = load
