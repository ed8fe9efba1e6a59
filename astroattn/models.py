"""Pretrained models by name, with what turns texts, photos or recordings into their inputs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from astroattn.imports import needs
from astroattn.patching.saving import RECORD_KEY
from astroattn.suggestions import suggest

if TYPE_CHECKING:
    from numpy.typing import NDArray

# the auto class of transformers that keeps the head, by what the name of the architecture ends in
HEADS = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
}
GGUF = "*.gguf"
SPEECH_INPUTS = ("input_features", "input_values")  # main inputs of speech models
FRAME_MASK = "frame_mask"  # beside them, Bool [B, T]: the steps of the input before the recording ends; for `compare`


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode and the way from items to its inputs.

    Args:
        name: as it was asked for.
        library: `"transformers"` or `"timm"`.
        kind: `"text"`, `"image"` or `"audio"`, what its items are; empty where it was loaded without what they need.
        model: the module.
        encode: makes one batch of inputs from a list of texts, of lists of token ids, of PIL images, or of recordings:
            the samples [T] of -1 to 1, and how many there are in a second.
        tokenizer: of a text model, and of a speech model that writes.
        classes: class index by lower-case name, where the model knows names for its classes.
        num_classes: number of classes it predicts, 0 for none.
        max_tokens: most tokens of a text, 0 for other items.
        image_size: pixels per side of its photos, 0 for other items.
        notes: how items are prepared.
    """

    name: str
    library: str
    kind: str
    model: nn.Module
    encode: Callable[[Sequence[Any]], Mapping[str, Any] | Tensor]
    tokenizer: Any = None
    classes: Mapping[str, int] = field(default_factory=dict)
    num_classes: int = 0
    max_tokens: int = 0
    image_size: int = 0
    notes: tuple[str, ...] = ()


def load_model(
    spec: str,
    *,
    weights: str | Path | None = None,
    size: int | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    items: bool = True,
) -> LoadedModel:
    """Load a pretrained model from safetensors; no code that comes with a model is ever run.

    Args:
        spec: a local folder, an id on the Hugging Face hub (transformers), `timm:NAME`, or `package:NAME` for a Python
            package that carries a model folder. A folder may hold one .gguf file instead: a language model, whose
            weights are made full ones again.
        weights: for `timm:NAME`, a safetensors file that must fit strictly; for an id on the hub, a local folder that
            holds the same model; None loads the pretrained weights.
        size: pixels per side of the photos, with interpolated position embeddings; None is the model's own.
        dtype: of the weights; None is float32.
        device: None is the CPU.
        items: also load the tokenizer or processor that items need; without, `encode` raises.

    Raises:
        ValueError: a spec, file or size that cannot be loaded, saying why.
        ImportError: transformers or timm is not installed.
    """
    if size is not None and size < 1:
        raise ValueError(f"size: must be at least 1 pixel, got {size}")
    if weights is not None and not spec.startswith("timm:"):
        if spec.startswith("package:") or Path(spec).is_dir():
            raise ValueError(f"weights: only for timm:NAME models and ids on the hub; {spec!r} has them in its folder")
        if not (Path(weights) / "config.json").is_file():
            raise ValueError(f"weights: for {spec!r} must be a folder with a config.json, got {str(weights)!r}")
    if spec.startswith("timm:"):
        loaded = _load_timm(spec, spec.removeprefix("timm:"), weights, size)
    else:
        folder = find_package_folder(spec.removeprefix("package:")) if spec.startswith("package:") else weights or spec
        loaded = _load_transformers(spec, str(folder), size, items)
    try:
        target = torch.device(device or "cpu")
        loaded.model.to(target, dtype or torch.float32).eval()
    except (RuntimeError, AssertionError) as error:  # torch's words for a device that is not there
        raise ValueError(f"device: {device!r} cannot be used: {_first_line(error)}") from None
    return loaded


def find_package_folder(package: str) -> Path:
    """The folder with a `config.json`, or a .gguf file, inside an installed Python package, which is not imported."""
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        meant = suggest(package, importlib.metadata.packages_distributions())
        raise ValueError(f"package: {package!r} is not installed; try `pip install {package.replace('_', '-')}`{meant}")
    root = Path(found.submodule_search_locations[0])
    for pattern in ("config.json", GGUF):
        if found_files := sorted(root.rglob(pattern), key=lambda path: (len(path.parts), path)):
            return found_files[0].parent
    raise ValueError(f"package: {package!r} has no folder with a config.json or a .gguf file")


def _load_timm(spec: str, name: str, weights: str | Path | None, size: int | None) -> LoadedModel:
    with needs("eval"):
        import timm

    try:
        model = timm.create_model(name)
        path = Path(weights) if weights is not None else _download_weights(model)
    except (RuntimeError, OSError, ValueError) as error:
        meant = "" if timm.is_model(name) else suggest(name, timm.list_models())
        raise ValueError(f"model: timm cannot make {name!r}: {_first_line(error)}{meant}") from None
    _load_strictly(model, name, path)
    if size is not None:
        if not hasattr(model, "set_input_size"):
            raise ValueError(f"size: timm's {name!r} has a fixed input size")
        try:
            model.set_input_size(img_size=size)
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ValueError(f"size: {name!r} cannot take photos of {size} pixels: {_first_line(error)}") from None
    data = timm.data.resolve_data_config({}, model=model)
    if size is not None:
        data |= {"input_size": (3, size, size), "crop_pct": 1.0}
    side = data["input_size"][-1]
    transform = timm.data.create_transform(**data)
    plain = timm.data.create_transform(**data | {"crop_pct": 1.0})  # resizes to the side itself: nothing to do

    def encode(images: Sequence[Any]) -> Tensor:
        return torch.stack([(plain if image.size == (side, side) else transform)(image) for image in images])

    resized = math.floor(side / data["crop_pct"])
    how = f"resize to {resized}, centre crop {side}; photos of {side} x {side} as they are"
    return LoadedModel(
        spec, "timm", "image", model, encode, num_classes=model.num_classes, image_size=side, notes=(how,)
    )


def _download_weights(model: Any) -> Path:
    """The safetensors file of a timm model on the hub; timm itself would also take a pickle."""
    from huggingface_hub import hf_hub_download

    repository = model.pretrained_cfg.get("hf_hub_id")
    if not repository:
        raise ValueError("it has no pretrained weights on the hub; give a file with weights")
    return Path(hf_hub_download(repository, "model.safetensors"))


def _load_strictly(model: nn.Module, name: str, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.suffix != ".safetensors":
        raise ValueError(f"weights: only .safetensors files are read, got {str(path)!r}")
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"weights: cannot read {str(path)!r}: {_first_line(error)}") from None
    own = model.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = sorted(key for key in own.keys() & state.keys() if own[key].shape != state[key].shape)
    problems = {"missing": missing, "unknown": extra, "of another shape": wrong}
    found = [f"{len(keys)} {what} ({keys[0]}, ...)" for what, keys in problems.items() if keys]
    if found:
        raise ValueError(f"weights: {str(path)!r} does not fit {name!r}: {'; '.join(found)}")
    model.load_state_dict(state, strict=True)


def _load_transformers(spec: str, source: str, size: int | None, items: bool) -> LoadedModel:
    with needs("eval"):
        import transformers
        from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES

    local = Path(source).is_dir()
    if not local and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise ValueError(f"model: there is no folder {source!r}")
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": local}
    if local and not (Path(source) / "config.json").is_file():
        files = list(Path(source).glob(GGUF))
        if len(files) != 1:
            raise ValueError(f"model: {source!r} has no config.json, and {len(files) or 'no'} .gguf files")
        options["gguf_file"] = files[0].name
    try:
        config = transformers.AutoConfig.from_pretrained(source, **options)
        architecture = "ForCausalLM" if "gguf_file" in options else (config.architectures or [""])[0]
        auto = next((auto for end, auto in HEADS.items() if architecture.endswith(end)), "AutoModel")
        if architecture in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.values():  # their names end like those of T5, BART
            auto = "AutoModelForSpeechSeq2Seq"
        model = getattr(transformers, auto).from_pretrained(source, config=config, use_safetensors=True, **options)
        if vars(model.config).pop(RECORD_KEY, None) is not None:
            warnings.warn(
                f"{spec!r} was saved from a patched model and is opened with softmax attention; "
                "astroattn.load(model, folder) patches it as it was",
                stacklevel=3,
            )
        if not items and size is None:  # which says how photos are prepared
            return LoadedModel(spec, "transformers", "", model, _encode_nothing)
        main_input = model.main_input_name
        if main_input not in _ENCODERS:
            raise ValueError(f"it reads {main_input!r}, and only texts, photos and recordings are known here")
        return _ENCODERS[main_input](spec, source, model, size, options)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"model: cannot load {spec!r}: {_first_line(error)}") from None


def _encode_nothing(items: Sequence[Any]) -> Any:
    raise ValueError("items: the model was loaded without what they need")


def _with_tokenizer(spec: str, source: str, model: Any, size: int | None, options: dict[str, Any]) -> LoadedModel:
    import transformers

    if size is not None:
        raise ValueError("size: is for photos, this model reads text")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 10**9))
    if tokenizer.pad_token is None:  # padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token

    def encode(texts: Sequence[str | list[int]]) -> Mapping[str, Any]:
        if isinstance(texts[0], str):
            inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        else:
            inputs = tokenizer.pad({"input_ids": [list(ids) for ids in texts]}, return_tensors="pt")
        return {name: value for name, value in inputs.items() if name in accepted}

    accepted = inspect.signature(model.forward).parameters
    return LoadedModel(
        spec, "transformers", "text", model, encode, tokenizer=tokenizer,
        classes=_class_names(model), num_classes=_count_classes(model), max_tokens=limit,
        notes=(f"at most {limit} tokens",),
    )  # fmt: skip


def _with_processor(spec: str, source: str, model: Any, size: int | None, options: dict[str, Any]) -> LoadedModel:
    import transformers

    processor = transformers.AutoImageProcessor.from_pretrained(source, **options)
    extra: dict[str, Any] = {}
    shape = {}
    if size is not None:
        if "interpolate_pos_encoding" not in inspect.signature(model.forward).parameters:
            raise ValueError("size: this model cannot interpolate its position embeddings")
        extra = {"interpolate_pos_encoding": True}
        shape = {"size": {"height": size, "width": size}, "do_center_crop": False}

    def encode(images: Sequence[Any]) -> Mapping[str, Any]:
        return {"pixel_values": processor(images=list(images), return_tensors="pt", **shape)["pixel_values"], **extra}

    side = size or int(getattr(model.config, "image_size", 0) or 0)
    return LoadedModel(
        spec, "transformers", "image", model, encode, classes=_class_names(model),
        num_classes=_count_classes(model), image_size=side, notes=(f"{type(processor).__name__}, {side} pixels",),
    )  # fmt: skip


def _with_feature_extractor(
    spec: str, source: str, model: Any, size: int | None, options: dict[str, Any]
) -> LoadedModel:
    import transformers

    if size is not None:
        raise ValueError("size: is for photos, this model reads recordings")
    extractor = transformers.AutoFeatureExtractor.from_pretrained(source, **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options) if model.can_generate() else None
    rate, longest = extractor.sampling_rate, getattr(extractor, "n_samples", None)

    def encode(clips: Sequence[Any]) -> Mapping[str, Any]:
        inputs = extractor(
            [resample(samples, given, rate) for samples, given in clips],
            sampling_rate=rate,
            padding="max_length" if longest else True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        mask = inputs.get("attention_mask")
        seen = {"attention_mask": mask} if extractor.return_attention_mask else {}  # others were trained without
        clip = {} if mask is None else {FRAME_MASK: mask.bool()}
        return {model.main_input_name: inputs[model.main_input_name], **seen, **clip}

    notes = [f"{type(extractor).__name__}, {rate} Hz (other rates are resampled)"]
    if longest:
        notes.append(f"at most {longest / rate:g} s (longer ones are cut)")
    return LoadedModel(spec, "transformers", "audio", model, encode, tokenizer=tokenizer, notes=tuple(notes))


def resample(samples: NDArray[Any], given: int, wanted: int) -> NDArray[Any]:
    """A recording [T] at another rate, in samples per second, by polyphase filtering."""
    if given == wanted:
        return samples
    with needs("eval"):
        from scipy.signal import resample_poly

    common = math.gcd(given, wanted)
    resampled: NDArray[Any] = resample_poly(samples, wanted // common, given // common)
    return resampled


_ENCODERS = {
    "input_ids": _with_tokenizer,
    "pixel_values": _with_processor,
    **dict.fromkeys(SPEECH_INPUTS, _with_feature_extractor),
}


def _count_classes(model: Any) -> int:
    return int(model.config.num_labels) if type(model).__name__.endswith("Classification") else 0


def _class_names(model: Any) -> dict[str, int]:
    """Names of the classes as people write them; an entry such as "tench, Tinca tinca" gives each of its names."""
    names: dict[str, int] = {}
    if _count_classes(model):
        for index, text in model.config.id2label.items():
            for name in (text, *str(text).split(",")):
                names.setdefault(str(name).strip().lower(), int(index))
    return names


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
