"""Vision-language models: which ones these are, and a processor that needs no torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenmill.errors import LimitError, UnsupportedError

OWN_PROCESSOR = ("llava", "qwen2_5_vl")


def is_vision(config: Any) -> bool:
    """Whether a configuration is one of an image-text-to-text model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and hasattr(config, "vision_config")


def processor(place: str, config: Any) -> Any:
    """The processor of a model: ours for LLaVA and Qwen2.5-VL, transformers' for the others.

    Raises:
        UnsupportedError: transformers cannot build it here (some want torchvision).
    """
    from transformers import AutoProcessor, AutoTokenizer

    if config.model_type in OWN_PROCESSOR:
        return PictureProcessor(_image_processor(place, config), AutoTokenizer.from_pretrained(place), config)
    try:
        return AutoProcessor.from_pretrained(place)
    except ImportError as error:
        reason = str(error).strip().split("\n")[0]
        raise UnsupportedError("models.load", f"the processor of {place!r} cannot be built: {reason}") from error


def _image_processor(place: str, config: Any) -> Any:
    from transformers import CLIPImageProcessorPil, Qwen2VLImageProcessorPil

    kind = Qwen2VLImageProcessorPil if config.model_type == "qwen2_5_vl" else CLIPImageProcessorPil
    return kind.from_pretrained(place)


class PictureProcessor:
    """Texts with placeholders and pictures -> arguments of a LLaVA's or Qwen2.5-VL's forward.

    The combined processors of transformers do the same and want torchvision for videos; this one takes pictures alone.

    Attributes:
        image_processor: of the model.
        tokenizer: of the model, padding on the left.
    """

    def __init__(self, image_processor: Any, tokenizer: Any, config: Any) -> None:
        self.image_processor, self.tokenizer, self._config = image_processor, tokenizer, config
        tokenizer.padding_side = "left"
        self.image_token: str = tokenizer.convert_ids_to_tokens(config.image_token_id)

    def __call__(self, text: str | Sequence[str], images: Sequence[Any], return_tensors: str = "pt") -> dict[str, Any]:
        """Write each placeholder as often as its picture has features.

        Args:
            text: prompts, with one image token a picture.
            images: pictures (PIL images, or (H, W, 3) uint8 arrays) in the order of the placeholders.
            return_tensors: ``"pt"``.

        Raises:
            LimitError: more or fewer placeholders than pictures.
        """
        del return_tensors
        texts = [text] if isinstance(text, str) else list(text)
        placeholders = sum(t.count(self.image_token) for t in texts)
        if placeholders != len(images):
            raise LimitError(
                "PictureProcessor",
                "text",
                f"{placeholders} placeholders {self.image_token!r}",
                f"{len(images)}, one a picture",
            )
        pixels = dict(self.image_processor(images=list(images), return_tensors="pt")) if images else {}
        counts = iter(self._counts(pixels, len(images)))
        parts = [t.split(self.image_token) for t in texts]
        written = [head + "".join(self.image_token * next(counts) + part for part in rest) for head, *rest in parts]
        found = self.tokenizer(written, padding=True, return_tensors="pt", add_special_tokens=False)
        made: dict[str, Any] = {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"], **pixels}
        if "image_grid_thw" in pixels:
            made["mm_token_type_ids"] = (made["input_ids"] == self._config.image_token_id).int()
        return made

    def prompt(self, question: str) -> str:
        """One picture and one question as the model's chat template writes them."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )

    def decode(self, ids: Tensor) -> str:
        """Text of the token ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _counts(self, pixels: dict[str, Tensor], number: int) -> list[int]:
        if not number:
            return []
        if "image_grid_thw" in pixels:
            unit = self._config.vision_config.spatial_merge_size**2
            return [int(n) for n in torch.as_tensor(pixels["image_grid_thw"]).prod(-1) // unit]
        height, width = pixels["pixel_values"].shape[-2:]
        patch = self._config.vision_config.patch_size
        extra = self._config.vision_feature_select_strategy != "default"
        return [(height // patch) * (width // patch) + extra] * number
