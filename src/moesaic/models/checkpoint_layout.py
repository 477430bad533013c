"""Which files a checkpoint is made of, and where each of its tensors lies: decided once, from names and headers.

An index says which files hold tensors; without one, all safetensors files beside the config do. They may lie in
sub-folders that the index names. What could be read in two ways is refused: a tensor in two files, a whole model beside
shards, an adapter that waits to be merged, a link whose file is gone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from moesaic.core.errors import ArtifactError
from moesaic.core.json_text import parse_json, read_text
from moesaic.models import layout
from moesaic.models.families.family import MXFP4_BLOCK, TensorSpec
from moesaic.models.safetensors_files import StoredTensor, read_header

INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_ADAPTERS = ("adapter_config.json", "adapter_model.*", "adapters.safetensors")
_COMPANIONS = ("", ".json", ".jsonl", ".jinja", ".txt", ".md", ".py", ".model", ".tiktoken", ".bpe", ".yaml")
"""The endings of files that describe weights, or come with them: tokenizer, template, licence, records."""
_QUANTIZED = (
    *("_scale", "_scale_inv", "_scales", "zero_point", "qweight", "qzeros", "g_idx", ".scales", ".biases"),
    *("_packed", ".absmax", ".quant_map", ".SCB", "bitsandbytes__nf4", "bitsandbytes__fp4"),
)
"""How the names of tensors end that other tensors need to be understood: of GPTQ, AWQ, FP8, MLX, bitsandbytes."""
_UNFINISHED = ".aria2"
"""What stands behind a file's name while it is being downloaded by a program that gives it its full size first."""
_FLOATS = ("F64", "F32", "F16", "BF16")
_BYTES = "U8"
EXPONENTS = "F8_E8M0"
"""What some call the type of MXFP4's scales; their bytes are the same."""
_SCALES = (_BYTES, EXPONENTS)


def companions(directory: Path) -> list[Path]:
    """The files beside a checkpoint's weights that belong to it; sub-folders and hidden files do not."""
    return sorted(
        path
        for path in directory.iterdir()
        if path.is_file() and path.suffix in _COMPANIONS and not path.name.startswith(".") and path.name != INDEX
    )


def locate_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by name, those that nothing uses included.

    Raises:
        ArtifactError: if the files contradict one another, or one is missing, damaged or pickled.
    """
    _check_folder(directory)
    listed = _read_index(directory)
    shards = [directory / file for file in sorted(set(listed.values()))] or _beside(directory)
    if not shards:
        raise ArtifactError(_no_weights(directory))
    tensors: dict[str, StoredTensor] = {}
    for path in shards:
        if not path.exists():
            what = f"is a link to {path.readlink()}, which does not exist" if path.is_symlink() else "is missing"
            raise ArtifactError(f"{path}, which {INDEX} lists, {what}; copy or download it")
        if (sign := path.with_name(path.name + _UNFINISHED)).exists():
            raise ArtifactError(f"{path} is not all there yet, by {sign.name} beside it; finish its download")
        for name, tensor in read_header(path).items():
            if name in tensors:
                raise ArtifactError(f"{name} lies in {tensors[name].file} and in {path}; remove one of them")
            tensors[name] = tensor
    for name, file in listed.items():
        if name not in tensors or tensors[name].file != directory / file:
            raise ArtifactError(f"{directory / INDEX} lists {name} in {file}, which does not hold it")
    return tensors


def _beside(directory: Path) -> list[Path]:
    """The safetensors files beside a config; hidden ones are notes of file systems, such as ``._model.safetensors``."""
    return sorted(path for path in directory.glob("*.safetensors") if not path.name.startswith("."))


def _check_folder(directory: Path) -> None:
    """Refuse links without a file, folders in a file's place, adapters, and names that are no text."""
    for path in sorted(directory.iterdir()):
        if path.is_symlink() and not path.exists():
            raise ArtifactError(
                f"{path} is a link to {path.readlink()}, which does not exist; download the model again or remove it"
            )
        if any(path.match(pattern) for pattern in _ADAPTERS):
            raise ArtifactError(f"{path} is of an adapter, which would be left out; merge it into the weights first")
        if path.suffix in _COMPANIONS[1:] and not path.is_file():
            raise ArtifactError(f"{path} is no file, and by its name it must be one; download it again or remove it")
        if path.suffix in (*_COMPANIONS, ".safetensors") and not _is_text(path.name):
            raise ArtifactError(f"{directory} holds a file whose name is not UTF-8, {path.name!a}; rename it")


def _is_text(name: str) -> bool:
    """Whether a file's name is text, as lists of files hold it, and not bytes that are none."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_index(directory: Path) -> dict[str, str]:
    """File by tensor, as the index lists them; empty if there is none."""
    index = directory / INDEX
    if not index.exists():
        return {}
    listed = read_weight_map(read_text(index).encode(), index)
    for file in set(listed.values()):
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise ArtifactError(f"{index} lists {file}, which is outside of the model's directory")
        if not file.endswith(".safetensors"):
            raise ArtifactError(f"{index} lists {file}; only safetensors files are read")
    if (directory / _WHOLE).exists() and _WHOLE not in listed.values():
        raise ArtifactError(
            f"{directory} holds {_WHOLE} and an index of other files; engines read the one or the other, so remove one"
        )
    return listed


def read_weight_map(content: bytes, place: object) -> dict[str, str]:
    """File by tensor, as an index lists them.

    Raises:
        ArtifactError: if it does not.
    """
    index = parse_json(content, place)
    listed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise ArtifactError(f"{place} has no weight_map from tensors to files; remove it if one file holds the model")
    return listed


def _no_weights(directory: Path) -> str:
    message = f"{directory} holds no safetensors files"
    if pickles := [path.name for pattern in _PICKLES for path in directory.glob(pattern)]:
        return f"{message}; {pickles[0]} is a pickle, which can run code: convert it to safetensors"
    if packed := [path.name for path in directory.glob("*.gguf")]:
        return f"{message}; {packed[0]} is of llama.cpp: give the model that it was made from"
    if below := sorted(directory.glob("*/*.safetensors")):
        if below[0].parent.name == "original":
            return f"{message} beside its config; original/ has them in a format of its own: download the others"
        return f"{message} beside its config, and no {INDEX} that would list {below[0].relative_to(directory)}"
    return message


def check_tensors(
    config: Mapping[str, object], expected: Mapping[str, TensorSpec], tensors: Mapping[str, StoredTensor]
) -> None:
    """Check that a checkpoint has the tensors that its config asks for, and none that contradicts it.

    Raises:
        ArtifactError: that names the first tensor that is missing, or of another shape or type.
    """
    layers, extra_key = int(str(config["num_hidden_layers"])), layout.family_of(config).extra_layers_key
    extra = range(layers, layers + int(str(config[extra_key])) if extra_key else layers)
    others = sorted(set(tensors) - set(expected) - set(layout.kv_scale_names(layers)))
    if quantized := next((name for name in others if name.endswith(_QUANTIZED)), None):
        raise ArtifactError(
            f"{tensors[quantized].file.name}: {quantized} is of a quantization, or a KV cache, that Moesaic does not "
            "read under this name; give the model without, in BF16"
        )
    if missing := sorted(set(expected) - set(tensors)):
        raise ArtifactError(f"{len(missing)} tensors are missing, the first is {missing[0]}{_clue(missing, others)}")
    for name, spec in expected.items():
        tensor = tensors[name]
        if tensor.shape != spec.shape:
            raise ArtifactError(
                f"{tensor.file.name}: {name} has shape {tensor.shape}, "
                f"the config asks for {spec.shape}; config and weights are not of the same model"
            )
        allowed = _FLOATS if spec.dtype != _BYTES else _SCALES if name.endswith("_scales") else (_BYTES,)
        if tensor.dtype not in allowed:
            types = ", ".join(allowed)
            raise ArtifactError(f"{tensor.file.name}: {name} is of type {tensor.dtype}; allowed are {types}")
    for name in others:
        if _layer_of(name) not in extra and (contradiction := _contradicts(name, layers)):
            raise ArtifactError(f"{tensors[name].file.name}: {name} {contradiction}")


def _clue(missing: Sequence[str], others: Sequence[str]) -> str:
    """What there is instead of tensors that are missing."""
    if list(missing) == [layout.HEAD]:
        return "; a model whose embedding is its head as well is not read: save it with a head of its own"
    alike = [name for name in others if name.endswith(missing[0]) or missing[0].endswith(name)]
    return f"; there is {(alike or others)[0]}, which nothing here reads" if others else ""


def _layer_of(name: str) -> int | None:
    number = name.removeprefix("model.layers.").split(".")[0]
    return int(number) if name.startswith("model.layers.") and number.isdigit() else None


def _contradicts(name: str, layers: int) -> str | None:
    """Why a tensor that the layout does not have cannot be left out."""
    if (number := _layer_of(name)) is not None and number >= layers:
        return f"is of layer {number}; the config has layers 0 to {layers - 1}"
    if "lora_" in name:
        return "is of an adapter; merge it into the weights first"
    if layout.is_expert_indexed(name):
        return "says once more what other tensors say of these experts; keep either packed or plain weights"
    return None


def is_packed(config: Mapping[str, object], tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether the experts are in MXFP4, on which tensors and ``quantization_config`` must agree, and the family.

    Raises:
        ArtifactError: if they do not, or the method is another.
    """
    packed = [name for name in tensors if name.endswith("_blocks")]
    quantization, family = config.get("quantization_config"), layout.family_of(config)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if not family.not_packed and (packed or quantization is not None):
        raise ArtifactError(
            f"{packed[0] if packed else f'quantization_config ({method!r})'} is of a quantized model; of the family "
            f"{family.name} Moesaic reads plain weights only: give the model in BF16"
        )
    if quantization is None:
        if packed:
            wanted = {"quant_method": "mxfp4", "modules_to_not_convert": list(family.not_packed)}
            raise ArtifactError(
                f"{packed[0]} is packed in MXFP4, but config.json has no quantization_config; engines would leave "
                f"these experts at random. Add it: {wanted}"
            )
        return False
    if method != "mxfp4" or not isinstance(quantization, dict):
        raise ArtifactError(f"quantization_config has the method {method!r}; Moesaic reads 'mxfp4', or no quantization")
    if not packed:
        raise ArtifactError(
            "config.json has a quantization_config of mxfp4, but no expert is packed; remove it from config.json"
        )
    kept = quantization.get("modules_to_not_convert")
    if not isinstance(kept, list | None) or any("experts" in str(pattern) for pattern in kept or ()):
        raise ArtifactError(f"modules_to_not_convert is {kept}, but the experts are packed; list all but the experts")
    if int(str(config["hidden_size"])) % MXFP4_BLOCK:
        raise ArtifactError(f"hidden_size is {config['hidden_size']}; MXFP4 packs multiples of {MXFP4_BLOCK}")
    return True
