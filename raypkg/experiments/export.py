"""A finished run's model in a folder for others: weights to build it again, a graph or a checkpoint, and a card.

A format is a function that writes its files and returns Markdown on their use; it is found by its name.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import tomli_w
import torch
from torch import Tensor, nn

import raypkg
from raypkg.core.address import is_uri
from raypkg.core.errors import UserError, redacted
from raypkg.core.registry import argument, extra
from raypkg.core.settings import Experiment
from raypkg.data import Data
from raypkg.data.kinds import IMAGES, ROWS, TEXTS
from raypkg.data.tokenizer import pretrained_at
from raypkg.engine.batches import dtype_of
from raypkg.models import outline
from raypkg.models.classifier import last_linear
from raypkg.models.pretrained import quiet
from raypkg.runs.document import cost_grid, findings
from raypkg.runs.folder import MODEL, RunFolder

from . import experiment, export_format
from .trained import TrainedClassifier, model_and_data

if TYPE_CHECKING:
    from raypkg.models.language import LanguageModel

CARD = "README.md"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
TASKS = {IMAGES: "image-classification", ROWS: "tabular-classification", TEXTS: "text-classification"}


class Finished(NamedTuple):
    """A finished run, opened once for all parts of an export."""

    folder: RunFolder
    settings: Experiment
    model: TrainedClassifier | LanguageModel
    data: Data

    @property
    def classifier(self) -> TrainedClassifier:
        """The model, which must be one of classes."""
        if not isinstance(self.model, TrainedClassifier):
            raise UserError(f"run {self.folder.name!r} trained a language model: give --to safetensors or transformers")
        return self.model


def export_run(folder: RunFolder, form: str, out: str, verdict: str = "") -> None:
    """Write a run's model and its card into a new local folder, which appears when it is complete."""
    place = Path(out)
    if is_uri(out):
        raise UserError(f"--out {out}: an export is a local folder")
    if place.exists():
        raise UserError(f"{out!r} exists: give another --out")
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    try:
        temporary.chmod(0o755)
        model, data, settings = model_and_data(folder)
        run = Finished(folder, settings, model, data)
        usage = export_format[form](run, temporary)
        (temporary / CARD).write_text(card(run, form, usage, verdict))
        os.rename(temporary, place)
    except BaseException:
        shutil.rmtree(temporary)
        raise


def card(run: Finished, form: str, usage: str, verdict: str) -> str:
    """Return the model's card as the Hub has it: what it is, its use, data, results, costs and settings."""
    folder, settings, model, data = run
    method = folder.storage.parent.name
    summary = folder.summary or {}
    kind, dataset = data.train.kind, redacted(settings.dataset.name)
    task = TASKS[kind] if isinstance(model, TrainedClassifier) else "text-generation"
    measured = {name: summary[f"test_{name}"] for name in ("accuracy", "perplexity") if f"test_{name}" in summary}
    metrics = [{"type": name, "value": value} for name, value in measured.items()]
    tested = {"task": {"type": task}, "dataset": {"name": dataset, "type": "effray"}, "metrics": metrics}
    front = {
        "library_name": "transformers" if form == "transformers" else "effray",
        "pipeline_tag": task,
        "tags": ["effray", method],
        "metrics": [*measured],
        "model-index": [{"name": folder.name, "results": [tested]}],
    }
    source = experiment[method].source
    of_classes = f", {data.train.num_classes} classes" if isinstance(model, TrainedClassifier) else ""
    return "\n".join(
        [
            "---",
            *(f"{name}: {json.dumps(value)}" for name, value in front.items()),  # JSON is YAML
            "---",
            f"# {folder.name}",
            "",
            f"`{settings.model.name}`, trained by `effray {method}`{f' ({source})' if source else ''} of effray"
            f" {raypkg.__version__} with seed {settings.seed}.",
            f"\n## Use\n\n{usage}",
            f"\n## Data\n\n`{dataset}`: {len(data.train):,} training and {len(data.test):,} test"
            f" samples of {kind.words(data.train.shape)}{of_classes}.",
            "\n## Results\n",
            *(f"- {line}" for line in [*findings(summary), *filter(None, [verdict])]),
            f"\n## Cost\n\n{cost_grid('', summary['phases']).markdown()}",
            f"\n## Settings\n\n<details>\n\n```toml\n{redacted(tomli_w.dumps(folder.config))}```\n\n</details>\n",
        ]
    )


def write_config(run: Finished, place: Path) -> str:
    """Write what builds the model and prepares its inputs, with the tokenizer of texts; return the code to build it."""
    train, chosen = run.data.train, run.settings.model
    config = {
        "model": chosen.name,
        "options": chosen.options,
        "shape": train.shape,
        "classes": train.classes,
        **({} if train.kind is TEXTS else {"mean": train.mean, "std": train.std}),
        **({"columns": train.columns} if train.columns else {}),
    }
    (place / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    if isinstance(run.model, TrainedClassifier) and train.kind is TEXTS:
        run.model.tokenizer.save(str(place / TOKENIZER))
    return """import json
from pathlib import Path
from safetensors.torch import load_file
from raypkg.models import build_model

config = json.loads(Path("config.json").read_text())
model = build_model(config["model"], config["shape"], len(config["classes"]), seed=0, options=config["options"]).eval()
"""


def inputs_of(data: Data, *, normalised: bool) -> str:
    """Return a sentence on the model's inputs."""
    kind = data.train.kind
    if kind is TEXTS:
        return f"Inputs are {kind.form} of {TOKENIZER}: tokens and segments, −1 after a text's end."
    scaled = "x/255 − mean" if kind is IMAGES else "x − mean"
    within = "which the graph normalises itself" if normalised else f"normalised as ({scaled})/std of {CONFIG}"
    return f"Inputs are {kind.form}, {within}."


@export_format("safetensors")
def export_safetensors(run: Finished, place: Path) -> str:
    """Write the weights, and what builds the model again."""
    code = write_config(run, place)
    (place / MODEL).write_bytes(run.folder.storage.read(MODEL) or b"")
    inputs = inputs_of(run.data, normalised=False)
    return f'```python\n{code}model.load_state_dict(load_file("{MODEL}"))\n```\n\n{inputs}'


class WithNormalisation(nn.Module):
    """A classifier of samples as they are stored: pixels are uint8, rows not yet normalised."""

    factor: Tensor
    offset: Tensor

    def __init__(self, model: TrainedClassifier, unit: float):
        super().__init__()
        self.model = model
        self.dtype = dtype_of(model)
        columns = (-1, *(1 for _ in model.shape[1:]))
        mean, std = (torch.tensor(each, dtype=self.dtype).view(columns) for each in (model.mean, model.std))
        self.register_buffer("factor", 1 / (unit * std))
        self.register_buffer("offset", -mean / std)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.model(x.to(self.dtype) * self.factor + self.offset)
        return logits


@export_format("onnx")
def export_onnx(run: Finished, place: Path) -> str:
    """Write the graph with its normalisation, for batches of any size; needs `pip install 'effray[onnx]'`."""
    extra("onnxscript", "onnx", "export --to onnx")
    model, data = run.classifier, run.data
    kind = data.train.kind
    any_size: dict[int, Any] = {0: torch.export.Dim("batch")}
    if kind is TEXTS:
        graph: nn.Module = model
        x = kind.example(2, model.shape)
        any_size[2] = torch.export.Dim.AUTO  # fixed where the network fixes it
        model.tokenizer.save(str(place / TOKENIZER))
    else:
        graph = WithNormalisation(model, 255.0 if kind is IMAGES else 1.0)
        x, _ = data.train.batch(data.train.spread(2))
    form: dict[str, Any] = {"dynamic_shapes": [any_size], "input_names": ["x"], "output_names": ["logits"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about its own parts
        try:
            program = torch.onnx.export(graph.eval(), (x,), dynamo=True, verbose=False, **form)
        except torch.onnx.OnnxExporterError as error:
            name = run.settings.model.name
            raise UserError(f"model {name!r} has no ONNX graph: {str(error).partition(chr(10))[0]}") from None
    assert program is not None
    inputs = inputs_of(data, normalised=True)
    program.model.metadata_props.update({"classes": json.dumps(model.classes), "inputs": inputs})
    program.save(str(place / "model.onnx"))
    shape = program.model.graph.inputs[0].shape or ()
    sizes = ", ".join(str(size) if isinstance(size, int) else "any" for size in shape)
    code = (
        'import json\nimport onnxruntime\n\nsession = onnxruntime.InferenceSession("model.onnx")\n'
        'classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])\n'
        '# (logits,) = session.run(None, {"x": x})\n'
    )
    return f"```python\n{code}```\n\n{inputs} Sizes: [{sizes}]. Outputs are logits [b, C]."


@export_format("transformers")
def export_transformers(run: Finished, place: Path) -> str:
    """Write a checkpoint of transformers with its tokenizer; LoRA adapters are merged."""
    folder, settings, data = run.folder, run.settings, run.data
    model = run.model
    name, shape = settings.model.name, data.train.shape
    if name.partition(":")[0] not in ("transformers", "transformers-lm"):
        raise UserError(f"model {name!r} of run {folder.name!r} is none of transformers: give --to safetensors or onnx")
    with quiet() as package:
        if isinstance(model, TrainedClassifier):
            features: Any = model.features
            drawn = {**settings.model.options, "weights": False}
            path, _ = last_linear(outline(name, shape, data.train.num_classes, drawn))
            features.set_submodule(path, model.head)
            network = features.network
            network.config.id2label = dict(enumerate(model.classes))
            network.config.label2id = {label: number for number, label in enumerate(model.classes)}
            kind = "AutoModelForSequenceClassification" if len(shape) == 2 else "AutoModelForImageClassification"
        else:
            network = model.network.merge_and_unload() if hasattr(model.network, "peft_config") else model.network
            network.config.use_cache = True
            kind = "AutoModelForCausalLM"
        network.save_pretrained(place)
        if data.train.kind is IMAGES:
            size = dict(zip(("height", "width"), shape[1:], strict=True))
            package.ViTImageProcessor(size=size, image_mean=model.mean, image_std=model.std).save_pretrained(place)
        else:
            tokenizer = pretrained_at(settings.dataset.options.get("tokenizer") or argument(name))
            tokenizer.model_max_length = shape[0]
            tokenizer.save_pretrained(place)
    return f'```python\nfrom transformers import {kind}\n\nmodel = {kind}.from_pretrained(".")\n```'
