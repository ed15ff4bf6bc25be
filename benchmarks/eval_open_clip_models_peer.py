"""open_clip's models by `declip eval` and by open_clip itself, in the peers' environment.

``eval_open_clip_models_peer.py DATASET WORK [MODEL ...]`` writes WORK/answers.jsonl and more.json.
The weights are drawn at random and saved; theirs is the very model that was saved, ours what is
read back. Every parameter is moved a little from its start, for many start as zeros (biases, the
scales of layers), and what is multiplied by zero is not compared.
"""

import json
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow.parquet as pq
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from declip_shards import DeclipError
from pipelines.eval_jobs import plan_jobs
from pipelines.eval_models import EvalModel, load_eval_model, normalized
from pipelines.eval_options import parse_options
from pipelines.eval_ranks import ranks_of_launcher
from pipelines.eval_tasks import Evaluation

PACKAGES = ("open_clip_torch", "torch", "torchvision", "timm", "transformers", "numpy", "pillow")
PREPROCESS = ("mean", "std", "interpolation", "resize_mode", "fill_color")
WORDS = ["photograph", "drawing", "icon", "figure", "red apple", "old house", "ship at sea", "cat"]


@dataclass(frozen=True)
class Family:
    """A model that stands for those built like it."""

    name: str
    is_folder: bool = False
    """Whether it lies in a folder (``local-dir:``) with its tokenizer, two layers in its own
    towers; else it is named, and its checkpoint is a file."""
    text_kind: str | None = None
    """Of transformers, with sizes made small."""
    preprocess: tuple[tuple[str, Any], ...] = ()
    """Where it is not that of the model's first published weights."""


FAMILIES = (
    Family("ViT-S-32-alt"),
    Family("ViT-B-32-quickgelu"),
    Family("RN50"),
    Family("ViT-M-16-alt"),
    Family("coca_ViT-B-32"),
    Family("EVA02-B-16"),
    Family("convnext_tiny"),
    Family("swin_base_patch4_window7_224"),
    Family("vit_relpos_medium_patch16_cls_224", preprocess=(("resize_mode", "longest"),)),
    Family("ViTamin-S", preprocess=(("resize_mode", "longest"), ("fill_color", 127))),
    Family("MobileCLIP2-S0"),
    Family("PE-Core-T-16-384"),
    Family("ViT-B-16-SigLIP", is_folder=True),
    Family("ViT-B-32-SigLIP2-256", is_folder=True),
    Family("ViT-L-14-CLIPA", is_folder=True),
    Family("ViT-L-14-worldwide", is_folder=True),
    Family("roberta-ViT-B-32", is_folder=True, text_kind="roberta"),
    Family("xlm-roberta-base-ViT-B-32", is_folder=True, text_kind="xlm-roberta"),
    Family("mt5-base-ViT-B-32", is_folder=True, text_kind="mt5"),
    Family("nllb-clip-base", is_folder=True, text_kind="m2m_100"),
    Family("coca_roberta-ViT-B-32", is_folder=True, text_kind="roberta"),
)


REFUSED = {
    "a tokenizer of the Hub": "ViT-B-16-SigLIP/{file}",
    "a text model of the Hub": "roberta-ViT-B-32/{file}",
    "a repository": "hf-hub:timm/ViT-B-16-SigLIP",
    "a folder without a configuration": "local-dir:{folder}",
    "a tag that it has not": "coca_ViT-B-32/laion2b",
    "a name that there is not": "ViT-B-32-SigLIP/webli",
    "weights of another model": "MobileCLIP2-S0/{file}",
}
"""What cannot be had without the Hub, or at all; {file} are weights of another model."""


def preprocess_of(family: Family) -> dict[str, Any]:
    """That of the first published weights, in which families differ."""
    tags = open_clip.list_pretrained_tags_by_model(family.name)
    about = open_clip.get_pretrained_cfg(family.name, tags[0]) if tags else {}
    return {name: about[name] for name in PREPROCESS if name in about} | dict(family.preprocess)


def save_tokenizer(folder: Path, texts: Sequence[str]) -> Any:
    """A tokenizer of the tokens that all kinds of text models ask for, made from some texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    names |= {"sep_token": "</s>", "cls_token": "<s>", "mask_token": "<mask>"}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    made.save_pretrained(folder)
    return made


def save_text_model(kind: str, folder: Path, vocab_size: int) -> None:
    """The configuration of a text model of transformers, two layers of 64 channels."""
    from transformers import AutoConfig

    config = open_clip.hf_configs.arch_dict[kind]["config_names"]
    sizes = {"vocab_size": vocab_size, "width": 64, "heads": 4, "layers": 2, "context_length": 90}
    given = {config[name]: value for name, value in sizes.items() if config[name]}
    given |= {"mt5": {"d_kv": 16, "d_ff": 64}, "m2m_100": {"encoder_ffn_dim": 64}}.get(kind, {})
    made = AutoConfig.for_model(kind, **given, pad_token_id=1, bos_token_id=0, eos_token_id=2)
    made.save_pretrained(folder)


def small(family: Family, folder: Path, texts: Sequence[str]) -> dict[str, Any]:
    """A family's configuration with two layers in open_clip's own towers; its tokenizer beside."""
    config = open_clip.get_model_config(family.name)
    tokenizer = save_tokenizer(folder, texts)
    vision, text = config["vision_cfg"], config["text_cfg"]
    for part in (vision, text, config.get("multimodal_cfg", {})):
        if "layers" in part:
            part["layers"] = 2
    if "vocab_size" in text:
        text["vocab_size"] = len(tokenizer)
    if "multimodal_cfg" in config:
        config["multimodal_cfg"]["vocab_size"] = len(tokenizer)
    if "eos_id" in text:
        text["eos_id"] = tokenizer.eos_token_id
    if family.text_kind is not None:
        # Beside the tokenizer its configuration would be taken for the tokenizer's.
        beside = folder / "text"
        save_text_model(family.text_kind, beside, len(tokenizer))
        text |= {"hf_model_name": str(beside), "hf_proj_type": "linear"}
    return dict(config)


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """The model with every parameter and running statistic off its start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(0.02 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.1 * torch.randn_like(buffer))
            if name.endswith("running_var"):
                buffer.mul_(0.5 + torch.rand_like(buffer))
    return model.eval()


def make(family: Family, work: Path, texts: Sequence[str]) -> tuple[Any, Any, str]:
    """open_clip's model and tokenizer, and the name under which `declip eval` finds its weights."""
    torch.manual_seed(0)
    preprocess = preprocess_of(family)
    if family.is_folder:
        folder = work / "model"
        folder.mkdir()
        content = {"model_cfg": small(family, folder, texts), "preprocess_cfg": preprocess}
        (folder / "open_clip_config.json").write_text(json.dumps(content))
        name = f"local-dir:{folder}"
        model = moved(open_clip.create_model(name, pretrained_text=False))
        from safetensors.torch import save_file

        state = {key: value.clone().contiguous() for key, value in model.state_dict().items()}
        save_file(state, folder / "open_clip_model.safetensors")
        return model, open_clip.get_tokenizer(name), f"open_clip:{name}"
    config = {"model_cfg": open_clip.get_model_config(family.name), "preprocess_cfg": preprocess}
    model = open_clip.create_model(family.name, force_preprocess_cfg=preprocess)
    path = work / "epoch_1.pt"
    torch.save({"epoch": 1, "state_dict": moved(model).state_dict()}, path)
    (work / "open_clip_config.json").write_text(json.dumps(config))
    return model, open_clip.get_tokenizer(family.name), f"open_clip:{family.name}/{path}"


@torch.inference_mode()
def theirs(
    model: Any, tokenize: Any, paths: Sequence[Path], texts: Sequence[str]
) -> tuple[Any, Any, Any]:
    """open_clip's input of the image tower, and unit features of pictures and texts."""
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    inputs = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    images = torch.cat([model.encode_image(part) for part in inputs.split(8)])
    of_texts = model.encode_text(tokenize(list(texts)))
    normalize = torch.nn.functional.normalize
    units = [normalize(part.float(), dim=-1).numpy() for part in (images, of_texts)]
    return inputs.numpy(), units[0], units[1]


def difference(ours: Any, other: Any) -> dict[str, float]:
    """How far unit features lie apart; random towers say much the same of everything, so also of
    what is left when the mean over all is taken away."""
    mean = other.mean(axis=0)
    a, b = (part - mean for part in (ours, other))
    cosines = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return {
        "cosine": float(1 - (ours.astype(np.float64) * other).sum(1).min()),
        "cosine_about_mean": float(1 - cosines.min()),
    }


def ours(loaded: EvalModel, spec: str, dataset: Path, work: Path) -> tuple[Any, Any, float]:
    """`declip eval`'s features of the pictures, its predictions, and its accuracy."""
    argv = ["--model", spec, "--dataset", dataset.name, "--dataset-root", str(dataset.parent)]
    argv += ["--output", str(work / "out"), "--feature-root", str(work / "features")]
    argv += ["--device", "cpu", "--batch-size", "16", "--num-examples", "0", "--quiet"]
    options = parse_options([*argv, "--num-resamples", "100"])
    ranks = ranks_of_launcher({}, work / "features", asked=False)
    # As the command does it, with a model that is loaded once for all that is compared.
    report = Evaluation(options, plan_jobs(options), ranks, "cpu", lambda _: loaded).run()
    if [entry.status for entry in report.entries] != ["done"]:
        raise SystemExit(f"declip eval: {[entry.note for entry in report.entries]}")
    chunk = next((work / "features").glob("*/chunk-000000.npz"))
    outcomes = pq.read_table(next((work / "out").glob("*.outcomes.parquet")))
    predicted = np.array([best[0] for best in outcomes["predicted"].to_pylist()])
    return np.load(chunk)["features"], predicted, report.results[0].metrics["acc1"]


def compare(family: Family, dataset: Path, work: Path) -> dict[str, Any]:
    """Both ways, and how far they lie apart."""
    paths = sorted((dataset / "test").glob("*/*"))
    classes = sorted({path.parent.name for path in paths})
    texts = [f"a photo of a {name}." for name in classes] + [
        f"{first} {second}, {number} of them"
        for number, (first, second) in enumerate(zip(WORDS, reversed(WORDS), strict=True))
    ]
    model, tokenize, spec = make(family, work, texts)
    inputs, images, of_texts = theirs(model, tokenize, paths, texts)
    start = time.process_time()
    loaded = load_eval_model(spec)
    features, predicted, acc1 = ours(loaded, spec, dataset, work)
    seconds = time.process_time() - start
    views, reasons = loaded.prepare([path.read_bytes() for path in paths])
    assert not any(reasons), reasons
    scale = 255 * np.array(loaded.preparation.std)[:, None, None]
    off = np.abs(normalized(views, loaded.preparation, "cpu").numpy() - inputs) * scale
    by_open_clip = (images @ of_texts[: len(classes)].T).argmax(1)
    return {
        "towers": "open_clip's" if type(loaded).__name__ == "OpenClipModel" else "own",
        "parameters": sum(part.numel() for part in model.parameters()),
        "preparation": {k: v for k, v in asdict(loaded.preparation).items() if k != "fill_color"},
        "pixels_largest": float(off.max()),
        "pixels_mean": float(off.mean()),
        "spread_of_pictures": float(1 - (images @ images.T).mean()),
        "images": difference(features, images),
        "texts": difference(loaded.encode_texts(texts), of_texts),
        "same_predictions": float((predicted == by_open_clip).mean()),
        "acc1": acc1,
        "processor_seconds": round(seconds, 1),
    }


def refusals(folder: Path) -> dict[str, str]:
    """What is said of models that cannot be had here."""
    path = folder / "weights.pt"
    torch.save({"visual.proj": torch.zeros(3, 3)}, path)
    said = {}
    for what, spec in REFUSED.items():
        try:
            load_eval_model("open_clip:" + spec.format(file=path, folder=folder))
            said[what] = ""
        except DeclipError as error:
            said[what] = str(error).replace(str(folder), "FOLDER")
    return said


def main() -> None:
    dataset, work, names = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    (dataset / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    for family in FAMILIES:
        if names and family.name not in names:
            continue
        print(family.name, flush=True)
        with tempfile.TemporaryDirectory(dir=work) as folder:
            answer: dict[str, Any] = {"model": family.name}
            answer["by"] = "folder" if family.is_folder else "name and file"
            try:
                answer |= compare(family, dataset, Path(folder))
            except Exception as error:  # The others go on; the one that asks fails of it.
                traceback.print_exc()
                answer["error"] = f"{type(error).__name__}: {error}"
        with open(work / "answers.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(answer) + "\n")
    versions = {package: version(package) for package in PACKAGES}
    with tempfile.TemporaryDirectory(dir=work) as folder:
        content = {"refusals": refusals(Path(folder)), "versions": versions}
    (work / "more.json").write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    main()
