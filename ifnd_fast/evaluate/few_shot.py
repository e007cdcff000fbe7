"""ifnd-fast-eval few-shot: logistic regression on few labels of frozen features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn

from ifnd_fast.config import SEED, at_least, check
from ifnd_fast.contrast.encoder import build_backbone
from ifnd_fast.data import features
from ifnd_fast.data.images import Images
from ifnd_fast.evaluate.labelled import open_labelled
from ifnd_fast.evaluate.subject import Options, Subject
from ifnd_fast.metrics import few_shot as metric
from ifnd_fast.metrics.few_shot import few_shot_accuracies, summary, usable_shots
from ifnd_fast.metrics.labelled import LabelledFeatures, LabelledImages
from ifnd_fast.runtime.compute import Compute
from ifnd_fast.runtime.console import say
from ifnd_fast.runtime.errors import UsageError
from ifnd_fast.training.accuracies import accuracy_table
from ifnd_fast.training.measuring import pixels_are_few


@dataclass
class FewShotOptions:
    """L2-normalised features, L2 penalty with C = 10; the same labelled images for each kind of features."""

    shots: Annotated[tuple[int, ...], at_least(1, empty=False)] = metric.SHOTS
    """labelled training images of each class; a class with fewer gives all that it has"""
    draws: Annotated[int, at_least(1)] = metric.DRAWS
    """random choices of the labelled images, of which mean and sample standard deviation are written"""
    seed: Annotated[int, SEED] = 0
    """of the draws"""
    compare: bool = True
    """measure raw pixels (of images up to 64 pixels) and an untrained encoder too"""


def few_shot(common: tyro.conf.OmitArgPrefixes[Options], options: tyro.conf.OmitArgPrefixes[FewShotOptions]) -> None:
    """Accuracy with 1, 5, 10 and 50 labels a class, of logistic regression on frozen features, beside raw pixels and
    an untrained encoder."""
    check(options)
    subject = Subject(common)
    labelled = LabelledImages(*open_labelled(subject.data))
    trained = labelled.features(subject.features)
    shots = usable_shots(trained.train_labels, tuple(dict.fromkeys(options.shots)))
    if not shots:
        asked = " ".join(map(str, options.shots))
        raise UsageError(f"--shots {asked}: no class has as many readable training images, or there is one class only")

    def measure(found: LabelledFeatures) -> dict[str, Any]:
        return summary(few_shot_accuracies(*found, shots=shots, draws=options.draws, seed=options.seed))

    figures = {"few_shot_top1": measure(trained)}
    if options.compare:
        untrained = _untrained(subject)
        others = {"_untrained": lambda images: _extract(subject, untrained, images, subject.compute)}
        if pixels_are_few(subject.data, len(labelled.images)):
            on_cpu = Compute(torch.device("cpu"))
            others["_raw_pixels"] = lambda images: _extract(subject, nn.Flatten(), images, on_cpu)
        else:
            say("raw pixels are left out: they are measured of up to 100,000 images of up to 64 pixels")
        figures |= {f"few_shot_top1{suffix}": measure(labelled.features(of)) for suffix, of in others.items()}
    title = f"Few labels of {subject.data.data}: top-1 of logistic regression"
    counts = {"train_images": len(trained.train_labels), "test_images": len(trained.test_labels)}
    setting = {"task": "few-shot", "draws": options.draws, "seed": options.seed}
    subject.write_result(title, *accuracy_table(figures), {**setting, **counts, **figures})
    say(f"± is the standard deviation over {options.draws} draws of the labelled images")


def _untrained(subject: Subject) -> nn.Module:
    """The same architecture with the first weights that the run's seed gives."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(subject.config.run.seed)
        network, _ = build_backbone(subject.config.model, subject.data.image_size)
    return network.eval().to(subject.compute.device).to(memory_format=subject.layout)


def _extract(subject: Subject, network: nn.Module, images: Images, compute: Compute) -> tuple[Tensor, Tensor]:
    """Unreadable images are known by now, from the trained encoder's features."""
    return features.extract(network, images, subject.data, compute)
