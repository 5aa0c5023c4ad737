"""Quantised models for transformers: ``from_pretrained(..., quantization_config=FusedOpsConfig("int8"))``.

The classes of transformers from which ours must descend are joined to them when they are first used, so that importing
this module does not import transformers.
"""

import functools

from fusedops.convert.schemes import SCHEMES, SPARSITY, find_scheme, sparse_scheme

METHOD = "fusedops"  # what the config.json of a checkpoint names
OLDEST = 5  # transformers converts weights while it loads them from 5.0 on


class FusedOpsConfig:
    """Quantise, or prune, the linear layers of a model of transformers while its checkpoint is read.

    ``AutoModelForCausalLM.from_pretrained(name, quantization_config=FusedOpsConfig("int8"))`` gives the model that
    `fusedops.quantize_` makes of the loaded one, bit for bit, without ever holding all of its float weights.
    ``save_pretrained`` writes codes and scales, and ``from_pretrained`` reads them back in any process that has
    imported fusedops, before or after transformers. A process that has not fails: the codes have a shape that fits no
    other layer.

    Args:
        scheme: ``"int8"``, ``"fp8"``, ``"int8-weight-only"``, ``"fp8-weight-only"`` or ``"int4-weight-only"``; with
            `sparsity` ``"int8"``, ``"fp8"`` or None.
        group_size: Columns of a row that share a scale: 32, 64 or 128, for weight-only schemes. None: 32 for int4,
            otherwise one scale for each row.
        modules_to_not_convert: Names of modules to leave alone, each a whole name, its beginning, its end or a regular
            expression from its beginning, as transformers reads them. None: the output embeddings. Layers with a tied
            weight are always left alone.
        sparsity: ``"2:4"`` keeps 2 in every 4 weights, the larger ones where the checkpoint has more, as `sparsify_`
            does before `quantize_`. None keeps all.
        quant_method: What a checkpoint says of itself; always ``"fusedops"``.

    Raises:
        ValueError: no such scheme or sparsity, or it does not take this group size.
        TypeError: modules_to_not_convert is not a list of names.
        NotImplementedError: transformers is older than 5.0.
    """

    def __new__(cls, *args, **options):
        return object.__new__(config_class(cls))

    def __init__(self, scheme=None, group_size=None, modules_to_not_convert=None, quant_method=METHOD, sparsity=None):
        _check_transformers()
        if quant_method != METHOD:
            raise ValueError(f"FusedOpsConfig: quant_method must be {METHOD!r}, got {quant_method!r}")
        names = modules_to_not_convert
        if names is not None and not (
            isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
        ):
            raise TypeError(f"FusedOpsConfig: modules_to_not_convert must be None or a list of names, got {names!r}")
        options = found_scheme("FusedOpsConfig", scheme, group_size, sparsity).options
        self.quant_method = METHOD
        self.scheme = scheme
        self.sparsity = sparsity
        self.group_size = options.get("group_size")  # written out, so that a checkpoint says what it holds
        self.modules_to_not_convert = None if names is None else list(names)

    def __eq__(self, other):
        return isinstance(other, FusedOpsConfig) and self.to_dict() == other.to_dict()

    __hash__ = None

    def __reduce__(self):
        return FusedOpsConfig, (self.scheme, self.group_size, self.modules_to_not_convert, METHOD, self.sparsity)

    def found_scheme(self):
        """The Scheme that it stands for."""
        return found_scheme("FusedOpsConfig", self.scheme, self.group_size, self.sparsity)


def found_scheme(op, scheme, group_size, sparsity):
    """The Scheme of a config's options. ValueError: there is none, or they do not go together."""
    if sparsity is None:
        return find_scheme(op, scheme, group_size)
    if sparsity != SPARSITY:
        raise ValueError(f"{op}: sparsity must be None or {SPARSITY!r}, got {sparsity!r}")
    if group_size is not None:
        raise ValueError(f"{op}: group_size must be None with sparsity, got {group_size!r}")
    formats = [name for name, found in SCHEMES.items() if found.sparse_format is not None]
    if scheme is not None and scheme not in formats:
        known = ", ".join(map(repr, formats))
        raise ValueError(f"{op}: scheme must be None or one of {known} with sparsity {SPARSITY!r}, got {scheme!r}")
    return sparse_scheme(format=None if scheme is None else SCHEMES[scheme].sparse_format)


@functools.cache
def config_class(cls):
    from transformers.utils.quantization_config import QuantizationConfigMixin

    return join(cls, QuantizationConfigMixin)


def join(cls, base):
    """A class of ours that also descends from one of transformers."""
    return cls if issubclass(cls, base) else type(cls.__name__, (cls, base), {"__module__": cls.__module__})


def _check_transformers():
    import transformers

    if int(transformers.__version__.split(".")[0]) < OLDEST:
        raise NotImplementedError(
            f"FusedOpsConfig: transformers must be {OLDEST}.0 or newer, got {transformers.__version__}"
        )
