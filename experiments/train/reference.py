"""Real images that samples are measured against, and as many others to compare with."""

from typing import Any

import numpy as np

from eqxldm.data import ImageSource

from .classifier import Described, Features, Images
from .conditions import Captions, Condition
from .config import Config
from .data import count_readable, decoded
from .streams import stream_order
from .terminal import UserError

LEAST = 5  # real images with which neighbours can be measured


class Reference:
    """Real images: those that samples are measured against, and as many others to compare with."""

    def __init__(
        self,
        config: Config,
        source: ImageSource,
        test: ImageSource | None,
        condition: Condition,
        *,
        strict: bool,
    ):
        self._config, self._strict = config, strict
        order = stream_order(config.seed, "reference", len(source))
        if test is None:
            n = min(config.pictures.reference, len(source) // 2)
            self._real, self._others = (source, order[:n]), (source, order[n:])
        else:
            chosen = stream_order(config.seed, "reference", len(test))
            self._real = test, chosen[: min(config.pictures.reference, len(test))]
            self._others = source, order
        if len(self._real[1]) < LEAST or len(self._others[1]) < LEAST:
            raise UserError(
                f"{len(source)} images, {len(self._real[1])} of them to measure against: at least "
                f"{LEAST} are needed there and {LEAST} others. Give more images, or --test-images."
            )
        for name, part in (("measured against", self._real), ("compared with", self._others)):
            n = count_readable(*part, config, enough=LEAST, strict=strict)
            if n < LEAST:
                raise UserError(
                    f"of the {len(part[1])} images that are to be {name} only {n} can be read: at "
                    f"least {LEAST} are needed. Give more images, or --test-images."
                )
        if isinstance(condition, Captions) and not self.texts(1)[0]:
            raise UserError(
                "--test-images: they have no captions, for which samples are drawn. Put "
                "captions.json or metadata.jsonl beside them, or give --condition label or none."
            )

    def first(self, n: int) -> Images:
        """Some of the real images at full size, mixed over the classes."""
        source, indices = self._real
        parts = decoded(source, indices[:n], self._config, strict=self._strict)
        return np.concatenate([images for images, _ in parts])

    def texts(self, n: int, *, others: bool = False) -> tuple[tuple[str, ...], Any]:
        """Captions of real images, or of the others, to draw images for, and their classes."""
        source, indices = self._others if others else self._real
        if not source.has_captions:
            return (), None
        records = [source[int(i)] for i in indices[:n]]
        labels = np.array([r.label for r in records], np.int32) if source.class_names else None
        return tuple(r.caption or "" for r in records), labels

    @property
    def held_out(self) -> bool:
        """Whether the real images have captions that the others, of the training, have not."""
        return self._real[0] is not self._others[0] and self._real[0].has_captions

    def described(self, features: Features) -> tuple[Described, dict[str, float]]:
        """What the features say of the real images, and how often the classes are right."""
        found, labels = self._describe(self._real, len(self._real[1]), features)
        if found.classes is None or labels is None:
            return found, {}
        return found, {"classifier_accuracy": float(np.mean(found.classes == labels))}

    def others(self, features: Features, n: int) -> Described:
        """The same of `n` other real images, or as many as there are."""
        return self._describe(self._others, n, features)[0]

    def _describe(self, part: tuple[ImageSource, Any], n: int, features: Features):
        source, indices = part
        found = decoded(source, np.sort(indices[:n]), self._config, strict=self._strict)
        described, labels = zip(*((features(images), y) for images, y in found), strict=True)
        values, classes = zip(*described, strict=True)
        join = lambda parts: None if parts[0] is None else np.concatenate(parts)
        return Described(np.concatenate(values), join(classes)), join(labels)
